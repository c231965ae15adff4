"""Moments in bfloat16 and 8 bits: what they take, what they change, and that a run goes on as if it had not
stopped."""

import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import trainer.config
from data.flags import ConfigError
from tests.tiny import flags, read_metrics, run_ranks, tiny_world
from trainer.checkpoint import RESUME
from trainer.main import main
from trainer.optim import adamw

HAS_TORCHAO = find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not HAS_TORCHAO, reason="the extra `optim` is not installed")
SMALL = ("bfloat16", pytest.param("8bit", marks=needs_torchao))
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", SMALL)
def test_the_first_step_is_that_of_torch_exactly_and_later_ones_are_close(kind, monkeypatch):
    monkeypatch.setattr(
        "trainer.extras.small_moments.AT_A_TIME", 3 * 256
    )  # several parts, the last one smaller
    torch.manual_seed(0)
    start = [torch.randn(10, 512), torch.randn(7, 100), torch.randn(5)]
    ours, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = [
        adamw([{"params": parameters, "lr": 1e-2, "weight_decay": 0.1}], (0.9, 0.95), 1e-8, CPU, moments)
        for parameters, moments in ((ours, kind), (theirs, "float32"))
    ]
    for step in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for a, b, first in zip(ours, theirs, start, strict=True):
            if step == 0:
                assert torch.equal(a, b)
            moved = (b - first).norm()
            assert (a - b).norm() < (0.01 if kind == "bfloat16" else 0.05) * moved


def test_moments_take_the_bytes_they_promise():
    parameters = [nn.Parameter(torch.zeros(64, 1024)), nn.Parameter(torch.zeros(64, 100))]
    groups = [{"params": parameters, "lr": 1e-2, "weight_decay": 0.0}]

    def moments_of(parameter, kind):
        state = adamw(groups, (0.9, 0.95), 1e-8, CPU, kind).state[parameter]
        return sum(t.numel() * t.element_size() for name, t in state.items() if name != "step")

    assert moments_of(parameters[0], "float32") == 8 * 64 * 1024
    assert moments_of(parameters[0], "bfloat16") == 4 * 64 * 1024
    assert moments_of(parameters[0], "8bit") == 2 * (64 * 1024 + 4 * 64 * 4)
    assert moments_of(parameters[1], "8bit") == 8 * 64 * 100, "its rows are no whole blocks"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tiny_world(tmp_path_factory.mktemp("moments"), hidden_size=256, intermediate_size=256)
    train(folder, "float32", "float32")
    for kind in ("bfloat16", "8bit")[: 1 + HAS_TORCHAO]:
        train(folder, kind, kind, "--save_strategy", "steps", "--save_steps", "4")
    return folder


def train(folder, name, kind, *more, ranks=2):
    options = {"optim_state": kind, "max_length": 128, "max_steps": 8, "rehearse": False}
    argv = flags(folder, name, *more, per_device_train_batch_size=4 // ranks, **options)
    run_ranks(ranks, main, argv, timeout=300)


def losses(folder):
    return {line["step"]: line["loss"] for line in read_metrics(folder)}


@pytest.mark.parametrize("kind", SMALL)
def test_losses_stay_close_to_those_of_float32_moments(world, kind):
    full, small = losses(world / "float32"), losses(world / kind)
    assert len(full) == 8
    assert full[1] == small[1]
    assert full[8] < 0.9 * full[1]
    for step, loss in small.items():
        assert loss == pytest.approx(full[step], rel=0.01 if kind == "bfloat16" else 0.03)
    assert small != full, "the moments were not rounded at all"


@pytest.mark.parametrize("kind", SMALL)
def test_a_run_goes_on_bit_for_bit_and_on_other_numbers_of_ranks(world, kind):
    for name, ranks in ((f"{kind}-again", 2), (f"{kind}-alone", 1)):
        shutil.copytree(world / kind / "checkpoint-4", world / name / "checkpoint-4")
        train(world, name, kind, ranks=ranks)
    whole, again, alone = (losses(world / name) for name in (kind, f"{kind}-again", f"{kind}-alone"))
    for step in range(5, 9):
        assert again[step] == whole[step]
        assert alone[step] == pytest.approx(whole[step], rel=1e-3)
    ours, theirs = (load_file(world / name / "model.safetensors") for name in (f"{kind}-again", kind))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@needs_torchao
def test_a_checkpoint_holds_the_moments_as_they_are(world):
    kept = {}
    for path in (world / "8bit" / "checkpoint-4" / RESUME).glob("*.safetensors"):
        kept.update(load_file(path))
    wqkv = "model.layers.0.attention.wqkv.weight"
    assert kept[wqkv].dtype == torch.float32
    assert kept[f"{wqkv}.exp_avg"].dtype == torch.uint8
    assert kept[f"{wqkv}.exp_avg_scale"].shape[1] == 1
    assert kept["model.norm.weight.exp_avg"].dtype == torch.float32


def test_what_cannot_be_kept_so_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"cannot express --adam_beta2 0.999: use 0.996 or less"):
        trainer.config.parse(["--optim_state", "bfloat16", "--adam_beta2", "0.999"])
    monkeypatch.setattr(trainer.config, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs torchao: pip install 'torchao==0.18"):
        trainer.config.parse(["--optim_state", "8bit"])


def test_moments_in_another_form_are_refused_whatever_is_insisted_on(world):
    shutil.copytree(world / "bfloat16" / "checkpoint-4", world / "other" / "checkpoint-4")
    said, _ = run_ranks(2, main, flags(world, "other", resume_anyway=True), status=2)
    assert "checkpoint-4 holds AdamW's moments in another format: set --optim_state bfloat16" in said
