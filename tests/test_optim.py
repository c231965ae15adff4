"""Schedules equal transformers', groups split by part and decay, shards are updated as whole tensors are."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from transformers import get_scheduler

from tests.tiny import run_ranks
from trainer.distributed import all_sum, finish, start
from trainer.optim import (
    SCHEDULES,
    adamw,
    clip_gradients,
    is_decayed,
    learning_rate_factor,
    parameter_groups,
    squared_norm,
)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(6, 2), (100, 0), (7, 7), (50, 3), (1, 1)])
def test_schedules_are_those_of_transformers(schedule, total, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        ours = learning_rate_factor(schedule, step, total, warmup)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


NAMES = {
    "model.layers.0.attention.wqkv.weight": (4, 4),
    "model.layers.0.attention_norm.weight": (4,),
    "vit.vision_tower.vision_model.pre_layrnorm.weight": (4,),
    "vit.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias": (4,),
    "vision_proj.0.weight": (4, 4),
    "plora_sub_GN": (1, 1, 1, 4),
}


def test_decay_spares_norms_biases_and_separators_unless_the_original_is_asked_for():
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in NAMES.items()}
    ours = [name for name, p in parameters.items() if is_decayed(name, p, original=False)]
    original = [name for name, p in parameters.items() if is_decayed(name, p, original=True)]
    assert ours == ["model.layers.0.attention.wqkv.weight", "vision_proj.0.weight"]
    assert original == [name for name in NAMES if not name.endswith("bias") and "layrnorm" not in name]


def test_each_part_gets_its_own_rate_and_every_parameter_one_group():
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in NAMES.items()}
    parts = {
        name: "vision" if name.startswith("vit") else "projector" if "layers" not in name else "language"
        for name in NAMES
    }
    rates = {"vision": 1e-6, "projector": 1e-4, "language": 1e-5}
    groups = parameter_groups(parameters, parts, rates, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(NAMES)
    assert {(g["part"], g["peak_lr"], g["weight_decay"]) for g in groups} == {
        ("vision", 1e-6, 0.0),
        ("projector", 1e-4, 0.1),
        ("projector", 1e-4, 0.0),
        ("language", 1e-5, 0.1),
        ("language", 1e-5, 0.0),
    }
    assert adamw(groups, (0.9, 0.95), 1e-8, torch.device("cpu")).defaults["fused"]


def update_shards_and_whole_tensors(max_norm: float) -> None:
    """Four ranks, on a mesh of one dimension and one of two; 5 rows leave the last of four ranks none."""
    start()
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=random) for shape in ((8, 3), (5, 2), (4,))]
    gradients = [[torch.randn(w.shape, generator=random) for w in weights] for _ in range(3)]
    options = {"lr": 0.1, "weight_decay": 0.1}
    theirs: list[Any] = [nn.Parameter(weight.clone()) for weight in weights]
    reference = torch.optim.AdamW(theirs, betas=(0.9, 0.95), **options)
    meshes = [init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))]
    placements = [[Shard(0)], [Replicate(), Shard(0)]]
    ours: list[list[Any]] = [
        [nn.Parameter(distribute_tensor(weight, *where)) for weight in weights]
        for where in zip(meshes, placements, strict=True)
    ]
    optimizers = [
        adamw([{"params": parameters, **options}], (0.9, 0.95), 1e-8, torch.device("cpu"))
        for parameters in ours
    ]
    for of_step in gradients:
        for parameter, gradient in zip(theirs, of_step, strict=True):
            parameter.grad = gradient.clone()
        norm = nn.utils.clip_grad_norm_(theirs, max_norm)
        reference.step()
        for optimizer, parameters in zip(optimizers, ours, strict=True):
            for parameter, gradient in zip(parameters, of_step, strict=True):
                parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            shards = [parameter.grad for parameter in parameters]
            # Whatever it is, DTensor would have to look for how to shard it.
            name = ShardingPropagator.propagate_op_sharding_non_cached.__name__
            with patch.object(ShardingPropagator, name, side_effect=AssertionError):
                found = all_sum(squared_norm(shards)).sqrt().item()
                clip_gradients(shards, found, max_norm)
                optimizer.step()
            assert found == pytest.approx(norm.item(), rel=1e-6)
    for parameters in ours:
        for parameter, whole in zip(parameters, theirs, strict=True):
            torch.testing.assert_close(parameter.detach().full_tensor(), whole.detach(), rtol=1e-6, atol=1e-6)
    finish()


def test_norm_clipping_and_adamw_of_shards_are_those_of_whole_tensors_without_an_operation_of_dtensors():
    """One limit that clips every step, and one that clips none."""
    run_ranks(4, lambda: [update_shards_and_whole_tensors(max_norm) for max_norm in (0.5, 1e3)] and None)
