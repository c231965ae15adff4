"""Floating-point operations of any model of transformers, found by running it without memory.

Input: the model on the meta device, with which of its parameters train, and the reader of its samples.
Output: operations for each unit of work, by the rules of `trainer.models.family.Flops`.

    flops = measure_flops(model, reader)             # once, before the model is sharded
    vision, language = flops.of(micro_batch)

A few samples with pictures of several sizes run forward and backward on the meta device, and torch's counter
adds up their products: of the layers that they really reach, and of the gradients that are really needed.
Attention runs written out and nothing is checkpointed, so nothing is counted twice. A sample's operations are
then a sum of so many for each

    sample, token, supervised       supervised: a position whose logits are needed
    pair                            of tokens of the sample, masked or not
    patch, patch pair, window pair  a patch or tile of a picture; a pair of its patches, or inside a window

which the samples determine, with two to spare: if no such sum gives what was counted, the model is refused.
Linear attention works on chunks of 64 tokens and is measured on whole ones. Of a layer's experts, those
count that a token is sent to. It takes half a minute of a core for a 7B.

Qwen2.5-VL-7B, its tower frozen, a sample of 500 tokens, 391 of them one picture's, 100 supervised:

    vision 2.1e12 (the projector included), language 2.0e13
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from data.batch import MicroBatch, collate, map_tensors
from data.loader import SampleReader
from data.tokens import IGNORED, SLOT, Encoded

CHUNK = 64
"""Tokens that linear attention works on at a time."""
PROBES = (
    (3, 5, [(224, 224)]),
    (1, 30, [(448, 224), (224, 224)]),
    (4, 11, [(448, 336)]),
    (2, 50, [(672, 448)]),
    (6, 3, [(224, 672), (560, 560)]),
    (5, 20, [(560, 560)]),
    (7, 40, [(336, 784)]),
    (2, 8, [(896, 896)]),
    (4, 25, [(224, 224), (672, 784)]),
)
"""Samples to measure: chunks of text, supervised tokens, and the sizes of the pictures."""
LANGUAGE = ("sample", "token", "supervised", "pair")
VISION = ("patch", "patch pair", "window pair")


@dataclass(frozen=True)
class MeasuredFlops:
    """Operations for each unit of work, forward and backward together."""

    config: Any
    """The model's."""
    per: np.ndarray
    """float64 [7]: operations by unit, those of LANGUAGE first and then those of VISION."""

    @property
    def of_language(self) -> dict[str, float]:
        return dict(zip(LANGUAGE, self.per.tolist(), strict=False))

    def of(self, micro_batch: MicroBatch) -> tuple[int, int]:
        work = self.per * _units(self.config, micro_batch)
        return round(work[len(LANGUAGE) :].sum()), round(work[: len(LANGUAGE)].sum())


def measure_flops(model: Any, reader: SampleReader) -> MeasuredFlops:
    """Count the operations of a model on the meta device; ValueError if they do not follow from the units."""
    has_pictures = any(source.records.num_images for source in reader.sources)
    samples = [_sample(reader, chunks, n, sizes if has_pictures else []) for chunks, n, sizes in PROBES]
    units = np.array([_units(model.config, sample) for sample in samples])
    needed = int(units.any(axis=0).sum()) + 2
    units, samples = units[:needed], samples[:needed]
    complaint = f"--measure_mfu: the operations of {type(model).__name__} cannot be counted, because"
    try:
        with _as_measured(model):
            counted = np.array([_operations(model, sample) for sample in samples])
    except Exception as error:  # whatever code raises that depends on values
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ValueError(f"{complaint} it does not run without values ({reason}); remove the flag") from error
    scale = np.maximum(units.max(axis=0), 1)
    per = np.rint(np.linalg.lstsq(units / scale, counted, rcond=1e-12)[0] / scale)
    if not np.allclose(units @ per, counted, rtol=1e-6):
        raise ValueError(
            f"{complaint} they do not follow from the numbers of its tokens and patches; remove the flag"
        )
    return MeasuredFlops(model.config, per)


@contextmanager
def _as_measured(model: Any) -> Iterator[None]:
    """Within it, a model in training, of one dtype, whose tokens find their experts without values."""
    dtypes = {parameter: parameter.dtype for parameter in model.parameters()}
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    ways, training = {key: c._experts_implementation for key, c in configs.items()}, model.training
    try:
        model.train()
        for parameter in dtypes:
            parameter.data = parameter.data.float()
        for config in configs.values():
            config._experts_implementation = "batched_mm"
        yield
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
        for key, config in configs.items():
            config._experts_implementation = ways[key]


def _units(config: Any, micro_batch: MicroBatch) -> np.ndarray:
    """Numbers of each unit; padding and a dummy picture are no work."""
    lengths = micro_batch.lengths
    language = [len(lengths), sum(lengths), micro_batch.num_supervised, sum(n**2 for n in lengths)]
    pictures = np.zeros(len(VISION))
    if micro_batch.inputs["im_mask"].any():
        pictures = sum(_picture_units(config, micro_batch.inputs), pictures)
    return np.array([*language, *pictures], dtype=np.float64)


def _picture_units(config: Any, inputs: dict[str, Any]) -> list[np.ndarray]:
    grids = inputs.get("image_grid_thw")
    if grids is None:
        tiles: Tensor = inputs["pixel_values"]
        # Where pictures of different numbers of tiles are filled up, they are with zeros.
        real = tiles.flatten(2).any(-1).sum() if tiles.ndim == 5 else len(tiles)
        return [np.array([int(real), 0, 0])]
    vision = config.vision_config
    window = (getattr(vision, "window_size", None) or 0) // vision.patch_size
    units = []
    for frames, height, width in grids.tolist():
        sides = [
            [min(window, side - at) for at in range(0, side, window)] for side in (height, width) if window
        ]
        in_windows = np.prod([sum(part**2 for part in side) for side in sides]) if window else 0
        units.append(frames * np.array([height * width, (height * width) ** 2, in_windows]))
    return units


def _sample(reader: SampleReader, chunks: int, supervised: int, sizes: list[tuple[int, int]]) -> MicroBatch:
    """A packed row of one sample, a number of whole chunks long, with pictures of these sizes."""
    processor, pad_id = reader.image_processor, reader.encoder.pad_id
    pictures = [processor(Image.new("RGB", size, (200, 100, 50))) for size in sizes]
    parts = [part for size in sizes for part in (processor.tokens(*size), np.array([pad_id]))]
    missing = -sum(map(len, parts)) % CHUNK
    ids = np.concatenate([*parts, np.full(CHUNK * chunks + missing, pad_id)])
    slots = ids == SLOT
    input_ids = np.where(slots, reader.encoder.conversation.slot_id, ids)
    labels = np.full(len(input_ids), IGNORED)
    labels[-supervised:] = input_ids[-supervised:]
    positions = reader.positions(input_ids, pictures) if reader.positions else None
    encoded = Encoded(input_ids, labels, slots, [], position_ids=positions)
    given = processor.batch(pictures) if pictures else {}
    return collate([encoded], given, [(0, 0)], reader.encoder.pad_id, packed=True)


def _operations(model: Any, micro_batch: MicroBatch) -> int:
    """Operations of a forward and backward pass."""
    inputs = {name: map_tensors(value, _without_values) for name, value in micro_batch.inputs.items()}
    with sdpa_kernel(SDPBackend.MATH), _Count() as count:
        model(**inputs).loss.backward()
    model.zero_grad(set_to_none=True)
    return count.operations


class _Count(TorchDispatchMode):
    """Counts operations, while integers (places, sizes) are computed on the CPU, and of other numbers only
    their shapes.

    A `FlopCounterMode` around it would count the same and take five times as long.
    """

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        devices: set[bool] = set()
        map_tensors([*args, *kwargs.values()], lambda tensor: devices.add(tensor.is_meta))
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta" if True in devices else "cpu"
        if True not in devices:
            return map_tensors(func(*args, **kwargs), _without_values)
        if func is torch.ops.aten.index.Tensor:  # a mask of which the number of True is known
            args = (args[0], [place for mask in args[1] for place in _places(mask)])
        if False in devices:
            args = map_tensors(tuple(args), _on_meta)
            kwargs = {name: map_tensors(value, _on_meta) for name, value in kwargs.items()}
        result = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.operations += formula(*args, **kwargs, out_val=result)
        return result


def _without_values(value: Tensor) -> Tensor:
    return value.to("meta") if value.is_floating_point() else value


def _on_meta(value: Tensor) -> Tensor:
    return value if value.is_meta else value.to("meta")


def _places(mask: Tensor | None) -> Sequence[Tensor | None]:
    is_known = mask is not None and mask.dtype == torch.bool and not mask.is_meta
    return mask.nonzero().unbind(1) if is_known else [mask]  # type: ignore[union-attr]
