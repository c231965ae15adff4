"""Parallelize a model: compile → activation checkpointing → tiles → fully_shard.

The order matters. Only a block's `forward` is compiled. Checkpointing wraps that, so parameter names do not
change; a vision block runs it a few tiles at a time; `fully_shard` hooks the outermost call, so a block's
parameters are not gathered twice when the block is recomputed, and once however many tiles a rank has.

    model = parallelize(build_model(config), mesh, parts, config) # on the meta device: nothing allocated yet
    allocate(model, device, cpu_offload=False)                    # each rank its shards
    load_weights(model, folder)

With 2 ranks every parameter becomes a DTensor sharded along its first dimension; a block of 100 M parameters
costs 50 M a rank, and 100 M more in the compute dtype while it runs. On a mesh of (replicate, shard) = (4, 8)
a parameter is sharded over 8 ranks, and 4 ranks hold the same shard.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operator, named below
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from trainer.config import Config
from trainer.models import Parts

aten = torch.ops.aten
MATRIX_PRODUCTS: list[Any] = [
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.torch_attn._varlen_attn.default,  # of packed rows on CUDA
]
"""Outputs that selective checkpointing saves: nearly all of a block's work, none quadratic in the length."""


def checkpoint_activations(block: nn.Module, selective: bool) -> None:
    """Save only the block's input for the backward pass, selective: its matrix products too, and recompute
    the rest there."""
    options = {}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, MATRIX_PRODUCTS)
        for module in block.modules():
            if getattr(module, "inplace", False):  # it would modify what is saved
                module.__dict__["inplace"] = False
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **options)


def split_tiles(module: nn.Module, tiles: int) -> None:
    """Run the module's forward on at most `tiles` rows of its first argument at a time.

    The module must treat rows independently. This bounds the intermediate results; input and output are
    whole. Calling the whole tower several times would bound those too, but every call gathers parameters, and
    ranks with different numbers of images would deadlock.
    """
    forward = module.forward

    def forward_in_chunks(rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.cat([forward(chunk, *args, **kwargs) for chunk in rows.split(tiles)])

    module.forward = forward_in_chunks


def allocate(model: nn.Module, device: torch.device, cpu_offload: bool) -> None:
    """Allocate a sharded model without initialising it: parameters on `device` or the host, buffers on
    `device`."""
    model.to_empty(device="cpu" if cpu_offload else device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def set_communication(model: Any, config: Config, is_last: bool) -> None:
    """Set, before a micro-batch, whether its backward pass reduces gradients and reshards parameters.

    is_last: of the step's micro-batches. Before the last one, every rank keeps its own whole gradient in
    float32, or, with `reduce_every_micro_batch`, a shard of the sum (over its node only, where nodes
    replicate the model). Without `reshard_after_forward` parameters are gathered once a step.
    """
    reduces = is_last or config.reduce_every_micro_batch
    for group in model.groups:
        # FSDP cannot defer the reduction of a group that never ran, such as a frozen tower on text alone.
        if group.trains:
            group.set_requires_gradient_sync(reduces, recurse=False)
        group.set_requires_all_reduce(is_last, recurse=False)
        group.set_reshard_after_backward(is_last or config.reshard_after_forward, recurse=False)


def reshard(model: Any) -> None:
    """Free all gathered parameters: of what a forward pass keeps for a backward pass that does not follow."""
    for group in model.groups:
        group.reshard()


@contextmanager
def gathered(model: Any, whole: bool) -> Iterator[None]:
    """Within it every rank has the whole model, so that forward passes have no collectives; whole False: as
    always."""
    groups = model.groups if whole else []
    for group in groups:
        group.unshard()
        group.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for group in groups:
            group.set_reshard_after_forward(group.reshards_after_forward, recurse=False)
            group.reshard()


def gather_ahead(blocks: Sequence[Any]) -> None:
    """Prefetch the next block's parameters while a block computes; the backward pass already does so."""
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])


def parallelize(model: PreTrainedModel, mesh: DeviceMesh, parts: Parts, config: Config) -> Any:
    """Compile, checkpoint and shard `model` over `mesh`: a group for every vision and language block, one for
    the token embeddings, and one for the rest.

    mesh: one dimension, or (replicate, shard). The flags are explained in trainer/config.py.

    With bf16, parameters are gathered and used in bfloat16; their shards, the gradients' reduction and the
    optimizer keep the stored dtype. Gradients are summed over ranks, never averaged: the loop itself divides
    the loss by the number of supervised tokens of all ranks. With sharding "none" frozen parameters are whole
    on every rank, in the compute dtype, and never gathered; all trained parameters are one group, gathered
    once, its gradients reduced once. Without `shard_frozen_vision` the vision tower alone is whole.

    Returns the same object, which is now an `FSDPModule` as well as a model; no static type is both. Its
    `groups` are the modules that are gathered as one each, itself the last.
    """
    language_blocks, vision_blocks = parts.blocks(model)
    vision_trains = any(p.requires_grad for n, p in model.named_parameters() if n.startswith(parts.vision))
    if config.compile:
        from trainer.extras.compile import compile_blocks

        compile_blocks(model, parts)
    vision_checkpointing = config.vision_checkpointing
    if vision_checkpointing is None:
        vision_checkpointing = config.gradient_checkpointing
    for blocks, mode in (
        (language_blocks, config.gradient_checkpointing),
        (vision_blocks, vision_trains and vision_checkpointing),
    ):
        for block in blocks if mode else ():
            checkpoint_activations(block, selective=mode == "selective")
    if config.vision_micro_batch is not None:
        for module in parts.tiled(model):
            split_tiles(module, config.vision_micro_batch)

    compute_dtype, reduce_dtype = (torch.bfloat16, torch.float32) if config.bf16 else (None, None)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype)
    # Inside the model inputs are not cast: a block's rotary cosines and sines stay in float32.
    inner = dataclasses.replace(policy, cast_forward_inputs=False)
    offload = OffloadPolicy()
    if config.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")

    def shard(module: Any, mp_policy: MixedPrecisionPolicy, reshards: bool, **options: Any) -> Any:
        options |= {"mesh": mesh, "mp_policy": mp_policy, "offload_policy": offload}
        fully_shard(module, reshard_after_forward=reshards, **options)
        module.reshards_after_forward = reshards
        module.trains = any(parameter.requires_grad for parameter in module.parameters())
        return module

    whole: set[nn.Parameter] = set()
    shard_frozen = config.sharding != "none"
    if not shard_frozen:
        used = compute_dtype or torch.float32
        whole = {p for p in model.parameters() if not p.requires_grad and p.dtype == used}
        vision_blocks, language_blocks = [], []
    elif not config.shard_frozen_vision:
        whole = {p for name, p in model.named_parameters() if name.startswith(parts.vision)}
        vision_blocks = []
    for block in vision_blocks:
        # The backward pass never reaches a frozen tower, so it need not stay gathered.
        shard(block, inner, reshards=config.reshard_after_forward or not vision_trains)
    for block in language_blocks:
        shard(block, inner, reshards=config.reshard_after_forward)
    modules: list[Any] = [*vision_blocks, *language_blocks]
    embeddings: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    is_tied = output.weight is embeddings.weight
    if shard_frozen and type(embeddings) is nn.Embedding and not is_tied:
        # Its gradient does not need the weight, which is therefore gathered once, in the forward pass.
        modules.append(shard(embeddings, inner, reshards=True))
        modules[-1].set_unshard_in_backward(False)
    # Its parameters are needed again at once, by the backward pass.
    sharded = shard(model, policy, reshards=False, ignored_params=whole)
    modules.append(sharded)
    if config.forward_prefetch:
        gather_ahead(language_blocks)
        gather_ahead(vision_blocks)
    for module in modules:
        # A plain sum is exact for any number of ranks; an average would have to be undone in the loss.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if mesh.device_type == "cpu" and find_spec("trainer.extras"):
        from trainer.extras.gloo import GlooAllGather, GlooReduceScatter

        for module in modules:
            module.set_custom_all_gather(GlooAllGather())
            module.set_custom_reduce_scatter(GlooReduceScatter())
    sharded.groups = modules
    return sharded
