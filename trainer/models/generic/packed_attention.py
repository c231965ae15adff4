"""Attention and other token mixers over a packed row, one sample at a time, for models of transformers.

A packed row [1, T] holds several samples. Three kinds of module mix tokens, and must do so within a sample:

    samples of 3 and 2 tokens          attention mask of the row, as if written out (nothing is)
    a a a b b                          a  1 . . . .
    positions 0 1 2 0 1                a  1 1 . . .        each block is the model's own mask of that
    sample_lengths [3, 2]              a  1 1 1 . .        sample: causal, a sliding window, or images
                                       b  . . . 1 .        that see all of themselves
                                       b  . . . 1 1

- Attention. `ATTENTION` names an attention function and a mask function, registered with transformers. The
  mask function keeps the model's own rule and the samples (`SampleMasks`), and the attention function runs a
  sample at a time, or all in one kernel where the rule is plainly causal. A mask of T × T never exists.
- Linear attention and convolutions (`mix_by_sample`) are called once for every sample.
- Rotary embeddings whose frequencies depend on the longest position (`rotate_by_sample`) too.

    with packed_row([3, 2]):
        model.model(input_ids=row, attention_mask=torch.ones_like(row), position_ids=positions)

Without `packed_row` all of them are transformers' "sdpa".
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trainer.models.xcomposer2.modeling_xcomposer2 import has_varlen_kernel

ATTENTION = "by_sample"
"""The name of our attention among transformers' implementations; without "flash", which they look for."""

_samples: ContextVar["Samples | None"] = ContextVar("samples", default=None)


class Samples:
    """The samples of a packed row: their lengths, and on the device int32 [samples + 1], their bounds."""

    def __init__(self, lengths: Sequence[int], cu_seq_lens: Tensor | None = None) -> None:
        self.lengths = list(lengths)
        self.begins = list(itertools.accumulate(self.lengths, initial=0))
        self.cu_seq_lens = cu_seq_lens

    def bounds(self, device: torch.device) -> Tensor:
        if self.cu_seq_lens is None:
            self.cu_seq_lens = torch.tensor(self.begins, dtype=torch.int32, device=device)
        return self.cu_seq_lens


@contextlib.contextmanager
def packed_row(samples: Samples | Sequence[int] | None) -> Iterator[None]:
    """Within it, the rows that a model sees consist of these samples; None: of one."""
    if samples is not None and not isinstance(samples, Samples):
        samples = Samples(samples)
    token = _samples.set(samples)
    try:
        yield
    finally:
        _samples.reset(token)


class SampleMasks:
    """The attention mask of a packed row: the model's own rule, evaluated inside each sample when needed.

    Models hand a mask to their layers unread, or to another mask function if it has four dimensions.
    """

    ndim = 4

    def __init__(self, samples: Samples, rule: dict[str, Any]) -> None:
        """rule: the arguments of transformers' mask functions for the whole row."""
        self.samples, self.rule = samples, rule
        self.shape = (1, 1, samples.begins[-1], samples.begins[-1])

    @property
    def window(self) -> tuple[int, int] | None:
        """How far a query sees, back and ahead (-1: to the end), if the rule is only that."""
        if not self.rule["allow_is_causal_skip"]:
            return None
        size = self.rule.get("local_size")
        return (-1 if size is None else size - 1, 0)

    @functools.cached_property
    def masks(self) -> list[Tensor | None]:
        """[1, 1, n, n] bool of each sample; None where the kernel needs none."""
        with torch.no_grad():
            # Rules may look up what is at a position, so they are given those of the row.
            bounds = zip(self.samples.lengths, self.samples.begins[:-1], strict=True)
            places = [{"q_length": n, "kv_length": n, "q_offset": at, "kv_offset": at} for n, at in bounds]
            rules: list[dict[str, Any]] = [self.rule | place for place in places]
            return [sdpa_mask(**rule) for rule in rules]


def sample_mask(**rule: Any) -> Any:
    """The registered mask function: `SampleMasks` in a packed row, otherwise that of "sdpa"."""
    samples = _samples.get()
    if isinstance(rule.get("attention_mask"), SampleMasks):  # a model's outer part made it already
        return rule["attention_mask"]
    if samples is None:
        return sdpa_mask(**rule)
    assert rule["batch_size"] == 1, rule["batch_size"]
    assert rule["q_length"] == rule["kv_length"] == samples.begins[-1], (rule["q_length"], samples.lengths)
    if getattr(rule.get("config"), "attention_chunk_size", None) is not None:
        raise ValueError("attention in chunks cannot be packed; turn packing off")
    rule.setdefault("allow_is_causal_skip", True)
    return SampleMasks(samples, rule | {"attention_mask": None})


@torch.compiler.disable()  # it would be compiled again for every packing of a row
def sample_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: query [B, H, T, E], key and value [B, K, T, E] → [B, T, H, E]."""
    if not isinstance(attention_mask, SampleMasks):
        return attend(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise ValueError("attention with a bias by position cannot be packed; turn packing off")
    samples, window = attention_mask.samples, attention_mask.window
    if window is not None and fits_varlen(query, value, kwargs):
        bounds, longest = samples.bounds(query.device), max(samples.lengths)
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # [T, H | K | K, E]
        options: dict[str, Any] = {"scale": kwargs.get("scaling"), "window_size": window, "enable_gqa": True}
        y: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
        return y[None], None
    alone = zip(*(part.split(samples.lengths, dim=2) for part in (query, key, value)), strict=True)
    outputs = [
        attend(module, q, k, v, mask, **kwargs)[0]
        for (q, k, v), mask in zip(alone, attention_mask.masks, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def fits_varlen(query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether torch's kernel for rows of several samples takes these; it knows no dropout and no caps."""
    special = kwargs.get("dropout") or _is_special(kwargs)
    return not special and query.shape[-1] == value.shape[-1] <= 256 and has_varlen_kernel(query)


def _is_special(kwargs: dict[str, Any]) -> bool:
    """Whether scores are capped or have sinks, which torch's fused attention does not know."""
    return kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """torch's fused attention, or that of the model's own file for what the former does not know."""
    if not _is_special(kwargs):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    own: Any = sys.modules[type(module).__module__]
    if mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True):
        shape = (query.shape[2], key.shape[2])
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        least = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, least)
    return own.eager_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register(ATTENTION, sample_attention)
AttentionMaskInterface.register(ATTENTION, sample_mask)


def mix_by_sample(block: nn.Module, mixers: Sequence[nn.Module]) -> None:
    """Run these modules of a block, which map hidden states [1, T, D] to such, once for every sample.

    The block takes the samples as an argument, for when activation checkpointing recomputes it in the
    backward pass, where no `packed_row` is open; the hook that adds the argument is outside of that.
    """
    forward_of_block = block.forward

    def hand_over(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"packed_samples": _samples.get()}

    def forward_with_samples(*args: Any, packed_samples: Samples | None = None, **kwargs: Any) -> Any:
        with packed_row(packed_samples):
            return forward_of_block(*args, **kwargs)

    block.forward = forward_with_samples
    block.register_forward_pre_hook(hand_over, with_kwargs=True)
    for mixer in mixers:
        mixer.forward = _by_sample(mixer.forward)


def _by_sample(forward: Callable[..., Any]) -> Callable[..., Any]:
    def forward_by_sample(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        samples = _samples.get()
        if samples is None:
            return forward(hidden_states, *args, **kwargs)
        outputs = [forward(x, *args, **kwargs) for x in hidden_states.split(samples.lengths, dim=1)]
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs, dim=1)
        return (torch.cat([output[0] for output in outputs], dim=1), *outputs[0][1:])

    return forward_by_sample


def rotate_by_sample(rotary: Any) -> None:
    """Compute a rotary embedding with "dynamic" or "longrope" frequencies for every sample as if alone.

    Otherwise a long sample would change the frequencies of the row's other ones, and of later rows.
    """
    forward = rotary.forward

    def forward_alone(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for prefix, kind in rope_types(rotary).items():
            if kind == "dynamic":  # transformers keeps the longest row's frequencies
                setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)
                setattr(rotary, f"{prefix}inv_freq", getattr(rotary, f"{prefix}original_inv_freq"))
        return forward(x, position_ids, *args, **kwargs)

    def forward_by_sample(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        samples = _samples.get()
        parts = [position_ids] if samples is None else position_ids.split(samples.lengths, dim=-1)
        rotations = zip(*(forward_alone(x, part, *args, **kwargs) for part in parts), strict=True)
        return tuple(torch.cat(part, dim=-2) for part in rotations)  # cosines and sines, [..., T, E]

    rotary.forward = forward_by_sample


def rope_types(rotary: nn.Module) -> dict[str, str]:
    """The kinds of a rotary embedding's frequencies by the prefix of their names; empty for other modules."""
    kinds: Any = getattr(rotary, "rope_type", {})
    return {"": kinds} if isinstance(kinds, str) else {f"{layer}_": kind for layer, kind in kinds.items()}
