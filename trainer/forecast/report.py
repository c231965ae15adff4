"""The report of a forecast: all numbers as JSON values, and as text for a terminal.

found = report(config)                     # {"memory": {"peak_bytes": 30_700_000_000, "fits": True, …}, …}
print(as_text(config, found))
"""

import dataclasses
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.ledger import table
from trainer.forecast.config import GB, ForecastConfig
from trainer.forecast.fake_step import COMPONENTS, FakeStep
from trainer.forecast.forecast import USABLE, Forecast, device_bytes, forecast, ways_to_fit
from trainer.forecast.speed import MeasuredRun, measured_run, speed
from trainer.job import log


def report(config: ForecastConfig) -> dict[str, Any]:
    """All numbers, as JSON values; DataError with all problems of the files."""
    result = forecast(config, config.ranks)
    peak, limit = device_bytes(result, config), USABLE * config.memory * GB
    run = measured_run(config)
    seconds, source = speed(config, result, run)
    step, epoch = result.step, result.epoch
    has_weights = any(Path(config.model_name_or_path).glob("*.safetensors"))
    assumed = [] if has_weights else ["weights in bfloat16, as there are none in the folder"]
    if not config.data_path:
        assumed.append("full rows, as there is no data: an epoch is a step")
    others = []
    for ranks in config.other_ranks:
        if ranks != config.ranks:
            log(f"forecasting for {ranks:,} ranks")
            accumulated = None if config.global_batch_size else config.gradient_accumulation_steps
            changes = {"sharding": _sharding(config, ranks), "gradient_accumulation_steps": accumulated}
            changed = replace(config, **changes)
            other = forecast(changed, ranks, counts_flops=False, operations=result.operations)
            others.append(_line(config, other, run))
    return {
        "model": config.model_name_or_path,
        "ranks": config.ranks,
        "local_ranks": config.local_ranks,
        "assumed": assumed,
        "micro_batch": result.largest,
        "memory": {
            "phases": step.peaks,
            "peak_bytes": peak,
            "usable_bytes": round(limit),
            "fits": peak <= limit,
            "padding_bytes": _padding(step),
            "padded": _padded(step),
        },
        "sent": [
            {"collective": kind, "dimension": dimension, **dataclasses.asdict(sent)}
            for (kind, dimension), sent in step.sent.items()
        ],
        "epoch": {
            **dataclasses.asdict(epoch),
            "flops_vision": result.flops[0] if result.flops else None,
            "flops_language": result.flops[1] if result.flops else None,
            "seconds": seconds,
            "speed": source,
        },
        "total_steps": result.total_steps if config.data_path else None,
        "checkpoint_bytes": step.save_bytes,
        "checkpoints_kept": _checkpoints(config, result),
        "host_copy_bytes": _host_copy(config, step),
        "by_ranks": sorted([_line(config, result, run), *others], key=lambda line: line["ranks"]),
        "ways_to_fit": [] if peak <= limit else ways_to_fit(config, peak),
    }


def _sharding(config: ForecastConfig, ranks: int) -> str:
    """A mesh of nodes needs whole nodes."""
    whole = ranks % min(config.local_ranks, ranks) == 0
    return config.sharding if config.sharding != "hybrid" or whole else "full"


def _padding(step: FakeStep) -> int:
    """Bytes of a rank's padding, in parameters alone."""
    return sum(size - even for size, even in step.padding.values())


def _padded(step: FakeStep) -> list[dict[str, Any]]:
    """What is padded, by the end of the parameters' names, that with most padding first."""
    found: dict[str, dict[str, Any]] = {}
    for name, (size, even) in step.padding.items():
        end = ".".join(name.split(".")[-2:])
        row = found.setdefault(end, {"parameters": end, "number": 0, "bytes": 0, "even_bytes": 0})
        row["number"], row["bytes"] = row["number"] + 1, row["bytes"] + size
        row["even_bytes"] += even
    return sorted(found.values(), key=lambda row: row["even_bytes"] - row["bytes"])


def _host_copy(config: ForecastConfig, step: FakeStep) -> int:
    """Bytes of host memory on a machine, on average, that saving in the background keeps."""
    share = min(config.local_ranks, config.ranks) / config.ranks
    return round(step.save_bytes * share) if config.async_save and config.makes_checkpoints else 0


def _checkpoints(config: ForecastConfig, result: Forecast) -> int | None:
    """How many checkpoints a run keeps; None without data, which tells the number of steps."""
    if config.save_strategy == "no":  # one by the clock, at most, which the next one replaces
        return int(config.makes_checkpoints)
    if not config.data_path:
        return config.save_total_limit
    every = config.save_steps if config.save_strategy == "steps" else result.epoch.steps
    written = math.ceil(result.total_steps / every)
    return min(written, config.save_total_limit or written)


def _line(config: ForecastConfig, result: Forecast, run: MeasuredRun | None) -> dict[str, Any]:
    """A row of the comparison of numbers of ranks."""
    step = result.step
    return {
        "ranks": result.ranks,
        "held_bytes": step.held_bytes,
        "peak_bytes": device_bytes(result, config),
        "padding_bytes": _padding(step),
        "padding_share": _padding(step) / step.peaks["held"]["parameters"],
        "sent_within_bytes": step.sent_within_bytes,
        "sent_between_bytes": step.sent_between_bytes,
        "steps": result.epoch.steps,
        "idle": result.epoch.idle,
        "seconds": speed(config, result, run)[0],
    }


def as_text(config: ForecastConfig, found: dict[str, Any]) -> str:
    """The report for a terminal."""
    memory, epoch = found["memory"], found["epoch"]
    machines = math.ceil(config.ranks / config.local_ranks)
    phases = list(memory["phases"])
    rows = [["memory of a rank, GB", *phases]]
    for component in COMPONENTS:
        rows.append([component, *(_gb(memory["phases"][phase].get(component, 0)) for phase in phases)])
    rows.append(["all", *(_gb(sum(memory["phases"][phase].values())) for phase in phases)])
    text = [
        f"{found['model']} on {config.ranks:,} rank{'s' * (config.ranks > 1)} of {machines:,} "
        f"machine{'s' * (machines > 1)}",
        f"largest micro-batch: {found['micro_batch']}",
        *(f"assumed: {what}" for what in found["assumed"]),
        "",
        table(rows),
        "",
    ]
    verdict = "it fits" if memory["fits"] else "it does not fit"
    text.append(
        f"{verdict}: {_gb(memory['peak_bytes'])} GB at the peak, of {_gb(memory['usable_bytes'])} GB; "
        f"a tenth of {config.memory:g} GB is left to CUDA, NCCL and fragmentation"
    )
    for way in found["ways_to_fit"]:
        outcome = "fits" if way["fits"] else "does not fit yet"
        text.append(f"  {way['flags']}: {_gb(way['peak_bytes'])} GB, {outcome}")
    if memory["padding_bytes"]:
        most = memory["padded"][0]
        share = memory["padding_bytes"] / memory["phases"]["held"]["parameters"]
        text.append(
            f"shards are whole rows: padding takes {share:.1%} of a rank's parameters, and as much of "
            f"gradients and moments; most of it is that of {most['number']:,} × {most['parameters']}, which "
            f"take {most['bytes'] / most['even_bytes']:.1f} × an even share"
        )
    rows = [["sent by a rank in a step", "number", "GB within machines", "GB between machines"]]
    rows += [
        [f"{s['collective']}, {s['dimension']}", f"{s['number']:,}", _gb(s["within"]), _gb(s["between"])]
        for s in found["sent"]
    ]
    text += ["", table(rows), ""]
    what = "an epoch" if config.data_path else "a step"
    text.append(
        f"{what}: {epoch['samples']:,} samples, {epoch['tokens']:,} tokens, {epoch['steps']:,} steps, "
        f"{epoch['rounds']} micro-batches each; ranks idle {epoch['idle']:.1%}"
    )
    if epoch["flops_language"] is not None:
        text.append(f"operations: vision {epoch['flops_vision']:.2e}, language {epoch['flops_language']:.2e}")
    if epoch["seconds"] is None:
        text.append(epoch["speed"])
    else:
        each = "" if epoch["steps"] == 1 else f", {_time(epoch['seconds'] / epoch['steps'])} a step,"
        text.append(f"time: {_time(epoch['seconds'])}{each} at {epoch['speed']}")
    kept = found["checkpoints_kept"]
    number = "" if kept is None else f", and {kept} of them are kept"
    text.append(f"disk: a checkpoint takes {_gb(found['checkpoint_bytes'])} GB{number}")
    if found["host_copy_bytes"]:
        text.append(
            f"host memory of a machine: a save in the background keeps a copy of "
            f"{_gb(found['host_copy_bytes'])} GB (pinned memory is rounded up, to twice that at most)"
        )
    rows = [["ranks", "GB held", "at peak", "padding", "sent within", "between", f"steps of {what}", "time"]]
    for line in found["by_ranks"]:
        cells = [_gb(line[f"{size}_bytes"]) for size in ("held", "peak", "sent_within", "sent_between")]
        cells.insert(2, f"{line['padding_share']:.1%}")
        seconds = "" if line["seconds"] is None else _time(line["seconds"])
        rows.append([f"{line['ranks']:,}", *cells, f"{line['steps']:,}", seconds])
    return "\n".join([*text, "", table(rows)])


def _gb(size: float) -> str:
    return f"{size / GB:,.2f}"


def _time(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.2f} seconds"
