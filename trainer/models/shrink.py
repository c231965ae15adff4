"""A small random model of a family: the class, tokenizer and processor of a folder, with other sizes.

    shrink(Path("Qwen2.5-VL-7B-Instruct"), Path("tiny"))
    # layers 28 → 2, blocks of the tower 32 → 3, hidden 3584 → 256, heads 28 → 2; the vocabulary stays

Input: a model folder, of which no weight is read. Output: a folder with random weights that loads alike. The
vocabulary, patches, windows and the width of a head, on which rotary sections depend, are unchanged, and of
each kind of layer one stays.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from trainer.models import answering_class, load_config

HEADS, EXPERTS, PLORA_RANK = 2, 4, 8
VISION_BLOCKS = 3
"""Enough for features of the last block but one."""
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json", "config.json")
"""Files that are not copied: those that are written anew, and weights."""


def shrink(folder: Path, target: Path) -> None:
    """Write the small model; ValueError if the folder holds no known model."""
    config = shrunk(load_config(folder))
    torch.manual_seed(0)
    model = answering_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that every part matters
            if parameter.ndim < 2:
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=0.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(target)
    for path in folder.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in WEIGHTS):
            shutil.copy(path, target)


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with small sizes."""
    values = config.to_dict()
    text: Any = config.get_text_config(decoder=True)
    vision = values.get("vision_config") or {}
    new_hidden = HEADS * _head_dim(text.to_dict())
    for part in (values, values.get("text_config") or {}, vision):
        is_vision = part is vision
        for name in ("out_hidden_size", "projection_dim", "hidden_size"):
            if part.get(name) == text.hidden_size and not (is_vision and name == "hidden_size"):
                part[name] = new_hidden
        if _first(part, *DEPTHS):
            _shrink(part, VISION_BLOCKS if is_vision else 2)
    depth = _first(vision, *DEPTHS)
    layers = values.get("vision_feature_layer")
    if depth and isinstance(layers, int):
        values["vision_feature_layer"] = max(-depth, min(depth, layers))
    elif depth and layers:
        values["vision_feature_layer"] = [max(-depth, min(depth, layer)) for layer in layers]
    if "plora_rank" in values:
        values["plora_rank"] = PLORA_RANK
    small = type(config).from_dict(values)
    small._name_or_path = config._name_or_path
    return small


DEPTHS, WIDTHS, ALL_HEADS = (
    ("num_hidden_layers", "depth"),
    ("embed_dim", "hidden_size"),
    ("num_attention_heads", "num_heads"),
)


def _shrink(part: dict[str, Any], least_depth: int) -> None:
    """Set the sizes of one stack of blocks."""
    (depth_name, depth), (width_name, width), (heads_name, heads) = (
        next((name, part[name]) for name in names if part.get(name)) for names in (DEPTHS, WIDTHS, ALL_HEADS)
    )
    kinds = part.get("layer_types") or ["the same"] * depth
    kept = sorted({kinds.index(kind) for kind in kinds})
    kept += [layer for layer in range(depth) if layer not in kept][: max(0, least_depth - len(kept))]
    for name, value in part.items():
        if isinstance(value, list) and len(value) == depth:
            part[name] = [value[layer] for layer in sorted(kept)]
    small = HEADS * _head_dim(part)
    groups = part.get("num_key_value_heads")
    ratio = width / small
    part |= {depth_name: len(kept), width_name: small, heads_name: HEADS}
    if groups:
        part["num_key_value_heads"] = 1 if groups < heads else HEADS
    for name, value in part.items():
        if name.endswith("intermediate_size") and isinstance(value, int):
            part[name] = max(16, int(value / ratio) // 16 * 16)
    for name, largest in (
        ("num_experts", EXPERTS),
        ("num_local_experts", EXPERTS),
        ("num_experts_per_tok", 2),
    ):
        if part.get(name):
            part[name] = min(part[name], largest)
    if keys := part.get("linear_num_key_heads"):
        part |= {"linear_num_key_heads": 1, "linear_num_value_heads": part["linear_num_value_heads"] // keys}
    if part.get("fullatt_block_indexes"):
        part["fullatt_block_indexes"] = [len(kept) - 1]
    if part.get("deepstack_visual_indexes"):
        part["deepstack_visual_indexes"] = [0, 1]


def _head_dim(part: dict[str, Any]) -> int:
    return part.get("head_dim") or _first(part, *WIDTHS) // _first(part, *ALL_HEADS)


def _first(part: dict[str, Any], *names: str) -> Any:
    return next((part[name] for name in names if part.get(name)), None)
