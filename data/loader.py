"""Worker processes that turn the plan of each optimizer step into this rank's micro-batches.

    reader = SampleReader(sources, SampleEncoder(conversation, max_length=4096), image_processor)
    loader = StepLoader(reader, StepSampler(sources, seed=0, global_batch=64), rank=0, num_ranks=2,
                        samples_per_micro_batch=4, first_step=120, num_steps=1000, num_workers=4)
    for micro_batches in loader:         # step 120, 121, …: a list of MicroBatch, equally long on every rank
        ...

The main process only plans; a worker reads, tokenises, decodes and collates one micro-batch at a time, and
they come back in the plan's order whatever the number of workers. The state is `first_step`. A bad sample
ends the run with a DataError that names it, or (`on_bad_sample="skip"`) is left out, logged and listed in the
micro-batch.
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
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.util import Finalize
from typing import Literal

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
from data.tokens import IGNORED, Encoded, Part, SampleEncoder

logger = logging.getLogger(__name__)

MAX_WARNINGS = 100
"""Samples that a rank logs one by one: left out, and as many more made to fit."""
PREFETCHED_PER_WORKER = 4
"""Micro-batches."""
END_WORKER = signal.SIGUSR2


@dataclass(frozen=True)
class _Failure:
    """A DataError on its way from a worker: raised there, it would arrive wrapped in a traceback."""

    message: str


OnLongSample = Literal["truncate", "skip", "error"]


@dataclass
class SampleReader:
    """(source, record) → ids, labels and pictures."""

    sources: Sequence[Source]
    encoder: SampleEncoder
    image_processor: ImageProcessor
    on_long_sample: OnLongSample = "truncate"
    """Over max_length: lose the tail, be left out (no label is kept), or be a DataError."""
    fit_images: bool = False
    """First try to make a long sample fit by lowering the hd_num of its images, as little as needed."""

    def __post_init__(self) -> None:
        if self.fit_images and self.image_processor.hd_num is None:
            raise DataError(
                "--fit_images: this model resizes every image to the same square; remove the flag"
            )

    def read(
        self,
        source_number: int,
        index: int,
        *,
        decode: bool = True,
    ) -> tuple[Encoded, list[torch.Tensor]]:
        """Raises DataError with the record's place.

        Pictures behind the cut at max_length are not decoded, and none where no answer is left before it.
        `decode=False` reads the pictures' headers alone and returns none.
        """
        source = self.sources[source_number]
        sample = source.sample(index)
        opened = []
        try:
            parts = self.encoder.parts(sample)
            encoded, processor = self._fit(parts, partial(self._size, source, sample, opened))
            used = opened[: len(encoded.image_tokens)] if decode and encoded.num_supervised else []
            return encoded, [process(image, processor) for image in used]
        except DataError as error:
            raise DataError(f"{source.where(index, sample.id)} {error}") from error
        finally:
            for image in opened:
                image.close()

    def tokens_before_cut(self, source_number: int, index: int, encoded: Encoded) -> int:
        """Tokens that a sample would have without max_length, of which `read` gave `encoded`.

        Its pictures are as large as there; one behind the cut that cannot be read counts as one token.
        """
        if not encoded.is_cut:
            return len(encoded.input_ids)
        source, processor, opened = self.sources[source_number], self.image_processor, []
        if encoded.hd_num is not None:
            processor = next(p for p in processor.smaller() if p.hd_num == encoded.hd_num)
        sample, unlimited = source.sample(index), copy(self.encoder)
        unlimited.max_length = sys.maxsize

        def num_image_tokens(number: int) -> int:
            try:
                return processor.num_tokens(*self._size(source, sample, opened, number))
            except DataError:
                return 1

        try:
            return len(unlimited.encode(sample, num_image_tokens).input_ids)
        finally:
            for image in opened:
                image.close()

    def read_prompt(self, source_number: int, index: int) -> tuple[Sample, Encoded, list[torch.Tensor]]:
        """The sample and what its answer is generated after; it may hold the answer or not.

        A question is never cut: DataError where it does not fit into max_length, with smaller images if
        `fit_images`.
        """
        source = self.sources[source_number]
        sample = source.sample(index, needs_answer=False)
        opened = []
        try:
            parts = self.encoder.prompt_parts(sample)

            def join(processor: ImageProcessor) -> Encoded:
                size = partial(self._size, source, sample, opened)
                return self.encoder.join(parts, lambda number: processor.num_tokens(*size(number)))

            smaller = self.image_processor.smaller() if self.fit_images and sample.images else ()
            for processor in (self.image_processor, *smaller):
                if not (prompt := join(processor)).is_cut:
                    return sample, prompt, [process(image, processor) for image in opened]
            raise DataError(f"the question is longer than max_length={self.encoder.max_length}; raise it")
        except DataError as error:
            raise DataError(f"{source.where(index, sample.id)} {error}") from error
        finally:
            for image in opened:
                image.close()

    def _size(
        self, source: Source, sample: Sample, opened: list[Image.Image], number: int
    ) -> tuple[int, int]:
        """(width, height) of one of the sample's images, from its header; `opened` then holds it."""
        while len(opened) <= number:
            opened.append(open_image(source.image_root / sample.images[len(opened)]))
        return size_of(opened[number], self.image_processor)

    def _fit(
        self, parts: Sequence[Part], size: Callable[[int], tuple[int, int]]
    ) -> tuple[Encoded, ImageProcessor]:
        """A sample's tokens within max_length, and what its images are to be processed with.

        size: (width, height) of the i-th image, asked for only as far as needed.
        """

        def join(processor: ImageProcessor) -> Encoded:
            return self.encoder.join(parts, lambda number: processor.num_tokens(*size(number)))

        def num_tokens(processor: ImageProcessor) -> int:
            text = sum(len(part.ids) for part in parts if part.ids is not None)
            num_images = sum(part.ids is None for part in parts)
            return text + sum(processor.num_tokens(*size(number)) for number in range(num_images))

        processor, max_length = self.image_processor, self.encoder.max_length
        encoded = join(processor)
        has_images = any(part.ids is None for part in parts)
        if self.fit_images and encoded.is_cut and has_images and (smaller := processor.smaller()):
            # What does not fit even with one tile an image goes on with that.
            processor = next((p for p in smaller if num_tokens(p) <= max_length), smaller[-1])
            encoded = replace(join(processor), hd_num=processor.hd_num)
        if encoded.is_cut and self.on_long_sample == "error":
            raise DataError(
                f"has {num_tokens(processor):,} tokens, over max_length={max_length:,}; raise max_length, "
                "shorten it, or choose what to do with such samples by on_long_sample"
            )
        if encoded.is_cut and self.on_long_sample == "skip":
            encoded = replace(encoded, labels=np.full_like(encoded.labels, IGNORED))
        return encoded, processor

    @property
    def why_unsupervised(self) -> str:
        """What is said of a sample without a label: it has an answer, so max_length took it off."""
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
        packing: rows are packed and balanced by it; None means samples_per_micro_batch padded rows.
        """
        self._reader, self._sampler = reader, sampler
        self._rank, self._num_ranks = rank, num_ranks
        self._samples_per_micro_batch = samples_per_micro_batch
        self._steps = range(first_step, num_steps)
        self._num_workers, self._on_bad_sample = num_workers, on_bad_sample
        self._packing = packing
        self._num_logged: Counter[str] = Counter()

    def plan(self, step: int) -> list[list[tuple[int, int]]]:
        """(source, record) of this rank's samples in each of its micro-batches of a step."""
        samples = self._sampler.samples(step)
        if self._packing:
            plan = self._packing.plan(samples, self._num_ranks)
        else:
            plan = deal(len(samples), self._num_ranks, self._samples_per_micro_batch)
        return [[(int(source), int(record)) for source, record in samples[part]] for part in plan[self._rank]]

    def idle_share(self, step: int) -> float | None:
        """The share of all ranks' time that a step's plan leaves idle; None where lengths are unknown."""
        if self._packing is None:
            return None
        samples = self._sampler.samples(step)
        costs = self._packing.measure(samples)[1]
        return idle_share(self._packing.plan(samples, self._num_ranks), costs)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """Raises DataError at a sample that cannot be used, unless bad samples are skipped."""
        ends_step: deque[bool] = deque()  # of each micro-batch under way

        def micro_batch_plans() -> Iterator[list[tuple[int, int]]]:
            for step in self._steps:
                parts = self.plan(step)
                for number, part in enumerate(parts, 1):
                    ends_step.append(number == len(parts))
                    yield part

        if self._num_workers:
            end_workers_at_exit()
        batches = DataLoader(
            _MicroBatches(self._reader, self._on_bad_sample == "skip", self._packing is not None),
            batch_size=None,
            sampler=micro_batch_plans(),
            num_workers=self._num_workers,
            prefetch_factor=PREFETCHED_PER_WORKER if self._num_workers else None,
            worker_init_fn=start_worker,
            pin_memory=torch.accelerator.is_available(),
        )
        steps = self._group(iter(batches), ends_step)
        if not self._num_workers:
            yield from steps
            return
        # A thread receives the next step, and plans ahead, while the model is busy with this one.
        with ThreadPoolExecutor(1, thread_name_prefix="next step") as thread:
            upcoming = thread.submit(next, steps, None)
            while (step := upcoming.result()) is not None:
                upcoming = thread.submit(next, steps, None)
                yield step

    def _group(
        self, batches: Iterator[MicroBatch | _Failure], ends_step: deque[bool]
    ) -> Iterator[list[MicroBatch]]:
        step: list[MicroBatch] = []
        for batch in batches:
            if isinstance(batch, _Failure):
                raise DataError(batch.message)
            self._log(batch)
            step.append(batch)
            if ends_step.popleft():
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
                    logger.warning("%d samples %s on this rank; more go unnamed", MAX_WARNINGS, kind)


class _MicroBatches(Dataset[MicroBatch | _Failure]):
    """What a worker does: the "index" is a micro-batch's plan."""

    def __init__(self, reader: SampleReader, skip_bad: bool, packed: bool):
        self._reader, self._skip_bad, self._packed = reader, skip_bad, packed
        # Where any sample of the run has an image, every micro-batch of every rank runs the vision tower: its
        # collectives must match, and gradients must not depend on how samples are dealt.
        any_images = any(source.records.num_images for source in reader.sources)
        self._dummy = [reader.image_processor.dummy()] if any_images else []

    def __getitem__(self, plan: list[tuple[int, int]]) -> MicroBatch | _Failure:
        samples: list[Encoded] = []
        pictures: list[torch.Tensor] = []
        sample_ids, skipped, unsupervised, shrunk = [], [], [], []
        for source_number, index in plan:
            try:
                sample, images = self._reader.read(source_number, index)
            except DataError as error:
                if not self._skip_bad or isinstance(error, FileChangedError):
                    return _Failure(str(error))
                skipped.append((source_number, str(error)))
                continue
            if sample.num_supervised == 0:
                source = self._reader.sources[source_number]
                place = source.where(index, source.sample(index).id)
                unsupervised.append((source_number, f"{place} {self._reader.why_unsupervised}"))
                continue
            if sample.hd_num is not None:
                source = self._reader.sources[source_number]
                place = source.where(index, source.sample(index).id)
                shrunk.append((source_number, f"{place} takes its images at hd_num={sample.hd_num}"))
            samples.append(sample)
            pictures += images
            sample_ids.append((source_number, index))
        encoder = self._reader.encoder
        pixels = pictures or self._dummy
        batch = collate(samples, pixels, sample_ids, encoder.pad_id, packed=self._packed)
        if self._packed and batch.num_tokens > encoder.max_length:
            return _Failure(
                f"a packed row has {batch.num_tokens} tokens, over max_length={encoder.max_length}: images"
                " have changed since they were measured; remove the *.lengths files beside the JSON files"
            )
        batch.skipped, batch.unsupervised, batch.shrunk = skipped, unsupervised, shrunk
        return batch


def start_worker(_: int) -> None:
    # Workers are the parallelism; the tokenizer's own threads would warn about the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A scheduler signals every process of a job, and Ctrl-C every process of a terminal; when to stop is the
    # training process's decision.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(END_WORKER, lambda *_: os._exit(0))
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()


def _end_with_parent() -> None:
    """End this worker as soon as the process that started it is gone, however it went.

    By itself a worker looks every five seconds while it waits for work, and never while its results wait for
    a reader. Until it ends it keeps memory, and the parent's connections open: other ranks that wait for the
    parent would learn of its death only then. A kernel's PR_SET_PDEATHSIG would follow the parent's thread.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def end_workers_at_exit() -> None:
    """Call before processes start that `start_worker` prepares.

    An exception whose traceback holds a DataLoader's iterator keeps its workers until the interpreter ends.
    There multiprocessing sends them SIGTERM, which they ignore, and would wait for them for ever.
    """
    Finalize(None, _end_workers, exitpriority=1)


def _end_workers() -> None:
    # One that has not come to `start_worker` yet dies of the signal: torch's handler would raise that here.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        if worker.daemon and worker.pid is not None:
            os.kill(worker.pid, END_WORKER)
