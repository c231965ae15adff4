"""Profiler traces of some steps, and a table of the time in their named ranges: `--profile 10:12`.

Input: the steps of the loop, with ranges named by torch.profiler.record_function. Output, at the last step:

    output_dir/profile/rank<k>.json.gz     the trace of rank k, for https://ui.perfetto.dev
    output_dir/profile/table.txt           rank 0's ranges, logged too:

    range           host s/step  device s/step  calls
    data_wait            0.0021         0.0000      3
    forward              0.4210         0.3987      6
      vision             0.0817         0.0801      6
      loss               0.0540         0.0533      6
    …

The time of `vision` and `loss` is within `forward`, the recomputation of checkpointing within `backward`. On
an accelerator the host's time is that of launching kernels, and the device's that of running them. The
profiler slows the steps down: the table shows how the time is divided, not how long a step takes.
"""

import os
from pathlib import Path

import torch
from torch.profiler import profile

from trainer.config import Config
from trainer.distributed import Ranks
from trainer.job import log

RANGES = ("data_wait", "host_to_device", "forward", "  vision", "  loss", "backward", "optimizer", "saving")
"""In the order of a step; a range within another is indented."""


class Tracer:
    """Traces the steps that `--profile` names; every rank calls it."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.steps, self.ranks = config.traced_steps, ranks
        self.folder = Path(config.output_dir) / "profile"
        self._profiler: profile | None = None
        self._first = 0
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it logs each start and stop

    def begin(self, step: int) -> None:
        """Call before a step."""
        if step in self.steps and self._profiler is None:
            self._profiler, self._first = profile(), step
            self._profiler.start()

    def end(self, step: int, is_last: bool) -> None:
        """Call after a step; is_last: of the run."""
        if self._profiler is None or (step + 1 in self.steps and not is_last):
            return
        finished, self._profiler = self._profiler, None
        finished.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self.folder / f"rank{self.ranks.rank}.json.gz"))
        if self.ranks.rank == 0:
            text = table(finished, step + 1 - self._first)
            (self.folder / "table.txt").write_text(text + "\n", encoding="utf-8")
            log(f"\nsteps {self._first} to {step}; their traces are in {self.folder}\n{text}")


def table(finished: profile, num_steps: int) -> str:
    """The named ranges of a profiler that has stopped."""
    averages = {event.key: event for event in finished.key_averages() if event.is_user_annotation}
    on_device = torch.accelerator.is_available()
    lines = [f"{'range':<16}{'host s/step':>12}{'device s/step' if on_device else '':>15}{'calls':>7}"]
    for name in RANGES:
        if event := averages.get(name.strip()):
            device = f"{event.device_time_total / 1e6 / num_steps:.4f}" if on_device else ""
            lines.append(
                f"{name:<16}{event.cpu_time_total / 1e6 / num_steps:>12.4f}{device:>15}{event.count:>7}"
            )
    return "\n".join(lines)
