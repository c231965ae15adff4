"""Whatever ends a run, the work up to the last complete checkpoint is kept, and the same command goes on."""

import faulthandler
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trainer.lock
import trainer.stopping
from tests.fault_cases import (
    STOPPED,
    Ranks,
    assert_same_model,
    at_step,
    fault_flags,
    is_gone,
    launch,
    model_with_bad_word,
    send,
)
from tests.tiny import read_metrics, run_ranks
from trainer.main import main


@pytest.fixture(scope="module")
def world(fault_world) -> Path:
    return fault_world


# --- killed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moments", [2, pytest.param(20, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
def test_killed_at_random_moments_the_model_is_the_same(world, tmp_path, moments):
    chance = random.Random(moments)
    started = time.monotonic()
    run_ranks(2, main, fault_flags(world, tmp_path / "timed"))
    seconds = time.monotonic() - started
    output_dir, kills, whole_runs = tmp_path / "run", 0, 0
    while kills < moments:
        if chance.random() < 0.3:
            for index in (world / "data").glob("*.index"):
                index.unlink()
        ranks = Ranks(2, main, fault_flags(world, output_dir))
        finished = ranks.wait(chance.uniform(0, seconds))
        if not finished:
            assert [p.exitcode for p in ranks.processes] != [1, 1], ranks.output()
            victim = chance.choice(ranks.processes)
            kills += victim.is_alive()  # a rank may have ended while the other has not
            victim.kill()
            time.sleep(chance.choice([0, 0, 0.3]))  # the other goes on for a while, or does not
        ranks.end()
        if finished:
            assert_same_model(output_dir, world / "straight")
            shutil.rmtree(output_dir)
            whole_runs += 1
    run_ranks(2, main, fault_flags(world, output_dir))
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


@pytest.mark.parametrize("every", [120, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_between_any_two_changes_of_a_folder_the_model_is_the_same(world, tmp_path, every):
    argv = fault_flags(world, tmp_path / "run", "--max_steps", "4")
    output, _ = run_ranks(2, killed_at_call, 0, fault_flags(world, tmp_path / "straight", "--max_steps", "4"))
    calls = int(output.split()[-1])
    assert calls > 120
    for number in range(1, calls, every):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        ranks = Ranks(2, killed_at_call, number, argv)
        assert not ranks.wait(60)
        ranks.end()
        assert ranks.processes[0].exitcode == -signal.SIGKILL, (number, ranks.output())
        run_ranks(2, main, argv)
        assert_same_model(tmp_path / "run", tmp_path / "straight")
        left = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
        assert left == {"checkpoint-3", "checkpoint-4"}
        assert not (tmp_path / "run" / "run.lock").exists()


# --- asked to stop ----------------------------------------------------------------------------------------


def stop_file(output_dir: Path) -> None:
    (output_dir / "STOP").touch()


@pytest.mark.parametrize("request_", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow), "STOP"])
def test_a_request_to_stop_ends_all_ranks_after_the_same_step(world, tmp_path, request_):
    def run(argv: list[str]) -> int:
        if request_ == "STOP":
            at_step(3, 0, lambda: stop_file(tmp_path))
        else:
            at_step(3, 1, lambda: send(signal.Signals[request_]))
        return main(argv)

    argv = fault_flags(world, tmp_path, "--save_steps", "100", "--logging_steps", "2")
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

    ranks = Ranks(2, run, fault_flags(world, tmp_path))
    assert not ranks.wait(30)
    assert (tmp_path / "alive").exists()
    assert ranks.processes[0].exitcode == 1
    assert "a second signal: ending immediately" in ranks.output()
    ranks.end()


@pytest.mark.slow
def test_torchrun_starts_killed_ranks_again_which_go_on_and_wait_for_no_lock(world, tmp_path):
    """Rank 1, and later rank 0, which leaves its lock behind."""
    hook = """
    if (step, rank, os.environ["TORCHELASTIC_RESTART_COUNT"]) in ((3, 1, "0"), (6, 0, "1")):
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)"""
    argv = fault_flags(world, tmp_path / "run", "--resume_from_checkpoint", "none")
    process = launch(tmp_path, hook, ["--max-restarts", "2"], argv)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert output.count("resuming from") == 2, output
    assert f"taking over output_dir {tmp_path}/run from process" in output
    assert "for its heartbeat" not in output
    assert_same_model(tmp_path / "run", world / "straight")


@pytest.mark.parametrize(
    "launcher", ["trainer.launch", pytest.param("torch.distributed.run", marks=pytest.mark.slow)]
)
def test_a_killed_rank_ends_the_job_at_once_and_leaves_no_data_worker(world, tmp_path, launcher):
    """Workers whose results nobody reads do not see that their rank is gone, and hold its connections."""
    hook = f"""
    pass

import data.loader
data.loader.PREFETCHED_PER_WORKER = 400

def hook(step, rank):
    if step == 3:
        with open("/proc/thread-self/children") as children, open({str(tmp_path / "workers")!r}, "a") as file:
            file.write(children.read())
    if (step, rank) == (6, 1):
        os.write(1, b"killed at %f\\n" % time.time())  # at once: other ranks print too
        os.kill(os.getpid(), signal.SIGKILL)"""
    more = ["--max_steps", "10000", "--save_steps", "10000", "--dataloader_num_workers", "2"]
    process = launch(tmp_path, hook, [], fault_flags(world, tmp_path / "run", *more), launcher)
    output, _ = process.communicate(timeout=120)
    ended = time.time()
    assert "killed at" in output, output
    assert ended - float(output.partition("killed at ")[2].split()[0]) < 15, output
    assert "Connection closed" not in output
    assert "Connection reset" not in output
    if launcher == "trainer.launch":
        assert "Traceback" not in output
        name = f"error: rank 1 on {socket.gethostname()} was killed by SIGKILL"
        assert output.rstrip().splitlines()[-1].startswith(name), output
    workers = [int(word) for word in (tmp_path / "workers").read_text().split()]
    assert len(workers) == 4
    assert all(is_gone(worker, seconds=15) for worker in workers)


@pytest.mark.slow
def test_a_rank_in_a_c_call_does_not_hold_up_the_end_after_a_kill(world, tmp_path):
    """As in a collective of NCCL, which waits for the killed rank and lets no signal handler run."""
    hook = """
    if (step, rank) == (5, 0):
        mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    if (step, rank) == (5, 1):
        time.sleep(1)
        os.write(1, b"killed at %f\\n" % time.time())  # at once: other ranks print too
        os.kill(os.getpid(), signal.SIGKILL)"""
    process = launch(tmp_path, hook, [], fault_flags(world, tmp_path / "run"), "trainer.launch")
    output, _ = process.communicate(timeout=120)
    assert time.time() - float(output.partition("killed at ")[2].split()[0]) < 20, output
    assert "was killed by SIGKILL" in output.rstrip().splitlines()[-1]


def test_sigterm_to_torchrun_saves_and_its_workers_do_not_break_it(world, tmp_path):
    """torchrun signals the whole process group of each rank: the data workers must not die of it first."""
    hook = """
    if (step, rank) == (3, 0):
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1)"""
    argv = fault_flags(world, tmp_path / "run", "--dataloader_num_workers", "1", "--save_steps", "100")
    process = launch(tmp_path, hook, [], argv)
    output, _ = process.communicate(timeout=120)
    assert "stopped after step 3 of 8, as asked" in output, output
    assert (tmp_path / "status").read_text() == "75"
    run_ranks(2, main, argv)
    assert_same_model(tmp_path / "run", world / "straight")


@pytest.mark.slow
def test_a_stop_is_not_undone_by_restarts(world, tmp_path):
    hook = """
    if (step, rank) == (3, 1):
        os.kill(os.getpid(), signal.SIGUSR1)"""
    process = launch(tmp_path, hook, ["--max-restarts", "3"], fault_flags(world, tmp_path / "run"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert (tmp_path / "status").read_text() == "75"
    assert not (tmp_path / "run" / "model.safetensors").exists()


# --- two runs in one folder -------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_in_use_is_refused_and_changes_nothing(world, tmp_path):
    output_dir, waiting, go_on = tmp_path / "run", tmp_path / "waiting", tmp_path / "go on"

    def wait() -> None:
        waiting.touch()
        while not go_on.exists():
            time.sleep(0.01)

    def run(argv: list[str]) -> int:
        at_step(4, 0, wait)
        return main(argv)

    first = Ranks(2, run, fault_flags(world, output_dir, "--async_save", "False"))
    until = time.monotonic() + 60
    while not waiting.exists():
        assert time.monotonic() < until, first.output()
        time.sleep(0.05)
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    output, other = run_ranks(2, main, fault_flags(world, output_dir), status=2)
    assert f"error: --output_dir {output_dir} is in use by process {first.processes[0].pid} on host" in output
    assert "error" not in other
    assert before == {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    go_on.touch()
    assert first.wait(60), first.output()
    first.end()
    assert_same_model(output_dir, world / "straight")
    assert [line["step"] for line in read_metrics(output_dir)] == list(range(1, 9))


def test_a_run_whose_folder_was_taken_over_while_it_was_suspended_ends_and_writes_no_more(world, tmp_path):
    output_dir = tmp_path / "run"

    def with_short_times(argv: list[str], suspended: bool) -> int:
        trainer.lock.BEAT_SECONDS, trainer.lock.WATCH_SECONDS = 0.2, 2
        if suspended:
            at_step(4, 0, lambda: send(signal.SIGSTOP))
        return main(argv)

    argv = fault_flags(world, output_dir)
    first = Ranks(2, with_short_times, argv, True)
    until = time.monotonic() + 60
    while "T (stopped)" not in Path(f"/proc/{first.processes[0].pid}/status").read_text():
        assert time.monotonic() < until, first.output()
        time.sleep(0.05)
    output, _ = run_ranks(2, with_short_times, argv, False)
    assert "which sent no heartbeat for 2 s" in output
    written = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    with trainer.lock.Lock(output_dir) as lock:
        assert lock.take() == []
        os.kill(first.processes[0].pid, signal.SIGCONT)
        first.processes[0].join(60)
    assert first.processes[0].exitcode == 1
    said = first.output()
    first.end()
    assert [line.startswith("error: ") for line in said.splitlines()].count(True) == 1, said
    assert f"error: --output_dir {output_dir} has been taken over by process {os.getpid()}" in said
    assert written == {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    assert_same_model(output_dir, world / "straight")


@pytest.mark.parametrize(
    "end",
    [
        "raised",
        "bad steps",
        pytest.param("interrupted", marks=pytest.mark.slow),
        pytest.param("signalled twice", marks=pytest.mark.slow),
    ],
)
def test_the_lock_is_removed_however_a_run_ends(world, tmp_path, end):
    output_dir, held = tmp_path / "run", tmp_path / "held"

    def act() -> None:
        if (output_dir / "run.lock").exists():
            held.touch()
        if end == "raised":
            raise RuntimeError("the boiler burst")
        if end == "signalled twice":
            trainer.stopping.ECHO_SECONDS = 0
            send(signal.SIGTERM)
            time.sleep(0.1)
            send(signal.SIGTERM)
        if end == "interrupted":
            send(signal.SIGINT)

    def run(argv: list[str]) -> int:
        at_step(3, 0, act)
        return main(argv)

    model = world / "model"
    if end == "bad steps":  # all, of which the third is the last
        model = model_with_bad_word(world, tmp_path / "model", "user")
    ranks = Ranks(1, run, fault_flags(world, output_dir, model_name_or_path=model))
    assert not ranks.wait(60)
    ranks.processes[0].join(30)
    ranks.end()
    assert ranks.processes[0].exitcode == (STOPPED if end == "interrupted" else 1), ranks.output()
    assert held.exists()
    assert not (output_dir / "run.lock").exists()


# --- raised, hung -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["trainer.launch", "torch.distributed.run"])
def test_a_rank_that_raises_ends_the_job_soon_and_its_traceback_is_shown_once(world, tmp_path, launcher):
    hook = """
    if (step, rank) == (3, 1):
        os.write(1, b"raised at %f\\n" % time.time())  # at once: other ranks print too
        raise RuntimeError("the boiler burst")"""
    process = launch(tmp_path, hook, [], fault_flags(world, tmp_path / "run"), launcher)
    output, _ = process.communicate(timeout=120)
    ended = time.time()
    raised = float(output.partition("raised at ")[2].split()[0])
    assert process.returncode == 1
    assert ended - raised < 15
    ours, _, of_torchrun = output.partition("ChildFailedError")
    assert ours.count("RuntimeError: the boiler burst") == 1, output
    assert ours.count("in hook") == 1
    if launcher == "trainer.launch":
        assert output.count("Traceback (most recent call last)") == 1
        assert output.rstrip().endswith("RuntimeError: the boiler burst"), output
    else:  # its own traceback, and the rank's again as the root cause
        assert "RuntimeError: the boiler burst" in of_torchrun.partition("Root Cause")[2]


def test_a_rank_that_hangs_shows_all_stacks_and_ends_the_job(world, tmp_path):
    def waiting_for_godot() -> None:
        # A second after the other, which might lose its peer before it shows its own stack.
        faulthandler.dump_traceback_later(7, exit=True)
        time.sleep(1000)

    def run(argv: list[str]) -> int:
        at_step(3, 1, waiting_for_godot)
        return main(argv)

    ranks = Ranks(2, run, fault_flags(world, tmp_path, "--hang_minutes", "0.1"))
    assert not ranks.wait(60)
    for process in ranks.processes:
        process.join(20)
    assert [process.exitcode for process in ranks.processes] == [1, 1]
    output = ranks.output()
    assert "waiting_for_godot" in output
    assert "all_reduce" in output  # where the other rank waits
    ranks.end()
    run_ranks(2, main, fault_flags(world, tmp_path))
    assert_same_model(tmp_path, world / "straight")


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow(world, tmp_path):
    """In processes of their own: a forked rank would also hold what pytest keeps."""
    sizes = tmp_path / "sizes"
    hook = f"""
    if rank == 0 and step in (200, 600, 1000, 1400, 1800, 2000):
        with open("/proc/self/statm") as statm, open({str(sizes)!r}, "a") as file:
            print(int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"), file=file)"""
    process = launch(
        tmp_path, hook, [], fault_flags(world, tmp_path / "run", "--max_steps", "2000", "--save_steps", "50")
    )
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    resident = [int(line) for line in sizes.read_text().splitlines()]
    print(resident)
    assert resident[-1] < 1.03 * resident[0]
