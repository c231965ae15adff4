"""What a batch must not change: padding, packing, neighbours, dummy images, frozen parts, checkpointing."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from tests.model_cases import (
    FAMILIES,
    PACKED_IMAGES,
    encoded,
    golden,
    packed_micro_batch,
    packed_row,
    padded,
    samples,
)
from trainer.models import build_model, parts_of


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def models():
    return {name: golden(name).model() for name in FAMILIES}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def summed_loss(model, batches):
    model.zero_grad(set_to_none=True)
    total = sum(model(**batch, num_items_in_batch=1).loss for batch in batches)
    total.backward()
    return total.detach(), gradients(model)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_a_padded_row_gives_what_it_gives_alone(models, family, side):
    parts = samples(family)
    batch = padded(parts, side)
    logits = models[family](**batch).logits
    for row, mask, part in zip(logits, batch["attention_mask"].bool(), parts, strict=True):
        alone = models[family](**part).logits[0]
        torch.testing.assert_close(row[mask], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_gives_the_logits_and_gradients_of_its_samples(models, family, attention):
    model, parts = models[family], samples(family)
    alone = torch.cat([model(**part).logits for part in parts], dim=1)
    expected_loss, expected = summed_loss(model, parts)
    model.set_attn_implementation(attention)
    try:
        torch.testing.assert_close(model(**packed_row(parts)).logits, alone, rtol=0, atol=2e-5)
        loss, found = summed_loss(model, [packed_row(parts)])
    finally:
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-5 * whole, name


@torch.no_grad()
def test_a_poisoned_neighbour_in_a_packed_row_is_not_felt(models):
    model, parts = models["xcomposer2"], samples("xcomposer2")[:2]
    lengths = [part["input_ids"].shape[1] for part in parts]
    row = packed_row(parts)
    embeds = model.model.tok_embeddings(row["input_ids"])
    embeds = embeds.index_copy(
        1, row["im_mask"][0].nonzero()[:, 0], model.image_features(row["pixel_values"])[None]
    )
    for poisoned in range(2):
        poison = embeds.clone()
        start = 0 if poisoned == 0 else lengths[0]
        poison[:, start : start + lengths[poisoned]] = float("nan")
        logits = model(
            inputs_embeds=poison, im_mask=row["im_mask"], position_ids=row["position_ids"]
        ).logits.split(lengths, dim=1)
        clean = model(**parts[1 - poisoned]).logits
        torch.testing.assert_close(logits[1 - poisoned], clean, rtol=0, atol=2e-5)
        assert logits[poisoned].isnan().all()


def test_a_dummy_image_adds_exact_zeros(models, family):
    model, text = models[family], samples(family)[0]
    loss, expected = summed_loss(model, [text])
    side = model.config.image_size
    dummy_loss, found = summed_loss(model, [{**text, "pixel_values": torch.randn(1, 3, side, side)}])
    assert torch.equal(loss, dummy_loss)
    for name, gradient in found.items():
        if name in expected:
            assert torch.equal(gradient, expected[name]), name
        else:
            assert name.startswith(("vit.", "vision_proj.", "plora_")), name
            assert not gradient.any(), name
    used = {name for name, _ in model.named_parameters() if "post_layernorm" not in name}
    assert found.keys() == used


def test_without_an_image_partial_lora_has_zeros_and_vision_nothing(models):
    _, found = summed_loss(models["xcomposer2"], samples("xcomposer2")[:1])
    assert any("Plora_A" in name for name in found)
    assert all(not gradient.any() for name, gradient in found.items() if "Plora" in name)
    assert not any(name.startswith(("vit.", "vision_proj.")) for name in found)


def test_in_training_the_projector_has_zeros_without_an_image(models, family):
    """A rank without an image then takes part in the reduction of its gradients."""
    model = models[family]
    model.train()
    try:
        loss, found = summed_loss(model, samples(family)[:1])
    finally:
        model.eval()
    projector = [name for name, _ in model.named_parameters() if name.startswith(("vision_proj.", "plora_"))]
    assert projector
    assert all(not found[name].any() for name in projector)
    assert not any(name.startswith("vit.") for name in found)
    assert loss.isfinite()


def test_nothing_supervised_gives_zero_and_not_nan(models):
    part = samples("xcomposer2")[1]
    part["labels"] = torch.full_like(part["labels"], -100)
    loss, found = summed_loss(models["xcomposer2"], [part])
    assert loss == 0
    assert "output.weight" in found
    assert all(not gradient.any() for gradient in found.values())


def test_with_labels_logits_are_formed_in_evaluation_and_not_in_training():
    part = samples("xcomposer2")[0]
    seen = []

    def loss_function(hidden, targets, lm_head, num_items_in_batch):
        seen.append((hidden.shape, targets.shape, lm_head, num_items_in_batch))
        return hidden.sum(), hidden[:, 0].detach()

    model = golden("xcomposer2").model()
    assert model.eval()(**part).logits.shape == (*part["input_ids"].shape, model.config.vocab_size)
    assert model.train()(**part).logits is None
    model.loss_function = loss_function
    model(**part, num_items_in_batch=7)
    supervised = int((part["labels"] != -100).sum())
    assert seen == [((supervised, 64), (supervised,), model.output, 7)]


def test_a_wrong_number_of_slots_is_an_error_with_both_numbers(models):
    part = samples("xcomposer2")[1]
    with pytest.raises(ValueError, match="25 image slots, but the images give 50 features"):
        models["xcomposer2"](**{**part, "pixel_values": part["pixel_values"] * 2})
    with pytest.raises(ValueError, match="25 image slots, but there are no pixel_values"):
        models["xcomposer2"](**{**part, "pixel_values": None})


def test_an_image_of_another_size_is_an_error(models):
    for family, shape in [
        ("xcomposer2", (3, 70, 84)),
        ("xcomposer2-hd", (3, 56, 84)),
        ("xcomposer2", (1, 70, 70)),
    ]:
        with pytest.raises(ValueError, match="an image has shape"):
            models[family].image_features([torch.zeros(shape)])


def test_a_misspelt_argument_is_an_error(models):
    part = samples("xcomposer2")[0]
    with pytest.raises(TypeError, match="im_masks"):
        models["xcomposer2"](**part, im_masks=part["im_mask"])


def test_a_frozen_tower_keeps_no_graph_and_the_projector_still_learns(family):
    model = golden(family).model()
    model.vit.requires_grad_(False)
    _, found = summed_loss(model, samples(family)[1:2])
    assert not any(name.startswith("vit.") for name in found)
    reference = golden(family).model()
    _, expected = summed_loss(reference, samples(family)[1:2])
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6)
    assert found["vision_proj.0.weight"].any()
    features = model.vit(samples(family)[1]["pixel_values"], *gn_of(model))
    assert features.requires_grad == bool(gn_of(model))


def gn_of(model):
    return (model.plora_sub_GN, model.plora_glb_GN) if model.config.high_resolution else ()


def test_checkpointed_activations_give_the_same_gradients():
    model, part = golden("xcomposer2").model(), samples("xcomposer2")[1]
    model.config.plora_dropout = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    _, expected = summed_loss(model, [part])
    model.gradient_checkpointing_enable()
    _, found = summed_loss(model, [part])
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)


def test_dropout_acts_in_training_and_at_image_slots_only():
    model, part = golden("xcomposer2").model(), samples("xcomposer2")[1]
    del part["labels"]
    with torch.no_grad():
        still = model(**part).logits
        model.train()
        torch.manual_seed(0)
        moved = model(**part).logits
        before_image = int(part["im_mask"][0].nonzero()[0, 0])
    torch.testing.assert_close(moved[:, :before_image], still[:, :before_image])
    assert not torch.allclose(moved, still, atol=1e-4)


def test_lora_wraps_the_layers_and_passes_the_slots_on():
    model, part = golden("xcomposer2").model(), samples("xcomposer2")[1]
    expected = model(**part).logits
    targets = list(parts_of(model.config).lora_targets)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    torch.testing.assert_close(wrapped(**part).logits, expected)
    wrapped(**part).loss.backward()
    trained = [name for name, p in wrapped.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)


def test_adapters_on_partial_lora_itself_change_the_output_and_train():
    model, part = golden("xcomposer2").model(), samples("xcomposer2")[1]
    expected = model(**part).logits
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["Plora_A", "Plora_B"]))
    torch.testing.assert_close(wrapped(**part).logits, expected, rtol=0, atol=1e-5)
    wrapped(**part).loss.backward()
    added = {name: p for name, p in wrapped.named_parameters() if ".lora_B." in name}
    # What the last block adds at image slots reaches no supervised position.
    assert all(p.grad.any() for name, p in added.items() if ".layers.0." in name)
    wrapped.zero_grad()
    text = packed_micro_batch([encoded(0, 20, 1)], [PACKED_IMAGES[0]])  # and the picture of ranks without one
    wrapped.train()(**text.inputs).loss.backward()
    assert not any(p.grad.any() for name, p in wrapped.named_parameters() if ".lora_" in name)
    wrapped.eval()
    for parameter in added.values():
        torch.nn.init.normal_(parameter)
    assert not torch.allclose(wrapped(**part).logits, expected, atol=1e-3)


def test_a_sample_beyond_max_positions_changes_the_rotation_of_no_other_one():
    plain = golden("xcomposer2").model()
    config = type(plain.config).from_dict(
        plain.config.to_dict()
        | {"max_position_embeddings": 8, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    )
    model = build_model(config).eval()
    model.load_state_dict(plain.state_dict())
    random = torch.Generator().manual_seed(0)
    long, short = (torch.randint(3, 90, (1, length), generator=random) for length in (20, 12))
    with torch.no_grad():
        alone = [model(input_ids=ids).logits[0] for ids in (short, long)]
        positions = torch.cat([torch.arange(12), torch.arange(20)])[None]
        bounds = torch.tensor([0, 12, 32], dtype=torch.int32)
        samples = {"sample_lengths": [12, 20], "cu_seq_lens": bounds}
        row = model(input_ids=torch.cat([short, long], 1), position_ids=positions, **samples).logits[0]
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[0, 12:] = 0
        rows = model(input_ids=torch.cat([F.pad(short, (0, 8)), long]), attention_mask=mask).logits
        before = plain.eval()(input_ids=short).logits[0]
    for found in (row.split([12, 20]), (rows[0, :12], rows[1])):
        torch.testing.assert_close(found, tuple(alone), rtol=0, atol=1e-5)
    assert (alone[0] - before).abs().max() > 1e-3, "the scaling does something"


def test_no_block_keeps_its_output_where_nothing_is_trained():
    """Such as while answering: of a long prompt they would take more memory than the cache."""
    model, outputs, alive = golden("xcomposer2").model().eval(), [], []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, inputs, output: outputs.append(weakref.ref(output)))
    model.model.norm.register_forward_pre_hook(lambda *_: alive.extend(o() is not None for o in outputs))
    with torch.no_grad():
        model(**samples("xcomposer2")[1])
    assert alive == [False] * (len(outputs) - 1) + [True]


def test_a_new_model_starts_sane():
    torch.manual_seed(0)
    config = golden("xcomposer2-hd").model().config
    model = build_model(config)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        zero = name.endswith("bias") or "Plora_B" in name or "_GN" in name
        assert bool(parameter.any()) != zero, name
    loss = model(**golden("xcomposer2-hd").inputs("one_image_2x2")).loss
    assert loss.item() == pytest.approx(torch.log(torch.tensor(320.0)).item(), abs=0.3)


def test_buffers_are_right_after_meta_and_to_empty():
    reference = golden("xcomposer2").model()
    with torch.device("meta"):
        model = build_model(reference.config)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(17)
    model.init_buffers()
    model.load_state_dict(reference.state_dict())
    part = samples("xcomposer2")[1]
    with torch.no_grad():
        logits = model.eval()(**part).logits
    assert torch.equal(logits, reference(**part).logits)
