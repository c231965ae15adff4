"""What makes a step faster or smaller changes no number: each is compared with the plain run over ten steps.

The plain run: one rank, one micro-batch, float32, nothing computed twice, every part training;
tests/same_training.py says how exactly two runs can agree.
"""

import collections
import functools
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fault_cases import STOPPED, main_stopped_after
from tests.same_training import assert_same_training, sharded, train
from tests.tiny import run_ranks
from trainer.distributed import device_mesh, start
from trainer.extras.gloo import GlooAllGather
from trainer.models.xcomposer2.modeling_xcomposer2 import InternLMXComposer2ForCausalLM
from trainer.parallelize import MATRIX_PRODUCTS


@pytest.fixture(scope="module")
def world(same_world):
    return same_world


@pytest.mark.parametrize(
    ("ranks", "accumulation", "flags"),
    [
        (1, 1, "--gradient_checkpointing selective"),
        (2, 2, "--gradient_checkpointing selective --packing True --max_length 120"),
        (1, 1, "--gradient_checkpointing True --vision_checkpointing False"),
        (1, 1, "--vision_checkpointing selective"),
        (2, 2, "--reshard_after_forward False"),
        (2, 1, "--reshard_after_forward False --gradient_checkpointing True"),
        (2, 2, "--reduce_every_micro_batch True"),
        (2, 1, "--forward_prefetch True"),
    ],
)
def test_checkpointing_gathering_and_reducing_change_nothing(world, ranks, accumulation, flags):
    name = f"speed-{ranks}-{accumulation}-{flags.replace(' ', '').strip('-')}"
    train(world, name, ranks, accumulation, "data/data.txt", *flags.split())
    assert_same_training(world, name)


def on_nodes_of_two(arguments, stop_after=0):
    """The run as torchrun starts it where every machine has two ranks; asked to stop after a step, or not."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return main_stopped_after(stop_after, arguments)


def test_nodes_that_hold_the_same_shards_train_as_one_rank_does(world):
    train(world, "hybrid", 4, 1, "data/data.txt", "--sharding", "hybrid", run=on_nodes_of_two)
    assert_same_training(world, "hybrid")


@pytest.mark.parametrize("reduce_every", ["True", pytest.param("False", marks=pytest.mark.slow)])
def test_nodes_that_accumulate_stop_and_go_on_train_as_one_rank_does(world, reduce_every):
    """Cut after step 5 of 10; the checkpoint holds what two of the four ranks wrote."""
    if not (world / "eight").exists():
        train(world, "eight", 1, batch=8)
    name = f"hybrid-{reduce_every}"
    flags = ("--sharding", "hybrid", "--reduce_every_micro_batch", reduce_every)
    stopped = functools.partial(on_nodes_of_two, stop_after=5)
    train(world, name, 4, 2, "data/data.txt", *flags, batch=8, run=stopped, status=STOPPED)
    assert (world / name / "checkpoint-5").is_dir()
    train(world, name, 4, 2, "data/data.txt", *flags, batch=8, run=on_nodes_of_two)
    assert_same_training(world, name, "eight")


def test_nodes_that_hold_the_same_adapters_train_as_one_rank_does(world):
    lora = ["--use_lora", "--lora_r", "4", "--lora_dropout", "0", "--vision_checkpointing", "selective"]
    train(world, "lora-1", 1, 1, "data/data.txt", *lora)
    train(world, "lora-4", 4, 1, "data/data.txt", *lora, "--sharding", "hybrid", run=on_nodes_of_two)
    assert_same_training(world, "lora-4", "lora-1", weights="adapter_model.safetensors")


def test_flags_that_the_machine_cannot_follow_are_refused_before_training(world):
    with pytest.raises(AssertionError, match="no accelerator here") as refused:
        train(world, "refused", 1, 1, "data/data.txt", "--cpu_offload", "True")
    assert "statuses [2]" in str(refused.value)
    with pytest.raises(AssertionError, match="3 ranks are not a whole number of nodes of 2"):
        train(world, "refused", 3, 1, "data/data.txt", "--sharding", "hybrid", run=on_nodes_of_two)
    assert not (world / "refused").exists()


def inputs(rank=0, samples=2, images=True):
    """Samples of one 70-pixel image (25 slots) and some words each, or of words alone."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 300, (samples, 40), generator=generator)
    im_mask = torch.zeros_like(ids, dtype=torch.bool)
    im_mask[:, 2:27] = images
    return {
        "input_ids": ids,
        "im_mask": im_mask,
        "labels": ids.masked_fill(im_mask, -100),
        "pixel_values": torch.randn(samples, 3, 70, 70, generator=generator) if images else None,
    }


def assert_same_gradients(model, plain, ranks_with_images=range(4)):
    """The sharded model's gradients on all ranks against the sum of the plain model's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model(**inputs(rank, images=rank in ranks_with_images)).loss.backward()
    for each in range(world):
        plain(**inputs(each, images=each in ranks_with_images)).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and not name.endswith("k_proj.bias"):
            difference = (ours.grad.full_tensor() - theirs.grad).norm() / theirs.grad.norm().clamp(min=1e-3)
            assert difference < 1e-6, f"{name}: {difference}"


def gradients_of_a_tied_output_layer(folder):
    assert_same_gradients(*sharded(folder, tied=True))


def test_a_tied_output_layer_gets_the_gradients_of_both_its_uses(world):
    run_ranks(2, gradients_of_a_tied_output_layer, world / "model")


def embeddings_between_forward_and_backward(folder):
    model, _ = sharded(folder, reshard_after_forward=False)
    weight = model.get_input_embeddings().weight
    local, gathered = [], model.get_input_embeddings()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: local.append(isinstance(gathered.weight, DTensor)))
        layer.register_full_backward_hook(lambda *_: local.append(isinstance(gathered.weight, DTensor)))
    model(**inputs()).loss.backward()
    assert local == [True] * 4
    assert weight.grad is not None


def test_the_token_embeddings_are_gathered_for_their_lookup_alone(world):
    run_ranks(2, embeddings_between_forward_and_backward, world / "model")


def gradients_on_two_nodes(folder):
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    mesh = device_mesh(start(), hybrid=True)
    model, plain = sharded(folder, mesh=mesh)
    assert model.output.weight.placements == (Replicate(), Shard(0))
    assert model.output.weight.to_local().shape[0] == plain.output.weight.shape[0] // 2
    assert_same_gradients(model, plain)


def test_hybrid_shards_over_two_ranks_and_sums_over_four(world):
    run_ranks(4, gradients_on_two_nodes, world / "model")


def gradients_with_the_offload_policy(folder):
    assert_same_gradients(*sharded(folder, cpu_offload=True))


def test_the_offload_policy_changes_no_gradient(world):
    """On a CPU nothing moves, but shards and gradients take the policy's path."""
    run_ranks(2, gradients_with_the_offload_policy, world / "model")


def gradients_beside_a_rank_without_images(folder):
    model, plain = sharded(folder, frozen=("vit.",), shard_frozen_vision=False)
    assert not any(isinstance(parameter, DTensor) for parameter in model.vit.parameters())
    gathers, calls, gather = [], [], GlooAllGather.__call__

    def counted(self, *args, **kwargs):
        gathers.append(calls.count("begins") > calls.count("ends"))
        return gather(self, *args, **kwargs)

    GlooAllGather.__call__ = counted
    model.vit.register_forward_pre_hook(lambda *_: calls.append("begins"))
    model.vit.register_forward_hook(lambda *_: calls.append("ends"))
    assert_same_gradients(model, plain, ranks_with_images=[1])
    assert calls == ["begins", "ends"] * dist.get_rank(), "rank 0 has no image and skips the tower"
    # The root group, the token embeddings, and two blocks, which the backward pass gathers again.
    assert gathers == [False] * 6


def test_a_whole_frozen_tower_has_no_collectives(world):
    run_ranks(2, gradients_beside_a_rank_without_images, world / "model")


def kept_within(folder, frozen, expected):
    """How many tensors the graph keeps of the tower and of the projector; 0, or more than that."""
    model, _ = sharded(folder, frozen, gradient_checkpointing=True)
    kept, inside, calls = collections.Counter(), [], []
    for name in ("vit", "vision_proj"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
        module.register_forward_hook(lambda *_: inside.pop() and None)
    model.vit.vision_tower.vision_model.register_forward_hook(lambda *_: calls.append(1))

    def keep(tensor):
        kept.update(inside)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs(samples=3)).loss
    assert {name: kept[name] > 0 for name in ("vit", "vision_proj")} == expected, kept
    assert calls == [1], "three images are three rows of one call"
    loss.backward()


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        (("vit.", "vision_proj."), {"vit": False, "vision_proj": False}),
        (("vit.",), {"vit": False, "vision_proj": True}),
        ((), {"vit": True, "vision_proj": True}),
    ],
)
def test_frozen_vision_keeps_no_activations(world, frozen, expected):
    run_ranks(1, kept_within, world / "model", frozen, expected)


def test_partial_lora_is_computed_at_image_slots_alone(world):
    model = InternLMXComposer2ForCausalLM.from_pretrained(world / "model")
    with Products() as products:
        model(**inputs(samples=3))
    rank = model.config.plora("wqkv")[0]
    of_a = [rows for rows, inner, columns in products.shapes if columns == rank]
    of_b = [rows for rows, inner, columns in products.shapes if inner == rank]
    assert of_a == [75] * 10, "five layers of two blocks, the 25 slots of three images"
    assert of_b == [25] * 30, "an image at a time"


class Products(TorchDispatchMode):
    """Counts matrix products, attention's included; shapes: (rows, inner, columns) of the others."""

    def __init__(self):
        super().__init__()
        self.count, self.shapes = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in MATRIX_PRODUCTS
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.out):
            a, b = args[-2:]
            self.shapes.append((*a.shape, b.shape[1]))
        return function(*args, **(kwargs or {}))


def products_of_the_backward_pass(folder):
    counts, mesh = {}, device_mesh(start())
    for mode in (False, "selective", True):
        model, _ = sharded(folder, mesh=mesh, gradient_checkpointing=mode)
        with Products() as forward:
            loss = model(**inputs()).loss
        with Products() as backward:
            loss.backward()
        counts[mode] = backward.count
    assert counts["selective"] == counts[False]
    assert counts[True] > counts[False] + 0.8 * forward.count


def test_selective_checkpointing_computes_no_matrix_product_twice(world):
    run_ranks(1, products_of_the_backward_pass, world / "model")
