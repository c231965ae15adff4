"""Runs a torchrun job and watches its ranks from outside, the same way whoever is training.

    usage = watch(["-m", "trainer.main", …], folder / "metrics.jsonl", steps=8, warm_up=3, ranks=2)
    usage.resident_bytes     # the largest resident set that a rank ever had, until the last step's line
    usage.private_bytes      # the same without pages of files: libraries, weights mapped from a file
    usage.cpu_seconds        # of all ranks, from the end of the warm-up to the end of the last step

What is waited for is the number of lines of metrics.jsonl, one a step. Linux only: it reads /proc.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.tiny import ROOT, free_port

PERIOD = 0.05
"""Seconds between two looks; a rank's own peak of resident memory is the kernel's and misses nothing."""


@dataclass
class Usage:
    """What the ranks of a job used."""

    resident_bytes: int = 0
    private_bytes: int = 0
    cpu_seconds: float = 0.0


def process_memory(pid: int | str = "self") -> tuple[int, int]:
    """(peak resident bytes, private bytes now) of a process; zeros once it has gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    fields = dict(line.split(":", 1) for line in text.splitlines())
    if "VmHWM" not in fields:  # it is ending
        return 0, 0
    kilobytes = [int(fields[name].split()[0]) for name in ("VmHWM", "RssAnon")]
    return kilobytes[0] * 1024, kilobytes[1] * 1024


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def watch(
    arguments: Sequence[object],
    metrics: Path,
    *,
    steps: int,
    warm_up: int,
    ranks: int,
    environment: Mapping[str, str] | None = None,
    timeout: float = 1800,
) -> Usage:
    """Run `torchrun --nproc_per_node ranks arguments`; RuntimeError with its output if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--master_port", str(free_port()), *map(str, arguments)]
    defaults = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    usage, cpu_at_warm_up = Usage(), 0.0
    log = metrics.parent / "log.txt"
    with log.open("w") as output:
        job = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**defaults, **os.environ, **(environment or {})},
            stdout=output,
            stderr=output,
        )
        try:
            started = time.monotonic()
            while job.poll() is None:
                if time.monotonic() - started > timeout:
                    raise RuntimeError(f"the job took more than {timeout} s:\n{log.read_text()[-3000:]}")
                done = metrics.read_text().count('"train"') if metrics.exists() else 0
                if done < steps:
                    pids = _children(job.pid)
                    for resident, private in map(process_memory, pids):
                        usage.resident_bytes = max(usage.resident_bytes, resident)
                        usage.private_bytes = max(usage.private_bytes, private)
                    seconds = sum(map(_cpu_seconds, pids))
                    if done < warm_up:
                        cpu_at_warm_up = seconds
                    usage.cpu_seconds = seconds - cpu_at_warm_up
                time.sleep(PERIOD)
        finally:
            if job.poll() is None:
                job.terminate()
                job.wait(60)
    if job.returncode:
        raise RuntimeError(f"the job ended with status {job.returncode}:\n{log.read_text()[-3000:]}")
    return usage
