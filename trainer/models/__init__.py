"""Model families. Importing this package registers them with transformers' Auto classes.

    import trainer.models
    model = AutoModelForCausalLM.from_pretrained("internlm-xcomposer2-vl-7b")

The trainer uses only what this file exposes:

    config = load_config("internlm-xcomposer2-vl-7b")     # the variant is detected from config and weights
    with torch.device("meta"):
        model = build_model(config)                       # no weights yet
    parts_of(config).language_blocks                      # "model.layers"
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from trainer.models.processors import load_conversation, load_image_processor, load_tokenizer
from trainer.models.xcomposer2.configuration_xcomposer2 import PLORA_LAYERS, InternLMXcomposer2Config
from trainer.models.xcomposer2.modeling_xcomposer2 import InternLMXComposer2ForCausalLM

__all__ = [
    "Parts",
    "build_model",
    "cost_sizes",
    "load_config",
    "load_conversation",
    "load_image_processor",
    "load_tokenizer",
    "parts_of",
    "preprocessing_of",
]


@dataclass(frozen=True)
class Parts:
    """The named parts of a model, and the files that its saved folder needs."""

    language_blocks: str
    """Dotted name of the ModuleList of language blocks, sharded one by one."""
    vision_blocks: str
    """The same for vision blocks."""
    vision_embeddings: str
    """Dotted name of the module between pixels and the vision blocks."""
    vision: tuple[str, ...]
    """Prefixes of the vision tower's parameters."""
    projector: tuple[str, ...]
    """Prefixes of the parameters between vision and language."""
    unused: tuple[str, ...]
    """Prefixes of parameters that no forward pass uses and a checkpoint may lack."""
    lora_targets: tuple[str, ...]
    """Suffixes of the names of the linear layers that LoRA adapts by default."""
    code_files: tuple[Path, ...]
    """Python files that a saved folder needs to load with `trust_remote_code`."""


def parts_of(config: PreTrainedConfig) -> Parts:
    """The parts of the model that `config` describes."""
    assert isinstance(config, InternLMXcomposer2Config)
    return Parts(
        language_blocks="model.layers",
        vision_blocks="vit.vision_tower.vision_model.encoder.layers",
        vision_embeddings="vit.vision_tower.vision_model.embeddings",
        vision=("vit.",),
        projector=("vision_proj.", "plora_glb_GN", "plora_sub_GN"),
        unused=("vit.vision_tower.vision_model.post_layernorm.",),
        lora_targets=tuple(PLORA_LAYERS.values()),
        code_files=tuple(sorted((Path(__file__).parent / "xcomposer2").glob("*_xcomposer2.py"))),
    )


def cost_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """The sizes that determine a sample's cost: the arguments of `data.packing.CostModel.from_sizes`."""
    assert isinstance(config, InternLMXcomposer2Config)
    vision = config.vision_config
    return {
        "language": (config.hidden_size, config.intermediate_size, config.num_hidden_layers),
        "vision": (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers),
        "kv_share": config.num_key_value_heads / config.num_attention_heads,
        "patches_per_image": (config.image_size // config.patch_size) ** 2,
        "patches_per_slot": 4 if config.high_resolution else 1,
    }


def preprocessing_of(config: PreTrainedConfig) -> dict[str, Any]:
    """How images and conversations become the model's input, which an adapter's folder records too."""
    assert isinstance(config, InternLMXcomposer2Config)
    return config.preprocessing


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
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; is this the folder of a model?")
    model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"{folder}: model_type is {model_type}, not one of {', '.join(MODEL_TYPES)}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if img_size is not None:
            config.img_size = img_size
        flags = {"hd_num": None if hd_num == -1 else hd_num, "images_as_viewed": images_as_viewed}
        given = {name: value for name, value in flags.items() if value is not None}
        for name, value in {**(adapter_preprocessing or {}), **given}.items():
            setattr(config, name, value)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return config


def build_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model with random weights, or with none under `torch.device("meta")`."""
    assert isinstance(config, InternLMXcomposer2Config)
    return InternLMXComposer2ForCausalLM(config)


class _InternLM2Config(InternLMXcomposer2Config):
    """Loads 2.5 and many fine-tunes, whose model_type is internlm2 or internlm."""

    model_type = "internlm2"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        return InternLMXcomposer2Config.from_dict(config_dict, **kwargs)


class _InternLMConfig(_InternLM2Config):
    model_type = "internlm"


MODEL_TYPES = ("internlmxcomposer2", "internlm2", "internlm")
for _config_class in (InternLMXcomposer2Config, _InternLM2Config, _InternLMConfig):
    AutoConfig.register(_config_class.model_type, _config_class)
AutoModel.register(InternLMXcomposer2Config, InternLMXComposer2ForCausalLM)
AutoModelForCausalLM.register(InternLMXcomposer2Config, InternLMXComposer2ForCausalLM)
