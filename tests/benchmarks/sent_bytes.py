"""Our trainer, with the bytes counted that a rank sends in its collectives. One process a rank:

    torchrun --nproc_per_node 2 -m tests.benchmarks.sent_bytes bytes.json --model_name_or_path M …

Output: {"bytes": [a step], "calls": [a step]} of rank 0, in bytes.json; the other flags are trainer.main's.
A collective counts as a ring sends it: in an all-gather or reduce-scatter of n bytes over W ranks each sends
n (W − 1) / W, in an all-reduce twice that. A step reaches from one optimizer step to the next.
"""

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.distributed import leave
from trainer.main import main

PASSES = {
    "_allgather_base_": 1,
    "_reduce_scatter_base_": 1,
    "allreduce_": 2,
    "all_gather_into_tensor": 1,
    "reduce_scatter_tensor": 1,
    "all_reduce": 2,
}
"""How often a ring sends the whole tensor, in W parts."""


class CountSent(TorchDispatchMode):
    """Adds up what every collective of this rank sends."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.bytes, self.calls = ranks, 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.namespace in ("c10d", "_c10d_functional") and name in PASSES:
            given = [args, result] if func.namespace == "_c10d_functional" else [args]
            whole = max(tensor.nbytes for tensor in _tensors(given))
            self.bytes += PASSES[name] * whole * (self.ranks - 1) / self.ranks
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
