"""Seconds a step without kept features, while they are being made, and when all are read.

    python -m tests.benchmarks.vision_cache                       # square and high-resolution, 3 rounds
    python -m tests.benchmarks.vision_cache --workloads square --rounds 5 --lora

Small models in which the frozen vision tower has about the share of a step's work that it has in a published
one, each sample with a JPEG of 1200 × 900 pixels. The runs are of `trainer.main`, one after the other in
every round. Output: medians over the rounds of each run's median step, in wall-clock time and in the training
process's time on the processor, which other load on the machine hardly changes; their ratios; and the tower's
share of a step's work as it is counted for packing, here and in the published model.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.packing import CostModel
from tests.tiny import read_metrics, run_ranks, tiny_model
from trainer.main import main as train
from trainer.metrics import MetricsFile
from trainer.models import cost_sizes, load_config
from trainer.models.xcomposer2.configuration_xcomposer2 import InternLMXcomposer2Config

NUM_IMAGES = 8
STEPS, FIRST_MEASURED = 12, 5
LANGUAGE = {"num_key_value_heads": 2, "num_attention_heads": 4, "vocab_size": 320, "plora_rank": 32}
VISION = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "patch_size": 14}
WORKLOADS: dict[str, dict[str, Any]] = {
    # 490 pixels, as vl-1.8b
    "square": {
        "model": {
            **LANGUAGE,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 3,
            "img_size": 490,
            "vision_config": {**VISION, "image_size": 490, "num_hidden_layers": 2},
        },
        "flags": ["--max_length", "1400"],
        "published": {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "vision_config": {},
        },
    },
    # up to 3 tiles of 336 pixels, as 4khd-7b
    "tiles": {
        "model": {
            **LANGUAGE,
            "hidden_size": 256,
            "intermediate_size": 896,
            "num_hidden_layers": 4,
            "high_resolution": True,
            "img_size": 336,
            "vision_config": {**VISION, "image_size": 336, "num_hidden_layers": 1},
        },
        "flags": ["--max_length", "900", "--hd_num", "3"],
        "published": {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vision_config": {"image_size": 336},
        },
    },
}


def write_data(folder: Path) -> Path:
    """Records of a smooth picture with noise of its own each, 1200 × 900 pixels, and a question."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    records = []
    for number in range(NUM_IMAGES):
        coarse = generator.integers(0, 255, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((1200, 900), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
        words = " ".join(f"w{(number + i) % 200}" for i in range(60))
        turns = [
            {"from": "user", "value": "<ImageHere>what is it?"},
            {"from": "assistant", "value": words},
        ]
        records.append({"image": [f"{number}.jpg"], "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def tower_share(config: Any) -> float:
    """The frozen tower's part of the multiplications at an image slot, forward and backward, without
    computing activations again."""
    image_slot = CostModel.from_sizes(**cost_sizes(config), trains_vision=False).image_slot
    return image_slot / (1 + image_slot)


def timed_train(argv: list[str]) -> int:
    """The run; its lines of metrics say how long this process has been on a processor."""
    write = MetricsFile.write

    def timed_write(self: MetricsFile, **values: Any) -> None:
        write(self, processor_seconds=time.process_time(), **values)

    MetricsFile.write = timed_write
    return train(argv)


def measure(folder: Path, name: str, arguments: list[str], more: list[str]) -> dict[str, float]:
    """The median step of a run: seconds, of them waiting for data, and on the processor."""
    run_ranks(1, timed_train, [*arguments, "--output_dir", f"{folder}/{name}", *more], timeout=600)
    lines = read_metrics(folder / name)[FIRST_MEASURED - 2 :]
    processor = [
        after["processor_seconds"] - before["processor_seconds"] for before, after in pairwise(lines)
    ]
    return {
        "step": statistics.median(line["seconds_step"] for line in lines[1:]),
        "data_wait": statistics.median(line["seconds_data_wait"] for line in lines[1:]),
        "processor": statistics.median(processor),
    }


def compare(folder: Path, workload: dict[str, Any], rounds: int, more: list[str]) -> None:
    """Print a row for each way."""
    tiny_model(folder / "model", **workload["model"])
    arguments = f"""
        --model_name_or_path {folder}/model --data_path {write_data(folder / "data")} --bf16 False
        --per_device_train_batch_size 1 --max_steps {STEPS} --save_strategy no --rehearse False
        --dataloader_num_workers 1
    """.split()
    arguments += [*workload["flags"], *more]
    found: dict[str, list[dict[str, float]]] = {"without": [], "reading": []}
    keep = ["--cache_vision_features", f"{folder}/features"]
    measure(folder, "filling", arguments, keep)
    for number in range(rounds):
        found["without"].append(measure(folder, f"without-{number}", arguments, []))
        found["reading"].append(measure(folder, f"reading-{number}", arguments, keep))
    print(f"    {'':<10}{'s a step':>10}{'of it data':>12}{'ratio':>8}{'processor s':>13}{'ratio':>8}")
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    for name, row in medians.items():
        ratios = {key: row[key] / medians["without"][key] for key in ("step", "processor")}
        print(
            f"    {name:<10}{row['step']:>10.3f}{row['data_wait']:>12.3f}{ratios['step']:>8.3f}"
            f"{row['processor']:>13.3f}{ratios['processor']:>8.3f}",
            flush=True,
        )
    published = InternLMXcomposer2Config(**{**workload["model"], **workload["published"]})
    ours, theirs = tower_share(load_config(folder / "model")), tower_share(published)
    print(f"    the tower's share of a full step's work: {ours:.1%} here, {theirs:.1%} in the published size")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lora", action="store_true", help="adapters instead of a full training")
    arguments = parser.parse_args(argv)
    for name in arguments.workloads:
        print(f"{name}, {'LoRA' if arguments.lora else 'full'}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            more = ["--use_lora", "True", "--lora_r", "16"] if arguments.lora else []
            compare(Path(folder), WORKLOADS[name], arguments.rounds, more)


if __name__ == "__main__":
    main()
