"""The forecast of a training is what the training does, and needs neither weights nor data nor machines."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

import data.packing
from data.flags import parse_flags
from data.packing import Packing
from tests import forecast_gates
from tests.benchmarks.sent_bytes import count
from tests.tiny import flags, run_ranks, tiny_world
from tests.tiny_models import tiny_folder
from trainer.forecast.__main__ import main
from trainer.forecast.fake_step import FakeStep
from trainer.forecast.forecast import Epoch, Forecast, ForecastConfig, forecast, speed
from trainer.forecast.report import report


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("forecast"))


def config_of(*argv: object) -> ForecastConfig:
    return parse_flags(ForecastConfig, [str(word) for word in argv], "trainer.forecast")


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, "--gradient_accumulation_steps 3 --packing False --bf16 True"),
        pytest.param(4, "--sharding hybrid --fix_vit False", marks=pytest.mark.slow),
        pytest.param(2, "--use_lora True --gradient_checkpointing selective", marks=pytest.mark.slow),
    ],
)
def test_a_forecast_counts_what_a_run_counts(world, ranks, more, monkeypatch):
    """Tensors within 5 %, and every byte that is sent; steps of which all have as many micro-batches."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    argv = flags(world, f"run{ranks}", *more.split(), max_steps=2, max_length=128)
    run_ranks(ranks, count, world / "run.json", argv)
    run = json.loads((world / "run.json").read_text())
    found = forecast(config_of(*argv, "--ranks", ranks, "--local_ranks", 2, "--cpu_ranks"), ranks)
    assert found.step.peak_bytes == pytest.approx(run["tensors"], rel=0.05)
    sent = found.step.sent.values()
    assert sum(each.within + each.between for each in sent) == pytest.approx(run["bytes"][-1])
    assert sum(each.number for each in sent) == run["calls"][-1]


def test_a_model_without_weights_and_data_is_forecast_for_many_ranks(tmp_path, capsys):
    folder = tiny_folder("qwen2_5_vl", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    argv = f"--model_name_or_path {folder} --max_length 512 --ranks 2 --compared_ranks 1024".split()
    assert main([*argv, "--output", str(tmp_path / "forecast.json")]) == 0
    printed = capsys.readouterr().out
    assert "assumed: weights in bfloat16, as there are none in the folder" in printed
    assert "it fits" in printed
    found = json.loads((tmp_path / "forecast.json").read_text())
    few, many = found["by_ranks"]
    assert (few["ranks"], many["ranks"]) == (2, 1024)
    assert few["held_bytes"] > 10 * many["held_bytes"]
    assert few["sent_between_bytes"] == 0 < many["sent_between_bytes"]
    assert many["padding_bytes"] > many["held_bytes"] / 4, "a rank holds whole rows"


def test_flags_that_make_it_fit_are_tried(world):
    argv = f"--model_name_or_path {world}/model --max_length 256 --ranks 2 --compared_ranks none"
    argv += " --per_device_train_batch_size 4 --gradient_checkpointing False --picture none"
    whole = forecast(config_of(*argv.split()), 2).step.peak_bytes
    found = report(config_of(*argv.split(), "--memory", 0.7 * whole / 1e9))
    assert not found["memory"]["fits"]
    assert found["ways_to_fit"][-1]["fits"]
    assert "--gradient_checkpointing" in found["ways_to_fit"][-1]["flags"]


def test_time_follows_from_a_measured_run(tmp_path, world):
    """2 ranks did 4e12 operations in 2 s: 1e12 a second and rank; without them, tokens a second count."""
    lines = [{"kind": "train", "tokens": 100, "tokens_per_second": 1.0}]
    lines += [{"kind": "train", "tokens": 200, "tokens_per_second": 100.0, "mfu": 0.5}]
    lines[1] |= {"model_flops_vision": 1e12, "model_flops_language": 3e12}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "run.json").write_text('{"ranks": 2}')
    config = config_of("--model_name_or_path", world / "model", "--measured", tmp_path)
    epoch = Epoch(1, tokens=4000, slots=0, supervised=0, pairs=0, steps=1, rounds=1, idle=0.5)
    step = FakeStep({}, {}, 0)
    assert speed(config, Forecast(4, step, epoch, (10**12, 3 * 10**12), 1, ""))[0] == pytest.approx(2)
    assert speed(config, Forecast(4, step, epoch, None, 1, ""))[0] == pytest.approx(40)


def test_all_problems_are_reported_together(world, capsys):
    argv = f"--model_name_or_path {world}/model --memory 0 --picture 3 --mfu x --data_path {world}/no.txt"
    assert main(argv.split()) == 2
    errors = capsys.readouterr().err
    for problem in ("--memory 0", "--picture 3", "--mfu x", "no.txt"):
        assert problem in errors
    argv = f"--model_name_or_path {world} --ranks 12 --sharding hybrid --compared_ranks none"
    assert main(argv.split()) == 2
    errors = capsys.readouterr().err
    assert "12 ranks are not a whole number of nodes of 8" in errors
    assert "no config.json" in errors


# --- recorded numbers of published models --------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    return json.loads(forecast_gates.RECORDED.read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.mark.parametrize(
    ("model", "blocks", "ranks", "sharding"),
    [
        *forecast_gates.CASES,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in forecast_gates.WHOLE),
    ],
)
def test_collectives_and_memory_of_a_published_model_are_as_recorded(
    folders, recorded, model, blocks, ranks, sharding
):
    found = forecast_gates.find(forecast_gates.make_folder(folders, model, blocks), ranks, sharding)
    before = recorded[forecast_gates.name(model, blocks, ranks, sharding)]
    lines = forecast_gates.differences(before, found)
    assert not lines, "\n".join([*lines, "if that is meant: python -m tests.forecast_gates"])


def test_a_gate_names_a_collective_and_a_gigabyte_more():
    before = json.loads(forecast_gates.RECORDED.read_text())["XComposer2-7B, 4 blocks, 64 ranks, full"]
    now = copy.deepcopy(before)
    now[forecast_gates.COLLECTIVES]["all-gather, all ranks"][0] += 4
    now["gigabytes"]["backward"][0] += 1
    assert not forecast_gates.differences(before, before)
    assert len(forecast_gates.differences(before, now)) == 2


def test_planning_a_step_of_1024_ranks_looks_at_every_row_once_for_a_sample(monkeypatch):
    """Work is counted in rows that samples are compared with; more attempts would multiply it."""
    random, looked_at = np.random.default_rng(0), []
    fill_rows = data.packing._fill_rows

    def counted(tokens, costs, num_rows, max_tokens):
        looked_at.append(len(tokens) * num_rows)
        return fill_rows(tokens, costs, num_rows, max_tokens)

    monkeypatch.setattr(data.packing, "_fill_rows", counted)
    tokens = np.clip(random.lognormal(np.log(400), 0.8, 16_384), 24, 4096).astype(np.int32)
    packing = Packing([np.stack([tokens, tokens * 0, tokens], axis=1)], max_tokens=4096)
    plan = packing.plan(np.stack([np.zeros(16_384, np.int64), np.arange(16_384)], axis=1), 1024)
    rounds = len(plan[0])
    assert rounds <= -(-int(tokens.sum()) // (1024 * 4096)) + 1
    assert sum(looked_at) <= 2 * 16_384 * 1024 * rounds
