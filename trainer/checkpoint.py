"""Checkpoints: what a run needs to go on, written beside the training and checked before it is read.

Input: the trained parameters, the optimizer, the loop's few numbers, and what writes the model's own folder.
Output, every `save_steps`, from 2 ranks:

    output/checkpoint-120/
        config.json, model.safetensors, tokenizer…    a Hugging Face folder: the model after step 120
        resume/shard-00001-model-….safetensors        rank 0's rows of the float32 parameters and of Adam's
        resume/shard-00002-model-….safetensors        moments; and rank 1's
        run.json                                      the configuration and the data plan that made it
        complete.json                                 step 120, and bytes and CRC-32 of every file above

The order of data and the dropout masks are functions of (seed, step, rank), so no position and no state of a
random generator is kept. torch.distributed.checkpoint writes and reshards the tensors, in its Hugging Face
format: safetensors and JSON, nothing to unpickle, and any number of ranks reads what any other wrote.

The loop waits only until parameters and moments are copied to the host's memory; a thread writes them. Only
when every rank has its files on the disk does rank 0 write `complete.json` and give the folder its name. A
save that fails is reported and its folder deleted; the checkpoint before it stays, and the run goes on.

The last step's checkpoint stays too, so that a longer training can go on from it. The final model in
output_dir is that checkpoint's, by hard links: nothing is gathered or written twice.
"""

import json
import math
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from data.files import sync_to_disk
from trainer.atomic import (
    FINAL,
    MARKER,
    RESUME,
    Jobs,
    begin,
    link_model,
    move_into,
    numbered,
    put_in_place,
    remove_old_checkpoints,
    write_json,
)
from trainer.config import Config
from trainer.distributed import is_main, log
from trainer.lock import Lock

T = TypeVar("T")
WriteModel = Callable[[Path, Jobs], None]
"""Fills a folder: its collectives at once, on every rank; what it writes, as jobs."""


class SaveError(OSError):
    """At least one rank could not write; every rank raises it with the same message."""


class Checkpoints:
    """Writes the checkpoints of one run and its final model. All ranks call all methods in the same order."""

    def __init__(
        self, run: Mapping[str, Any], config: Config, lock: Lock, steps_per_epoch: int, last_step: int
    ) -> None:
        """run: the content of run.json; lock: of output_dir, checked before anything there changes."""
        self.output_dir, self.run, self.lock, self.last_step = Path(config.output_dir), run, lock, last_step
        self.keep, self.asynchronous = config.save_total_limit, config.async_save
        self.minutes = config.minutes_between_saves
        self.every = {"no": math.inf, "steps": config.save_steps, "epoch": steps_per_epoch}[
            config.save_strategy
        ]
        # A group of its own, as the thread's messages must not mix with the loop's; a write may take long.
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self.failed = False
        self.newest: Path | None = None  # that this run has completed
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._begun = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether save_strategy wants a checkpoint of this step."""
        return step % self.every == 0 or (step == self.last_step and self.every < math.inf)

    def first_save(self, done: int) -> str:
        """A sentence that says when the first checkpoint comes; `done` steps are done already."""
        moments = []
        if self.every < math.inf:
            moments.append(f"step {min((done // self.every + 1) * self.every, self.last_step)}")
        if self.minutes < math.inf:
            moments.append(f"{self.minutes:g} minutes")
        if done == self.last_step:
            return "every step is done: what is left is to put the trained model in its place"
        if not moments:
            return "no checkpoints (--save_strategy no): if this run is killed, it starts from scratch"
        return f"first checkpoint after {' or '.join(moments)}"

    def save(
        self,
        step: int,
        write_model: WriteModel,
        tensors: Mapping[str, Tensor],
        notes: Mapping[str, Any],
        until_next: bool = False,
    ) -> None:
        """Write `checkpoint-<step>` once the save before is done. notes: what `complete.json` also holds;
        until_next: the next checkpoint replaces this one."""
        self.wait()
        self._begun = time.monotonic()
        folder = self.output_dir / f"checkpoint-{step}"
        content = {"step": step, "until_next": until_next, **notes}
        try:
            jobs = Jobs(put_off=self.asynchronous)
            temporary = self._begin(folder, write_model, jobs)
            if is_main():
                jobs.now(lambda: write_json(temporary / "run.json", self.run))
        except SaveError as error:
            self._report(folder, error)
            return
        held = {name: tensor.detach() for name, tensor in tensors.items()}
        if self.asynchronous:
            held = {name: tensor.to("cpu", copy=True) for name, tensor in held.items()}

        def finish() -> None:
            try:
                self._finish(temporary, folder, jobs, held, content)
                self.failed, self.newest = False, folder
            except SaveError as error:
                self._report(folder, error)
            except Exception as error:  # another rank is gone, or a mistake of ours
                self._error = error

        if self.asynchronous:
            self._thread = threading.Thread(target=finish, name=folder.name, daemon=True)
            self._thread.start()
        else:
            finish()
            self.wait()

    def minutes_are_over(self) -> bool:
        """Whether it is time for a save by the clock; rank 0's clock counts."""
        return is_main() and time.monotonic() - self._begun > 60 * self.minutes

    def is_saving(self) -> bool:
        """Whether this rank's thread is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when no save is under way; `failed` then says whether the last one failed."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            raise self._error

    def what_is_safe(self) -> str:
        """The newest complete checkpoint and what the same command does next: the end of a message."""
        for step, folder in numbered(self.output_dir).items():
            if (folder / MARKER).is_file():
                return f"{folder} holds step {step}, and the same command goes on from it"
        return f"{self.output_dir} holds no checkpoint, and the same command starts from scratch"

    def save_final_model(self, step: int, write_model: WriteModel) -> None:
        """Put the trained model into output_dir itself, from the checkpoint of the last step if there is
        one, and wait for it. SaveError if it fails."""
        self.wait()
        checkpoint, folder = self.output_dir / f"checkpoint-{step}", self.output_dir / FINAL
        try:
            if self.newest == checkpoint:
                self._on_main(lambda: link_model(checkpoint, folder))
            else:
                jobs = Jobs()
                temporary = self._begin(folder, write_model, jobs)
                self._finish(temporary, folder, jobs, {}, {"step": step})
            self._on_main(lambda: move_into(folder, self.output_dir))
        except SaveError as error:
            raise SaveError(
                f"the trained model is not in {self.output_dir}: {error}; make room there, or mend what the "
                f"error names: {self.what_is_safe()}"
            ) from None

    def _report(self, folder: Path, error: SaveError) -> None:
        self.failed = True
        goes_on = "training goes on, and the next save tries again"
        if folder.name == f"checkpoint-{self.last_step}":
            goes_on = "the trained model is written next, without what a longer training would go on from"
        log(
            f"\nwarning: {folder} is not saved: {error}; {goes_on}: make room in {self.output_dir}, or mend "
            f"what the error names; {self.what_is_safe()}"
        )
        if is_main():
            shutil.rmtree(folder.with_name(f".saving-{folder.name}"), ignore_errors=True)

    def _begin(self, folder: Path, write_model: WriteModel, jobs: Jobs) -> Path:
        """The temporary folder, with the model in it but for the jobs that are put off."""
        self._on_main(lambda: begin(folder))
        temporary = folder.with_name(f".saving-{folder.name}")
        if not all(self._together(temporary.is_dir)):
            raise SaveError(f"not every rank sees {temporary}: it must be on a file system that all share")
        write_model(temporary, jobs)
        return temporary

    def _finish(
        self, temporary: Path, folder: Path, jobs: Jobs, tensors: dict[str, Tensor], content: dict[str, Any]
    ) -> None:
        """Write what is left, then the marker, then the folder's name."""
        self._together(jobs.finish)
        if tensors:
            writer = HuggingFaceStorageWriter(str(temporary / RESUME), save_distributed=True)
            try:
                save_tensors(tensors, storage_writer=writer, process_group=self.group)
            except CheckpointException as error:
                raise SaveError(_one_sentence(error)) from None
        content["files"] = {}
        for files in self._together(lambda: _sizes_and_checksums(temporary)):
            content["files"].update(files)

        def complete() -> None:
            write_json(temporary / MARKER, content)
            put_in_place(temporary, folder)
            remove_old_checkpoints(self.output_dir, self.keep)  # also those that a killed run did not come to

        self._on_main(complete)

    def _on_main(self, work: Callable[[], object]) -> None:
        """Rank 0 changes output_dir, if the folder is still its own; if it fails, SaveError on all ranks."""

        def guarded() -> None:
            self.lock.check()
            work()

        self._together(lambda: guarded() if is_main() else None)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Every rank's result; if any rank failed, SaveError on all ranks."""
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
    """What steps change: `<parameter>`, and `<parameter>.exp_avg` and so on of the optimizer, not copied."""
    tensors = {}
    for name, parameter in trained.items():
        tensors[name] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}.{key}"] = value
    return tensors


def load(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` (of `resumable`) from a checkpoint of any number of ranks; every rank calls it."""
    load_tensors(tensors, storage_reader=HuggingFaceStorageReader(str(folder / RESUME)))


def read_marker(folder: Path) -> dict[str, Any]:
    """The content of a folder's `complete.json`; ValueError if there is none that can be read."""
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
    """What is wrong with a checkpoint, in a sentence, or None; every rank calls it and reads its share."""
    rank, world = dist.get_rank(), dist.get_world_size()
    problem = None
    try:
        files = read_marker(folder)["files"]
        if not any(name.startswith(f"{RESUME}/") for name in files):
            problem = f"{folder} holds a model without what resuming needs"
        for path in (folder / RESUME).glob("*.safetensors"):  # all of them would be read
            if f"{RESUME}/{path.name}" not in files:
                problem = f"{path} does not belong to it"
        for name in sorted(files)[rank::world]:
            size, checksum = files[name]
            path = folder / name
            if not path.is_file():
                problem = f"{path} is missing"
            elif path.stat().st_size != size:
                problem = f"{path} holds {path.stat().st_size:,} bytes instead of {size:,}"
            elif crc32(path) != checksum:
                problem = f"{path} is damaged: its checksum is not the one written with it"
    except (ValueError, OSError) as error:
        problem = str(error)
    problems: list[Any] = [None] * world
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found), None)


def crc32(path: Path) -> int:
    """CRC-32 of a file's content: the fastest checksum of the standard library, 2.4 GB/s on one core."""
    value = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(16 << 20):
            value = zlib.crc32(block, value)
    return value


def _sizes_and_checksums(folder: Path) -> dict[str, tuple[int, int]]:
    """Name → bytes and CRC-32, of this rank's share of the folder's files, which are on the disk then."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {}
    for path in paths[dist.get_rank() :: dist.get_world_size()]:
        sync_to_disk(path)
        found[path.relative_to(folder).as_posix()] = (path.stat().st_size, crc32(path))
    return found


def _one_sentence(error: CheckpointException) -> str:
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {cause}"
