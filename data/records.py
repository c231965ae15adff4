"""JSON arrays and JSON lines as indexed sequences: no process loads a whole file into memory.

    records = Records("train.json")     # indexes the file once: train.json.index
    len(records)                        # 1_000_000
    records[7]                          # {"id": "pets-7", "conversations": [...]}, read and parsed

The index stores the byte offset and length of each record, the number of images, and the problems of bad
records: every record is parsed and checked (`data.sample`) to find its end. The index is saved beside the
file, or under ~/.cache/xcomposer-fsdp if that folder is not writable, and reused while the file's size,
modification time and content hash stay the same. Jobs that build it at the same time each write a file of
their own and rename it, so a reader never sees half an index. If the file's size or modification time changes
while it is in use, the next read raises a FileChangedError.

Example: `[{"a":1}, {"b":2}]` → offsets [1, 10], lengths [7, 7].

Scanning decodes the bytes as Latin-1, so that a character is a byte and positions are byte offsets; this
works because JSON's structure is ASCII. UTF-8 is checked separately, and a record is parsed as UTF-8 when it
is read.
"""

import hashlib
import json
import logging
import os
import re
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.errors import DataError, FileChangedError
from data.files import cache_paths, write_cache
from data.json_errors import explain
from data.sample import parse_sample

logger = logging.getLogger(__name__)

INDEX_VERSION = 4
"""Increase it when the index's layout or the checks of `data.sample` change."""
WINDOW_BYTES = 4 << 20
MAX_RECORD_BYTES = 64 << 20
CONTEXT_BYTES = 200
"""Text before and after a JSON error that is read to explain it."""
MAX_PROBLEMS_KEPT = 1000
HASH_BLOCKS = 64
HASH_BLOCK_BYTES = 64 << 10

BYTE_ORDER_MARK = "\xef\xbb\xbf"
"""The UTF-8 byte order mark, read as Latin-1."""
SPACE = re.compile(r"[ \t\r\n]*")
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))
"""The bytes of a UTF-8 character after its first."""


class Records:
    """The records of one JSON or JSONL file. Pickles as a path: a worker opens the file itself.

    Attributes: `path`; `fingerprint`, which changes with the file; `num_images` of all records;
    `num_problems`, the number of bad records, and `problems`, (record index, message) of the first thousand.
    """

    def __init__(self, path: str | Path, *, show_progress: bool = True):
        """Raises DataError if the file is missing, empty, or not JSON from its first record on."""
        self.path = Path(path)
        self._file = _File(self.path)
        size, mtime_ns, content = self._file.size, self._file.mtime_ns, _content_hash(self._file)
        key = {"version": INDEX_VERSION, "size": size, "mtime_ns": mtime_ns, "hash": content}
        self.fingerprint = f"{size}-{mtime_ns}-{content}"
        paths = cache_paths(self.path, ".index")
        index = next((index for path in paths if (index := _read_index(path, key))), None)
        if index is None:
            index = _build_index(self._file, key, show_progress)
            if not write_cache(paths, *_index_content(*index)):
                logger.warning("%s: its index cannot be saved and is built at every start", self.path)
        header, self._offsets, self._lengths = index
        self.num_images: int = header["num_images"]
        self.num_problems: int = header["num_problems"]
        self.problems: list[tuple[int, str]] = [(index, what) for index, what in header["problems"]]

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> Any:
        """The record's JSON value; DataError if it cannot be parsed (one of `problems`)."""
        begin = int(self._offsets[index])
        return _parse(self._file, begin, begin + int(self._lengths[index]))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], show_progress=False)
        if self.fingerprint != state["fingerprint"]:
            raise self._file.changed()


class _File:
    """An open file; reading it raises FileChangedError once it differs from the file that was opened.

    It is not memory-mapped: a process that touches a mapping beyond the end of a truncated file is killed.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode):  # opening a pipe would block until there is a writer
                kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
                raise DataError(f"{path}: is {kind}, not a file; name a .json or .jsonl file")
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - open as long as this object lives
            status = os.fstat(self._file.fileno())
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{path}: cannot be read ({reason}); check the path in data.txt") from error
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
        if not self.size:
            raise DataError(f"{path}: the file is empty; it must be a JSON array or one record a line")
        self._line = (0, 1)
        """Offset and number of the last line that `line_and_column` was asked about."""

    def read(self, begin: int, end: int) -> bytes:
        try:
            data = os.pread(self._file.fileno(), end - begin, begin)
            while len(data) < end - begin:  # interrupted by a signal, or more than one call can read
                if not (more := os.pread(self._file.fileno(), end - begin - len(data), begin + len(data))):
                    raise self.changed()
                data += more
            status = os.stat(self.path)  # after the read, so that the data is known to be unchanged
        except FileNotFoundError as error:
            raise self.changed() from error
        except OSError as error:
            raise FileChangedError(f"{self.path}: can no longer be read ({error.strerror})") from error
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise self.changed()
        return data

    def changed(self) -> FileChangedError:
        return FileChangedError(f"{self.path}: the file has changed while it was in use; start again")

    def line_and_column(self, position: int) -> tuple[int, int]:
        """Line and column of a byte offset, both from 1; columns count characters."""
        start, line = self._line if self._line[0] <= position else (0, 1)
        column = 1
        for begin in range(start, position, WINDOW_BYTES):
            chunk = self.read(begin, min(begin + WINDOW_BYTES, position))
            if num_lines := chunk.count(b"\n"):
                line, start, column = line + num_lines, begin + chunk.rindex(b"\n") + 1, 1
                chunk = chunk[start - begin :]
            column += len(chunk.translate(None, CONTINUATION_BYTES))
        self._line = start, line
        return line, column


def _content_hash(file: _File) -> str:
    """Hash of blocks spread evenly over the file: at most 4 MiB in all, so that a second start is fast."""
    digest = hashlib.blake2b(digest_size=16)
    for start in np.linspace(0, max(0, file.size - HASH_BLOCK_BYTES), HASH_BLOCKS, dtype=np.int64).tolist():
        digest.update(file.read(start, min(start + HASH_BLOCK_BYTES, file.size)))
    return digest.hexdigest()


# ---- The index file: a line of JSON padded to 64 bytes, the offsets [N] int64, the lengths [N] int32 ----


def _read_index(path: Path, key: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray, np.ndarray] | None:
    """The index, its arrays memory-mapped; None if it is absent, outdated or damaged."""
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


def _index_content(
    header: dict[str, Any], offsets: np.ndarray, lengths: np.ndarray
) -> tuple[bytes, memoryview, memoryview]:
    line = json.dumps(header).encode()
    line += b" " * (-(len(line) + 1) % 64) + b"\n"
    return line, offsets.astype("<i8").data, lengths.astype("<i4").data


def _build_index(
    file: _File, key: dict[str, Any], show_progress: bool
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    offsets, lengths = array("q"), array("i")
    problems: list[tuple[int, str]] = []
    num_images = num_problems = 0
    # `delay` shows the bar only for a file that takes seconds.
    with tqdm(
        total=file.size,
        unit="B",
        unit_scale=True,
        desc=f"index {file.path.name}",
        delay=2,
        disable=not show_progress,
    ) as bar:
        for begin, text, value in _scan(file):
            try:
                num_images += len(parse_sample(value).images)
                if not text.isascii():
                    text.encode("latin-1").decode()
            except (DataError, UnicodeDecodeError):
                if problem := _problem_of(file, begin, begin + len(text)):
                    num_problems += 1
                    if len(problems) < MAX_PROBLEMS_KEPT:
                        problems.append((len(offsets), problem))
            offsets.append(begin)
            lengths.append(len(text))
            if len(offsets) % 4096 == 0:
                bar.update(begin - bar.n)
        bar.update(file.size - bar.n)
    if not offsets:
        raise DataError(
            f"{file.path}: contains no record; it must be a JSON array of records or one record a line"
        )
    header = key | {"num_records": len(offsets), "num_images": num_images}
    header |= {"num_problems": num_problems, "problems": problems}
    return header, np.array(offsets, dtype=np.int64), np.array(lengths, dtype=np.int32)


def _scan(file: _File) -> Iterator[tuple[int, str, Any]]:
    """(offset, text as Latin-1, value) of every record; the value of a line that does not parse is None."""
    window = _Window(file)
    window.move(0, WINDOW_BYTES)
    start = window.skip_space(len(BYTE_ORDER_MARK) if window.text.startswith(BYTE_ORDER_MARK) else 0)
    if window.at(start) == "[":
        yield from _scan_array(window, start + 1)
    else:
        yield from _scan_lines(window, start)


def _scan_lines(window: "_Window", begin: int) -> Iterator[tuple[int, str, Any]]:
    while (begin := window.skip_space(begin)) < window.file.size:
        text = window.line(begin)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        yield begin, text, value
        begin += len(text)


def _scan_array(window: "_Window", position: int) -> Iterator[tuple[int, str, Any]]:
    file = window.file
    count = 0
    begin = window.skip_space(position)
    mark = window.at(begin)
    while mark != "]":
        try:
            value, end = window.decode(begin)
        except FileChangedError:
            raise
        except DataError as error:
            raise DataError(f"{file.path}: record {count} {error}") from error
        yield begin, window.text[begin - window.begin : end - window.begin], value
        count += 1
        begin = window.skip_space(end)
        mark = window.at(begin)
        if mark == ",":
            begin = window.skip_space(begin + 1)
        elif mark != "]":
            line, column = file.line_and_column(begin)
            found = repr(mark) if mark else "the end of the file"
            raise DataError(
                f"{file.path}: {found} follows record {count - 1} on line {line}, column {column};"
                " expected ',' or ']'"
            )
    after = window.skip_space(begin + 1)
    if after < file.size:
        line, _ = file.line_and_column(after)
        raise DataError(
            f"{file.path}: {window.at(after)!r} follows the end of the array on line {line};"
            " a file is one array: put all records into it, or use several files"
        )


class _Window:
    """A section of the file as Latin-1 text in which records are searched; it moves and grows."""

    def __init__(self, file: _File):
        self.file, self.begin, self.text = file, 0, ""
        self._raw_decode = json.JSONDecoder().raw_decode

    def move(self, begin: int, num_bytes: int) -> None:
        end = min(begin + num_bytes, self.file.size)
        self.begin, self.text = begin, self.file.read(begin, end).decode("latin-1")

    def at(self, position: int) -> str:
        """The character at a byte offset in the window; "" at the end of the file."""
        return self.text[position - self.begin : position - self.begin + 1]

    def skip_space(self, position: int) -> int:
        """The byte offset of the next character that is not white space, or the end of the file."""
        while True:
            match = SPACE.match(self.text, position - self.begin)
            assert match is not None
            position = self.begin + match.end()
            if match.end() < len(self.text) or position == self.file.size:
                return position
            self.move(position, WINDOW_BYTES)

    def line(self, begin: int) -> str:
        """The text from a byte offset to the end of its line."""
        while (end := self.text.find("\n", begin - self.begin)) < 0:
            if not self._grow(begin):
                end = len(self.text)
                break
        if end - (begin - self.begin) > MAX_RECORD_BYTES:
            number, _ = self.file.line_and_column(begin)
            raise DataError(f"{self.file.path}: line {number} is longer than {MAX_RECORD_BYTES >> 20} MiB")
        return self.text[begin - self.begin : end]

    def decode(self, begin: int) -> tuple[Any, int]:
        """The value at a byte offset, and the offset after it; DataError if there is none."""
        while True:
            try:
                value, end = self._raw_decode(self.text, begin - self.begin)
            except RecursionError as error:
                raise DataError("is nested too deeply") from error
            except ValueError as error:  # broken, or cut off by the window's end
                if not self._grow(begin):
                    at = self.begin + getattr(error, "pos", begin - self.begin)
                    raise _not_json(self.file, at, self.file.size, error, is_line=False) from error
                continue
            # A number alone has no end mark: the window may have cut 1.5 to 1.
            cut_off = isinstance(value, int | float) and self.text[end : end + 1] in "0123456789.eE+-"
            if not (cut_off and self._grow(begin)):
                return value, self.begin + end

    def _grow(self, begin: int) -> bool:
        """Reads more from a byte offset on; False if the window has all that a record there may be."""
        num_bytes = len(self.text) if self.begin == begin else 0
        if num_bytes > MAX_RECORD_BYTES or self.begin + len(self.text) == self.file.size:
            return False
        self.move(begin, max(WINDOW_BYTES, 2 * num_bytes))
        return True


def _parse(file: _File, begin: int, end: int) -> Any:
    data = file.read(begin, end)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text (byte {error.start} of the record)") from error
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError("is nested too deeply") from error
    except ValueError as error:
        at = begin + len(text[: getattr(error, "pos", 0)].encode())
        raise _not_json(file, at, end, error, is_line=True) from error


def _not_json(file: _File, at: int, end: int, error: ValueError, is_line: bool) -> DataError:
    """A DataError that explains the parser's error at a byte offset; the text ends at `end`."""
    message = getattr(error, "msg", "")
    if not message:
        return DataError("is not JSON: it has a number of too many digits")
    before = file.read(max(0, at - CONTEXT_BYTES), at).decode(errors="ignore")
    text = file.read(at, min(at + CONTEXT_BYTES, end)).decode(errors="replace")
    if message.startswith("Expecting"):
        at, text = at + len(text) - len(text.lstrip()), text.lstrip()
    line, column = file.line_and_column(at)
    explanation = explain(message, before, text, is_line)
    return DataError(f"is not JSON: line {line}, column {column}: {explanation}")


def _problem_of(file: _File, begin: int, end: int) -> str | None:
    """The problem of a record, found in its real text rather than in Latin-1; None if it is good."""
    try:
        parse_sample(_parse(file, begin, end))
    except FileChangedError:
        raise
    except DataError as error:
        return str(error)
    return None
