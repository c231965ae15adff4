"""The forecast of a training is what the training does, and needs neither weights nor data nor machines."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import data.packing
import trainer.models
from data.flags import parse_flags
from data.packing import Packing
from data.reader import cost_model
from tests import forecast_gates
from tests.benchmarks.sent_bytes import count
from tests.tiny import flags, run_ranks, tiny_data, tiny_world
from tests.tiny_models import tiny_folder
from trainer.config import parse
from trainer.distributed import Ranks
from trainer.forecast import at_start
from trainer.forecast.__main__ import main
from trainer.forecast.config import ForecastConfig
from trainer.forecast.epoch import Epoch, epoch_flops, epoch_of, operations_of, some_pictures
from trainer.forecast.fake_step import FakeStep
from trainer.forecast.forecast import Forecast, forecast
from trainer.forecast.report import report
from trainer.forecast.speed import fit_rates, measured_run, speed, work_of_run
from trainer.main import main as train
from trainer.prepare import describe, measure
from trainer.rehearsal import read_batch


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("forecast"))


def config_of(*argv: object) -> ForecastConfig:
    return parse_flags(ForecastConfig, [str(word) for word in argv], "trainer.forecast")


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, "--gradient_accumulation_steps 3 --bf16 True"),
        pytest.param(4, "--sharding hybrid --fix_vit False", marks=pytest.mark.slow),
        pytest.param(2, "--use_lora True --gradient_checkpointing selective", marks=pytest.mark.slow),
    ],
)
def test_a_forecast_counts_what_a_run_counts(world, ranks, more, monkeypatch, tmp_path):
    """Tensors within 5 %, and every byte that is sent; steps of which all have as many micro-batches, of as
    many rows as the largest, which packed rows of two steps would not have."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    argv = flags(world, tmp_path, *more.split(), max_steps=2, max_length=128, packing=False)
    run_ranks(ranks, count, world / "run.json", argv)
    run = json.loads((world / "run.json").read_text())
    asked = at_start.asked(parse(argv), Ranks(0, ranks, 0, 2, torch.device("cpu")))
    found = at_start.find(json.loads(json.dumps(asked)))
    assert found["peak_bytes"] == pytest.approx(run["tensors"], rel=0.05)
    assert found["sent_within_bytes"] + found["sent_between_bytes"] == pytest.approx(run["bytes"][-1])
    assert found["collectives"] == run["calls"][-1]
    assert ("to other machines" in at_start.in_words(found)) == (ranks > 2)


def test_a_model_without_weights_and_data_is_forecast_for_many_ranks(tmp_path, capsys):
    folder = tiny_folder("qwen2_5_vl", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    argv = f"--model_name_or_path {folder} --max_length 512 --ranks 2 --compared_ranks 1024".split()
    assert main([*argv, "--output", str(tmp_path / "forecast.json")]) == 0
    printed = capsys.readouterr().out
    assert "assumed: weights in bfloat16, as there are none in the folder" in printed
    assert "it fits" in printed
    assert "most of it is that of" in printed
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
    step, run = FakeStep({}, {}, 0), measured_run(config)
    assert speed(config, Forecast(4, step, epoch, (10**12, 3 * 10**12), 1, ""), run)[0] == pytest.approx(2)
    assert speed(config, Forecast(4, step, epoch, None, 1, ""), run)[0] == pytest.approx(40)


def test_operations_of_an_epoch_of_a_model_of_transformers_are_those_of_its_samples(tmp_path, monkeypatch):
    tiny_folder("qwen2_5_vl", tmp_path / "model")
    data = tiny_data(tmp_path / "data", samples=16, image_sizes=(56, 140))
    argv = flags(tmp_path, "run", data_path=data, plora_dropout=None, max_length=256)
    count, counted = trainer.models.flops_of, []
    monkeypatch.setattr(trainer.models, "flops_of", lambda *a: counted.append(count(*a)) or counted[-1])
    config = config_of(*argv)
    plan, _ = describe(config, Ranks(0, 2, 0, 2, torch.device("cpu")))
    assert plan is not None
    cost = cost_model(trainer.models, plan.model_config, fix_vit=True)
    packing, _ = measure(plan.reader, plan.sampler, plan.sampler.steps_per_epoch, cost, config)
    operations = operations_of(plan, some_pictures(plan, packing))
    assert operations is not None
    found = epoch_flops(operations, epoch_of(plan, packing, config, ranks=2))
    (flops,) = counted
    steps = (plan.sampler.samples(step) for step in range(plan.sampler.steps_per_epoch))
    samples = [(int(source), int(record)) for step in steps for source, record in step]
    parts = [flops.of(read_batch(plan.reader, [sample], packed=True)) for sample in samples]
    vision, language = map(sum, zip(*parts, strict=True))
    assert found[1] == language
    assert found[0] == pytest.approx(vision, rel=0.05)


def test_steps_of_a_measured_run_are_counted_and_tell_the_time(world):
    more = {"max_length": 128, "max_steps": 4, "per_device_train_batch_size": 4, "measure_mfu": True}
    argv = flags(world, "measured", **more, rehearse=False)
    run_ranks(1, train, argv)
    config = config_of(*argv, "--ranks", 1, "--measured", world / "measured")
    lines = config.measured_steps
    work, seconds = work_of_run(json.loads((world / "measured" / "run.json").read_text()), lines)
    assert [line["step"] for line in lines] == [2, 3, 4]
    assert work[:, 0] + work[:, 1] == pytest.approx([line["model_flops_language"] for line in lines])
    assert work[:, 2] == pytest.approx([line["model_flops_vision"] for line in lines])
    assert (work[:, 3:] == 1).all()
    assert (seconds < [line["seconds_step"] for line in lines]).all()
    run = measured_run(config)
    assert run is not None
    assert run.rates is not None
    assert run.rates @ work.mean(axis=0) == pytest.approx(seconds.mean(), rel=0.2)
    epoch = Epoch(1, tokens=0, slots=0, supervised=0, pairs=0, steps=100, rounds=1, idle=0.0)
    result = Forecast(1, FakeStep({}, {}, 0), epoch, None, 100, "", work.mean(axis=0))
    took, source = speed(config, result, run)
    assert took == pytest.approx(100 * seconds.mean(), rel=0.2)
    assert "3 steps" in source


@pytest.mark.parametrize(
    "rates",
    [
        pytest.param([1e-12, 1e-12, 1e-12, 0.01, 0.01], id="all alike"),
        pytest.param([1e-12, 3e-12, 1.5e-12, 0.02, 0.04], id="slow attention"),
        pytest.param([1e-12, 1e-12, 1e-12, 0.05, 0.05], id="a third takes the same in every step"),
    ],
)
def test_three_measured_steps_tell_the_time_of_other_lengths_and_pictures(rates):
    """Machines whose measurements vary by 3 %."""
    per_token, per_pair, per_slot = 6e7, 2e4, 2e7

    def work(lengths, slots):
        lengths = np.array(lengths)
        parts = per_token * lengths.sum(), per_pair * (lengths**2).sum(), per_slot * slots
        return np.array([*parts, 1, 1])

    cases = ([384] * 8, 144 * 5), ([400] * 8, 144 * 30), ([200] * 8, 0), ([1000] * 4, 144)
    others = np.array([work(*case) for case in cases])
    errors = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        lengths = [random.lognormal(np.log(300), 0.7, 8).clip(24, 1024) for _ in range(3)]
        steps = np.array([work(*step) for step in zip(lengths, (576, 720, 864), strict=True)])
        found = fit_rates(steps, (steps @ rates) * random.normal(1, 0.03, 3))
        assert (found >= 0).all()
        errors.append(others @ found / (others @ rates) - 1)
    assert np.sqrt(np.mean(np.square(errors), axis=0)).max() < 0.12


# --- at the start of a run -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_beside_the_run_tells_the_forecast_and_ends_with_the_run(world, tmp_path, capsys):
    argv = flags(world, tmp_path, max_steps=2, max_length=128)
    ranks = Ranks(0, 2, 0, 2, torch.device("cpu"))
    forecaster = at_start.Forecaster(parse(argv), ranks)
    forecaster.tell(tmp_path)
    forecaster.thread.join(120)
    assert json.loads((tmp_path / "forecast.json").read_text())["ranks"] == 2
    assert "forecast: a rank holds" in capsys.readouterr().err
    (world / "model" / "config.json").rename(tmp_path / "config.json")
    forecaster = at_start.Forecaster(parse(argv), ranks)
    forecaster.tell(tmp_path)
    forecaster.thread.join(120)
    (tmp_path / "config.json").rename(world / "model" / "config.json")
    assert "warning: no forecast of memory: DataError" in capsys.readouterr().err
    assert not (tmp_path / "forecast.json").exists()
    forecaster = at_start.Forecaster(parse(argv), ranks)
    assert forecaster.process.stdin is not None
    forecaster.process.stdin.close()
    assert forecaster.process.wait(60) == 1


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
        *(pytest.param(*case, marks=pytest.mark.slow) for case in forecast_gates.SLOW_CASES),
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
    before = json.loads(forecast_gates.RECORDED.read_text())["XComposer2-7B, 2 blocks, 64 ranks, full"]
    now = copy.deepcopy(before)
    now[forecast_gates.COLLECTIVES]["all-gather, all ranks"][0] += 2
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
    plan, _ = packing.plan(np.stack([np.zeros(16_384, np.int64), np.arange(16_384)], axis=1), 1024)
    rounds = len(plan[0])
    assert rounds <= -(-int(tokens.sum()) // (1024 * 4096)) + 1
    assert sum(looked_at) <= 2 * 16_384 * 1024 * rounds
