"""The length of every sample without decoding an image: computed once by all cores, then cached.

    lengths = measure_lengths(reader)
    lengths[0][7]         # record 7 of the first source: int32 [tokens, image slots, supervised tokens]

Text is tokenised and image sizes come from the files' headers, so lengths are exactly what the loader will
make. A record that cannot be used has -1 in all three; `bad_samples` says why. The cache lies beside the JSON
file, its name made of all that lengths depend on: the file, the tokenizer, the image processor, max_length,
the image root. The image files' sizes are not: when they change, remove `*.lengths`.
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

from data.errors import DataError
from data.loader import SampleReader, start_worker
from data.records import index_paths, write_atomically

CHUNK_RECORDS = 256
"""Records that a worker measures at a time."""
VERSION = 1
"""Raise it when samples are encoded differently."""


def measure_lengths(
    reader: SampleReader, *, num_workers: int | None = None, show_progress: bool = True
) -> list[np.ndarray]:
    """int32 [records, 3] of each source: tokens, image slots, supervised tokens; -1 where a record is bad.

    Args: num_workers: processes; None means one a core.
    """
    caches = [_cache_paths(reader, number) for number in range(len(reader.sources))]
    lengths = [
        _read(paths, len(source.records)) for paths, source in zip(caches, reader.sources, strict=True)
    ]
    missing = {number for number, rows in enumerate(lengths) if rows is None}
    measured = {number: np.empty((len(reader.sources[number].records), 3), np.int32) for number in missing}
    chunks = [chunk for chunk in chunks_of(reader) if chunk[0] in missing]
    total = sum(len(rows) for rows in measured.values())
    results = in_parallel(partial(_measure, reader), chunks, num_workers)
    with tqdm(total=total, desc="lengths", unit="sample", delay=2, disable=not show_progress) as bar:
        for (number, records), rows in zip(chunks, results, strict=True):
            measured[number][records.start : records.stop] = rows
            bar.update(len(records))
    for number, rows in measured.items():
        any(write_atomically(path, rows.data) for path in caches[number])  # the first that can be written
    return [measured[number] if rows is None else rows for number, rows in enumerate(lengths)]


def bad_samples(reader: SampleReader, lengths: Sequence[np.ndarray], max_named: int = 5) -> list[str]:
    """What is wrong with the records that have no length, at most `max_named` of each source by name."""
    problems = []
    for number, rows in enumerate(lengths):
        bad = np.flatnonzero(rows[:, 0] < 0)
        for index in bad[:max_named]:
            try:
                reader.read(number, int(index), decode=False)
            except DataError as error:
                problems.append(str(error))
        if len(bad) > max_named:
            path = reader.sources[number].records.path
            problems.append(f"{path}: {len(bad) - max_named} more records cannot be used; see data.check")
    return problems


Chunk = tuple[int, range]
"""(source, records)"""


def chunks_of(reader: SampleReader) -> list[Chunk]:
    """All records of all sources, in pieces for `in_parallel`."""
    return [
        (number, range(begin, min(begin + CHUNK_RECORDS, len(source.records))))
        for number, source in enumerate(reader.sources)
        for begin in range(0, len(source.records), CHUNK_RECORDS)
    ]


def in_parallel(
    function: Callable[[Any], Any], tasks: Sequence[Any], num_workers: int | None = None
) -> Iterator[Any]:
    """function(task) of each task, in order, from worker processes (None: one a core)."""
    if num_workers is None:
        has_affinity = hasattr(os, "sched_getaffinity")
        num_workers = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return iter(
        DataLoader(
            _Calls(function, tasks),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers if len(tasks) > 1 else 0,
            worker_init_fn=start_worker,
        )
    )


class _Calls(Dataset[Any]):
    def __init__(self, function: Callable[[Any], Any], tasks: Sequence[Any]):
        self._function, self._tasks = function, tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, number: int) -> Any:
        return self._function(self._tasks[number])


def _as_it_is(result: Any) -> Any:
    return result  # DataLoader's own choice would turn arrays into tensors


def _measure(reader: SampleReader, chunk: Chunk) -> np.ndarray:
    number, records = chunk
    rows = np.full((len(records), 3), -1, dtype=np.int32)
    for row, index in zip(rows, records, strict=True):
        try:
            encoded, _ = reader.read(number, index, decode=False)
        except DataError:
            continue
        row[:] = len(encoded.input_ids), encoded.num_image_slots, encoded.num_supervised
    return rows


def _cache_paths(reader: SampleReader, number: int) -> list[Path]:
    source = reader.sources[number]
    settings = (
        VERSION,
        source.records.fingerprint,
        str(source.image_root.resolve()),
        reader.encoder.fingerprint,
        repr(reader.image_processor),
        reader.as_viewed,
    )
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
    return index_paths(source.records.path, suffix=f".{key}.lengths")


def _read(paths: list[Path], num_records: int) -> np.ndarray | None:
    for path in paths:
        if path.is_file() and path.stat().st_size == 12 * num_records:
            return np.memmap(path, np.int32, "r", shape=(num_records, 3))
    return None
