"""`python -m data.check data.txt --model_name_or_path DIR`: what is wrong with data, before it is trained on.

Reads every record and decodes every image on all cores, and measures exact lengths (cached for the training).
Prints a table of sources, their lengths, what an epoch will be, and every problem with file, index and id;
the same goes as JSON beside data.txt, or to `--out`. The exit status is 2 if a record cannot be used, else 0:
empty answers, duplicates and samples whose answers max_length cuts off are warnings.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.errors import DataError
from data.images import open_image, process
from data.ledger import table
from data.lengths import Chunk, chunks_of, in_parallel, measure_lengths
from data.loader import SampleReader
from data.mixture import Source
from data.packing import Packing, deal, idle_share
from data.processors import add_arguments, open_data
from data.sampler import StepSampler

MAX_SHOWN = 20
"""Problems of a kind that the terminal shows; the JSON file has all."""
MAX_STEPS_PLANNED = 500
"""Steps of the first epoch that the expected rows and padding are computed from."""
BAR_WIDTH = 40


@dataclass
class Findings:
    """Of a chunk of records."""

    errors: list[str] = field(default_factory=list)
    shrunk: list[str] = field(default_factory=list)
    has_empty_answer: list[bool] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    """64 bits of each record's conversation and images; 0 where it cannot be read."""


def inspect_records(reader: SampleReader, chunk: Chunk) -> Findings:
    """Parses the records of a chunk and decodes their images."""
    number, records = chunk
    source, found = reader.sources[number], Findings()
    for index in map(int, records):
        try:
            sample = source.sample(index)
        except DataError as error:
            found.errors.append(str(error))
            found.has_empty_answer.append(False)
            found.hashes.append(0)
            continue
        paths = [source.image_root / path for path in sample.images]
        for path in paths:
            try:
                with open_image(path) as image:
                    process(image, reader.image_processor.rgb)
            except DataError as error:
                found.errors.append(f"{source.where(index, sample.id)} {error}")
        if reader.fit_images or reader.on_long_sample == "error":
            try:
                encoded, _ = reader.read(number, index, decode=False)
                if encoded.hd_num is not None:
                    found.shrunk.append(f"{source.where(index, sample.id)} has hd_num={encoded.hd_num}")
            except DataError as error:
                if str(error) not in found.errors:
                    found.errors.append(str(error))
        content = repr((sample.turns, paths)).encode("utf-8", "surrogatepass")
        found.has_empty_answer.append(any(role == "assistant" and not text for role, text in sample.turns))
        found.hashes.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big"))
    return found


def check(reader: SampleReader, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report, as JSON values."""
    lengths = measure_lengths(reader, num_workers=arguments.num_workers)
    chunks = chunks_of([np.arange(len(source.records)) for source in reader.sources])
    found = Findings()
    results = in_parallel(partial(inspect_records, reader), chunks, arguments.num_workers)
    for part, _ in zip(results, tqdm(chunks, desc="records and images", unit="chunk", delay=2), strict=True):
        found.errors += part.errors
        found.shrunk += part.shrunk
        found.has_empty_answer += part.has_empty_answer
        found.hashes += part.hashes

    # A position counts the records of all sources, one after the other.
    ends = np.cumsum([len(source.records) for source in reader.sources])

    def where(position: Any) -> str:
        number = int(np.searchsorted(ends, position, side="right"))
        source = reader.sources[number]
        index = int(position - ends[number] + len(source.records))
        return source.where(index, source.sample(index).id)

    hashes = np.array(found.hashes, dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    repeats = 1 + np.flatnonzero((hashes[order][1:] == hashes[order][:-1]) & (hashes[order][1:] != 0))
    left_without = np.flatnonzero(np.concatenate(lengths)[:, 2] == 0)
    return {
        "sources": [describe(source, rows) for source, rows in zip(reader.sources, lengths, strict=True)],
        "epoch": plan_epoch(reader, lengths, arguments),
        "errors": found.errors,
        "warnings": {
            "no answer left": [f"{where(at)} {reader.why_unsupervised}" for at in left_without],
            "images made to fit": found.shrunk,
            "empty answer": [
                f"{where(at)} has an empty answer" for at in np.flatnonzero(found.has_empty_answer)
            ],
            "duplicate": [
                f"{where(copy)} is the same as {where(first)}"
                for first, copy in zip(order[repeats - 1], order[repeats], strict=True)
            ],
        },
    }


def describe(source: Source, rows: np.ndarray) -> dict[str, Any]:
    """A source and the lengths of its samples; histogram: [longest, samples] of each doubling."""
    good = np.array(rows[rows[:, 0] >= 0], dtype=np.int64)
    tokens = good[:, 0] if len(good) else np.zeros(1, dtype=np.int64)
    doublings = np.ceil(np.log2(np.maximum(tokens, 16))).astype(int)
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
        "image_slot_share": float(good[:, 1].sum() / max(1, good[:, 0].sum())),
        "supervised_share": float(good[:, 2].sum() / max(1, good[:, 0].sum())),
        "histogram": [
            [2**power, int((doublings == power).sum())]
            for power in range(doublings.min(), doublings.max() + 1)
        ],
    }


def plan_epoch(
    reader: SampleReader, lengths: Sequence[np.ndarray], arguments: argparse.Namespace
) -> dict[str, Any]:
    """What the first epoch is expected to be, packed and not."""
    num_ranks, per_micro_batch = arguments.num_ranks, arguments.per_device_train_batch_size
    global_batch = num_ranks * per_micro_batch * arguments.gradient_accumulation_steps
    sampler = StepSampler(reader.sources, arguments.seed, global_batch)
    packing = Packing(lengths, reader.encoder.max_length)
    num_steps = min(sampler.steps_per_epoch, MAX_STEPS_PLANNED)
    num_tokens = num_rows = padded_tokens = 0
    idle_packed = idle_dealt = 0.0
    for step in range(num_steps):
        samples = sampler.samples(step)
        tokens, costs = packing.measure(samples)
        packed, dealt = packing.plan(samples, num_ranks), deal(len(samples), num_ranks, per_micro_batch)
        idle_packed += idle_share(packed, costs) / num_steps
        idle_dealt += idle_share(dealt, costs) / num_steps
        num_tokens += int(tokens.sum())
        num_rows += sum(len(parts) for parts in packed)
        padded_tokens += sum(len(p) * int(tokens[p].max(initial=0)) for parts in dealt for p in parts)
    return {
        "samples": sampler.samples_per_epoch,
        "global_batch": global_batch,
        "steps": sampler.steps_per_epoch,
        "tokens": round(num_tokens * sampler.steps_per_epoch / num_steps),
        "packed": {
            "rows_per_step_and_rank": num_rows / num_steps / num_ranks,
            "row_fill": num_tokens / max(1, num_rows * reader.encoder.max_length),
            "padding_share": 0.0,
            "idle_share": idle_packed,
        },
        "unpacked": {"padding_share": 1 - num_tokens / max(1, padded_tokens), "idle_share": idle_dealt},
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [["source", "records", "bad", "images", "samples an epoch"]]
    lines[0] += ["mean tokens", "median", "95 %", "longest"]
    for source in report["sources"]:
        counts = [source[name] for name in ("records", "bad_records", "images", "samples_per_epoch")]
        counts += source["tokens"].values()
        lines.append([source["source"], *(f"{count:,.0f}" for count in counts)])
    text = [table(lines), ""]
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
        f"max_length filled, no padding, ranks idle {packed['idle_share']:.1%}",
        f"unpacked: {unpacked['padding_share']:.1%} padding, ranks idle {unpacked['idle_share']:.1%}",
    ]
    for kind, found in {"error": report["errors"], **report["warnings"]}.items():
        text += ["", f"{kind}: {len(found):,}"] if found else []
        text += [f"  {what}" for what in found[:MAX_SHOWN]]
        text += [f"  … and {len(found) - MAX_SHOWN:,} more"] if len(found) > MAX_SHOWN else []
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.check", description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--out", help="the report as JSON; <data_path>.check.json by default")
    arguments = parser.parse_args(argv)
    try:
        report = check(open_data(arguments, skip_bad=True), arguments)
    except DataError as error:
        report = {"errors": str(error).splitlines()}
        print(f"error: {error}")
    else:
        print(as_text(report))
    out = Path(arguments.out or f"{arguments.data_path}.check.json")
    try:
        out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"error: {out} cannot be written ({error.strerror}); name a place with --out")
        return 2
    print(f"\nthe whole report is in {out}")
    return 2 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
