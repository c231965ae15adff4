"""One function that turns a model into its sharded form: activation checkpointing → compile → fully_shard.

The order matters. Checkpointing wraps a block's `forward` only, so parameter names stay; compile then sees a
whole checkpointed block; `fully_shard` hooks the outside of both, so the gather of a block's parameters is
neither compiled nor recomputed twice.

    model = parallelize(build_model(config), mesh, parts, ...)    # on the meta device: nothing allocated yet
    model.to_empty(device="cuda"); load_weights(model, folder)    # each rank allocates and reads its part

With 2 ranks every parameter becomes a DTensor sharded along its first dimension; a block of 100 M parameters
costs 50 M a rank, and 100 M more in the compute dtype while it runs.
"""

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from trainer.models import Parts


def checkpoint_activations(block: nn.Module) -> None:
    """Keep only the block's input for the backward pass and run its forward again there."""
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    parts: Parts,
    *,
    bf16: bool,
    gradient_checkpointing: bool,
    compile_blocks: bool = False,
    shard_frozen: bool = True,
) -> Any:
    """Shard `model` over `mesh`, a group for every vision and language block and one for all the rest.

    bf16: parameters are gathered and used in bfloat16; their shards, the gradients' reduction and the
    optimizer keep the stored dtype. Gradients are summed over ranks, never averaged: the loop divides the
    loss by the number of supervised tokens of all ranks itself.

    shard_frozen False, for adapters: frozen parameters stay whole on every rank, in the compute dtype, and
    are never gathered. All that trains is one group: gathered once, its gradients reduced once.

    Returns the same object, which is now an `FSDPModule` as well as a model; no static type is both.
    """
    blocks = [
        block
        for path in (parts.vision_blocks, parts.language_blocks)
        for block in model.get_submodule(path).children()
    ]
    if gradient_checkpointing:
        for block in blocks:
            checkpoint_activations(block)
    if compile_blocks:
        for block in blocks:
            block.compile()
    compute_dtype, reduce_dtype = (torch.bfloat16, torch.float32) if bf16 else (None, None)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype)
    # Inside the model nothing is cast on entry: a block's rotary cosines and sines stay in float32.
    inner = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    whole: set[nn.Parameter] = set()
    if not shard_frozen:
        used = compute_dtype or torch.float32
        whole = {p for p in model.parameters() if not p.requires_grad and p.dtype == used}
        blocks = []
    sharded = [fully_shard(block, mesh=mesh, mp_policy=inner) for block in blocks]
    sharded.append(fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=whole))
    for module in sharded:
        # A plain sum is exact for any number of ranks; an average would have to be undone in the loss.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return sharded[-1]
