"""Peak memory of a forward and backward against the number of tiles, at two values of --vision_micro_batch.

    python -m tests.benchmarks.tile_memory                        # on a GPU if there is one
    python -m tests.benchmarks.tile_memory --tiles 4 8 --bounds 2 4

Blocks of the published tower's size (1024 wide, 560-pixel tiles: 1,601 positions), two of its 24, in float32,
with activation checkpointing, before a language model too small to matter. Output, for a frozen tower and one
that trains: what memory grows by at its highest, in MB, above weights and pixels.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.tiny import run_ranks
from trainer.config import Config
from trainer.distributed import device_mesh, start
from trainer.models import build_model, parts_of
from trainer.models.xcomposer2.configuration_xcomposer2 import InternLMXcomposer2Config
from trainer.parallelize import parallelize

TILE = 560
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "plora_rank": 4,
    "high_resolution": True,
    "vision_config": {"image_size": TILE, "num_hidden_layers": 2},
}


def peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def start_counting(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now


def grow(tiles: int, bound: int | None, trains: bool) -> int:
    """Print the growth of one row with `tiles` tiles, the global view among them."""
    ranks = start()
    with torch.device("meta"):
        model = build_model(InternLMXcomposer2Config(**SIZES))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains or not name.startswith("vit."))
    mesh = device_mesh(ranks)
    flags = Config(bf16=False, gradient_checkpointing=True, vision_micro_batch=bound)
    model = parallelize(model, mesh, parts_of(model.config), flags)
    model.to_empty(device=ranks.device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.init_buffers()

    def row(tiles: int) -> dict[str, Any]:
        slots = model.vit.num_tokens((tiles - 1) * TILE, TILE)
        im_mask = torch.zeros(1, slots + 4, dtype=torch.bool, device=ranks.device)
        im_mask[:, 1:-3] = True
        ids = torch.ones(1, slots + 4, dtype=torch.int64, device=ranks.device)
        pixels = torch.zeros(1, 3, (tiles - 1) * TILE, TILE, device=ranks.device)
        return {
            "input_ids": ids,
            "im_mask": im_mask,
            "pixel_values": pixels,
            "labels": ids.masked_fill(im_mask, -100),
        }

    model(**row(2)).loss.backward()  # gradients, and whatever is made once
    inputs = row(tiles)
    start_counting(ranks.device)
    before = peak_mb(ranks.device)
    model(**inputs).loss.backward()
    print(round(peak_mb(ranks.device) - before))
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiles", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--bounds", type=int, nargs="+", default=[2, 1000])
    arguments = parser.parse_args(argv)
    for trains in (False, True):
        print(f"{'a tower that trains' if trains else 'a frozen tower'}, MB", flush=True)
        print(f"{'tiles':>7}" + "".join(f"{f'bound {bound}':>12}" for bound in arguments.bounds))
        for tiles in arguments.tiles:
            outputs = (run_ranks(1, grow, tiles, bound, trains, timeout=900) for bound in arguments.bounds)
            print(f"{tiles:>7}" + "".join(f"{out[0].splitlines()[-1]:>12}" for out in outputs), flush=True)


if __name__ == "__main__":
    sys.exit(main())
