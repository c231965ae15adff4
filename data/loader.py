"""Worker processes that read this rank's micro-batches of each optimizer step.

    reader = SampleReader(sources, SampleEncoder(conversation, max_length=4096), image_processor)
    loader = StepLoader(reader, StepSampler(sources, seed=0, global_batch=64), rank=0, num_ranks=2,
                        samples_per_micro_batch=4, first_step=120, num_steps=1000, num_workers=4)
    for micro_batches in loader:         # step 120, 121, …: a list of MicroBatch, equally long on every rank
        ...

The main process computes the plan of each step; a worker reads, tokenises, decodes and collates one
micro-batch at a time, and they arrive in the plan's order whatever the number of workers. The only state is
`first_step`. A bad sample ends the run with a DataError that names it, or (`on_bad_sample="skip"`) is left
out, logged and listed in the micro-batch.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data.batch import MicroBatch, collate
from data.errors import DataError, FileChangedError
from data.images import ImageProcessor, open_image, process, size_of
from data.mixture import Source
from data.packing import Packing, deal, idle_share
from data.sample import Sample
from data.sampler import StepSampler
from data.tokens import IGNORED, SLOT, Encoded, Piece, SampleEncoder

logger = logging.getLogger(__name__)

MAX_WARNINGS = 100
"""Samples that a rank logs one by one: those left out, and as many of those made to fit."""
PREFETCHED_PER_WORKER = 4
"""Micro-batches that each worker reads ahead."""
END_WORKER = signal.SIGUSR2

SizeOf = Callable[[int], tuple[int, int]]
"""(width, height) of a sample's i-th image, read from its header when first asked for."""

OnLongSample = Literal["truncate", "skip", "error"]


@dataclass
class SampleReader:
    """(source, record) → ids, labels and pictures."""

    sources: Sequence[Source]
    encoder: SampleEncoder
    image_processor: ImageProcessor
    on_long_sample: OnLongSample = "truncate"
    """A sample over max_length loses its tail, is left out (it keeps no label), or raises a DataError."""
    fit_images: bool = False
    """First try to make a long sample fit by lowering the limit of its images' size, as little as needed."""
    needs_images: bool = True
    """If any sample has an image, every micro-batch must have one: the vision tower has collectives, or the
    projector a gradient that all ranks add up."""
    positions: Callable[[np.ndarray, Sequence[Any]], np.ndarray | None] | None = None
    """A sample's ids and its pictures → its positions [k, T]; None where they are 0, 1, 2, …"""

    def __post_init__(self) -> None:
        if self.fit_images:
            try:
                self.image_processor.smaller()
            except ValueError as error:
                raise DataError(f"--fit_images: {error}; remove the flag") from error

    def read(self, source_number: int, index: int, *, decode: bool = True) -> tuple[Encoded, list[Any]]:
        """The encoded sample and its pictures; DataError that names the record if it cannot be used.

        Pictures after the cut at max_length are not decoded, nor any if no answer is left before it; such a
        sample is not trained on and has no positions. `decode=False` reads only the pictures' headers and
        returns no pictures.
        """
        with self._open(source_number, index) as (sample, images, size):
            encoded, processor = self._fit(self.encoder.pieces(sample), size)
            decode = decode and encoded.num_supervised > 0
            used = images[: len(encoded.image_tokens)] if decode else []
            pictures = [process(image, processor) for image in used]
            if self.positions and decode:
                encoded = replace(encoded, position_ids=self.positions(encoded.input_ids, pictures))
            return encoded, pictures

    def batch(self, pictures: list[Any]) -> dict[str, Any]:
        """The model's arguments for a micro-batch's pictures; without any, those for a dummy picture if it
        needs one, whose features fill no slot.

        Ranks run collectives together, and gradients must not depend on which rank gets which sample.
        """
        if not pictures and self.needs_images and any(source.records.num_images for source in self.sources):
            pictures = [self.image_processor.dummy()]
        return self.image_processor.batch(pictures) if pictures else {}

    def tokens_before_cut(self, source_number: int, index: int, encoded: Encoded) -> int:
        """Tokens that a sample would have without max_length; encoded: what `read` returned for it.

        Its images count at the size that `read` used; one after the cut that cannot be read counts as 1.
        """
        if not encoded.is_cut:
            return len(encoded.input_ids)
        processor = self._processor_of(encoded)
        unlimited = copy(self.encoder)
        unlimited.max_length = sys.maxsize
        with self._open(source_number, index) as (sample, _, size):

            def image_tokens(number: int) -> np.ndarray:
                try:
                    return processor.tokens(*size(number))
                except DataError:
                    return np.full(1, SLOT)

            return len(unlimited.encode(sample, image_tokens).input_ids)

    def views(self, source_number: int, index: int, encoded: Encoded) -> list[Image.Image]:
        """The pictures of a sample before its cut, as the model sees them; encoded: what `read` returned."""
        resize = self._processor_of(encoded).resize
        with self._open(source_number, index) as (_, images, size):
            if encoded.image_tokens:
                size(len(encoded.image_tokens) - 1)  # opens all of them
            return [process(image, resize) for image in images]

    def _processor_of(self, encoded: Encoded) -> ImageProcessor:
        """The processor that a sample's images had."""
        if encoded.image_limit is None:
            return self.image_processor
        return self.image_processor.smaller()[encoded.image_limit]

    def read_prompt(self, source_number: int, index: int) -> tuple[Sample, Encoded, list[Any]]:
        """The sample, with or without an answer, and the prompt for generating one, with its pictures.

        A prompt is never cut: DataError if it does not fit into max_length, with smaller images if
        `fit_images`.
        """
        with self._open(source_number, index, needs_answer=False) as (sample, images, size):
            pieces = self.encoder.prompt_pieces(sample)
            smaller = self.image_processor.smaller() if self.fit_images and sample.images else {}
            for processor in (self.image_processor, *smaller.values()):
                if not (prompt := self._join(pieces, size, processor)).is_cut:
                    return sample, prompt, [process(image, processor) for image in images]
            raise DataError(f"the question is longer than max_length={self.encoder.max_length}; raise it")

    @contextmanager
    def _open(
        self, source_number: int, index: int, needs_answer: bool = True
    ) -> Iterator[tuple[Sample, list[Image.Image], SizeOf]]:
        """The sample, its images opened so far, and the size of its i-th image, which opens images up to it.

        Errors raised within become DataErrors that name the record, and the images are closed at the end.
        """
        source = self.sources[source_number]
        sample = source.sample(index, needs_answer)
        images: list[Image.Image] = []

        def size(number: int) -> tuple[int, int]:
            while len(images) <= number:
                images.append(open_image(source.image_root / sample.images[len(images)]))
            return size_of(images[number], self.image_processor)

        try:
            yield sample, images, size
        except ValueError as error:  # also of a chat template or a processor that refuses it
            raise DataError(f"{source.where(index)} {error}") from error
        finally:
            for image in images:
                image.close()

    def _join(self, pieces: Sequence[Piece], size: SizeOf, processor: ImageProcessor) -> Encoded:
        return self.encoder.join(pieces, lambda number: processor.tokens(*size(number)))

    def _fit(self, pieces: Sequence[Piece], size: SizeOf) -> tuple[Encoded, ImageProcessor]:
        """A sample's tokens within max_length, and the processor to use for its images."""
        num_text_tokens = sum(len(piece.ids) for piece in pieces if piece.ids is not None)
        num_images = sum(piece.ids is None for piece in pieces)

        def num_tokens(processor: ImageProcessor) -> int:
            return num_text_tokens + sum(processor.num_tokens(*size(number)) for number in range(num_images))

        processor, max_length = self.image_processor, self.encoder.max_length
        encoded = self._join(pieces, size, processor)
        if self.fit_images and encoded.is_cut and num_images and (smaller := processor.smaller()):
            # A sample that does not fit even at the lowest limit has its images at that.
            fitting = (limit for limit, each in smaller.items() if num_tokens(each) <= max_length)
            limit = next(fitting, [*smaller][-1])
            processor = smaller[limit]
            encoded = replace(self._join(pieces, size, processor), image_limit=limit)
        if encoded.is_cut and self.on_long_sample == "error":
            raise DataError(
                f"has {num_tokens(processor):,} tokens, over max_length={max_length:,}; raise max_length, "
                "shorten it, or choose another on_long_sample"
            )
        if encoded.is_cut and self.on_long_sample == "skip":
            encoded = replace(encoded, labels=np.full_like(encoded.labels, IGNORED))
        return encoded, processor

    @property
    def why_unsupervised(self) -> str:
        """Log message for a sample without labels: every sample has an answer, so max_length cut it off."""
        max_length = self.encoder.max_length
        if self.on_long_sample == "skip":
            return f"is longer than max_length={max_length}"
        return f"keeps no answer token within max_length={max_length}"


class StepLoader:
    """Iterates over optimizer steps: a list of this rank's micro-batches for each."""

    def __init__(
        self,
        reader: SampleReader,
        sampler: StepSampler,
        *,
        rank: int,
        num_ranks: int,
        samples_per_micro_batch: int,
        num_steps: int,
        first_step: int = 0,
        num_workers: int = 0,
        on_bad_sample: Literal["error", "skip"] = "error",
        packing: Packing | None = None,
    ):
        """Args:
        num_steps, first_step: the steps are first_step … num_steps − 1, counted from 0.
        packing: packs and balances the rows; None means samples_per_micro_batch padded rows.
        """
        self._reader, self._sampler = reader, sampler
        self._rank, self._num_ranks = rank, num_ranks
        self._samples_per_micro_batch = samples_per_micro_batch
        self._steps = range(first_step, num_steps)
        self._num_workers, self._on_bad_sample = num_workers, on_bad_sample
        self._packing = packing
        self._num_logged: Counter[str] = Counter()

    def plan(self, step: int) -> tuple[list[list[tuple[int, int]]], float | None]:
        """(source, record) of this rank's samples in each of its micro-batches of a step; and the fraction of
        all ranks' time that the plan leaves idle, None without packing."""
        samples, idle = self._sampler.samples(step), None
        if self._packing:
            plan, costs = self._packing.plan(samples, self._num_ranks)
            idle = idle_share(plan, costs)
        else:
            plan = deal(len(samples), self._num_ranks, self._samples_per_micro_batch)
        mine = plan[self._rank]
        return [[(int(source), int(record)) for source, record in samples[row]] for row in mine], idle

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """Raises DataError at a sample that cannot be used, unless bad samples are skipped."""
        # For each micro-batch that workers were asked for: whether it ends a step, and the step's idle share.
        asked: deque[tuple[bool, float | None]] = deque()

        def samples_of_micro_batches() -> Iterator[list[tuple[int, int]]]:
            for step in self._steps:
                micro_batches, idle = self.plan(step)
                for number, samples in enumerate(micro_batches, 1):
                    asked.append((number == len(micro_batches), idle))
                    yield samples

        if self._num_workers:
            end_workers_at_exit()
        row_tokens = self._packing.max_tokens if self._packing else None
        batches = DataLoader(
            _MicroBatches(self._reader, self._on_bad_sample == "skip", row_tokens),
            batch_size=None,
            sampler=samples_of_micro_batches(),
            num_workers=self._num_workers,
            prefetch_factor=PREFETCHED_PER_WORKER if self._num_workers else None,
            worker_init_fn=start_worker,
            pin_memory=torch.accelerator.is_available(),
        )
        steps = self._group(iter(batches), asked)
        if not self._num_workers:
            yield from steps
            return
        # A thread receives the next step, and computes later plans, while the model is busy with this one.
        with ThreadPoolExecutor(1, thread_name_prefix="next step") as thread:
            upcoming = thread.submit(next, steps, None)
            while (step := upcoming.result()) is not None:
                upcoming = thread.submit(next, steps, None)
                yield step

    def _group(
        self, batches: Iterator[MicroBatch | DataError], asked: deque[tuple[bool, float | None]]
    ) -> Iterator[list[MicroBatch]]:
        """The micro-batches of each step as a list."""
        step: list[MicroBatch] = []
        for batch in batches:
            if isinstance(batch, DataError):
                raise DataError(*batch.args)  # not `batch` itself, whose traceback would keep the workers
            self._log(batch)
            ends_step, batch.planned_idle_share = asked.popleft()
            step.append(batch)
            if ends_step:
                yield step
                step = []

    def _log(self, batch: MicroBatch) -> None:
        left_out = [*batch.skipped, *batch.unsupervised]
        for kind, samples in {"left out": left_out, "made to fit": batch.shrunk}.items():
            for _, why in samples:
                self._num_logged[kind] += 1
                if self._num_logged[kind] <= MAX_WARNINGS:
                    logger.warning("%s: %s", kind, why)
                if self._num_logged[kind] == MAX_WARNINGS:
                    logger.warning("%d samples %s on this rank; others are not logged", MAX_WARNINGS, kind)


class _MicroBatches(Dataset[MicroBatch | DataError]):
    """Micro-batches that workers read; the "index" lists a micro-batch's samples.

    A DataError is returned: raised in a worker, it would arrive wrapped in a traceback.
    """

    def __init__(self, reader: SampleReader, skip_bad: bool, row_tokens: int | None):
        """row_tokens: most tokens of a packed row; None: padded rows."""
        self._reader, self._skip_bad, self._row_tokens = reader, skip_bad, row_tokens

    def __getitem__(self, wanted: list[tuple[int, int]]) -> MicroBatch | DataError:
        samples: list[Encoded] = []
        pictures: list[Any] = []
        sample_ids, skipped, unsupervised, shrunk = [], [], [], []
        for source_number, index in wanted:
            where = self._reader.sources[source_number].where
            try:
                sample, images = self._reader.read(source_number, index)
            except DataError as error:
                if not self._skip_bad or isinstance(error, FileChangedError):
                    return error
                skipped.append((source_number, str(error)))
                continue
            if sample.num_supervised == 0:
                unsupervised.append((source_number, f"{where(index)} {self._reader.why_unsupervised}"))
                continue
            if sample.image_limit is not None:
                shrunk.append((source_number, f"{where(index)} takes its images at {sample.image_limit}"))
            samples.append(sample)
            pictures += images
            sample_ids.append((source_number, index))
        given, packed = self._reader.batch(pictures), self._row_tokens is not None
        batch = collate(samples, given, sample_ids, self._reader.encoder.pad_id, packed=packed)
        if self._row_tokens and batch.num_tokens > self._row_tokens:
            return DataError(
                f"a packed row has {batch.num_tokens} tokens, over the {self._row_tokens} that it may have:"
                " images have changed since they were measured; remove the *.lengths files beside the JSON"
                " files"
            )
        batch.skipped, batch.unsupervised, batch.shrunk = skipped, unsupervised, shrunk
        return batch


def start_worker(_: int) -> None:
    # The work is already parallel over processes; the tokenizer's own threads would warn about the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A scheduler signals every process of a job, and Ctrl-C every process of a terminal, but only the
    # training process decides when to stop.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(END_WORKER, lambda *_: os._exit(0))
    sys.excepthook = _show_unless_orphaned
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()


def _end_with_parent() -> None:
    """End this worker as soon as its parent process is gone, for whatever reason.

    DataLoader itself checks every five seconds while a worker waits for work, and never while its results
    wait to be read. Until the worker ends, it keeps memory and the parent's connections open, so that other
    ranks waiting for the parent do not notice its death. PR_SET_PDEATHSIG would react to the end of the
    parent's thread instead of its process.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _show_unless_orphaned(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Show an error of this worker, unless its parent process is gone.

    A parent that is killed while it fetches a tensor resets the connection to the thread that sends it, whose
    traceback would hide why the run ended.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    if isinstance(error, ConnectionError | EOFError):
        parent.join(1)
    if parent.is_alive():
        sys.__excepthook__(kind, error, trace)


def end_workers_at_exit() -> None:
    """Make the interpreter's exit end leftover workers; call it before starting workers.

    An exception whose traceback refers to a DataLoader's iterator keeps its workers alive until the
    interpreter exits. At exit multiprocessing sends them SIGTERM, which they ignore, and would wait for them
    forever.
    """
    Finalize(None, _end_workers, exitpriority=1)


def _end_workers() -> None:
    # A worker that has not reached `start_worker` yet is killed by the signal; torch's handler would raise
    # here.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        if worker.daemon and worker.pid is not None:
            os.kill(worker.pid, END_WORKER)
