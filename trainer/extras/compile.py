"""torch.compile of every block's forward.

Input: the model on the meta device, before checkpointing and sharding. Output: its vision and language blocks
with a compiled forward.

Blocks of a kind share their code. It is compiled for rows of any length, so that a new length does not
compile again. Attention and the linear layers are not compiled: they are matrix products anyway, and would be
compiled again for every packing of a row and every place of an image. What is compiled are the norms, the
rotation and the activation between them.
"""

import inspect

import torch
from torch import nn
from transformers import PreTrainedModel

from trainer.models import Parts


def compile_blocks(model: PreTrainedModel, parts: Parts) -> None:
    """Compile the blocks of vision and language; compilation happens when they first run."""
    for blocks in parts.blocks(model):
        for block in blocks:
            compile_block(block)


def compile_block(block: nn.Module) -> None:
    """Compile the block's own forward: transformers' wrapper around it is one function for all kinds of
    blocks, and torch limits the number of compiled versions of a function.
    """
    block.forward = torch.compile(inspect.unwrap(type(block).forward).__get__(block), dynamic=True)
