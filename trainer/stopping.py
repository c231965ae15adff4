"""Requests to stop a run early: SIGTERM, SIGINT, SIGUSR1 and the file `STOP` in output_dir.

Input: signals to any rank, or `touch output/STOP`. Output: a flag that the loop sums over all ranks together
with the step's counts, so that all of them see it after the same step, save, and exit 75:

    stop = StopRequest(Path("output"))
    counts = all_sum(torch.tensor([..., stop.asked()]))      # [..., 0.0]; after a signal to rank 3 [..., 1.0]

A second signal ends the process immediately. A scheduler may signal every process of a job, and torchrun
then forwards the same signal: whatever arrives within ECHO_SECONDS of the first counts as its echo.

torchrun also sends SIGTERM to the remaining ranks when one has ended. No step can be finished without that
one, so the flag has no effect then. A rank that was killed could tell no other (trainer/job.py): the
thread that hears the signals tells them, and ends its own process.
"""

import os
import select
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType

from trainer.job import (
    LOST_PEER,
    POLL_SECONDS,
    end_now,
    end_soon,
    gone_neighbour,
    is_main,
    lost_peer,
    tell_failure,
)

ECHO_SECONDS = 3.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Listens for requests to stop; only the main thread may construct one."""

    def __init__(self, output_dir: Path) -> None:
        self.file = output_dir / "STOP"
        self.is_requested = False
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        # A Python handler does not run while the main thread is in a C call, such as an NCCL collective. What
        # is urgent happens in a thread, which receives every signal's number as soon as it arrives.
        received, numbers = os.pipe()
        os.set_blocking(numbers, False)
        signal.set_wakeup_fd(numbers, warn_on_full_buffer=False)
        threading.Thread(target=_listen, args=(received,), name="signals", daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_requested = True

    def asked(self) -> bool:
        """Whether this rank has been asked to stop; rank 0 alone looks for the file."""
        return self.is_requested or (is_main() and self.file.exists())

    def honoured(self) -> None:
        """Delete the file, so that the next run does not stop too."""
        if is_main():
            self.file.unlink(missing_ok=True)


def _listen(received: int) -> None:
    """End the process at a second signal, or when another rank of this machine was killed."""
    first = None
    while True:
        if first is not None and (rank := gone_neighbour()) is not None:
            where = f"rank {rank} on {socket.gethostname()}"
            tell_failure(rank, f"error: {where} has ended without saying why\n{LOST_PEER}")
            end_soon()
            return  # the main thread is at its end
        if not select.select([received], [], [], None if first is None else POLL_SECONDS)[0]:
            continue
        if os.read(received, 1)[0] not in SIGNALS:
            continue
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first > ECHO_SECONDS:
            os.write(2, b"received a second signal: ending immediately\n")
            end_now()


def wait_for_the_end(seconds: float = 10.0) -> None:
    """After losing a peer, wait to be ended, so that only the cause is logged; returns if that fails.

    torchrun's SIGTERM ends a rank of the same machine, and the thread that watches the store any other, at
    once then.
    """
    lost_peer.set()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(seconds)
