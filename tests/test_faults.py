"""Whatever ends a run, the work up to the last complete checkpoint is kept, and the same command goes on."""

import ast
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trainer.checkpoint
import trainer.main
from tests.tiny import ROOT, _rank, free_port, read_metrics, run_ranks, tiny_data, tiny_model
from trainer.checkpoint import crc32
from trainer.main import main
from trainer.replay import main as replay

STOPPED = 75


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model, data, and `straight`: the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("faults")
    tiny_model(folder / "model")
    tiny_data(folder / "data", samples=24)
    run_ranks(2, main, flags(folder, folder / "straight"))
    return folder


def flags(folder: Path, output_dir: Path, *more: str) -> list[str]:
    """Eight steps with dropout; a checkpoint after each."""
    words = f"""
        --model_name_or_path {folder}/model --data_path {folder}/data/data.txt --output_dir {output_dir}
        --fix_vit False --bf16 False --plora_dropout 0.2 --learning_rate 1e-3 --max_steps 8
        --save_strategy steps --save_steps 1 --save_total_limit 2 --per_device_train_batch_size 3
        --dataloader_num_workers 0 --gradient_checkpointing False
    """
    return [*words.split(), *more]


def assert_same_model(a: Path, b: Path) -> None:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def at_step(step: int, rank: int, action: Callable[[], Any]) -> None:
    """In this process, do `action` when the rank comes to the step."""
    seed = trainer.main.step_seed

    def hook(*arguments: int) -> int:
        if arguments[1:] == (step, rank):
            action()
        return seed(*arguments)

    trainer.main.step_seed = hook


class Ranks:
    """Forked ranks; as torchrun does, the test ends the others when one has failed."""

    def __init__(self, world: int, function: Callable[..., Any], *args: Any) -> None:
        self.folder, port = tempfile.TemporaryDirectory(), free_port()
        self.logs = [Path(self.folder.name) / f"rank{rank}.log" for rank in range(world)]
        context = multiprocessing.get_context("fork")
        self.processes = [
            context.Process(target=_rank, args=(rank, world, port, function, args, self.logs[rank]))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float) -> bool:
        """Whether all have ended well within the time; False also as soon as one has not."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            codes = [process.exitcode for process in self.processes]
            if any(codes) or codes == [0] * len(codes):
                return not any(codes)
            time.sleep(0.01)
        return False

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs if log.exists())


# --- killed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moments", [5, pytest.param(20, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
def test_killed_at_random_moments_the_model_is_the_same(world, tmp_path, moments):
    chance = random.Random(moments)
    started = time.monotonic()
    run_ranks(2, main, flags(world, tmp_path / "timed"))
    seconds = time.monotonic() - started
    output_dir, kills, whole_runs = tmp_path / "run", 0, 0
    while kills < moments:
        if chance.random() < 0.3:
            for index in (world / "data").glob("*.index"):
                index.unlink()
        ranks = Ranks(2, main, flags(world, output_dir))
        finished = ranks.wait(chance.uniform(0, seconds))
        if not finished:
            assert [p.exitcode for p in ranks.processes] != [1, 1], ranks.output()
            os.kill(chance.choice(ranks.processes).pid, signal.SIGKILL)
            kills += 1
            time.sleep(chance.choice([0, 0, 0.3]))  # the other goes on for a while, or does not
        ranks.end()
        if finished:
            assert_same_model(output_dir, world / "straight")
            shutil.rmtree(output_dir)
            whole_runs += 1
    run_ranks(2, main, flags(world, output_dir))
    assert_same_model(output_dir, world / "straight")
    assert [line["step"] for line in read_metrics(output_dir)] == list(range(1, 9))
    print(f"{kills} kills, {whole_runs + 1} whole runs")


def killed_at_call(number: int, argv: list[str]) -> int:
    """Rank 0 dies instead of its `number`-th call that changes or syncs a folder; 0: it counts them."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    if os.environ["RANK"] == "0":
        for name in ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
    status = main(argv)
    print("calls", calls)
    return status


@pytest.mark.parametrize("every", [40, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_between_any_two_changes_of_a_folder_the_model_is_the_same(world, tmp_path, every):
    argv = flags(world, tmp_path / "run", "--max_steps", "4")
    output, _ = run_ranks(2, killed_at_call, 0, flags(world, tmp_path / "straight", "--max_steps", "4"))
    calls = int(output.split()[-1])
    assert calls > 60
    for number in range(1, calls, every):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        ranks = Ranks(2, killed_at_call, number, argv)
        assert not ranks.wait(60)
        ranks.end()
        assert ranks.processes[0].exitcode == -signal.SIGKILL, (number, ranks.output())
        run_ranks(2, main, argv)
        assert_same_model(tmp_path / "run", tmp_path / "straight")
        left = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
        assert left <= {"checkpoint-2", "checkpoint-3"}


# --- asked to stop ----------------------------------------------------------------------------------------


def stop_file(output_dir: Path) -> None:
    (output_dir / "STOP").touch()


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("request_", ["SIGTERM", "SIGUSR1", "STOP"])
def test_a_request_to_stop_ends_all_ranks_after_the_same_step(world, tmp_path, request_):
    def run(argv: list[str]) -> int:
        if request_ == "STOP":
            at_step(3, 0, lambda: stop_file(tmp_path))
        else:
            at_step(3, 1, lambda: send(signal.Signals[request_]))
        return main(argv)

    argv = flags(world, tmp_path, "--save_steps", "100", "--logging_steps", "2")
    output, _ = run_ranks(2, run, argv, status=STOPPED)
    assert "stopped after step 3 of 8, as asked" in output
    assert not (tmp_path / "STOP").exists()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    run_ranks(2, main, argv)
    assert_same_model(tmp_path, world / "straight")


def test_a_second_signal_ends_at_once_and_an_echo_does_not(world, tmp_path):
    def run(argv: list[str]) -> int:
        def twice() -> None:
            send(signal.SIGTERM)
            send(signal.SIGTERM)  # as torchrun repeats what a scheduler sends to every process
            time.sleep(4)
            Path(tmp_path / "alive").touch()
            send(signal.SIGTERM)
            time.sleep(60)

        at_step(2, 0, twice)
        return main(argv)

    ranks = Ranks(2, run, flags(world, tmp_path))
    assert not ranks.wait(30)
    assert (tmp_path / "alive").exists()
    assert ranks.processes[0].exitcode == 1
    assert "a second signal: ending at once" in ranks.output()
    ranks.end()


def torchrun(tmp_path: Path, patch: str, options: list[str], argv: list[str]) -> subprocess.Popen[str]:
    """The real launcher on two ranks that run trainer.main after `patch`."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, time\nimport trainer.main as m\nseed = m.step_seed\n"
        f"def hook(s, step, rank):\n{patch}\n    return seed(s, step, rank)\nm.step_seed = hook\n"
        'if __name__ == "__main__":\n    m.leave(m.main(sys.argv[1:]))\n'
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), *options, str(script), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["XCOMPOSER_STATUS_FILE"] = str(tmp_path / "status")
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_torchrun_starts_a_killed_run_again_and_it_goes_on(world, tmp_path):
    patch = """
    if (step, rank) == (5, 1) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)"""
    argv = flags(world, tmp_path / "run", "--resume_from_checkpoint", "none")
    process = torchrun(tmp_path, patch, ["--max-restarts", "1"], argv)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "going on from" in output
    assert_same_model(tmp_path / "run", world / "straight")


def test_sigterm_to_torchrun_saves_and_its_workers_do_not_break_it(world, tmp_path):
    """torchrun signals the whole process group of each rank: the data workers must not die of it first."""
    patch = """
    if (step, rank) == (3, 0):
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1)"""
    argv = flags(world, tmp_path / "run", "--dataloader_num_workers", "1", "--save_steps", "100")
    process = torchrun(tmp_path, patch, [], argv)
    output, _ = process.communicate(timeout=120)
    assert "stopped after step 3 of 8, as asked" in output, output
    assert (tmp_path / "status").read_text() == "75"
    run_ranks(2, main, argv)
    assert_same_model(tmp_path / "run", world / "straight")


def test_the_launcher_passes_a_signal_on_and_ends_with_the_trainers_status(world, tmp_path):
    output_dir, binaries = tmp_path / "run", Path(sys.executable).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{binaries}:{os.environ['PATH']}"}
    environment |= {"GPUS_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    argv = ["./torchrun.sh", "full", *flags(world, output_dir, "--max_steps", "100000")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=log, stderr=log)
        until = time.monotonic() + 90
        while not (output_dir / "checkpoint-1").exists() and time.monotonic() < until:
            time.sleep(0.2)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == STOPPED, (tmp_path / "log").read_text()
    last = read_metrics(output_dir)[-1]["step"]
    assert (output_dir / f"checkpoint-{last}" / "complete.json").exists()


def test_a_stop_is_not_undone_by_restarts(world, tmp_path):
    patch = """
    if (step, rank) == (3, 1):
        os.kill(os.getpid(), signal.SIGUSR1)"""
    process = torchrun(tmp_path, patch, ["--max-restarts", "3"], flags(world, tmp_path / "run"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert (tmp_path / "status").read_text() == "75"
    assert not (tmp_path / "run" / "model.safetensors").exists()


# --- raised, hung -----------------------------------------------------------------------------------------


def test_a_rank_that_raises_ends_the_job_soon_and_its_traceback_is_shown_once(world, tmp_path):
    patch = """
    if (step, rank) == (3, 1):
        print("now", time.time(), flush=True)
        raise RuntimeError("the boiler burst")"""
    process = torchrun(tmp_path, patch, [], flags(world, tmp_path / "run"))
    output, _ = process.communicate(timeout=120)
    ended = time.time()
    raised = float(output.partition("now ")[2].split()[0])
    assert process.returncode == 1
    assert ended - raised < 15
    assert output.count("RuntimeError: the boiler burst") == 1, output
    assert output.count("in hook") == 1
    assert output.count("Traceback (most recent call last)") == 2  # and torchrun's own


def test_a_rank_that_hangs_shows_all_stacks_and_ends_the_job(world, tmp_path):
    def waiting_for_godot() -> None:
        time.sleep(1000)

    def run(argv: list[str]) -> int:
        at_step(3, 1, waiting_for_godot)
        return main(argv)

    ranks = Ranks(2, run, flags(world, tmp_path, "--hang_minutes", "0.1"))
    assert not ranks.wait(60)
    time.sleep(2)
    assert [process.exitcode for process in ranks.processes] == [1, 1]
    output = ranks.output()
    assert "waiting_for_godot" in output
    assert "all_reduce" in output  # where the other rank waits
    ranks.end()
    run_ranks(2, main, flags(world, tmp_path))
    assert_same_model(tmp_path, world / "straight")


# --- the disk ---------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a flipped byte": ("resume/shard-00002*", flip_a_byte, "its checksum is not the one written with it"),
    "a flipped byte of the model": ("model.safetensors", flip_a_byte, "its checksum is not the one"),
    "a truncated shard": ("resume/shard-00001*", cut_short, "bytes instead of"),
    "a missing rank": ("resume/shard-00002*", Path.unlink, "is missing"),
    "a foreign shard": (
        "resume/shard-00002*",
        lambda path: shutil.copy(path, path.parent / "x.safetensors"),
        "does not belong to it",
    ),
    "no marker": ("complete.json", Path.unlink, "has no complete.json, so it was never finished"),
    "half a marker": ("complete.json", cut_short, "complete.json is damaged"),
}


@pytest.fixture(scope="module")
def stopped(world) -> Path:
    """checkpoint-2 and checkpoint-3 of a run that stopped."""

    def run(argv: list[str]) -> int:
        at_step(3, 0, lambda: send(signal.SIGTERM))
        return main(argv)

    run_ranks(2, run, flags(world, world / "stopped"), status=STOPPED)
    return world / "stopped"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(world, stopped, tmp_path, damage):
    pattern, spoil, said = DAMAGES[damage]
    shutil.copytree(stopped, tmp_path / "run")
    (path,) = (tmp_path / "run" / "checkpoint-3").glob(pattern)
    spoil(path)
    output, other = run_ranks(2, main, flags(world, tmp_path / "run"))
    (line,) = [line for line in output.splitlines() if "is passed over" in line]
    assert f"{tmp_path}/run/checkpoint-3 is passed over" in line
    assert said in line
    assert "after step 2 of 8" in output
    assert "passed over" not in other
    assert_same_model(tmp_path / "run", world / "straight")


def test_with_no_usable_checkpoint_the_run_does_not_begin_anew_by_itself(world, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-*/complete.json"):
        path.unlink()
    output, _ = run_ranks(2, main, flags(world, tmp_path / "run"), status=2)
    assert "none of the checkpoints" in output


def test_files_that_cannot_grow_cost_a_save_and_not_the_run(world, tmp_path):
    """A limit on the size of files, which any user can set, fails writes as a full disk does."""

    def limited(argv: list[str]) -> int:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

        at_step(4, int(os.environ["RANK"]), limit)
        return main(argv)

    ranks = Ranks(2, limited, flags(world, tmp_path))
    assert not ranks.wait(60)
    output = ranks.output()
    ranks.end()
    assert [process.exitcode for process in ranks.processes] == [1, 1]
    assert f"warning: {tmp_path}/checkpoint-4 is not saved: rank 0: " in output
    assert "File too large" in output
    assert output.count("error: rank 0: ") == 1
    assert "Traceback" not in output
    left = sorted(path.name for path in tmp_path.glob("*checkpoint-*"))
    assert left in (["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"])
    output, _ = run_ranks(2, main, flags(world, tmp_path))
    assert f"going on from {tmp_path}/{left[-1]}" in output
    assert_same_model(tmp_path, world / "straight")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", ["True", "False"])
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

    output, _ = run_ranks(2, run, flags(world, small_disk / "run", "--async_save", asynchronous))
    assert "checkpoint-4 is not saved" in output
    assert "No space left" in output
    assert "Traceback" not in output
    assert (small_disk / "run" / "checkpoint-7" / "complete.json").exists()
    assert [line["step"] for line in read_metrics(small_disk / "run")] == list(range(1, 9))
    assert_same_model(small_disk / "run", world / "straight")


def test_too_little_room_is_said_before_the_first_step(world, tmp_path):
    def run(argv: list[str]) -> int:
        usage = shutil.disk_usage(tmp_path)
        shutil.disk_usage = lambda path: usage._replace(free=1_000_000)
        return main(argv)

    output, other = run_ranks(2, run, flags(world, tmp_path / "run"), status=2)
    assert "what a save writes needs 0.0 GB, and 0.0 GB are free" in output
    assert "error" not in other


def test_a_read_only_folder_is_said_before_the_first_step(world):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("model", "data"):
            shutil.copytree(world / part, folder / part)
        (folder / "run").mkdir(mode=0o555)

        prepare = trainer.main.prepare_output_dir

        def as_nobody(*args: Any) -> Any:
            if os.getuid() == 0:  # whom no mode of a folder stops
                os.seteuid(65534)
            return prepare(*args)

        def run(argv: list[str]) -> int:
            trainer.main.prepare_output_dir = as_nobody
            return main(argv)

        output, _ = run_ranks(2, run, flags(folder, folder / "run"), status=2)
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

    run_ranks(2, run, flags(world, tmp_path / "run", "--save_steps", "3"))
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
    run_ranks(2, main, flags(world, tmp_path / "run"))
    assert_same_model(tmp_path / "run", world / "straight")
    again = Path(shutil.copytree(stopped, tmp_path / "again")) / "checkpoint-3"
    (shard,) = again.glob("resume/shard-00001*")
    shard.write_bytes(pickle.dumps(Malice(trap)))  # and the marker made to agree
    marker = json.loads((again / "complete.json").read_text())
    marker["files"][f"resume/{shard.name}"] = [shard.stat().st_size, crc32(shard)]
    (again / "complete.json").write_text(json.dumps(marker))
    ranks = Ranks(2, main, flags(world, tmp_path / "again"))
    assert not ranks.wait(60)
    ranks.end()
    assert not trap.exists()


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


def model_with_bad_word(world: Path, folder: Path, word: str) -> Path:
    """The tiny model with an infinite embedding: what uses the word has no finite loss."""
    shutil.copytree(world / "model", folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.tok_embeddings.weight"][vocabulary[word]] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_bad_sample_costs_its_step_and_replay_names_it(world, tmp_path, capsys):
    model = model_with_bad_word(world, tmp_path / "model", "w7")
    argv = flags(world, tmp_path / "run", "--model_name_or_path", str(model), "--max_steps", "10")
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
    assert f"{world}/data/text.json: record 7: loss nan" in shown
    assert shown.count("record") > shown.count("nan, gradient norm nan") - 1
    assert replay([str(capsule), "--weights", str(world / "model")]) == 0  # the weights were to blame


def test_too_many_bad_steps_in_a_row_end_the_run(world, tmp_path):
    model = model_with_bad_word(world, tmp_path / "model", "user")
    more = ["--model_name_or_path", str(model), "--max_bad_steps", "2"]
    output, other = run_ranks(2, main, flags(world, tmp_path / "run", *more), status=1)
    assert "2 steps in a row were not finite" in output
    assert len(list((tmp_path / "run").glob("bad-step-*.json"))) == 2
    assert "Traceback" not in output + other


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow(world, tmp_path):
    sizes = tmp_path / "sizes"

    def run(argv: list[str]) -> int:
        def note() -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with sizes.open("a") as file:
                file.write(f"{pages * resource.getpagesize()}\n")

        for step in (200, 600, 1000, 1400, 1800, 2000):
            at_step(step, 0, note)
        return main(argv)

    more = ["--max_steps", "2000", "--save_steps", "50"]
    run_ranks(2, run, flags(world, tmp_path / "run", *more), timeout=1800)
    resident = [int(line) for line in sizes.read_text().splitlines()]
    print(resident)
    assert resident[-1] < 1.03 * resident[0]
