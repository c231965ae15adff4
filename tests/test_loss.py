"""The chunked loss is the plain one: values, gradients, and nothing supervised."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.loss import chunked_cross_entropy


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_neither_loss_nor_gradients(chunk):
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False)
    hidden, targets = torch.randn(7, 16, requires_grad=True), torch.randint(50, (7,))
    plain = F.cross_entropy(head(hidden), targets, reduction="none")
    expected = torch.autograd.grad(plain.sum() / 7, [hidden, head.weight])
    total, losses = chunked_cross_entropy(chunk)(hidden, targets, head)
    found = torch.autograd.grad(total / 7, [hidden, head.weight])
    torch.testing.assert_close(losses, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total, plain.sum(), rtol=1e-6, atol=1e-6)
    assert not losses.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_second_backward_pass_is_refused_rather_than_wrong():
    head = nn.Linear(16, 50, bias=False)
    total, _ = chunked_cross_entropy(3)(torch.randn(7, 16), torch.randint(50, (7,)), head)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the loss can run backward only once"):
        total.backward()


@pytest.mark.parametrize("frozen", ["output layer", "hidden states"])
def test_what_is_frozen_gets_no_gradient_and_the_other_gets_the_same(frozen):
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False).requires_grad_(frozen != "output layer")
    hidden = torch.randn(7, 16, requires_grad=frozen != "hidden states")
    targets = torch.randint(50, (7,))
    trained = hidden if frozen == "output layer" else head.weight
    (expected,) = torch.autograd.grad(F.cross_entropy(head(hidden), targets, reduction="sum"), trained)
    chunked_cross_entropy(3)(hidden, targets, head)[0].backward()
    torch.testing.assert_close(trained.grad, expected, rtol=1e-6, atol=1e-6)
    assert (head.weight.grad is None) == (frozen == "output layer")


def test_an_output_layer_with_an_adapter_trains_the_adapter():
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["head"], init_lora_weights=False)
    model = inject_adapter_in_model(config, nn.ModuleDict({"head": nn.Linear(16, 50, bias=False)}))
    head, hidden, targets = model["head"], torch.randn(7, 16, requires_grad=True), torch.randint(50, (7,))
    trained = [hidden, *(parameter for parameter in head.parameters() if parameter.requires_grad)]
    assert len(trained) == 3
    expected = torch.autograd.grad(F.cross_entropy(head(hidden), targets, reduction="sum"), trained)
    found = torch.autograd.grad(chunked_cross_entropy(3)(hidden, targets, head)[0], trained)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = [result] if isinstance(result, torch.Tensor) else list(result or ())
        self.elements = max([self.elements, *(x.numel() for x in results if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_logits_exist_than_those_of_a_chunk(dtype):
    head = nn.Linear(4, 5000, bias=False, dtype=dtype)
    hidden = torch.randn(400, 4, dtype=dtype, requires_grad=True)
    with LargestTensor() as largest:
        chunked_cross_entropy(8)(hidden, torch.randint(50, (400,)), head)[0].backward()
    assert largest.elements == 8 * 5000


def test_chunks_in_bfloat16_cost_no_more_than_the_rounding_of_the_result():
    """The weight's gradient is summed over 64 chunks; the reference is float32 on the same numbers."""
    torch.manual_seed(0)
    head = nn.Linear(32, 50, bias=False).bfloat16()
    hidden = torch.randn(256, 32).bfloat16().requires_grad_()
    targets = torch.randint(50, (256,))
    exact = [hidden.detach().float().requires_grad_(), head.weight.detach().float().requires_grad_()]
    plain = F.cross_entropy(F.linear(*exact), targets, reduction="sum") / 256
    expected = torch.autograd.grad(plain, exact)
    total, _ = chunked_cross_entropy(4)(hidden, targets, head)
    found = torch.autograd.grad(total / 256, [hidden, head.weight])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() < 2**-8 * theirs.norm()


def test_nothing_supervised_gives_no_loss_and_gradients_of_exactly_zero():
    head = nn.Linear(16, 50, bias=False)
    hidden = torch.randn(0, 16, requires_grad=True)
    total, losses = chunked_cross_entropy(4)(hidden, torch.empty(0, dtype=torch.int64), head)
    assert losses.shape == (0,)
    assert total == 0
    total.backward()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_losses_are_float32_under_bfloat16():
    head = nn.Linear(16, 50, bias=False).bfloat16()
    total, losses = chunked_cross_entropy(4)(torch.randn(5, 16).bfloat16(), torch.randint(50, (5,)), head)
    assert total.dtype == losses.dtype == torch.float32
