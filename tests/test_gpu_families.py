"""Families of transformers, and compiled blocks, on a GPU: `pytest -m gpu`; skipped elsewhere.

In this process, with the tiny random models of tests/vlm_cases.py.
"""

import pytest
import torch

from data.batch import map_tensors, to_device
from tests import vlm_cases
from tests.model_cases import golden, packed_micro_batch
from trainer.extras.compile import compile_block
from trainer.models import parts_of
from trainer.models.generic import modeling, tower_attention
from trainer.models.generic.model_parts import find_parts

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and -m gpu to see it"),
]


def on_gpu(inputs, dtype=torch.float32):
    def move(tensor):
        return to_device(tensor.to(dtype) if tensor.is_floating_point() else tensor, DEVICE)

    return {name: map_tensors(value, move) for name, value in inputs.items()}


def family(name, dtype=torch.float32):
    """The tiny model of a family in training, and five samples in a packed row."""
    own = vlm_cases.tiny_model(name)
    model = modeling.build(own.config)
    model.load_state_dict(own.state_dict())
    modeling.prepare_for_training(model)
    inputs = vlm_cases.packed(name, own.config, vlm_cases.five_samples(name, own))
    return model.to(DEVICE, dtype).train(), on_gpu(inputs, dtype)


def loss_and_gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    loss = model(**{**inputs, "num_items_in_batch": 1}).loss
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance):
    """Losses relative to theirs, gradients to those of all parameters."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    whole = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() < tolerance * whole, name


@pytest.fixture(autouse=True)
def no_rounding(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("name", vlm_cases.WITH_PICTURES)
def test_a_packed_row_has_the_loss_and_gradients_of_the_family_s_own_class_on_the_cpu(name):
    own = vlm_cases.tiny_model(name)
    expected = vlm_cases.reference(own, vlm_cases.five_samples(name, own))
    assert_same(loss_and_gradients(*family(name)), expected, 1e-4)


@pytest.mark.parametrize("name", vlm_cases.WITHOUT_WAITS)
def test_a_packed_row_waits_for_the_gpu_nowhere(name):
    model, inputs = family(name, torch.bfloat16)
    for mode in ("default", "error"):  # the first run loads kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model(**inputs).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "mistral3"])
@torch.no_grad()
def test_the_kernel_for_pictures_in_a_row_computes_what_one_picture_at_a_time_does(name, monkeypatch):
    def features():
        return torch.cat(list(model.base_model.get_image_features(**given).pooler_output)).float()

    model, inputs = family(name, torch.bfloat16)
    names = ("pixel_values", "image_grid_thw", "image_sizes")
    given, calls = {key: inputs[key] for key in names if key in inputs}, []
    original = tower_attention.varlen_attn
    monkeypatch.setattr(tower_attention, "varlen_attn", lambda *a, **k: calls.append(a) or original(*a, **k))
    found = features()
    assert len(calls) == 2, "once a block"
    monkeypatch.setattr(tower_attention, "fits_varlen", lambda *args: False)
    expected = features()
    assert (found - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("name", ["xcomposer2", "qwen2_5_vl"])
@pytest.mark.parametrize("part", ["language", "vision"])
def test_compiled_blocks_compute_what_plain_ones_do(name, part):
    """In float32, where rounding makes a difference of 1e-6 at most."""
    if name == "xcomposer2":
        model, inputs = golden(name).model().to(DEVICE).train(), on_gpu(packed_micro_batch().inputs)
        parts = parts_of(model.config)
    else:
        model, inputs = family(name)
        parts = find_parts(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = loss_and_gradients(model, inputs)
    for block in parts.blocks(model)[part == "vision"]:
        compile_block(block)
    assert_same(loss_and_gradients(model, inputs), expected, 1e-5)
