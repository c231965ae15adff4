"""How runs are started: torchrun.sh, trainer.launch, Slurm, an installed package; and what they say last."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fault_cases import STOPPED, assert_same_model, fault_flags, launch, wait_for_file
from tests.installed import install
from tests.tiny import ROOT, free_port, read_metrics, run_ranks
from trainer.main import main

BINARIES = Path(sys.executable).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def world(fault_world) -> Path:
    return fault_world


def start(script: str, *argv: str, log: Path, folder: Path = ROOT, **environment: str) -> subprocess.Popen:
    """Start a shell script that finds the tests' own interpreter; its output goes to `log`."""
    environment = {"PATH": f"{BINARIES}:{os.environ['PATH']}", **environment}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with log.open("w") as file:
        return subprocess.Popen([script, *argv], cwd=folder, env=environment, stdout=file, stderr=file)


@pytest.mark.parametrize("signal_", [signal.SIGUSR1, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_the_launcher_passes_a_signal_on_and_ends_with_the_trainers_last_words(world, tmp_path, signal_):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    environment = {"GPUS_PER_NODE": "1", "MASTER_PORT": str(free_port())}
    argv = fault_flags(world, output_dir, max_steps=100000)
    process = start("./torchrun.sh", "full", *argv, log=log, **environment)
    wait_for_file(output_dir / "checkpoint-1")
    process.send_signal(signal_)
    assert process.wait(60) == STOPPED, log.read_text()
    output = log.read_text()
    assert "stopped after step" in output.rstrip().splitlines()[-1], output
    assert "Traceback" not in output
    last = read_metrics(output_dir)[-1]["step"]
    assert (output_dir / f"checkpoint-{last}" / "complete.json").exists()


@pytest.mark.slow
def test_two_launchers_on_one_machine_do_not_meet(world, tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    jobs = []
    for number in range(2):
        argv, log = fault_flags(world, tmp_path / f"run{number}"), tmp_path / f"log{number}"
        jobs.append(start("./torchrun.sh", "full", *argv, log=log, GPUS_PER_NODE="1"))
    statuses = [job.wait(120) for job in jobs]
    assert statuses == [0, 0], (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()
    assert_same_model(tmp_path / "run0", tmp_path / "run1")


SLURM = {"SLURM_JOB_ID": 40021, "SLURM_STEP_ID": 3, "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NODEID": 1}
SLURM |= {"SLURM_STEP_NUM_NODES": 2, "SLURM_STEP_NUM_TASKS": 2}
C10D = "--rdzv_backend c10d --rdzv_endpoint"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "--nproc_per_node 8 --standalone --max_restarts 0 -m trainer.main --max_steps 7"),
        ({"RESTARTS": 3}, "--standalone --max_restarts 3"),
        (
            {"NNODES": 1, "MASTER_PORT": 7000},
            "--nnodes 1 --node_rank 0 --master_addr localhost --master_port 7000",
        ),
        (
            {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "a"},
            "--nnodes 2 --node_rank 1 --master_addr a --master_port 6001 --max_restarts 0",
        ),
        ({"NNODES": 2, "MASTER_ADDR": "a"}, f"--nnodes 2 {C10D} a:6001 --rdzv_id xcomposer"),
        ({"NNODES": 2, "MASTER_ADDR": "a", "NODE_RANK": 0, "RESTARTS": 1}, f"--nnodes 2 {C10D} a:6001"),
        ({"NNODES": "1:4", "MASTER_ADDR": "a", "MASTER_PORT": 7000}, f"--nnodes 1:4 {C10D} a:7000"),
        ({"NNODES": 2}, "error: NNODES=2 needs MASTER_ADDR, the address of one of the machines"),
        (SLURM, "--nnodes 2 --node_rank 1 --master_addr node3 --master_port 20024 --max_restarts 0"),
        ({**SLURM, "RESTARTS": 2}, f"--nnodes 2 {C10D} node3:20024 --rdzv_id 40021"),
        ({**SLURM, "NNODES": "1:2"}, f"--nnodes 1:2 {C10D} node3:20024"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": 16}, "error: srun starts 16 tasks on 2 machines"),
        ({**SLURM, "SLURM_STEP_NUM_NODES": 1, "SLURM_STEP_NUM_TASKS": 1}, "--standalone"),
    ],
)
def test_the_launcher_tells_torchrun_where_machines_meet(tmp_path, environment, said):
    """With stand-ins for python and scontrol."""
    for name, line in {"python": 'echo "$@"', "scontrol": "printf 'node3\\nnode4\\n'"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {name: str(value) for name, value in environment.items()}
    environment |= {"PATH": f"{tmp_path}:/usr/bin:/bin", "GPUS_PER_NODE": "8"}
    command = [ROOT / "torchrun.sh", "full", "--max_steps", "7"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert said in done.stdout + done.stderr
    assert done.returncode == (2 if said.startswith("error") else 0)


@pytest.fixture
def busy_folder(tmp_path) -> Path:
    """A folder whose files have the names of our packages."""
    folder = tmp_path / "here"
    folder.mkdir()
    for name in ("data.py", "trainer.py"):
        (folder / name).write_text("raise SystemExit('this is not ours')")
    return folder


def test_the_launcher_trains_adapters_from_any_folder_by_a_link_and_relative_paths_start_there(
    world, busy_folder
):
    (busy_folder / "model").symlink_to(world / "model")
    (busy_folder / "start").symlink_to(ROOT / "torchrun.sh")
    environment = {"GPUS_PER_NODE": "1", "MODEL": "model"}
    environment |= {"DATA": f"../{os.path.relpath(world, busy_folder.parent)}/data/data.txt"}
    words = "lora --output_dir out/run --max_steps 2 --lora_r 4 --dataloader_num_workers 0 --report False"
    log = busy_folder / "log"
    process = start("./start", *words.split(), log=log, folder=busy_folder, **environment)
    assert process.wait() == 0, log.read_text()
    assert "10 of 10 B matrices are not zero" in log.read_text()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (busy_folder / "out" / "run" / name).is_file()


def test_a_data_py_where_a_module_is_run_does_not_hide_ours(busy_folder):
    (busy_folder / "trainer.py").unlink()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "trainer.main", "--help"]
    assert subprocess.run(command, cwd=busy_folder, env=environment).returncode == 0


def test_another_package_named_data_that_is_already_loaded_is_named(busy_folder):
    (busy_folder / "data.py").write_text("")
    (busy_folder / "trainer.py").unlink()
    command = [sys.executable, "-c", "import data, trainer.models"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=busy_folder, env=environment, capture_output=True, text=True)
    error = done.stderr.strip().splitlines()[-1]
    assert "another module named `data` is loaded" in error
    assert str(busy_folder / "data.py") in error


@pytest.mark.parametrize(
    "launcher", ["trainer.launch", pytest.param("torch.distributed.run", marks=pytest.mark.slow)]
)
def test_bad_input_is_the_last_that_a_launcher_shows(world, tmp_path, launcher):
    argv = fault_flags(world, tmp_path / "run", "--data_path", str(tmp_path / "absent.txt"))
    process = launch(tmp_path, "    pass", [], argv, launcher)
    output, _ = process.communicate(timeout=120)
    error = f"error: --data_path {tmp_path / 'absent.txt'}: there is no such file"
    if launcher == "trainer.launch":
        assert process.returncode == 2, output
        assert output.rstrip().splitlines()[-1] == error
        assert "Traceback" not in output
    else:  # as what its summary names as the root cause, behind its own traceback
        assert f"traceback : {error}" in output.partition("Root Cause")[2], output


@pytest.mark.parametrize("told", ["launcher", "ranks"])
def test_a_run_that_is_asked_to_stop_while_its_ranks_start_ends_as_a_stopped_one(tmp_path, told):
    """They do not listen to signals before their first step, as these processes never do."""
    rank = tmp_path / "rank.py"
    rank.write_text(
        f"import os, time\nfile = '{tmp_path}/' + os.environ['LOCAL_RANK']\n"
        "open(file + '.part', 'w').write(str(os.getpid()))\n"
        "os.rename(file + '.part', file)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "trainer.launch", "--nproc_per_node", "2", rank]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as launcher:
        for number in "01":
            wait_for_file(tmp_path / number)
        pids = [int((tmp_path / number).read_text()) for number in "01"]
        for pid in pids if told == "ranks" else [launcher.pid]:
            os.kill(pid, signal.SIGUSR1)
        _, output = launcher.communicate(timeout=60)
    assert launcher.returncode == STOPPED, output
    assert output.rstrip().splitlines()[-1].startswith("ended by SIGUSR1 before the first step"), output
    assert "Traceback" not in output


def test_a_port_that_is_taken_is_one_sentence(world, tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = launch(
            tmp_path, "    pass", ["--node_rank", "0", "--master_port", port], ["--help"], "trainer.launch"
        )
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in output
    assert output.startswith("error: "), output
    assert port in output


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["stopped", "killed"])
def test_the_launchers_of_all_machines_end_with_the_trainers_status(world, tmp_path, ending):
    environment = {"GPUS_PER_NODE": "1", "NNODES": "2", "MASTER_PORT": str(free_port())}
    argv = ["full", *fault_flags(world, tmp_path / "run", max_steps=100000)]
    jobs = []
    for number in range(2):
        node = {**environment, "NODE_RANK": str(number)}
        jobs.append(start("./torchrun.sh", *argv, log=tmp_path / f"log{number}", **node))
    wait_for_file(tmp_path / "run" / "checkpoint-1")
    if ending == "stopped":
        (tmp_path / "run" / "STOP").touch()
    else:
        (rank,) = Path(f"/proc/{jobs[1].pid}/task/{jobs[1].pid}/children").read_text().split()
        os.kill(int(rank), signal.SIGKILL)
    statuses = [job.wait(60) for job in jobs]
    logs = [(tmp_path / f"log{number}").read_text() for number in range(2)]
    assert statuses == ([STOPPED, STOPPED] if ending == "stopped" else [1, 1]), "\n".join(logs)
    if ending == "killed":
        last = [log.rstrip().splitlines()[-1] for log in logs]
        assert "error: rank 1 on" in last[1]
        assert (
            last[0] == "error: lost the connection to another rank, perhaps on another machine; see its error"
        )


def test_the_slurm_script_of_the_readme_is_queued_again_after_a_stop(world, tmp_path):
    """With stand-ins for srun, which starts a step on one machine, and for scontrol, which is asked twice."""
    script = next(
        block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "#SBATCH" in block
    )
    assert "GPUS_PER_NODE=8" in script
    script = script.replace("GPUS_PER_NODE=8", "GPUS_PER_NODE=1")
    more = "--max_steps 100000 --bf16 False --fix_vit False --save_strategy no"
    script = script.replace("--output_dir output/pets", f"--output_dir output/pets {more}")
    (tmp_path / "pets.sh").write_text(script)
    (tmp_path / "xcomposer-fsdp").symlink_to(ROOT)
    (tmp_path / "internlm-xcomposer2-vl-7b").symlink_to(world / "model")
    (tmp_path / "data.txt").write_text(f"{world}/data/colour.json\n")
    stand_ins = {
        "srun": "export SLURM_STEP_NUM_NODES=1 SLURM_STEP_NUM_TASKS=1 SLURM_NODEID=0 SLURM_STEP_ID=0\n"
        "export SLURM_STEP_NODELIST=$SLURM_JOB_NODELIST\n"
        'while [[ $1 != *torchrun.sh ]]; do shift; done; "$@"',
        "scontrol": 'echo "$@" >> asked; if [ "$1" = show ]; then echo localhost; fi',
    }
    for name, lines in stand_ins.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{BINARIES}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "2"}
    environment |= {"SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "42"}
    job = start("bash", "pets.sh", log=tmp_path / "log", folder=tmp_path, **environment)
    wait_for_file(tmp_path / "output" / "pets" / "metrics.jsonl")
    (tmp_path / "output" / "pets" / "STOP").touch()
    assert job.wait(60) == STOPPED, (tmp_path / "log").read_text()
    assert (tmp_path / "asked").read_text().splitlines() == ["show hostnames node[1-2]", "requeue 42"]


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True])
def test_the_installed_project_works_where_there_is_a_folder_named_data(world, tmp_path, editable):
    python = install(tmp_path, editable)
    here = tmp_path / "here"
    (here / "data").mkdir(parents=True)
    command = ["-m", "trainer.launch", "--standalone", "-m", "trainer.main"]
    command += fault_flags(world, "out", "--output_dir", "out", max_steps=2)
    check = ["-m", "data.check", f"{world}/data/data.txt", "--model_name_or_path", f"{world}/model"]
    for arguments in (command, check):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([python, *arguments], cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    code = {path.name for path in (ROOT / "trainer/models/xcomposer2").glob("*_xcomposer2.py")}
    assert code <= {path.name for path in (here / "out").glob("*.py")}


def test_without_the_extras_training_still_runs(world, tmp_path):
    for package in ("trainer", "data"):
        ignored = shutil.ignore_patterns("__pycache__", "extras")
        shutil.copytree(ROOT / package, tmp_path / "project" / package, ignore=ignored)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "project")}
    flags = fault_flags(world, tmp_path / "run", "--max_steps", "2")
    done = subprocess.run(
        [sys.executable, "-m", "trainer.main", *flags],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run_ranks(1, main, fault_flags(world, tmp_path / "with", "--max_steps", "2"))
    ours, theirs = (read_metrics(tmp_path / name)[0]["loss"] for name in ("run", "with"))
    assert ours == pytest.approx(theirs, rel=1e-6)
