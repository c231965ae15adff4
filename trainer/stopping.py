"""Requests to stop a run early: SIGTERM, SIGINT, SIGUSR1 and the file `STOP` in output_dir.

Input: signals to any rank, or `touch output/STOP`. Output: a flag that the loop sums over all ranks together
with the step's counts, so that all of them see it after the same step, save, and exit 75:

    stop = StopRequest(Path("output"))
    counts = all_sum(torch.tensor([..., stop.asked()]))      # [..., 0.0]; after a signal to rank 3 [..., 1.0]

A second signal ends the process immediately. A scheduler may signal every process of a job, and torchrun
then forwards the same signal: whatever arrives within ECHO_SECONDS of the first counts as its echo.

torchrun also sends SIGTERM to the remaining ranks when one has failed. No step can be finished without that
one, so this is not a request to stop: a rank that still runs ENDING_SECONDS later ends itself.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from trainer.distributed import FAILED, a_neighbour_is_gone, is_main

ECHO_SECONDS = 3.0
ENDING_SECONDS = 5.0
"""Longer than all ranks need to end together, on request or with the same error."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Listens for requests to stop; only the main thread may construct one.

    before_exit: called before a second signal, or torchrun, ends the process.
    """

    def __init__(self, output_dir: Path, before_exit: Callable[[], None] = lambda: None) -> None:
        self.file = output_dir / "STOP"
        self.is_requested = self.is_ending = False
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        # A Python handler does not run while the main thread is in a C call, such as an NCCL collective. What
        # is urgent happens in a thread, which receives every signal's number as soon as it arrives.
        received, numbers = os.pipe()
        os.set_blocking(numbers, False)
        signal.set_wakeup_fd(numbers, warn_on_full_buffer=False)
        threading.Thread(target=_listen, args=(received, before_exit), name="signals", daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if a_neighbour_is_gone():
            self.is_ending = True
        else:
            self.is_requested = True

    def asked(self) -> bool:
        """Whether this rank has been asked to stop; rank 0 alone looks for the file."""
        return self.is_requested or (is_main() and self.file.exists())

    def honoured(self) -> None:
        """Delete the file, so that the next run does not stop too."""
        if is_main():
            self.file.unlink(missing_ok=True)


def _listen(received: int, before_exit: Callable[[], None]) -> None:
    """End the process at a second signal, or when torchrun ends it; never returns."""
    first = None
    while number := os.read(received, 1):
        if number[0] not in SIGNALS:
            continue
        if first is None:
            first = time.monotonic()
            if a_neighbour_is_gone():
                time.sleep(ENDING_SECONDS)
                before_exit()
                os._exit(FAILED)
        elif time.monotonic() - first > ECHO_SECONDS:
            os.write(2, b"received a second signal: ending immediately\n")
            before_exit()
            os._exit(FAILED)


def wait_for_the_end(seconds: float = 10.0) -> None:
    """After a failure of another rank, wait for torchrun's SIGTERM to end this one, so that only the cause is
    logged.

    Returns if no SIGTERM arrives, or if it arrived earlier as a request to stop.
    """
    handler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    if isinstance(handler, StopRequest) and handler.is_ending:
        os._exit(FAILED)
    if not (isinstance(handler, StopRequest) and handler.is_requested):
        time.sleep(seconds)
