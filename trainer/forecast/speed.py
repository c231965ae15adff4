"""Seconds of a step and an epoch: from a stated MFU, or from the steps that a run has measured.

    run = measured_run(config)                 # of --measured, or None
    speed(config, forecast(config, 64), run)   # (10_800.0, "as 3 steps of output/pets: …")

Input: a run's run.json and metrics.jsonl. What its steps consisted of is counted anew from its data, which
must be where it was: the operations of language, attention and vision on the slowest rank, and the number of
micro-batches and steps (`trainer.forecast.epoch.WORK`). Output: seconds for each, whose sum is a step's:

    seconds [n] ≈ work [n, 5] · rates [5], each rate at least 0

Three steps alone cannot determine five rates, because steps are much alike. So the least-squares fit has a
prior: the rates of a machine on which all operations are equally fast, and a fifth of the time does not grow
with the samples (PRIOR). SPREAD and NOISE are the standard deviations of rates and of measured seconds.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.forecast.config import ForecastConfig
from trainer.forecast.epoch import measured, operations_of, plan_of, some_pictures, work_of_steps
from trainer.forecast.fake_step import fake_ranks
from trainer.forecast.forecast import Forecast
from trainer.job import log

PRIOR = np.array([0.8, 0.8, 0.8, 0.1, 0.1])
"""Parts of the time of a mean step, if all operations are equally fast: the first three together, the others
each. Communication, the optimizer and the starting of kernels took from nearly none of it to most of it in
the runs that were measured; with a fifth, longer and shorter steps are forecast about equally well in both
cases."""
SPREAD = np.array([0.4, 0.4, 0.4, 0.1, 0.1])
"""Standard deviations of these parts."""
NOISE = 0.05
"""Standard deviation of measured seconds, as a part of them."""


@dataclass(frozen=True)
class MeasuredRun:
    """The speed of a run."""

    folder: Path
    lines: list[dict[str, Any]]
    """Of metrics.jsonl, without the first, which is slower."""
    ranks: int
    rates: np.ndarray | None
    """Seconds for a unit of each of WORK; None if what the steps consisted of cannot be counted."""
    problem: str = ""
    """Why that is so."""

    @property
    def seconds(self) -> float:
        return sum(line["tokens"] / line["tokens_per_second"] for line in self.lines)


def fit_rates(work: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Seconds for a unit of each of WORK, from those of n steps; work: float64 [n, WORK]."""
    mean, typical = work.mean(axis=0), float(seconds.mean())
    units = np.where(mean > 0, mean, 1.0)
    units[:3] = max(mean[:3].sum(), 1.0)
    a = np.concatenate([work / (NOISE * typical), np.diag(units / (SPREAD * typical))])
    b = np.concatenate([seconds / (NOISE * typical), PRIOR / SPREAD])
    free = np.full(len(PRIOR), True)
    while True:
        rates = np.zeros(len(PRIOR))
        rates[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
        if (rates >= 0).all():
            return rates
        free &= rates > 0


def measured_run(config: ForecastConfig) -> MeasuredRun | None:
    """The run that `measured` names, and what its steps tell about the time of others."""
    if config.measured is None:
        return None
    folder, lines = Path(config.measured), config.measured_steps
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    try:
        work, seconds = work_of_run(about, lines)
    except ValueError as error:  # also a DataError
        return MeasuredRun(folder, lines, about["ranks"], None, "; ".join(str(error).splitlines()))
    return MeasuredRun(folder, lines, about["ranks"], fit_rates(work, seconds))


def work_of_run(about: dict[str, Any], lines: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """What the steps of these lines consisted of [n, WORK], and their seconds [n] without waiting for data;
    ValueError if that cannot be counted."""
    if "config" not in about or len(lines) < 2:
        raise ValueError("it has too few steps, or no configuration")
    config = ForecastConfig.of(about["config"], ranks=about["ranks"], sharding="full")
    for name in ("model_name_or_path", "data_path"):
        if not Path(getattr(config, name)).exists():
            raise ValueError(f"there is no {getattr(config, name)} here")
    log(f"counting the steps of {about['config']['output_dir']}")
    with fake_ranks(config.ranks, config.ranks) as group:
        plan = plan_of(config, group)
        packing = measured(plan, int(lines[-1]["step"]), config)
        operations = operations_of(plan, some_pictures(plan, packing))
    if operations is None:
        raise ValueError("the operations of its model cannot be counted")
    after = [int(line["step"]) for line in lines]
    before = [after[0] - config.logging_steps, *after[:-1]]
    work = []
    for first, last in zip(before, after, strict=True):
        steps = work_of_steps(plan.sampler, packing, operations, config, config.ranks, range(first, last))
        work.append(steps.mean(axis=0))
    waits = ("seconds_data_wait", "seconds_saving")
    seconds = [line["seconds_step"] - sum(line[name] for name in waits) for line in lines]
    return np.array(work), np.array(seconds)


def speed(config: ForecastConfig, result: Forecast, run: MeasuredRun | None) -> tuple[float | None, str]:
    """Seconds of an epoch, or None, and what they are derived from."""
    epoch = result.epoch
    if run is None:
        if result.flops is None:
            return None, "its operations are not known: give --data_path, or a run with --measured"
        rate = config.mfu * config.peak_tflops * 1e12
        source = f"an MFU of {config.mfu:.0%} of {config.peak_tflops:,.0f} TFLOP/s, without communication"
        work: float = sum(result.flops)
    elif run.rates is not None and result.work is not None:
        rates = ", ".join(f"{1 / rate / 1e12:,.1f}" if rate else "any" for rate in run.rates[:3])
        source = (
            f"the speed of {len(run.lines)} steps in {run.folder}: {rates} TFLOP/s of language, attention "
            f"and vision, and {run.rates[3:].sum():.3f} s of all else in a step of one micro-batch"
        )
        return float(result.work @ run.rates) * epoch.steps, source
    elif result.flops is not None and all("mfu" in line for line in run.lines):
        done = sum(line["model_flops_vision"] + line["model_flops_language"] for line in run.lines)
        work, rate = sum(result.flops), done / run.seconds / run.ranks
        source = f"{rate / 1e12:,.1f} TFLOP/s a rank, as measured in {run.folder}"
    else:
        work, rate = epoch.tokens, sum(line["tokens"] for line in run.lines) / run.seconds / run.ranks
        source = f"{rate:,.0f} tokens/s a rank, as measured in {run.folder}"
    if run is not None and run.problem:
        source += f" (lengths and pictures are not told apart: {run.problem})"
    return work / rate / result.ranks / (1 - epoch.idle), source
