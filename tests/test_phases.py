"""Time and memory of sampled steps, by phase, and traces: of runs of two ranks, and of made-up events."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

import trainer.main
from data.flags import ConfigError
from tests.tiny import read_metrics, run_ranks, tiny_data, tiny_model
from trainer.config import parse
from trainer.extras.profile import ON_DEVICE, seconds_on_accelerator, seconds_on_cpu
from trainer.metrics import MemoryPeak

SLEEP = 0.3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    tiny_model(folder / "model")
    tiny_data(folder / "data")
    train(folder, "plain")
    train(folder, "sampled", "--time_phases_every", "3", "--save_strategy", "steps", "--save_steps", "3")
    train(folder, "traced", "--profile", "2:3")
    return folder


def train(folder, name, *flags):
    arguments = f"""
        --model_name_or_path {folder}/model --data_path {folder}/data/data.txt --output_dir {folder}/{name}
        --bf16 False --fix_vit False --max_length 128 --max_steps 4 --save_strategy no --rehearse False
        --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --dataloader_num_workers 0
    """
    run_ranks(2, trainer.main.main, [*arguments.split(), *flags])


def test_a_sampled_step_is_split_into_phases_and_no_other_is(world):
    (line,) = read_metrics(world / "sampled", "phases")
    assert (line["step"], line["steps"]) == (3, 1)
    seconds = line["seconds"]
    assert set(seconds) == {"data_wait", *ON_DEVICE, "saving", "communication", "other"}
    assert all(value > 0 for value in seconds.values()), seconds
    assert read_metrics(world / "plain", "phases") == []


def test_sampling_and_tracing_change_no_number(world):
    plain = read_metrics(world / "plain")
    for name in ("sampled", "traced"):
        for a, b in zip(plain, read_metrics(world / name), strict=True):
            assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])


def test_every_rank_leaves_a_trace_of_the_steps_asked_for_with_named_phases(world):
    (line,) = read_metrics(world / "traced", "phases")
    assert (line["step"], line["steps"]) == (3, 2)
    for rank in range(2):
        with gzip.open(world / "traced" / "profile" / f"rank{rank}.json.gz") as file:
            events = json.load(file)["traceEvents"]
        counts = {name: sum(event.get("name") == name for event in events) for name in ON_DEVICE}
        assert counts["optimizer"] == 2
        assert all(counts.values()), counts
    assert not (world / "sampled" / "profile").exists()


def slow_main(arguments):
    """A run whose saves and vision backward passes take longer."""
    import time

    from trainer.checkpoint import Checkpoints
    from trainer.models.xcomposer2.vision_xcomposer2 import VisionEncoder

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(SLEEP)
            ctx.ballast = torch.ones(64 << 20, dtype=torch.uint8) + 0
            return gradient

    forward, save = VisionEncoder.forward, Checkpoints.save
    VisionEncoder.forward = lambda self, *args: Slow.apply(forward(self, *args))

    def slow_save(self, *args):
        time.sleep(2 * SLEEP)
        return save(self, *args)

    Checkpoints.save = slow_save
    return trainer.main.main(arguments)


def test_time_and_memory_are_charged_to_the_phase_that_used_them(world):
    arguments = f"""
        --model_name_or_path {world}/model --data_path {world}/data/colour.json --output_dir {world}/slow
        --bf16 False --fix_vit False --max_length 128 --max_steps 3 --save_strategy steps --save_steps 2
        --per_device_train_batch_size 2 --dataloader_num_workers 0 --time_phases_every 2 --rehearse False
    """
    run_ranks(2, slow_main, arguments.split())
    (line,) = read_metrics(world / "slow", "phases")
    seconds, peaks = line["seconds"], line["memory_peak_bytes"]
    assert seconds["vision_backward"] >= SLEEP
    assert seconds["saving"] >= 2 * SLEEP
    assert peaks["vision_backward"] >= peaks["vision_forward"] + (60 << 20)
    last = read_metrics(world / "slow")[-1]
    assert last["seconds_saving"] >= 2 * SLEEP  # of the save after step 2, which that line was written before
    assert last["memory_peak_bytes"] >= peaks["vision_backward"]


def test_a_peak_is_of_the_time_since_the_last_look():
    memory = MemoryPeak(torch.device("cpu"))
    memory.take()
    ballast = torch.ones(256 << 20, dtype=torch.uint8)
    high = memory.take()
    del ballast
    memory.take()
    assert high - memory.take() > 200 << 20
    assert memory.of_window() >= high, "on a CPU a line of metrics holds the peak of the whole run"


def event(name, begin, end, kernels=(), parent=None, device="CPU", named=False):
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=begin, end=end, elapsed_us=lambda: end - begin),
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
        cpu_parent=parent,
        device_type=SimpleNamespace(name=device),
        is_user_annotation=named,
    )


def test_a_collective_is_taken_out_of_the_phase_that_waits_for_it():
    events = [
        event("language_forward", 100, 300, named=True),
        event("gloo:all_gather", 150, 210),
        event("gloo:all_gather", 200, 250),
        event("optimizer", 400, 500, named=True),
        event("gloo:all_reduce", 480, 530),
    ]
    seconds = seconds_on_cpu(events, wall=1e-3)
    assert seconds["language_forward"] == pytest.approx(100e-6)
    assert seconds["optimizer"] == pytest.approx(80e-6)
    assert seconds["communication"] == pytest.approx(150e-6)
    assert seconds["other"] == pytest.approx(670e-6)


def test_on_an_accelerator_kernels_count_for_the_phase_that_launched_them():
    language, loss = (event(name, 0, 9, named=True) for name in ("language_forward", "loss"))
    inner = event("aten::linear", 1, 2, parent=language)
    events = [
        event("data_wait", 0, 40, named=True),
        language,
        inner,
        event("aten::addmm", 1, 2, [("gemm", 100)], parent=inner),
        event("c10d::_allgather_base_", 3, 4, [("ncclDevKernel_AllGather", 70)], parent=language),
        loss,
        event("aten::exp", 5, 6, [("exp", 20)], parent=loss),
        event("aten::zero_", 7, 8, [("fill", 5)]),
        event("gemm", 50, 150, device="CUDA"),
        event("ncclDevKernel_AllGather", 60, 130, device="CUDA"),
        event("exp", 160, 180, device="CUDA"),
        event("fill", 190, 195, device="CUDA"),
        event("language_forward", 50, 150, device="CUDA", named=True),
    ]
    seconds = {name: round(1e6 * value) for name, value in seconds_on_accelerator(events, wall=1e-3).items()}
    assert {name: value for name, value in seconds.items() if value} == {
        "data_wait": 40,
        "language_forward": 100,
        "communication": 70,
        "loss": 20,
        "other": 5,
        "idle": 875,
    }


@pytest.mark.parametrize("steps", ["5", "3:2", "0:4", "a:b"])
def test_steps_that_cannot_be_traced_are_a_sentence(steps):
    with pytest.raises(ConfigError, match=f"--profile {steps}"):
        parse(["--profile", steps])
