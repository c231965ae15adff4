"""The trainer on GPUs: `pytest -m gpu`, on a machine that has one or several; skipped elsewhere.

Every training is a job of its own, as a user would start it.
"""

import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fault_cases import is_gone, launch
from tests.model_cases import SAMPLES, golden, packed_micro_batch, packed_row, samples
from tests.tiny import flags, read_metrics, tiny_world, torchrun
from trainer.loss import chunked_cross_entropy, losses_and_gradients
from trainer.models.xcomposer2 import modeling_xcomposer2 as modeling

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="needs a GPU, and -m gpu to see it")]
several = pytest.mark.skipif(GPUS < 2, reason="needs several GPUs")
WORLDS = [1, pytest.param(2, marks=several)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("gpu"))


def train(world: Path, name: str, *more: str, ranks: int = 1, hide: bool = False, **changes: Any) -> Path:
    """A training of six steps; hide: on the CPU. Returns its folder."""
    steps = {"max_steps": 6, "fix_vit": False, "adam_epsilon": 1e-5, "save_strategy": "no"}
    argv = flags(world, name, *more, **{**steps, "per_device_train_batch_size": 4 // ranks, **changes})
    done = torchrun(ranks, argv, timeout=300, **({"CUDA_VISIBLE_DEVICES": ""} if hide else {}))
    assert done.returncode == 0, done.stderr
    return world / name


@pytest.fixture(scope="module")
def on_the_cpu(world) -> list[dict[str, Any]]:
    return read_metrics(train(world, "cpu", hide=True))


def assert_same_losses(folder: Path, expected: list[dict[str, Any]], tolerance: float) -> None:
    found = read_metrics(folder)
    assert [line["tokens"] for line in found] == [line["tokens"] for line in expected]
    losses, theirs = ([line["loss"] for line in lines] for lines in (found, expected))
    assert losses == pytest.approx(theirs, rel=tolerance)
    assert found[0]["memory_peak_bytes"] > 0


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("plain", {}, 1e-4),
        ("packed", {"packing": True, "max_length": 120}, 1e-4),
        ("unpacked", {"packing": False}, 1e-4),
        ("bf16", {"bf16": True}, 3e-2),
        ("accumulated", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, 1e-4),
        ("selective", {"gradient_checkpointing": "selective"}, 1e-4),
        ("offloaded", {"cpu_offload": True}, 1e-4),
        ("compiled", {"compile": True}, 1e-4),
        ("deterministic", {"deterministic": True}, 1e-4),
    ],
)
def test_a_gpu_trains_as_the_cpu_does(world, on_the_cpu, ranks, name, options, tolerance):
    if name == "accumulated":
        options = {**options, "gradient_accumulation_steps": 4 // ranks}
    folder = train(world, f"{name}-{ranks}", ranks=ranks, **options)
    assert_same_losses(folder, on_the_cpu, tolerance)


@pytest.mark.parametrize("ranks", WORLDS)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(world, ranks):
    options = {"ranks": ranks, "deterministic": True, "bf16": True, "plora_dropout": 0.2}
    options |= {"lr_scheduler_type": "constant", "warmup_ratio": 0, "save_strategy": "steps", "save_steps": 3}
    straight = train(world, f"straight-{ranks}", **options)
    resumed = f"resumed-{ranks}"
    train(world, resumed, **options, resume_from_checkpoint=straight / "checkpoint-3")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (world / resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("sharding", ["full", "none"])
def test_adapters_train_as_on_the_cpu(world, ranks, sharding):
    lora = {"use_lora": True, "lora_r": 4, "lora_dropout": 0, "fix_vit": True, "sharding": sharding}
    expected = read_metrics(train(world, f"lora-cpu-{ranks}-{sharding}", hide=True, **lora))
    folder = train(world, f"lora-{ranks}-{sharding}", ranks=ranks, **lora)
    assert_same_losses(folder, expected, 1e-4)
    assert (folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("launcher", ["trainer.launch", "torch.distributed.run"])
@pytest.mark.parametrize("what", ["os.kill(os.getpid(), signal.SIGKILL)", "raise RuntimeError('burst')"])
@several
def test_a_rank_that_is_lost_ends_the_job_while_another_waits_in_nccl(world, tmp_path, launcher, what):
    hook = f"""
    if (step, rank) == (4, 1):
        time.sleep(2)  # the other is in its collective
        os.write(1, b"lost at %f\\n" % time.time())
        {what}"""
    argv = flags(world, tmp_path / "run", max_steps=1000, per_device_train_batch_size=2)
    process = launch(tmp_path, hook, [], argv, launcher)
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert time.time() - float(output.partition("lost at ")[2].split()[0]) < 15, output


def test_a_run_that_is_killed_ends_and_says_so(world, tmp_path):
    argv = flags(world, tmp_path / "run", max_steps=100000, save_strategy="steps", save_steps=1)
    process = launch(tmp_path, "    pass", ["--nproc_per_node", "1"], argv, "trainer.launch")
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint-1").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.2)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    (rank,) = map(int, Path(children).read_text().split())
    os.kill(rank, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "was killed by SIGKILL" in output.rstrip().splitlines()[-1]
    assert is_gone(rank, seconds=5)


# --- in this process: the model and its kernels -----------------------------------------------------------


def on_gpu(batch):
    moved = {name: value.cuda() for name, value in batch.items() if isinstance(value, torch.Tensor)}
    if batch["pixel_values"] is not None:
        moved["pixel_values"] = [image.cuda() for image in batch["pixel_values"]]
    return moved


@pytest.mark.parametrize("family", ["xcomposer2", "xcomposer2-hd"])
@torch.no_grad()
def test_the_logits_are_the_originals_packed_or_not(family, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, parts = golden(family).model().cuda(), samples(family)
    alone = [model(**on_gpu(part)).logits for part in parts]
    for case, logits in zip(SAMPLES[family], alone, strict=True):
        assert golden(family).logits_error(case, logits.cpu()) < 1e-3
    torch.testing.assert_close(
        model(**on_gpu(packed_row(parts))).logits, torch.cat(alone, 1), rtol=0, atol=1e-4
    )


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model(**batch, num_items_in_batch=1).loss
    loss.backward()
    return loss.item(), {
        name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None
    }


def test_the_kernel_for_packed_rows_computes_what_one_sample_at_a_time_does(monkeypatch):
    model, parts = golden("xcomposer2").model().cuda().bfloat16(), samples("xcomposer2")
    batch, calls = on_gpu(packed_row(parts)), []
    original = modeling.varlen_attn
    monkeypatch.setattr(modeling, "varlen_attn", lambda *a, **k: calls.append(a) or original(*a, **k))
    loss, found = gradients(model, batch)
    assert len(calls) == model.config.num_hidden_layers
    monkeypatch.setattr(modeling, "has_varlen_kernel", lambda q: False)
    expected_loss, expected = gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 2e-2 * whole, name


def test_the_loss_adds_up_in_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 64).cuda().bfloat16(), torch.randn(320, 64).cuda().bfloat16()
    targets = torch.randint(0, 320, (40,)).cuda()
    compute = functools.partial(losses_and_gradients, for_hidden=True, for_weight=True)
    losses, *found = compute(hidden, weight, targets, 8)
    expected_losses, *expected = compute(hidden.float(), weight.float(), targets, 40)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-2, atol=1e-2)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() - theirs).norm() < 1e-2 * theirs.norm()


def test_a_packed_micro_batch_waits_for_the_gpu_nowhere():
    model = golden("xcomposer2").model().cuda().bfloat16().train()
    model.loss_function = chunked_cross_entropy(8)
    batch = packed_micro_batch().pin_memory()
    for mode in ("default", "error"):  # the first run loads kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            moved = batch.to("cuda")
            (model(**moved.inputs).loss / batch.num_supervised).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
