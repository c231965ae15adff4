"""Load the tokenizer and conversation format of a model folder, and the image processor of a configuration.

    tokenizer = load_tokenizer("internlm-xcomposer2-vl-7b")        # from tokenizer.json, else tokenizer.model
    conversation = load_conversation("internlm-xcomposer2-vl-7b")  # turns → ids
    image_processor = load_image_processor(config)                 # vl-7b: a picture → float32 [3, 490, 490]

No code of the folder is run: tokenizer.json is read, whatever class tokenizer_config.json names.
"""

from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from trainer.models.xcomposer2.conversation_xcomposer2 import CHAT_TEMPLATE, Conversation
from trainer.models.xcomposer2.image_processing_xcomposer2 import ImageProcessor, image_processor_for
from trainer.models.xcomposer2.tokenization_xcomposer2 import tokenizer_from_sentencepiece


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder; ValueError if it has none or a broken one.

    Its chat template is always this project's, so that the saved one describes the training.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:  # `tokenizers` raises no narrower class for a file that it cannot parse
            raise ValueError(f"the tokenizer files of {folder} cannot be read: {error}") from error
    elif (folder / "tokenizer.model").is_file():
        tokenizer = tokenizer_from_sentencepiece(folder / "tokenizer.model")
    else:
        raise ValueError(
            f"{folder} has neither tokenizer.json nor tokenizer.model; copy it from the published model"
        )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_conversation(folder: str | Path) -> Conversation:
    """The conversation format with the tokenizer of a model folder; ValueError as in `load_tokenizer`."""
    return Conversation(load_tokenizer(folder))


def load_image_processor(config: PreTrainedConfig) -> ImageProcessor:
    """The image processor of a model of this configuration; see `image_processor_for`."""
    return image_processor_for(config)
