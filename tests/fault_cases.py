"""Runs that something happens to: a small world, what happens at which step, ranks that may be killed.

Input: a folder. Output: the pieces that tests of faults are made of.

    world = make_world(tmp_path)        # a model, data, and `straight`: the run that nothing happened to
    ranks = Ranks(2, main, flags(world, output_dir))
    os.kill(ranks.processes[0].pid, signal.SIGKILL); ranks.end()
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import trainer.main
from tests.tiny import ROOT, _rank, free_port, run_ranks, tiny_data, tiny_model
from trainer.main import main

STOPPED = 75
LAUNCHERS = ["torch.distributed.run", "trainer.launch"]


def make_world(folder: Path) -> Path:
    """A model, data, and `straight`: the run that nothing happened to."""
    tiny_model(folder / "model")
    tiny_data(folder / "data", samples=24)
    run_ranks(2, main, flags(folder, folder / "straight"))
    return folder


def flags(folder: Path, output_dir: Path, *more: str) -> list[str]:
    """Eight steps with dropout; a checkpoint after each."""
    words = f"""
        --model_name_or_path {folder}/model --data_path {folder}/data/data.txt --output_dir {output_dir}
        --fix_vit False --bf16 False --plora_dropout 0.2 --learning_rate 1e-3 --max_steps 8
        --save_strategy steps --save_steps 1 --save_total_limit 2 --per_device_train_batch_size 3
        --dataloader_num_workers 0 --gradient_checkpointing False
    """
    return [*words.split(), *more]


def assert_same_model(a: Path, b: Path) -> None:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def at_step(step: int, rank: int, action: Callable[[], Any]) -> None:
    """In this process, do `action` when the rank comes to the step."""
    seed = trainer.main.step_seed

    def hook(*arguments: int) -> int:
        if arguments[1:] == (step, rank):
            action()
        return seed(*arguments)

    trainer.main.step_seed = hook


def send(number: int) -> None:
    os.kill(os.getpid(), number)


class Ranks:
    """Forked ranks; as torchrun does, the test ends the others when one has failed."""

    def __init__(self, world: int, function: Callable[..., Any], *args: Any) -> None:
        self.folder, port = tempfile.TemporaryDirectory(), free_port()
        self.logs = [Path(self.folder.name) / f"rank{rank}.log" for rank in range(world)]
        context = multiprocessing.get_context("fork")
        self.processes = [
            context.Process(target=_rank, args=(rank, world, port, function, args, self.logs[rank]))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

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


def torchrun(
    tmp_path: Path, patch: str, options: list[str], argv: list[str], launcher: str = "torch.distributed.run"
) -> subprocess.Popen[str]:
    """A launcher on two ranks that run trainer.main, and `patch` in every step."""
    script = tmp_path / "script.py"
    script.write_text(
        "import ctypes, os, signal, sys, time\nimport trainer.main as m\nseed = m.step_seed\n"
        f"def hook(s, step, rank):\n{patch}\n    return seed(s, step, rank)\nm.step_seed = hook\n"
        'if __name__ == "__main__":\n    m.leave(m.main(sys.argv[1:]))\n'
    )
    command = [sys.executable, "-m", launcher, "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), *options, str(script), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["XCOMPOSER_STATUS_FILE"] = str(tmp_path / "status")
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def is_gone(process: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        status = Path(f"/proc/{process}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return True
        time.sleep(0.1)
    return False
