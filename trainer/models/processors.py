"""From a model folder to its tokenizer, from a configuration to its image processor.

    tokenizer = load_tokenizer("internlm-xcomposer2-vl-7b")      # from tokenizer.json, else tokenizer.model
    image_processor = load_image_processor(config, hd_num=None)  # vl-7b: a picture → float32 [3, 490, 490]

Neither runs code of the folder: tokenizer.json counts, whatever class tokenizer_config.json names.
"""

from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from trainer.models.xcomposer2.image_processing_xcomposer2 import ImageProcessor, image_processor_for
from trainer.models.xcomposer2.tokenization_xcomposer2 import tokenizer_from_sentencepiece


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder; ValueError in a sentence when it has none or a broken one."""
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        try:
            return PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:  # `tokenizers` raises no narrower class for a file that it cannot parse
            raise ValueError(f"the tokenizer files of {folder} cannot be read: {error}") from error
    if (folder / "tokenizer.model").is_file():
        return tokenizer_from_sentencepiece(folder / "tokenizer.model")
    raise ValueError(
        f"{folder} holds neither tokenizer.json nor tokenizer.model; copy the file from the published model"
    )


def load_image_processor(config: PreTrainedConfig, hd_num: int | None = None) -> ImageProcessor:
    """The image processor of a model of this configuration; see `image_processor_for`."""
    return image_processor_for(config, hd_num)
