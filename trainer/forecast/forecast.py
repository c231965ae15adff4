"""A configuration on a number of ranks → a step, an epoch, and changes that make it fit.

Input: the flags of the training and of the machines, and of the model config.json, tokenizer and processor.
Output: what one rank holds and sends in a step, and what an epoch consists of:

    config = parse_flags(ForecastConfig, ["--model_name_or_path", "MODEL"], prog="trainer.forecast")
    result = forecast(config, ranks=64)
    device_bytes(result, config)               # 30_700_000_000: at the peak
    result.epoch.tokens                        # of data.txt, or of one step of full rows
    speed(config, result)[0]                   # 10_800.0 seconds an epoch
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

import trainer.models
from data.batch import MicroBatch, collate
from data.config import may_change
from data.errors import DataError
from data.packing import deal, idle_share
from data.reader import cost_model
from trainer.config import Config
from trainer.distributed import log
from trainer.forecast.fake_step import FakeStep, fake_ranks, fake_step
from trainer.prepare import Plan, describe, measure
from trainer.rehearsal import largest_micro_batches

USABLE = 0.9
"""Share of an accelerator's memory that tensors may take; CUDA, NCCL and fragmentation take the rest."""
STEPS_PLANNED = 20
"""Steps of the first epoch from which the rows of a step and the idle time are computed."""
GB = 1e9


@dataclass
class ForecastConfig(Config):
    """Forecast memory, time, traffic and disk of a training, before machines are rented."""

    # --- the forecast --------------------------------------------------------------------------------
    data_path: str = may_change("")
    """As for training; without it, every row is full, and each of its samples has a picture."""
    picture: str = "640x480"
    """Without data_path: width and height of every sample's picture; none: text alone."""
    ranks: int = 8
    """Processes of the training, one for each accelerator."""
    local_ranks: int = 8
    """Processes of a machine."""
    cpu_ranks: bool = False
    """The ranks are CPUs, with gloo, instead of accelerators."""
    memory: float = 80.0
    """GB of an accelerator."""
    mfu: float = 0.4
    """Share of `peak_tflops` that the model's own operations will reach."""
    peak_tflops: float = 989.0
    """An accelerator's dense matrix products in bfloat16, in TFLOP/s: H100 and H200 989, A100 312."""
    measured: str | None = None
    """output_dir of a run on such machines, whose speed is taken instead of mfu and peak_tflops."""
    compared_ranks: tuple[str, ...] = ("1", "8", "64", "1024")
    """Other numbers of ranks to forecast; none: no other."""
    output: str | None = None
    """File for all numbers, as JSON."""

    def problems(self) -> list[str]:
        found = [p for p in super().problems() if self.data_path or not p.startswith("--data_path ")]
        found += self.too_small(ranks=1, local_ranks=1)
        for name in ("memory", "mfu", "peak_tflops"):
            if not getattr(self, name) > 0:
                found.append(f"--{name} {getattr(self, name)}: must be above 0")
        try:
            _ = self.picture_size, self.other_ranks
        except ValueError as error:
            found.append(str(error))
        if self.measured is not None and not self.measured_steps:
            found.append(f"--measured {self.measured}: holds no steps of a run; name the output_dir of one")
        return found

    @property
    def measured_steps(self) -> list[dict[str, Any]]:
        """The lines of the run that `measured` names, without the first one, which is slower."""
        folder = Path(self.measured or "")
        if not all((folder / name).is_file() for name in ("metrics.jsonl", "run.json")):
            return []
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "train"]
        return lines[1:] or lines

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """`picture` as two numbers; ValueError if it is not."""
        if self.picture == "none":
            return None
        try:
            width, height = (int(number) for number in self.picture.split("x"))
            if width < 1 or height < 1:
                raise ValueError
        except ValueError:
            raise ValueError(f"--picture {self.picture}: give WIDTHxHEIGHT, or none") from None
        return width, height

    @property
    def other_ranks(self) -> list[int]:
        """`compared_ranks` as numbers; ValueError if they are not."""
        words = [word for word in self.compared_ranks if word != "none"]
        if not all(word.isdecimal() and int(word) for word in words):
            raise ValueError(f"--compared_ranks {' '.join(words)}: give numbers of ranks, or none")
        return [int(word) for word in words]


# --- what a step and an epoch consist of ---------------------------------------------------------------


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
    text = _Text([reader.encoder.pad_id] * config.max_length, trained=True)
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


def epoch_of(plan: Plan, config: ForecastConfig, ranks: int) -> Epoch:
    """Count an epoch whose samples are measured; `plan` has the packing also if the training has none."""
    packing, sampler = plan.packing, plan.sampler
    assert packing is not None
    all_samples = [sampler.samples(step) for step in range(sampler.steps_per_epoch)]
    used = np.array([packing.lengths[s][r] for samples in all_samples for s, r in samples], dtype=np.int64)
    used = used[used[:, 2] > 0]
    rounds, idle = [], []
    for samples in all_samples[:STEPS_PLANNED]:
        if config.packing:
            step = packing.plan(samples, ranks)
        else:
            step = deal(len(samples), ranks, config.per_device_train_batch_size)
        rounds.append(len(step[0]))
        idle.append(idle_share(step, packing.measure(samples)[1]))
    tokens, slots, supervised = (int(total) for total in used[:, :3].sum(0))
    pairs = int((used[:, 0] ** 2).sum())
    means = math.ceil(float(np.mean(rounds))), float(np.mean(idle))
    return Epoch(len(used), tokens, slots, supervised, pairs, sampler.steps_per_epoch, *means)


def full_epoch(batch: MicroBatch, config: ForecastConfig, ranks: int) -> Epoch:
    """A step of full rows, where there is no data, as an epoch."""
    rounds, slots = config.accumulation(ranks), int(batch.inputs["im_mask"].sum())
    pairs = sum(length**2 for length in batch.lengths)
    counts = (batch.num_samples, batch.num_tokens, slots, batch.num_supervised, pairs)
    return Epoch(*(ranks * rounds * count for count in counts), steps=1, rounds=rounds, idle=0.0)


def _epoch_flops(plan: Plan, epoch: Epoch, batches: Sequence[MicroBatch]) -> tuple[int, int] | None:
    """Operations of (vision, language), or None if they cannot be counted, as without pictures to measure
    with. Inputs of the tower are as many for each slot as in `batches`."""
    try:
        flops = trainer.models.flops_of(plan.model, plan.reader)
    except ValueError:
        return None
    per_slot = [flops.of(b)[0] / n for b in batches if (n := int(b.inputs["im_mask"].sum()))]
    if epoch.slots and not max(per_slot):
        return None
    units = {"sample": epoch.samples, "token": epoch.tokens, "slot": epoch.slots}
    units |= {"pair": epoch.pairs, "supervised": epoch.supervised}
    language = sum(per * units[unit] for unit, per in flops.of_language.items())
    return round(max(per_slot, default=0.0) * epoch.slots), round(language)


# --- one configuration on one number of ranks ----------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """A configuration on a number of ranks."""

    ranks: int
    step: FakeStep
    """That of the micro-batch which takes most memory."""
    epoch: Epoch
    flops: tuple[int, int] | None
    """Of an epoch: vision and language."""
    total_steps: int
    largest: str
    """The micro-batch, in words."""

    @property
    def peak_bytes(self) -> int:
        return self.step.peak_bytes


def forecast(config: ForecastConfig, ranks: int, *, counts_flops: bool = True) -> Forecast:
    """Run a step on `ranks`, of the micro-batch that takes most memory; DataError with all problems.

    counts_flops: whether to count operations too, for which a model of transformers runs a few times more.
    """
    result, others = _forecast(config, ranks, 0, counts_flops)
    results = [result, *(_forecast(config, ranks, other, counts_flops)[0] for other in others)]
    return max(results, key=lambda each: each.peak_bytes)


def _forecast(config: ForecastConfig, ranks: int, number: int, counts_flops: bool) -> tuple[Forecast, range]:
    """Run a step of one of the micro-batches that may take most memory; and the numbers of the others."""
    with fake_ranks(ranks, config.local_ranks) as group:
        plan, problems = describe(config, group, for_training=False)
        if plan is None or problems:
            raise DataError(*problems)
        if config.data_path:
            cost = cost_model(trainer.models, plan.model_config, config.fix_vit)
            steps = plan.sampler.steps_per_epoch
            packing, problems = measure(plan.reader, plan.sampler, steps, cost, config)
            if problems:
                raise DataError(*problems)
            epoch = epoch_of(replace(plan, packing=packing), config, ranks)
            samples = config.per_device_train_batch_size
            batches = largest_micro_batches(plan.reader, samples, packing if config.packing else None)
        else:
            batches = [full_row(plan, config)]
            epoch = full_epoch(batches[0], config, ranks)
        flops = _epoch_flops(plan, epoch, batches) if counts_flops else None
        batch = batches[number]
        try:
            step = fake_step(plan, config, group, batch, rounds=epoch.rounds, gloo=config.cpu_ranks)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise DataError(
                f"{config.model_name_or_path}: this model's code decides by the values of pixels or "
                f"parameters ({error}), which a forecast has not, so it cannot be forecast"
            ) from error
    slots = int(batch.inputs["im_mask"].sum())
    words = f"{batch.num_samples:,} samples, {batch.num_tokens:,} tokens, {slots:,} image slots"
    return Forecast(ranks, step, epoch, flops, plan.total_steps, words), range(1, len(batches))


def device_bytes(result: Forecast, config: ForecastConfig) -> int:
    """Bytes on the accelerator at the peak."""
    on_host = ("parameters", "gradients", "optimizer") if config.cpu_offload else ()
    return max(
        sum(size for component, size in phase.items() if component not in on_host)
        for phase in result.step.peaks.values()
    )


def speed(config: ForecastConfig, result: Forecast) -> tuple[float | None, str]:
    """Seconds of an epoch, or None, and what they are derived from."""
    epoch = result.epoch
    if config.measured is None:
        if result.flops is None:
            return None, "its operations are not known: give --data_path, or a run with --measured"
        rate = config.mfu * config.peak_tflops * 1e12
        source = f"an MFU of {config.mfu:.0%} of {config.peak_tflops:,.0f} TFLOP/s"
        work: float = sum(result.flops)
    else:
        folder, lines = Path(config.measured), config.measured_steps
        ranks = json.loads((folder / "run.json").read_text(encoding="utf-8"))["ranks"]
        seconds = sum(line["tokens"] / line["tokens_per_second"] for line in lines)
        if result.flops is not None and all("mfu" in line for line in lines):
            done = sum(line["model_flops_vision"] + line["model_flops_language"] for line in lines)
            work, rate = sum(result.flops), done / seconds / ranks
            source = f"{rate / 1e12:,.1f} TFLOP/s a rank, as measured in {folder}"
        else:
            work, rate = epoch.tokens, sum(line["tokens"] for line in lines) / seconds / ranks
            source = f"{rate:,.0f} tokens/s a rank, as measured in {folder}"
    return work / rate / result.ranks / (1 - epoch.idle), source


def changes(config: ForecastConfig) -> Iterator[dict[str, Any]]:
    """Changes of flags that may lower the peak; what costs least speed, and changes no result, first."""
    accumulation, samples = config.accumulation(config.ranks), config.per_device_train_batch_size
    if accumulation > 1 and not config.reduce_every_micro_batch:
        yield {"reduce_every_micro_batch": True}
    if config.sharding == "hybrid" and config.ranks > config.local_ranks:
        yield {"sharding": "full"}
    if config.gradient_checkpointing is False:
        yield {"gradient_checkpointing": "selective"}
    if config.gradient_checkpointing is not True:
        yield {"gradient_checkpointing": True}
    if not config.reshard_after_forward:
        yield {"reshard_after_forward": True}
    while samples > 1 and samples % 2 == 0:
        samples, accumulation = samples // 2, accumulation * 2
        smaller = {"per_device_train_batch_size": samples, "reduce_every_micro_batch": True}
        if config.gradient_accumulation_steps or not config.global_batch_size:
            smaller["gradient_accumulation_steps"] = accumulation
        yield smaller
    if config.optim_state == "float32" and config.adam_beta2 <= 0.996:
        yield {"optim_state": "bfloat16"}
    if config.optim_state != "8bit" and find_spec("torchao"):
        yield {"optim_state": "8bit"}
    if not config.use_lora:
        yield {"use_lora": True, "fix_sampler": True, "save_dtype": "auto"}


def ways_to_fit(config: ForecastConfig, peak: int) -> list[dict[str, Any]]:
    """Try changes one after the other, keeping those that help, until the run fits."""
    limit, kept, ways = USABLE * config.memory * GB, dict[str, Any](), list[dict[str, Any]]()
    for change in changes(config):
        together = kept | change
        tried = replace(config, **together)
        if tried.problems():
            continue
        flags = {name: value for name, value in together.items() if value != getattr(config, name)}
        text = " ".join(f"--{name} {value}" for name, value in flags.items())
        log(f"trying {text}")
        result = device_bytes(forecast(tried, config.ranks, counts_flops=False), tried)
        if result < 0.98 * peak:
            kept, peak = together, result
            ways.append({"flags": text, "peak_bytes": result, "fits": result <= limit})
            if result <= limit:
                break
    return ways
