"""The plan of an optimizer step: which rank computes which samples, in which micro-batch.

A plan is `plan[rank][micro_batch]` → indices into the step's samples, int64. Every rank has the same number
of micro-batches, because all ranks run their collectives together; a micro-batch may be empty. A plan changes
only where samples are computed: the step trains on the same samples, and its loss is one mean over them.

    deal(num_samples=8, num_ranks=2, samples_per_micro_batch=2)
    → rank 0: [0 1] [4 5]    rank 1: [2 3] [6 7]
    deal(num_samples=3, num_ranks=2, samples_per_micro_batch=2)      # the last step of an epoch
    → rank 0: [0 1]          rank 1: [2]

Packed, a micro-batch is one row of whole samples, at most max_tokens long, without padding. Ranks wait for
each other in every micro-batch, so the rows of one round should cost the same:

    pack(tokens=[90, 10, 50, 40, 60], costs=[90, 10, 50, 40, 60], num_ranks=2, max_tokens=100)
    → rank 0: [0] [2]        rank 1: [4] [1 3]       # 90 beside 60, then 50 beside 50
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace

import numpy as np

Plan = list[list[np.ndarray]]


def deal(num_samples: int, num_ranks: int, samples_per_micro_batch: int) -> Plan:
    """Deals a step's samples in order and evenly into the fewest micro-batches, equally many per rank."""
    num_rounds = -(-num_samples // (num_ranks * samples_per_micro_batch))
    micro_batches = np.array_split(np.arange(num_samples), num_rounds * num_ranks)
    return [micro_batches[rank::num_ranks] for rank in range(num_ranks)]


def pack(tokens: np.ndarray, costs: np.ndarray, num_ranks: int, max_tokens: int) -> Plan:
    """Packs a step's samples into the fewest rounds of rows, balanced by cost, the costliest round first.

    The same arguments give the same plan on every rank and machine.

    Args: tokens: int [N], none over max_tokens; costs: float [N], in any unit.
    """
    assert tokens.max(initial=0) <= max_tokens
    num_rounds = max(1, -(-int(tokens.sum()) // (num_ranks * max_tokens)))
    while (packed := _fill_rows(tokens, costs, num_rounds * num_ranks, max_tokens)) is None:
        num_rounds += 1
    rows, row_costs = packed
    by_cost = [np.array(sorted(rows[row]), dtype=np.int64) for row in np.argsort(-row_costs, kind="stable")]
    return [by_cost[rank::num_ranks] for rank in range(num_ranks)]


def _fill_rows(
    tokens: np.ndarray, costs: np.ndarray, num_rows: int, max_tokens: int
) -> tuple[list[list[int]], np.ndarray] | None:
    """Adds each sample, costliest first, to the cheapest row with room; None if no row has room."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    room = [max_tokens] * num_rows
    cheapest = [(0.0, row) for row in range(num_rows)]  # a heap of all rows; of equal costs, the first row
    sizes, prices = tokens.tolist(), costs.tolist()
    for sample in np.argsort(-costs, kind="stable").tolist():
        too_full = []
        while cheapest and room[cheapest[0][1]] < sizes[sample]:
            too_full.append(heappop(cheapest))
        if not cheapest:
            return None
        cost, row = cheapest[0]
        heapreplace(cheapest, (cost + prices[sample], row))
        rows[row].append(sample)
        room[row] -= sizes[sample]
        for entry in too_full:
            heappush(cheapest, entry)
    return rows, np.array([cost for cost, _ in sorted(cheapest, key=lambda entry: entry[1])])


def idle_share(plan: Plan, costs: np.ndarray) -> float:
    """Fraction of all ranks' time spent waiting for the slowest rank of each round."""
    loads = np.array([[float(costs[row].sum()) for row in rank] for rank in plan])  # [ranks, rounds]
    return 1 - float(loads.sum() / (loads.max(axis=0).sum() * len(plan))) if loads.any() else 0.0


@dataclass(frozen=True)
class CostModel:
    """The cost of a sample; one text token's pass through the language model costs 1, without attention.

    The defaults are those of a 7B model with square images; `from_sizes` computes them for any model.
    """

    image_slot: float = 0.05
    """Cost of one image slot in the vision tower."""
    token_pair: float = 1.9e-5
    """Cost of the attention between two tokens of a sample."""

    @classmethod
    def from_sizes(
        cls,
        *,
        language: tuple[int, int, int],
        vision: tuple[int, int, int],
        kv_share: float,
        patches_per_image: int,
        patches_per_slot: int,
        trains_vision: bool,
    ) -> "CostModel":
        """Counts multiplications per token from the sizes in a model's configuration.

        Args:
            language, vision: (hidden size, intermediate size, layers).
            kv_share: key-value heads / heads.
            patches_per_image: patches of an image or tile, which attend to each other in the vision tower.
            patches_per_slot: 1, or 4 if 2 × 2 patches are merged.
            trains_vision: False for a frozen tower, which runs only forward: a third of the work.
        """
        hidden, intermediate, layers = language
        per_token = layers * (hidden * hidden * (2 + 2 * kv_share) + 3 * hidden * intermediate)
        per_pair = layers * hidden  # scores and values, half of them behind the causal mask
        hidden, intermediate, layers = vision
        per_patch = layers * (
            4 * hidden * hidden + 2 * hidden * intermediate + 2 * hidden * patches_per_image
        )
        share = 1.0 if trains_vision else 1 / 3
        return cls(share * per_patch * patches_per_slot / per_token, per_pair / per_token)

    def __call__(self, tokens: np.ndarray, image_slots: np.ndarray) -> np.ndarray:
        """The cost of each sample, float64 [N]; both arguments int [N]."""
        return tokens + self.image_slot * image_slots + self.token_pair * tokens.astype(np.float64) ** 2


@dataclass(frozen=True)
class Packing:
    """Computes the plans of packed steps from the samples' lengths (`data.lengths`)."""

    lengths: Sequence[np.ndarray]
    """int32 [records, 3 or more] for each source: tokens, image slots, supervised tokens."""
    max_tokens: int
    """Most tokens of a row."""
    cost: CostModel = CostModel()

    def plan(self, samples: np.ndarray, num_ranks: int) -> tuple[Plan, np.ndarray]:
        """The plan of a step's samples, [N, 2] (source, record), and their costs."""
        tokens, costs = self.measure(samples)
        return pack(tokens, costs, num_ranks, self.max_tokens), costs

    def measure(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and costs of samples; both are 0 for samples that will be left out."""
        tokens, image_slots, _ = self.sizes(samples).T
        return tokens, self.cost(tokens, image_slots)

    def sizes(self, samples: np.ndarray) -> np.ndarray:
        """int64 [N, 3]: tokens, image slots, supervised tokens; all 0 for samples that will be left out."""
        rows = np.zeros((len(samples), 3), dtype=np.int64)
        for source in np.unique(samples[:, 0]):
            mine = samples[:, 0] == source
            rows[mine] = self.lengths[source][samples[mine, 1], :3]
        assert rows.min() >= -1, "a sample of this step was never measured"
        return np.where(rows[:, 2:3] > 0, rows, 0)
