"""The counted operations are those that torch itself counts, to the last one.

torch's counter sees what runs: padding, masked rows and a fused kernel's second look at its scores too. So
rows here have no padding, backward passes take written-out attention, and the loss is the model's own.
"""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from data.batch import MicroBatch, collate
from data.tokens import IGNORED, Encoded
from tests.data_fixtures import pixel_values
from tests.model_cases import FAMILIES, golden
from tests.tiny import flags, read_metrics, run_ranks, tiny_world
from trainer.distributed import finish, start
from trainer.extras.flops import matmul_peak
from trainer.lora import inject
from trainer.main import main
from trainer.models.xcomposer2.flops import count_flops
from trainer.models.xcomposer2.modeling_xcomposer2 import InternLMXComposer2ForCausalLM

SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def fused(q, k, v, *_, **__) -> int:
    return sdpa_flop_count(q, k, v)


def model_of(family, attention="eager") -> InternLMXComposer2ForCausalLM:
    folder = golden(family).folder
    model = InternLMXComposer2ForCausalLM.from_pretrained(folder, attn_implementation=attention)
    return model.train()


def rows(model, *samples: tuple[int, tuple[int, ...]], packed=False) -> MicroBatch:
    """Samples of (text tokens, heights of images in squares) → a micro-batch; half the text is supervised."""
    side, encoded, pixels = model.config.image_size, [], []
    for text, images in samples:
        pixels += (images := [torch.zeros(3, side * high, side) for high in images])
        slots = [model.vit.num_tokens(*image.shape[1:]) for image in images]
        length = text + sum(slots)
        labels = np.full(length, IGNORED)
        labels[-(text // 2) :] = 5
        encoded.append(Encoded(np.full(length, 7), labels, np.arange(length) < sum(slots), slots))
    return collate(
        encoded, pixel_values(pixels), [(0, i) for i in range(len(samples))], pad_id=2, packed=packed
    )


def counted(model, micro_batch, backward) -> int:
    with FlopCounterMode(display=False, custom_mapping={SDPA: fused}) as counter:
        loss = model(**micro_batch.inputs).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_pass_is_counted_exactly_in_packs_and_with_several_images(family):
    model = model_of(family, "sdpa")
    high = 2 if model.config.high_resolution else 1
    tall, small = (9, (high,)), (4, (1, 1))
    for batch in (rows(model, tall), rows(model, (6, ())), rows(model, tall, small, (12, ()), packed=True)):
        with torch.no_grad():
            assert sum(count_flops(model, backward=False).of(batch)) == counted(model, batch, backward=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_dummy_images_are_no_work(family):
    model = model_of(family)
    flops = count_flops(model)
    padded, alone = rows(model, (8, (1,)), (50, ())), [rows(model, (8, (1,))), rows(model, (50, ()))]
    assert padded.inputs["attention_mask"] is not None
    assert np.array_equal(flops.of(padded), np.sum([flops.of(batch) for batch in alone], axis=0))
    blank = torch.zeros(3, model.config.image_size, model.config.image_size)
    dummy = collate([], pixel_values([blank]), [], pad_id=2)
    assert flops.of(dummy) == (0, 0)


WAYS = {
    "everything": [""],
    "all but the tower": ["model.", "output.", "vision_proj."],
    "language": ["model.", "output."],
    "projector": ["vision_proj."],
    "the tower's second block": ["vit.vision_tower.vision_model.encoder.layers.1."],
    "queries of the tower": ["vit.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"],
    "a norm": ["model.layers.0.ffn_norm"],
    "PLoRA's B": ["Plora_B"],
    "output layer": ["output."],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_forward_and_backward_are_counted_exactly_whatever_trains(family, way):
    model = model_of(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(p) or f".{p}" in name for p in WAYS[way]))
    batch = rows(model, (9, (1,)))
    assert sum(count_flops(model).of(batch)) == counted(model, batch, backward=True)


@pytest.mark.parametrize("targets", [["wqkv", "w2"], ["w1", "q_proj"], ["output"]])
def test_adapters_are_counted_exactly(targets):
    model = model_of("xcomposer2")
    inject(model, LoraConfig(r=4, target_modules=targets))
    batch = rows(model, (9, (1,)))
    assert sum(count_flops(model).of(batch)) == counted(model, batch, backward=True)


def test_vision_and_language_are_told_apart():
    model = model_of("xcomposer2")
    vision, language = count_flops(model, backward=False).of(batch := rows(model, (9, (1,))))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.image_features(batch.inputs["pixel_values"])
    assert vision == counter.get_total_flops()
    assert language > 0


def peaks() -> None:
    start()
    print(*(matmul_peak(torch.device("cpu"), bf16, seconds=0.05) for bf16 in (True, False)))
    finish()


def test_every_rank_learns_the_same_peak_of_all_ranks():
    ours, theirs = run_ranks(2, peaks)
    assert ours == theirs
    assert all(1e8 < float(peak) < 1e16 for peak in ours.split())


def test_a_run_reports_the_same_operations_on_any_ranks_packed_or_padded(tmp_path):
    tiny_world(tmp_path)
    options = {"max_length": 128, "max_steps": 2, "rehearse": False, "measure_mfu": True}
    run_ranks(2, main, flags(tmp_path, "packed", per_device_train_batch_size=2, **options))
    run_ranks(1, main, flags(tmp_path, "padded", per_device_train_batch_size=4, packing=False, **options))
    for a, b in zip(read_metrics(tmp_path / "packed"), read_metrics(tmp_path / "padded"), strict=True):
        for name in ("model_flops_vision", "model_flops_language"):
            assert a[name] == b[name] > 0
        assert 0 < a["mfu"] < 1
        assert 0 < b["mfu"] < 1
        seconds = a["tokens"] / a["tokens_per_second"]
        assert a["supervised_tokens"] / a["supervised_tokens_per_second"] == pytest.approx(seconds)
        assert a["samples"] / a["samples_per_second"] == pytest.approx(seconds)
