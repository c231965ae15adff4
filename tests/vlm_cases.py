"""Tiny models of transformers' families, and random samples for them made without processors.

    model = tiny_model("qwen3_vl")                      # random weights, in evaluation mode
    samples = five_samples("qwen3_vl", model)           # 0 to 2 pictures each, one of text alone
    reference(model, samples)                           # loss and gradients by the class's own forward
    packed("qwen3_vl", model.config, samples)           # the arguments of the training forward, one row

A sample's number of image slots is the number of features that the model itself makes of its pictures.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from trainer.models.generic.modeling import auto_class, image_token, positions
from trainer.models.xcomposer2.modeling_xcomposer2 import supervised_positions

VOCABULARY, IMAGE = 96, 90
WIDTHS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}
TEXT: dict[str, Any] = WIDTHS | {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
TOWER: dict[str, Any] = WIDTHS | {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
SIGLIP: dict[str, Any] = TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
PATCHES: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32}
"""Of towers that take patches of any grid."""
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
IMAGE_IDS = {"image_token_id": IMAGE, "video_token_id": 91}


def _pictures_of_one_size(count: int, size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, size, size)}


def _pictures_in_a_row(count: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, count, 3, 16, 16)}


def _pictures_with_padding(count: int) -> dict[str, Tensor]:
    sizes = torch.tensor([[16, 16], [16, 8]])[torch.randint(2, (count,))]
    return _pictures_of_one_size(count) | {"image_sizes": sizes}


def _patches(count: int) -> dict[str, Tensor]:
    grids = torch.tensor([[1, 4, 4], [1, 4, 8], [1, 8, 4], [1, 2, 6]])[torch.randint(4, (count,))]
    return {"pixel_values": torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4), "image_grid_thw": grids}


def _tiles(count: int) -> dict[str, Tensor]:
    """A picture alone in its sample is cut into 4 tiles beside the whole of it, or 2."""
    sizes = torch.tensor([[32, 32], [16, 32], [20, 30]])[torch.randint(3, (count,))]
    tiles = [(5 if size.tolist() != [16, 32] else 3) if count == 1 else 1 for size in sizes]
    pixels = torch.zeros(count, 5, 3, 16, 16)
    for number, n in enumerate(tiles):
        pixels[number, :n] = torch.randn(n, 3, 16, 16)
    return {"pixel_values": pixels, "image_sizes": sizes, "batch_num_images": torch.tensor([count])}


def _no_pictures(count: int) -> dict[str, Tensor]:
    assert count == 0
    return {}


@dataclass(frozen=True)
class Case:
    """A family's tiny configuration, and its pictures."""

    config: dict[str, Any]
    pictures: Callable[[int], dict[str, Tensor]] = _no_pictures
    model_type: str | None = None
    """Where it is not the case's name."""
    join_dim: int = 0
    """The dimension along which pictures of several samples are joined."""


def _qwen(vision: dict[str, Any], text: dict[str, Any], **config: Any) -> Case:
    text = TEXT | {"rope_parameters": MROPE} | text
    return Case(
        {"vision_config": WIDTHS | PATCHES | vision, "text_config": text, **IMAGE_IDS, **config}, _patches
    )


DEEPSTACK = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
DELTA_RULE = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 16,
}

TILES_IN_A_ROW = Case(
    {
        "vision_config": TOWER,
        "text_config": TEXT | {"model_type": "llama"},
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    _pictures_in_a_row,
    join_dim=1,
)

CASES: dict[str, Case] = {
    "llama": Case(TEXT),
    "llama_dynamic": Case(
        TEXT | {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}, model_type="llama"
    ),
    "llama_longrope": Case(TEXT | {"rope_parameters": LONG}, model_type="llama"),
    "qwen3": Case(TEXT),
    "qwen3_moe": Case(TEXT | EXPERTS),
    "gemma2": Case(TEXT | {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "mistral": Case(TEXT | {"sliding_window": 8}),
    "cohere": Case(TEXT | {"logit_scale": 0.25}),
    "hyperclovax": Case(TEXT | {"logits_scaling": 0.5}),
    "gpt_oss": Case(TEXT | MIXTURE | {"sliding_window": 8}),
    "lfm2": Case(TEXT | {"layer_types": ["conv", "full_attention"]}),
    "minimax": Case(
        TEXT | MIXTURE | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8}
    ),
    "granite": Case(TEXT | {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "qwen2_vl": _qwen({"embed_dim": 32, "mlp_ratio": 2}, {}),
    "qwen2_5_vl": _qwen({"window_size": 16, "fullatt_block_indexes": [1]}, {}),
    "exaone4_5": _qwen(
        {"num_key_value_heads": 2, "window_size": 16, "fullatt_block_indexes": [1]},
        {"model_type": "exaone4"},
    ),
    "qwen3_vl": _qwen(DEEPSTACK, {}),
    "qwen3_vl_moe": _qwen(DEEPSTACK, EXPERTS),
    "qwen3_5": _qwen({"num_position_embeddings": 64}, DELTA_RULE),
    "glm4v": _qwen({"image_size": 16}, {"rope_parameters": MROPE}),
    "glm4v_moe": _qwen({"image_size": 16}, ROUTED),
    "internvl": Case(
        {
            "vision_config": TOWER | {"image_size": [16, 16], "patch_size": [4, 4]},
            "text_config": TEXT | {"model_type": "qwen2"},
            "image_token_id": IMAGE,
        },
        _pictures_of_one_size,
    ),
    "llava": Case(
        {
            "vision_config": TOWER | {"model_type": "clip_vision_model", "num_hidden_layers": 3},
            "text_config": TEXT | {"model_type": "llama"},
            "image_token_index": IMAGE,
        },
        _pictures_of_one_size,
    ),
    "llava_onevision": Case(
        {
            "vision_config": SIGLIP,
            "text_config": TEXT | {"model_type": "qwen2"},
            "image_token_index": IMAGE,
            "video_token_index": 91,
            "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
        },
        _tiles,
    ),
    "smolvlm": TILES_IN_A_ROW,
    "idefics3": TILES_IN_A_ROW,
    "mistral3": Case(
        {
            "vision_config": TOWER | {"model_type": "pixtral", "head_dim": 8},
            "text_config": TEXT | {"model_type": "mistral"},
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
        },
        _pictures_with_padding,
    ),
    "aya_vision": Case(
        {
            "vision_config": SIGLIP,
            "text_config": TEXT | {"model_type": "cohere2", "sliding_window": 8, "logit_scale": 0.25},
            "image_token_index": IMAGE,
            "downsample_factor": 2,
        },
        _pictures_of_one_size,
    ),
    "gemma3": Case(
        {
            "vision_config": SIGLIP,
            "text_config": TEXT
            | {
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "query_pre_attn_scalar": 8,
                "final_logit_softcapping": 5.0,
            },
            "image_token_index": IMAGE,
            "mm_tokens_per_image": 4,
        },
        _pictures_of_one_size,
    ),
    "paligemma": Case(
        {
            "vision_config": SIGLIP,
            "text_config": TEXT | {"model_type": "gemma"},
            "image_token_index": IMAGE,
            "projection_dim": 32,
        },
        _pictures_of_one_size,
    ),
}


def as_published(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A family's saved tensors in the form of its published folders, where that is another one."""
    if name != "qwen3_vl_moe":
        return tensors
    return {key: x.mT.contiguous() if ".experts." in key else x for key, x in tensors.items()}


TEXT_ONLY = [name for name, case in CASES.items() if case.pictures is _no_pictures]
WITH_PICTURES = [name for name in CASES if name not in TEXT_ONLY]
WAITS = {
    "glm4v": "for sizes",
    "glm4v_moe": "for sizes",
    "idefics3": "for which tiles are real",
    "mistral3": "for sizes",
    "qwen3_5": "for whether there is padding",
    "smolvlm": "for which tiles are real",
}
"""Families whose own code waits, a few times a micro-batch and never in a block."""
WITHOUT_WAITS = [name for name in WITH_PICTURES if name not in WAITS]


@dataclass
class Sample:
    """One sample, and what the class's own forward takes beside ids and labels."""

    input_ids: Tensor
    labels: Tensor
    slots: Tensor
    vision: dict[str, Tensor] = field(default_factory=dict)


def tiny_config(name: str) -> Any:
    case = CASES[name]
    return CONFIG_MAPPING[case.model_type or name](**case.config)


@functools.cache
def tiny_model(name: str) -> PreTrainedModel:
    """The class's own model, with weights large enough that every part matters; do not change it."""
    config = tiny_config(name)
    own_attention = "eager" if name in ("gemma2", "gpt_oss") else "sdpa"  # sdpa knows no caps and sinks
    torch.manual_seed(0)
    model = auto_class(config).from_config(
        config, attn_implementation=own_attention, dtype=torch.get_default_dtype()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=0.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


def five_samples(name: str, model: PreTrainedModel, seed: int = 0) -> list[Sample]:
    torch.manual_seed(seed)
    if name in TEXT_ONLY:
        # Some longer and some shorter than the 16 positions of a model whose frequencies change there.
        return [_sample([], n) for n in (9, 24, 1, 6, 40)]
    return [_one(name, model, number, n) for number, n in ((1, 9), (0, 14), (2, 7), (1, 6), (2, 11))]


def _one(name: str, model: Any, num_pictures: int, num_text: int) -> Sample:
    if not num_pictures:
        return _sample([], num_text)
    vision = CASES[name].pictures(num_pictures)
    with torch.no_grad():
        features = model.base_model.get_image_features(**vision).pooler_output
    if len(features) != num_pictures:  # all pictures of a sample together
        features = torch.cat(list(features)).chunk(num_pictures)
    sample = _sample([feature.numel() // feature.shape[-1] for feature in features], num_text)
    sample.vision = vision
    return sample


def _sample(slots: Sequence[int], num_text: int) -> Sample:
    """Text before each picture and after the last one, where some of it is trained."""
    parts, labels = [], []
    for n in slots:
        text = torch.randint(1, 80, (2,))
        parts += [text, torch.full((n,), IMAGE)]
        labels += [torch.full((2 + n,), -100)]
    text = torch.randint(1, 80, (num_text,))
    trained = torch.arange(num_text) >= max(1, num_text // 3)
    trained &= (torch.rand(num_text) < 0.8) | (torch.arange(num_text) == max(1, num_text // 3))
    input_ids = torch.cat([*parts, text])
    label = torch.cat([*labels, torch.where(trained, text, -100)])
    return Sample(input_ids, label, input_ids == IMAGE)


def own_arguments(model: Any, sample: Sample) -> dict[str, Any]:
    """What the class's own forward takes of one sample, as its processor makes it."""
    arguments: dict[str, Any] = {
        "input_ids": sample.input_ids[None],
        "labels": sample.labels[None],
        **sample.vision,
    }
    if hasattr(model.base_model, "get_rope_index"):
        arguments["mm_token_type_ids"] = sample.slots.int()[None]
    if model.config.model_type == "gemma3":
        arguments["token_type_ids"] = sample.slots.long()[None]
    if model.config.model_type == "paligemma":
        trained = (sample.labels != -100).nonzero()
        first = int(trained[0]) if len(trained) else len(sample.labels)
        arguments["token_type_ids"] = (torch.arange(len(sample.labels)) >= first).long()[None]
    return arguments


def reference(model: Any, samples: Sequence[Sample]) -> tuple[float, dict[str, Tensor]]:
    """The sum of the losses, and every gradient, by the class's own forward one sample at a time."""
    model.zero_grad()
    total = 0.0
    for sample in samples:
        count = int((sample.labels[1:] != -100).sum())
        if not count:
            continue
        loss = model(**own_arguments(model, sample)).loss * count
        loss.backward()
        total += loss.item()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total, gradients


def join_pictures(name: str, samples: Sequence[Sample]) -> dict[str, Tensor]:
    with_pictures = [sample.vision for sample in samples if sample.vision]
    if not with_pictures:
        return {}
    dim = CASES[name].join_dim
    return {key: torch.cat([vision[key] for vision in with_pictures], dim) for key in with_pictures[0]}


def packed(name: str, config: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """The training forward's arguments: all samples in one row, as data/batch.py gives them."""
    assert name in TEXT_ONLY or image_token(config) == IMAGE
    lengths = [len(sample.input_ids) for sample in samples]
    own = [positions(config, sample.input_ids, **sample.vision) for sample in samples]
    places = [torch.arange(n)[None] if p is None else p for n, p in zip(lengths, own, strict=True)]
    position_ids = torch.cat(places, dim=1)
    labels = torch.cat([sample.labels for sample in samples])[None]
    supervised, targets = supervised_positions(labels)
    slots = torch.cat([sample.slots for sample in samples])
    edges = torch.nn.functional.pad(slots.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return {
        "input_ids": torch.cat([sample.input_ids for sample in samples])[None],
        "labels": labels,
        "im_mask": slots[None],
        "image_runs": list(zip(edges[::2], edges[1::2], strict=True)),
        "position_ids": position_ids if len(position_ids) == 1 else position_ids[:, None],
        "sample_lengths": lengths,
        "cu_seq_lens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "supervised": supervised,
        "targets": targets,
        "attention_mask": None,
        "num_items_in_batch": 1,
        **join_pictures(name, samples),
    }


def alone(sample: Sample) -> dict[str, Any]:
    """The training forward's arguments: one sample, unpacked."""
    labels = sample.labels[None]
    supervised, targets = supervised_positions(labels)
    return {
        "input_ids": sample.input_ids[None],
        "labels": labels,
        "im_mask": sample.slots[None],
        "supervised": supervised,
        "targets": targets,
        "num_items_in_batch": 1,
        **sample.vision,
    }


def padded(name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """The training forward's arguments: a row for each sample, padded on the right."""

    def rows(values: Sequence[Tensor], filler: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=filler)

    labels = rows([sample.labels for sample in samples], -100)
    supervised, targets = supervised_positions(labels)
    return {
        "input_ids": rows([sample.input_ids for sample in samples], 0),
        "labels": labels,
        "im_mask": rows([sample.slots for sample in samples], 0),
        "attention_mask": rows([torch.ones_like(sample.labels) for sample in samples], 0),
        "supervised": supervised,
        "targets": targets,
        "num_items_in_batch": 1,
        **join_pictures(name, samples),
    }
