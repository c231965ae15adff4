"""Killed, or continued on another number of ranks, a run of a model of transformers trains the same model.

Qwen2.5-VL counts text, time, height and width (M-RoPE); Gemma 3 attends in windows, and to all of a picture.
"""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fault_cases import STOPPED, Ranks, assert_same_model, at_step, send
from tests.test_resume import assert_same_run, main_that_logs_samples
from tests.test_transformers_models import losses, world_of
from tests.tiny import flags, run_ranks
from trainer.main import main

FAMILIES = ("qwen2_5_vl", "gemma3")
SLOW = pytest.mark.slow


def run_flags(world: Path, name: str, per_device: int, accumulation: int, **changes: Any) -> list[str]:
    """Everything trains; a checkpoint after every step."""
    options = {"plora_dropout": None, "seed": 0, "fix_vit": False, "max_length": 256, "adam_epsilon": 1e-5}
    options |= {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": accumulation}
    return flags(world, name, per_device_train_batch_size=per_device, **{**options, **changes})


def killed_at(step: int, argv: list[str]) -> int:
    """The run, of which rank 1 dies when it comes to the step."""
    at_step(step, 1, lambda: send(signal.SIGKILL))
    return main(argv)


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("gemma3", marks=SLOW)])
def test_killed_and_started_again_no_bit_differs(family, tmp_path):
    world = world_of(family, tmp_path)
    run_ranks(2, main, run_flags(world, "straight", 2, 1, max_steps=4))
    argv = run_flags(world, "killed", 2, 1, max_steps=4)
    ranks = Ranks(2, killed_at, 4, argv)
    assert not ranks.wait(60), ranks.output()
    ranks.end()
    assert ranks.processes[1].exitcode == -signal.SIGKILL, ranks.output()
    assert (world / "killed" / "checkpoint-2").is_dir()
    run_ranks(2, main, argv)
    assert_same_model(world / "killed", world / "straight")
    assert_same_run(world / "killed", world / "straight")


@SLOW
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_then_three_train_on_the_same_batches_to_the_same_model(family, tmp_path):
    world, straight, changing = (
        world_of(family, tmp_path),
        tmp_path / "straight.log",
        tmp_path / "changing.log",
    )
    run_ranks(2, main_that_logs_samples, straight, 0, run_flags(world, "same", 3, 2, max_steps=6))
    argv = run_flags(world, "ranks", 3, 2, max_steps=6)
    run_ranks(2, main_that_logs_samples, changing, 3, argv, status=STOPPED)
    argv = run_flags(world, "ranks", 2, 2, max_steps=6)
    output, *_ = run_ranks(3, main_that_logs_samples, changing, 0, argv)
    assert "2 ranks then, 3 now" in output
    expected, planned = (
        [json.loads(line) for line in log.read_text().splitlines()] for log in (straight, changing)
    )
    trained = [line for number, line in enumerate(planned) if line not in planned[:number]]
    assert trained == expected
    assert losses(world / "ranks") == pytest.approx(losses(world / "same"), abs=1e-5)
    ours, theirs = (load_file(world / name / "model.safetensors") for name in ("ranks", "same"))
    for key, tensor in theirs.items():
        assert torch.allclose(ours[key], tensor, atol=1e-5), key
