"""Resumable checkpoints: written in the background, and verified before they are loaded.

Input: the trained parameters, the optimizer's state, the loop's counters and sums, and a function that writes
the model's folder. Output, every `save_steps`, from 2 ranks:

    output/checkpoint-120/
        config.json, model.safetensors, tokenizer…    a Hugging Face folder: the model after step 120
        resume/shard-00001-model-….safetensors        rank 0's rows of the float32 parameters and of Adam's
        resume/shard-00002-model-….safetensors        moments; and rank 1's (trainer/shards.py)
        run.json                                      the configuration and the data plan of the run
        complete.json                                 step 120, and bytes and CRC-32 of every file above

Data order and dropout masks are functions of (seed, step, rank), so neither a data position nor the state of
a random number generator is saved. Everything is safetensors and JSON, no pickle, and any number of ranks can
load what any other wrote.

The loop waits only until parameters and moments are copied to host memory; a thread writes them. When every
rank has its files on disk, rank 0 writes `complete.json` and renames the folder to its final name. A save
that fails is logged and its folder deleted; the previous checkpoint stays, and the run continues. The host
memory is kept for the next save: with Adam's moments in float32, 12 bytes for each trained parameter of the
rank's shard, and its share of the model's files; torch rounds pinned memory up, each tensor to a power of 2.

The last step's checkpoint is kept too, so that a longer training can resume from it. The final model in
output_dir consists of hard links to that checkpoint's weights: nothing is gathered or written twice.
"""

import json
import math
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.files import sync_to_disk
from trainer.atomic import (
    FINAL,
    MARKER,
    RESUME,
    HostCopies,
    Jobs,
    create_temporary,
    link_model,
    move_into,
    numbered,
    put_in_place,
    remove_old_checkpoints,
    write_json,
)
from trainer.config import Config
from trainer.job import is_main, log
from trainer.lock import Lock
from trainer.shards import read_rows, rows_to_write, save_tensors, span, write_index

T = TypeVar("T")
WriteModel = Callable[[Path, Jobs], None]
"""Fills a folder: runs its collectives immediately, on every rank, and writes files by the jobs."""


class SaveError(OSError):
    """At least one rank could not write; every rank raises it with the same message."""


class LoadError(OSError):
    """At least one rank could not read its rows; every rank raises it with the same message."""


class Checkpoints:
    """Writes the checkpoints of one run and its final model. All ranks call all methods in the same order."""

    def __init__(
        self, run: Mapping[str, Any], config: Config, lock: Lock, steps_per_epoch: int, last_step: int
    ) -> None:
        """run: the content of run.json; lock: the lock of output_dir, checked before each change there."""
        self.output_dir, self.run, self.lock, self.last_step = Path(config.output_dir), run, lock, last_step
        self.keep, self.minutes = config.save_total_limit, config.minutes_between_saves
        self.every = {"no": math.inf, "steps": config.save_steps, "epoch": steps_per_epoch}[
            config.save_strategy
        ]
        # A separate group, because the thread's messages must not mix with the loop's; writing may take long.
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self.failed = False
        self.newest: Path | None = None  # the last checkpoint that this run completed
        self._copies = HostCopies() if config.async_save else None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._begun = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether save_strategy asks for a checkpoint of this step."""
        return step % self.every == 0 or (step == self.last_step and self.every < math.inf)

    def first_save(self, done: int) -> str:
        """The log message about when the first checkpoint is written; `done`: steps of an earlier run."""
        if done == self.last_step:
            return "all steps are done; only the final model has to be written"
        triggers = []
        if self.every < math.inf:
            triggers.append(f"step {min((done // self.every + 1) * self.every, self.last_step)}")
        if self.minutes < math.inf:
            triggers.append(f"{self.minutes:g} minutes")
        if not triggers:
            return "no checkpoints (--save_strategy no): if this run is killed, it starts from scratch"
        return f"first checkpoint after {' or '.join(triggers)}"

    @torch.no_grad()
    def save(
        self,
        step: int,
        write_model: WriteModel,
        tensors: Mapping[str, Tensor],
        notes: Mapping[str, Any],
        until_next: bool = False,
        best_step: int | None = None,
    ) -> None:
        """Write `checkpoint-<step>` once the previous save is done.

        notes: added to `complete.json`; until_next: the next checkpoint replaces this one.
        best_step: step of the best evaluation, whose checkpoint is kept.
        """
        self.wait()
        self._begun = time.monotonic()
        folder = self.output_dir / f"checkpoint-{step}"
        content = {"step": step, "until_next": until_next, **notes}
        try:
            jobs = Jobs(self._copies)
            temporary = self._begin(folder, write_model, jobs)
            if is_main():
                jobs.now(lambda: write_json(temporary / "run.json", self.run))
        except SaveError as error:
            self._warn(folder, error)
            return
        shard: dict[str, Tensor] = {}
        offsets: dict[str, list[int]] = {}
        spans: dict[str, tuple[int, int]] = dict.fromkeys(tensors, (0, 0))
        for name, rows, offset in rows_to_write(tensors):
            shard[name], offsets[name] = jobs.on_host(f"{RESUME}/{name}", rows), offset
            spans[name] = span(rows, offset)
        jobs.later(partial(save_tensors, shard, offsets, temporary / RESUME))
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

        def finish() -> None:
            try:
                if device is not None:
                    # A new thread is on device 0, where its first call would create a context of this rank.
                    torch.accelerator.set_device_index(device)
                self._finish(temporary, folder, jobs, content, shapes, [*spans.values()], best_step)
                self.failed, self.newest = False, folder
            except SaveError as error:
                self._warn(folder, error)
            except Exception as error:  # a lost rank or a bug; raised by `wait` in the main thread
                self._error = error

        if self._copies:
            self._copies.wait()
            self._thread = threading.Thread(target=finish, name=folder.name, daemon=True)
            self._thread.start()
        else:
            finish()
            self.wait()

    def minutes_are_over(self) -> bool:
        """Whether `minutes_between_saves` have passed, by rank 0's clock; False on other ranks."""
        return is_main() and time.monotonic() - self._begun > 60 * self.minutes

    def wait(self) -> None:
        """Wait for a running save; afterwards `failed` is whether the last one failed."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            raise self._error

    def resume_hint(self) -> str:
        """The end of a log message: the newest complete checkpoint, and what the same command does next."""
        for step, folder in numbered(self.output_dir).items():
            if (folder / MARKER).is_file():
                return f"{folder} holds step {step}, and the same command resumes from it"
        return f"{self.output_dir} holds no checkpoint, and the same command starts from scratch"

    def save_final_model(
        self,
        step: int,
        write_model: WriteModel,
        notes: Mapping[str, Any],
        best_step: int | None = None,
    ) -> None:
        """Put the trained model into output_dir itself, from the last step's checkpoint if this run has
        written one, or from that of `best_step`; SaveError if that fails.

        notes: added to `complete.json`.
        """
        self.wait()
        checkpoint, folder = self.output_dir / f"checkpoint-{best_step or step}", self.output_dir / FINAL
        content = {"step": step, "best_step": best_step, **notes}
        try:
            if self.newest == checkpoint or (best_step and (checkpoint / MARKER).is_file()):
                self._on_main(lambda: link_model(checkpoint, folder, content))
            else:
                if best_step:
                    log(f"warning: {checkpoint}, the best one, was not saved: the last step's model is taken")
                jobs = Jobs()
                temporary = self._begin(folder, write_model, jobs)
                self._finish(temporary, folder, jobs, content)
            self._on_main(lambda: move_into(folder, self.output_dir))
        except SaveError as error:
            raise SaveError(
                f"the trained model is not in {self.output_dir}: {error}; free disk space there or fix this "
                f"error: {self.resume_hint()}"
            ) from None

    def _warn(self, folder: Path, error: SaveError) -> None:
        self.failed = True
        outcome = "training continues, and the next save tries again"
        if folder.name == f"checkpoint-{self.last_step}":
            outcome = "the trained model is written next, but a longer training cannot resume from it"
        log(
            f"\nwarning: {folder} is not saved: {error}; {outcome}: free disk space in {self.output_dir} or "
            f"fix this error; {self.resume_hint()}"
        )
        if is_main():
            shutil.rmtree(folder.with_name(f".saving-{folder.name}"), ignore_errors=True)

    def _begin(self, folder: Path, write_model: WriteModel, jobs: Jobs) -> Path:
        """Create the temporary folder and write the model to it, except for deferred jobs."""
        self._on_main(lambda: create_temporary(folder))
        temporary = folder.with_name(f".saving-{folder.name}")
        if not all(self._together(temporary.is_dir)):
            raise SaveError(f"not every rank sees {temporary}: it must be on a file system that all share")
        write_model(temporary, jobs)
        return temporary

    def _finish(
        self,
        temporary: Path,
        folder: Path,
        jobs: Jobs,
        content: dict[str, Any],
        shapes: Mapping[str, Sequence[int]] | None = None,
        spans: Sequence[tuple[int, int]] = (),
        best_step: int | None = None,
    ) -> None:
        """Run the deferred jobs, write the marker, and rename the folder.

        shapes: of the whole tensors in the shards, by name; spans: the rows of each that are in this rank's.
        """
        self._together(jobs.finish)
        everyones = self._gather(torch.tensor(spans)) if shapes else []
        names = self._on_main(lambda: _index_and_list(temporary, shapes, everyones))
        mine = names[dist.get_rank() :: dist.get_world_size()]
        content["files"] = {}
        for files in self._together(lambda: _sizes_and_checksums(temporary, mine)):
            content["files"].update(files)

        def complete() -> None:
            write_json(temporary / MARKER, content)
            put_in_place(temporary, folder)
            remove_old_checkpoints(self.output_dir, self.keep, best_step)  # including those of a killed run

        self._on_main(complete)

    def _on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 after checking the lock of output_dir, and return its result on all ranks;
        SaveError on all ranks if it fails."""

        def guarded() -> T:
            self.lock.check()
            return work()

        results: list[Any] = self._together(lambda: guarded() if is_main() else None)
        return results[0]

    def _gather(self, values: Tensor) -> list[Tensor]:
        """The tensors of all ranks, of one shape; empty on all ranks but rank 0."""
        received = [torch.empty_like(values) for _ in range(dist.get_world_size())] if is_main() else []
        dist.gather(values, received or None, group=self.group)
        return received

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank and return all results; SaveError on all ranks if it fails on any."""
        try:
            outcome = (work(), None)
        except Exception as error:
            outcome = (None, f"rank {dist.get_rank()}: {error}")
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome, group=self.group)
        for _, problem in outcomes:
            if problem:
                raise SaveError(problem)
        return [result for result, _ in outcomes]


def resumable(trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors that training changes, not copied: `<parameter>`, and the optimizer's `<parameter>.exp_avg`
    and so on."""
    tensors = {}
    for name, parameter in trained.items():
        tensors[name] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}.{key}"] = value
    return tensors


def load(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors` (from `resumable`) from a checkpoint of any number of ranks; every rank calls it.

    LoadError if a tensor is missing or has another shape, or if a shard cannot be read.
    """
    problem = None
    try:
        read_rows(folder / RESUME, tensors)
    except ValueError as error:
        problem = f"{folder / RESUME}: {error}"
    if problem := _first_problem(problem):
        raise LoadError(problem)


def read_marker(folder: Path) -> dict[str, Any]:
    """The content of a folder's `complete.json`; ValueError if it is missing or damaged."""
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if isinstance(content["step"], int) and isinstance(content["files"], dict):
            return content
    except OSError:
        raise ValueError(f"{folder} has no {MARKER}, so it was never finished") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{folder / MARKER} is damaged")


def damage(folder: Path) -> str | None:
    """A sentence about the damage to a checkpoint, or None; every rank calls it and reads its share."""
    rank, world = dist.get_rank(), dist.get_world_size()
    problem = None
    try:
        files = read_marker(folder)["files"]
        if not any(name.startswith(f"{RESUME}/") for name in files):
            problem = f"{folder} contains a model without the state to resume from"
        for path in (folder / RESUME).glob("*.safetensors"):  # the loader would read all of them
            if f"{RESUME}/{path.name}" not in files:
                problem = f"{path} does not belong to the checkpoint"
        for name in sorted(files)[rank::world]:
            size, checksum = files[name]
            path = folder / name
            if not path.is_file():
                problem = f"{path} is missing"
            elif path.stat().st_size != size:
                problem = f"{path} has {path.stat().st_size:,} bytes instead of {size:,}"
            elif crc32(path) != checksum:
                problem = f"{path} is damaged: its checksum differs from the one in {MARKER}"
    except (ValueError, OSError) as error:
        problem = str(error)
    return _first_problem(problem)


def _first_problem(problem: str | None) -> str | None:
    """The first rank's problem, if any has one; every rank calls it with its own."""
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), None)


def crc32(path: Path) -> int:
    """CRC-32 of a file's content: the standard library's fastest checksum, 2.4 GB/s on one core."""
    value = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(16 << 20):
            value = zlib.crc32(block, value)
    return value


def _index_and_list(
    folder: Path, shapes: Mapping[str, Sequence[int]] | None, spans: Sequence[Tensor]
) -> list[str]:
    """Write the index of the shards in a folder, if it has any; returns the names of all its files.

    For one rank: a thousand ranks that look at a thousand files each would keep a file system busy.
    """
    if shapes:
        write_index(folder / RESUME, shapes, spans)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _sizes_and_checksums(folder: Path, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Sync these files of the folder to the disk; returns name → bytes and CRC-32."""
    described = {}
    for name in names:
        path = folder / name
        sync_to_disk(path)
        described[name] = (path.stat().st_size, crc32(path))
    return described
