"""Memory of reading a checkpoint into shards: what one rank's resident set grows by, at its highest.

    python -m tests.benchmarks.load_memory --ranks 2

Output: for each rank the peak growth of its resident memory while a 300 M-parameter checkpoint is read, over
the bytes of the whole model in float32. Pages of the mapped file count, although the system may drop them.
"""

import argparse
import json
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from tests.tiny import run_ranks
from trainer.config import Config
from trainer.distributed import device_mesh, start
from trainer.models import build_model, load_config, parts_of
from trainer.models.xcomposer2.configuration_xcomposer2 import InternLMXcomposer2Config
from trainer.parallelize import parallelize
from trainer.weights import load_weights

SIZES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "plora_rank": 16,
    "img_size": 224,
    "vision_config": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "image_size": 224, "patch_size": 14, "projection_dim": 256},
}


def make_checkpoint(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> int:
    """Write a model of random weights to `folder`; returns its parameters."""
    model = build_model(InternLMXcomposer2Config(**{**SIZES, **changes})).to(dtype)
    model.save_pretrained(folder)
    return model.num_parameters()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def load(folder: Path) -> int:
    """Shard and load the model in `folder` as the trainer does; prints the peak growth in bytes."""
    ranks = start()
    config = load_config(folder)
    with torch.device("meta"):
        model = build_model(config)
    mesh = device_mesh(ranks)
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = parallelize(model, mesh, parts_of(config), Config(gradient_checkpointing=False))
    model.to_empty(device="cpu")
    load_weights(model, folder)
    done.set()
    watcher.join()
    print(json.dumps({"growth": peak - before}))
    return 0


def growths(ranks: int, folder: Path) -> list[int]:
    """Peak growth of each rank, in bytes."""
    return [
        json.loads(output.splitlines()[-1])["growth"]
        for output in run_ranks(ranks, load, folder, timeout=300)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    ranks = parser.parse_args().ranks
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as folder:
            parameters = make_checkpoint(Path(folder), dtype)
            shares = [growth / (4 * parameters) for growth in growths(ranks, Path(folder))]
            print(f"{parameters:,} parameters in {dtype}, {ranks} ranks: peak growth a rank over the whole")
            print("float32 model: " + ", ".join(f"{share:.2f}" for share in shares))


if __name__ == "__main__":
    main()
