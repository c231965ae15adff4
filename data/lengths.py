"""The lengths of samples, measured without decoding images: once, on all cores, then cached.

    lengths = measure_lengths(reader, needed_records(sampler, range(1000)))
    lengths[0][7]         # record 7 of the first source: int32 [tokens, image slots, supervised tokens,
                          # tokens before the cut at max_length]

Text is tokenised and image sizes are read from the files' headers, so the lengths are exactly those that the
loader will produce. A record that cannot be used is BAD; `bad_samples` gives the reasons. The cache is a file
beside the JSON file, named by a hash of everything that lengths depend on: the JSON file, the conversation
format and tokenizer, the image processor, max_length, the handling of longer samples, the image root. The
images themselves are not part of it: if their sizes change, remove `*.lengths`.

The cache is also written while lengths are measured, every WRITE_SECONDS: measuring that was interrupted goes
on from there.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.errors import DataError, FileChangedError
from data.files import cache_paths, write_cache
from data.loader import SampleReader, end_workers_at_exit, start_worker
from data.sampler import StepSampler

CHUNK_RECORDS = 256
"""Records that a worker measures at a time."""
VERSION = 5
"""Increase it when samples are encoded differently."""
WRITE_SECONDS = 30.0
BAD, UNMEASURED = -1, -2


def measure_lengths(
    reader: SampleReader,
    needed: Sequence[np.ndarray] | None = None,
    *,
    num_workers: int | None = None,
    show_progress: bool = True,
) -> list[np.ndarray]:
    """int32 [records, 4] for each source: tokens, image slots, supervised tokens, tokens before the cut.

    A bad record has BAD in all four columns, one that was never needed UNMEASURED.

    Args:
        needed: the records to measure for each source (`needed_records`); None means all.
        num_workers: processes; None means one per core.
    """
    caches = [_cache_paths(reader, number) for number in range(len(reader.sources))]
    lengths = [
        _read(paths, len(source.records)) for paths, source in zip(caches, reader.sources, strict=True)
    ]
    if needed is None:
        needed = [np.arange(len(rows)) for rows in lengths]
    # Bad records are measured again, as a missing image may have been added since.
    missing = [wanted[rows[wanted, 0] < 0] for wanted, rows in zip(needed, lengths, strict=True)]
    chunks = chunks_of(missing)
    results = in_parallel(partial(_measure, reader), chunks, num_workers)
    total = sum(map(len, missing))
    unwritten, written = set[int](), time.monotonic()
    with tqdm(total=total, desc="lengths", unit="sample", delay=2, disable=not show_progress) as bar:
        for done, ((number, records), rows) in enumerate(zip(chunks, results, strict=True), 1):
            lengths[number][records] = rows
            unwritten.add(number)
            bar.update(len(records))
            if done == len(chunks) or time.monotonic() - written > WRITE_SECONDS:
                for source in unwritten:
                    write_cache(caches[source], lengths[source].data)
                unwritten, written = set(), time.monotonic()
    return lengths


def needed_records(sampler: StepSampler, steps: range) -> list[np.ndarray]:
    """The records of each source that these steps train on: only a few for a short run on a large file."""
    used = [np.zeros(len(source.records), dtype=bool) for source in sampler.sources]
    for step in steps:
        samples = sampler.samples(step)
        for number, mask in enumerate(used):
            mask[samples[samples[:, 0] == number, 1]] = True
    return [np.flatnonzero(mask) for mask in used]


def bad_samples(reader: SampleReader, lengths: Sequence[np.ndarray], max_named: int = 5) -> list[str]:
    """The problems of the records without a length: `max_named` per source, and a count of the others."""
    problems = []
    for number, rows in enumerate(lengths):
        bad = np.flatnonzero(rows[:, 0] == BAD)
        for index in bad[:max_named]:
            try:
                reader.read(number, int(index), decode=False)
            except DataError as error:
                problems.append(str(error))
        if len(bad) > max_named:
            path = reader.sources[number].records.path
            problems.append(f"{path}: {len(bad) - max_named} more records cannot be used; see data.check")
    return problems


def num_cut(rows: np.ndarray) -> int:
    """Number of samples over max_length; rows: a source's lengths. Bad or unmeasured ones do not count."""
    return int((rows[:, 3] > rows[:, 0]).sum())


Chunk = tuple[int, np.ndarray]
"""(source, some of its records)"""


def chunks_of(records_by_source: Sequence[np.ndarray]) -> list[Chunk]:
    """Splits the records of each source into tasks for `in_parallel`."""
    return [
        (number, records[begin : begin + CHUNK_RECORDS])
        for number, records in enumerate(records_by_source)
        for begin in range(0, len(records), CHUNK_RECORDS)
    ]


def in_parallel(
    function: Callable[[Any], Any], tasks: Sequence[Any], num_workers: int | None = None
) -> Iterator[Any]:
    """function(task) for each task, in order, from worker processes (None: one per core).

    A DataError raised by the function is raised here without a worker's traceback.
    """
    if num_workers is None:
        has_affinity = hasattr(os, "sched_getaffinity")
        num_workers = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    end_workers_at_exit()
    results = DataLoader(
        _Calls(function, tasks),
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=num_workers if len(tasks) > 1 else 0,
        worker_init_fn=start_worker,
    )
    for result in results:
        if isinstance(result, DataError):
            raise result
        yield result


class _Calls(Dataset[Any]):
    def __init__(self, function: Callable[[Any], Any], tasks: Sequence[Any]):
        self._function, self._tasks = function, tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, number: int) -> Any:
        try:
            return self._function(self._tasks[number])
        except DataError as error:
            return error  # raised in a worker, it would arrive wrapped in a traceback


def _unchanged(result: Any) -> Any:
    return result  # DataLoader's default would turn arrays into tensors


def _measure(reader: SampleReader, chunk: Chunk) -> np.ndarray:
    number, records = chunk
    rows = np.full((len(records), 4), BAD, dtype=np.int32)
    for row, index in zip(rows, records, strict=True):
        try:
            encoded, _ = reader.read(number, int(index), decode=False)
        except FileChangedError:
            raise
        except DataError:
            continue
        whole = reader.tokens_before_cut(number, int(index), encoded)
        row[:] = len(encoded.input_ids), encoded.num_image_slots, encoded.num_supervised, whole
    return rows


def _cache_paths(reader: SampleReader, number: int) -> list[Path]:
    source = reader.sources[number]
    settings = (
        VERSION,
        source.records.fingerprint,
        str(source.image_root.resolve()),
        reader.encoder.conversation.fingerprint,
        reader.encoder.max_length,
        repr(reader.image_processor),
        reader.on_long_sample,
        reader.fit_images,
    )
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
    return cache_paths(source.records.path, suffix=f".{key}.lengths")


def _read(paths: list[Path], num_records: int) -> np.ndarray:
    for path in paths:
        if path.is_file() and path.stat().st_size == 16 * num_records:
            return np.fromfile(path, np.int32).reshape(num_records, 4)
    return np.full((num_records, 4), UNMEASURED, dtype=np.int32)
