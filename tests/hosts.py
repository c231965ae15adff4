"""Machines on one network, made of Linux namespaces, for tests of what happens on several machines.

with hosts(2) as (first, second):                   # host1 at 10.77.0.1, host2 at 10.77.0.2, on one bridge
    ranks = start_ranks((first, second), 2, main, argv)      # two forked ranks on each machine
    job = second.start(["torchrun.sh", …], NNODES=2, …)      # or a command on one of them
    second.unplug()                                 # or plug(), throttle("20mbit"), hide(folder), kill(), …
    assert [rank.wait(60) for rank in ranks] == [1] * 4, ranks[0].output()

A machine has its own processes, network, hostname and /etc/hosts, and shares all files with the others. It
takes no rights, only user namespaces; where they are forbidden, the test is skipped.
"""

import ctypes
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

import trainer.launch
from tests.tiny import call_in_fork
from trainer.main import leave, main

PORT = 29400
"""For MASTER_PORT: every machine has its own ports, so that it is free."""
ALL_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x04000000 | 0x00020000
"""CLONE_NEWUSER, NEWNET, NEWPID, NEWUTS and NEWNS of <sched.h>."""
FIRST_PROCESS = """
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody else waits for processes whose parents have ended
print("ready", flush=True)
sys.stdin.read()  # until the test closes it, or ends in any way
"""
_pipes: list[int] = []
"""Of first processes: a fork must close its copies, or a test that ends would not end the machines."""


class Job:
    """A command or a forked function that runs on a machine; its output goes to the file `log`."""

    def __init__(
        self, host: "Host", action: Callable[[], NoReturn], log: Path, environment: dict[str, Any]
    ) -> None:
        self.host, self.log = host, log
        self.status: int | None = None
        reader, writer = os.pipe()
        self._waiting = os.fork()
        if self._waiting == 0:
            _run_on(host.process, action, environment, writer)
        os.close(writer)
        self.pid = int.from_bytes(os.read(reader, 8), "little")
        """The id of its process, as the test sees it."""
        os.close(reader)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """The exit status, negative for a signal. A job that takes longer fails the test with its output."""
        until = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < until, f"it still runs after {seconds} s:\n{self.output()}"
            time.sleep(0.02)
        assert self.status is not None
        return self.status

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        if self.status is None:
            self.status = _status_of_child(self._waiting)
        return self.status

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


class Host:
    """One machine: its `name` and `address`, and `process`, its first process, with which all others end."""

    def __init__(self, number: int, network: subprocess.Popen[str], folder: Path) -> None:
        self.name, self.address = f"host{number}", f"10.77.0.{number}"
        self.jobs: list[Job] = []
        self._network, self._folder, self._port = network, folder, f"port{number}"
        self._addresses: dict[str, str] = {}
        self._switch_on()

    def _switch_on(self) -> None:
        network = self._network
        namespaces = ["--net", "--mount", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child"]
        self._parent = _start_first_process([*_enter(network.pid, "--user", "--net"), "unshare", *namespaces])
        children = Path(f"/proc/{self._parent.pid}/task/{self._parent.pid}/children")
        self.process = int(children.read_text())
        peer = ["peer", "name", "eth0", "netns", str(self.process)]
        self._on_network("ip", "link", "add", self._port, "type", "veth", *peer)
        self._on_network("ip", "link", "set", self._port, "master", "bridge", "up")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        self.run("ip", "link", "set", "lo", "up")
        self.run("hostname", self.name)

    def set_names(self, addresses: dict[str, str]) -> None:
        """Write /etc/hosts."""
        self._addresses = addresses
        lines = [f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **addresses}.items()]
        path = self._folder / f"etc-hosts-{self.name}"
        path.write_text("".join(lines))
        self.run("mount", "--bind", str(path), "/etc/hosts")

    # --- what runs on it ----------------------------------------------------------------------------------

    def run(self, *command: str) -> str:
        """The output of a short command that may need the rights of root there."""
        enter = _enter(self.process, "--user", "--net", "--mount", "--uts", "--pid")
        return subprocess.run([*enter, *command], check=True, capture_output=True, text=True).stdout

    def start(self, command: Sequence[str | Path], **environment: Any) -> Job:
        """Start a command in the current folder, with these changes of the environment."""
        return self.call(os.execvp, str(command[0]), [str(word) for word in command], **environment)

    def call(self, function: Callable[..., Any], *args: Any, **environment: Any) -> Job:
        """Call `function(*args)` in a fork of this process, which saves the import of torch."""
        log = self._folder / f"{self.name}-{len(self.jobs)}.log"
        self.jobs.append(Job(self, lambda: call_in_fork(function, args, log), log, environment))
        return self.jobs[-1]

    # --- what happens to it -------------------------------------------------------------------------------

    def kill(self) -> None:
        """End all its processes at once: the kernel closes their connections, and the network goes too."""
        if self._parent.poll() is None:
            self._parent.kill()  # first: it would complain of the way its child ends
            with suppress(ProcessLookupError):  # it ends with its parent, perhaps already
                os.kill(self.process, signal.SIGKILL)
            self._parent.wait()

    def switch_on(self) -> None:
        """Start a machine that was killed again; nothing runs on it yet."""
        assert self._parent.stdin is not None
        _pipes.remove(self._parent.stdin.fileno())
        self._parent.stdin.close()
        self._switch_on()
        self.set_names(self._addresses)

    def unplug(self) -> None:
        """Pull the network cable: from now on nothing arrives, not even that a connection was closed."""
        self._on_network("ip", "link", "set", self._port, "down")

    def plug(self) -> None:
        self._on_network("ip", "link", "set", self._port, "up")

    def throttle(self, rate: str) -> None:
        """Limit what it sends, such as "20mbit" in a second."""
        limit = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "50ms"]
        self.run("tc", "qdisc", "replace", "dev", "eth0", *limit)

    def hide(self, folder: Path) -> None:
        """Show an empty folder in its place, on this machine alone."""
        self.run("mount", "-t", "tmpfs", "none", str(folder))

    def sent_bytes(self) -> int:
        """What its network interface has sent, headers included."""
        lines = Path(f"/proc/{self.process}/net/dev").read_text().splitlines()
        return next(int(line.split()[9]) for line in lines if line.strip().startswith("eth0:"))

    def _on_network(self, *command: str) -> None:
        command = (*_enter(self._network.pid, "--user", "--net"), *command)
        subprocess.run(command, check=True, capture_output=True)


@contextmanager
def hosts(count: int, own_addresses: Sequence[str | None] = ()) -> Iterator[tuple[Host, ...]]:
    """Machines while the block lasts.

    own_addresses: what each machine's own name means to itself, None: nothing; by default 127.0.1.1, as
    Debian sets it up.
    """
    _skip_where_forbidden()
    machines: list[Host] = []
    with tempfile.TemporaryDirectory() as folder:
        network = _start_first_process(["unshare", "--user", "--map-root-user", "--net"])
        try:
            for command in ("link add bridge type bridge", "link set bridge up"):
                enter = _enter(network.pid, "--user", "--net")
                subprocess.run([*enter, "ip", *command.split()], check=True, capture_output=True)
            for number in range(1, count + 1):
                machines.append(Host(number, network, Path(folder)))
            for machine, own in zip(machines, own_addresses or ["127.0.1.1"] * count, strict=True):
                addresses = {other.name: other.address for other in machines if other is not machine}
                machine.set_names(addresses | ({machine.name: own} if own else {}))
            yield tuple(machines)
        finally:
            for machine in machines:
                machine.kill()
                for job in machine.jobs:
                    job.wait(10)
            network.kill()
            network.wait()
            for process in (network, *(machine._parent for machine in machines)):
                assert process.stdin is not None
                _pipes.remove(process.stdin.fileno())
                process.stdin.close()


def start_ranks(
    machines: Sequence[Host], each: int | Sequence[int], function: Callable[..., Any], *args: Any, **more: Any
) -> list[Job]:
    """Fork ranks that call `function(*args)` on machines, `each` of them, as torchrun would start them.

    more: other variables of the environment.
    """
    numbers = [each] * len(machines) if isinstance(each, int) else each
    world, jobs = sum(numbers), list[Job]()
    for machine, local_world in zip(machines, numbers, strict=True):
        for local_rank in range(local_world):
            environment = {"RANK": len(jobs), "WORLD_SIZE": world, "LOCAL_RANK": local_rank}
            environment |= {"LOCAL_WORLD_SIZE": local_world}
            environment |= {"MASTER_ADDR": machines[0].address, "MASTER_PORT": PORT, **more}
            jobs.append(machine.call(function, *args, **environment))
    return jobs


# --- torchrun that forks ----------------------------------------------------------------------------------


def launch_forked(options: Sequence[str], argv: Sequence[str]) -> int:
    """`python -m trainer.launch options -m trainer.main argv`, except that torchrun forks its ranks.

    For `Host.call`: nothing is imported anew, neither here nor in a rank, which would take seconds in each.
    """
    subprocess_handler.Popen = ForkedRank  # pyright: ignore
    return trainer.launch.main([*options, "-m", "trainer.main", *argv])


class ForkedRank:
    """What torchrun uses of a `subprocess.Popen`, for a fork that calls the main function of the trainer."""

    def __init__(self, args: Sequence[str], env: dict[str, str], **_: Any) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(env)
            leave(main(args[args.index("trainer.main") + 1 :]))
        except SystemExit as end:
            status = _status_of(end)
        finally:
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _status_of_child(self.pid)
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        until = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.02)
        return status


def _status_of_child(process: int) -> int | None:
    """The exit status of a child, negative for a signal; None while it runs."""
    ended, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _status_of(end: SystemExit) -> int:
    return end.code if isinstance(end.code, int) else int(end.code is not None)


# --- namespaces -------------------------------------------------------------------------------------------


def _skip_where_forbidden() -> None:
    attempt = ["unshare", "-Urnm", "--uts", "--pid", "--fork", "--mount-proc", "ip", "link", "add"]
    try:
        done = subprocess.run([*attempt, "bridge", "type", "bridge"], capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"machines of namespaces need unshare, nsenter and ip: {error}")
    if done.returncode:
        pytest.skip(f"namespaces are forbidden here: {done.stderr.strip()}")


def _enter(process: int, *namespaces: str) -> list[str]:
    """A prefix that runs a command in the namespaces of a process."""
    return ["nsenter", f"--target={process}", "--preserve-credentials", *namespaces]


def _start_first_process(prefix: list[str]) -> subprocess.Popen[str]:
    """A process behind the prefix, which makes its namespaces; they last as long as it."""
    command = [*prefix, sys.executable, "-I", "-S", "-c", FIRST_PROCESS]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    _pipes.append(process.stdin.fileno())
    with process.stdout as output:
        assert output.readline() == "ready\n"
    return process


def _run_on(
    machine: int, action: Callable[[], NoReturn], environment: dict[str, Any], pid_writer: int
) -> NoReturn:
    """In a fork: enter a machine's namespaces, fork there, and end as that process does."""
    status = 1
    try:
        for pipe in _pipes:
            os.close(pipe)
        folder, target = os.getcwd(), os.pidfd_open(machine)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(target, ALL_NAMESPACES):  # os.setns came with Python 3.12
            raise OSError(ctypes.get_errno(), "setns")
        os.chdir(folder)
        child = os.fork()  # only children enter a namespace of processes
        if child == 0:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)  # machines have their own
            os.environ.update({name: str(value) for name, value in environment.items()})
            action()
        os.write(pid_writer, child.to_bytes(8, "little"))
        os.close(pid_writer)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status < 0:
            os.kill(os.getpid(), -status)
    except SystemExit as end:
        status = _status_of(end)
    except BaseException:
        os.write(2, traceback.format_exc().encode())  # the log, whose file Python has closed
    finally:
        os._exit(status)
