"""torchrun that ends with the trainer's own words and exit status; `torchrun.sh` starts runs through it.

    python -m trainer.launch --nproc_per_node 8 -m trainer.main --model_name_or_path M --data_path data.txt

Input: torchrun's arguments. Two have other defaults: SIGUSR1 is passed on to the ranks as well, and they have
ten minutes to finish a step and its save. Output: the ranks' own, and nothing behind it where they have said
why they end. A rank that could not, as it was killed, is named in one line, with its machine and the signal.

Exit status: the trainer's (0, 2, 75, …), where torchrun's is 1 for every failure; 1 if a rank was killed.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from trainer.distributed import FAILED

DEFAULTS = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "600"]


def launch(arguments: Sequence[str], status_file: Path) -> int:
    """Run torchrun; the ranks write their exit status into the file. Returns the status to end with."""
    options = parse_args([*DEFAULTS, *arguments])
    if not options.max_restarts:  # else torchrun's log says why it starts the ranks again
        for name in ("multiprocessing.api", "agent.server.api"):
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if not Path(failure.error_file).is_file():
            print(f"\nerror: {how_it_ended(rank, failure)}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else FAILED
    except SignalException as error:
        if not status_file.is_file():
            print(f"\nerror: ended by {error.sigval.name}; nothing was saved after it", file=sys.stderr)
            return FAILED
    except DistError as error:  # of the ranks' own meeting point
        reason, place = str(error).splitlines()[0], f"{options.master_addr}:{options.master_port}"
        print(
            f"error: the machines cannot meet at {place}, MASTER_ADDR and MASTER_PORT: {reason}",
            file=sys.stderr,
        )
        return FAILED
    return int(status_file.read_text()) if status_file.is_file() else 0


def how_it_ended(rank: int, failure: ProcessFailure) -> str:
    """One sentence about a rank that has not said why it ended."""
    if failure.exitcode > 0:
        what = f"ended with status {failure.exitcode}, and without a word of why"
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
