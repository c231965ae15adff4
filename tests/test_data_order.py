"""The order of training: the declared mixture, coverage; ranks, workers and stops do not matter."""

import random
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import SampleReader, StepLoader
from data.packing import deal
from data.sampler import StepSampler, draw, epoch_order
from tests.data_fixtures import SquareProcessor, encoder, fake_sources, numbered_mixture

SIZES = [
    [(7, 7)],
    [(5, 2), (3, 11)],
    [(13, 5), (4, 4), (1, 3)],
    [(9, 10), (2, 1), (6, 5), (11, 23)],
]


@settings(deadline=None, max_examples=150)
@given(num_records=st.integers(1, 12), num_samples=st.integers(1, 30), seed=st.integers(0, 5))
def test_a_source_uses_no_record_twice_before_every_record_once(num_records, num_samples, seed):
    used = np.zeros(num_records, dtype=int)
    for epoch in range(15):
        drawn = np.bincount(draw(num_records, num_samples, (seed, 0), epoch), minlength=num_records)
        assert drawn.sum() == num_samples
        assert drawn.max() - drawn.min() <= 1, "an epoch draws without replacement"
        used += drawn
        assert used.max() - used.min() <= 1, "coverage over epochs"


def test_every_epoch_draws_afresh():
    subsets = {tuple(sorted(draw(12, 4, (0, 0), epoch))) for epoch in range(30)}
    assert len(subsets) > 20
    assert not np.array_equal(
        epoch_order(fake_sources([(9, 9)]), 0, 0), epoch_order(fake_sources([(9, 9)]), 0, 1)
    )
    assert not np.array_equal(
        epoch_order(fake_sources([(9, 9)]), 0, 0), epoch_order(fake_sources([(9, 9)]), 1, 0)
    )


def test_draws_are_uniform():
    counts = np.zeros((8, 8))
    for seed in range(400):
        first, second = draw(8, 2, (seed, 0), 3)
        counts[first, second] += 1
    assert counts.diagonal().sum() == 0
    uses = counts.sum(axis=0) + counts.sum(axis=1)
    assert abs(uses - 100).max() < 40, "some records come more often than others"


def test_sources_are_interleaved():
    order = epoch_order(fake_sources([(1000, 1000), (1000, 1000)]), 0, 0)
    halves = [np.mean(order[begin : begin + 500, 0]) for begin in range(0, 2000, 500)]
    assert all(0.4 < share < 0.6 for share in halves)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_ranks_together_train_on_the_declared_multiset(sizes, num_ranks):
    sources = fake_sources(sizes)
    sampler = StepSampler(sources, seed=3, global_batch=4 * num_ranks)
    for epoch in range(3):
        seen: Counter[tuple[int, int]] = Counter()
        for step in range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch):
            samples = sampler.samples(step)
            plan = deal(len(samples), num_ranks, 2)
            assert len({len(parts) for parts in plan}) == 1, "ranks differ in their number of micro-batches"
            dealt = [index for parts in plan for part in parts for index in part]
            assert sorted(dealt) == list(range(len(samples)))
            assert all(len(part) <= 2 for parts in plan for part in parts)
            seen.update(map(tuple, samples.tolist()))
        for number, (num_records, num_samples) in enumerate(sizes):
            uses = [seen[number, index] for index in range(num_records)]
            assert sum(uses) == num_samples
            assert set(uses) <= {num_samples // num_records, num_samples // num_records + 1}


def test_a_step_is_a_function_of_its_number_alone():
    sources = fake_sources(SIZES[2])
    forward = StepSampler(sources, seed=1, global_batch=5)
    steps = [forward.samples(step).tolist() for step in range(12)]
    for step in (11, 0, 7, 3):
        assert StepSampler(sources, seed=1, global_batch=5).samples(step).tolist() == steps[step]
    assert [len(step) for step in steps[: forward.steps_per_epoch]] == [5, 5, 2], "no step spans two epochs"


def test_a_full_step_is_dealt_in_order():
    plan = deal(num_samples=8, num_ranks=2, samples_per_micro_batch=2)
    assert [[part.tolist() for part in parts] for parts in plan] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("sizes", SIZES)
def test_workers_and_stops_change_nothing(tmp_path, sizes, num_workers):
    """Ranks × workers × stops: the planned samples reach the model, in the planned order."""
    sources = numbered_mixture(tmp_path, sizes)
    reader = SampleReader(sources, encoder(), SquareProcessor())
    num_ranks = {0: (1, 2, 3, 4), 1: (2,), 3: (3,)}[num_workers]
    for ranks in num_ranks:
        sampler = StepSampler(sources, seed=0, global_batch=2 * ranks)
        last = min(2 * sampler.steps_per_epoch, 8)
        expected = [sampler.samples(step).tolist() for step in range(last)]
        stop = random.Random(ranks).randrange(last + 1)
        runs = []
        for rank in range(ranks):
            steps = []
            for first, end in ((0, stop), (stop, last)):
                loader = StepLoader(
                    reader,
                    sampler,
                    rank=rank,
                    num_ranks=ranks,
                    samples_per_micro_batch=1,
                    first_step=first,
                    num_steps=end,
                    num_workers=num_workers,
                )
                steps += list(loader)
            runs.append(steps)
        for step, samples in enumerate(expected):
            rounds = zip(*(run[step] for run in runs), strict=True)
            batches = [batch for parts in rounds for batch in parts]
            assert [list(place) for batch in batches for place in batch.sample_ids] == samples
            rows = [row for batch in batches for row in batch.inputs["labels"].tolist()]
            answers = [f"1{source}{index:03}" for source, index in samples]
            assert [str(label) for row in rows for label in row if 9999 < label < 92000] == answers


def test_a_late_epoch_of_a_million_records_costs_a_few_shuffles_of_them():
    """About six: not one for every epoch before it, and no loop over records."""
    sources = fake_sources([(1_000_000, 400_000), (1_000_000, 999_000)])
    epoch_order(sources, 0, 0)
    started = time.process_time()
    np.random.default_rng(0).permutation(1_400_000)
    shuffled = time.process_time()
    epoch_order(sources, 0, 1234)
    assert time.process_time() - shuffled < 30 * (shuffled - started)
