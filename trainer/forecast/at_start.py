"""The forecast of a run at its start: what a rank needs of memory and sends, which the run then measures.

Input: a run's configuration and ranks. Output: a line of the log, and `forecast.json` in output_dir, which
the report compares with the measured peak:

    forecaster = Forecaster(config, ranks)   # a process beside rank 0
    forecaster.tell(output_dir)              # logs and writes what it finds, as soon as it has
    # forecast: a rank holds 12.55 GB between two steps and 30.70 GB at most (backward, of 85.00 GB); it
    # sends 44.30 GB a step, 6.30 GB of them to other machines

For a 7B this takes half a minute of a core. The run does not wait for it. It is a process of its own, as a
thread of rank 0 would hold up rank 0, and so all ranks. To count a few blocks and multiply would be faster,
but not the same: blocks may differ from each other, and at which moment memory peaks depends on how many
there are. The process ends with the run; a run that ends sooner has no forecast.
"""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from trainer.atomic import write_json
from trainer.config import Config
from trainer.distributed import Ranks
from trainer.forecast.config import GB, ForecastConfig
from trainer.job import log

FILE = "forecast.json"


def asked(config: Config, ranks: Ranks) -> dict[str, Any]:
    """What to forecast: the fields of a ForecastConfig, as JSON values."""
    machines: dict[str, Any] = {"ranks": ranks.world, "local_ranks": ranks.local_world}
    machines["cpu_ranks"] = ranks.device.type == "cpu"
    if ranks.device.type == "cuda":
        machines["memory"] = torch.cuda.get_device_properties(ranks.device).total_memory / GB
    return dataclasses.asdict(config) | machines


class Forecaster:
    """A process that forecasts this run, with the lowest priority; for rank 0 alone."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        root = str(Path(__file__).resolve().parents[2])
        environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainer.forecast.at_start"],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked(config, ranks)) + "\n")
        self.process.stdin.flush()

    def tell(self, output_dir: Path) -> None:
        """Log what the process finds and write it to `output_dir`, from a thread, as soon as it is there."""
        path = output_dir / FILE
        path.unlink(missing_ok=True)  # of an earlier start
        self.thread = threading.Thread(target=self._tell, args=(path,), name="forecast", daemon=True)
        self.thread.start()

    def _tell(self, path: Path) -> None:
        assert self.process.stdout is not None
        lines = self.process.stdout.read().splitlines()
        problem = f"its process ended with status {self.process.wait()}"
        found = json.loads(lines[-1]) if lines else {"problem": problem}
        if "problem" in found:
            log(f"\nwarning: no forecast of memory: {found['problem']}")
            return
        log(f"\n{in_words(found)}")
        try:
            write_json(path, found)
        except OSError as error:
            log(f"\nwarning: {path} cannot be written: {error}")


def in_words(found: dict[str, Any]) -> str:
    """The forecast in a line."""
    within, between = found["sent_within_bytes"], found["sent_between_bytes"]
    of_all = f", of {found['memory_bytes'] / GB:,.2f} GB" if found["memory_bytes"] else ""
    sends = "it sends nothing"
    if within + between:
        sends = f"it sends {(within + between) / GB:,.3f} GB a step"
        sends += f", {between / GB:,.3f} GB of them to other machines" if between else ""
    return (
        f"forecast: a rank holds {found['held_bytes'] / GB:,.3f} GB between two steps and "
        f"{found['peak_bytes'] / GB:,.3f} GB at most ({found['phase']}{of_all}); {sends}"
    )


def find(asked: dict[str, Any]) -> dict[str, Any]:
    """The forecast as JSON values; DataError if the model cannot be forecast."""
    from trainer.forecast.forecast import device_bytes, forecast

    config = ForecastConfig.of(asked)
    result = forecast(config, config.ranks, counts_flops=False, whole_epoch=False)
    step, phases = result.step, result.step.peaks
    return {
        "ranks": config.ranks,
        "micro_batch": result.largest,
        "memory_bytes": None if config.cpu_ranks else round(config.memory * GB),
        "held_bytes": step.held_bytes,
        "peak_bytes": device_bytes(result, config),
        "phase": max(phases, key=lambda name: sum(phases[name].values())),
        "phases": phases,
        "collectives": sum(each.number for each in step.sent.values()),
        "sent_within_bytes": step.sent_within_bytes,
        "sent_between_bytes": step.sent_between_bytes,
    }


def main() -> None:
    """Forecast what the first line of stdin describes; its end is that of the run."""
    os.nice(19)
    line = sys.stdin.readline()

    def end_with_the_run() -> None:
        os.read(0, 1)  # returns when the run has closed the pipe
        os._exit(1)

    threading.Thread(target=end_with_the_run, daemon=True).start()
    try:
        found = find(json.loads(line))
    except Exception as error:  # a forecast is no reason to stop a training, which then shows what it needs
        found = {"problem": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
