"""The step plan: which rank runs which sample of an optimizer step, in which micro-batch.

A plan is `plan[rank][micro_batch]` → indices into the step's samples, int64. Every rank has equally many
micro-batches, because all ranks run their collectives together; one may be empty. A plan decides who computes
what and nothing else: the step trains on the same samples, and its loss is one mean over them.

    deal(num_samples=8, num_ranks=2, samples_per_micro_batch=2)
    → rank 0: [0 1] [4 5]    rank 1: [2 3] [6 7]
    deal(num_samples=3, num_ranks=2, samples_per_micro_batch=2)      # the last step of an epoch
    → rank 0: [0 1]          rank 1: [2]
"""

import numpy as np

Plan = list[list[np.ndarray]]


def deal(num_samples: int, num_ranks: int, samples_per_micro_batch: int) -> Plan:
    """Deals a step's samples in order, evenly, to the fewest micro-batches that every rank has as many of."""
    num_rounds = -(-num_samples // (num_ranks * samples_per_micro_batch))
    parts = np.array_split(np.arange(num_samples), num_rounds * num_ranks)
    return [parts[rank::num_ranks] for rank in range(num_ranks)]
