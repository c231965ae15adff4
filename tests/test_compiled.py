"""Compiled blocks train as plain ones do and compile once; where that fails the run ends before a step."""

import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config

from tests.same_training import assert_same_training, train
from tests.tiny import read_metrics
from trainer.main import main
from trainer.optim import ShardedAdamW


@pytest.fixture(scope="module")
def world(same_world):
    return same_world


def main_with_few_graphs(arguments):
    """Every row is cut otherwise; only the first with a single picture, which the ninth step may have, makes
    new code, of a vision block: torch compiles a size of 1 apart from all others."""
    torch._inductor.config.compile_threads = 1  # a pool of processes would outlive a forked rank
    graphs, step = [], ShardedAdamW.step

    def counted(self):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return step(self)

    ShardedAdamW.step = counted
    status = main(arguments)
    assert graphs[0] >= 2, graphs
    assert graphs[5] <= graphs[-1] <= graphs[5] + 1, graphs
    assert graphs[-1] < 24, graphs
    return status


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "accumulation", "flags"),
    [(1, 1, "--packing True --max_length 120"), (2, 2, "--gradient_checkpointing True")],
)
def test_compiled_blocks_make_their_graphs_once_and_train_as_plain_ones_do(world, ranks, accumulation, flags):
    """Ten minutes, for a machine whose cache of compiled code is empty."""
    flags = ["--compile", "True", *flags.split()]
    options = {"run": main_with_few_graphs, "timeout": 600}
    train(world, f"compiled-{ranks}", ranks, accumulation, "data/data.txt", *flags, **options)
    assert_same_training(world, f"compiled-{ranks}")


def main_without_a_compiler(arguments):
    torch._inductor.config.cpp.cxx = ("/nowhere/c++",)
    torch._inductor.config.force_disable_caches = True
    return main(arguments)


@pytest.mark.slow
def test_a_block_that_cannot_be_compiled_ends_the_run_before_its_first_step(world):
    flags = ("--compile", "True")
    with pytest.raises(AssertionError, match=r"statuses \[1, 1\]") as failure:
        train(world, "not-compiled", 2, 1, "data/data.txt", *flags, run=main_without_a_compiler)
    assert "/nowhere/c++" in str(failure.value)
    assert not read_metrics(world / "not-compiled")
