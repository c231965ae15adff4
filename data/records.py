"""JSON arrays and JSON lines as indexed sequences: no process holds a file in memory.

    records = Records("train.json")     # indexes the file once: train.json.index
    len(records)                        # 1_000_000
    records[7]                          # {"id": "pets-7", "conversations": [...]}, parsed from a memory map

The index holds the byte offset and length of each record, how many images the records name, and what is wrong
with which record: every record is parsed and checked (`data.sample`) while its end is being looked for. It is
kept beside the file, or under ~/.cache/xcomposer-fsdp where that folder cannot be written, and is used again
while the file's size, modification time and content hash are the same. Jobs that build it at the same time
each write their own and rename it into place, so a reader never sees half an index.

Example: `[{"a":1}, {"b":2}]` → offsets [1, 10], lengths [7, 7].

Scanning decodes the bytes as Latin-1: JSON's structure is ASCII, so that a character is a byte and positions
are offsets; UTF-8 is checked apart, and a record is parsed as UTF-8 when it is read.
"""

import hashlib
import json
import logging
import mmap
import os
import re
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.errors import DataError
from data.sample import parse_sample

logger = logging.getLogger(__name__)

INDEX_VERSION = 1
"""Raise it when the index's layout or the checks of `data.sample` change."""
WINDOW_BYTES = 4 << 20
MAX_RECORD_BYTES = 64 << 20
MAX_PROBLEMS_KEPT = 1000
HASH_BLOCKS = 64
HASH_BLOCK_BYTES = 64 << 10
READS_BETWEEN_RELEASES = 128
"""A read maps up to 64 KiB around the record: this bounds a worker's resident part of the map to 8 MiB."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SPACE = re.compile(rb"[ \t\r\n]*")


class Records:
    """The records of one JSON or JSONL file. Pickles as a path: a worker opens its own memory map.

    Attributes: `path`; `fingerprint`, which changes with the file; `num_images`, over all records;
    `num_problems`, and `problems`, the first thousand (record index, what is wrong with it).
    """

    def __init__(self, path: str | Path, *, show_progress: bool = True):
        """Raises DataError if the file is missing, empty, or not JSON from its first record on."""
        self.path = Path(path)
        self._map = _map_file(self.path)
        self._reads = 0
        stat = self.path.stat()
        key: dict[str, Any] = {"version": INDEX_VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        key["hash"] = _content_hash(self._map)
        self.fingerprint = f"{stat.st_size}-{stat.st_mtime_ns}-{key['hash']}"
        places = index_paths(self.path)
        index = next((index for place in places if (index := _read_index(place, key))), None)
        if index is None:
            index = _build_index(self._map, self.path, key, show_progress)
            if not any(_write_index(place, *index) for place in places):
                logger.warning("%s: its index can be kept nowhere and is built at every start", self.path)
        header, self._offsets, self._lengths = index
        self.num_images: int = header["num_images"]
        self.num_problems: int = header["num_problems"]
        self.problems: list[tuple[int, str]] = [(index, what) for index, what in header["problems"]]

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> Any:
        """The record's JSON value. DataError if it does not parse (its problem is in `problems`)."""
        begin = int(self._offsets[index])
        text = self._map[begin : begin + int(self._lengths[index])]
        self._reads += 1
        if self._reads % READS_BETWEEN_RELEASES == 0:
            self._map.madvise(mmap.MADV_DONTNEED)
        return _parse(text)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], show_progress=False)
        if self.fingerprint != state["fingerprint"]:
            raise DataError(f"{self.path}: the file has changed while it was in use; start again")


def index_paths(path: Path, suffix: str = ".index") -> list[Path]:
    """Where something derived from `path` is kept: beside it, else in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xcomposer-fsdp"
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
    return [path.with_name(path.name + suffix), cache / f"{path.stem}-{name}{suffix}"]


def write_atomically(path: Path, *parts: bytes | memoryview) -> bool:
    """Writes a file in one step, whoever else does; False if the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                for part in parts:
                    file.write(part)
                file.close()
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError:
        return False
    return True


def _map_file(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # how mmap refuses an empty file
        raise DataError(
            f"{path}: the file is empty; it must hold a JSON array or one record a line"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path in data.txt") from error


def _content_hash(data: mmap.mmap) -> str:
    """Of blocks spread evenly over the file: 4 MiB of any file, so that a second start takes no time."""
    digest = hashlib.blake2b(digest_size=16)
    for start in np.linspace(0, max(0, len(data) - HASH_BLOCK_BYTES), HASH_BLOCKS, dtype=np.int64):
        digest.update(data[start : start + HASH_BLOCK_BYTES])
    data.madvise(mmap.MADV_DONTNEED)
    return digest.hexdigest()


# ---- The index file: a line of JSON padded to 64 bytes, the offsets [N] int64, the lengths [N] int32 ----


def _read_index(path: Path, key: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray, np.ndarray] | None:
    """The index, its arrays memory-mapped; None if it is absent, of another file's state, or damaged."""
    try:
        with open(path, "rb") as file:
            line = file.readline()
        header = json.loads(line)
        if any(header[field] != value for field, value in key.items()):
            return None
        count = header["num_records"]
        if path.stat().st_size != len(line) + 12 * count:
            return None
        offsets = np.memmap(path, np.dtype("<i8"), "r", len(line), (count,))
        lengths = np.memmap(path, np.dtype("<i4"), "r", len(line) + 8 * count, (count,))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return header, offsets, lengths


def _write_index(path: Path, header: dict[str, Any], offsets: np.ndarray, lengths: np.ndarray) -> bool:
    line = json.dumps(header).encode()
    line += b" " * (-(len(line) + 1) % 64) + b"\n"
    return write_atomically(path, line, offsets.astype("<i8").data, lengths.astype("<i4").data)


def _build_index(
    data: mmap.mmap, path: Path, key: dict[str, Any], show_progress: bool
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    offsets, lengths = array("q"), array("i")
    problems: list[tuple[int, str]] = []
    num_images = num_problems = 0
    # `delay`: only a file that takes seconds gets a bar.
    with tqdm(
        total=len(data),
        unit="B",
        unit_scale=True,
        desc=f"index {path.name}",
        delay=2,
        disable=not show_progress,
    ) as bar:
        for begin, end, value in _scan(data, path):
            problem = None
            try:
                num_images += len(parse_sample(value).images)
                if not (text := data[begin:end]).isascii():
                    text.decode()
            except (DataError, UnicodeDecodeError):
                problem = _problem_of(data[begin:end])
            if problem:
                num_problems += 1
                if len(problems) < MAX_PROBLEMS_KEPT:
                    problems.append((len(offsets), problem))
            offsets.append(begin)
            lengths.append(end - begin)
            if len(offsets) % 4096 == 0:
                bar.update(end - bar.n)
                data.madvise(mmap.MADV_DONTNEED)
        bar.update(len(data) - bar.n)
    if not offsets:
        raise DataError(f"{path}: holds no record; it must be a JSON array of records or one record a line")
    header = key | {"num_records": len(offsets), "num_images": num_images}
    header |= {"num_problems": num_problems, "problems": problems}
    return header, np.array(offsets, dtype=np.int64), np.array(lengths, dtype=np.int32)


def _scan(data: mmap.mmap, path: Path) -> Iterator[tuple[int, int, Any]]:
    """(begin, end, value) of every record; a line that does not parse has the value None."""
    start = len(BYTE_ORDER_MARK) if data[: len(BYTE_ORDER_MARK)] == BYTE_ORDER_MARK else 0
    start = _skip_space(data, start)
    if data[start : start + 1] == b"[":
        yield from _scan_array(data, start + 1, path)
    else:
        yield from _scan_lines(data, start, path)


def _scan_lines(data: mmap.mmap, begin: int, path: Path) -> Iterator[tuple[int, int, Any]]:
    while (begin := _skip_space(data, begin)) < len(data):
        end = data.find(b"\n", begin)
        end = len(data) if end < 0 else end
        if end - begin > MAX_RECORD_BYTES:
            raise DataError(
                f"{path}: line {_line_at(data, begin)} is longer than {MAX_RECORD_BYTES >> 20} MiB"
            )
        try:
            value = json.loads(data[begin:end].decode("latin-1"))
        except (ValueError, RecursionError):
            value = None
        yield begin, end, value
        begin = end


def _scan_array(data: mmap.mmap, position: int, path: Path) -> Iterator[tuple[int, int, Any]]:
    window = _Window(data)
    count = 0
    begin = _skip_space(data, position)
    mark = data[begin : begin + 1]
    while mark != b"]":
        try:
            value, end = window.decode(begin)
        except DataError as error:
            raise DataError(f"{path}: record {count} is not JSON: {error}") from error
        yield begin, end, value
        count += 1
        after = _skip_space(data, end)
        mark = data[after : after + 1]
        if mark not in (b",", b"]"):
            found = repr(mark.decode("latin-1")) if mark else "the end of the file"
            raise DataError(
                f"{path}: {found} follows record {count - 1} on line {_line_at(data, after)};"
                " an array needs ',' or ']' there"
            )
        begin = _skip_space(data, after + 1)


class _Window:
    """A stretch of the file as text, in which one value after another is decoded; it moves and grows."""

    def __init__(self, data: mmap.mmap):
        self._data, self._begin, self._text = data, 0, ""
        self._raw_decode = json.JSONDecoder().raw_decode

    def decode(self, begin: int) -> tuple[Any, int]:
        """The value at a byte offset, and the offset behind it; DataError if there is none."""
        while True:
            num_tried = len(self._text) if self._begin == begin else 0
            is_last_try = num_tried >= MAX_RECORD_BYTES or self._begin + len(self._text) == len(self._data)
            try:
                value, end = self._raw_decode(self._text, begin - self._begin)
                # Only a number does not show where it ends: 1 may be what the window leaves of 1.5.
                cut_off = isinstance(value, int | float) and self._text[end : end + 1] in "0123456789.eE+-"
                if is_last_try or not cut_off:
                    return value, self._begin + end
            except RecursionError as error:
                raise DataError("it is nested too deeply") from error
            except ValueError as error:  # broken, or cut off by the window's end
                if is_last_try:
                    line = _line_at(self._data, self._begin + getattr(error, "pos", 0))
                    raise DataError(f"line {line}: {getattr(error, 'msg', error)}") from error
            self._begin = begin
            num_bytes = max(WINDOW_BYTES, 2 * num_tried)
            self._text = self._data[begin : begin + num_bytes].decode("latin-1")


def _skip_space(data: mmap.mmap, position: int) -> int:
    match = SPACE.match(data, position)
    assert match is not None
    return match.end()


def _line_at(data: mmap.mmap, position: int) -> int:
    """The line, from 1, that a byte offset lies in."""
    return 1 + sum(
        data[at : min(at + (1 << 20), position)].count(b"\n") for at in range(0, position, 1 << 20)
    )


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text (byte {error.start} of the record)") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON: {error}") from error


def _problem_of(text: bytes) -> str | None:
    """What is wrong with a record, worded from its real text rather than from its Latin-1 reading."""
    try:
        parse_sample(_parse(text))
    except DataError as error:
        return str(error)
    return None
