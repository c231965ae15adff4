"""The parts of any model of transformers: where its blocks are, and which parameters are vision.

    parts = find_parts(model)                 # of Qwen2.5-VL, also on the meta device
    parts.language_blocks                     # "model.language_model.layers"
    parts.vision_blocks                       # "model.visual.blocks"
    parts.vision                              # ("model.visual.patch_embed.", "model.visual.blocks.", …)
    parts.projector                           # ("model.visual.merger.",)
    parts.lora_targets                        # a pattern of model.language_model.layers.0.mlp.up_proj, …

A model of text alone has no vision blocks and no prefixes of vision. Every parameter is under a prefix of
`vision` or `projector`, or is language.
"""

import inspect
import re
from collections import Counter
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.models.family import Parts

PROJECTORS_IN_TOWER = ("merger", "deepstack_merger_list", "downsample")
"""Children of a vision tower that make language features; elsewhere they stand beside the tower."""


def find_parts(model: PreTrainedModel) -> Parts:
    """The parts of `model`, without the names and files of its folder.

    ValueError if its language blocks are not found.
    """
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    decoder: Any = model.get_decoder()
    language_blocks = _blocks_of(decoder, names)
    if language_blocks is None:
        raise ValueError(
            f"{type(model).__name__}: its language blocks were not found, so it cannot be sharded"
        )
    tower = tower_of(model)
    vision_blocks, vision, projector = None, (), ()
    if tower is not None:
        vision_blocks = _blocks_of(tower, names)
        head: Any = model.get_output_embeddings()
        language = (f"{names[id(decoder)]}.", f"{names[id(head)]}." if head is not None else ".")
        vision, projector = _prefixes(model, names[id(tower)], tower, language)
    tails = _linear_tails(model.get_submodule(language_blocks))
    return Parts(
        language_blocks=language_blocks,
        vision_blocks=vision_blocks,
        vision_embeddings=None if tower is None else _embeddings_of(tower, names),
        vision=vision,
        projector=projector,
        unused=() if tower is None else _unused(model, names[id(tower)], tower, vision_blocks),
        lora_targets=(rf"{re.escape(language_blocks)}\.\d+\.({'|'.join(map(re.escape, tails))})",),
        files=(),
    )


def tower_of(model: PreTrainedModel) -> nn.Module | None:
    """The vision tower, or None."""
    if not hasattr(model.base_model, "get_image_features"):
        return None
    tower: Any = model.get_encoder(modality="image")
    return None if tower is model or tower is model.base_model else tower


def _topmost_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks below `module` that are not inside another one."""
    blocks: list[nn.Module] = []
    for child in module.children():
        is_block = isinstance(child, GradientCheckpointingLayer)
        blocks += [child] if is_block else _topmost_blocks(child)
    return blocks


def _blocks_of(module: nn.Module, names: dict[int, str]) -> str | None:
    """Dotted name of the list that holds most of the topmost blocks below `module`."""
    lists = Counter(names[id(block)].rpartition(".")[0] for block in _topmost_blocks(module))
    return lists.most_common(1)[0][0] if lists else None


def _prefixes(
    model: nn.Module, tower_name: str, tower: nn.Module, language: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prefixes of vision and of the projector, which do not overlap."""
    vision: dict[str, None] = {}
    projector: dict[str, None] = {}
    has_projector = any(hasattr(tower, name) for name in PROJECTORS_IN_TOWER)
    beside = tower_name.rpartition(".")[0]
    for name, _ in model.named_parameters():
        if name.startswith(f"{tower_name}."):
            child, dot, _ = name.removeprefix(f"{tower_name}.").partition(".")
            chosen = projector if child in PROJECTORS_IN_TOWER else vision
            chosen[f"{tower_name}.{child}{dot}" if has_projector else f"{tower_name}."] = None
        elif not name.startswith(language):
            rest = name.removeprefix(f"{beside}.") if beside else name
            child, dot, _ = rest.partition(".")
            projector[f"{name.removesuffix(rest)}{child}{dot}"] = None
    return tuple(vision), tuple(projector)


def _embeddings_of(tower: nn.Module, names: dict[int, str]) -> str | None:
    images_alone = {"pixel_values", "interpolate_pos_encoding", "bool_masked_pos"}
    for module in tower.modules():
        is_embeddings = names[id(module)].endswith(".embeddings")
        if is_embeddings and set(inspect.signature(module.forward).parameters) <= images_alone:
            return names[id(module)]
    return None


def _unused(
    model: PreTrainedModel, tower_name: str, tower: nn.Module, vision_blocks: str | None
) -> tuple[str, ...]:
    """Prefixes in the tower of heads for other tasks, and of what comes behind the blocks that are used."""
    patterns = [r"head|pooler"]
    layers = getattr(model.config, "vision_feature_layer", None)
    if layers is not None and vision_blocks is not None:
        depth = len(list(model.get_submodule(vision_blocks).children()))
        wanted = [layers] if isinstance(layers, int) else list(layers)
        last = max(layer % (depth + 1) for layer in wanted)  # hidden states 0 are those before block 0
        patterns += ["post_layernorm", *(rf"layers?\.{number}" for number in range(last, depth))]
    names = [name for name, module in tower.named_modules() if any(True for _ in module.parameters())]
    unused = [name for name in names if any(re.search(rf"(^|\.)({pattern})$", name) for pattern in patterns)]
    return tuple(f"{tower_name}.{name}." for name in unused)


def _linear_tails(blocks: nn.Module) -> list[str]:
    """The names of the linear layers inside a block, over all blocks."""
    tails = {
        name: None
        for block in blocks.children()
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    return list(tails)
