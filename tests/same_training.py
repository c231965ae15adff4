"""Runs that must train alike: how they are started, and how their numbers and gradients are compared.

train(same_world, "run", ranks=2, accumulation=2)     # one of the ways to train on the same global batches
assert_same_training(same_world, "run")               # … as the fixture's reference does, on a single rank

Every run trains all parts in float32 for ten steps on the same samples; only who computes what changes. A
different order of summation leaves relative differences of about 1e-7 in a gradient. Adam divides by the
gradient's size, which would turn rounding noise where the true gradient is zero into whole steps, so these
runs take an epsilon of 1e-5.
"""

import copy

import pytest
from safetensors.torch import load_file

from tests.tiny import flags, read_metrics, run_ranks
from trainer.config import Config
from trainer.distributed import device_mesh, start
from trainer.loss import chunked_cross_entropy, token_losses
from trainer.main import main
from trainer.models import build_model, load_config, parts_of
from trainer.parallelize import parallelize
from trainer.weights import load_weights

GLOBAL_BATCH = 4


def train(
    folder, name, ranks, accumulation=1, data="data/data.txt", *more, batch=GLOBAL_BATCH, run=main, **options
):
    """Options: those of `run_ranks`."""
    shared = {"fix_vit": False, "packing": False, "gradient_checkpointing": False, "max_steps": 10}
    shared |= {"data_path": folder / data, "adam_epsilon": 1e-5, "warmup_ratio": 0.2}
    shared |= {"per_device_train_batch_size": batch // ranks // (accumulation or 1)}
    argv = flags(folder, name, *more, gradient_accumulation_steps=accumulation, **shared)
    run_ranks(ranks, run, argv, **options)


def assert_same_training(folder, name, reference="reference", weights="model.safetensors"):
    ours, theirs = read_metrics(folder / name), read_metrics(folder / reference)
    assert len(ours) == len(theirs) == 10
    for a, b in zip(ours, theirs, strict=True):
        for count in ("samples", "tokens", "supervised_tokens"):
            assert a[count] == b[count]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["loss_by_source"] == pytest.approx(b["loss_by_source"], rel=1e-6)
    ours, theirs = (load_file(folder / run / weights) for run in (name, reference))
    assert ours.keys() == theirs.keys()
    for key in ours:
        difference = (ours[key] - theirs[key]).norm() / theirs[key].norm().clamp(min=1e-3)
        assert difference < 1e-6, key


def sharded(folder, frozen=(), mesh=None, tied=False, **options):
    """In a rank: the tiny model over all ranks, and an equal one that is not sharded."""
    config = load_config(folder)
    config.plora_dropout = 0.0
    parts = parts_of(config)
    model = build_model(config)
    load_weights(model, folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)))
    if tied:
        model.output.weight = model.model.tok_embeddings.weight
    model.loss_function = chunked_cross_entropy(8)
    plain = copy.deepcopy(model)

    def unchunked(hidden, targets, lm_head, **_):
        losses = token_losses(hidden, targets, lm_head)
        return losses.sum(), losses.detach()

    plain.loss_function = unchunked
    chosen = Config(**{"bf16": False, "gradient_checkpointing": False, "vision_micro_batch": None, **options})
    return parallelize(model, mesh or device_mesh(start()), parts, chosen), plain
