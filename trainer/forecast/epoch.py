"""What a step and an epoch consist of: samples, tokens, micro-batches, operations.

Input: a plan (trainer/prepare.py), and the lengths of its samples (data/packing.py). Output: sums of an
epoch, and of a step what the slowest rank computes, for which the others wait:

    epoch_of(plan, packing, config, ranks=8).tokens             # 4_100_000
    work_of_steps(plan.sampler, packing, operations, config, 8, range(20))     # float64 [20, 5]: WORK
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

import trainer.models
from data.batch import MicroBatch, collate
from data.errors import DataError
from data.packing import Packing, deal, idle_share
from data.packing import Plan as StepPlan
from data.reader import cost_model
from data.sampler import StepSampler
from trainer.config import Config
from trainer.distributed import Ranks
from trainer.forecast.config import ForecastConfig
from trainer.models.family import Flops
from trainer.prepare import Plan, describe, measure
from trainer.rehearsal import all_sizes, read_batch

STEPS_PLANNED = 20
"""Steps of the first epoch from which the rows of a step and the idle time are computed."""
PICTURES_PROBED = 16
"""Samples whose pictures tell what an image slot costs in the vision tower."""
WORK = ("language", "attention", "vision", "micro-batches", "steps")
"""What the time of a step grows with: operations of one rank, those of attention between a sample's tokens
apart; and once for each micro-batch and step, as for communication and the optimizer."""


@dataclass(frozen=True)
class _Text:
    """Ids of a sample that is made up, all of them trained or none; or a picture."""

    ids: list[int] | None
    trained: bool = False
    role: str = "control"


def full_row(plan: Plan, config: ForecastConfig) -> MicroBatch:
    """A micro-batch of per_device_train_batch_size samples of max_length, each with a picture, if the model
    takes any; all text is trained. DataError if the picture does not fit."""
    reader, size = plan.reader, config.picture_size
    text = _Text([reader.encoder.pad_id] * config.max_length, trained=True, role="assistant")
    pieces = [_Text([reader.encoder.pad_id]), text]
    pictures: list[Any] = []
    if size and plan.parts.vision_blocks is not None:
        processor = reader.image_processor
        if (slots := processor.num_tokens(*size)) > config.max_length - 2:
            raise DataError(
                f"--picture {config.picture}: its {slots:,} tokens leave no room for text within "
                f"max_length={config.max_length:,}; raise that, or give a smaller picture"
            )
        pieces.insert(1, _Text(None))
        pictures = [processor(Image.new("RGB", size))]
    encoded = reader.encoder.join(pieces, lambda _: reader.image_processor.tokens(*(size or (0, 0))))
    if reader.positions:
        encoded = replace(encoded, position_ids=reader.positions(encoded.input_ids, pictures))
    number = config.per_device_train_batch_size
    return collate(
        [encoded] * number,
        reader.batch(pictures * number),
        [(0, 0)] * number,
        reader.encoder.pad_id,
        packed=config.packing,
    )


@dataclass(frozen=True)
class Epoch:
    """What the first epoch consists of, on a number of ranks."""

    samples: int
    tokens: int
    slots: int
    supervised: int
    pairs: int
    """Squares of the samples' lengths, summed."""
    steps: int
    rounds: int
    """Micro-batches of a step, the mean rounded up."""
    idle: float
    """Share of time in which ranks wait for the slowest."""


def plan_of(config: Config, ranks: Ranks) -> Plan:
    """The plan of a training; DataError with all problems of the files."""
    plan, problems = describe(config, ranks, for_training=False)
    if plan is None or problems:
        raise DataError(*problems)
    return plan


def measured(plan: Plan, num_steps: int, config: Config) -> Packing:
    """The lengths of the samples of the first `num_steps` steps; DataError with all problems of samples."""
    cost = cost_model(trainer.models, plan.model_config, config.fix_vit)
    packing, problems = measure(plan.reader, plan.sampler, num_steps, cost, config)
    if problems:
        raise DataError(*problems)
    return packing


def plan_step(
    samples: np.ndarray, packing: Packing, config: Config, ranks: int
) -> tuple[StepPlan, np.ndarray]:
    """Which rank computes which samples, and their costs; `packing` knows the lengths also if the training
    packs nothing."""
    if config.packing:
        return packing.plan(samples, ranks)
    return deal(len(samples), ranks, config.per_device_train_batch_size), packing.measure(samples)[1]


def epoch_of(
    plan: Plan, packing: Packing, config: ForecastConfig, ranks: int, num_steps: int | None = None
) -> Epoch:
    """Count an epoch, or its first `num_steps`, whose samples are measured."""
    sampler = plan.sampler
    all_samples = [sampler.samples(step) for step in range(num_steps or sampler.steps_per_epoch)]
    used = np.concatenate([packing.sizes(samples) for samples in all_samples])
    used = used[used[:, 2] > 0]
    rounds, idle = [], []
    for samples in all_samples[:STEPS_PLANNED]:
        step, costs = plan_step(samples, packing, config, ranks)
        rounds.append(len(step[0]))
        idle.append(idle_share(step, costs))
    tokens, slots, supervised = (int(total) for total in used.sum(0))
    pairs = int((used[:, 0] ** 2).sum())
    means = math.ceil(float(np.mean(rounds))), float(np.mean(idle))
    return Epoch(len(used), tokens, slots, supervised, pairs, sampler.steps_per_epoch, *means)


def full_epoch(batch: MicroBatch, config: ForecastConfig, ranks: int) -> Epoch:
    """A step of full rows, where there is no data, as an epoch."""
    rounds, slots = config.accumulation(ranks), int(batch.inputs["im_mask"].sum())
    pairs = sum(length**2 for length in batch.lengths)
    counts = (batch.num_samples, batch.num_tokens, slots, batch.num_supervised, pairs)
    return Epoch(*(ranks * rounds * count for count in counts), steps=1, rounds=rounds, idle=0.0)


@dataclass(frozen=True)
class Operations:
    """Floating-point operations by what they grow with."""

    per_unit: Mapping[str, float]
    """Of language, for each sample, token, slot, pair and supervised position."""
    per_slot: float
    """Of vision, for an image slot."""

    def of(
        self, samples: int, tokens: int, slots: int, supervised: int, pairs: int
    ) -> tuple[float, float, float]:
        """(language, attention, vision); pairs: squares of the samples' lengths, summed."""
        units = {"sample": samples, "token": tokens, "slot": slots, "supervised": supervised}
        language = sum(per * units[unit] for unit, per in self.per_unit.items() if unit != "pair")
        return language, self.per_unit.get("pair", 0.0) * pairs, self.per_slot * slots


def operations_of(plan: Plan, batches: Sequence[MicroBatch]) -> Operations | None:
    """What is counted of a model; None if it cannot be, as without pictures to measure with.

    batches: with pictures; inputs of the tower are as many for each slot as there, on average.
    """
    try:
        flops: Flops = trainer.models.flops_of(plan.model, plan.reader)
    except ValueError:
        return None
    slots = sum(int(batch.inputs["im_mask"].sum()) for batch in batches)
    vision = sum(flops.of(batch)[0] for batch in batches)
    return None if slots and not vision else Operations(flops.of_language, vision / max(1, slots))


def some_pictures(plan: Plan, packing: Packing) -> list[MicroBatch]:
    """A few evenly spaced samples with pictures, each alone."""
    sizes = all_sizes(plan.reader, packing)
    sizes = sizes[sizes[:, 1] > 0]
    chosen = np.unique(np.linspace(0, len(sizes) - 1, min(len(sizes), PICTURES_PROBED), dtype=int))
    return [read_batch(plan.reader, [(int(s), int(r))], packed=True) for *_, s, r in sizes[chosen]]


def epoch_flops(operations: Operations, epoch: Epoch) -> tuple[int, int]:
    """Operations of (vision, language)."""
    language, attention, vision = operations.of(
        epoch.samples, epoch.tokens, epoch.slots, epoch.supervised, epoch.pairs
    )
    return round(vision), round(language + attention)


def work_of_steps(
    sampler: StepSampler, packing: Packing, operations: Operations, config: Config, ranks: int, steps: range
) -> np.ndarray:
    """float64 [steps, WORK]: of each step (from 0), the rows that take longest of every round, added up."""
    found = []
    for step in steps:
        samples = sampler.samples(step)
        sizes = packing.sizes(samples)
        plan, _ = plan_step(samples, packing, config, ranks)
        rounds = []
        for number in range(len(plan[0])):
            rows = np.array([_row_work(sizes[rank[number]], operations, config) for rank in plan])
            rounds.append(rows[rows.sum(axis=1).argmax()])
        found.append([*np.sum(rounds, axis=0), len(rounds), 1])
    return np.array(found)


def _row_work(sizes: np.ndarray, operations: Operations, config: Config) -> tuple[float, float, float]:
    """Operations (language, attention, vision) of a micro-batch of samples [N, 3]: tokens, slots and
    supervised tokens. Without packing, all are as long as the longest."""
    tokens = sizes[:, 0]
    if not config.packing and len(tokens):
        tokens = np.full(len(tokens), tokens.max())
    _, slots, supervised = sizes.sum(axis=0).tolist()
    return operations.of(len(sizes), int(tokens.sum()), slots, supervised, int((tokens**2).sum()))


def work_of_rows(batch: MicroBatch, operations: Operations, rounds: int) -> np.ndarray:
    """float64 [1, WORK] of a step of which every rank's micro-batches are `batch`."""
    slots, pairs = int(batch.inputs["im_mask"].sum()), sum(length**2 for length in batch.lengths)
    work = operations.of(batch.num_samples, batch.num_tokens, slots, batch.num_supervised, pairs)
    row = np.array([[*work, 1, 0]])
    return rounds * row + np.array([[0, 0, 0, 0, 1]])
