"""Compiled blocks, and selective checkpointing, of models of transformers: the losses of plain runs."""

import functools
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config

from tests import vlm_cases
from tests.test_transformers_models import losses, train, world_of
from tests.tiny import flags, run_ranks
from trainer.extras.compile import compile_block
from trainer.main import main
from trainer.models.generic.model_parts import find_parts
from trainer.models.generic.modeling import prepare_for_training

FAMILIES = ("qwen2_5_vl", "gemma3")


def main_in_one_process(arguments: list[str]) -> int:
    torch._inductor.config.compile_threads = 1  # a pool of processes would outlive a forked rank
    return main(arguments)


def test_a_new_number_of_pictures_or_windows_compiles_no_vision_block_again(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    model: Any = vlm_cases.tiny_model("qwen2_5_vl")
    prepare_for_training(model)
    for block in model.get_submodule(find_parts(model).vision_blocks).children():
        compile_block(block)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    graphs = []
    for grids in ([[1, 8, 8]], [[1, 8, 16]], [[1, 8, 24]], [[1, 8, 8], [1, 16, 8]], [[1, 8, 40]] * 3):
        pixels = torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 4 * 4)
        with torch.no_grad():
            model.base_model.get_image_features(pixels, torch.tensor(grids))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    assert graphs[0] >= 2, graphs
    assert graphs[1:] == [graphs[1]] * (len(graphs) - 1), graphs


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
