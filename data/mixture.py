"""data.txt → sources, and the number of samples that an epoch takes from each.

    # data.txt: <json path> <number>
    pets/train.json   0.02        20 samples an epoch (thousands; --given_num True)
    "my files/qa.jsonl" 1.5       1,500 samples
    text only.json                no number: the whole file once

With `--given_num False` the number is a ratio of the file: 0.5 is every second record. Paths are relative to
data.txt and may contain spaces and quotes; quotes around the whole path are removed. A `#` at the start of a
line or after white space starts a comment. A .json or .jsonl file may be given instead of data.txt.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError, FileChangedError
from data.records import Records
from data.sample import Sample, parse_sample

MAX_PROBLEMS_SHOWN = 5
"""Problems of one file that are listed; the others are counted."""
USUAL_REPETITIONS = 10
"""Uses of a record in an epoch; more give a warning, as data.txt may have been meant differently."""
MAX_SAMPLES = 10**9
"""The order of an epoch is kept in memory: 16 bytes a sample."""


@dataclass(frozen=True)
class Source:
    """One line of data.txt."""

    name: str
    """Unique in the mixture: the file's stem if that is enough, else its path, else path and line."""
    records: Records
    num_samples: int
    """Samples per epoch."""
    image_root: Path

    @property
    def repetition(self) -> str | None:
        """A warning if an epoch uses each record unusually often, else None."""
        num_records = len(self.records)
        times = self.num_samples / num_records
        if times <= USUAL_REPETITIONS:
            return None
        return (
            f"{self.records.path}: {self.num_samples:,} samples an epoch of {num_records:,} "
            f"record{'' if num_records == 1 else 's'}, each about {times:,.0f} times; "
            "numbers in data.txt are thousands of samples, or ratios with --given_num False"
        )

    def where(self, index: int) -> str:
        """A record's file, index and id, for messages: "pets/train.json: record 7 (id 'cat-7')"."""
        record_id = self.record_id(index)
        return f"{self.records.path}: record {index}" + ("" if record_id is None else f" (id {record_id!r})")

    def record_id(self, index: int) -> str | None:
        """The record's id; None if it has none or cannot be read."""
        try:
            record = self.records[index]
        except DataError:
            return None
        record_id = record.get("id") if isinstance(record, dict) else None
        return None if record_id is None else str(record_id)

    def sample(self, index: int, needs_answer: bool = True) -> Sample:
        """The record as a sample; DataError that names file, index and id if it cannot be used."""
        try:
            return parse_sample(self.records[index], needs_answer)
        except FileChangedError:
            raise
        except DataError as error:
            raise DataError(f"{self.where(index)} {error}") from error


def read_mixture(
    data_path: str | Path,
    given_num: bool = True,
    image_root: str | Path | None = None,
    *,
    skip_bad: bool = False,
    show_progress: bool = True,
) -> list[Source]:
    """Reads data.txt (or one JSON file) and indexes its files; DataError with all problems of all files.

    Args:
        image_root: folder that image paths are relative to; None means the folder of their JSON file.
        skip_bad: do not report bad records here; the loader skips and counts them.
    """
    data_path = Path(data_path)
    lines = [_Line(0, data_path, None)] if data_path.suffix in (".json", ".jsonl") else _read_lines(data_path)
    problems: list[str] = []
    sources: list[Source] = []
    for line, name in zip(lines, _unique_names(lines), strict=True):
        try:
            records = Records(line.path, show_progress=show_progress)
            num_samples = _num_samples(line, len(records), given_num)
        except DataError as error:
            problems.append(f"{data_path}, line {line.number}: {error}" if line.number else str(error))
            continue
        sources.append(Source(name, records, num_samples, Path(image_root or line.path.parent)))
        if not skip_bad:
            problems += _problems_of(sources[-1])
    if problems:
        raise DataError(*problems)
    return sources


@dataclass(frozen=True)
class _Line:
    number: int
    """From 1; 0 if a JSON file was given instead of data.txt."""
    path: Path
    amount: str | None
    """The text after the path."""


def _read_lines(data_path: Path) -> list[_Line]:
    try:
        text = data_path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            f"{data_path}: cannot be read ({error.strerror}); --data_path names data.txt"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{data_path}: is not a text file (byte {error.start} is not UTF-8)") from error
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if (split := _split_line(line.strip())) is not None:
            lines.append(_Line(number, data_path.parent / split[0], split[1]))
    if not lines:
        raise DataError(f"{data_path}: names no file; write one a line: <json path> <thousands of samples>")
    return lines


def _split_line(line: str) -> tuple[str, str | None] | None:
    """(path, amount or None); None for an empty line or a comment."""
    if quoted := re.fullmatch(r"""(["'])(.+?)\1(?:\s+(.*))?""", line):
        amount = re.sub(r"(^|\s)#.*", "", quoted[3] or "")
        return quoted[2], amount or None
    line = re.sub(r"(^|\s)#.*", "", line).rstrip()
    if not line:
        return None
    path, _, last = line.rpartition(" ") if " " in line else line.rpartition("\t")
    try:
        float(last)
    except ValueError:
        return line, None
    return (path.rstrip(), last) if path else (line, None)


def _num_samples(line: _Line, num_records: int, given_num: bool) -> int:
    if line.amount is None:
        return num_records
    try:
        amount = float(line.amount)
    except ValueError:
        amount = math.nan
    exact = amount * (1000 if given_num else num_records)
    if not math.isfinite(exact) or exact < 0:
        raise DataError(f"{line.path}: {line.amount!r} is not a number of samples; write for example 0.5")
    # Rounds half up; the tiny term corrects products like 0.0015 × 1000 = 1.4999999999999998.
    num_samples = math.floor(exact + 0.5 + 1e-9)
    if num_samples == 0:
        meaning = "thousands of samples" if given_num else f"of its {num_records} records"
        raise DataError(
            f"{line.path}: {line.amount} {meaning} is no sample an epoch; raise it or drop the line"
        )
    if num_samples > MAX_SAMPLES:
        raise DataError(
            f"{line.path}: {line.amount} means {num_samples:.3g} samples an epoch, over {MAX_SAMPLES:.0e}"
        )
    return num_samples


def _problems_of(source: Source) -> list[str]:
    records = source.records
    shown = [f"{source.where(index)} {what}" for index, what in records.problems[:MAX_PROBLEMS_SHOWN]]
    if (num_more := records.num_problems - len(shown)) > 0:
        shown.append(
            f"{records.path}: {num_more} more records cannot be used; `python -m data.check` lists them"
        )
    return shown


def _unique_names(lines: list[_Line]) -> list[str]:
    names = [line.path.stem for line in lines]
    paths = [str(line.path) for line in lines]
    names = [path if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]
    return [
        f"{name} (line {line.number})" if names.count(name) > 1 else name
        for name, line in zip(names, lines, strict=True)
    ]
