"""Our trainer, with the bytes counted that a rank sends, and those of its tensors. One process a rank:

    torchrun --nproc_per_node 2 -m tests.benchmarks.sent_bytes bytes.json --model_name_or_path M …

Output: {"bytes": [a step], "calls": [a step], "tensors": …} of rank 0, in bytes.json; the other flags are
trainer.main's. A message counts as it is, and a collective as a ring sends it: in an all-gather or
reduce-scatter of n bytes over W ranks each sends n (W − 1) / W, in an all-reduce twice that. A step reaches
from one optimizer step to the next. "tensors" is the most bytes of all tensors' storages until the last
optimizer step (`trainer.forecast.fake_step.Count`). RANKS_PER_NODE, if set, stands for torchrun's
LOCAL_WORLD_SIZE, so that the ranks of one machine train as several nodes do.
"""

import itertools
import json
import os
import sys
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

from trainer.forecast.fake_step import Count
from trainer.job import leave
from trainer.main import main


def count(output: Path, flags: list[str]) -> int:
    os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("RANKS_PER_NODE", os.environ["LOCAL_WORLD_SIZE"])
    counted, after_steps = Count(int(os.environ["LOCAL_WORLD_SIZE"])), [(0.0, 0, 0)]

    def note(*_: object) -> None:
        sent = counted.sent.values()
        totals = sum(each.within + each.between for each in sent), sum(each.number for each in sent)
        after_steps.append((*totals, counted.largest))

    register_optimizer_step_post_hook(note)
    with counted:
        status = main(flags)
    if os.environ["RANK"] == "0":
        steps = list(itertools.pairwise(after_steps))
        result = {"bytes": [b[0] - a[0] for a, b in steps], "calls": [b[1] - a[1] for a, b in steps]}
        output.write_text(json.dumps({**result, "tensors": after_steps[-1][2]}))
    return status


if __name__ == "__main__":
    leave(count(Path(sys.argv[1]), sys.argv[2:]))
