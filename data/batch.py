"""Encoded samples and their pictures → one micro-batch of model inputs.

    two samples of 5 and 3 tokens, unpacked           packed (one row, no padding)
    input_ids       [[a a a a a], [b b b 0 0]]        [[a a a a a b b b]]
    attention_mask  [[1 1 1 1 1], [1 1 1 0 0]]        None
    position_ids    None                              [[0 1 2 3 4 0 1 2]]
    sample_lengths  None                              [5, 3]
    cu_seq_lens     None                              [0, 5, 8]

Without padding there is no mask. If positions 1 and 2 of sample a are the slots of an image, and the last two
tokens of a and the last one of b are trained:

    labels      a: -100 -100 -100  a  a      b: -100 -100  b
    image_runs  [(1, 3)]                     of the flattened rows
    supervised  [2, 3, 6]                    positions before a trained token, in the packed row
    targets     [a, a, b]                    those tokens

A model could derive these from labels, im_mask and position_ids, but only by synchronising with the device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from data.tokens import IGNORED, Encoded

DUMMY_TOKENS = 2
"""Length of the row of an empty micro-batch: the least that has a next token to predict."""


@dataclass
class MicroBatch:
    """The samples of one forward and backward pass on one rank."""

    inputs: dict[str, Any]
    """The model's keyword arguments: input_ids and labels, [B, T] int64; im_mask, [B, T] bool; attention_mask
    and position_ids, [B, T] int64 or None (positions of a model with k of them: [k, B, T]); image_runs, a
    list of (begin, end); of a packed row sample_lengths, a list of S, and cu_seq_lens, [S + 1] int32;
    supervised and targets, [num_supervised] int64; and its image processor's, such as pixel_values."""
    source_of_target: torch.Tensor
    """[num_supervised] int64: the source of each supervised token, row by row where `labels != -100`."""
    lengths: list[int]
    """Tokens of each sample; empty for a dummy row."""
    num_supervised: int
    sample_ids: list[tuple[int, int]] = field(default_factory=list)
    """(source, record) of each sample."""
    skipped: list[tuple[int, str]] = field(default_factory=list)
    """(source, message) for each bad sample left out."""
    unsupervised: list[tuple[int, str]] = field(default_factory=list)
    """(source, message) for each sample left out because max_length leaves no answer to train on."""
    shrunk: list[tuple[int, str]] = field(default_factory=list)
    """(source, message) for each sample whose images were made smaller to fit into max_length."""
    planned_idle_share: float | None = None
    """Fraction of all ranks' time that the plan of the whole step leaves idle; None without packing."""

    @property
    def num_tokens(self) -> int:
        """Real tokens: no padding, no dummy row."""
        return sum(self.lengths)

    @property
    def num_samples(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device | str) -> "MicroBatch":
        return self._map(lambda tensor: to_device(tensor, torch.device(device)))

    def pin_memory(self) -> "MicroBatch":  # called by DataLoader
        return self._map(torch.Tensor.pin_memory)

    def __getstate__(self) -> dict[str, Any]:
        # Workers send only pictures in shared memory, which costs half a millisecond per tensor.
        return vars(self._map(lambda tensor: tensor if tensor.is_floating_point() else tensor.numpy()))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(MicroBatch(**state)._map(torch.as_tensor)))

    def _map(self, change: Callable[[Any], Any]) -> "MicroBatch":
        """A copy with `change` applied to every array and tensor."""
        inputs = {name: map_tensors(value, change) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, source_of_target=change(self.source_of_target))


def map_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with `change` applied to every array and tensor, also in lists and tuples."""
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, change) for item in value)
    return change(value) if isinstance(value, torch.Tensor | np.ndarray) else value


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of the host's `values` on the device, which the host does not wait for; see `on_host`. Values
    that are not on the host, or stay there, are returned as they are."""
    if values.device.type != "cpu" or device.type == "cpu":
        return values
    if torch.accelerator.is_available():  # not where the device is "meta"
        values = values.pin_memory()
    moved = values.to(device, non_blocking=True)
    if not values.is_floating_point():
        moved.values_on_host = values  # type: ignore[attr-defined]
    return moved


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The integers from which `to_device` made this tensor, without waiting for the device; another tensor as
    it is."""
    return getattr(tensor, "values_on_host", tensor)


def collate(
    samples: Sequence[Encoded],
    pictures: Mapping[str, Any],
    sample_ids: Sequence[tuple[int, int]],
    pad_id: int,
    *,
    packed: bool = False,
) -> MicroBatch:
    """Puts samples into rows: one each, padded on the right, or all in one row (`packed`).

    Without samples the result is a row of padding, so that an idle rank still takes part in the collectives.

    Args:
        pictures: the model's arguments for all images of the samples, in order; or for a dummy image without
            slots; or none.
        sample_ids: (source, record) of each sample.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    width = (sum(lengths) if packed else max(lengths)) if samples else DUMMY_TOKENS
    num_rows = 1 if packed else max(1, len(samples))
    input_ids = np.full((num_rows, width), pad_id)
    labels = np.full((num_rows, width), IGNORED)
    im_mask = np.zeros((num_rows, width), dtype=bool)
    kinds = max((len(s.position_ids) for s in samples if s.position_ids is not None), default=0)
    position_ids = np.tile(np.arange(width), (max(1, kinds), num_rows, 1))
    attention_mask = np.zeros((num_rows, width), dtype=np.int64)
    begins = np.cumsum([0, *lengths])[:-1] if packed else [0] * len(samples)
    for number, (sample, begin, length) in enumerate(zip(samples, begins, lengths, strict=True)):
        span = (0 if packed else number, slice(begin, begin + length))
        input_ids[span], labels[span], im_mask[span] = sample.input_ids, sample.labels, sample.im_mask
        own = sample.position_ids
        position_ids[:, *span] = np.arange(length) if own is None else own
        attention_mask[span] = 1
    is_padded = bool(samples) and not attention_mask.all()
    sources = [
        np.full(sample.num_supervised, source)
        for sample, (source, _) in zip(samples, sample_ids, strict=True)
    ]
    following = np.full_like(labels, IGNORED)
    following[:, :-1] = labels[:, 1:]
    supervised = np.flatnonzero(following != IGNORED)
    sample_lengths = (lengths or [width]) if packed else None
    bounds = np.cumsum([0, *sample_lengths], dtype=np.int32) if sample_lengths else None
    if not kinds:
        position_ids = position_ids[0]
    inputs = {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask) if is_padded else None,
        "position_ids": torch.from_numpy(position_ids) if packed or kinds else None,
        "im_mask": torch.from_numpy(im_mask),
        "labels": torch.from_numpy(labels),
        "image_runs": _runs(im_mask.reshape(-1)),
        "sample_lengths": sample_lengths,
        "cu_seq_lens": None if bounds is None else torch.from_numpy(bounds),
        "supervised": torch.from_numpy(supervised),
        "targets": torch.from_numpy(following.reshape(-1)[supervised]),
        **pictures,
    }
    return MicroBatch(
        inputs=inputs,
        source_of_target=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *sources])),
        lengths=lengths,
        num_supervised=sum(sample.num_supervised for sample in samples),
        sample_ids=list(sample_ids),
    )


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(begin, end) of the runs of True."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
