"""Experiment trackers: TensorBoard, Weights & Biases (wandb) and Trackio, each in a thread of its own.

Input: the lines of metrics.jsonl. Output: curves in each tracker of `--report_to`, named like the keys:

    with Trackers(["tensorboard", "wandb"], Path("output/pets"), {"seed": 42}) as trackers:
        trackers.log("eval", 500, {"loss": 0.7, "metrics": {"doc": {"anls": 0.8}}})
    # eval/loss 0.7 and eval/metrics/doc/anls 0.8, both at step 500, in the run "pets"

Training only appends to a queue, so a slow network does not slow it down, and a tracker that fails logs one
warning and is left out from then on. The threads start with the first line, when the data workers have been
forked. The run's id is kept in the file `tracker-id` of output_dir: a resumed run continues its curves.
"""

import os
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.job import log

ID_FILE = "tracker-id"
MAX_WAITING = 10_000
"""Lines that may wait for a tracker."""
START_SECONDS, FINISH_SECONDS, FAILED_SECONDS = 30, 60, 5
"""How long wandb may take to start, and how long the end of a run, or of one that failed, waits for it."""

Numbers = dict[str, float]
Run = tuple[Callable[[Numbers, int], object], Callable[[], object]]
"""What a tracker does with the numbers of a step, and at the end."""


def tensorboard(folder: Path, run_id: str, config: Mapping[str, Any]) -> Run:
    """Event files in `folder`/tensorboard; a resumed run adds a file."""
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(folder / "tensorboard")

    def write(numbers: Numbers, step: int) -> None:
        for name, number in numbers.items():
            board.add_scalar(name, number, step)
        board.flush()

    return write, board.close


def wandb(folder: Path, run_id: str, config: Mapping[str, Any]) -> Run:
    """A run of the project $WANDB_PROJECT, or xcomposer-fsdp; its files are in `folder`/wandb."""
    import wandb  # pyright: ignore[reportMissingImports]

    wandb.setup(wandb.Settings(silent=True))  # without a login this raises an error instead of asking for one
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "xcomposer-fsdp"),
        name=folder.resolve().name,
        id=run_id,
        resume="allow",
        dir=folder,
        config=dict(config),
        allow_val_change=True,
        settings=wandb.Settings(console="off", init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS),
    )
    # Its own step may only grow, but a resumed run repeats the steps since its checkpoint.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    log(f"wandb: {run.url or f'offline, in {run.dir}'}")
    return lambda numbers, step: run.log({**numbers, "step": step}), run.finish


def trackio(folder: Path, run_id: str, config: Mapping[str, Any]) -> Run:
    """A run of the project $TRACKIO_PROJECT, or xcomposer-fsdp; its name ends with the id, by which it is
    found again."""
    import trackio  # pyright: ignore[reportMissingImports]

    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", "xcomposer-fsdp"),
        name=f"{folder.resolve().name}-{run_id}",
        resume="allow",
        config=dict(config),
    )
    return lambda numbers, step: run.log(numbers, step=step), run.finish


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}


class Trackers:
    """The trackers of one run, a context manager that finishes them."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        """names: keys of TRACKERS, or none; folder: output_dir; config: shown with the run."""
        self.names, self.folder, self.config = [name for name in names if name in TRACKERS], folder, config
        self._threads: list[_Thread] | None = None

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.finish(FINISH_SECONDS if kind is None else FAILED_SECONDS)

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Send a line of metrics.jsonl to every tracker; all numbers in it, at any depth."""
        if self._threads is None:
            self._threads = self._start()
        numbers = dict(flatten(values, kind))
        for thread in self._threads:
            thread.put((numbers, step))

    def finish(self, seconds: float) -> None:
        """Finish the runs, waiting for at most so many seconds each."""
        threads, self._threads = self._threads or [], []
        for thread in threads:
            thread.put(None)
        for thread in threads:
            thread.join(seconds)
            if thread.is_alive():
                log(f"warning: --report_to {thread.name} is given up {seconds:g} s after the end of training")

    def _start(self) -> list["_Thread"]:
        if not self.names:
            return []
        try:
            path = self.folder / ID_FILE
            if not path.is_file():
                path.write_text(secrets.token_hex(4))
            run_id = path.read_text().strip()
        except OSError as error:
            log(f"\nwarning: --report_to: {error}; training continues without trackers")
            return []
        threads = [_Thread(name, self.folder, run_id, self.config) for name in self.names]
        for thread in threads:
            thread.start()
        return threads


class _Thread(threading.Thread):
    """Starts a tracker and sends it what is in the queue, up to a None."""

    def __init__(self, name: str, folder: Path, run_id: str, config: Mapping[str, Any]) -> None:
        super().__init__(name=name, daemon=True)
        self.arguments = folder, run_id, config
        self.lines: queue.Queue[tuple[Numbers, int] | None] = queue.Queue(MAX_WAITING)
        self.is_full = False

    def put(self, line: tuple[Numbers, int] | None) -> None:
        """Append to the queue; nothing if the tracker has failed."""
        if self.is_alive() and not self.is_full:
            try:
                self.lines.put_nowait(line)
            except queue.Full:
                self.is_full = True
                log(f"\nwarning: --report_to {self.name} hangs: it gets no more lines")

    def run(self) -> None:
        try:
            write, finish = TRACKERS[self.name](*self.arguments)
            while (line := self.lines.get()) is not None:
                write(*line)
            finish()
        except Exception as error:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            log(f"\nwarning: --report_to {self.name}: {reason}; training continues without it")


def flatten(values: Mapping[str, Any], name: str) -> list[tuple[str, float]]:
    """The numbers in nested dicts with their paths, as {"loss": {"doc": 0.7}} → ("eval/loss/doc", 0.7)."""
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += flatten(value, f"{name}/{key}")
        elif isinstance(value, int | float):
            found.append((f"{name}/{key}", value))
    return found
