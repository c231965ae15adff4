"""One run at a time writes to an output_dir: who holds it is named, what is stale is taken over by exactly
one, and whoever has lost it ends."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import trainer.lock
from trainer.lock import Lock


@pytest.fixture(autouse=True)
def short_beats(monkeypatch) -> None:
    monkeypatch.setattr(trainer.lock, "BEAT_SECONDS", 0.1)


@pytest.fixture
def short_watch(monkeypatch) -> None:
    monkeypatch.setattr(trainer.lock, "WATCH_SECONDS", 1.0)


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Starts `function(*arguments)` in a process whose output goes to a file."""
    context, started = multiprocessing.get_context("fork"), []

    def run(output: Path, function: Callable[..., None], *arguments: Any) -> Any:
        def redirected() -> None:
            sys.stdout = sys.stderr = output.open("w")
            # A shell starts its background jobs, and so their children, with SIGINT ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            function(*arguments)
            sys.stderr.flush()

        process = context.Process(target=redirected)
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.join()


def hold(folder: Path, seconds: float = 60) -> None:
    with Lock(folder) as lock:
        problems = lock.take()
        print(problems or "held", flush=True)
        if not problems:
            time.sleep(seconds)


def wait_for(path: Path, text: str) -> None:
    until = time.monotonic() + 30
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < until, path.exists() and path.read_text()
        time.sleep(0.02)


def change(path: Path, **facts: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def test_a_folder_in_use_is_refused_with_its_holder_and_free_when_that_ends(start, tmp_path):
    folder = tmp_path / "run"
    holder = start(tmp_path / "log", hold, folder)
    wait_for(tmp_path / "log", "held")
    lock = Lock(folder)
    (problem,) = lock.take()
    host = json.loads((folder / "run.lock").read_text())["host"]
    assert f"--output_dir {folder} is in use by process {holder.pid} on host {host} (started 2" in problem
    assert re.search(r"last heartbeat [01] s ago\); wait until it ends, stop it \(touch .*STOP\)", problem)
    assert (folder / "run.lock").exists()
    os.kill(holder.pid, signal.SIGINT)
    holder.join(10)
    assert not folder.exists()  # it was made for the lock, and nothing came into it
    assert lock.take() == []
    lock.release()


def test_the_lock_of_a_dead_process_is_taken_over_at_once(start, tmp_path, capfd):
    holder = start(tmp_path / "log", hold, tmp_path)
    wait_for(tmp_path / "log", "held")
    holder.kill()  # and not waited for: it is a zombie
    wait_for(Path(f"/proc/{holder.pid}/status"), "Z (zombie)")
    with Lock(tmp_path) as lock:
        assert lock.take() == []
    said = capfd.readouterr().err
    assert f"taking over output_dir {tmp_path} from process {holder.pid} on host" in said
    assert "which is dead" in said
    assert "waiting" not in said
    assert not list(tmp_path.glob("run.lock*"))


def test_a_process_that_has_the_number_of_a_dead_one_does_not_keep_its_lock_alive(tmp_path, capfd):
    Lock(tmp_path)._create(tmp_path / "run.lock")  # of this very process, which lives
    change(tmp_path / "run.lock", process_ticks=1)
    with Lock(tmp_path) as lock:
        assert lock.take() == []
    assert "which is dead" in capfd.readouterr().err


ELSEWHERE = [{"host": "elsewhere"}, {"boot": "another"}, {"process_namespace": "pid:[1]"}]


@pytest.mark.parametrize("other", ELSEWHERE)
def test_a_process_of_another_machine_is_watched_for_a_sign_of_life(tmp_path, capfd, short_watch, other):
    """Its clock is an hour ahead, or behind: nothing is concluded from that."""
    path = tmp_path / "run.lock"
    Lock(tmp_path)._create(path)
    change(path, process=4_000_000, **other)  # no such process here
    for wrong in (3600, -3600):
        os.utime(path, (time.time() + wrong, time.time() + wrong))
        with Lock(tmp_path) as lock:
            assert lock.take() == []
            said = capfd.readouterr().err
            assert "waiting up to 1 s for its heartbeat" in said
            assert "which sent no heartbeat for 1 s" in said
            content = path.read_text()
        path.write_text(content)
        change(path, id=f"stale{wrong}", **other)


def test_a_process_of_another_machine_that_lives_keeps_its_lock(start, tmp_path):
    start(tmp_path / "log", hold, tmp_path)
    wait_for(tmp_path / "log", "held")
    change(tmp_path / "run.lock", host="elsewhere", process=4_000_000)
    (problem,) = Lock(tmp_path).take()
    assert "is in use by process 4000000 on host elsewhere" in problem


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": "x"}'])
def test_a_lock_that_says_nothing_is_watched_like_any_other(tmp_path, capfd, short_watch, content):
    (tmp_path / "run.lock").write_text(content)
    with Lock(tmp_path) as lock:
        assert lock.take() == []
        assert json.loads((tmp_path / "run.lock").read_text())["id"] == lock.id
    assert "from process ? on host ?" in capfd.readouterr().err


def race(folder: Path, barrier: Any, results: Any) -> None:
    lock = Lock(folder)
    barrier.wait()
    problems = lock.take()
    results.put(problems)
    barrier.wait()  # all have their answer while the winner still holds it
    lock.check()
    lock.release()


@pytest.mark.parametrize(
    "stale", ["none", pytest.param("dead", marks=pytest.mark.slow), "dead in mid-takeover"]
)
def test_of_many_that_come_at_the_same_moment_exactly_one_wins(start, tmp_path, stale):
    context = multiprocessing.get_context("fork")
    for number in range(8):
        folder = tmp_path / str(number)
        folder.mkdir()
        if stale != "none":
            Lock(folder)._create(folder / "run.lock")
            change(folder / "run.lock", id="first", process=4_000_000)
        if stale == "dead in mid-takeover":
            Lock(folder)._create(folder / "run.lock-after-first")
            change(folder / "run.lock-after-first", id="second", process=4_000_001)
        barrier, results = context.Barrier(5), context.Queue()
        racers = [start(tmp_path / "log", race, folder, barrier, results) for _ in range(5)]
        answers = [results.get(timeout=30) for _ in racers]
        for racer in racers:
            racer.join(30)
        assert [racer.exitcode for racer in racers] == [0] * 5
        assert answers.count([]) == 1, answers
        assert all("is in use by process" in answer[0] for answer in answers if answer)
        assert not list(folder.glob("run.lock*"))


def test_a_process_that_slept_through_a_takeover_ends_with_one_sentence(start, tmp_path, short_watch):
    sleeper = start(tmp_path / "log", hold, tmp_path)
    wait_for(tmp_path / "log", "held")
    os.kill(sleeper.pid, signal.SIGSTOP)
    with Lock(tmp_path) as lock:
        assert lock.take() == []
        os.kill(sleeper.pid, signal.SIGCONT)
        sleeper.join(30)
        assert sleeper.exitcode == 1
        said = (tmp_path / "log").read_text().strip().splitlines()
        (error,) = [line for line in said if line not in ("held", "")]
        assert f"--output_dir {tmp_path} has been taken over by process {os.getpid()}" in error
        lock.check()  # what it held is left to the new holder


def test_a_lock_that_somebody_deletes_is_there_again(tmp_path):
    with Lock(tmp_path) as lock:
        assert lock.take() == []
        (tmp_path / "run.lock").unlink()
        wait_for(tmp_path / "run.lock", lock.id)
    assert not (tmp_path / "run.lock").exists()
