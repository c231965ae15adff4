"""Cross-entropy over supervised positions, in chunks: the sum to train on, and a value for each token.

Input: hidden states of the supervised positions [N, D], their targets [N], and the output layer.
Output: the sum of the losses, with the graph, and the losses [N] without one, both in float32. The loop
divides the sum once, by the number of supervised tokens of the global batch, so any split into micro-batches
and ranks gives the same loss:

    outputs = model(**micro_batch.inputs)
    (outputs.loss / num_supervised).backward()        # num_supervised: of the global batch
    outputs.token_losses                              # [N], for the metrics

Only `chunk_tokens` rows of logits exist at a time, and none outlives its chunk: the gradients are formed in
the forward pass, where the logits are, and the backward pass only scales them. With a vocabulary of 92,544
and chunks of 1,024 tokens that is 0.38 GB in float32, whatever the length of the batch, and no product is
computed twice.

With z = W h and p = softmax(z), token i's loss is log Σ exp z − z[target], and the gradients of the sum are

    d loss / d z = p − onehot(target)      d loss / d h = (p − onehot) W      d loss / d W = (p − onehot) hᵀ
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

ROWS_AT_A_TIME = 8192
"""Rows of the output layer whose gradient is accumulated in float32 at a time."""


def token_losses(hidden: Tensor, targets: Tensor, lm_head: nn.Module) -> Tensor:
    """Cross-entropy of each position, in float32 whatever the compute dtype is.

    hidden [N, D], targets [N] int64, lm_head: D → vocabulary; returns [N].
    """
    return F.cross_entropy(lm_head(hidden).float(), targets, reduction="none")


def losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int,
    *,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses [N] float32, and the gradients of their sum for hidden [N, D] and weight [V, D].

    A gradient that is not requested is None. The products run in the dtype of `weight`; its gradient is
    summed over chunks in float32: in bfloat16, what a late chunk adds would be lost in the rounding.
    """
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    hidden_gradient = torch.empty_like(hidden) if for_hidden else None
    sum_dtype = weight.dtype if len(hidden) <= chunk_tokens else torch.float32
    weight_gradient = torch.zeros_like(weight, dtype=sum_dtype) if for_weight else None
    for begin in range(0, len(hidden), chunk_tokens):
        rows = slice(begin, begin + chunk_tokens)
        h, target = hidden[rows], targets[rows, None]
        logits = _product(h, weight.T)  # [n, V]
        log_sum = logits.logsumexp(1, keepdim=True)
        losses[rows] = (log_sum - logits.gather(1, target)).squeeze(1)
        gradient = logits.sub_(log_sum).exp_()  # the probabilities
        gradient.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
        gradient = gradient.to(weight.dtype)
        if hidden_gradient is not None:
            torch.mm(gradient, weight, out=hidden_gradient[rows])
        if weight_gradient is not None:
            _add_product(weight_gradient, gradient.T, h)
    return losses, hidden_gradient, None if weight_gradient is None else weight_gradient.to(weight.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32; CUDA's matrix products write it themselves."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the dtype of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # one block of rows at a time, so that the product needs little memory
        for block, rows in zip(total.split(ROWS_AT_A_TIME), a.split(ROWS_AT_A_TIME), strict=True):
            block += rows @ b


class _SumWithGradients(torch.autograd.Function):
    """`losses_and_gradients` as an autograd function; backward scales the gradients in place, once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        losses, *ctx.gradients = losses_and_gradients(
            hidden,
            weight,
            targets,
            chunk_tokens,
            for_hidden=ctx.needs_input_grad[0],
            for_weight=ctx.needs_input_grad[1],
        )
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the loss can run backward only once: its gradients are scaled in place")
        for_hidden, for_weight = (None if g is None else g.mul_(grad_outputs[0]) for g in gradients)
        return for_hidden, for_weight, None, None


def chunked_cross_entropy(chunk_tokens: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The model's `loss_function`: (sum, token losses [N]), `chunk_tokens` rows of logits at a time.

    N = 0 gives a zero that is still connected to the graph, so a rank without a supervised token runs the
    same collectives as the others and adds exact zeros to every gradient. For an output layer that is more
    than a matrix (one with an adapter), the backward pass recomputes each chunk's forward instead.
    """

    def loss_function(
        hidden: Tensor, targets: Tensor, lm_head: nn.Module, num_items_in_batch: object = None
    ) -> tuple[Tensor, Tensor]:
        assert num_items_in_batch is None, "the loop divides; see trainer/loss.py"
        compute: Callable[..., Any] = token_losses
        if torch.is_grad_enabled():
            if type(lm_head) is nn.Linear and lm_head.bias is None:
                return _SumWithGradients.apply(hidden, lm_head.weight, targets, chunk_tokens)
            if len(hidden) > chunk_tokens:
                compute = partial(checkpoint, token_losses, use_reentrant=False, preserve_rng_state=False)
        chunks = zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
        losses = torch.cat([compute(h, t, lm_head) for h, t in chunks])
        return losses.sum(), losses.detach()

    return loss_function
