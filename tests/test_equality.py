"""The same global batch gives the same training, however it is split over ranks and micro-batches.

Every run trains all parts in float32 for ten steps on the same samples; only who computes what changes. A
different order of summation leaves relative differences of about 1e-7 in a gradient. Adam divides by the
gradient's size, which would turn rounding noise where the true gradient is zero into whole steps, so these
runs take an epsilon of 1e-5.
"""

import pytest
from safetensors.torch import load_file

from tests.tiny import read_metrics, run_ranks, tiny_data, tiny_model
from trainer.main import main

GLOBAL_BATCH = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return reference_world(tmp_path_factory.mktemp("equality"))


def reference_world(folder):
    """A tiny model, tiny data, and the run that the others must equal: one rank, one micro-batch."""
    tiny_model(folder / "model")
    tiny_data(folder / "data")
    train(folder, "reference", ranks=1)
    return folder


def train(
    folder, name, ranks, accumulation=1, data="data/data.txt", *flags, batch=GLOBAL_BATCH, run=main, status=0
):
    per_device = batch // ranks // accumulation
    arguments = f"""
        --model_name_or_path {folder}/model --data_path {folder}/{data} --output_dir {folder}/{name}
        --bf16 False --fix_vit False --plora_dropout 0 --gradient_checkpointing False --packing False
        --learning_rate 1e-3 --adam_epsilon 1e-5 --warmup_ratio 0.2 --max_steps 10 --save_strategy no
        --per_device_train_batch_size {per_device} --gradient_accumulation_steps {accumulation}
        --dataloader_num_workers 0
    """
    run_ranks(ranks, run, [*arguments.split(), *flags], status=status)


def assert_same_training(folder, name, reference="reference", weights="model.safetensors"):
    ours, theirs = read_metrics(folder / name), read_metrics(folder / reference)
    assert len(ours) == len(theirs) == 10
    for a, b in zip(ours, theirs, strict=True):
        assert (a["samples"], a["tokens"], a["supervised_tokens"]) == (
            b["samples"],
            b["tokens"],
            b["supervised_tokens"],
        )
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["loss_by_source"] == pytest.approx(b["loss_by_source"], rel=1e-6)
    ours, theirs = (load_file(folder / run / weights) for run in (name, reference))
    assert ours.keys() == theirs.keys()
    for key in ours:
        difference = (ours[key] - theirs[key]).norm() / theirs[key].norm().clamp(min=1e-3)
        assert difference < 1e-6, key


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
    train(world, "text", 2, 1, "data/text.json", *frozen)
    assert read_metrics(world / "text")[-1]["loss"] < read_metrics(world / "text")[0]["loss"]
    train(world, "text-bf16", 2, 2, "data/text.json", *frozen, "--bf16", "True")
    assert read_metrics(world / "text-bf16")[-1]["loss"] < read_metrics(world / "text-bf16")[0]["loss"]
    with pytest.raises(AssertionError, match="the vision tower would get no gradient"):
        train(world, "text-vit", 1, 1, "data/text.json")
