"""Figures of the data path: index, padding and balance, data wait.

python -m tests.benchmarks.data_engine index      # 1,000,000 records in 1 GB of JSON, beside json.load
python -m tests.benchmarks.data_engine balance    # a realistic mixture on 8 simulated ranks
python -m tests.benchmarks.data_engine wait       # a step of 100 ms, 8 ms to decode an image
"""

import json
import random
import resource
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from data.loader import SampleReader, StepLoader
from data.mixture import read_mixture
from data.packing import CostModel, deal, idle_share, pack
from data.records import Records
from data.sampler import StepSampler
from tests.data_fixtures import SquareProcessor, encoder, record, write_json


def resident_mb() -> dict[str, float]:
    """Of this process: all, and the part that is its own and not a file's pages."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon")}


def write_big(path: Path, num_records: int) -> None:
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnopqrst", k=choose.randint(2, 9))) for _ in range(5000)]
    words += ["浦语", "灵笔", "é", '"q"', "a\\b"]
    texts = [" ".join(choose.choices(words, k=choose.randint(10, 60))) for _ in range(3000)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_records):
            images = [f"images/{number % 1000:04}.jpg"] if number % 2 else []
            turns = ["<ImageHere>" * len(images) + choose.choice(texts)]
            turns += [choose.choice(texts) for _ in range(choose.choice([1, 1, 3, 5]))]
            item = json.dumps(
                record(*turns, images=images, record_id=f"r{number}"), ensure_ascii=number % 3 == 0
            )
            file.write(("[\n" if number == 0 else ",\n") + item)
        file.write("\n]\n")


def in_a_process(function, *arguments):
    """The result of a call in a fresh process, and the most memory that it used, in MB."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (function, arguments))


def _measured(function, arguments):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    result = function(*arguments)
    seconds = time.perf_counter() - started
    return result, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def open_records(path: Path) -> int:
    return len(Records(path, show_progress=False))


def worker_reads(path: Path, num_reads: int) -> dict[str, float]:
    before = resident_mb()
    records = Records(path)
    choose = random.Random(1)
    for _ in range(num_reads):
        records[choose.randrange(len(records))]
    after = resident_mb()
    return {name: after[name] - before[name] for name in before}


def json_load(path: Path) -> int:
    with path.open(encoding="utf-8") as file:
        return len(json.load(file))


def index() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "big.json"
        write_big(path, 1_000_000)
        print(f"1,000,000 records, {path.stat().st_size / 1e9:.2f} GB")
        for name, function in (
            ("json.load", json_load),
            ("index", open_records),
            ("second start", open_records),
        ):
            _, seconds, megabytes = in_a_process(function, path)
            print(f"{name:<14}{seconds:8.2f} s   peak memory +{megabytes:,.0f} MB")
        added, seconds, _ = in_a_process(worker_reads, path, 50_000)
        print(f"50,000 random reads {seconds:.2f} s, worker +{added['VmRSS']:.0f} MB resident, ", end="")
        print(f"+{added['RssAnon']:.0f} MB its own")


def balance() -> None:
    """Text log-normal with a median of 290 tokens, images in 60 %, a second one in 15 % of those."""
    choose, cost, max_length, num_ranks = np.random.default_rng(0), CostModel(), 4096, 8
    print("samples a rank  slots  rows a rank  fill   padding: packed  in order   idle: packed  in order")
    for slots in (1225, 256):
        for per_rank in (4, 8, 16, 32, 64):
            figures = []
            for _ in range(50):
                count = per_rank * num_ranks
                images = (choose.random(count) < 0.6) * (1 + (choose.random(count) < 0.15)) * slots
                text = np.exp(choose.normal(5.6, 0.9, count)).astype(int) + 20
                tokens = np.minimum(text + images, max_length)
                costs = cost(tokens, images)
                packed, dealt = pack(tokens, costs, num_ranks, max_length), deal(count, num_ranks, 4)
                rows = sum(len(parts) for parts in packed)
                # In order every row is as long as the longest of its micro-batch, and so is its work.
                padded = tokens.copy()
                for part in (part for parts in dealt for part in parts):
                    padded[part] = tokens[part].max(initial=0)
                figures.append(
                    (
                        rows / num_ranks,
                        tokens.sum() / rows / max_length,
                        0.0,
                        1 - tokens.sum() / padded.sum(),
                        idle_share(packed, costs),
                        idle_share(dealt, cost(padded, images)),
                    )
                )
            rows, fill, *shares = np.mean(figures, axis=0)
            shown = "".join(f"{share:>14.1%}" for share in shares)
            print(f"{per_rank:>14}{slots:>7}{rows:>13.1f}{fill:>6.0%}{shown}")


class SlowProcessor(SquareProcessor):
    def __call__(self, image):
        image.resize((490, 490), Image.Resampling.BICUBIC)
        return super().__call__(image)


def wait() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
        picture.save(folder / "a.jpg", quality=90)
        sources = read_mixture(
            write_json(folder / "a.json", [record("<ImageHere>", "1", images=["a.jpg"])] * 2000)
        )
        reader = SampleReader(sources, encoder(), SlowProcessor())
        started = time.perf_counter()
        for number in range(100):
            reader.read(0, number)
        milliseconds = (time.perf_counter() - started) * 10
        print(f"one image: {milliseconds:.1f} ms; over 100 %, decoders are the machine's limit")
        print("images a step  workers  decoders busy  data wait")
        for num_images in (4, 8, 16, 24):
            for num_workers in (0, 1, 2):
                sampler = StepSampler(sources, seed=0, global_batch=num_images)
                loader = StepLoader(
                    reader,
                    sampler,
                    rank=0,
                    num_ranks=1,
                    samples_per_micro_batch=4,
                    num_steps=45,
                    num_workers=num_workers,
                )
                steps, waited = iter(loader), []
                for _ in range(45):
                    started = time.perf_counter()
                    next(steps)
                    waited.append(time.perf_counter() - started)
                    time.sleep(0.1)  # the model, on an accelerator
                seconds = sum(waited[5:])
                share = seconds / (seconds + 0.1 * len(waited[5:]))
                busy = num_images * milliseconds / 100 / max(1, num_workers)
                print(f"{num_images:>13}{num_workers:>9}{busy:>15.0%}{share:>11.1%}")


if __name__ == "__main__":
    {"index": index, "balance": balance, "wait": wait}[sys.argv[1]]()
