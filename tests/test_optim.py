"""Schedules equal transformers', groups split by part and decay."""

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from trainer.optim import SCHEDULES, adamw, is_decayed, learning_rate_factor, parameter_groups


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
