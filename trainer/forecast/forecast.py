"""A configuration on a number of ranks → a step, an epoch, and changes that make it fit.

Input: the flags of the training and of the machines, and of the model config.json, tokenizer and processor.
Output: what one rank holds and sends in a step, and what an epoch consists of:

    config = parse_flags(ForecastConfig, ["--model_name_or_path", "MODEL"], prog="trainer.forecast")
    result = forecast(config, ranks=64)
    device_bytes(result, config)               # 30_700_000_000: at the peak
    result.epoch.tokens                        # of data.txt, or of one step of full rows
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from data.errors import DataError
from trainer.forecast.config import GB, ForecastConfig
from trainer.forecast.epoch import (
    STEPS_PLANNED,
    Epoch,
    Operations,
    epoch_flops,
    epoch_of,
    full_epoch,
    full_row,
    measured,
    operations_of,
    plan_of,
    some_pictures,
    work_of_rows,
    work_of_steps,
)
from trainer.forecast.fake_step import FakeStep, fake_ranks, fake_step
from trainer.job import log
from trainer.rehearsal import largest_micro_batches

USABLE = 0.9
"""Share of an accelerator's memory that tensors may take; CUDA, NCCL and fragmentation take the rest."""


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
    work: np.ndarray | None = None
    """Of a step, on average: float64, an entry for each of `epoch.WORK`."""
    operations: Operations | None = None

    @property
    def peak_bytes(self) -> int:
        return self.step.peak_bytes


def forecast(
    config: ForecastConfig,
    ranks: int,
    *,
    counts_flops: bool = True,
    operations: Operations | None = None,
    whole_epoch: bool = True,
) -> Forecast:
    """Run a step on `ranks`, of the micro-batch that takes most memory; DataError with all problems.

    counts_flops: whether to count operations, for which a model of transformers runs a few times more;
    operations: those that were counted before, for other ranks;
    whole_epoch: whether to measure all samples of an epoch, or only those that a run itself measures.
    """
    result, others = _forecast(config, ranks, 0, counts_flops, operations, whole_epoch)
    results = [result]
    for other in others:
        results.append(_forecast(config, ranks, other, False, result.operations, whole_epoch)[0])
    return max(results, key=lambda each: each.peak_bytes)


def _forecast(
    config: ForecastConfig,
    ranks: int,
    number: int,
    counts_flops: bool,
    operations: Operations | None,
    whole_epoch: bool,
) -> tuple[Forecast, range]:
    """Run a step of one of the micro-batches that may take most memory; and the numbers of the others."""
    with fake_ranks(ranks, config.local_ranks) as group:
        plan = plan_of(config, group)
        if config.data_path:
            steps = plan.sampler.steps_per_epoch
            if not whole_epoch:
                steps = plan.total_steps if config.packing else min(plan.total_steps, STEPS_PLANNED)
            packing = measured(plan, steps, config)
            epoch = epoch_of(plan, packing, config, ranks, None if whole_epoch else min(steps, STEPS_PLANNED))
            samples = config.per_device_train_batch_size
            batches = largest_micro_batches(plan.reader, samples, packing if config.packing else None)
        else:
            packing, batches = None, [full_row(plan, config)]
            epoch = full_epoch(batches[0], config, ranks)
        flops, work = None, None
        if counts_flops:
            operations = operations_of(plan, some_pictures(plan, packing) if packing else batches)
        if operations:
            flops = epoch_flops(operations, epoch)
            if packing:
                planned = range(min(STEPS_PLANNED, epoch.steps))
                work = work_of_steps(plan.sampler, packing, operations, config, ranks, planned)
            else:
                work = work_of_rows(batches[0], operations, epoch.rounds)
            work = work.mean(axis=0)
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
    result = Forecast(ranks, step, epoch, flops, plan.total_steps, words, work, operations)
    return result, range(1, len(batches))


def device_bytes(result: Forecast, config: ForecastConfig) -> int:
    """Bytes on the accelerator at the peak."""
    on_host = ("parameters", "gradients", "optimizer") if config.cpu_offload else ()
    return max(
        sum(size for component, size in phase.items() if component not in on_host)
        for phase in result.step.peaks.values()
    )


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
