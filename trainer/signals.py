"""Requests from outside to end a run early: SIGTERM, SIGUSR1 and the file `STOP` in output_dir.

Input: signals to any rank, or `touch output/STOP`. Output: a flag that the loop sums over all ranks together
with the step's counts, so that all of them see it after the same step, save, and exit 75:

    stop = StopRequest(Path("output"))
    counts = all_sum(torch.tensor([..., stop.asked()]))      # [..., 0.0]; after a signal to rank 3 [..., 1.0]

A second signal ends the process at once. A scheduler may signal every process of a job, and torchrun then
passes the same signal on: what arrives within ECHO_SECONDS of the first is taken for its echo.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from trainer.distributed import is_main

ECHO_SECONDS = 3.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Listens from its construction on; only the main thread may construct one.

    before_exit: called when a second signal ends the process.
    """

    def __init__(self, output_dir: Path, before_exit: Callable[[], None] = lambda: None) -> None:
        self.file, self._before_exit = output_dir / "STOP", before_exit
        self._first_signal: float | None = None
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
        elif now - self._first_signal > ECHO_SECONDS:
            os.write(2, b"a second signal: ending at once\n")
            self._before_exit()
            os._exit(1)

    def asked(self) -> bool:
        """Whether this rank has been asked to stop; rank 0 alone looks for the file."""
        return self._first_signal is not None or (is_main() and self.file.exists())

    def honoured(self) -> None:
        """Take the file away, so that the next run does not stop too."""
        if is_main():
            self.file.unlink(missing_ok=True)


def wait_for_the_end(seconds: float = 20.0) -> None:
    """Another rank failed and says why: let torchrun's SIGTERM end this one, rather than add a second cause.

    A rank that has that signal already goes on at once.
    """
    handler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if not (isinstance(handler, StopRequest) and handler.asked()):
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        time.sleep(seconds)
