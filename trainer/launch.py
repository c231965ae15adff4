"""torchrun with the trainer's own error messages and exit status; `torchrun.sh` starts runs through it.

    python -m trainer.launch --nproc_per_node 8 -m trainer.main --model_name_or_path M --data_path data.txt

Input: torchrun's arguments. Two have other defaults: SIGUSR1 is forwarded to the ranks as well, and they have
ten minutes to finish a step and its save. Output: the ranks' own; nothing is added when they have logged why
they end. A rank that was killed is reported in one line, with its machine and the signal.

Exit status: the trainer's (0, 2, 75, …), where torchrun's is 1 for every failure; 1 if a rank was killed.
"""

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

from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from trainer.distributed import FAILED, FAILED_RANK, POLL_SECONDS, store_of_attempt

DEFAULTS = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "600"]


def launch(arguments: Sequence[str], status_file: Path) -> int:
    """Run torchrun, whose ranks write their exit status to the file; returns the exit status."""
    options = parse_args([*DEFAULTS, *arguments])
    if not options.max_restarts:  # with restarts, torchrun's log tells why it restarts the ranks
        for name in ("multiprocessing.api", "agent.server.api"):
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0 and options.nnodes != "1" and options.rdzv_backend == "static":
            tell_other_machines(options, rank)
        if not Path(failure.error_file).is_file():
            print(f"\nerror: {how_it_ended(rank, failure)}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else FAILED
    except SignalException as error:
        if not status_file.is_file():
            print(f"\nerror: ended by {error.sigval.name}; nothing was saved after it", file=sys.stderr)
            return FAILED
    except DistError as error:  # of the rendezvous
        address, reason = f"{options.master_addr}:{options.master_port}", str(error).splitlines()[0]
        problem = f"the machines cannot connect to {address}, MASTER_ADDR and MASTER_PORT: {reason}"
        print(f"error: {problem}", file=sys.stderr)
        return FAILED
    return int(status_file.read_text()) if status_file.is_file() else 0


def tell_other_machines(options: Namespace, rank: int) -> None:
    """Tell the ranks of other machines that one was killed here, as it could not tell them itself."""
    with suppress(DistError):
        address, patience = (options.master_addr, options.master_port), timedelta(seconds=10)
        store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=patience)
        store_of_attempt(store, options.max_restarts).set(FAILED_RANK, str(rank))
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
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XCOMPOSER_STATUS_FILE"] = f"{folder}/status"
        return launch(sys.argv[1:] if argv is None else argv, Path(folder) / "status")


if __name__ == "__main__":
    sys.exit(main())
