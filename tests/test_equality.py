"""The same global batch gives the same training, however it is split over ranks and micro-batches."""

import pytest

from tests.same_training import assert_same_training, train
from tests.tiny import read_metrics


@pytest.fixture(scope="module")
def world(same_world):
    return same_world


@pytest.mark.parametrize(
    ("ranks", "accumulation", "flags"),
    [
        (2, 1, ()),
        (4, 1, ()),
        (1, 4, ()),
        (2, 2, ("--gradient_checkpointing", "True")),
        (1, 1, ("--gradient_checkpointing", "True", "--loss_chunk_tokens", "3")),
        (2, 1, ("--dataloader_num_workers", "2")),
        (1, 1, ("--packing", "True", "--max_length", "120")),
        (4, 1, ("--packing", "True", "--max_length", "4096")),
        (2, 1, ("--deterministic", "True", "--packing", "True", "--max_length", "120")),
    ],
)
def test_ranks_accumulation_packing_and_checkpointing_change_nothing(world, ranks, accumulation, flags):
    name = f"run-{ranks}-{accumulation}-{'-'.join(flag.strip('-') for flag in flags)}"
    train(world, name, ranks, accumulation, "data/data.txt", *flags)
    assert_same_training(world, name)


def test_a_rank_without_images_neither_hangs_nor_changes_the_gradients(world):
    """Of 34 records one has an image: in most steps no more than one of four ranks sees one."""
    (world / "data" / "rare.txt").write_text("text.json\ncolour.json 0.001\n")
    train(world, "rare-1", 1, 1, "data/rare.txt")
    train(world, "rare-4", 4, 1, "data/rare.txt")
    assert_same_training(world, "rare-4", "rare-1")


def test_text_alone_trains_when_vision_is_frozen_and_is_refused_when_it_should_train(world):
    frozen = ("--fix_vit", "True", "--fix_sampler", "True")
    for name, accumulation, bf16 in (("text", 1, "False"), ("text-bf16", 2, "True")):
        train(world, name, 2, accumulation, "data/text.json", *frozen, "--bf16", bf16)
        losses = [line["loss"] for line in read_metrics(world / name)]
        assert losses[-1] < losses[0]
    with pytest.raises(AssertionError, match="the vision tower would get no gradient"):
        train(world, "text-vit", 1, 1, "data/text.json")
