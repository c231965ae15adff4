"""Checks before the first step, on the very model that will train: it computes what its own class computes.

Input: the sharded model with its weights, and the shortest samples of the data with and without a picture.
Output: what was measured, the same on every rank, and a sentence for a check that fails:

    picture      ▢ ▢ What ? A cat .                 row   [picture | text | picture]
    text         Say yes . Yes .                    (rows of their own, where training pads)

    tokens       the picture's tokens by its header are those by its pixels, and the tower's features fit them
    logits       of its sample in the training forward are those of the class's own forward
    leak         with other words in the text, the losses of the picture's sample keep their bits
    packed       losses of the samples in the row are those of the samples alone
    gradients    the picture's sample gives every parameter that trains a gradient

    for check in check_model(model, plan, config, device):
        check.passed, check.problem          # False, "--check_model: leak: model.layers.0.self_attn: …"

Losses here are of every token that is followed by text, trained or not. The training is not changed: no
parameter is, gradients are dropped, and random numbers go on as if nothing had been run.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data.batch import MicroBatch
from data.errors import DataError
from data.images import open_image, process
from data.loader import SampleReader
from trainer.config import Config
from trainer.distributed import all_max
from trainer.evaluate import without_dropout
from trainer.job import log
from trainer.models import own_arguments
from trainer.prepare import Plan
from trainer.rehearsal import all_sizes, forward_backward, read_batch
from trainer.trainable import refuse_idle

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest relative difference between the same numbers from products of other shapes. A sum in another order
differs in its last bits, 2⁻²³ or 2⁻⁸ of it, and a model is a chain of some hundred of them."""
SampleId = tuple[int, int]
"""(source, record)"""
KEPT = 64
"""Positions at the end of a sample whose logits are compared."""


@dataclass(frozen=True)
class Check:
    """The result of a check."""

    name: str
    measured: float
    limit: float
    problem: str
    """What it means if `measured` is above `limit`, and what to do."""

    @property
    def passed(self) -> bool:
        return self.measured <= self.limit


@dataclass(frozen=True)
class Subject:
    """What the checks look at."""

    model: Any
    plan: Plan
    config: Config
    device: torch.device
    samples: tuple[SampleId, SampleId]
    """With a picture, and without, if there are both."""

    @property
    def class_name(self) -> str:
        return type(self.model).__name__.removeprefix("FSDP")

    @property
    def rounding(self) -> float:
        return ROUNDING[torch.bfloat16 if self.config.bf16 else torch.float32]

    @cached_property
    def alone(self) -> list[MicroBatch]:
        """Each sample in a row of its own."""
        return [read_batch(self.plan.reader, [sample]).to(self.device) for sample in self.samples]

    @cached_property
    def row(self) -> MicroBatch:
        """The first, the second, and the first again, as training puts samples together."""
        first, second = self.samples
        packed = self.plan.packing is not None
        return read_batch(self.plan.reader, [first, second, first], packed).to(self.device)

    @cached_property
    def losses_in_row(self) -> list[Tensor]:
        return losses_of_samples(self.model, self.row)

    def over_ranks(self, measured: float) -> float:
        """The largest of any rank: all must come to the same result."""
        return all_max(measured if math.isfinite(measured) else math.inf, self.device).item()


def check_model(model: Any, plan: Plan, config: Config, device: torch.device) -> list[Check]:
    """The checks in the order above, up to the first that fails; every rank calls it."""
    samples = shortest_samples(plan.reader, all_sizes(plan.reader, plan.packing))
    if samples is None:
        return []
    subject, checks = Subject(model, plan, config, device, samples), []
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type), without_dropout(model):
        for check in (check_tokens, check_logits, check_leak, check_packed, check_gradients):
            checks.append(check(subject))
            if not checks[-1].passed:
                break
        log("model checked: " + ", ".join(f"{c.name} {c.measured:.2g}" for c in checks))
    model.zero_grad(set_to_none=True)
    return checks


def shortest_samples(reader: SampleReader, sizes: np.ndarray) -> tuple[SampleId, SampleId] | None:
    """The shortest sample with a picture and the shortest without, or the two shortest if all or none have
    one; one twice if there is no other, None if there is none.

    sizes: `all_sizes`. A sample that cannot be read is passed over: training reports it.
    """

    def readable(rows: np.ndarray) -> Iterator[SampleId]:
        for *_, source, record in rows.tolist():
            try:
                for _ in pictures_of(reader, (source, record)):
                    pass
            except DataError:
                continue
            yield source, record

    ascending = sizes[np.argsort(sizes[:, 0], kind="stable")]
    has_pictures = ascending[:, 1] > 0
    picture, text = (next(readable(ascending[kind]), None) for kind in (has_pictures, ~has_pictures))
    if picture and text:
        return picture, text
    two = list(islice(readable(ascending), 2))
    return (two[0], two[-1]) if two else None


def pictures_of(reader: SampleReader, sample: SampleId) -> Iterator[Image.Image]:
    """The decoded pictures of a sample before its cut; DataError if one cannot be read."""
    source, (number, index) = reader.sources[sample[0]], sample
    encoded, _ = reader.read(number, index, decode=False)
    for path in source.sample(index).images[: len(encoded.image_tokens)]:
        with open_image(source.image_root / path) as image:
            process(image, reader.image_processor.rgb)
            yield image


# --- the checks ------------------------------------------------------------------------------------------


@torch.no_grad()
def check_tokens(subject: Subject) -> Check:
    reader, sample = subject.plan.reader, subject.samples[0]
    wrong, why, where = 0, "", reader.sources[sample[0]].where(sample[1])
    try:
        for image in pictures_of(reader, sample):
            reader.image_processor.check(image)
        losses_of_samples(subject.model, subject.alone[0])
    except ValueError as error:  # of the model too, if the features are not as many as the slots
        wrong, why = 1, " ".join(str(error).split())
    return Check(
        "tokens",
        subject.over_ranks(wrong),
        0,
        f"{where}: the tokens of its pictures do not fit their pixels ({why}): the processor's "
        f"files and config.json contradict each other, or {subject.class_name} is not supported",
    )


@torch.no_grad()
def check_logits(subject: Subject) -> Check:
    model, inputs = subject.model, subject.alone[0].inputs
    length = inputs["input_ids"].shape[1]
    at = torch.arange(max(0, length - KEPT), length, device=subject.device)
    seen = {}

    def look(hidden: Tensor, targets: Tensor, lm_head: nn.Module, num_items_in_batch: Any = None) -> Any:
        seen["logits"] = lm_head(hidden).float()
        return hidden.sum(), hidden.sum(dim=-1)

    loss_function, model.loss_function = model.loss_function, look
    try:
        model(**inputs | {"supervised": at, "targets": at})
    finally:
        model.loss_function = loss_function
    arguments = own_arguments(subject.plan.model_config, inputs)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = len(at)
    own = model(**arguments, use_cache=False).logits[0, -len(at) :].float()
    measured = subject.over_ranks(((seen["logits"] - own).abs().max() / own.abs().max()).item())
    head = next(name for name, m in model.named_modules() if m is model.get_output_embeddings())
    return Check(
        "logits",
        measured,
        subject.rounding,
        f"{head}: the logits of training differ by {measured:.2g} of the largest from those of "
        f"{subject.class_name}'s own forward, which scales or caps them or counts positions in a way that is "
        "not known here; train another model, or teach trainer/models/generic/own_head.py or answers.py",
    )


@torch.no_grad()
def check_leak(subject: Subject) -> Check:
    """The same kernels run on the same shapes, and a row of a product depends on no other row: exact, unless
    tokens choose experts, whose products have as many rows as tokens chose them, or a kernel adds in any
    order, so that the same row twice differs too."""
    model, before = subject.model, subject.losses_in_row
    changed = with_other_words(subject.row, number=1)

    def largest_change(row: MicroBatch) -> float:
        after = losses_of_samples(model, row)
        return subject.over_ranks(max(relative(after[i], before[i], torch.amax) for i in (0, 2)))

    measured, limit = largest_change(changed), 0.0
    if measured:
        routed = any("Experts" in type(module).__name__ for module in model.modules())
        limit = subject.rounding if routed or largest_change(subject.row) else 0.0
    module = leaking_module(model, subject.row, changed) if measured > limit else ""
    return Check(
        "leak",
        measured,
        limit,
        f"{module or subject.class_name}: other words in one sample change the losses of another one in its "
        f"batch by {measured:.2g} of the mean, so it mixes tokens across samples; name the module's class in "
        "trainer/models/generic/answers.py, or use --per_device_train_batch_size 1 --packing False",
    )


@torch.no_grad()
def check_packed(subject: Subject) -> Check:
    first, second = (losses_of_samples(subject.model, batch)[0] for batch in subject.alone)
    pairs = zip(subject.losses_in_row, (first, second, first), strict=True)
    measured = subject.over_ranks(max(relative(together, alone) for together, alone in pairs))
    kind = "packed" if subject.plan.packing else "padded"
    return Check(
        "packed",
        measured,
        subject.rounding,
        f"the losses of {subject.class_name} differ by {measured:.2g} of the mean between samples {kind} "
        "together and alone, so something depends on the whole batch, such as rotary frequencies; use "
        "--per_device_train_batch_size 1 --packing False",
    )


def check_gradients(subject: Subject) -> Check:
    model, problem = subject.model, ""
    forward_backward(model, subject.alone[0], subject.device, subject.config)
    # Only now: between a forward and a backward pass some modules hold gathered parameters.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        refuse_idle(trained)
    except ValueError as error:
        problem = str(error)
    measured = subject.over_ranks(sum(p.grad is None for p in trained.values()))
    return Check("gradients", measured, 0, problem)


# --- what they are made of -------------------------------------------------------------------------------


def losses_of_samples(model: Any, batch: MicroBatch) -> list[Tensor]:
    """The loss of every token of each sample that is followed by text."""
    places = places_of_samples(batch)
    at = torch.cat(places)
    inputs = batch.inputs | {"supervised": at, "targets": batch.inputs["input_ids"].flatten()[at + 1]}
    return list(model(**inputs).token_losses.split([len(place) for place in places]))


def places_of_samples(batch: MicroBatch) -> list[Tensor]:
    """The positions of each sample in the flattened rows that are followed by text of the same sample."""
    slots, width = batch.inputs["im_mask"].flatten(), batch.inputs["input_ids"].shape[1]
    packed = batch.inputs["sample_lengths"] is not None
    begins = np.cumsum([0, *batch.lengths])[:-1] if packed else width * np.arange(len(batch.lengths))
    places = []
    for begin, length in zip(begins.tolist(), batch.lengths, strict=True):
        place = torch.arange(begin, begin + length - 1, device=slots.device)
        places.append(place[~slots[place + 1]])
    return places


def relative(ours: Tensor, theirs: Tensor, reduce: Callable[[Tensor], Tensor] = torch.mean) -> float:
    """The mean (or another) difference, relative to the mean size of the second."""
    return (reduce((ours - theirs).abs()) / theirs.abs().mean()).item()


def with_other_words(batch: MicroBatch, number: int) -> MicroBatch:
    """The batch with another id in place of each text token of a sample but its first: of the ids that the
    batch has, the next larger one."""
    ids, slots = batch.inputs["input_ids"].flatten(), batch.inputs["im_mask"].flatten()
    known, place = ids[~slots].unique(), places_of_samples(batch)[number] + 1
    following = known[(torch.searchsorted(known, ids[place]) + 1) % len(known)]
    ids = ids.index_copy(0, place, following).view_as(batch.inputs["input_ids"])
    return replace(batch, inputs=batch.inputs | {"input_ids": ids})


def leaking_module(model: nn.Module, row: MicroBatch, changed: MicroBatch) -> str:
    """The first module whose input at the first and third sample is the same in both batches, and whose
    output is not; "" if none shows it."""
    shape, (first, _, third) = row.inputs["input_ids"].shape, places_of_samples(row)
    place = torch.cat([first, third])

    def at_samples(value: Any) -> list[Tensor]:
        if isinstance(value, list | tuple):
            return [tensor for item in value for tensor in at_samples(item)]
        is_hidden = isinstance(value, Tensor) and value.shape[:2] == shape and value.is_floating_point()
        return [value.flatten(0, 1)[place]] if is_hidden else []

    def calls(batch: MicroBatch) -> list[tuple[str, list[Tensor], list[Tensor]]]:
        found = []
        hooks = [
            module.register_forward_hook(
                lambda _, args, kwargs, output, name=name: found.append(
                    (name, at_samples([*args, *kwargs.values()]), at_samples(output))
                ),
                with_kwargs=True,
            )
            for name, module in model.named_modules()
            if name
        ]
        losses_of_samples(model, batch)
        for hook in hooks:
            hook.remove()
        return found

    def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    for before, after in zip(calls(row), calls(changed), strict=True):
        if before[1] and same(before[1], after[1]) and not same(before[2], after[2]):
            return before[0]
    return ""


def problems_of(checks: Sequence[Check]) -> list[str]:
    """A sentence for each check that failed."""
    hint = "nothing was trained, and --check_model False trains without these checks"
    return [f"--check_model: {c.name}: {c.problem}; {hint}" for c in checks if not c.passed]
