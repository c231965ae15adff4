"""When a rank fails, the others end within seconds, wherever they wait; and not when a rank ends well."""

import os
import resource
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import trainer.job
from tests.fault_cases import STOPPED, fault_flags, launch
from tests.tiny import free_port, run_ranks
from trainer.distributed import all_sum, device_mesh, finish, start
from trainer.job import LOST_PEER, is_main, rank_zero_first

BLOCK = """
        mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)"""
"""As in a collective of NCCL, which waits for the failed rank and lets no signal handler run."""


@pytest.fixture(scope="module")
def world(fault_world) -> Path:
    return fault_world


def failing_hook(failing: int, error: str, time_file: Path) -> str:
    """In step 5, rank `failing` raises the error, and the other is blocked in a C call."""
    return f"""
    if (step, rank) == (5, {1 - failing}):{BLOCK}
    if (step, rank) == (5, {failing}):
        time.sleep(1)
        open({str(time_file)!r}, "w").close()
        raise {error}"""


def seconds_since(time_file: Path) -> float:
    return time.time() - time_file.stat().st_mtime


@pytest.mark.parametrize(
    "launcher", ["trainer.launch", pytest.param("torch.distributed.run", marks=pytest.mark.slow)]
)
def test_a_rank_in_a_c_call_does_not_hold_up_the_end_after_an_error(world, tmp_path, launcher):
    hook = failing_hook(1, 'RuntimeError("the boiler burst")', tmp_path / "raised")
    process = launch(tmp_path, hook, [], fault_flags(world, tmp_path / "run"), launcher)
    output, _ = process.communicate(timeout=120)
    assert seconds_since(tmp_path / "raised") < 15, output
    assert process.returncode == 1
    ours = output.partition("ChildFailedError")[0]
    assert ours.count("in hook") == ours.count("RuntimeError: the boiler burst") == 1, output
    if launcher == "trainer.launch":
        assert output.count("Traceback (most recent call last)") == 1
    assert not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "failing", "error"),
    [
        ("trainer.launch", 1, 'RuntimeError("the boiler burst")'),
        ("trainer.launch", 0, "SystemExit(3)"),
        ("torch.distributed.run", 0, 'RuntimeError("the boiler burst")'),
    ],
)
def test_a_rank_in_a_c_call_on_another_machine_ends_too(world, tmp_path, launcher, failing, error):
    """No launcher signals that machine, and the first machine's takes the store with it."""
    hook, jobs, port = failing_hook(failing, error, tmp_path / "raised"), [], str(free_port())
    for number in range(2):
        options = ["--nproc_per_node", "1", "--nnodes", "2", "--node_rank", str(number)]
        options += ["--master_addr", "localhost", "--master_port", port]
        (tmp_path / str(number)).mkdir()
        argv = fault_flags(world, tmp_path / "run")
        jobs.append(launch(tmp_path / str(number), hook, options, argv, launcher))
    outputs = [job.communicate(timeout=120)[0].partition("ChildFailedError")[0] for job in jobs]
    assert seconds_since(tmp_path / "raised") < 15, outputs
    assert LOST_PEER in outputs[1 - failing]
    assert "in hook" not in outputs[1 - failing]
    assert jobs[1 - failing].returncode == 1
    if "RuntimeError" in error:
        assert outputs[failing].count("RuntimeError: the boiler burst") == 1
        assert jobs[failing].returncode == 1
    else:
        assert jobs[failing].returncode == 3
    assert not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.slow
def test_a_long_c_call_after_a_request_to_stop_is_not_cut_short(world, tmp_path):
    hook = f"""
    if (step, rank) == (3, 0):
        os.kill(os.getppid(), signal.SIGTERM)
        ctypes.CDLL(None).sleep(10)
        open({str(tmp_path / "slept")!r}, "w").close()"""
    process = launch(tmp_path, hook, [], fault_flags(world, tmp_path / "run"), "trainer.launch")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == STOPPED, output
    assert "stopped after step 3 of 8, as asked" in output.rstrip().splitlines()[-1], output
    assert (tmp_path / "slept").exists()


def test_ranks_with_more_sockets_than_files_may_be_open_start_all_the_same():
    def run() -> None:
        is_open = len(list(Path("/proc/self/fd").iterdir()))
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (is_open + 8, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )
        start()
        dist.new_group(backend="gloo")  # another 7 sockets, as for saves
        assert all_sum(torch.ones(1)) == 8
        finish()

    run_ranks(8, run)


def test_a_collective_may_take_as_long_in_the_groups_of_a_hybrid_mesh():
    """torch gives new groups the backend's own limit, 10 minutes with NCCL."""

    def run() -> None:
        os.environ["LOCAL_WORLD_SIZE"] = "1"
        mesh = device_mesh(start(timeout_seconds=77), hybrid=True)
        for group in mesh.get_all_groups():
            assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 77
        finish()

    run_ranks(2, run)


def test_a_rank_may_end_well_long_before_another():
    """Without torchrun, rank 0 also takes the store with it."""

    def run() -> None:
        trainer.job.POLL_SECONDS = trainer.job.ENDING_SECONDS = 0.1
        start()
        time.sleep(0 if is_main() else 2)
        finish()
        time.sleep(0 if is_main() else 2)

    assert run_ranks(2, run) == ["", ""]


def test_ranks_wait_for_rank_zero_and_it_for_them_longer_than_a_collective_may_take():
    def run() -> None:
        start(timeout_seconds=2)
        used = time.process_time()
        with rank_zero_first():
            time.sleep(3)  # rank 0, and then the other, as where nothing can be cached
        assert time.process_time() - used < 1
        assert all_sum(torch.ones(())) == 2
        finish()

    run_ranks(2, run)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["raised", "killed"])
def test_a_failure_of_rank_zero_ends_those_that_wait_for_it(world, tmp_path, end):
    """While it measures the lengths of the samples."""
    raised = 'raise RuntimeError("the boiler burst")'
    hook = f"""
    pass

import trainer.prepare
measure_lengths = trainer.prepare.measure_lengths

def fail(*args, **kwargs):
    if os.environ["RANK"] == "0":
        time.sleep(2)
        open({str(tmp_path / "failed")!r}, "w").close()
        {raised if end == "raised" else "os.kill(os.getpid(), signal.SIGKILL)"}
    return measure_lengths(*args, **kwargs)

trainer.prepare.measure_lengths = fail"""
    argv = fault_flags(world, tmp_path / "run", "--packing", "True", "--hang_minutes", "0.5")
    process = launch(tmp_path, hook, [], argv, "trainer.launch")
    output, _ = process.communicate(timeout=120)
    assert seconds_since(tmp_path / "failed") < 15, output
    assert process.returncode == 1
    assert output.count("Traceback") == output.count("RuntimeError: the boiler burst") == (end == "raised")
