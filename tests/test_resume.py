"""A run that stops and goes on is the run that never stopped: bit by bit on as many ranks, and on others the
same batches in the same order; and what would make it another run is refused."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.loader import StepLoader
from tests.fault_cases import STOPPED, in_every_step, main_stopped_after, send
from tests.tiny import flags, read_metrics, run_ranks, tiny_world
from trainer.checkpoint import Checkpoints
from trainer.config import Config
from trainer.lock import Lock
from trainer.main import main
from trainer.resume import changes, drop_later_lines

TIMES = ("_per_second", "seconds_", "memory_peak_bytes")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("resume"), samples=24)


def resume_flags(world: Path, output_dir: str | Path, *more: str, **changes: Any) -> list[str]:
    """Eight steps, of which five are an epoch; everything trains, dropout on, a save every third step."""
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    options |= {"fix_vit": False, "plora_dropout": 0.2, "gradient_checkpointing": False, "warmup_ratio": 0.2}
    options |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    return flags(world, output_dir, *more, **{**options, **changes})


def main_that_logs_samples(log: Path, stop_after: int, argv: list[str]) -> int:
    """The run, asked to stop after a step or not; `log` gets the samples of every step that is planned."""
    plan = StepLoader.plan

    def logged_plan(self: StepLoader, step: int) -> list:
        if self._rank == 0:
            with log.open("a") as file:
                file.write(json.dumps([step, self._sampler.samples(step).tolist()]) + "\n")
        return plan(self, step)

    StepLoader.plan = logged_plan
    return main_stopped_after(stop_after, argv)


def without_times(output_dir: Path) -> list[dict]:
    return [
        {k: v for k, v in line.items() if not any(t in k for t in TIMES)} for line in read_metrics(output_dir)
    ]


def assert_same_run(a: Path, b: Path) -> None:
    assert without_times(a) == without_times(b)
    names = sorted(path.name for path in a.glob("*.safetensors"))
    assert names
    for name in names:
        ours, theirs = load_file(a / name), load_file(b / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


CASES = {
    "deterministic, checkpointed": ["--gradient_checkpointing", "True", "--deterministic", "True"],
    "bfloat16 with workers": ["--bf16", "True", "--dataloader_num_workers", "1", "--async_save", "False"],
    "adapters": ["--fix_vit", "True", "--use_lora", "True", "--lora_dropout", "0.1", "--lora_r", "4"],
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=() if "checkpointed" in name else pytest.mark.slow) for name in CASES],
)
def test_stopping_twice_changes_no_bit(world, case):
    name, more = case.replace(" ", "-").replace(",", ""), CASES[case]
    run_ranks(2, main, resume_flags(world, f"{name}-straight", *more))
    run_ranks(2, main_stopped_after, 4, resume_flags(world, name, *more), status=STOPPED)
    run_ranks(2, main_stopped_after, 1, resume_flags(world, name, *more), status=STOPPED)
    output, _ = run_ranks(2, main, resume_flags(world, name, *more))
    assert "checkpoint-5, after step 5 of 8" in output
    assert_same_run(world / name, world / f"{name}-straight")


def test_other_numbers_of_ranks_train_on_the_same_batches(world, tmp_path):
    """4 → 2 → 1 → 3 ranks; 12 samples a step a step, in the order and with the losses of a straight run."""
    more = ["--plora_dropout", "0", "--adam_epsilon", "1e-5", "--logging_steps", "1"]
    straight, changing = tmp_path / "straight.log", tmp_path / "changing.log"

    run_ranks(2, main_that_logs_samples, straight, 0, resume_flags(world, "same", *more))
    shares = {"gradient_accumulation_steps": None, "global_batch_size": 12}
    argv = resume_flags(world, "ranks", *more, **shares)
    for ranks, steps in ((4, 2), (2, 1), (1, 3)):
        run_ranks(ranks, main_that_logs_samples, changing, steps, argv, status=STOPPED)
    output, *_ = run_ranks(3, main_that_logs_samples, changing, 0, argv)
    assert "1 ranks then, 3 now" in output
    expected = [json.loads(line) for line in straight.read_text().splitlines()]
    assert [step for step, _ in expected] == list(range(8))
    planned = [json.loads(line) for line in changing.read_text().splitlines()]
    trained = [line for number, line in enumerate(planned) if line not in planned[:number]]
    assert trained == expected
    for ours, theirs in zip(read_metrics(world / "ranks"), read_metrics(world / "same"), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    a, b = (load_file(world / name / "model.safetensors") for name in ("ranks", "same"))
    for key, tensor in a.items():
        assert torch.allclose(tensor, b[key], atol=1e-5), key


@pytest.fixture(scope="module")
def stopped(world):
    """A run of two ranks that stopped after step 4: checkpoint-3 and checkpoint-4."""
    run_ranks(2, main_stopped_after, 4, resume_flags(world, "stopped"), status=STOPPED)
    assert sorted(path.name for path in (world / "stopped").glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-4",
    ]
    return world / "stopped"


@pytest.fixture
def copy(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def test_a_changed_training_is_refused_with_every_change(world, copy):
    more = ["--learning_rate", "2e-3", "--seed", "1", "--logging_steps", "1"]
    output, other = run_ranks(2, main, resume_flags(world, copy, *more), status=2)
    assert f"{copy}/checkpoint-4 belongs to a different training:" in output
    assert "--learning_rate was 0.001 and is 0.002" in output
    assert "--seed was 42 and is 1" in output
    assert "since" in output  # the harmless change is noted
    assert "--logging_steps was 2 and is 1" in output
    assert "Traceback" not in output + other
    output, _ = run_ranks(2, main, resume_flags(world, copy, *more, "--resume_anyway", "True"))
    assert "resuming in spite of a change: --seed was 42 and is 1" in output


def test_fewer_ranks_are_told_how_to_keep_the_global_batch(world, copy):
    argv = resume_flags(world, copy)
    (output,) = run_ranks(1, main, argv, status=2)
    assert "the global batch was 12 samples and is 6; keep it with --gradient_accumulation_steps 4" in output
    (output,) = run_ranks(1, main, [*argv, "--gradient_accumulation_steps", "4"])
    assert "resuming from" in output


def test_changed_data_is_refused_and_moved_data_is_not(world, copy, tmp_path):
    moved = Path(shutil.copytree(world / "data", tmp_path / "moved"))
    argv = resume_flags(world, copy, "--data_path", str(moved / "data.txt"))
    run_ranks(2, main_stopped_after, 1, argv, status=STOPPED)
    records = json.loads((moved / "text.json").read_text())
    records[5]["conversations"][1]["value"] = "w77 w77"
    (moved / "text.json").write_text(json.dumps(records))
    output, _ = run_ranks(2, main, argv, status=2)
    assert f"the data of {moved}/text.json has changed" in output


def test_a_finished_run_says_so_and_touches_nothing(world, copy):
    argv = resume_flags(world, copy)
    run_ranks(2, main, argv)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    output, _ = run_ranks(2, main, argv)
    assert "holds the finished model of this run, after step 8: nothing to do" in output
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*")}


def test_an_older_start_beside_a_later_checkpoint_is_refused(world, copy):
    for start in ("none", str(copy / "checkpoint-3")):
        argv = resume_flags(world, copy, "--resume_from_checkpoint", start)
        output, _ = run_ranks(2, main, argv, status=2)
        assert f"{copy}/checkpoint-4 is from a later step than this run would start from" in output


def test_a_named_checkpoint_starts_a_run_in_another_folder(world, copy, tmp_path):
    straight = tmp_path / "straight"
    run_ranks(2, main, resume_flags(world, straight))
    branch = tmp_path / "branch"
    start = ["--resume_from_checkpoint", str(copy / "checkpoint-4")]
    run_ranks(2, main, resume_flags(world, branch, *start))
    assert (branch / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(world, copy):
    argv = resume_flags(world, copy, "--resume_from_checkpoint")
    for named, said in (
        ("nope", "--resume_from_checkpoint nope: there is no such folder"),
        (str(world / "model"), f"{world}/model has no complete.json, so it was never finished"),
    ):
        output, _ = run_ranks(2, main, [*argv, named], status=2)
        (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert said in error
        assert f"{copy} has checkpoint-4, checkpoint-3" in error


def test_a_branch_with_another_learning_rate_is_what_the_readme_says(world, copy, tmp_path):
    changed = {"learning_rate": 5e-4, "lr_scheduler_type": "constant", "logging_steps": 1}
    start = {"resume_from_checkpoint": copy / "checkpoint-3"}
    argv = resume_flags(world, tmp_path / "branch", **start, **changed)
    output, _ = run_ranks(2, main, argv, status=2)
    assert "--learning_rate was 0.001 and is 0.0005" in output
    assert "--resume_anyway True resumes all the same" in output
    assert not (tmp_path / "branch").exists()
    run_ranks(2, main, [*argv, "--resume_anyway", "True"])
    lines = read_metrics(tmp_path / "branch")
    assert [line["step"] for line in lines] == [4, 5, 6, 7, 8]
    assert {line["learning_rate"] for line in lines} == {5e-4}


def test_a_branch_that_torchrun_starts_again_before_its_first_save_is_the_same_branch(world, copy, tmp_path):
    def main_started_again(argv: list[str]) -> int:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
        return main(argv)

    argv = resume_flags(world, tmp_path / "branch", resume_from_checkpoint=copy / "checkpoint-4")
    output, _ = run_ranks(2, main_started_again, argv)
    assert f"resuming from {copy}/checkpoint-4, after step 4" in output


# --- the last step, and longer trainings ------------------------------------------------------------------


CONSTANT = ["--lr_scheduler_type", "constant", "--save_strategy", "epoch"]


def test_a_finished_run_can_be_extended_and_is_then_the_longer_run(world, tmp_path):
    def argv(name: str, epochs: str) -> list[str]:
        return resume_flags(world, tmp_path / name, *CONSTANT, max_steps=-1, num_train_epochs=epochs)

    run_ranks(2, main, argv("long", "1.2"))
    run_ranks(2, main, argv("run", "0.6"))  # 3 of the 5 steps of an epoch
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    output, _ = run_ranks(2, main, argv("run", "1.2"))
    assert f"resuming from {tmp_path}/run/checkpoint-3, after step 3 of 6" in output
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "long"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert read_metrics(tmp_path / "run")[-1]["step"] == 6
    assert not list((tmp_path / "run").glob("metrics-*"))


def test_an_extension_that_changes_the_learning_rates_is_refused_with_the_flag_that_insists(world, tmp_path):
    argv = resume_flags(world, tmp_path, "--max_steps")
    run_ranks(2, main, [*argv, "2"])
    before = (tmp_path / "model.safetensors").read_bytes()
    output, _ = run_ranks(2, main, [*argv, "4"], status=2)
    assert "total_steps was 2 and is 4, which changes the learning rate" in output
    assert "--resume_anyway True resumes all the same" in output
    assert (tmp_path / "model.safetensors").read_bytes() == before
    output, _ = run_ranks(2, main, [*argv, "4", "--resume_anyway", "True"])
    assert "resuming from" in output
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4]


def test_a_finished_model_without_a_checkpoint_is_not_replaced_by_a_longer_training(world, tmp_path):
    argv = resume_flags(world, tmp_path, *CONSTANT, "--save_strategy", "no", "--max_steps")
    run_ranks(2, main, [*argv, "2"])
    before = (tmp_path / "model.safetensors").read_bytes()
    output, _ = run_ranks(2, main, [*argv, "3"], status=2)
    assert f"{tmp_path} holds the finished model of step 2 of 3 and no checkpoint to resume from" in output
    assert (tmp_path / "model.safetensors").read_bytes() == before
    output, _ = run_ranks(2, main, [*argv, "3", "--resume_from_checkpoint", "none"])
    assert "starting from scratch" in output
    assert (tmp_path / "model.safetensors").read_bytes() != before


def test_the_last_checkpoint_and_the_final_model_share_their_weights_on_the_disk(world, tmp_path):
    run_ranks(2, main, resume_flags(world, tmp_path, "--max_steps", "2"))
    model, checkpoint = tmp_path / "model.safetensors", tmp_path / "checkpoint-2" / "model.safetensors"
    assert model.stat().st_ino == checkpoint.stat().st_ino
    assert (tmp_path / "config.json").stat().st_ino != (checkpoint.parent / "config.json").stat().st_ino
    listed = json.loads((tmp_path / "complete.json").read_text())
    assert listed["step"] == 2
    assert {"config.json", "model.safetensors"} <= listed["files"].keys() <= set(os.listdir(tmp_path))
    assert not (tmp_path / "resume").exists()


def test_an_attempt_that_starts_from_scratch_says_so_and_keeps_the_metrics_before_it(world, tmp_path):
    """Killed before its first save; twice."""
    argv = resume_flags(world, tmp_path, "--save_steps", "100", "--logging_steps", "1")
    for number in (1, 2):
        run_ranks(2, main_killed_after, 3, argv, status=-signal.SIGKILL)
        output, _ = run_ranks(2, main_killed_after, 2, argv, status=-signal.SIGKILL)
        assert f"starting from scratch: {tmp_path} has no checkpoints" in output
        assert f"earlier metrics were moved to {tmp_path}/metrics-{2 * number - 1}.jsonl" in output
    steps = [len((tmp_path / f"metrics-{n}.jsonl").read_text().splitlines()) for n in (1, 2, 3)]
    assert steps == [3, 2, 3]


def main_killed_after(step: int, argv: list[str]) -> int:
    def kill(number: int, rank: int) -> None:
        if number == step + 1:
            torch.distributed.barrier()
            send(signal.SIGKILL)

    in_every_step(kill)
    return main(argv)


def test_lines_of_steps_that_will_be_done_again_are_dropped(tmp_path):
    lines = [json.dumps({"kind": kind, "step": step}) for step in (1, 2, 3) for kind in ("train", "eval")]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tr')  # killed while writing
    drop_later_lines(tmp_path / "metrics.jsonl", 2)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:4]


def test_only_the_newest_checkpoints_stay_and_an_epoch_and_the_last_step_end_in_one(world, tmp_path):
    more = ["--save_strategy", "epoch", "--save_total_limit", "2"]
    run_ranks(2, main, resume_flags(world, tmp_path, *more, "--max_steps", "16"))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-16"]


def test_what_a_run_killed_after_its_last_save_did_not_remove_goes_when_it_is_finished(world, tmp_path):
    more = ["--save_total_limit", "1", "--max_steps", "3", "--save_steps", "1"]
    run_ranks(2, main, resume_flags(world, tmp_path, *more))
    (tmp_path / "complete.json").unlink()  # killed before the model was in its place
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-2")
    run_ranks(2, main, resume_flags(world, tmp_path, *more))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert (tmp_path / "complete.json").exists()


def test_minutes_make_a_save_too(world, tmp_path):
    more = ["--save_strategy", "no", "--save_minutes", "0.001"]
    output, _ = run_ranks(2, main, resume_flags(world, tmp_path, *more))
    assert "first checkpoint after 0.001 minutes" in output
    assert list(tmp_path.glob("checkpoint-*"))


def test_a_checkpoint_of_the_clock_goes_when_the_next_is_complete_and_those_of_the_strategy_stay(
    world, tmp_path
):
    more = ["--save_minutes", "1e-6", "--async_save", "False"]
    output, _ = run_ranks(2, main, resume_flags(world, tmp_path, *more))
    assert "first checkpoint after step 3 or 1e-06 minutes" in output
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert left == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize(
    ("strategy", "minutes", "said"),
    [
        ("epoch", None, "first checkpoint after step 63 or 30 minutes"),
        ("steps", None, "first checkpoint after step 20 or 30 minutes"),
        ("steps", 5.0, "first checkpoint after step 20 or 5 minutes"),
        ("no", 5.0, "first checkpoint after 5 minutes"),
        ("no", None, "no checkpoints (--save_strategy no): if this run is killed, it starts from scratch"),
    ],
)
def test_the_start_says_when_the_first_save_comes(tmp_path, monkeypatch, strategy, minutes, said):
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    config = Config(output_dir=str(tmp_path), save_strategy=strategy, save_minutes=minutes, save_steps=10)
    checkpoints = Checkpoints({}, config, Lock(tmp_path), steps_per_epoch=63, last_step=63)
    assert checkpoints.first_save(done=12) == said
    assert checkpoints.is_due(63) is (strategy != "no")


def run_file(**changed) -> dict:
    config = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "save_steps": 10,
        "data_path": "a.txt",
    }
    source = {"path": "a.json", "records": 10, "samples_per_epoch": 10, "fingerprint": "10-ab"}
    run = {"config": config, "global_batch": 16, "total_steps": 100, "warmup_steps": 3, "ranks": 4}
    run |= {"data_plan": [source], "base_checksum": "00", "versions": {"torch": "2.13.0"}}
    for name, value in changed.items():
        run["config" if name in config else name] = {**config, name: value} if name in config else value
    return run


@pytest.mark.parametrize(
    ("changed", "harmful", "said"),
    [
        ({"learning_rate": 2e-5}, True, "--learning_rate was 1e-05 and is 2e-05"),
        ({"save_steps": 20}, False, "--save_steps was 10 and is 20"),
        ({"data_path": "b.txt"}, False, "--data_path was a.txt and is b.txt"),
        ({"total_steps": 200}, True, "total_steps was 100 and is 200"),
        ({"base_checksum": "01"}, True, "the base model has other weights"),
        ({"data_plan": []}, True, "the data had 1 files and has 0"),
        ({"ranks": 3, "global_batch": 12}, True, "3 ranks cannot share 16 evenly: use 1, 2, 4, 8, 16 ranks"),
        ({"ranks": 3, "global_batch": 12}, True, "or --global_batch_size 16, which allows any number"),
        ({"ranks": 8, "global_batch": 32}, True, "keep it with --gradient_accumulation_steps 1"),
        (
            {"ranks": 16, "global_batch": 32},
            True,
            "keep it with --gradient_accumulation_steps 1 --per_device_train_batch_size 1",
        ),
        ({"versions": {"torch": "2.14.0"}}, False, "torch was 2.13.0 and is 2.14.0"),
    ],
)
def test_changes_are_told_apart(changed, harmful, said):
    found = changes(run_file(), run_file(**changed))
    assert any(said in change for change in found[harmful])
    assert not found[1] or harmful


def test_a_longer_training_is_the_same_where_the_rate_is_constant():
    config = {**run_file()["config"], "lr_scheduler_type": "constant"}
    old, new = ({**run_file(total_steps=steps), "config": config} for steps in (100, 200))
    assert changes(old, new)[1] == []
