"""A run refuses, before its first step, a model that would not train as its own class computes: every check
sees something that is really broken, and none changes the training."""

import re
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from data.loader import SampleReader
from data.mixture import read_mixture
from tests.data_fixtures import SquareProcessor, encoder, record, write_json
from tests.tiny import flags, read_metrics, run_ranks, tiny_data, tiny_world
from tests.tiny_models import tiny_folder
from tests.vlm_cases import LONG
from trainer.check_model import shortest_samples
from trainer.main import main
from trainer.models.generic import model_parts, modeling
from trainer.models.generic.packed_attention import ATTENTION
from trainer.models.generic.pictures import Pictures
from trainer.models.xcomposer2.image_processing_xcomposer2 import HDImageProcessor, SquareImageProcessor
from trainer.rehearsal import all_sizes

FAMILIES = ("qwen2_5_vl", "qwen3_5", "llava_onevision", "gemma3", "glm4v", "paligemma", "internvl")
FAMILIES += ("idefics3", "gemma2", "gpt_oss", "lfm2", "cohere", "llama_dynamic")


def world_of(family, folder, **changes):
    if family == "xcomposer2":
        return tiny_world(folder, **changes)
    tiny_folder(family, folder / "model", **changes)
    tiny_data(folder / "data")
    return folder


def options_of(world, **changes):
    """A training of one step, with vision if the model has it."""
    if "vision_config" in (world / "model" / "config.json").read_text():
        options = {"fix_vit": False, "fix_sampler": False}
    else:
        options = {"data_path": world / "data" / "text.json"}
    return options | {"max_steps": 1, "rehearse": False, "check_model": True} | changes


def refusal(world, breaks, ranks=1, **changes):
    """The sentence with which a run refuses a model after `breaks()`, with status 2 on every rank."""

    def broken(argv):
        breaks()
        return main(argv)

    argv = flags(world, "refused", **options_of(world, **changes))
    output = run_ranks(ranks, broken, argv, status=2)[0]
    assert not (world / "refused" / "metrics.jsonl").exists()
    (sentence,) = re.findall(r"error: --check_model: (.*); nothing was trained", output)
    return sentence


def measured(world, ranks=1, **changes):
    """What the checks of a run measured, by name."""
    name = f"run-{len(list(world.iterdir()))}"
    output = run_ranks(ranks, main, flags(world, name, **options_of(world, **changes)))[0]
    assert read_metrics(world / name)
    (line,) = re.findall(r"model checked: (.*)", output)
    return {name: float(value) for name, value in (item.split() for item in line.split(", "))}


# --- what is broken ---------------------------------------------------------------------------------------


def masks_of_the_whole_row():
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def heads_without_their_scale():
    modeling.is_plain = lambda model, own_class: True


def sizes_of_wider_pictures():
    Pictures.size = lambda self, image: (2 * image.width, image.height)


def a_slot_less():
    SquareImageProcessor.num_tokens = lambda self, width, height: 24


def unused_layers_that_train():
    model_parts._unused = lambda *_: ()


def frequencies_of_the_longest_sample():
    modeling.rotate_by_sample = lambda rotary: None


def test_a_mask_that_leaks_between_samples_is_refused_by_all_ranks_and_its_module_named(tmp_path):
    sentence = refusal(world_of("qwen2_5_vl", tmp_path), masks_of_the_whole_row, ranks=2)
    assert sentence.startswith("leak: model.language_model.layers.0.self_attn: other words in one sample")


def test_a_head_that_the_class_scales_and_training_does_not_is_refused(tmp_path):
    sentence = refusal(world_of("granite", tmp_path), heads_without_their_scale)
    assert sentence.startswith("logits: lm_head: the logits of training differ by ")
    assert "GraniteForCausalLM's own forward" in sentence


@pytest.mark.parametrize(
    ("family", "breaks"), [("qwen2_5_vl", sizes_of_wider_pictures), ("xcomposer2", a_slot_less)]
)
def test_a_picture_with_other_tokens_by_its_size_than_by_its_pixels_is_refused(family, breaks, tmp_path):
    sentence = refusal(world_of(family, tmp_path), breaks, max_length=1024)
    assert sentence.startswith("tokens: ")
    assert "both.json: record 0 (id 'both-0'): the tokens of its pictures do not fit" in sentence


def test_slots_that_the_features_do_not_fit_are_refused(tmp_path):
    """The processor is consistent in itself, and belongs to another model."""
    world = world_of("xcomposer2", tmp_path)

    def other_patches():
        SquareImageProcessor.num_tokens = lambda self, width, height: 16
        SquareImageProcessor.check = lambda self, image: None

    assert "im_mask has 32 image slots, but the images give 50 features" in refusal(world, other_patches)


def test_a_parameter_that_trains_without_a_gradient_is_refused_and_named(tmp_path):
    sentence = refusal(world_of("llava", tmp_path), unused_layers_that_train)
    assert sentence.startswith("gradients: ")
    assert "set to train but got no gradient in a backward pass, first model.vision_tower." in sentence


def test_losses_that_depend_on_the_rest_of_the_row_are_refused(tmp_path):
    rope = LONG | {"original_max_position_embeddings": 60}
    world = world_of("llama_longrope", tmp_path, rope_parameters=rope)
    weights = load_file(world / "model" / "model.safetensors")
    larger = {name: value * (10 if value.ndim == 2 else 1) for name, value in weights.items()}
    save_file(larger, world / "model" / "model.safetensors", metadata={"format": "pt"})
    records = [record("Hi.", "A cat."), record("How many? " * 30, "Two dogs.")]
    write_json(world / "data" / "text.json", records)
    sentence = refusal(world, frequencies_of_the_longest_sample, per_device_train_batch_size=2)
    assert sentence.startswith("packed: the losses of LlamaForCausalLM differ by")
    assert measured(world, per_device_train_batch_size=2)["packed"] < 1e-5


# --- what is in order -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["xcomposer2", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)]
)
def test_families_pass_with_small_differences(family, tmp_path):
    world = world_of(family, tmp_path)
    for options in ({}, {"packing": False, "per_device_train_batch_size": 2}):
        found = measured(world, **options)
        assert found["tokens"] == found["gradients"] == 0
        assert found["leak"] <= (1e-5 if family == "gpt_oss" else 0)
        assert max(found["logits"], found["packed"]) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"use_lora": True, "fix_vit": True, "sharding": "none", "bf16": True},
        {"sharding": "hybrid", "gradient_accumulation_steps": 2},
        pytest.param({"use_lora": True, "fix_vit": True, "packing": False}, marks=pytest.mark.slow),
        pytest.param({"bf16": True, "fix_vit": True}, marks=pytest.mark.slow),
        pytest.param({"fix_vit": True, "shard_frozen_vision": False}, marks=pytest.mark.slow),
    ],
)
def test_ways_to_train_pass(options, tmp_path):
    assert measured(world_of("xcomposer2", tmp_path), ranks=2, **options).keys() >= {"leak", "gradients"}


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_is_the_same_bit_for_bit_with_and_without_the_checks(lora, tmp_path):
    world = world_of("xcomposer2", tmp_path)
    options = {"max_steps": 3, "plora_dropout": 0.2, "per_device_train_batch_size": 2, "bf16": lora}
    options |= {"use_lora": True, "lora_dropout": 0.2, "lora_r": 4, "fix_vit": True} if lora else {}
    for name, checked in (("with", True), ("without", False)):
        run_ranks(2, main, flags(world, name, **options_of(world, **options, check_model=checked)))
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (world / "with" / file).read_bytes() == (world / "without" / file).read_bytes()
    ours, theirs = (read_metrics(world / name) for name in ("with", "without"))
    assert [(line["loss"], line["grad_norm"]) for line in ours] == [
        (line["loss"], line["grad_norm"]) for line in theirs
    ]
    assert load_file(world / "with" / file)


def test_the_shortest_readable_samples_with_and_without_a_picture_are_checked(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    long, short = "5 " * 9, "5"
    records = [
        record(long, "31"),
        record(short, "31", images=["broken.png"]),
        record(long, "31", images=["a.png"]),
        record(short, "31"),
        record(long + long, "31", images=["a.png"]),
    ]

    def chosen(*numbers):
        sources = read_mixture(write_json(tmp_path / "a.json", [records[number] for number in numbers]))
        reader = SampleReader(sources, encoder(1000), cast(Any, SquareProcessor()))
        samples = shortest_samples(reader, all_sizes(reader, None))
        return samples and [numbers[index] for _, index in samples]

    assert chosen(0, 1, 2, 3, 4) == [2, 3]
    assert chosen(0, 3) == [3, 0]
    assert chosen(4, 2) == [2, 4]
    assert chosen(1, 0) == [0, 0]
    assert chosen(1) is None


@pytest.mark.parametrize("size", [(300, 120), (120, 300), (64, 64)])
def test_a_high_resolution_picture_has_the_tokens_of_its_pixels(size, monkeypatch):
    processor = HDImageProcessor(tile=56, patch_size=14, hd_num=9, max_upscale=1.5)
    image = Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8))
    processor.check(image)
    monkeypatch.setattr(HDImageProcessor, "size", lambda self, image: (5 * image.width, image.height))
    with pytest.raises(ValueError, match="tokens by its size, but"):
        processor.check(image)
