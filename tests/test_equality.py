"""The same global batch gives the same training, however it is split over ranks and micro-batches."""

import pytest

from data.batch import MicroBatch
from tests.same_training import assert_same_training, train
from tests.tiny import read_metrics
from trainer.main import main


@pytest.fixture(scope="module")
def world(same_world):
    return same_world


@pytest.mark.parametrize(
    ("ranks", "accumulation", "flags"),
    [
        (2, 1, ()),
        pytest.param(4, 1, (), marks=pytest.mark.slow),
        (1, 4, ()),
        (2, 2, ("--gradient_checkpointing", "True")),
        (1, 1, ("--gradient_checkpointing", "True", "--loss_chunk_tokens", "3")),
        (2, 1, ("--dataloader_num_workers", "2")),
        (1, 1, ("--packing", "True", "--max_length", "120")),
        (4, 1, ("--packing", "True", "--max_length", "4096")),
        (2, 1, ("--deterministic", "True", "--packing", "True", "--max_length", "120")),
        (3, None, ("--global_batch_size", "4")),  # 1, 1 and 1 of them, then 1 and two empty micro-batches
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


def main_without_dummy_images(argv):
    """The run, in which a micro-batch has images only where it has slots for them."""
    move = MicroBatch.to

    def checked(self, device):
        assert ("pixel_values" in self.inputs) == bool(self.inputs["im_mask"].any())
        return move(self, device)

    MicroBatch.to = checked
    return main(argv)


@pytest.mark.parametrize(
    ("name", "whole", "weights"),
    [
        ("full", ("--shard_frozen_vision", "False"), "model.safetensors"),
        ("accumulated", ("--shard_frozen_vision", "False", "--sharding", "hybrid"), "model.safetensors"),
        ("lora", ("--shard_frozen_vision", "False"), "adapter_model.safetensors"),
        ("lora-none", ("--sharding", "none"), "adapter_model.safetensors"),
    ],
)
def test_a_frozen_tower_that_is_whole_needs_no_image_on_every_rank(world, name, whole, weights):
    """Of 34 records one has an image, in one batch of the ten; the projector trains."""
    (world / "data" / "rare.txt").write_text("text.json\ncolour.json 0.001\n")
    lora = ("--use_lora", "--lora_r", "4", "--lora_dropout", "0") if "lora" in name else ()
    frozen = ("--fix_vit", "True", *lora)
    reference = f"frozen-{weights}"
    if not (world / reference).exists():
        train(world, reference, 1, 1, "data/rare.txt", *frozen)
    accumulation = 2 if name == "accumulated" else 1
    flags, run = (*frozen, *whole), main_without_dummy_images
    train(world, f"whole-{name}", 2, accumulation, "data/rare.txt", *flags, run=run)
    assert_same_training(world, f"whole-{name}", reference, weights)


def test_a_tower_that_trains_is_not_kept_whole(world):
    for more, said in (
        (("--train_modules", "vit.vision_tower"), "take its layers out of --lora_target_modules"),
        (("--bf16", "True"), "does not store the vision tower in bfloat16"),
    ):
        flags = ("--fix_vit", "True", "--shard_frozen_vision", "False", *more)
        with pytest.raises(AssertionError, match=said) as refused:
            train(world, "refused", 1, 1, "data/data.txt", *flags)
        assert "statuses [2]" in str(refused.value)


def test_text_alone_trains_when_vision_is_frozen_and_is_refused_when_it_should_train(world):
    frozen = ("--fix_vit", "True", "--fix_sampler", "True")
    for name, accumulation, bf16 in (("text", 1, "False"), ("text-bf16", 2, "True")):
        train(world, name, 2, accumulation, "data/text.json", *frozen, "--bf16", bf16)
        losses = [line["loss"] for line in read_metrics(world / name)]
        assert losses[-1] < losses[0]
    with pytest.raises(AssertionError, match="the vision tower would get no gradient"):
        train(world, "text-vit", 1, 1, "data/text.json")
