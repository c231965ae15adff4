"""Compiled blocks, and selective checkpointing, of models of transformers: the losses of plain runs."""

import functools
from typing import Any, cast

import pytest
import torch._inductor.config

from tests.test_transformers_models import losses, train, world_of
from tests.tiny import flags, run_ranks
from tests.vlm_cases import tiny_model
from trainer.extras.compile import compile_blocks
from trainer.main import main
from trainer.models.model_parts import find_parts
from trainer.models.transformers_vlm import prepare_for_training

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


def test_a_vision_tower_is_not_compiled_again_for_another_number_of_windows(monkeypatch):
    """Dynamo alone, without a compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    model = tiny_model("qwen2_5_vl")
    prepare_for_training(model)
    compile_blocks(model, find_parts(model))
    graphs = []
    for windows in (2, 4, 6, 8):
        grid = torch.tensor([[1, 8, 4 * windows]])
        pixels = torch.randn(int(grid.prod()), 3 * 2 * 4 * 4)
        with torch.no_grad():
            cast(Any, model.base_model).get_image_features(pixels, grid)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1:] == [graphs[1]] * 3
