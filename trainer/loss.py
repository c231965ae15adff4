"""Cross-entropy over supervised positions, in chunks, one value a token.

Input: hidden states of the supervised positions [N, D], their targets [N], and the output layer.
Output: losses [N] in float32. The loop sums them and divides once, by the number of supervised tokens of the
global batch, so any split into micro-batches and ranks gives the same loss:

    losses = model(**micro_batch.inputs).loss         # [N]: one per supervised token
    (losses.sum() / num_supervised).backward()        # num_supervised: of the global batch

Only `chunk_tokens` rows of logits exist at a time, and none outlives its chunk: the backward pass computes
them again. With a vocabulary of 92,544 and chunks of 1,024 tokens that is 0.38 GB in float32, whatever the
length of the batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def token_losses(hidden: Tensor, targets: Tensor, lm_head: nn.Module) -> Tensor:
    """Cross-entropy of each position.

    hidden [N, D], targets [N] int64, lm_head: D → vocabulary. Returns [N] float32; the log-sum-exp is taken
    in float32 whatever the compute dtype is.
    """
    return F.cross_entropy(lm_head(hidden).float(), targets, reduction="none")


def chunked_token_losses(chunk_tokens: int) -> Callable[..., Tensor]:
    """The model's `loss_function`: `token_losses`, `chunk_tokens` rows of logits at a time.

    N = 0 gives an empty vector that still hangs on the graph, so a rank without a supervised token runs the
    same collectives as the others and adds exact zeros to every gradient.
    """

    def loss_function(
        hidden: Tensor, targets: Tensor, lm_head: nn.Module, num_items_in_batch: object = None
    ) -> Tensor:
        assert num_items_in_batch is None, "the loop divides; see trainer/loss.py"
        if not torch.is_grad_enabled() or len(hidden) <= chunk_tokens:
            chunks = [
                token_losses(h, t, lm_head)
                for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
            ]
        else:
            chunks = [
                checkpoint(token_losses, h, t, lm_head, use_reentrant=False, preserve_rng_state=False)
                for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
            ]
        return torch.cat(chunks)

    return loss_function
