"""A real Slurm on this machine, and a training that its time limit stops and that it queues again.

    apt-get install slurm-wlm slurm-wlm-basic-plugins munge        # Debian's packages
    python -m tests.slurm [SCRIPT]                                 # as root; about five minutes

Input: a batch script, by default the README's. Its model, data and GPUs become tiny ones, its time limit two
minutes. Two machines of Slurm are two `slurmd` here. Output: the log of the job, and whether the model
is, bit by bit, that of two ranks that were never stopped. Exit status: 0 if it is.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fault_cases import assert_same_model
from tests.tiny import ROOT, flags, free_port, read_metrics, tiny_world, torchrun

CONFIGURATION = """
ClusterName=here
SlurmctldHost={host}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=30
NodeName=DEFAULT CPUs=4 State=UNKNOWN
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """Its daemons while the block lasts; commands of Slurm find them by the environment."""
    for name in ("state", "node1", "node2"):
        (folder / name).mkdir()
    content = CONFIGURATION.format(
        host=socket.gethostname(), folder=folder, ports=[free_port() for _ in range(3)]
    )
    (folder / "slurm.conf").write_text(content)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    names = {name: f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")}
    commands = [
        ["munged", "--force", "--foreground", f"--socket={folder}/munge.socket", *names.values()],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", "node1"],
        ["slurmd", "-D", "-N", "node2"],
    ]
    daemons = []
    try:
        for command in commands:
            with (folder / f"daemon{len(daemons)}.log").open("w") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
            time.sleep(2)
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)


def with_names(names: Iterable[str]) -> None:
    """Run this program again, with names of machines that mean this one to it alone."""
    with tempfile.NamedTemporaryFile("w", delete=False) as file:
        file.write("".join(f"127.0.0.1 {name}\n" for name in ("localhost", socket.gethostname(), *names)))
    command = 'mount --bind "$0" /etc/hosts && exec "$@"'
    again = [sys.executable, "-m", "tests.slurm", *sys.argv[1:]]
    os.environ["SLURM_TEST_NAMES"] = file.name
    os.execvp("unshare", ["unshare", "--mount", "sh", "-c", command, file.name, *again])


def script_of_readme() -> str:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if "#SBATCH" in block)


def state_of(job: str) -> dict[str, str]:
    """What Slurm says of a job."""
    shown = subprocess.run(["scontrol", "show", "job", job], check=True, capture_output=True, text=True)
    return dict(re.findall(r"(\w+)=(\S*)", shown.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("script", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=600, help="of the training; more than a limit allows")
    parser.add_argument("--minutes", type=int, default=2, help="the job's time limit")
    options = parser.parse_args()
    if "SLURM_TEST_NAMES" not in os.environ:
        with_names(("node1", "node2"))
    script = options.script.read_text(encoding="utf-8") if options.script else script_of_readme()
    more = f"--max_steps {options.steps} --bf16 False --fix_vit False --save_strategy no --plora_dropout 0.2"
    for old, new in {
        r"--gpus-per-node=\d+ --cpus-per-task=\d+ --time=\S+": f"--cpus-per-task=1 --time={options.minutes}",
        r"USR1@\d+": "USR1@60",
        r"GPUS_PER_NODE=\d+": "GPUS_PER_NODE=1",
        r"(--output_dir \S+)": rf"\1 {more}",
    }.items():
        script, number = re.subn(old, new, script)
        assert number == 1, old
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = tiny_world(folder / "world", samples=24)
        (folder / "xcomposer-fsdp").symlink_to(ROOT)
        (folder / "internlm-xcomposer2-vl-7b").symlink_to(world / "model")
        lines = [f"{world}/data/{line}\n" for line in (world / "data" / "data.txt").read_text().splitlines()]
        (folder / "data.txt").write_text("".join(lines))
        (folder / "job.sh").write_text(script)
        print(script)
        os.environ |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        with slurm(folder):
            submit = ["sbatch", "--parsable", "job.sh"]
            job = subprocess.run(
                submit, cwd=folder, check=True, capture_output=True, text=True
            ).stdout.strip()
            states, known = list[str](), dict[str, str]()
            while not states or states[-1] not in (
                "COMPLETED",
                "FAILED",
                "TIMEOUT",
                "NODE_FAIL",
                "CANCELLED",
            ):
                time.sleep(1)
                known = state_of(job)
                if not states or states[-1] != known["JobState"]:
                    states.append(known["JobState"])
                    print(time.strftime("%H:%M:%S"), known["JobState"], known.get("Reason"), flush=True)
            lines = (folder / f"pets-{job}.log").read_text().splitlines()
            print("\n".join(line for line in lines if not line.startswith("step ")))
            print(f"states {' '.join(states)}, restarts {known['Restarts']}, exit code {known['ExitCode']}")
        output = folder / "output" / "pets"
        steps = [line["step"] for line in read_metrics(output)]
        assert steps == list(range(1, options.steps + 1)), steps
        assert int(known["Restarts"]) > 0, "it was never stopped: give more --steps"
        changes = {"fix_vit": False, "plora_dropout": 0.2, "max_steps": options.steps}
        argv = flags(world, "straight", data_path=folder / "data.txt", **changes)
        defaults = ("check_model", "dataloader_num_workers", "learning_rate")
        for flag in defaults:  # those of the script
            at = argv.index(f"--{flag}")
            del argv[at : at + 2]
        done = torchrun(2, argv, timeout=600)
        assert done.returncode == 0, done.stderr
        assert_same_model(output, world / "straight")
        print(f"the model is that of a run that was never stopped, after {known['Restarts']} restarts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
