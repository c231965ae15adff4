"""Compiled blocks, and selective checkpointing, of models of transformers: the losses of plain runs."""

import pytest
import torch._inductor.config

from tests.test_transformers_models import losses, train, world_of
from tests.tiny import flags, run_ranks
from trainer.main import main

FAMILIES = ("qwen2_5_vl", "gemma3")


def main_in_one_process(arguments: list[str]) -> int:
    torch._inductor.config.compile_threads = 1  # a pool of processes would outlive a forked rank
    return main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_selective_checkpointing_changes_no_loss(family, tmp_path):
    world = world_of(family, tmp_path)
    plain = losses(train(world, "plain", gradient_checkpointing=False, fix_vit=False))
    selective = train(world, "selective", ranks=2, gradient_checkpointing="selective", fix_vit=False)
    assert losses(selective) == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_change_no_loss(family, tmp_path):
    """Minutes, for a machine whose cache of compiled code is empty."""
    world = world_of(family, tmp_path)
    options = {"plora_dropout": None, "max_length": 256, "max_steps": 3, "seed": 0, "fix_vit": False}
    options["per_device_train_batch_size"] = 4
    run_ranks(1, main, flags(world, "plain", **options))
    argv = flags(world, "compiled", compile=True, **options)
    run_ranks(1, main_in_one_process, argv, timeout=1200)
    assert losses(world / "compiled") == pytest.approx(losses(world / "plain"), rel=1e-5)
