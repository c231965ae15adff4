"""How long a block's parameters and gradients travel between CPUs: trainer/extras/gloo.py and gloo's own.

    python -m tests.benchmarks.gloo --ranks 2

Output: for each size, milliseconds of our gather and reduce-scatter and of gloo's (medians of turns taken one
after the other, of the slowest rank), and their ratio. Sizes are of whole tensors: about a block of the other
benchmarks' models, and 16 million numbers. Gathers in bfloat16 and float32, sums in float32, as in training.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from tests.tiny import run_ranks
from trainer.distributed import all_max, start
from trainer.extras.gloo import GlooAllGather, GlooReduceScatter

SIZES = (3_000_000, 6_000_000, 16_000_000)
TURNS = 9


def medians(ways: list[Callable[[], object]], device: torch.device) -> list[float]:
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(TURNS + 1):
        for way, taken in zip(ways, seconds, strict=True):
            dist.barrier()
            started = time.perf_counter()
            way()
            taken.append(all_max(time.perf_counter() - started, device))
    return [statistics.median(taken[1:]) for taken in seconds]


def measure() -> None:
    ranks = start()
    group, gather, reduce_scatter = dist.group.WORLD, GlooAllGather(), GlooReduceScatter()
    for size in SIZES:
        size -= size % ranks.world
        empty = partial(torch.empty, size // ranks.world)
        for dtype in (torch.bfloat16, torch.float32):
            whole = torch.ones(size, dtype=dtype)
            own = whole.chunk(ranks.world)[ranks.rank]
            pairs = {
                "gather": [
                    lambda whole=whole, own=own: gather(whole, own, group),
                    lambda whole=whole, own=own: dist.all_gather_single(whole, own),
                ]
            }
            if dtype == torch.float32:
                pairs["reduce-scatter"] = [
                    lambda whole=whole, empty=empty: reduce_scatter(empty(), whole, group, dist.ReduceOp.SUM),
                    lambda whole=whole, empty=empty: dist.reduce_scatter_single(empty(), whole),
                ]
            for name, ways in pairs.items():
                ours, gloo = medians(ways, ranks.device)
                if ranks.rank == 0:
                    what = f"{size / 1e6:4.0f} M {str(dtype).removeprefix('torch.'):<9} {name:<14}"
                    print(
                        f"{what} ours {ours * 1e3:6.1f} ms, gloo's {gloo * 1e3:6.1f} ms: {gloo / ours:.2f} ×"
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    print(run_ranks(parser.parse_args().ranks, measure)[0], end="")


if __name__ == "__main__":
    main()
