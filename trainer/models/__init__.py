"""Model families. Importing this package registers ours with transformers' Auto classes.

    import trainer.models
    model = AutoModelForCausalLM.from_pretrained("internlm-xcomposer2-vl-7b")

The trainer uses only what this file exposes, which asks the family of the model (`family.py`):

    config = load_config("internlm-xcomposer2-vl-7b")     # the variant is detected from config and weights
    with torch.device("meta"):
        model = build_model(config)                       # no weights yet
    parts_of(config).language_blocks                      # "model.layers"
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from data.images import ImageProcessor
from data.loader import SampleReader
from data.tokens import Conversation
from trainer.models.family import Family, Flops, Parts
from trainer.models.generic.family import TransformersFamily
from trainer.models.xcomposer2.family import MODEL_TYPES, XComposer2

__all__ = [
    "Parts",
    "answering_class",
    "build_model",
    "cost_sizes",
    "flops_of",
    "load_config",
    "load_conversation",
    "load_image_processor",
    "load_tokenizer",
    "own_arguments",
    "parts_of",
    "positions_of",
    "preprocessing_of",
    "prompt_arguments",
    "set_options",
    "use_generation_defaults",
]

OWN_FAMILIES: dict[str, Family] = dict.fromkeys(MODEL_TYPES, XComposer2())
"""model_type of a config.json → the family of a model that is none of transformers' own."""


def _family_in(folder: Path) -> Family:
    """The family of the model in `folder`; ValueError if it holds none, or one of no known family."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; is this the folder of a model?")
    model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if model_type not in OWN_FAMILIES and model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{folder}: model_type is {model_type}, which is neither {MODEL_TYPES[0]} nor a model of "
            f"transformers {transformers.__version__}"
        )
    return _family(model_type)


def _family(model_type: str | None) -> Family:
    return OWN_FAMILIES.get(model_type or "") or TransformersFamily()


def _family_of(config: PreTrainedConfig) -> Family:
    return _family(config.model_type)


def load_config(
    folder: str | Path,
    img_size: int | None = None,
    hd_num: int | None = None,
    images_as_viewed: bool | None = None,
    adapter_preprocessing: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """The configuration of the model in `folder`, with overrides of its image preprocessing.

    img_size, hd_num, images_as_viewed: override the folder's own; None, or -1 for hd_num, keeps that.
    adapter_preprocessing: `preprocessing_of` an adapter on this model, which also overrides the folder's own.
    ValueError if the folder has no configuration, or that of another model.
    """
    folder = Path(folder)
    family = _family_in(folder)
    flags = {"img_size": img_size, "hd_num": hd_num, "images_as_viewed": images_as_viewed}
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return family.load_config(folder, given, adapter_preprocessing or {})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def set_options(config: PreTrainedConfig, **options: Any) -> None:
    """Set those of the options that a configuration of this family has."""
    for name, value in options.items():
        if hasattr(config, name):
            setattr(config, name, value)


def build_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model with random weights, or with none under `torch.device("meta")`."""
    return _family_of(config).build(config)


def parts_of(config: PreTrainedConfig) -> Parts:
    """The parts of the model that `config` describes."""
    return _family_of(config).parts(config)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; ValueError if it has none or a broken one."""
    return _family_in(Path(folder)).tokenizer(Path(folder))


def load_conversation(folder: str | Path, chat_template: str | Path | None = None) -> Conversation:
    """The conversation format with the tokenizer of a model folder; ValueError as in `load_tokenizer`.

    chat_template: file of a template, instead of the folder's own; ValueError or OSError if it cannot be
        used.
    """
    text = None if chat_template is None else Path(chat_template).read_text(encoding="utf-8")
    return _family_in(Path(folder)).conversation(Path(folder), text)


def load_image_processor(config: PreTrainedConfig) -> ImageProcessor:
    """The image processor of a model; ValueError if its configuration holds a value that it cannot take."""
    return _family_of(config).image_processor(config)


def positions_of(
    config: PreTrainedConfig, input_ids: np.ndarray, pictures: Sequence[Any]
) -> np.ndarray | None:
    """The positions [k, T] of a sample's tokens, int64 [T]; None where they are 0, 1, 2, …"""
    return _family_of(config).positions(config, input_ids, pictures)


def answering_class(config: PreTrainedConfig) -> Any:
    """The class of transformers whose `from_pretrained` gives a model that generates answers."""
    return _family_of(config).answering_class(config)


def use_generation_defaults(model: Any, folder: str | Path) -> None:
    """Set how the model in training generates: as the model in `folder` does when it is loaded."""
    nothing = {"cache_dir": None, "force_download": False, "proxies": None, "token": None}
    model.adjust_generation_fn(
        generation_config=None,
        from_auto_class=False,
        from_pipeline=False,
        pretrained_model_name_or_path=str(folder),
        local_files_only=True,
        revision="main",
        subfolder="",
        trust_remote_code=False,
        **nothing,
    )


def prompt_arguments(config: PreTrainedConfig, im_mask: Tensor) -> dict[str, Any]:
    """The arguments of `generate` for a prompt's image slots [B, T], beside those for its pictures."""
    return _family_of(config).prompt_arguments(config, im_mask)


def own_arguments(config: PreTrainedConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the class's own forward, given those of the training one for a single sample."""
    return _family_of(config).own_arguments(config, inputs)


def cost_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """The sizes that determine a sample's cost: the arguments of `data.packing.CostModel.from_sizes`."""
    return _family_of(config).cost_sizes(config)


def flops_of(model: Any, reader: SampleReader) -> Flops:
    """The operations of a model on the meta device; ValueError if they cannot be counted."""
    return _family_of(model.config).flops(model, reader)


def preprocessing_of(config: PreTrainedConfig) -> dict[str, Any]:
    """How images and conversations become the model's input, which an adapter's folder records too."""
    return _family_of(config).preprocessing(config)
