"""The samples of each optimizer step: a pure function of (sources, seed, step).

    sampler = StepSampler(sources, seed=0, global_batch=64)
    sampler.steps_per_epoch          # ceil(samples per epoch / 64)
    sampler.samples(step=0)          # [64, 2] int64: (source, record) of each sample

Ranks, workers and earlier runs do not matter, so that resuming needs only the step's number. A step never
spans two epochs: the last step of an epoch may be smaller.

How a source of n records gives k samples per epoch, so that no record is used twice before every one is used:
- k ≤ n/2: the epochs cut a stream of shuffled passes over the records into pieces of k. With n = 5 and k = 2:
  passes (3 0 4 1 2) (0 3 1 4 2) … give the pieces 3 0 | 4 1 | 2 0 | 3 1 | 4 2. If a piece spans two passes
  (2 0), a swap keeps the last records of the first pass out of the piece's second half.
- n/2 < k ≤ n: the n − k records left out are drawn in that way, and the rest is used.
- k > n: every record ⌊k/n⌋ times, and k mod n of them once more, drawn as above.
So the uses of any two records of a source differ by at most one at the end of every epoch.
"""

from collections.abc import Sequence

import numpy as np

from data.mixture import Source

PASS, SHUFFLE = 0, 1
"""The purpose of a random state, which is included in its seed."""


def epoch_order(sources: Sequence[Source], seed: int, epoch: int) -> np.ndarray:
    """The samples of an epoch (from 0) in training order: [samples, 2] int64, (source, record)."""
    drawn = [
        np.stack([np.full(source.num_samples, number), records], axis=1)
        for number, source in enumerate(sources)
        for records in [draw(len(source.records), source.num_samples, (seed, number), epoch)]
    ]
    order = np.concatenate(drawn)
    return order[_random((seed, SHUFFLE, epoch)).permutation(len(order))]


def draw(num_records: int, num_samples: int, seed: tuple[int, ...], epoch: int) -> np.ndarray:
    """The records of a source that an epoch uses: int64 [num_samples], not shuffled."""
    num_times, num_rest = divmod(num_samples, num_records)
    every = np.tile(np.arange(num_records), num_times)
    if num_rest > num_records // 2:
        kept = np.ones(num_records, dtype=bool)
        kept[_piece(num_records, num_records - num_rest, seed, epoch)] = False
        return np.concatenate([every, np.flatnonzero(kept)])
    return np.concatenate([every, _piece(num_records, num_rest, seed, epoch)])


def _piece(n: int, k: int, seed: tuple[int, ...], epoch: int) -> np.ndarray:
    """Entries [epoch·k, (epoch + 1)·k) of the stream of passes over n records, for k ≤ n/2."""
    number, start = divmod(epoch * k, n)
    piece = _pass(n, k, seed, number)[start : start + k]
    if len(piece) < k:
        piece = np.concatenate([piece, _pass(n, k, seed, number + 1)[: k - len(piece)]])
    return piece


def _pass(n: int, k: int, seed: tuple[int, ...], number: int) -> np.ndarray:
    """A pass over n records whose head has no record that its epoch also takes from the pass before.

    Only entries of the head and the k entries after it are swapped; they never reach this pass's own tail
    (k ≤ n/2), so that a pass depends only on the one before it, not on all earlier ones.
    """
    order = _random((*seed, PASS, number)).permutation(n)
    num_tail = (number * n) % k if k else 0  # entries that the spanning epoch takes from the pass before
    if number == 0 or num_tail == 0:
        return order
    in_tail = np.zeros(n, dtype=bool)
    in_tail[_random((*seed, PASS, number - 1)).permutation(n)[n - num_tail :]] = True
    num_head = k - num_tail
    clashes = np.flatnonzero(in_tail[order[:num_head]])
    free = num_head + np.flatnonzero(~in_tail[order[num_head : num_head + k]])[: len(clashes)]
    order[clashes], order[free] = order[free], order[clashes]
    return order


def _random(seed: tuple[int, ...]) -> np.random.RandomState:
    # The legacy generator, because numpy guarantees its numbers across versions and resuming needs that.
    return np.random.RandomState([number % 2**32 for number in seed])


class StepSampler:
    """The samples of each optimizer step. Caches the order of one epoch, 16 bytes per sample."""

    def __init__(self, sources: Sequence[Source], seed: int, global_batch: int):
        self.samples_per_epoch = sum(source.num_samples for source in sources)
        self.steps_per_epoch = -(-self.samples_per_epoch // global_batch)
        self.sources, self._seed, self._global_batch = list(sources), seed, global_batch
        self._cached = -1, np.empty((0, 2), dtype=np.int64)  # one attribute, as threads share it

    def samples(self, step: int) -> np.ndarray:
        """(source, record) of every sample of a step (from 0): [≤ global batch, 2] int64."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        cached, order = self._cached
        if epoch != cached:
            order = epoch_order(self.sources, self._seed, epoch)
            self._cached = epoch, order
        start = step_of_epoch * self._global_batch
        return order[start : start + self._global_batch]
