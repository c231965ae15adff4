"""Several machines that torchrun.sh starts: what is lost comes back, joins, or is done without."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from tests.fault_cases import STOPPED, assert_same_model, fault_flags, in_every_step, wait_for, wait_for_file
from tests.hosts import PORT, Host, Job, hosts, launch_forked
from tests.tiny import ROOT, free_port, read_metrics, run_ranks
from trainer.job import NEWEST_ATTEMPT, store_of_attempt
from trainer.launch import can_listen, wait_for_store
from trainer.main import main

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def world(fault_world) -> Path:
    return fault_world


# --- machines that are lost -------------------------------------------------------------------------------


class Run:
    """A run that torchrun.sh starts on machines, and whose steps wait where the test says so."""

    def __init__(self, folder: Path, argv: list[str], **environment: Any) -> None:
        self.folder, self.argv = folder, argv
        # Python imports this file in every process; in ranks it patches the loader that the run uses.
        (folder / "sitecustomize.py").write_text(
            "import os, socket, sys, time\n\n"
            "def hook(step, rank):\n"
            f"    while os.path.exists(f'{folder}/{{socket.gethostname()}}-waits-at-{{step}}'):\n"
            "        time.sleep(0.05)\n\n"
            "if 'TORCHELASTIC_RUN_ID' in os.environ and sys.argv[:1] == ['-m']:\n"
            "    from tests.fault_cases import in_every_step\n    in_every_step(hook)\n"
        )
        self.environment = {"PATH": PATH, "OMP_NUM_THREADS": 1, "GPUS_PER_NODE": 1, "MASTER_PORT": PORT}
        self.environment |= {"PYTHONPATH": folder, **environment}

    def start(self, machine: Host) -> Job:
        return machine.start([ROOT / "torchrun.sh", "full", *self.argv], **self.environment)

    def start_forked(self, machine: Host) -> Job:
        """With what torchrun.sh tells torchrun, but without importing anything anew."""

        def launch() -> int:
            folder, name = self.folder, socket.gethostname()

            def hook(step: int, rank: int) -> None:
                while (folder / f"{name}-waits-at-{step}").exists():
                    time.sleep(0.05)

            in_every_step(hook)
            options = "--nproc_per_node 1 --nnodes 2 --max_restarts 2 --rdzv_backend c10d --rdzv_id forked"
            return launch_forked([*options.split(), "--rdzv_endpoint", f"host1:{PORT}"], self.argv)

        return machine.call(launch)

    def waits_at(self, machine: Host, step: int) -> Path:
        """A file that makes the machine's ranks wait before they take part in a step, while it exists."""
        path = self.folder / f"{machine.name}-waits-at-{step}"
        path.touch()
        return path

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The starts that run.json tells."""
        return json.loads((self.folder / "run" / "run.json").read_text())["starts"]

    def wait_for(self, name: str, seconds: float = 240) -> None:
        """Until the checkpoint, or another file of output_dir, is there."""
        wait_for_file(self.folder / "run" / name, seconds)


@pytest.mark.parametrize(
    ("lost", "forked"),
    [(1, True), *(pytest.param(lost, False, marks=pytest.mark.slow) for lost in (0, 1))],
)
def test_a_machine_that_was_killed_comes_back_and_the_model_is_the_same(world, tmp_path, lost, forked):
    """Also the one that holds the store. As on Debian, its own name means 127.0.1.1 there."""
    argv = fault_flags(world, tmp_path / "run", "--resume_from_checkpoint", "none")
    run = Run(tmp_path, argv, NNODES=2, RESTARTS=2, MASTER_ADDR="host1")
    with hosts(2) as machines:
        waiting = run.waits_at(machines[lost], step=4)
        start = run.start_forked if forked else run.start
        jobs = [start(machine) for machine in machines]
        run.wait_for("checkpoint-3/complete.json")
        machines[lost].kill()
        waiting.unlink()
        time.sleep(2)
        machines[lost].switch_on()
        jobs[lost] = start(machines[lost])
        back = time.monotonic()
        run.wait_for("checkpoint-4/complete.json")
        print(f"it goes on {time.monotonic() - back:.1f} s after the return")
        assert [job.wait(240) for job in jobs] == [0, 0], "\n".join(job.output() for job in jobs)
        output = "\n".join(job.output() for job in jobs)
    assert "resuming from" in output
    assert [start["step"] for start in run.starts] == [0, 3]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 9))
    assert_same_model(tmp_path / "run", world / "straight")


def wait_for_words(job: Job, words: str, seconds: float = 240) -> None:
    wait_for(lambda: words in job.output(), lambda: f"no {words!r} in:\n{job.output()}", seconds)


def assert_same_steps(run: Path, straight: Path) -> None:
    """Rounding apart, and each step once."""
    ours, theirs = read_metrics(run), read_metrics(straight)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["samples"] == b["samples"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "few", "many"), [("1:2", 1, 2), ("2:3", 2, 3)])
def test_a_machine_that_joins_makes_the_run_lose_no_step(world, tmp_path, nodes, few, many):
    """First one is lost, and the run goes on without it, or not all have come yet."""
    same = {"plora_dropout": 0, "adam_epsilon": 1e-5, "global_batch_size": 6, "save_steps": 3}
    argv = fault_flags(world, tmp_path / "run", **same)
    run = Run(tmp_path, argv, NNODES=nodes, RESTARTS=2, MASTER_ADDR="10.77.0.1", LOGLEVEL="INFO")
    run_ranks(2, main, fault_flags(world, tmp_path / "straight", **same))
    with hosts(many) as machines:
        waiting = run.waits_at(machines[0], step=5)
        if few == 1:
            lost = run.waits_at(machines[1], step=4)
            jobs = [run.start(machine) for machine in machines]
            run.wait_for("checkpoint-3/complete.json")
            machines[1].kill()
            lost.unlink()
            wait_for_words(jobs[0], "after step 3 of 8")
            machines[1].switch_on()
            jobs.pop()
        else:
            jobs = [run.start(machine) for machine in machines[:few]]
            run.wait_for("checkpoint-3/complete.json")
        jobs.append(run.start(machines[-1]))
        for job in jobs[:-1]:
            wait_for_words(job, "Detected 1 new nodes")
        waiting.unlink()
        assert [job.wait(240) for job in jobs] == [0] * many, "\n".join(job.output() for job in jobs)
    assert [(start["step"], start["ranks"]) for start in run.starts] == (
        [(0, 2), (3, 1), (5, 2)] if few == 1 else [(0, 2), (5, 3)]
    )
    assert_same_steps(tmp_path / "run", tmp_path / "straight")


@pytest.mark.slow
def test_a_spare_takes_the_place_of_a_lost_machine_and_one_that_is_not_needed_ends_well(world, tmp_path):
    argv = fault_flags(world, tmp_path / "run")
    run = Run(tmp_path, argv, NNODES=2, RESTARTS=2, MASTER_ADDR="host1", LOGLEVEL="INFO")
    with hosts(3) as machines:
        waiting = run.waits_at(machines[1], step=4)
        jobs = [run.start(machine) for machine in machines[:2]]
        run.wait_for("checkpoint-3/complete.json")
        last = run.waits_at(machines[0], step=8)
        jobs.append(run.start(machines[2]))
        wait_for_words(jobs[2], "Rendezvous'ing worker group")
        time.sleep(3)
        machines[1].kill()
        waiting.unlink()
        run.wait_for("checkpoint-7/complete.json")
        machines[1].switch_on()
        jobs[1] = run.start(machines[1])
        wait_for_words(jobs[1], "Rendezvous'ing worker group")
        time.sleep(3)
        last.unlink()
        statuses = [job.wait(240) for job in jobs]
        output = "\n".join(job.output() for job in jobs)
    assert statuses == [0, 0, 0], output
    assert "Traceback" not in jobs[1].output()
    assert_same_model(tmp_path / "run", world / "straight")


@pytest.mark.slow
def test_a_stop_of_machines_that_may_restart_ends_with_its_status_on_all(world, tmp_path):
    argv = fault_flags(world, tmp_path / "run", max_steps=100000)
    run = Run(tmp_path, argv, NNODES="1:2", RESTARTS=2, MASTER_ADDR="host1")
    with hosts(2) as machines:
        jobs = [run.start(machine) for machine in machines]
        run.wait_for("checkpoint-1/complete.json")
        (tmp_path / "run" / "STOP").touch()
        statuses = [job.wait(240) for job in jobs]
        assert statuses == [STOPPED, STOPPED], "\n".join(job.output() for job in jobs)


@pytest.mark.slow
def test_a_machine_that_waits_for_others_ends_at_a_signal_as_a_stopped_run_does(world, tmp_path):
    environment = {"NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "PATH": PATH}
    environment = {**os.environ, "GPUS_PER_NODE": "1", "RESTARTS": "1", "LOGLEVEL": "INFO"} | environment
    command = [ROOT / "torchrun.sh", "full", *fault_flags(world, tmp_path / "run")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as job:
        assert job.stderr is not None
        assert any("Rendezvous'ing worker group" in line for line in job.stderr)
        time.sleep(1)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == STOPPED
        assert "ended by SIGUSR1, before ranks were started here" in job.stderr.read()


# --- what they agree on -----------------------------------------------------------------------------------


def test_ranks_agree_on_their_attempt_whatever_dead_ones_have_left_in_the_store():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    server.set("arrived as rank 1", "a process that was killed")

    def arrive(rank: int) -> Store:
        time.sleep(0.2 * (rank == 0))  # the others find what earlier attempts have left
        return store_of_attempt(TCPStore("127.0.0.1", server.port, is_master=False), rank, world=3)

    with ThreadPoolExecutor(3) as threads:
        for attempt in ("first", "second"):
            stores = list(threads.map(arrive, range(3)))
            assert not stores[2].check(["failed"])
            stores[0].set("failed", attempt)
            assert stores[1].get("failed").decode() == attempt
            newest = PrefixStore(server.get(NEWEST_ATTEMPT).decode(), server)
            assert newest.get("failed").decode() == attempt


def test_the_machine_that_has_the_address_holds_the_store_unless_the_port_is_taken():
    port = free_port()
    assert can_listen("localhost", port)
    assert not can_listen("192.0.2.1", port)
    with socket.create_server(("127.0.0.1", port)):
        assert not can_listen("localhost", port)
        assert wait_for_store("localhost", port) == "127.0.0.1"
