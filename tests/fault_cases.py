"""Runs that something happens to: what they start from, what happens at which step, ranks that may be killed.

argv = fault_flags(fault_world, "run")           # the fixture's model and data: eight steps, each saved
at_step(3, 0, lambda: send(signal.SIGTERM))      # in the process of a rank, before it calls main(argv)
ranks = Ranks(2, main, argv)
os.kill(ranks.processes[0].pid, signal.SIGKILL); ranks.end()
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from data.loader import StepLoader
from tests.tiny import ROOT, flags, free_port, start_ranks
from trainer.main import main
from trainer.stopping import StopRequest

STOPPED = 75


def fault_flags(world: Path, output_dir: str | Path, *more: str, **changes: Any) -> list[str]:
    """Eight steps with dropout; a checkpoint after each."""
    often = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    often |= {"fix_vit": False, "plora_dropout": 0.2, "gradient_checkpointing": False}
    return flags(world, output_dir, *more, **{**often, "per_device_train_batch_size": 3, **changes})


def assert_same_model(a: Path, b: Path) -> None:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def model_with_bad_word(world: Path, folder: Path, word: str) -> Path:
    """The tiny model with an infinite embedding: what uses the word has no finite loss."""
    shutil.copytree(world / "model", folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.tok_embeddings.weight"][vocabulary[word]] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# --- what happens in a step -------------------------------------------------------------------------------


def in_every_step(action: Callable[[int, int], Any]) -> None:
    """In this process, call `action(step, rank)` as the loop of a run takes the step's batches."""
    steps_of = StepLoader.__iter__

    def steps_after_action(loader: StepLoader) -> Iterator[Any]:
        for step, batches in enumerate(steps_of(loader), loader._steps.start + 1):
            action(step, loader._rank)
            yield batches

    StepLoader.__iter__ = steps_after_action


def at_step(step: int, rank: int, action: Callable[[], Any]) -> None:
    """In this process, do `action` when the rank comes to the step."""
    in_every_step(lambda *place: action() if place == (step, rank) else None)


def main_stopped_after(step: int, argv: list[str]) -> int:
    """The run, of which the last rank alone is asked to stop once it has done `step` steps; 0: it is not."""
    asked, calls = StopRequest.asked, 0

    def asked_once(self: StopRequest) -> bool:
        nonlocal calls
        calls += 1
        is_last_rank = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        return asked(self) or (calls == step and is_last_rank)

    StopRequest.asked = asked_once
    return main(argv)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


# --- ranks ------------------------------------------------------------------------------------------------


class Ranks:
    """Forked ranks; as torchrun does, the test ends the others when one has failed."""

    def __init__(self, world: int, function: Callable[..., Any], *args: Any) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.processes, self.logs = start_ranks(world, function, args, Path(self.folder.name))

    def wait(self, seconds: float) -> bool:
        """Whether all have ended well within the time; False also as soon as one has not."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            codes = [process.exitcode for process in self.processes]
            if any(codes) or codes == [0] * len(codes):
                return not any(codes)
            time.sleep(0.01)
        return False

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs if log.exists())


def launch(
    tmp_path: Path, hook: str, options: list[str], argv: list[str], launcher: str = "torch.distributed.run"
) -> subprocess.Popen[str]:
    """A launcher on two ranks that run trainer.main, and the lines of `hook` in every step."""
    script = tmp_path / "script.py"
    script.write_text(
        "import ctypes, os, signal, sys, time\nfrom tests.fault_cases import in_every_step\n"
        f"from trainer.main import leave, main\n\ndef hook(step, rank):\n{hook}\n\n"
        'if __name__ == "__main__":\n    in_every_step(hook)\n    leave(main(sys.argv[1:]))\n'
    )
    command = [sys.executable, "-m", launcher, "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), *options, str(script), *argv]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment["XCOMPOSER_STATUS_FILE"] = str(tmp_path / "status")
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(reached: Callable[[], object], about: Callable[[], object], seconds: float = 90) -> None:
    """Poll until `reached()`; in vain, the test fails and shows `about()`."""
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, about()
        time.sleep(0.05)


def wait_for_file(path: Path, seconds: float = 90) -> None:
    wait_for(path.exists, lambda: path, seconds)


def is_gone(process: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        status = Path(f"/proc/{process}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return True
        time.sleep(0.1)
    return False
