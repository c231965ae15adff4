"""The configuration of InternLM-XComposer2: what config.json says, what the original hard-codes, and what only
the shapes of the weights tell.

Input: the config.json of a published, fine-tuned or saved model, and the headers of its safetensors files.
Output: one flat configuration, complete: a saved folder needs no inference when it is loaded again.

    config = InternLMXcomposer2Config.from_pretrained("internlm-xcomposer2-4khd-7b")
    config.high_resolution              # True: the weights hold plora_glb_GN
    config.plora_rank["wqkv"]           # 8: the rows of its Plora_A
    config.plora_alpha["wqkv"]          # 16: a wqkv rank that differs from wo's has scale 2
    config.vision_config.image_size     # 336: a 24 × 24 position grid of 14-pixel patches, the size of a tile

Paper: InternLM-XComposer2, arXiv 2401.16420 (partial LoRA, section 3.1); 4KHD, arXiv 2404.06512.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import CLIPVisionConfig, PreTrainedConfig

PLORA_LAYERS = {
    "wqkv": "attention.wqkv",
    "wo": "attention.wo",
    "w1": "feed_forward.w1",
    "w2": "feed_forward.w2",
    "w3": "feed_forward.w3",
}
VIT_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
POSITIONS = "vit.vision_tower.vision_model.embeddings.position_embedding.weight"
PATCHES = "vit.vision_tower.vision_model.embeddings.patch_embedding.weight"


class InternLMXcomposer2Config(PreTrainedConfig):
    """Fields keep the original's names; those after `vision_config` are not in a published config.json.

    img_size: side of the square that an image is squashed to, in pixels; None for a high-resolution model.
    vision_config: CLIP's fields; its `image_size` is the side of one ViT input, `img_size` or the tile.
    plora_rank, plora_alpha: an int for all layers, or one each for wqkv, wo, w1, w2, w3.
    plora_dropout: applied in training to the input of Plora_A.
    end_token_id: `[UNUSED_TOKEN_145]`, which ends a turn.
    high_resolution: 4KHD and 2.5: an image is a global view and a grid of tiles.
    """

    model_type = "internlmxcomposer2"
    keys_to_ignore_at_inference = ("past_key_values",)
    sub_configs_defaults = {"vision_config": CLIPVisionConfig}  # noqa: RUF012
    default_theta = 1_000_000.0

    vocab_size: int = 92544
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    hidden_act: str = "silu"
    bias: bool = False
    max_length: int = 4096
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] | None = None
    use_cache: bool = True
    pad_token_id: int = 2
    bos_token_id: int = 1
    eos_token_id: int = 2
    tie_word_embeddings: bool = False
    img_size: int | None = None

    vision_config: dict[str, Any] | CLIPVisionConfig | None = None
    plora_rank: dict[str, int] | int = 256
    plora_alpha: dict[str, int] | int | None = None
    plora_dropout: float = 0.05
    end_token_id: int | None = None
    high_resolution: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, CLIPVisionConfig):
            self.vision_config = CLIPVisionConfig(**{**VIT_L_14, **(self.vision_config or {})})
        if self.high_resolution:
            self.img_size = None
        elif self.img_size is None:
            self.img_size = self.vision_config.image_size
        else:
            self.vision_config.image_size = self.img_size
        if self.end_token_id is None:
            self.end_token_id = self.vocab_size - 2
        self.plora_rank = _per_layer(self.plora_rank, {})
        scale = 2 if self.plora_rank["wqkv"] != self.plora_rank["wo"] else 1
        published = {**self.plora_rank, "wqkv": scale * self.plora_rank["wqkv"]}
        self.plora_alpha = _per_layer(self.plora_alpha or {}, published)
        kwargs["architectures"] = None
        self.architectures = ["InternLMXComposer2ForCausalLM"]
        model = "modeling_xcomposer2.InternLMXComposer2ForCausalLM"
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_xcomposer2.InternLMXcomposer2Config",
            "AutoModel": model,
            "AutoModelForCausalLM": model,
        }
        super().__post_init__(**kwargs)
        self.validate()

    def validate(self) -> None:
        """ValueError for what the model cannot compute."""
        if self.rope_parameters["rope_type"] not in ("default", "dynamic"):
            raise ValueError(
                f"rope_scaling {self.rope_parameters} is not supported: use null or type dynamic"
            )
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} must divide num_attention_heads "
                f"{self.num_attention_heads}, and that must divide hidden_size {self.hidden_size}"
            )
        grid, rest = divmod(self.vision_config.image_size, self.vision_config.patch_size)
        if rest or (self.high_resolution and grid % 2):
            raise ValueError(
                f"an image side of {self.vision_config.image_size} pixels is not a whole number of "
                f"{self.vision_config.patch_size}-pixel patches" + " by two" * self.high_resolution
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        return super().from_pretrained(
            pretrained_model_name_or_path, name_or_path=str(pretrained_model_name_or_path), **kwargs
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        folder = Path(str(kwargs.get("name_or_path", "")))
        shapes = weight_shapes(folder) if (folder / "config.json").is_file() else {}
        return super().from_dict(complete(config_dict, shapes), **kwargs)


def _per_layer(value: dict[str, int] | int, default: dict[str, int]) -> dict[str, int]:
    """One number for each PLoRA layer; w2 and w3 take w1's where only that is given."""
    if isinstance(value, int):
        return dict.fromkeys(PLORA_LAYERS, value)
    if unknown := value.keys() - PLORA_LAYERS.keys():
        raise ValueError(f"plora layers are {', '.join(PLORA_LAYERS)}, not {', '.join(sorted(unknown))}")
    feed_forward = {name: value["w1"] for name in ("w2", "w3") if "w1" in value}
    return {name: {**default, **feed_forward, **value}[name] for name in PLORA_LAYERS}


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor name → shape, from the headers of the folder's safetensors files; empty if there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        names = {"model.safetensors"} if (folder / "model.safetensors").is_file() else set()
    shapes: dict[str, list[int]] = {}
    for name in sorted(names):
        with safe_open(folder / name, framework="pt") as file:
            shapes.update({key: file.get_slice(key).get_shape() for key in file.keys()})  # noqa: SIM118
    return shapes


def complete(config_dict: dict[str, Any], shapes: dict[str, list[int]]) -> dict[str, Any]:
    """`config_dict` with what `shapes` tell of the fields that it lacks.

    ValueError if the weights are not those of an XComposer2, or if a vision tower other than ViT-L/14 is not
    described by `vision_config`: the number of its heads is in no shape.
    """
    if not shapes:
        return config_dict
    if POSITIONS not in shapes:
        raise ValueError(f"the weights lack {POSITIONS}: this is not an InternLM-XComposer2 model")
    found: dict[str, Any] = {"high_resolution": "plora_glb_GN" in shapes}
    ranks = {
        name: shapes[key][0]
        for name, layer in PLORA_LAYERS.items()
        if (key := f"model.layers.0.{layer}.Plora_A.weight") in shapes
    }
    if ranks:
        found["plora_rank"] = ranks
    vision = dict(config_dict.get("vision_config") or VIT_L_14)
    width, _, patch, _ = shapes[PATCHES]
    if (width, patch) != (vision.get("hidden_size"), vision.get("patch_size")):
        raise ValueError(
            f"the vision tower is {width} wide with patches of {patch} pixels: "
            "config.json must describe it in vision_config"
        )
    vision["image_size"] = math.isqrt(shapes[POSITIONS][0] - 1) * patch
    return {**found, **config_dict, "vision_config": vision}
