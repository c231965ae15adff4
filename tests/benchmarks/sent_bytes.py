"""Our trainer, with the bytes counted that a rank sends. One process a rank:

    torchrun --nproc_per_node 2 -m tests.benchmarks.sent_bytes bytes.json --model_name_or_path M …

Output: {"bytes": [a step], "calls": [a step]} of rank 0, in bytes.json; the other flags are trainer.main's.
A message counts as it is, and a collective as a ring sends it: in an all-gather or reduce-scatter of n bytes
over W ranks each sends n (W − 1) / W, in an all-reduce twice that. A step reaches from one optimizer step to
the next.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.distributed import leave
from trainer.main import main


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _ring_twice(ranks: int) -> float:
    return 2 * _ring(ranks)


SENDS: dict[str, Callable[[int], float]] = {
    "send": lambda ranks: 1.0,
    "_allgather_base_": _ring,
    "_reduce_scatter_base_": _ring,
    "allreduce_": _ring_twice,
    "all_gather_into_tensor": _ring,
    "reduce_scatter_tensor": _ring,
    "all_reduce": _ring_twice,
}
"""What share of the whole tensor a rank sends: in a message, and in the collectives as a ring sends them."""


class CountSent(TorchDispatchMode):
    """Adds up what this rank sends in messages and collectives."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.bytes, self.calls = ranks, 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.namespace in ("c10d", "_c10d_functional") and name in SENDS:
            given = [args, result] if func.namespace == "_c10d_functional" else [args]
            whole = max(tensor.nbytes for tensor in _tensors(given))
            self.bytes += SENDS[name](self.ranks) * whole
            self.calls += 1
        return result


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def count(output: Path, flags: list[str]) -> int:
    sent, after_steps = CountSent(int(os.environ["WORLD_SIZE"])), [(0.0, 0)]
    register_optimizer_step_post_hook(lambda *_: after_steps.append((sent.bytes, sent.calls)))
    with sent:
        status = main(flags)
    if os.environ["RANK"] == "0":
        steps = list(itertools.pairwise(after_steps))
        result = {"bytes": [b[0] - a[0] for a, b in steps], "calls": [b[1] - a[1] for a, b in steps]}
        output.write_text(json.dumps(result))
    return status


if __name__ == "__main__":
    leave(count(Path(sys.argv[1]), sys.argv[2:]))
