"""torchrun with the trainer's own error messages and exit status; `torchrun.sh` starts runs through it.

    python -m trainer.launch --nproc_per_node 8 -m trainer.main --model_name_or_path M --data_path data.txt

Input: torchrun's arguments. Two have other defaults: SIGUSR1 is forwarded to the ranks as well, and they have
ten minutes to finish a step and its save. Output: the ranks' own; nothing is added when they have logged why
they end. A rank that was killed is reported in one line, with its machine and the signal.

On several machines with `--rdzv_backend c10d`, the one that has the address of `--rdzv_endpoint` holds the
store at which they meet. With `--max_restarts`, machines that were lost may come back, that one too.

Exit status: the trainer's (0, 2, 75, …), where torchrun's is 1 for every failure; 1 if a rank was killed.
"""

import itertools
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn

from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher import api
from torch.distributed.run import parse_args, run

from trainer.job import (
    BAD_INPUT,
    FAILED,
    FAILED_RANK,
    LOST_PEER,
    NEWEST_ATTEMPT,
    POLL_SECONDS,
    STOPPED,
    allow_many_sockets,
)

DEFAULTS = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "600"]

PATIENCE_SECONDS = 900.0
"""How long a machine waits for the one that holds the store, as torchrun does without c10d."""
ENDED_AT_THE_START = "ended by {} before the first step, so nothing was trained"
"""From the first step on, ranks listen to signals, and no longer end by them."""
CLOSING_SECONDS = 3.0
"""How long the store outlasts the run: spare machines look every second whether it has ended."""


class Agent(LocalElasticAgent):
    """torchrun's process on a machine, with a few differences."""

    has_started_ranks = False
    exit_codes: ClassVar[list[int]] = []
    """Of the ranks, once they were ended."""
    rendezvous: Any = None
    """That of the last run. It has the store, which ends with it, and spare machines still need it."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:  # pyright: ignore
        Agent.has_started_ranks = True
        return super()._start_workers(worker_group)  # pyright: ignore

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        super()._shutdown(*args, **kwargs)
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        Agent.exit_codes = [handler.proc.returncode for handler in handlers.values()]

    def _stop_workers(self, worker_group: WorkerGroup) -> None:  # pyright: ignore
        """Stop the ranks before a restart. When a machine joins, they finish their step and save it first."""
        is_joined = worker_group.state == WorkerState.HEALTHY
        self._shutdown(timeout=self._shutdown_timeout if is_joined else 30)

    def run(self, role: str = "default") -> RunResult:  # pyright: ignore
        """Also of a spare machine that the run did not need, for which torchrun has no result."""
        Agent.rendezvous = self._worker_group.spec.rdzv_handler
        return super().run(role) or RunResult(WorkerState.SUCCEEDED)  # pyright: ignore


api.LocalElasticAgent = Agent  # pyright: ignore  # which torchrun starts


def launch(arguments: Sequence[str], status_file: Path) -> int:
    """Run torchrun, whose ranks write their exit status to the file; returns the exit status."""
    options = parse_args([*DEFAULTS, *arguments])
    if not options.max_restarts:  # with restarts, torchrun's log tells why it restarts the ranks
        for name in ("multiprocessing.api", "agent.server.api"):
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        if options.rdzv_backend == "c10d" and options.rdzv_endpoint:
            run_with_c10d(options)
        else:
            run(options)
    except ChildFailedError as error:
        if status_file.is_file() and (status := int(status_file.read_text())) in (STOPPED, BAD_INPUT):
            return status  # on which all ranks agree, even if one was ended before it could say so
        rank, failure = error.get_first_failure()
        if failure.exitcode == -signal.SIGUSR1:  # the scheduler's, to ranks that did not listen yet
            print(ENDED_AT_THE_START.format("SIGUSR1"), file=sys.stderr)
            return STOPPED
        how, has_said_why = how_it_ended(rank, failure), Path(failure.error_file).is_file()
        if not has_said_why and options.nnodes != "1" and options.rdzv_backend == "static":
            tell_other_machines(options, rank, how)
        if not has_said_why:
            print(f"\nerror: {how}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else FAILED
    except SignalException as error:
        if not Agent.has_started_ranks:
            print(f"ended by {error.sigval.name}, before ranks were started here", file=sys.stderr)
            return STOPPED
        if not status_file.is_file() and set(Agent.exit_codes) == {-error.sigval}:
            print(ENDED_AT_THE_START.format(error.sigval.name), file=sys.stderr)
            return STOPPED
        if not status_file.is_file():
            print(f"\nerror: ended by {error.sigval.name}; nothing was saved after it", file=sys.stderr)
            return FAILED
    except (DistError, RendezvousConnectionError) as error:
        address = options.rdzv_endpoint or f"{options.master_addr}:{options.master_port}"
        reason = str(error.__cause__ or error).splitlines()[0]
        problem = f"the machines cannot connect to {address}, MASTER_ADDR and MASTER_PORT: {reason}"
        print(f"error: {problem}", file=sys.stderr)
        return FAILED
    except RendezvousClosedError:
        print("error: the run has ended on another machine; see its error", file=sys.stderr)
        return FAILED
    except RendezvousTimeoutError:
        print(f"error: there are fewer machines than NNODES={options.nnodes}", file=sys.stderr)
        return FAILED
    return int(status_file.read_text()) if status_file.is_file() else 0


def run_with_c10d(options: Namespace) -> None:
    """Run torchrun on this machine; again when the machine that holds the store was lost, and is back."""
    # torchrun's own store would tell its address to no machine that joins or comes back later. Without it,
    # rank 0 has a store of its own.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    for name in options.signals_to_handle.split(","):  # torchrun does so when it starts ranks
        signal.signal(signal.Signals[name], _end)
    host, port = parse_rendezvous_endpoint(options.rdzv_endpoint, default_port=29400)
    for losses in itertools.count():
        here = Namespace(**vars(options))
        is_host = can_listen(host, port)
        if "is_host" not in here.rdzv_conf:  # torchrun compares names, which on Debian mean 127.0.1.1
            here.rdzv_conf = ",".join(filter(None, [here.rdzv_conf, f"is_host={is_host}"]))
        own_address = host if is_host else wait_for_store(host, port)
        here.local_addr = here.local_addr or own_address
        try:
            run(here)
            return
        except (RendezvousConnectionError, DistError) as error:
            if losses == options.max_restarts:
                raise
            print(f"the connection to {host}:{port} was lost ({error}); trying again", file=sys.stderr)
        finally:
            if is_host:
                time.sleep(CLOSING_SECONDS)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SignalException(f"received signal {number}", signal.Signals(number))


def can_listen(host: str, port: int) -> bool:
    """Whether this machine has the address, and the port is free."""
    with suppress(OSError):
        family = socket.getaddrinfo(host, None)[0][0]
        with socket.create_server((host, port), family=family):
            return True
    return False


def wait_for_store(host: str, port: int) -> str:
    """This machine's address on the way to the store, once that answers; RendezvousConnectionError if it does
    not in time."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                return connection.getsockname()[0]
        except OSError as error:
            if time.monotonic() > until:
                raise RendezvousConnectionError(str(error)) from error
            time.sleep(0.5)


def tell_other_machines(options: Namespace, rank: int, how: str) -> None:
    """Tell the ranks of other machines how one has ended here that could not tell them itself."""
    with suppress(DistError):
        address, patience = (options.master_addr, options.master_port), timedelta(seconds=10)
        store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=patience)
        attempt = store.get(NEWEST_ATTEMPT).decode()
        PrefixStore(attempt, store).compare_set(FAILED_RANK, "", f"{rank} error: {how}\n{LOST_PEER}")
        time.sleep(1.5 * POLL_SECONDS)  # the first machine's launcher holds the store, which they poll


def how_it_ended(rank: int, failure: ProcessFailure) -> str:
    """A sentence about a rank that ended without logging why."""
    if failure.exitcode > 0:
        what = f"ended with status {failure.exitcode} and no error message"
    else:
        what = f"was killed by {failure.signal_name()}"
        if failure.exitcode == -signal.SIGKILL:
            what += ", as the kernel does when memory runs out"
    return f"rank {rank} on {socket.gethostname()} {what}"


def main(argv: Sequence[str] | None = None) -> int:
    allow_many_sockets()  # the first machine's process may hold the store
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XCOMPOSER_STATUS_FILE"] = f"{folder}/status"
        return launch(sys.argv[1:] if argv is None else argv, Path(folder) / "status")


if __name__ == "__main__":
    sys.exit(main())
