"""Load the processor of a vision-language model of transformers, without torchvision.

    processor = load_processor("Qwen2.5-VL-3B-Instruct")    # its own class: Qwen2_5_VLProcessor
    processor(text=["<|image_pad|> A cat."], images=[[image]])

`AutoProcessor` fails without torchvision for every family that takes videos too, as their video processors
need it. Here that part is left empty, and pictures take the PIL backend, whatever backend the folder names.
"""

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.auto_mappings import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import processor_class_from_name


def load_processor(folder: str | Path) -> Any:
    """The processor of a model folder, without video; ValueError if it cannot be loaded without torchvision.

    No code of the folder is run.
    """
    folder = Path(folder)
    name = _processor_class(folder)
    cls: Any = processor_class_from_name(name) if name else None
    if cls is None:
        raise ValueError(
            f"{folder}: its files name no processor of transformers; is this a vision-language model?"
        )
    try:
        parts = []
        for attribute in cls.get_attributes():
            if attribute == "tokenizer":
                parts.append(AutoTokenizer.from_pretrained(folder))
            elif attribute == "image_processor":
                parts.append(AutoImageProcessor.from_pretrained(folder, backend="pil"))
            elif attribute == "video_processor":
                parts.append(None)
            else:
                raise ValueError(f"it needs a {attribute}, and only text and pictures are supported")
        return build_processor(cls, parts, cls.get_processor_dict(folder)[0])
    except (ValueError, ImportError, OSError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "torchvision" in reason.lower():
            reason = (
                "it needs torchvision, which the trainer does without; choose a model with the PIL backend"
            )
        elif "num2words" in reason:
            reason = "it needs num2words: pip install -e '.[smolvlm]'"
        raise ValueError(f"{folder}: {name} cannot be loaded: {reason}") from error


def build_processor(cls: Any, parts: list[Any], settings: dict[str, Any]) -> Any:
    """A processor of this class from its tokenizer, image processor and so on; None for the video part.

    parts: in the order of `cls.get_attributes()`. settings: what else its processor_config.json says.
    """
    # Constructors insist on a video processor, whose base class cannot even be imported without torchvision.
    unchecked = type(cls.__name__, (cls,), {"check_argument_for_proper_class": lambda *_: None})
    processor = unchecked.from_args_and_dict(parts, settings)
    processor.__class__ = cls
    return processor


def _processor_class(folder: Path) -> str | None:
    """Name of the processor's class, looked for as AutoProcessor does."""
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            settings = PreTrainedConfig.get_config_dict(folder, _configuration_file=file)[0]
            if name := settings.get("processor_class"):
                return name
    return PROCESSOR_MAPPING_NAMES.get(PreTrainedConfig.get_config_dict(folder)[0].get("model_type", ""))
