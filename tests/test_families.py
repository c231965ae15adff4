"""Models of transformers in the training forward, against the class's own forward one sample at a time."""

import copy
import functools
import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from tests.tiny import run_ranks
from tests.vlm_cases import (
    CASES,
    TEXT_ONLY,
    WITH_PICTURES,
    Sample,
    alone,
    as_published,
    five_samples,
    join_pictures,
    own_arguments,
    packed,
    padded,
    reference,
    tiny_config,
    tiny_model,
)
from trainer.lora import resolve_targets
from trainer.loss import chunked_cross_entropy
from trainer.models.family import Conversion
from trainer.models.generic import packed_attention, tower_attention
from trainer.models.generic.conversions import loaded, saved
from trainer.models.generic.modeling import (
    build,
    find_parts,
    init_buffers,
    prepare_for_training,
)
from trainer.parallelize import split_tiles
from trainer.weights import persistent_buffers

TOLERANCE = 1e-5
ONE_BY_ONE = ("aya_vision", "gemma3", "internvl", "llava", "llava_onevision", "paligemma")
"""Families whose tower takes a batch of pictures, or tiles, of one size and no masks."""


def trainable(name: str) -> Any:
    """The tiny model of `name`, built and prepared for training."""
    model = build(tiny_config(name))
    model.load_state_dict(tiny_model(name).state_dict())
    prepare_for_training(model)
    return model.train()


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to rounding; a gradient that is zero in exact arithmetic, as a key's bias has it, is measured
    against the others."""
    assert actual.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).norm()
        assert difference <= TOLERANCE * max(gradient.norm(), 0.01 * whole), (
            name,
            difference,
            gradient.norm(),
        )


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_the_classs_own(name):
    own = tiny_model(name)
    samples = five_samples(name, own)
    loss, gradients = reference(own, samples)
    model = trainable(name)

    outputs = model(**packed(name, model.config, samples))
    outputs.loss.backward()
    assert outputs.logits is None
    assert outputs.loss.item() == pytest.approx(loss, rel=TOLERANCE)
    assert outputs.token_losses.sum().item() == pytest.approx(loss, rel=TOLERANCE)
    check_gradients(gradients_of(model), gradients)

    model.zero_grad()
    total = 0.0
    for sample in samples:
        outputs = model(**alone(sample))
        outputs.loss.backward()
        total += outputs.loss.item()
    assert total == pytest.approx(loss, rel=TOLERANCE)
    check_gradients(gradients_of(model), gradients)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("llama_")])
def test_a_padded_batch(name):
    """Frequencies that depend on the longest position depend on the longest row, in the class too."""
    own = tiny_model(name)
    samples = five_samples(name, own)
    loss, gradients = reference(own, samples)
    model = trainable(name)
    outputs = model(**padded(name, samples))
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(loss, rel=TOLERANCE)
    check_gradients(gradients_of(model), gradients)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "qwen3_vl", "gemma3"])
def test_one_kernel_for_all_samples(name, monkeypatch):
    """A kernel that takes the samples' boundaries gets what it needs; here one in plain operations."""
    calls = 0

    def varlen(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        given = inspect.signature(varlen_attn).bind(*args, **kwargs).arguments
        bounds = given["cu_seq_q"]
        assert torch.equal(bounds, given["cu_seq_k"])
        assert given["max_q"] == given["max_k"] == bounds.diff().max()
        (back, ahead), rows = given["window_size"], []
        assert ahead == 0
        for begin, end in itertools.pairwise(bounds.tolist()):
            q, k, v = (given[name][begin:end].transpose(0, 1) for name in ("query", "key", "value"))
            distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
            mask = (distance >= 0) & ((distance <= back) | torch.tensor(back < 0))
            y = F.scaled_dot_product_attention(q, k, v, mask, scale=given["scale"], enable_gqa=True)
            rows.append(y.transpose(0, 1))
        return torch.cat(rows)

    own = tiny_model(name)
    samples = five_samples(name, own)
    if name == "gemma3":
        samples = samples[1:2] * 3  # a picture's slots see each other, which is no window
    loss, gradients = reference(own, samples)
    model = trainable(name)
    monkeypatch.setattr(packed_attention, "has_varlen_kernel", lambda query: True)
    monkeypatch.setattr(tower_attention, "fits_varlen", lambda *args: False)
    monkeypatch.setattr(packed_attention, "varlen_attn", varlen)
    outputs = model(**packed(name, model.config, samples))
    outputs.loss.backward()
    assert calls == 2
    assert outputs.loss.item() == pytest.approx(loss, rel=TOLERANCE)
    language = {name for name in gradients if "vision" not in name and "projector" not in name}
    check_gradients(
        {name: value for name, value in gradients_of(model).items() if name in language},
        {name: gradients[name] for name in language},
    )


@pytest.mark.parametrize("name", CASES)
def test_other_samples_of_a_row_do_not_matter(name):
    model = trainable(name).eval()
    samples = five_samples(name, tiny_model(name))
    before = model(**packed(name, model.config, samples)).logits[0]
    changed = samples[1]
    samples[1] = Sample(changed.input_ids.flip(0) % 7 + 1, changed.labels, changed.slots)
    after = model(**packed(name, model.config, samples)).logits[0]
    lengths = [len(sample.input_ids) for sample in samples]
    for number, (old, new) in enumerate(zip(before.split(lengths), after.split(lengths), strict=True)):
        if number == 1:
            assert (old - new).abs().max() > 1e-2
        else:
            torch.testing.assert_close(new, old, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"])
def test_positions_of_pictures(name):
    model = trainable(name)
    inputs = packed(name, model.config, five_samples(name, tiny_model(name)))
    assert inputs["position_ids"].shape == (4, 1, sum(inputs["sample_lengths"]))
    loss = model(**inputs).loss
    assert torch.equal(model(**inputs | {"position_ids": inputs["position_ids"][1:]}).loss, loss)
    with pytest.raises(ValueError, match=r"needs position_ids \[4, 1, T\]"):
        model(**inputs | {"position_ids": inputs["position_ids"][0]})


def test_slots_without_pictures():
    model = trainable("llava")
    inputs = packed("llava", model.config, five_samples("llava", tiny_model("llava")))
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="there are no pictures"):
        model(**inputs)


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_a_dummy_picture_gives_zeros(name):
    samples = five_samples(name, tiny_model(name))
    text = [sample for sample in samples if not sample.vision]
    model = trainable(name)
    model(**packed(name, model.config, text)).loss.backward()
    without = gradients_of(model)
    model.zero_grad()
    inputs = packed(name, model.config, text) | join_pictures(name, samples[:1])
    model(**inputs).loss.backward()
    parts, dummy = find_parts(model), gradients_of(model)
    for name_, parameter in model.named_parameters():
        if name_.startswith(parts.unused):
            assert parameter.grad is None
        elif name_.startswith(parts.vision + parts.projector):
            assert not dummy[name_].any(), name_
        else:
            assert torch.equal(dummy[name_], without[name_]), name_


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_a_tower_on_one_picture_at_a_time(name):
    model = trainable(name)
    inputs = packed(name, model.config, five_samples(name, tiny_model(name)))
    model(**inputs).loss.backward()
    expected = gradients_of(model)
    model.zero_grad()
    modules = find_parts(model).tiled(model)
    assert bool(modules) == (name in ONE_BY_ONE)
    for module in modules:
        split_tiles(module, 1)
    model(**inputs).loss.backward()
    check_gradients(gradients_of(model), expected)


@pytest.mark.parametrize("name", CASES)
def test_parts(name):
    own = tiny_model(name)
    _, gradients = reference(own, five_samples(name, own))
    with torch.device("meta"):
        model = build(tiny_config(name))
    parts = find_parts(model)
    assert len(model.get_submodule(parts.language_blocks)) == 2
    assert not set(parts.vision) & set(parts.projector)
    if name in TEXT_ONLY:
        assert (parts.vision_blocks, parts.vision, parts.projector, parts.unused) == (None, (), (), ())
    else:
        assert parts.vision_blocks is not None
        assert len(model.get_submodule(parts.vision_blocks)) == (3 if name == "llava" else 2)
        assert parts.vision
        assert parts.projector
    adapted = [model.get_submodule(place) for place in resolve_targets(model, parts.lora_targets)]
    language = list(model.get_submodule(parts.language_blocks).modules())
    linear = [module for module in language if isinstance(module, torch.nn.Linear)]
    assert {id(module) for module in adapted} == {id(module) for module in linear}
    names = {parameter for parameter, _ in model.named_parameters()}
    assert {
        parameter for parameter in names if parameter.startswith(parts.unused)
    } == names - gradients.keys()


@pytest.mark.parametrize("name", CASES)
def test_buffers_after_allocation(name):
    with torch.device("meta"):
        model = build(tiny_config(name))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(3)
    init_buffers(model)
    assert all((parameter == 3).all() for parameter in model.parameters())
    expected = dict(build(tiny_config(name)).named_buffers())
    assert dict(model.named_buffers()).keys() == expected.keys()
    for buffer, values in model.named_buffers():
        assert torch.equal(values, expected[buffer]), buffer


@pytest.mark.parametrize("name", CASES)
def test_weights_are_saved_and_loaded_in_the_form_of_transformers(name, tmp_path):
    model = build(tiny_config(name))
    for buffer in persistent_buffers(model).values():
        buffer.normal_()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    own = dict(model.named_parameters()) | persistent_buffers(model)
    with torch.device("meta"):
        blank = build(tiny_config(name))
    assert_same(converted(saved(blank, shapes_of(own)), own), stored)
    assert_same(converted(loaded(blank, shapes_of(stored)), stored), own)
    stored = as_published(name, stored)
    found = loaded(blank, shapes_of(stored))
    assert_same(converted(found, stored), own)
    for conversion in found:  # the rows of a rank, from no more of a list of experts than it needs
        for parameter, shape in conversion.results.items():
            read = set()
            rows = (slice(shape[0] // 2, shape[0]), *map(slice, shape[1:]))
            part = conversion.convert(lambda key: read.add(key) or stored[key], rows)[parameter]  # noqa: B023
            assert torch.equal(part, own[parameter][rows])
            if "experts" in parameter and len(conversion.sources) > 1:
                assert len(read) == len(conversion.sources) // 2


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def converted(conversions: list[Conversion], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    pairs = [pair for c in conversions for pair in c.convert(tensors.__getitem__).items()]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("name", CASES)
def test_other_calls_are_the_classs_own(name):
    own, model = tiny_model(name), trainable(name).eval()
    sample = five_samples(name, own)[0]
    arguments = own_arguments(own, sample)
    with torch.no_grad():
        expected, actual = own(**arguments), model(**arguments)
        torch.testing.assert_close(actual.loss, expected.loss)
        torch.testing.assert_close(actual.logits, expected.logits)
        del arguments["labels"]
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**arguments, **options), own.generate(**arguments, **options))


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3", "llama_dynamic"])
def test_recomputed_blocks_and_chunked_losses(name):
    samples = five_samples(name, tiny_model(name))
    model = trainable(name)
    inputs = packed(name, model.config, samples)
    model(**inputs).loss.backward()
    expected = gradients_of(model)

    model.zero_grad()
    model.loss_function = chunked_cross_entropy(8)
    for block in model.get_submodule(find_parts(model).language_blocks):
        forward = block.forward
        block.forward = lambda *args, forward=forward, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, **kwargs
        )
    model(**inputs | {"num_items_in_batch": None}).loss.backward()
    check_gradients(gradients_of(model), expected)


def test_a_prepared_model_can_be_copied():
    model = trainable("qwen3")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    inputs = packed("qwen3", model.config, five_samples("qwen3", model))
    assert model(**inputs).loss != twin(**inputs).loss


def one_rank_has_a_dummy(name: str) -> None:
    """On two ranks, of which one has text and a dummy picture: the gradients of one process."""
    torch.distributed.init_process_group("gloo")
    rank, own = torch.distributed.get_rank(), tiny_model(name)
    samples = five_samples(name, own)
    _, gradients = reference(own, samples)
    with torch.device("meta"):
        model: Any = build(tiny_config(name))
    prepare_for_training(model)
    parts = find_parts(model)
    groups = []
    for blocks in (parts.vision_blocks, parts.language_blocks):
        assert blocks is not None
        for block in model.get_submodule(blocks):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
            groups.append(fully_shard(block))
    for group in (*groups, fully_shard(model)):
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)
    model.to_empty(device="cpu")
    init_buffers(model)
    weights = own.state_dict()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            whole = weights[parameter_name]
            parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
    for buffer_name, buffer in own.named_buffers():
        assert torch.equal(model.get_buffer(buffer_name), buffer)
    text = [sample for sample in samples if not sample.vision]
    pictures = [sample for sample in samples if sample.vision]
    inputs = packed(name, model.config, (pictures, text)[rank])
    if rank == 1:
        inputs |= join_pictures(name, pictures[:1])
    model.train()(**inputs).loss.backward()
    check_gradients({n: g.full_tensor() for n, g in gradients_of(model).items()}, gradients)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5", "llava", "gemma3"])
def test_one_rank_has_a_dummy_picture(name):
    tiny_model(name)  # before forking
    run_ranks(2, one_rank_has_a_dummy, name)


def test_a_long_sample_does_not_change_later_frequencies():
    model = trainable("llama_dynamic").eval()
    samples = five_samples("llama_dynamic", tiny_model("llama_dynamic"))
    shorter, longer = samples[1], samples[4]  # both beyond the positions of the default frequencies
    alone_first = model(**alone(shorter)).logits[0]
    row = model(**packed("llama_dynamic", model.config, [longer, shorter])).logits[0]
    torch.testing.assert_close(row[len(longer.input_ids) :], alone_first, rtol=0, atol=1e-6)
    assert torch.equal(model(**alone(shorter)).logits[0], alone_first)
