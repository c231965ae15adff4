"""Runs on several machines: they train as one machine does, also where one is unlike the others or is lost.

A machine has a network, a hostname and processes of its own (tests/hosts.py); ranks are forked, because the
import of torch takes seconds, except where torchrun itself is tested.
"""

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import trainer.machines
from tests.fault_cases import STOPPED, assert_same_model, at_step, fault_flags
from tests.hosts import PORT, Host, Job, hosts, launch_forked, start_ranks
from tests.tiny import read_metrics, run_ranks
from trainer.main import leave, main


@pytest.fixture(scope="module")
def world(fault_world) -> Path:
    return fault_world


def rank(argv: list[str]) -> None:
    """A whole rank: its status is told as torchrun is told it."""
    leave(main(argv))


def end_as_torchrun_does(jobs: list[Job], seconds: float) -> list[int]:
    """Wait until all have ended; when one of a machine has failed, SIGTERM ends the others there."""
    until, ended = time.monotonic() + seconds, set[Host]()
    while any(job.poll() is None for job in jobs):
        assert time.monotonic() < until, "\n".join(job.output() for job in jobs)
        for host in {job.host for job in jobs if job.poll()} - ended:
            ended.add(host)
            for job in jobs:
                if job.host is host and job.poll() is None:
                    with suppress(ProcessLookupError):
                        job.send(signal.SIGTERM)
        time.sleep(0.05)
    return [job.wait(0) for job in jobs]


def wait_for(reached: Callable[[], object], jobs: list[Job], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not reached():
        is_early = time.monotonic() < until and all(job.poll() is None for job in jobs)
        assert is_early, "\n".join(job.output() for job in jobs)
        time.sleep(0.02)


# --- as on one machine ------------------------------------------------------------------------------------


def test_machines_whose_own_names_mean_loopback_or_nothing_train_as_one_machine_does(world, tmp_path):
    with hosts(2, own_addresses=("127.0.1.1", None)) as machines:
        jobs = start_ranks(machines, 1, main, fault_flags(world, tmp_path / "run"), MASTER_ADDR="host1")
        assert [job.wait(60) for job in jobs] == [0, 0], jobs[0].output() + jobs[1].output()
    assert_same_model(tmp_path / "run", world / "straight")


@pytest.mark.slow
def test_two_machines_of_two_ranks_equal_one_of_four_and_hybrid_sends_less_between_them(world, tmp_path):
    from safetensors.torch import load_file

    def argv(name: str, *more: str) -> list[str]:
        changes = {"max_steps": 4, "save_steps": 4, "gradient_accumulation_steps": 2}
        return fault_flags(world, tmp_path / name, *more, **changes)

    run_ranks(4, main, argv("one"))
    sent = {}
    for sharding in ("full", "hybrid"):
        with hosts(2) as machines:
            before = [machine.sent_bytes() for machine in machines]
            jobs = start_ranks(machines, 2, main, argv(sharding, "--sharding", sharding))
            assert [job.wait(60) for job in jobs] == [0] * 4, "\n".join(job.output() for job in jobs)
            sent[sharding] = sum(m.sent_bytes() - b for m, b in zip(machines, before, strict=True))
    print(f"bytes sent between the machines: {sent}")
    assert_same_model(tmp_path / "full", tmp_path / "one")
    one, hybrid = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "hybrid"))
    for name, weight in one.items():
        assert (weight - hybrid[name]).norm() <= 1e-6 * weight.norm().clamp(min=1e-3), name
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("one", "hybrid")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert sent["hybrid"] < sent["full"]


# --- one machine unlike the others ------------------------------------------------------------------------


def test_files_that_one_machine_lacks_are_named_with_it_on_every_screen(world, tmp_path):
    argv = fault_flags(world, tmp_path / "run")
    with hosts(2) as (first, second):
        second.hide(world)
        jobs = start_ranks((first, second), 2, rank, argv)
        started = time.monotonic()
        assert [jobs[0].wait(30), jobs[2].wait(5)] == [2, 2], jobs[0].output() + jobs[2].output()
        assert time.monotonic() - started < 20
        for job in (jobs[0], jobs[2]):
            lines = [line for line in job.output().splitlines() if "error" in line]
            assert len(lines) == 2, job.output()
            model = f"error: on host2: --model_name_or_path {world}/model: there is no such folder"
            assert lines[0].startswith(model)
            assert lines[1] == f"error: on host2: --data_path {world}/data/data.txt: there is no such file"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_images_that_one_machine_lacks_are_named_with_it_on_every_screen(world, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for image in (world / "data").glob("*.png"):
        (images / image.name).write_bytes(image.read_bytes())
    with hosts(2) as (first, second):
        second.hide(images)
        argv = fault_flags(world, tmp_path / "run", "--image_root", str(images), "--packing", "False")
        jobs = start_ranks((first, second), 1, rank, argv)
        assert [job.wait(60) for job in jobs] == [1, 1], jobs[0].output() + jobs[1].output()
        for job in jobs:
            assert "rank 1" in job.output(), job.output()
            assert str(images) in job.output()
        assert "error on host2: rank 1: " in jobs[0].output()


def test_hybrid_sharding_on_unequal_machines_is_refused_in_one_sentence(world, tmp_path):
    with hosts(3) as machines:
        argv = fault_flags(world, tmp_path / "run", "--sharding", "hybrid")
        jobs = start_ranks(machines, (2, 1, 1), rank, argv)
        assert [jobs[i].wait(30) for i in (0, 2, 3)] == [2, 2, 2], jobs[0].output()
        sentence = "error: --sharding hybrid: some nodes have 1 ranks and others 2; give every node as many"
        for i in (0, 2, 3):
            assert jobs[i].output().count("error") == 1, jobs[i].output()
            assert sentence in jobs[i].output()


# --- machines that are gone -------------------------------------------------------------------------------


def silent_soon(argv: list[str], reached: Path) -> None:
    trainer.machines.SILENT_SECONDS = 3
    at_step(3, 0, reached.touch)
    rank(argv)


def test_a_machine_that_falls_silent_is_named_and_all_end(world, tmp_path):
    argv = fault_flags(world, tmp_path / "run", max_steps=400, save_steps=400)
    with hosts(3) as machines:
        jobs = start_ranks(machines, (2, 1, 1), silent_soon, argv, tmp_path / "reached")
        wait_for((tmp_path / "reached").exists, jobs)
        machines[1].unplug()
        started = time.monotonic()
        statuses = end_as_torchrun_does(jobs, 30)
        assert [statuses[i] for i in (0, 2, 3)] == [1] * 3
        print(f"all ended {time.monotonic() - started:.1f} s after the cable was pulled")
        for job in (jobs[0], jobs[3]):
            assert "error: host2 has not answered for 3 s: " in job.output().rstrip().splitlines()[-1]
        assert "error: host1 has not answered for 3 s: " in jobs[2].output().rstrip().splitlines()[-1]


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_machine_whose_processes_are_killed_is_named_and_all_end_within_seconds(world, tmp_path, killed):
    argv = fault_flags(world, tmp_path / "run", max_steps=400, save_steps=400)
    with hosts(3) as machines:
        jobs = start_ranks(machines, (2, 1, 1), silent_soon, argv, tmp_path / "reached", MASTER_ADDR="host1")
        wait_for((tmp_path / "reached").exists, jobs)
        machines[killed].kill()
        started = time.monotonic()
        statuses = end_as_torchrun_does(jobs, 30)
        seconds = time.monotonic() - started
        print(f"all ended {seconds:.1f} s after the machine was killed")
        for job, status in zip(jobs, statuses, strict=True):
            if job.host is machines[killed]:
                assert status == -signal.SIGKILL
            elif job is jobs[1]:
                assert status in (1, -signal.SIGTERM)
            else:
                assert status == 1, job.output()
                assert machines[killed].name in job.output().rstrip().splitlines()[-1], job.output()
        assert seconds < 10


@pytest.mark.slow
def test_a_machine_that_answers_late_is_waited_for(world, tmp_path):
    """Its processes are suspended for longer than a silent machine has."""
    argv = fault_flags(world, tmp_path / "run")
    with hosts(2) as (first, second):
        jobs = start_ranks((first, second), 1, silent_soon, argv, tmp_path / "reached")
        wait_for((tmp_path / "reached").exists, jobs)
        jobs[1].send(signal.SIGSTOP)
        time.sleep(6)
        jobs[1].send(signal.SIGCONT)
        assert [job.wait(60) for job in jobs] == [0, 0], jobs[0].output() + jobs[1].output()
    assert_same_model(tmp_path / "run", world / "straight")


# --- torchrun on every machine ----------------------------------------------------------------------------


def launch(machine: Host, number: int, argv: list[str]) -> Job:
    options = ["--nproc_per_node", "2", "--nnodes", "2", "--node_rank", str(number)]
    options += ["--master_addr", "host1", "--master_port", str(PORT)]
    return machine.call(launch_forked, options, argv)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["SIGUSR1", "STOP"])
def test_the_launchers_of_all_machines_end_alike_after_a_request_to_stop(world, tmp_path, ending):
    argv = fault_flags(world, tmp_path / "run", max_steps=400, save_steps=400)
    with hosts(2) as machines:
        jobs = [launch(machine, number, argv) for number, machine in enumerate(machines)]
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text(), jobs)
        if ending == "STOP":
            (tmp_path / "run" / "STOP").touch()
        else:
            jobs[0].send(signal.SIGUSR1)
        assert [job.wait(60) for job in jobs] == [STOPPED] * 2, jobs[0].output() + jobs[1].output()
        assert jobs[0].output().rstrip().splitlines()[-1].startswith("stopped after step")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["everywhere", "host2"])
def test_the_launchers_of_all_machines_end_alike_after_bad_input(world, tmp_path, where):
    with hosts(2) as machines:
        argvs = [fault_flags(world, tmp_path / "run") for _ in machines]
        for number in (0, 1) if where == "everywhere" else (1,):
            argvs[number] += ["--data_path", str(tmp_path / "absent.txt")]
        jobs = [launch(machine, *both) for machine, both in zip(machines, enumerate(argvs), strict=True)]
        assert [job.wait(60) for job in jobs] == [2, 2], jobs[0].output() + jobs[1].output()
        on = "" if where == "everywhere" else "on host2: "
        for job in jobs:
            last = job.output().rstrip().splitlines()[-1]
            assert last == f"error: {on}--data_path {tmp_path}/absent.txt: there is no such file"
