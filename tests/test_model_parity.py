"""The model gives the original's numbers: logits, losses and gradients, of every case and of its parts."""

import pytest
import torch
import torch.nn.functional as F

from tests.model_cases import FAMILIES, golden
from trainer.models.xcomposer2.configuration_xcomposer2 import InternLMXcomposer2Config
from trainer.models.xcomposer2.plora_xcomposer2 import runs_of
from trainer.models.xcomposer2.rotary_xcomposer2 import RotaryEmbedding
from trainer.models.xcomposer2.vision_xcomposer2 import resize_positions

CASES = [(family, case) for family in FAMILIES for case in golden(family).cases]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return golden(request.param)


@pytest.fixture(scope="module")
def models():
    return {name: golden(name).model() for name in FAMILIES}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits_loss_and_gradients_are_the_originals(models, name, case):
    model, expected = models[name], golden(name).cases[case]
    model.zero_grad(set_to_none=True)
    output = model(**golden(name).inputs(case))
    assert golden(name).logits_error(case, output.logits) < 2e-5
    output.loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    if expected["loss"] is None:  # the original's mean over nothing is NaN
        assert output.loss.item() == 0
        assert all(not gradient.any() for gradient in gradients.values() if gradient is not None)
        return
    assert output.loss.item() == pytest.approx(expected["loss"], abs=1e-5)
    for key, norm in expected["grad_norms"].items():
        gradient = gradients[key]
        if norm is None:
            assert gradient is None, f"{key} has a gradient"
        elif norm == 0.0:
            assert gradient is not None
            assert not gradient.any(), f"{key} has no exact zero"
        else:
            assert gradient is not None
            small = 1e-6 * expected["grad_norm_total"]  # of k_proj.bias, whose true gradient is zero
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=small), key
    for key, tensor in golden(name).tensors.items():
        if key.startswith(f"{case}/grad."):
            gradient = gradients[key.split("grad.")[1]]
            assert gradient is not None
            assert (gradient - tensor).norm() < 1e-3 * tensor.norm(), key


@pytest.mark.parametrize(("name", "case"), [(FAMILIES[0], "one_image_front"), (FAMILIES[1], "one_image_2x2")])
def test_every_block_gives_the_originals_hidden_states(models, name, case):
    with torch.no_grad():
        output = models[name](**golden(name).inputs(case), output_hidden_states=True)
    assert len(output.hidden_states) == 3
    for i, hidden in enumerate(output.hidden_states):
        torch.testing.assert_close(
            hidden, golden(name).tensors[f"{case}/hidden_states.{i}"], rtol=0, atol=2e-5
        )


@torch.no_grad()
def test_vision_alone(models, family):
    model = models[family.folder.name]
    images = [family.images[index] for index in family.numbers["vit_alone"]["images"]]
    features = model.image_features(images)
    expected = family.tensors["vit_alone/proj_out"].flatten(0, 1)
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-5)
    sizes = [model.vit.num_tokens(*image.shape[1:]) for image in images]
    assert sum(sizes) == len(features)
    for image, part in zip(images, features.split(sizes), strict=True):
        torch.testing.assert_close(model.image_features([image]), part, rtol=0, atol=1e-5)


@torch.no_grad()
def test_partial_lora_alone(models):
    tensors = golden("xcomposer2").tensors
    wqkv, x = models["xcomposer2"].model.layers[0].attention.wqkv, tensors["plora_alone/x"]
    runs = runs_of(tensors["plora_alone/im_mask"].bool())
    torch.testing.assert_close(wqkv(x, runs), tensors["plora_alone/y"], rtol=0, atol=1e-5)
    torch.testing.assert_close(wqkv(x, []), tensors["plora_alone/y_no_image"], rtol=0, atol=1e-5)
    torch.testing.assert_close(wqkv(x, None), tensors["plora_alone/y_none"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_projector_alone(models):
    tensors = golden("xcomposer2").tensors
    y = models["xcomposer2"].vision_proj(tensors["projector_alone/x"])
    torch.testing.assert_close(y, tensors["projector_alone/y"], rtol=0, atol=1e-5)


def test_rotary_embedding_alone(models):
    tensors = golden("xcomposer2").tensors
    cosines, sines = models["xcomposer2"].model.rotary_emb(torch.arange(6)[None])
    torch.testing.assert_close(cosines[0], tensors["rope/cos"], rtol=0, atol=1e-6)
    torch.testing.assert_close(sines[0], tensors["rope/sin"], rtol=0, atol=1e-6)


def test_dynamic_ntk_starts_beyond_max_positions_and_leaves_no_trace():
    scaling = {"type": "dynamic", "factor": 2.0}
    config = InternLMXcomposer2Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8,
        rope_scaling=scaling,
    )
    rope = RotaryEmbedding(config)
    short = torch.arange(8)[None]
    before = rope(short)
    base = 1e6 * (2 * 12 / 8 - 1) ** (16 / 14)
    angles = torch.arange(12)[:, None] / base ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(rope(torch.arange(12)[None])[0][0, :, :8], angles.cos(), rtol=0, atol=1e-6)
    assert torch.equal(rope(short)[0], before[0])
    plain = torch.arange(8)[:, None] / 1e6 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(before[0][0, :, :8], plain.cos(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("grids", ["24to16", "24to35", "24to40", "3to5", "4to6"])
def test_position_embeddings_resize_bit_for_bit(grids):
    tensors = golden("xcomposer2").tensors
    weight, grid = tensors[f"resize_pos/{grids}/in"], int(grids.split("to")[1])
    assert torch.equal(resize_positions(weight, grid), tensors[f"resize_pos/{grids}/out"])


def test_positions_of_the_same_grid_stay_as_they_are():
    weight = torch.randn(26, 4)
    assert resize_positions(weight, 5) is weight


@pytest.mark.parametrize("case", list(golden("xcomposer2").numbers["bf16"]))
def test_bfloat16_is_as_close_as_the_original_in_bfloat16(case):
    family = golden("xcomposer2")
    model, reference = family.model().to(torch.bfloat16), family.numbers["bf16"][case]
    with torch.no_grad():
        output = model(**family.inputs(case))
    assert output.logits.dtype == torch.float32
    assert family.logits_error(case, output.logits) < 1.5 * reference["max_abs_logit_diff"]
    assert output.loss.item() == pytest.approx(family.cases[case]["loss"], abs=2e-2)


def test_rotary_embedding_is_float32_in_a_bfloat16_model():
    model = golden("xcomposer2").model().to(torch.bfloat16)
    cosines, _ = model.model.rotary_emb(torch.arange(1000)[None])
    exact = golden("xcomposer2").model().model.rotary_emb(torch.arange(1000)[None])[0]
    assert torch.equal(cosines, exact)


def test_the_padding_row_of_the_embedding_is_used_but_has_no_gradient(models):
    model = models["xcomposer2"]
    model.zero_grad(set_to_none=True)
    ids = torch.tensor([[1, 5, 2, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    gradient = model.model.tok_embeddings.weight.grad
    assert gradient[5].any()
    assert not gradient[2].any()
    assert F.embedding(torch.tensor(2), model.model.tok_embeddings.weight).any()
