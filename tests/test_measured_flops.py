"""The operations of any model of transformers are those that torch itself counts when it really runs.

Real rows are packed, with pictures of other sizes than were measured; attention is written out, and experts
run one by one.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data.batch import MicroBatch, collate
from data.config import DataConfig
from data.loader import SampleReader
from data.mixture import read_mixture
from data.reader import open_reader
from data.tokens import IGNORED
from tests.tiny import flags, read_metrics, run_ranks, tiny_data
from tests.tiny_models import tiny_folder
from trainer import models
from trainer.extras.measured_flops import measure_flops
from trainer.lora import inject
from trainer.main import main

WAYS = ("everything", "language", "projector", "adapters")
IN_THE_FAST_SUITE = (("qwen2_5_vl", "language"), ("qwen3_moe", "adapters"))
FAMILIES = ("qwen2_5_vl", "gemma3", "llava", "qwen3_vl_moe", "internvl", "llava_onevision", "glm4v")
TEXT_MODELS = ("qwen3_moe", "gpt_oss", "minimax")
CASES = [
    pytest.param(family, way, marks=() if (family, way) in IN_THE_FAST_SUITE else pytest.mark.slow)
    for family, ways in [*((name, WAYS) for name in FAMILIES), *((name, WAYS[::3]) for name in TEXT_MODELS)]
    for way in ways
]


def world_of(family: str, folder: Path) -> SampleReader:
    tiny_folder(family, folder / "model")
    data = tiny_data(folder / "data")
    for name, size in (("red40", (150, 60)), ("green90", (84, 84)), ("blue40", (390, 190))):
        Image.new("RGB", size, (40, 90, 200)).save(folder / "data" / f"{name}.png")
    if family in (*TEXT_MODELS, "llama"):
        data.write_text("text.json 0.024\n")
    config = DataConfig(data_path=str(data), model_name_or_path=str(folder / "model"))
    return open_reader(config, read_mixture(data), models)[0]


def rows(reader: SampleReader) -> MicroBatch:
    """A packed row of the first two samples of each source."""
    wanted = [(source, index) for source in range(len(reader.sources)) for index in range(2)]
    read = [reader.read(*place) for place in wanted]
    pictures = [picture for _, of_sample in read for picture in of_sample]
    given = reader.image_processor.batch(pictures) if pictures else {}
    return collate([sample for sample, _ in read], given, wanted, reader.encoder.pad_id, packed=True)


def set_trainable(model: Any, parts: models.Parts, way: str) -> None:
    if way == "adapters":
        model.requires_grad_(False)
        inject(model, LoraConfig(r=4, target_modules=parts.lora_targets[0]))
        return
    for name, parameter in model.named_parameters():
        part = "vision" if name.startswith(parts.vision) else "language"
        part = "projector" if name.startswith(parts.projector) else part
        parameter.requires_grad_(way in ("everything", part))


def counted(model: Any, batch: MicroBatch) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch.inputs).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("family", "way"), CASES)
def test_forward_and_backward_are_counted_exactly_whatever_trains(family, way, tmp_path):
    reader = world_of(family, tmp_path)
    batch = rows(reader)
    config: Any = models.load_config(tmp_path / "model")
    for each in (config, config.get_text_config()):
        each._experts_implementation = "eager"
    model, blank = real_and_blank(config, way)
    flops = measure_flops(blank, reader)
    exact = family != "minimax"  # linear attention, on whole chunks; these samples end within one
    assert sum(flops.of(batch)) == pytest.approx(counted(model, batch), rel=0 if exact else 1e-4, abs=0)
    if way == "adapters" and family not in TEXT_MODELS:
        pictures = {name: batch.inputs[name] for name in names_of_pictures(batch)}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.base_model.get_image_features(**pictures)
        assert flops.of(batch)[0] == counter.get_total_flops()


def real_and_blank(config: Any, way: str) -> tuple[Any, Any]:
    """A model in training, and the same on the meta device."""
    model: Any = models.build_model(config).train()
    with torch.device("meta"):
        blank: Any = models.build_model(config)
    for each in (model, blank):
        set_trainable(each, models.parts_of(config), way)
    return model, blank


def names_of_pictures(batch: MicroBatch) -> list[str]:
    return [
        name for name in batch.inputs if name.startswith(("pixel", "image_grid", "image_sizes", "batch_num"))
    ]


def test_padding_and_a_dummy_picture_are_no_work(tmp_path):
    reader = world_of("qwen2_5_vl", tmp_path)
    _, blank = real_and_blank(models.load_config(tmp_path / "model"), "everything")
    flops = measure_flops(blank, reader)
    read = [reader.read(0, 0), reader.read(2, 1)]
    pictures = reader.batch([picture for _, of_sample in read for picture in of_sample])
    samples = [sample for sample, _ in read]
    padded, packed = (
        flops.of(collate(samples, pictures, [(0, 0), (2, 1)], 0, packed=packed)) for packed in (False, True)
    )
    assert padded == packed
    assert flops.of(collate([], reader.batch([]), [], 0)) == (0, 0)


def test_a_model_that_cannot_be_counted_is_refused_in_a_sentence(tmp_path, monkeypatch):
    reader = world_of("llama", tmp_path)
    _, model = real_and_blank(models.load_config(tmp_path / "model"), "everything")
    block = type(model.model.layers[0])
    forward = block.forward

    def twice(self, hidden_states, *args, **kwargs):
        for _ in range(1 + (hidden_states.shape[1] > 200)):
            hidden_states = forward(self, hidden_states, *args, **kwargs)
        return hidden_states

    monkeypatch.setattr(block, "forward", twice)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be counted, because they do not follow"):
        measure_flops(model, reader)

    def depends_on_values(self, hidden_states, *args, **kwargs):
        return forward(self, hidden_states * hidden_states.sum().item(), *args, **kwargs)

    monkeypatch.setattr(block, "forward", depends_on_values)
    with pytest.raises(ValueError, match="cannot be counted, because it does not run without values"):
        measure_flops(model, reader)


def test_a_sample_whose_answer_is_cut_off_behind_its_picture_is_left_out(tmp_path):
    """The positions of Qwen2.5-VL's tokens depend on pictures, which are not read for it."""
    reader = world_of("qwen2_5_vl", tmp_path)
    whole, _ = reader.read(0, 0)
    reader.encoder.max_length = int((whole.labels != IGNORED).argmax())
    sample, pictures = reader.read(0, 0)
    assert sample.num_supervised == len(pictures) == 0 < sample.num_image_slots


def test_a_run_reports_operations_of_any_family_and_the_same_on_two_ranks(tmp_path):
    world_of("llava", tmp_path)
    options = {"plora_dropout": None, "max_length": 256, "max_steps": 1, "rehearse": False}
    options |= {"measure_mfu": True, "seed": 0}
    run_ranks(1, main, flags(tmp_path, "one", per_device_train_batch_size=4, **options))
    run_ranks(2, main, flags(tmp_path, "two", per_device_train_batch_size=2, packing=False, **options))
    (ours,), (theirs,) = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    for name in ("model_flops_vision", "model_flops_language"):
        assert ours[name] == theirs[name] > 0
    assert 0 < ours["mfu"] < 1
