"""Checks data before training: `python -m data.check data.txt --model_name_or_path DIR`.

Reads every record and decodes every image on all cores, and measures exact lengths (cached for the training).
Prints a table of sources, their lengths before any cut at max_length, the expected size of an epoch, and
every problem with file, index and id:

    error: 1
      pets.json: record 7 (id 'cat-7') img/7.jpg does not exist; paths start at the JSON file or --image_root
    duplicate: 1
      pets.json: records 0 and 5 are the same

The same report is written as JSON beside data.txt, or to `--out`. The exit status is 2 if a record cannot be
used, else 0: data that can be trained on but looks unintended gives warnings.
"""

import hashlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageChops
from tqdm import tqdm

from data.errors import DataError, FileChangedError
from data.images import open_image, process
from data.ledger import table
from data.lengths import Chunk, chunks_of, in_parallel, measure_lengths, num_cut
from data.loader import SampleReader
from data.mixture import Source
from data.packing import CostModel, Packing, deal, idle_share
from data.reader import CommandConfig, open_data, parse_command
from data.sampler import StepSampler

MAX_SHOWN = 20
"""Problems of a kind that the terminal shows; the JSON file lists all."""
MAX_NAMED = 10
"""Records, keys or pictures that one message names; the others are counted."""
MAX_STEPS_ESTIMATED = 500
"""Steps of the first epoch from which the expected rows and padding are computed."""
BAR_WIDTH = 40


@dataclass
class CheckConfig(CommandConfig):
    """Check data before training on it: `python -m data.check data.txt --model_name_or_path DIR`."""

    # --- the command ---------------------------------------------------------------------------------
    num_ranks: int = 1
    """Processes that the training will have."""
    out: str | None = None
    """The report as JSON; <data_path>.check.json by default."""

    def problems(self) -> list[str]:
        return super().problems() + (self.too_small(num_ranks=1) or self.batch_problems(self.num_ranks))


@dataclass
class Findings:
    """Problems and contents of a chunk of records."""

    errors: list[str] = field(default_factory=list)
    shrunk: list[str] = field(default_factory=list)
    tags_as_text: list[str] = field(default_factory=list)
    empty_answers: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    """64 bits of each record's conversation and images; 0 for one that cannot be read."""
    unknown_keys: Counter[tuple[int, str]] = field(default_factory=Counter)
    """(source, key) → the number of records that have this unknown key."""
    turned: dict[Path, str] = field(default_factory=dict)
    """Pictures that a viewer turns by their EXIF data but the model does not, and a record of each."""
    hiding_colours: dict[Path, str] = field(default_factory=dict)
    """Pictures with colours under their transparency, and a record of each."""

    def add(self, other: "Findings") -> None:
        for name, values in vars(other).items():
            total = getattr(self, name)
            (total.extend if isinstance(total, list) else total.update)(values)


def inspect_records(reader: SampleReader, chunk: Chunk) -> Findings:
    """Parses the records of a chunk and decodes their images."""
    number, records = chunk
    source, found = reader.sources[number], Findings()
    for index in map(int, records):
        try:
            sample = source.sample(index)
        except FileChangedError:
            raise
        except DataError as error:
            found.errors.append(str(error))
            found.hashes.append(0)
            continue
        paths = [source.image_root / path for path in sample.images]
        for path in paths:
            try:
                with open_image(path) as image:
                    process(image, reader.image_processor.rgb)
                    if not reader.image_processor.as_viewed and is_turned(image):
                        found.turned[path] = source.where(index)
                    if not reader.image_processor.as_viewed and hides_colours(image):
                        found.hiding_colours[path] = source.where(index)
            except DataError as error:
                found.errors.append(f"{source.where(index)} {error}")
        if reader.fit_images or reader.on_long_sample == "error":
            try:
                encoded, _ = reader.read(number, index, decode=False)
                if encoded.image_limit is not None:
                    found.shrunk.append(f"{source.where(index)} has {encoded.image_limit}")
            except DataError as error:
                if str(error) not in found.errors:
                    found.errors.append(str(error))
        if tags := " and ".join(sample.tags_as_text):
            found.tags_as_text.append(f"{source.where(index)} has {tags} as text, not as an image")
        if any(role == "assistant" and not text for role, text in sample.turns):
            found.empty_answers.append(f"{source.where(index)} has an empty answer")
        if sample.answer is None:
            found.unanswered.append(f"{source.where(index)} ends with a turn that no answer follows")
        found.unknown_keys.update((number, key) for key in sample.unknown_keys)
        content = repr((sample.turns, paths)).encode("utf-8", "surrogatepass")
        found.hashes.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big"))
    return found


def is_turned(image: Image.Image) -> bool:
    """Whether a viewer turns or mirrors the picture by its EXIF data; broken EXIF data is ignored."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:  # decoders raise exceptions of any type
        return False


def hides_colours(image: Image.Image) -> bool:
    """Whether a decoded picture without its transparency differs from the picture on a white page."""
    if not image.has_transparency_data or image.mode[0] in "IF":  # 16 bits, read without transparency
        return False
    with warnings.catch_warnings(action="ignore"):
        colours, layers = image.convert("RGB"), image.convert("RGBA")
    seen = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layers).convert("RGB")
    return ImageChops.difference(colours, seen).getbbox() is not None


def check(reader: SampleReader, cost: CostModel, config: CheckConfig) -> dict[str, Any]:
    """The report as JSON values."""
    sources = reader.sources
    lengths = measure_lengths(reader, num_workers=config.num_workers)
    chunks = chunks_of([np.arange(len(source.records)) for source in sources])
    found = Findings()
    results = in_parallel(partial(inspect_records, reader), chunks, config.num_workers)
    for result in tqdm(results, "records and images", len(chunks), unit="chunk", delay=2):
        found.add(result)

    # Positions count the records of all sources, one source after the other.
    ends = np.cumsum([len(source.records) for source in sources])

    def locate(position: Any) -> tuple[Source, int]:
        number = int(np.searchsorted(ends, position, side="right"))
        return sources[number], int(position - ends[number] + len(sources[number].records))

    def where(position: Any) -> str:
        source, index = locate(position)
        return source.where(index)

    rows = np.concatenate(lengths)
    cut = np.flatnonzero(rows[:, 3] > rows[:, 0]) if reader.on_long_sample == "truncate" else []
    return {
        "sources": [describe(source, rows) for source, rows in zip(sources, lengths, strict=True)],
        "max_length": reader.encoder.max_length,
        "epoch": expected_epoch(reader, lengths, cost, config),
        "errors": found.errors,
        "warnings": {
            "no answer left": [
                f"{where(at)} {reader.why_unsupervised}" for at in np.flatnonzero(rows[:, 2] == 0)
            ],
            "tail cut off": [
                f"{where(at)} is cut at max_length: {rows[at, 0]:,} of {rows[at, 3]:,} tokens" for at in cut
            ],
            "images made to fit": found.shrunk,
            "images not as a person sees them": [
                *about_pictures(
                    found.hiding_colours,
                    "with colours under their transparency, which the model would see",
                    "lays them on white",
                ),
                *about_pictures(
                    found.turned, "that EXIF data turns for a person but not for the model", "turns them"
                ),
            ],
            "placeholders as text": found.tags_as_text,
            "unknown keys": unknown_keys(sources, found.unknown_keys),
            "repeated often": [source.repetition for source in sources if source.repetition],
            "empty answer": found.empty_answers,
            "no answer to the last turn": found.unanswered,
            "duplicate": [
                f"{', '.join(records_in_files(map(locate, group)))} are the same"
                for group in groups_of_equal(np.array(found.hashes, dtype=np.uint64))
                if len({(source.records.path, index) for source, index in map(locate, group)}) > 1
            ],
        },
    }


def about_pictures(records: dict[Path, str], what: str, remedy: str) -> list[str]:
    """One warning about all pictures of a kind; none if there are no such pictures."""
    if not records:
        return []
    named = in_words([f"{path.name!r} of {record}" for path, record in records.items()])
    return [f"pictures {what}: {len(records):,} ({named}); --images_as_viewed True {remedy}"]


def unknown_keys(sources: Sequence[Source], counts: Counter[tuple[int, str]]) -> list[str]:
    """A warning for each file with unknown keys."""
    paths = [source.records.path for source in sources]
    by_file: dict[Path, list[str]] = {}
    for (number, key), count in counts.most_common():
        path = paths[number]
        if number == paths.index(path):  # data.txt may list a file twice
            plural = "" if count == 1 else "s"
            by_file.setdefault(path, []).append(f"{key!r:.60} in {count:,} record{plural}")
    return [
        f"{path}: has the unknown key{'' if len(keys) == 1 else 's'} {in_words(keys)}"
        for path, keys in by_file.items()
    ]


def groups_of_equal(hashes: np.ndarray) -> list[list[int]]:
    """The positions of each nonzero hash that occurs more than once."""
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    groups: dict[int, list[int]] = {}
    for position in np.flatnonzero((counts[inverse] > 1) & (hashes != 0)).tolist():
        groups.setdefault(int(inverse[position]), []).append(position)
    return list(groups.values())


def records_in_files(records: Iterable[tuple[Source, int]]) -> Iterator[str]:
    """For each file its records: "pets.json: records 3, 7 and 12"."""
    by_file: dict[Path, dict[int, None]] = {}
    for source, index in records:
        by_file.setdefault(source.records.path, {})[index] = None
    for path, indices in by_file.items():
        yield f"{path}: record{'s' * (len(indices) > 1)} {in_words(list(map(str, indices)))}"


def in_words(items: Sequence[str]) -> str:
    """The items as a phrase: "1, 2 and 3", or "1, 2, … and 7 more" if there are many."""
    shown, num_more = list(items[:MAX_NAMED]), len(items) - MAX_NAMED
    if num_more > 0:
        shown.append(f"{num_more:,} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def describe(source: Source, rows: np.ndarray) -> dict[str, Any]:
    """A source and its samples' lengths before the cut; histogram: [length limit, samples] per doubling."""
    good = np.array(rows[rows[:, 0] >= 0], dtype=np.int64)
    tokens = good[:, 3] if len(good) else np.zeros(1, dtype=np.int64)
    doublings = np.ceil(np.log2(np.maximum(tokens, 16))).astype(int)
    num_over, num_tokens = num_cut(good), max(1, int(good[:, 0].sum()))
    return {
        "source": source.name,
        "path": str(source.records.path),
        "records": len(source.records),
        "bad_records": len(rows) - len(good),
        "images": source.records.num_images,
        "samples_per_epoch": source.num_samples,
        "tokens": {
            "mean": float(tokens.mean()),
            "median": float(np.median(tokens)),
            "95 %": float(np.percentile(tokens, 95)),
            "longest": int(tokens.max()),
        },
        "over_max_length": num_over,
        "over_max_length_share": num_over / max(1, len(good)),
        "image_slot_share": int(good[:, 1].sum()) / num_tokens,
        "supervised_share": int(good[:, 2].sum()) / num_tokens,
        "histogram": [
            [2**power, int((doublings == power).sum())]
            for power in range(doublings.min(), doublings.max() + 1)
        ],
    }


def expected_epoch(
    reader: SampleReader, lengths: Sequence[np.ndarray], cost: CostModel, config: CheckConfig
) -> dict[str, Any]:
    """Expected steps, tokens, padding and idle time of the first epoch, packed and unpacked."""
    num_ranks, per_micro_batch = config.num_ranks, config.per_device_train_batch_size
    global_batch = config.global_batch(num_ranks)
    sampler = StepSampler(reader.sources, config.seed, global_batch)
    packing = Packing(lengths, config.row_tokens, cost)
    num_steps = min(sampler.steps_per_epoch, MAX_STEPS_ESTIMATED)
    num_tokens = num_rows = padded_tokens = 0
    idle_packed = idle_dealt = 0.0
    for step in range(num_steps):
        samples = sampler.samples(step)
        tokens = packing.sizes(samples)[:, 0]
        packed, costs = packing.plan(samples, num_ranks)
        dealt = deal(len(samples), num_ranks, per_micro_batch)
        idle_packed += idle_share(packed, costs) / num_steps
        idle_dealt += idle_share(dealt, costs) / num_steps
        num_tokens += int(tokens.sum())
        num_rows += sum(map(len, packed))
        padded_tokens += sum(len(row) * int(tokens[row].max(initial=0)) for rank in dealt for row in rank)
    return {
        "samples": sampler.samples_per_epoch,
        "global_batch": global_batch,
        "steps": sampler.steps_per_epoch,
        "tokens": round(num_tokens * sampler.steps_per_epoch / num_steps),
        "packed": {
            "rows_per_step_and_rank": num_rows / num_steps / num_ranks,
            "row_fill": num_tokens / max(1, num_rows * config.row_tokens),
            "padding_share": 0.0,
            "idle_share": idle_packed,
        },
        "unpacked": {"padding_share": 1 - num_tokens / max(1, padded_tokens), "idle_share": idle_dealt},
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    names = (
        "source, records, bad, images, samples an epoch, mean tokens, median, 95 %, longest, over max_length"
    )
    lines: list[Sequence[str]] = [names.split(", ")]
    for source in report["sources"]:
        counts = [source[name] for name in ("records", "bad_records", "images", "samples_per_epoch")]
        counts += source["tokens"].values()
        over = f"{source['over_max_length']:,} ({source['over_max_length_share']:.0%})"
        lines.append([source["source"], *(f"{count:,.0f}" for count in counts), over])
    text = [table(lines), "", f"lengths are those before the cut at max_length={report['max_length']}"]
    for source in report["sources"]:
        text.append(f"{source['source']}: samples by length")
        most = max(count for _, count in source["histogram"])
        for longest, count in source["histogram"]:
            bar = "█" * round(BAR_WIDTH * count / max(1, most))
            text.append(f"  ≤ {longest:>7,} {bar:<{BAR_WIDTH}} {count:,}")
    epoch = report["epoch"]
    packed, unpacked = epoch["packed"], epoch["unpacked"]
    text += [
        "",
        f"an epoch: {epoch['samples']:,} samples in {epoch['steps']:,} steps of {epoch['global_batch']:,}, "
        f"about {epoch['tokens']:,} tokens",
        f"packed: {packed['rows_per_step_and_rank']:.1f} rows a step and rank, {packed['row_fill']:.0%} of "
        f"their room filled, no padding, ranks idle {packed['idle_share']:.1%}",
        f"unpacked: {unpacked['padding_share']:.1%} padding, ranks idle {unpacked['idle_share']:.1%}",
    ]
    for kind, found in {"error": report["errors"], **report["warnings"]}.items():
        text += ["", f"{kind}: {len(found):,}"] if found else []
        text += [f"  {what}" for what in found[:MAX_SHOWN]]
        text += [f"  … and {len(found) - MAX_SHOWN:,} more"] if len(found) > MAX_SHOWN else []
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_command(CheckConfig, argv, "data.check")
    if config is None:
        return 2
    try:
        report = check(*open_data(config), config)
    except DataError as error:
        report = {"errors": str(error).splitlines()}
        print(f"error: {error}")
    else:
        print(as_text(report))
    out = Path(config.out or f"{config.data_path}.check.json")
    try:
        out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"\nwarning: {out} cannot be written ({error.strerror}); set --out to another file")
    else:
        print(f"\nthe whole report is in {out}")
    return 2 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
