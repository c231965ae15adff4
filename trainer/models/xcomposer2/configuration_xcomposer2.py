"""The configuration of InternLM-XComposer2, from config.json and the shapes of the weights.

Input: the config.json of a published, fine-tuned or saved model, and the headers of its safetensors files,
which determine what the original hard-codes. Output: a complete configuration, whose saved form needs no
weights.

    config = InternLMXcomposer2Config.from_pretrained("internlm-xcomposer2-4khd-7b")
    config.high_resolution            # True: the weights contain plora_glb_GN
    config.plora("wqkv")              # (8, 2.0): the rows of its Plora_A; scale 2, as its rank is not wo's
    config.vision_config.image_size   # 336: a position grid of 24 × 24 patches of 14 pixels, one tile

Paper: InternLM-XComposer2, arXiv 2401.16420 (partial LoRA, section 3.1); 4KHD, arXiv 2404.06512.
"""

import json
import math
import os
from dataclasses import field
from pathlib import Path
from typing import Any, Self, cast

from safetensors import safe_open
from transformers import CLIPVisionConfig, PreTrainedConfig

PLORA_LAYERS = {
    "wqkv": "attention.wqkv",
    "wo": "attention.wo",
    "w1": "feed_forward.w1",
    "w2": "feed_forward.w2",
    "w3": "feed_forward.w3",
}
VIT_L_14: dict[str, Any] = {
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
    """Fields have the original's names; those from `vision_config` on are not in a published config.json.

    vision_config: CLIP's fields. Its image_size is the side of one ViT input, in pixels: of the square that
        an image is resized to, which the original calls `img_size`, or of a tile.
    plora_rank, plora_alpha: an int for all layers, or one each for wqkv, wo, w1, w2, w3.
    plora_dropout: applied in training to the input of Plora_A.
    end_token_id: `[UNUSED_TOKEN_145]`, which ends a turn.
    high_resolution: 4KHD and 2.5, where an image is a global view and a grid of tiles.
    hd_num: maximum tiles of an image; None: 16 for 4KHD, 18 for 2.5, as in their fine-tuning.
    images_as_viewed: rotate images by their EXIF data, and put transparent ones on white.
    conversation_format: hash of the format that the model was trained with (`Conversation.format`), if known.
    """

    model_type = "internlmxcomposer2"
    keys_to_ignore_at_inference = ("cache",)
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
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    use_cache: bool = True
    pad_token_id: int = 2
    bos_token_id: int = 1
    eos_token_id: int = 2
    tie_word_embeddings: bool = False

    vision_config: CLIPVisionConfig = field(default_factory=lambda: CLIPVisionConfig(**VIT_L_14))
    plora_rank: dict[str, int] | int = 256
    plora_alpha: dict[str, int] | int | None = None
    plora_dropout: float = 0.05
    end_token_id: int | None = None
    high_resolution: bool = False
    hd_num: int | None = None
    images_as_viewed: bool = False
    conversation_format: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**{**VIT_L_14, **self.vision_config})
        img_size = kwargs.pop("img_size", None)
        if img_size is not None and not self.high_resolution:
            self.img_size = img_size
        if self.end_token_id is None:
            self.end_token_id = self.vocab_size - 2
        self.plora_rank = _per_layer(self.plora_rank)
        wqkv_scale = 1 if self.plora_rank["wqkv"] == self.plora_rank["wo"] else 2
        published = {**self.plora_rank, "wqkv": wqkv_scale * self.plora_rank["wqkv"]}
        self.plora_alpha = {**published, **_per_layer({} if self.plora_alpha is None else self.plora_alpha)}
        # transformers' Auto classes read these from a saved folder.
        kwargs.pop("model_type", None)
        self.architectures = ["InternLMXComposer2ForCausalLM"]
        model = "modeling_xcomposer2.InternLMXComposer2ForCausalLM"
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_xcomposer2.InternLMXcomposer2Config",
            "AutoModel": model,
            "AutoModelForCausalLM": model,
        }
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        """ValueError for values that the model does not support."""
        if self.rope_parameters["rope_type"] not in ("default", "dynamic"):
            raise ValueError(f"rope_scaling is {self.rope_parameters}; supported: null and type dynamic")
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} must divide num_attention_heads "
                f"{self.num_attention_heads}, and that must divide hidden_size {self.hidden_size}"
            )
        self._check_image_size()

    def _check_image_size(self) -> None:
        if self.image_size % (self.patch_size * (2 if self.high_resolution else 1)):
            raise ValueError(
                f"an image side of {self.image_size} pixels is not a whole number of "
                f"{self.patch_size}-pixel patches" + ", two by two" * self.high_resolution
            )

    @property
    def image_size(self) -> int:
        """Side of one ViT input, in pixels."""
        return cast(int, self.vision_config.image_size)

    @property
    def patch_size(self) -> int:
        return cast(int, self.vision_config.patch_size)

    @property
    def img_size(self) -> int | None:
        """The original's name for the side of a square image; None for a high-resolution model."""
        return None if self.high_resolution else self.image_size

    @img_size.setter
    def img_size(self, pixels: int) -> None:
        if self.high_resolution:
            raise ValueError(
                f"img_size is for models of square images; this one has tiles of {self.image_size} pixels"
            )
        self.vision_config.image_size = pixels
        self._check_image_size()

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images and conversations became the model's input in training; adapters record it too."""
        names = ("hd_num", "images_as_viewed", "conversation_format")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | ({} if self.img_size is None else {"img_size": self.img_size})

    def plora(self, layer: str) -> tuple[int, float]:
        """Rank and scale (alpha / rank) of one of `PLORA_LAYERS`."""
        assert isinstance(self.plora_rank, dict)
        assert isinstance(self.plora_alpha, dict)
        return self.plora_rank[layer], self.plora_alpha[layer] / self.plora_rank[layer]

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # transformers would warn about internlm2 or internlm, as in 2.5 and many fine-tunes.
        config_dict = {**config_dict, "model_type": cls.model_type}
        # As AutoConfig does: from_dict needs the folder to read the shapes of its weights.
        return config_dict, {**unused, "name_or_path": str(pretrained_model_name_or_path)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        folder = Path(str(kwargs.get("name_or_path", "")))
        shapes = weight_shapes(folder) if (folder / "config.json").is_file() else {}
        fields = complete(config_dict, shapes)
        # Published files name eager, the slowest attention; the caller chooses one in kwargs.
        fields.pop("attn_implementation", None)
        return super().from_dict(fields, **kwargs)


def _per_layer(value: dict[str, int] | int) -> dict[str, int]:
    """One number for each PLoRA layer; w2 and w3 take w1's where only that is given."""
    if isinstance(value, int):
        return dict.fromkeys(PLORA_LAYERS, value)
    if unknown := value.keys() - PLORA_LAYERS.keys():
        raise ValueError(f"plora layers are {', '.join(PLORA_LAYERS)}, not {', '.join(sorted(unknown))}")
    return {**{name: value["w1"] for name in ("w2", "w3") if "w1" in value}, **value}


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
    """`config_dict`, with missing fields inferred from `shapes`.

    ValueError if the weights are not those of an XComposer2, or if a vision tower other than ViT-L/14 is not
    described by `vision_config`, because the number of its heads cannot be inferred.
    """
    if not shapes:
        return dict(config_dict)
    if POSITIONS not in shapes:
        raise ValueError(f"the weights lack {POSITIONS}: this is not an InternLM-XComposer2 model")
    inferred: dict[str, Any] = {"high_resolution": "plora_glb_GN" in shapes}
    ranks = {
        name: shapes[key][0]
        for name, layer in PLORA_LAYERS.items()
        if (key := f"model.layers.0.{layer}.Plora_A.weight") in shapes
    }
    if ranks:
        inferred["plora_rank"] = ranks
    vision = dict(config_dict.get("vision_config") or VIT_L_14)
    width, _, patch, _ = shapes[PATCHES]
    if (width, patch) != (vision.get("hidden_size"), vision.get("patch_size")):
        raise ValueError(
            f"the vision tower is {width} wide with patches of {patch} pixels: "
            "config.json must describe it in vision_config"
        )
    vision["image_size"] = math.isqrt(shapes[POSITIONS][0] - 1) * patch
    return {**inferred, **config_dict, "vision_config": vision}
