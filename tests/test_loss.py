"""The chunked loss is the plain one: values, gradients, and nothing supervised."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer.loss import chunked_token_losses


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_neither_loss_nor_gradients(chunk):
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False)
    hidden, targets = torch.randn(7, 16, requires_grad=True), torch.randint(50, (7,))
    plain = F.cross_entropy(head(hidden), targets, reduction="none")
    expected = torch.autograd.grad(plain.sum() / 7, [hidden, head.weight])
    losses = chunked_token_losses(chunk)(hidden, targets, head)
    found = torch.autograd.grad(losses.sum() / 7, [hidden, head.weight])
    torch.testing.assert_close(losses, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_nothing_supervised_gives_no_loss_and_gradients_of_exactly_zero():
    head = nn.Linear(16, 50, bias=False)
    hidden = torch.randn(0, 16, requires_grad=True)
    losses = chunked_token_losses(4)(hidden, torch.empty(0, dtype=torch.int64), head)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_losses_are_float32_under_bfloat16():
    head = nn.Linear(16, 50, bias=False).bfloat16()
    losses = chunked_token_losses(4)(torch.randn(5, 16).bfloat16(), torch.randint(50, (5,)), head)
    assert losses.dtype == torch.float32
