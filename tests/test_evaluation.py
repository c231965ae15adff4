"""Evaluations measure the same on any number of ranks, change nothing in the training, answer as the saved
model does, and decide which model is kept and when to stop, also across kills and changes of ranks."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import trainer.evaluate
import trainer.generate
from data.batch import collate
from data.mixture import read_mixture
from tests.fault_cases import STOPPED, Ranks, main_stopped_after, send
from tests.tiny import flags, read_metrics, run_ranks, tiny_data, tiny_world
from tests.tiny_models import tiny_folder
from trainer.main import main
from trainer.stopping import StopRequest


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tiny_world(tmp_path_factory.mktemp("evaluation"), samples=24)
    tiny_data(folder / "eval", samples=10)
    return folder


def eval_flags(world: Path, output_dir: str | Path, *more: str, **changes: Any) -> list[str]:
    """Four steps of 6 samples with dropout, an evaluation after every second one and before the first."""
    options = {"max_steps": 4, "per_device_train_batch_size": 3, "plora_dropout": 0.2, "fix_vit": False}
    eval_txt = os.path.relpath(world / "eval" / "data.txt")
    options |= {"eval_data_path": eval_txt, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"eval_on_start": True, "eval_generate": 3, "eval_max_new_tokens": 6}
    return flags(world, output_dir, *more, **{**options, **changes})


def evaluations(output_dir: Path) -> list[dict]:
    lines = read_metrics(output_dir, "eval")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def answers(output_dir: Path, step: int) -> list[dict]:
    return [
        json.loads(line) for line in (output_dir / "eval" / f"step-{step}.jsonl").read_text().splitlines()
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    assert found
    return found


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def two_ranks(world):
    run_ranks(2, main, eval_flags(world, "two", save_strategy="steps", save_steps=2))
    return world / "two"


def test_the_loss_is_the_mean_over_the_supervised_tokens_of_the_base_model(world, two_ranks):
    """Against the model's own forward pass, a sample at a time."""
    import trainer.models
    from data.config import DataConfig
    from data.reader import open_reader

    config = DataConfig(str(world / "model"), data_path=str(world / "eval" / "data.txt"))
    reader, model_config = open_reader(config, read_mixture(config.data_path), trainer.models)
    model = trainer.models.answering_class(model_config).from_pretrained(world / "model").eval()
    losses: dict[str, list[torch.Tensor]] = {}
    for number, source in enumerate(reader.sources):
        for record in range(len(source.records)):
            sample, images = reader.read(number, record)
            batch = collate([sample], reader.batch(images), [(number, record)], reader.encoder.pad_id)
            with torch.no_grad():
                losses.setdefault(source.name, []).append(model(**batch.inputs).token_losses)
    first = evaluations(two_ranks)[0]
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(
        torch.cat([*itertools.chain(*losses.values())]).mean().item(), rel=1e-6
    )
    for name, found in losses.items():
        assert first["loss_by_source"][name] == pytest.approx(torch.cat(found).mean().item(), rel=1e-6)
    assert first["samples"] == sum(map(len, losses.values()))


UNEVEN = {"per_device_train_batch_size": 2, "global_batch_size": 7}
"""7 samples on 3 ranks."""


@pytest.mark.parametrize("ranks", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_any_number_of_ranks_measures_and_answers_the_same(world, two_ranks, ranks):
    batch = {1: {"per_device_train_batch_size": 6}, 3: UNEVEN, 4: {"per_device_train_batch_size": 1}}[ranks]
    run_ranks(ranks, main, eval_flags(world, f"ranks-{ranks}", max_steps=1, **batch))
    ours, theirs = evaluations(world / f"ranks-{ranks}")[0], evaluations(two_ranks)[0]
    assert ours["step"] == theirs["step"] == 0
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["loss_by_source"] == pytest.approx(theirs["loss_by_source"], rel=1e-6)
    assert ours["metrics"] == theirs["metrics"]
    assert answers(world / f"ranks-{ranks}", 0) == answers(two_ranks, 0)


def test_evaluating_changes_no_bit_of_the_training(world, two_ranks):
    changes = {"eval_data_path": None, "eval_on_start": None, "eval_generate": None}
    run_ranks(2, main, eval_flags(world, "without", save_strategy="steps", save_steps=2, **changes))
    with_evaluation, without = read_metrics(two_ranks), read_metrics(world / "without")
    for ours, theirs in zip(with_evaluation, without, strict=True):
        for name in ("loss", "grad_norm", "loss_by_source", "tokens", "learning_rate"):
            assert ours[name] == theirs[name], (ours["step"], name)
    assert not evaluations(world / "without")
    assert_same_weights(two_ranks, world / "without")
    ours, theirs = (weights(folder / "checkpoint-4" / "resume") for folder in (two_ranks, world / "without"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours), "parameters and AdamW's moments"


def test_a_resumed_run_evaluates_as_the_straight_one(world, two_ranks):
    argv = eval_flags(world, "resumed", save_strategy="steps", save_steps=2)
    run_ranks(2, main_stopped_after, 3, argv, status=STOPPED)
    run_ranks(2, main, argv)
    assert evaluations(world / "resumed") == evaluations(two_ranks)
    assert [answers(world / "resumed", step) for step in (0, 2, 4)] == [
        answers(two_ranks, step) for step in (0, 2, 4)
    ]
    assert_same_weights(world / "resumed", two_ranks)


def block_by_block(argv: list[str]) -> int:
    """A run whose model does not fit a rank whole."""
    trainer.evaluate.fits_whole = lambda *_: False
    return main(argv)


def on_two_nodes(argv: list[str]) -> int:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % 2)
    return main(argv)


CASES: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "whole": (2, main, {}),
    "block by block": (2, block_by_block, {}),
    "hybrid": (4, on_two_nodes, {"sharding": "hybrid", "per_device_train_batch_size": 1}),
    "base whole": (2, main, {"use_lora": True, "sharding": "none", "fix_vit": True, "lora_r": 4}),
    "bfloat16": (2, main, {"bf16": True}),
}


IN_THE_FAST_SUITE = ("whole", "block by block")
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in IN_THE_FAST_SUITE]


@pytest.mark.parametrize("case", [*IN_THE_FAST_SUITE, *SLOW])
def test_answers_are_those_of_the_saved_model(world, tmp_path, case):
    ranks, function, changes = CASES[case]
    changes = {"max_steps": 2, "learning_rate": 1e-2, "eval_on_start": False, **changes}
    run_ranks(ranks, function, eval_flags(world, tmp_path / "run", **changes))
    rows = answers(tmp_path / "run", 2)
    assert len(rows) == 9
    assert len({row["prediction"] for row in rows}) > 1
    for source in ("colour", "both", "text"):
        argv = ["--model_name_or_path", str(tmp_path / "run"), "--max_new_tokens", "6"]
        argv += [
            "--data_path",
            str(world / "eval" / f"{source}.json"),
            "--bf16",
            str(changes.get("bf16", False)),
        ]
        run_ranks(1, trainer.generate.main, [*argv, "--output", str(tmp_path / f"{source}.jsonl")])
        lines = [json.loads(line) for line in (tmp_path / f"{source}.jsonl").read_text().splitlines()]
        for row in rows:
            if row["source"] == source:
                assert row["prediction"] == lines[row["record"]]["prediction"], row
                assert row["answer"] == lines[row["record"]]["answer"]


def test_another_family_answers_a_fixed_part_of_a_file_and_that_changes_no_bit_of_its_training(
    world, tmp_path
):
    """Qwen2.5-VL, which keeps from an answer how far the pictures have moved the positions of the text."""
    tiny_folder("qwen2_5_vl", tmp_path / "model")
    (tmp_path / "eval.txt").write_text(f'"{world}/eval/colour.json" 0.004\n')
    changes = {"model_name_or_path": tmp_path / "model", "plora_dropout": None, "learning_rate": 1e-2}
    evaluated = {"eval_data_path": tmp_path / "eval.txt", "eval_on_start": True, "eval_generate": 9}
    without = {"eval_data_path": None, "eval_on_start": None, "eval_generate": None}
    for name, more in (("with", evaluated), ("without", without)):
        run_ranks(2, main, eval_flags(world, tmp_path / name, **changes, **more))
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    assert [line["samples"] for line in evaluations(tmp_path / "with")] == [4, 4, 4]
    first, _, last = (answers(tmp_path / "with", step) for step in (0, 2, 4))
    assert [row["record"] for row in first] == [row["record"] for row in last]
    assert len({row["record"] for row in last}) == 4
    assert [row["prediction"] for row in first] != [row["prediction"] for row in last]
    argv = ["--model_name_or_path", tmp_path / "with", "--max_new_tokens", 6, "--bf16", False]
    argv += ["--data_path", world / "eval" / "colour.json", "--output", tmp_path / "saved.jsonl"]
    run_ranks(1, trainer.generate.main, [*map(str, argv)])
    saved = [json.loads(line) for line in (tmp_path / "saved.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in last] == [saved[row["record"]]["prediction"] for row in last]


def test_rows_of_answers_are_scored_and_name_their_images(two_ranks):
    (line, *_) = evaluations(two_ranks)
    assert line["metrics"].keys() == {"colour", "both", "text"}
    for row in answers(two_ranks, 0):
        assert row.keys() >= {
            "source",
            "record",
            "id",
            "question",
            "answer",
            "prediction",
            "scores",
            "images",
        }
        assert row["scores"].keys() == {"exact_match", "token_f1"}
        assert all(Path(image).is_absolute() and Path(image).is_file() for image in row["images"])
        assert len(row["images"]) == {"colour": 1, "both": 2, "text": 0}[row["source"]]


def stop_flags(world: Path, output_dir: str | Path, **changes: Any) -> list[str]:
    """A run that gets worse: its learning rate is far too high after the first steps."""
    options = {
        "max_steps": 8,
        "eval_steps": 1,
        "eval_generate": 0,
        "eval_on_start": False,
        "plora_dropout": 0,
    }
    options |= {"learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_ratio": 0.4}
    options |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    options |= {"load_best_model_at_end": True, "max_grad_norm": 0}
    return eval_flags(world, output_dir, **{**options, **changes})


def test_the_trained_model_is_the_best_one_and_no_limit_removes_it(world, tmp_path):
    run_ranks(2, main, stop_flags(world, tmp_path))
    losses = {line["step"]: line["loss"] for line in evaluations(tmp_path)}
    best = min(losses, key=lambda step: losses[step])
    assert best < 8, losses
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        f"checkpoint-{best}",
        "checkpoint-8",
    ]
    assert_same_weights(tmp_path, tmp_path / f"checkpoint-{best}")
    output, _ = run_ranks(2, main, stop_flags(world, tmp_path))
    assert "nothing to do" in output


def killed_in(step: int, argv: list[str]) -> int:
    """The run, of which rank 1 dies in the step. `at_step` would count the steps of evaluations too."""
    asked, calls = StopRequest.asked, itertools.count(1)

    def asked_or_killed(self: StopRequest) -> bool:
        if next(calls) == step and os.environ["RANK"] == "1":
            send(signal.SIGKILL)
        return asked(self)

    StopRequest.asked = asked_or_killed
    return main(argv)


def test_early_stopping_goes_on_across_a_kill_and_other_ranks(world, tmp_path):
    argv = stop_flags(world, tmp_path / "straight", early_stopping_patience=2)
    output, _ = run_ranks(2, main, argv)
    assert "early stopping after step" in output
    straight = evaluations(tmp_path / "straight")
    last = straight[-1]["step"]
    assert last < 8
    best = min(straight, key=lambda line: line["loss"])["step"]
    assert last == best + 2
    assert_same_weights(tmp_path / "straight", tmp_path / "straight" / f"checkpoint-{best}")
    output, _ = run_ranks(2, main, argv)
    assert "nothing to do" in output

    options = {"early_stopping_patience": 2, "async_save": False}
    ranks = Ranks(2, killed_in, last, stop_flags(world, tmp_path / "run", **options))
    assert not ranks.wait(60), ranks.output()
    ranks.end()
    assert ranks.processes[1].exitcode == -signal.SIGKILL, ranks.output()
    argv = stop_flags(world, tmp_path / "run", per_device_train_batch_size=2, **options)
    output, *_ = run_ranks(3, main, argv)
    assert f"checkpoint-{last - 1}, after step {last - 1}" in output
    assert [line["step"] for line in evaluations(tmp_path / "run")] == [line["step"] for line in straight]
    assert_same_weights(tmp_path / "run", tmp_path / "run" / f"checkpoint-{best}")


@pytest.mark.slow
def test_the_best_is_saved_even_where_no_checkpoint_is_due(world, tmp_path):
    changes = {"save_strategy": "no", "save_steps": None, "save_total_limit": None}
    run_ranks(2, main, stop_flags(world, tmp_path, **changes))
    losses = {line["step"]: line["loss"] for line in evaluations(tmp_path)}
    best = min(losses, key=lambda step: losses[step])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{best}"]
    assert_same_weights(tmp_path, tmp_path / f"checkpoint-{best}")


def test_problems_of_the_samples_and_of_the_flags_are_reported_together(world, tmp_path):
    bad = [{"id": "gone", "image": ["gone.png"], "conversations": []}, {"id": "x"}]
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    argv = eval_flags(
        world, tmp_path / "run", eval_data_path=tmp_path / "bad.json", data_path=tmp_path / "no"
    )
    output = run_ranks(1, main, argv, status=2)[0]
    assert "--data_path" in output
    argv = eval_flags(world, tmp_path / "run", eval_data_path=tmp_path / "bad.json")
    output = run_ranks(1, main, argv, status=2)[0]
    assert "record 0" in output
    assert "record 1" in output
    argv = eval_flags(world, tmp_path / "run", eval_metrics=["exact_mach"], metric_for_best_model="los")
    output = run_ranks(1, main, argv, status=2)[0]
    assert "did you mean exact_match?" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad", ["gone.png", "cut.png", "no answer"])
def test_an_image_that_is_missing_or_cut_off_or_no_answer_is_a_problem_or_left_out(world, tmp_path, bad):
    noise = Image.effect_noise((90, 90), 64)
    noise.save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    records = json.loads((world / "eval" / "colour.json").read_text())
    if bad == "no answer":
        records[3]["conversations"].append({"from": "user", "value": "And now?"})
    else:
        records[3]["image"] = [str(tmp_path / bad)]
    (tmp_path / "colour.json").write_text(json.dumps(records))
    changes = {"eval_data_path": tmp_path / "colour.json", "image_root": world / "eval", "eval_generate": 10}
    changes |= {
        "max_steps": 1,
        "data_path": world / "data" / "text.json",
        "fix_vit": True,
        "fix_sampler": True,
    }
    output = run_ranks(1, main, eval_flags(world, tmp_path / "run", **changes), status=2)[0]
    assert ("does not end with an assistant's turn" if bad == "no answer" else bad) in output
    assert "colour-3" in output
    run_ranks(1, main, eval_flags(world, tmp_path / "run", on_bad_sample="skip", **changes))
    assert len(answers(tmp_path / "run", 0)) == 9
    # The loss is over all answers, wherever they are in a conversation.
    assert evaluations(tmp_path / "run")[0]["samples"] == (10 if bad == "no answer" else 9)
