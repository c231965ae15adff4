"""The lengths of samples without decoding an image: computed once by all cores, then cached.

    lengths = measure_lengths(reader, needed_records(sampler, range(1000)))
    lengths[0][7]         # record 7 of the first source: int32 [tokens, image slots, supervised tokens,
                          # tokens before the cut at max_length]

Text is tokenised and image sizes come from the files' headers, so lengths are exactly what the loader will
make. A record that cannot be used is BAD; `bad_samples` says why. The cache lies beside the JSON file, its
name made of all that lengths depend on: the file, the conversation format and tokenizer, the image processor,
max_length and what becomes of longer samples, the image root. The sizes of image files are not among it: when
they change, remove `*.lengths`.
"""

import hashlib
import os
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
VERSION = 4
"""Raise it when samples are encoded differently."""
BAD, UNMEASURED = -1, -2


def measure_lengths(
    reader: SampleReader,
    needed: Sequence[np.ndarray] | None = None,
    *,
    num_workers: int | None = None,
    show_progress: bool = True,
) -> list[np.ndarray]:
    """int32 [records, 4] of each source: tokens, image slots, supervised tokens, tokens before the cut.

    A bad record has BAD in all four, and one that nobody has needed yet UNMEASURED.

    Args:
        needed: of each source the records that are wanted (`needed_records`); None means all.
        num_workers: processes; None means one a core.
    """
    caches = [_cache_paths(reader, number) for number in range(len(reader.sources))]
    lengths = [
        _read(paths, len(source.records)) for paths, source in zip(caches, reader.sources, strict=True)
    ]
    if needed is None:
        needed = [np.arange(len(rows)) for rows in lengths]
    # What was bad may have been mended: an image that was missing is there now.
    missing = [wanted[rows[wanted, 0] < 0] for wanted, rows in zip(needed, lengths, strict=True)]
    chunks = chunks_of(missing)
    results = in_parallel(partial(_measure, reader), chunks, num_workers)
    total = sum(map(len, missing))
    with tqdm(total=total, desc="lengths", unit="sample", delay=2, disable=not show_progress) as bar:
        for (number, records), rows in zip(chunks, results, strict=True):
            lengths[number][records] = rows
            bar.update(len(records))
    for number, paths in enumerate(caches):
        if len(missing[number]):
            write_cache(paths, lengths[number].data)
    return lengths


def needed_records(sampler: StepSampler, steps: range) -> list[np.ndarray]:
    """The records of each source that some steps train on: of a short run on a large file, only a few."""
    used = [np.zeros(len(source.records), dtype=bool) for source in sampler.sources]
    for step in steps:
        samples = sampler.samples(step)
        for number, mask in enumerate(used):
            mask[samples[samples[:, 0] == number, 1]] = True
    return [np.flatnonzero(mask) for mask in used]


def bad_samples(reader: SampleReader, lengths: Sequence[np.ndarray], max_named: int = 5) -> list[str]:
    """What is wrong with the records that have no length, at most `max_named` of each source by name."""
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
    """How many samples of a source's lengths are over max_length. A bad or unmeasured one is not."""
    return int((rows[:, 3] > rows[:, 0]).sum())


Chunk = tuple[int, np.ndarray]
"""(source, records)"""


def chunks_of(records: Sequence[np.ndarray]) -> list[Chunk]:
    """Records of each source, in pieces for `in_parallel`."""
    return [
        (number, part[begin : begin + CHUNK_RECORDS])
        for number, part in enumerate(records)
        for begin in range(0, len(part), CHUNK_RECORDS)
    ]


def in_parallel(
    function: Callable[[Any], Any], tasks: Sequence[Any], num_workers: int | None = None
) -> Iterator[Any]:
    """function(task) of each task, in order, from worker processes (None: one a core); DataError as it is."""
    if num_workers is None:
        has_affinity = hasattr(os, "sched_getaffinity")
        num_workers = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    end_workers_at_exit()
    results = DataLoader(
        _Calls(function, tasks),
        batch_size=None,
        collate_fn=_as_it_is,
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


def _as_it_is(result: Any) -> Any:
    return result  # DataLoader's own choice would turn arrays into tensors


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
