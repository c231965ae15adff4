"""The metrics of a run: sums over a window of steps, metrics.jsonl, memory, and the record of a bad step.

Input: values that the loop already has. Output: files in `output_dir` and text for the terminal:

    window.add(batch, token_losses)                       # per micro-batch: no device sync
    result = window.close_step(totals, square)            # per step: the only device sync
    metrics.write("train", step, **window.flush(peak))    # per line of metrics.jsonl
"""

import json
import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from data.batch import MicroBatch, to_device
from data.ledger import ledger_rows, ledger_table, tally
from data.mixture import Source
from trainer.atomic import write_json
from trainer.distributed import all_max, all_sum, shard_of, step_seed
from trainer.job import is_main, log
from trainer.trackers import Trackers


class MetricsFile:
    """`metrics.jsonl` in a folder: one JSON object per line, flushed, so that a killed run keeps every line.

    folder: None writes nothing, so that all ranks run the same code; trackers: get every line, too.
    """

    def __init__(self, folder: Path | None, trackers: Trackers | None = None) -> None:
        self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8") if folder else None
        self.trackers = trackers if folder else None

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Write one line; floats keep full precision, for exact comparisons of runs, and NaN becomes null."""
        values = _finite(values)
        if self.file:
            try:
                self.file.write(json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False) + "\n")
                self.file.flush()
            except OSError as error:  # a full disk; the buffer keeps the line for the next flush
                log(f"\nwarning: metrics.jsonl cannot be written now; its lines are kept in memory: {error}")
        if self.trackers:
            self.trackers.log(kind, step, values)

    def write_epoch(self, step: int, epoch: int, sources: Sequence[Source], sums: Tensor) -> str:
        """Write the line of an epoch (from 0), given the sums for `ledger_rows`; returns its table."""
        rows = ledger_rows(sources, sums, epoch)
        self.write("epoch", step, epoch=epoch, sources=rows)
        return f"\nepoch {epoch}\n{ledger_table(rows)}"


def _finite(value: Any) -> Any:
    """A JSON value with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sum_over_ranks(
    micro_batches: Sequence[MicroBatch], flops: Any, stop: bool, save: bool, device: torch.device
) -> Tensor:
    """Totals of a step that all ranks need before its forward pass, in one reduction: float64 [6] on the
    device.

    Supervised tokens; tokens; operations of vision and of language (0 without `flops`, see
    trainer/models/family.py); and the numbers of ranks that ask to stop, or to save by the clock.
    """
    mine = [0.0, 0.0, 0.0, 0.0, float(stop), float(save)]
    for batch in micro_batches:
        work = flops.of(batch) if flops else (0, 0)
        for i, number in enumerate((batch.num_supervised, batch.num_tokens, *work)):
            mine[i] += number
    return all_sum(to_device(torch.tensor(mine, dtype=torch.float64), device))


@dataclass(frozen=True)
class StepResult:
    """The result of a step, the same on every rank."""

    grad_norm: float
    """Norm of the whole gradient before clipping."""
    is_finite: bool
    """Whether the gradient's norm and all losses are finite."""
    stop: bool
    save: bool


class Window:
    """Sums over the steps since the last line of metrics.jsonl, and over the epoch.

    window.add(batch, outputs.token_losses)       # per micro-batch: no device sync
    result = window.close_step(totals, square)    # per step: the only device sync
    metrics.write("train", step, **window.flush())
    """

    def __init__(self, sources: Sequence[Source], device: torch.device, state: Mapping[str, Any]) -> None:
        """state: the `state()` saved by the run that this one resumes, or empty."""
        self.sources, self.device = sources, device
        self.sums, self.epoch = torch.zeros(2, 4, len(sources), dtype=torch.float64)
        """As in `data.ledger.tally`: samples, samples left out, supervised tokens and losses, by source."""
        self.sums += torch.tensor(state.get("window", 0.0), dtype=torch.float64)
        self.epoch += torch.tensor(state.get("epoch", 0.0), dtype=torch.float64)
        self.tokens, *self.flops = state.get("work", [0.0, 0.0, 0.0])
        self.skipped_steps, self.bad_steps = state.get("counts", [0, 0])
        """Steps that were not finite: in this window, and consecutive ones."""
        seconds, self.steps = state.get("clock", [0.0, 0])
        self.started = time.perf_counter() - seconds
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Seconds of this rank, added up by `timed`."""
        self.grad_norm = math.nan
        self.memory_peak = 0
        self._step = torch.zeros(4, len(sources), dtype=torch.float64, device=device)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add up the seconds that a code block takes; in a trace the block is a range of this name."""
        begun = time.perf_counter()
        with record_function(name):
            yield
        self.seconds[name] += time.perf_counter() - begun

    def add(self, batch: MicroBatch, token_losses: Tensor) -> None:
        """Add a micro-batch of the step; token_losses: [num_supervised], on the device."""
        self._step += tally(batch, token_losses, len(self.sources))

    @property
    def loss_sum(self) -> Tensor:
        """Loss sum of this rank's tokens in the current step."""
        return self._step[3].sum()

    def close_step(self, totals: Tensor, square: Tensor) -> StepResult:
        """Sum the step over all ranks and add it to the window, unless it is not finite; every rank calls it.

        totals: from `sum_over_ranks`; square: from `trainer.optim.squared_norm` of the gradients.
        """
        mine = torch.cat([self._step.flatten(), square.to(self._step).view(1)])
        peak = all_max(memory_peak(self.device), self.device)
        numbers = torch.cat([all_sum(mine), totals, peak.view(1)]).cpu()
        size = self._step.numel()
        sums, rest = numbers[:size].view_as(self._step), numbers[size:].tolist()
        square_of_all, _, tokens, vision, language, stop, save, peak_of_all = rest
        self.grad_norm = math.sqrt(square_of_all)
        self.memory_peak = max(self.memory_peak, int(peak_of_all))
        is_finite = math.isfinite(self.grad_norm) and bool(sums.isfinite().all())
        if is_finite:
            self.sums += sums
            self.epoch += sums
            self.tokens += tokens
            self.flops = [self.flops[0] + vision, self.flops[1] + language]
            self.bad_steps = 0
        else:
            self.skipped_steps += 1
            self.bad_steps += 1
        self.steps += 1
        self._step = torch.zeros_like(self._step)
        return StepResult(self.grad_norm, is_finite, stop > 0, save > 0)

    def flush(self, peak_flops: float | None = None) -> dict[str, Any]:
        """Return the values for a line of metrics.jsonl and start a new window.

        peak_flops: peak operations per second of all ranks; None if not measured.
        """
        samples, left_out, supervised, loss = self.sums.sum(1).tolist()
        seconds = self._training_seconds()
        by_source = zip(self.sources, *self.sums[2:].tolist(), strict=True)
        line = {
            "loss": loss / supervised if supervised else math.nan,
            "grad_norm": self.grad_norm,
            "samples": int(samples),
            "tokens": int(self.tokens),
            "supervised_tokens": int(supervised),
            "left_out_samples": int(left_out),
            "skipped_steps": self.skipped_steps,
            "tokens_per_second": self.tokens / seconds,
            "supervised_tokens_per_second": supervised / seconds,
            "samples_per_second": samples / seconds,
            "seconds_step": seconds / self.steps,
            "seconds_data_wait": self.seconds["data_wait"] / self.steps,
            "seconds_saving": self.seconds["saving"] / self.steps,
            "memory_peak_bytes": self.memory_peak,
            "loss_by_source": {source.name: total / count for source, count, total in by_source if count},
        }
        if peak_flops:
            line |= {"model_flops_vision": self.flops[0], "model_flops_language": self.flops[1]}
            line["mfu"] = sum(self.flops) / seconds / peak_flops
        self.sums.zero_()
        self.tokens, self.flops, self.skipped_steps, self.steps = 0.0, [0.0, 0.0], 0, 0
        self.memory_peak = 0
        self.started = time.perf_counter()
        self.seconds.clear()
        return line

    def flush_epoch(self) -> Tensor:
        """Return the sums of the epoch, [4, sources], for `data.ledger.ledger_rows`, and start a new one."""
        sums, self.epoch = self.epoch, torch.zeros_like(self.epoch)
        return sums

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint, as JSON values."""
        return {
            "window": self.sums.tolist(),
            "epoch": self.epoch.tolist(),
            "work": [self.tokens, *self.flops],
            "counts": [self.skipped_steps, self.bad_steps],
            "clock": [self._training_seconds(), self.steps],
        }

    def _training_seconds(self) -> float:
        """Seconds since the window began, without evaluations."""
        return time.perf_counter() - self.started - self.seconds["evaluating"]


def summary(line: Mapping[str, Any], learning_rate: float) -> str:
    """A line of metrics.jsonl as text for the terminal."""
    mfu = f"MFU {line['mfu']:.1%}, " if "mfu" in line else ""
    return (
        f"loss {line['loss']:.4f}, lr {learning_rate:.2e}, {line['tokens_per_second']:,.0f} tokens/s "
        f"({line['supervised_tokens_per_second']:,.0f} supervised), "
        f"{line['samples_per_second']:,.1f} samples/s, {mfu}"
        f"data wait {line['seconds_data_wait'] / line['seconds_step']:.1%}, "
        f"memory {line['memory_peak_bytes'] / 2**30:.1f} GiB"
    )


def memory_peak(device: torch.device) -> int:
    """Peak memory of this rank in bytes: of the accelerator's allocator since the last call; on a CPU, of the
    resident set during the whole run."""
    if device.type != "cpu":
        peak = torch.accelerator.max_memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


MAX_NAMED = 20
"""Maximum number of parameters with a bad gradient that are listed."""


def write_capsule(
    step: int,
    run: Mapping[str, Any],
    sources: Sequence[Source],
    micro_batches: Sequence[MicroBatch],
    loss_sum: Tensor,
    trained: Mapping[str, nn.Parameter],
    grad_norm: float,
) -> Path:
    """Record the samples of a step that was not finite, for trainer/extras/replay.py; all ranks call it.

    loss_sum: of this rank; gradients must not be clipped yet. Returns the file, which rank 0 writes.
    """
    rank = dist.get_rank()
    bad = [
        name
        for name, parameter in trained.items()
        if parameter.grad is not None and not shard_of(parameter.grad).isfinite().all()
    ]
    mine = {
        "rank": rank,
        "seed": step_seed(run["config"]["seed"], step, rank),
        "loss_sum": repr(loss_sum.item()),
        "not_finite_gradients": bad[:MAX_NAMED],
        "micro_batches": [
            [
                {"source": sources[s].name, "path": str(sources[s].records.path), "record": r}
                for s, r in m.sample_ids
            ]
            for m in micro_batches
        ],
    }
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    path = Path(run["config"]["output_dir"]) / f"bad-step-{step}.json"
    if is_main():
        write_json(path, {"step": step, "grad_norm": repr(grad_norm), "ranks": ranks, "run": run})
    return path
