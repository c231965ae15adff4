"""What a disk or a file does to a run: a save is lost and not the run; what is damaged is named; nothing is
unpickled; a sample whose numbers are not finite costs its step."""

import ast
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import trainer.checkpoint
from tests.fault_cases import (
    STOPPED,
    Ranks,
    assert_same_model,
    at_step,
    fault_flags,
    model_with_bad_word,
    send,
)
from tests.tiny import ROOT, read_metrics, run_ranks
from trainer.checkpoint import crc32
from trainer.extras.replay import main as replay
from trainer.main import main


@pytest.fixture(scope="module")
def world(fault_world) -> Path:
    return fault_world


# --- the disk ---------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a flipped byte": ("resume/shard-00002*", flip_a_byte, "checksum differs from the one in complete.json"),
    "a flipped byte of the model": ("model.safetensors", flip_a_byte, "its checksum differs from the one"),
    "a truncated shard": ("resume/shard-00001*", cut_short, "bytes instead of"),
    "a missing rank": ("resume/shard-00002*", Path.unlink, "is missing"),
    "a foreign shard": (
        "resume/shard-00002*",
        lambda path: shutil.copy(path, path.parent / "x.safetensors"),
        "does not belong to the checkpoint",
    ),
    "no marker": ("complete.json", Path.unlink, "has no complete.json, so it was never finished"),
    "half a marker": ("complete.json", cut_short, "complete.json is damaged"),
}


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory) -> Path:
    """checkpoint-2 and checkpoint-3 of a run that stopped."""
    folder = tmp_path_factory.mktemp("stopped") / "run"

    def run(argv: list[str]) -> int:
        at_step(3, 0, lambda: send(signal.SIGTERM))
        return main(argv)

    run_ranks(2, run, fault_flags(world, folder), status=STOPPED)
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(name, marks=() if name in ("a flipped byte", "a foreign shard") else pytest.mark.slow)
        for name in DAMAGES
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(world, stopped, tmp_path, damage):
    pattern, spoil, said = DAMAGES[damage]
    shutil.copytree(stopped, tmp_path / "run")
    (path,) = (tmp_path / "run" / "checkpoint-3").glob(pattern)
    spoil(path)
    output, other = run_ranks(2, main, fault_flags(world, tmp_path / "run"))
    (line,) = [line for line in output.splitlines() if "is skipped: " in line]
    assert f"{tmp_path}/run/checkpoint-3 is skipped" in line
    assert said in line
    assert "after step 2 of 8" in output
    assert "is skipped" not in other
    assert_same_model(tmp_path / "run", world / "straight")


def test_with_no_usable_checkpoint_the_run_does_not_begin_anew_by_itself(world, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-*/complete.json"):
        path.unlink()
    output, _ = run_ranks(2, main, fault_flags(world, tmp_path / "run"), status=2)
    assert "none of the checkpoints" in output


def test_files_that_cannot_grow_cost_a_save_and_not_the_run(world, tmp_path):
    """A limit on the size of files, which any user can set, fails writes as a full disk does."""

    def limited(argv: list[str]) -> int:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

        at_step(4, int(os.environ["RANK"]), limit)
        return main(argv)

    ranks = Ranks(2, limited, fault_flags(world, tmp_path))
    assert not ranks.wait(60)
    output = ranks.output()
    ranks.end()
    assert [process.exitcode for process in ranks.processes] == [1, 1]
    assert f"warning: {tmp_path}/checkpoint-4 is not saved: rank 0: " in output
    assert "File too large" in output
    assert output.count(f"error: the trained model is not in {tmp_path}: rank 0: ") == 1
    assert "Traceback" not in output
    left = sorted(path.name for path in tmp_path.glob("*checkpoint-*"))
    assert left in (["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"])
    error = next(line for line in output.splitlines() if line.startswith("error: "))
    assert f"{tmp_path}/{left[-1]} holds step {left[-1][-1]}, and the same command resumes from it" in error
    output, _ = run_ranks(2, main, fault_flags(world, tmp_path))
    assert f"resuming from {tmp_path}/{left[-1]}" in output
    assert_same_model(tmp_path, world / "straight")


def test_a_stop_whose_save_fails_says_what_is_saved(world, tmp_path):
    def run(argv: list[str]) -> int:
        def limit_and_stop() -> None:
            while not (tmp_path / "checkpoint-3" / "complete.json").exists():  # whose save is under way
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            send(signal.SIGTERM)

        at_step(4, int(os.environ["RANK"]), limit_and_stop)
        return main(argv)

    output, _ = run_ranks(2, run, fault_flags(world, tmp_path), status=1)
    (line,) = [line for line in output.splitlines() if line.startswith("stopped after step 4 of 8")]
    assert f"{tmp_path}/checkpoint-3 holds step 3, and the same command resumes from it" in line


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", ["True", pytest.param("False", marks=pytest.mark.slow)])
def test_a_full_disk_costs_a_save_and_not_the_run(world, small_disk, asynchronous):
    def fill() -> None:
        kept, old = (small_disk / "run" / f"checkpoint-{step}" for step in (3, 1))
        while not kept.exists() or old.exists():  # a save under way takes and gives room
            time.sleep(0.01)
        with (small_disk / "ballast").open("wb") as file:
            file.write(b"x" * shutil.disk_usage(small_disk).free)

    def free() -> None:
        (small_disk / "ballast").unlink()

    def run(argv: list[str]) -> int:
        at_step(4, 0, fill)
        at_step(7, 0, free)
        return main(argv)

    output, _ = run_ranks(2, run, fault_flags(world, small_disk / "run", "--async_save", asynchronous))
    assert "checkpoint-4 is not saved" in output
    assert "No space left" in output
    assert "Traceback" not in output
    assert (small_disk / "run" / "checkpoint-7" / "complete.json").exists()
    assert [line["step"] for line in read_metrics(small_disk / "run")] == list(range(1, 9))
    assert_same_model(small_disk / "run", world / "straight")


def test_a_disk_with_room_for_the_model_alone_at_the_end_gets_the_model(world, small_disk):
    def fill() -> None:
        last, old = (small_disk / "run" / f"checkpoint-{step}" for step in (7, 5))
        while not last.exists() or old.exists() or old.with_name(f".removing-{old.name}").exists():
            time.sleep(0.01)
        room = 1.3 * sum(path.stat().st_size for path in last.iterdir() if path.is_file())
        with (small_disk / "ballast").open("wb") as file:
            file.write(b"x" * int(shutil.disk_usage(small_disk).free - room))

    def run(argv: list[str]) -> int:
        at_step(8, 0, fill)
        return main(argv)

    output, _ = run_ranks(2, run, fault_flags(world, small_disk / "run"))
    (warning,) = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert "checkpoint-8 is not saved" in warning
    assert "the trained model is written next" in warning
    assert f"{small_disk}/run/checkpoint-7 holds step 7" in warning
    assert_same_model(small_disk / "run", world / "straight")


def test_too_little_room_is_said_before_the_first_step(world, tmp_path):
    def run(argv: list[str]) -> int:
        usage = shutil.disk_usage(tmp_path)
        shutil.disk_usage = lambda path: usage._replace(free=1_000_000)
        return main(argv)

    output, other = run_ranks(2, run, fault_flags(world, tmp_path / "run"), status=2)
    assert "a save needs 0.0 GB, but 0.0 GB are free" in output
    assert "error" not in other


def test_a_read_only_folder_is_said_before_the_first_step(world):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("model", "data"):
            shutil.copytree(world / part, folder / part)
        (folder / "run").mkdir(mode=0o555)

        usage = shutil.disk_usage

        def usage_as_nobody(path: Path) -> Any:
            if os.getuid() == 0:  # whom no mode of a folder stops
                os.seteuid(65534)
            return usage(path)

        def run(argv: list[str]) -> int:
            shutil.disk_usage = usage_as_nobody  # which is asked before the first file is written
            return main(argv)

        output, _ = run_ranks(2, run, fault_flags(folder, folder / "run"), status=2)
        assert f"error: --output_dir {folder}/run: cannot be written: " in output
        assert "Permission denied" in output


def test_training_goes_on_while_a_slow_disk_is_written(world, tmp_path):
    events = tmp_path / "events"

    def run(argv: list[str]) -> int:
        save = trainer.checkpoint.save_tensors

        def slow(*args: Any, **kwargs: Any) -> Any:
            time.sleep(2)
            return save(*args, **kwargs)

        def note(what: str) -> Callable[[], None]:
            return lambda: events.open("a").write(what + "\n") and None

        trainer.checkpoint.save_tensors = slow
        remove = trainer.checkpoint.remove_old_checkpoints
        trainer.checkpoint.remove_old_checkpoints = lambda *args: (note("saved")(), remove(*args))
        for step in range(1, 9):
            at_step(step, 0, note(f"step {step}"))
        return main(argv)

    run_ranks(2, run, fault_flags(world, tmp_path / "run", "--save_steps", "3"))
    lines = events.read_text().split("\n")
    assert lines.index("step 6") < lines.index("saved") < lines.index("step 7")
    assert_same_model(tmp_path / "run", world / "straight")


# --- pickles ----------------------------------------------------------------------------------------------


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_in_a_checkpoint_is_never_opened(world, stopped, tmp_path):
    trap = tmp_path / "executed"
    pickle.loads(pickle.dumps(Malice(trap)))
    assert trap.exists()  # it would work
    trap.unlink()
    folder = Path(shutil.copytree(stopped, tmp_path / "run")) / "checkpoint-3"
    for name in ("optimizer.pt", "rng_state_0.pth", "pytorch_model.bin", "resume/.metadata", "resume/x.pkl"):
        (folder / name).write_bytes(pickle.dumps(Malice(trap)))
    run_ranks(2, main, fault_flags(world, tmp_path / "run"))
    assert_same_model(tmp_path / "run", world / "straight")
    again = Path(shutil.copytree(stopped, tmp_path / "again")) / "checkpoint-3"
    (shard,) = again.glob("resume/shard-00001*")
    shard.write_bytes(pickle.dumps(Malice(trap)))  # and the marker made to agree
    marker = json.loads((again / "complete.json").read_text())
    marker["files"][f"resume/{shard.name}"] = [shard.stat().st_size, crc32(shard)]
    (again / "complete.json").write_text(json.dumps(marker))
    ranks = Ranks(2, main, fault_flags(world, tmp_path / "again"))
    assert not ranks.wait(60)
    ranks.end()
    assert not trap.exists()
    assert f"error: {again}/resume: {shard.name} cannot be read: " in ranks.output()
    assert "Traceback" not in ranks.output()


def test_nothing_in_the_project_unpickles_a_file():
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    calls = {("torch", "load"), ("torch", "save"), ("yaml", "load"), ("yaml", "unsafe_load"), ("np", "load")}
    files = [*(ROOT / "trainer").rglob("*.py"), *(ROOT / "data").rglob("*.py")]
    assert len(files) > 30
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in calls, f"{path}:{node.lineno}"
            assert not forbidden & set(names), f"{path}:{node.lineno}"


# --- numbers that go wrong --------------------------------------------------------------------------------


def test_a_bad_sample_costs_its_step_and_replay_names_it(world, tmp_path, capsys):
    model = model_with_bad_word(world, tmp_path / "model", "w7")
    argv = fault_flags(world, tmp_path / "run", "--model_name_or_path", str(model), "--max_steps", "10")
    output, _ = run_ranks(2, main, argv)
    (capsule,) = (tmp_path / "run").glob("bad-step-*.json")
    content = json.loads(capsule.read_text())
    step = content["step"]
    assert f"warning: step {step} is skipped: its loss or gradient is not finite; see {capsule}" in output
    named = [s for rank in content["ranks"] for m in rank["micro_batches"] for s in m]
    assert {"source": "text", "path": str(world / "data" / "text.json"), "record": 7} in named
    lines = {line["step"]: line for line in read_metrics(tmp_path / "run")}
    assert [line["skipped_steps"] for line in lines.values()] == [int(s == step) for s in range(1, 11)]
    assert lines[step]["loss"] is None
    assert lines[step + 1 if step < 10 else step - 1]["loss"] > 0
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    bad = tensors.pop("model.tok_embeddings.weight")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert (~bad.isfinite()).any(1).sum() == 1
    assert replay([str(capsule)]) == 1
    shown = capsys.readouterr().out
    assert f"{world}/data/text.json: record 7 (id 'text-7'): loss nan" in shown
    assert shown.count("record") > shown.count("nan, gradient norm nan") - 1
    assert replay([str(capsule), "--weights", str(world / "model")]) == 0  # the weights were to blame


def test_too_many_bad_steps_in_a_row_end_the_run(world, tmp_path):
    model = model_with_bad_word(world, tmp_path / "model", "user")
    more = ["--model_name_or_path", str(model), "--max_bad_steps", "2"]
    output, other = run_ranks(2, main, fault_flags(world, tmp_path / "run", *more), status=1)
    assert "2 steps in a row were not finite" in output
    assert len(list((tmp_path / "run").glob("bad-step-*.json"))) == 2
    assert "Traceback" not in output + other
