"""Blocks as compiled code: torch.compile of every block's forward, tried before a run depends on it.

Input: the model on the meta device, before checkpointing and sharding. Output: its vision and language blocks
with a compiled forward; or, where that fails on some rank, as they were, and a sentence:

    compile_blocks(model, parts, device, torch.bfloat16)
    # warning: model.layers cannot be compiled and run as they are: No working C++ compiler found …

Blocks of a kind share their code. It is made for rows of any length, so no other length makes more: there are
parts before and behind the attention, and once more each for a row with no image slot, with one, and of a
single sample. Attention stays out: it is one kernel anyway, and would be compiled for every way to cut a row.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from trainer.distributed import log
from trainer.models import Parts, example_block_inputs


def compile_blocks(model: PreTrainedModel, parts: Parts, device: torch.device, dtype: torch.dtype) -> None:
    """Compile the blocks of vision and language, each kind if a trial of it works on all ranks.

    dtype: what blocks compute in. The trial is a block of its own, without weights, so nothing that is
    sharded or waits for other ranks is in the middle of anything when it fails.
    """
    language_inputs, vision_inputs = example_block_inputs(model.config, device, dtype)
    for name, inputs in ((parts.vision_blocks, vision_inputs), (parts.language_blocks, language_inputs)):
        blocks = list(model.get_submodule(name).children())
        reason = _first_of_all_ranks(_why_not(blocks[0], inputs, device, dtype))
        if reason:
            log(f"warning: {name} cannot be compiled and run as they are: {reason}")
            continue
        for block in blocks:
            block.forward = _compiled(block)


def _compiled(block: nn.Module) -> Callable[..., Tensor]:
    """The block's own forward: what transformers wraps around it is one function for all kinds of blocks, and
    torch makes only so many versions of a function."""
    return torch.compile(inspect.unwrap(type(block).forward).__get__(block), dynamic=True)


def _why_not(
    block: nn.Module, inputs: tuple[Any, ...], device: torch.device, dtype: torch.dtype
) -> str | None:
    """Compile a copy of the block, forward and, if it trains, backward: None, or what went wrong."""
    trial = copy.deepcopy(block).to_empty(device=device).to(dtype)
    trains = any(parameter.requires_grad for parameter in trial.parameters())
    try:
        with torch.set_grad_enabled(trains):
            output = _compiled(trial)(inputs[0].requires_grad_(trains), *inputs[1:])
        if trains:
            output.sum().backward()
    except TorchDynamoException as error:
        return " ".join(str(error).split("\n\n")[0].split())
    return None


def _first_of_all_ranks(reason: str | None) -> str | None:
    """The first rank's reason that has one, so that all ranks run the same code."""
    reasons: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next((reason for reason in reasons if reason), None)
