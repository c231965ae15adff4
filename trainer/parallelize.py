"""One function that turns a model into its sharded form: checkpointing → tiles → fully_shard.

The order matters. Checkpointing wraps a block's `forward` only, so parameter names stay; a vision block runs
that a few tiles at a time; `fully_shard` hooks the outside of both, so the gather of a block's parameters is
not done twice when a block is computed again, and happens once however many tiles a rank has.

    model = parallelize(build_model(config), mesh, parts, ...)    # on the meta device: nothing allocated yet
    model.to_empty(device="cuda"); load_weights(model, folder)    # each rank allocates and reads its part

With 2 ranks every parameter becomes a DTensor sharded along its first dimension; a block of 100 M parameters
costs 50 M a rank, and 100 M more in the compute dtype while it runs.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from trainer.models import Parts


def checkpoint_activations(block: nn.Module) -> None:
    """Keep only the block's input for the backward pass and run its forward again there."""
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def split_tiles(module: nn.Module, tiles: int) -> None:
    """Run the module's forward on at most `tiles` rows of its first argument at a time.

    Rows do not see each other in it. All intermediate results then are of so many rows; what goes in and out
    is whole. Calling the model's whole tower several times would bound those too, but every call gathers
    parameters, and ranks with other numbers of images would wait for each other for ever.
    """
    forward = module.forward

    def forward_in_parts(rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.cat([forward(part, *args, **kwargs) for part in rows.split(tiles)])

    module.forward = forward_in_parts


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    parts: Parts,
    *,
    bf16: bool,
    gradient_checkpointing: bool,
    vision_micro_batch: int | None = None,
    shard_frozen: bool = True,
) -> Any:
    """Shard `model` over `mesh`, a group for every vision and language block and one for all the rest.

    bf16: parameters are gathered and used in bfloat16; their shards, the gradients' reduction and the
    optimizer keep the stored dtype. Gradients are summed over ranks, never averaged: the loop divides the
    loss by the number of supervised tokens of all ranks itself.

    vision_micro_batch: images or tiles that the patch embedding and each vision block compute at a time; None
    for all of a micro-batch.

    shard_frozen False, for adapters: frozen parameters stay whole on every rank, in the compute dtype, and
    are never gathered. All that trains is one group: gathered once, its gradients reduced once.

    Returns the same object, which is now an `FSDPModule` as well as a model; no static type is both.
    """
    vision_blocks = list(model.get_submodule(parts.vision_blocks).children())
    blocks = [*vision_blocks, *model.get_submodule(parts.language_blocks).children()]
    if gradient_checkpointing:
        for block in blocks:
            checkpoint_activations(block)
    if vision_micro_batch is not None:
        for module in (model.get_submodule(parts.vision_embeddings), *vision_blocks):
            split_tiles(module, vision_micro_batch)
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
