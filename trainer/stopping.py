"""Requests from outside to end a run early: SIGTERM, SIGINT, SIGUSR1 and the file `STOP` in output_dir.

Input: signals to any rank, or `touch output/STOP`. Output: a flag that the loop sums over all ranks together
with the step's counts, so that all of them see it after the same step, save, and exit 75:

    stop = StopRequest(Path("output"))
    counts = all_sum(torch.tensor([..., stop.asked()]))      # [..., 0.0]; after a signal to rank 3 [..., 1.0]

A second signal ends the process at once. A scheduler may signal every process of a job, and torchrun then
passes the same signal on: what arrives within ECHO_SECONDS of the first is taken for its echo.

torchrun also sends SIGTERM to the ranks that are left when one has ended with a failure. No step can be
finished without that one, so this is no request: a rank that is still there ENDING_SECONDS later is ended.
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
"""Longer than it takes all ranks to end together: stopped on request, or each with the same error."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Listens from its construction on; only the main thread may construct one.

    before_exit: called when a second signal, or torchrun, ends the process.
    """

    def __init__(self, output_dir: Path, before_exit: Callable[[], None] = lambda: None) -> None:
        self.file = output_dir / "STOP"
        self.is_requested = self.is_ending = False
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        # Such a handler waits while the main thread is in a C call, as NCCL's collectives are. What cannot
        # wait is done by a thread, to which Python writes every signal's number as soon as it arrives.
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
        """Take the file away, so that the next run does not stop too."""
        if is_main():
            self.file.unlink(missing_ok=True)


def _listen(received: int, before_exit: Callable[[], None]) -> None:
    """End the process at a second signal, or if torchrun wants it ended; never returns."""
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
            os.write(2, b"a second signal: ending at once\n")
            before_exit()
            os._exit(FAILED)


def wait_for_the_end(seconds: float = 10.0) -> None:
    """Another rank failed and says why: let torchrun's SIGTERM end this one, rather than add a second cause.

    Returns where that does not come, or came before as a request to stop.
    """
    handler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    if isinstance(handler, StopRequest) and handler.is_ending:
        os._exit(FAILED)
    if not (isinstance(handler, StopRequest) and handler.is_requested):
        time.sleep(seconds)
