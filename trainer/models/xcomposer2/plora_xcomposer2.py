"""Partial LoRA: a linear layer with a low-rank addition at image slots.

Input: rows x [R, I], and the runs of image slots among them. Output: rows y [R, O]:

    y = x Wᵀ + b        and, in every run,        y += (alpha / rank) · dropout(x) Aᵀ Bᵀ

    a row of 1,300 tokens with two images of 500 slots: runs [(4, 504), (510, 1010)]
    products: 1 of W, 1 of A, and 1 of B a run, which is added where it belongs

An image's slots are neighbours, so a run is a slice. With an index instead, the products of B would be
scattered, and the backward pass would fill and add a gradient of the whole row. Paper: arXiv 2401.16420.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .configuration_xcomposer2 import InternLMXcomposer2Config


class Runs:
    """(begin, end) of every run of image slots in a flattened [B, T], in order, on the host.

    A class of its own, because torch.compile would compile a block again for every other length of a list.
    """

    def __init__(self, bounds: Iterable[tuple[int, int]]) -> None:
        self.bounds = tuple(bounds)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.bounds)

    def __len__(self) -> int:
        return len(self.bounds)


class PLoRADown(nn.Linear):
    """PLoRA's A: initialised randomly."""


class PLoRAUp(nn.Linear):
    """PLoRA's B: initialised to zero, so that new weights change nothing."""


class _PartialLoRA(torch.autograd.Function):
    """The products of the module's docstring, and their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        runs: Runs,
        dropout: float,
        inplace: bool,
    ) -> Tensor:
        """x [R, I], weight [O, I], bias [O], down [rank, I], up [O, rank]; returns [R, O]."""
        y = F.linear(x, weight, bias)
        ctx.scale, ctx.runs, ctx.dropout, kept = scale, runs, dropout, []
        if runs:
            rows = _rows_of(x, runs)  # [N, I]
            if dropout:
                rows, mask = torch.native_dropout(rows, dropout, True)
                kept = [rows, mask]
            low = rows @ down.T  # [N, rank]
            kept.append(low)
            if not inplace:
                y = y.clone()
            _add_products(y, runs, low, up.T, scale)
        ctx.save_for_backward(x, weight, down, up, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        x, weight, down, up, *kept = ctx.saved_tensors
        for_x, for_weight, for_bias, for_down, for_up = ctx.needs_input_grad[:5]
        x_grad = grad @ weight if for_x else None
        down_grad = up_grad = None
        if not ctx.runs:
            down_grad, up_grad = torch.zeros_like(down), torch.zeros_like(up)
        else:
            *of_dropout, low = kept
            run_grad = _rows_of(grad, ctx.runs)  # [N, O]
            # With beta=0 a product is scaled at no cost; the first argument then has no meaning.
            if for_up:
                up_grad = torch.addmm(up, run_grad.T, low, beta=0, alpha=ctx.scale)
            if for_x or for_down:
                low_grad = run_grad @ up  # [N, rank], not scaled yet, like `low`
                if for_down:
                    rows = of_dropout[0] if of_dropout else _rows_of(x, ctx.runs)
                    down_grad = torch.addmm(down, low_grad.T, rows, beta=0, alpha=ctx.scale)
                if x_grad is not None and of_dropout:
                    scale = ctx.scale / (1 - ctx.dropout)
                    rows_grad = torch.ops.aten.native_dropout_backward(low_grad @ down, of_dropout[1], scale)
                    for (begin, end), part in zip(ctx.runs, _split(rows_grad, ctx.runs), strict=True):
                        x_grad[begin:end] += part
                elif x_grad is not None:
                    _add_products(x_grad, ctx.runs, low_grad, down, ctx.scale)
        weight_grad = grad.T @ x if for_weight else None
        bias_grad = grad.sum(0) if for_bias else None
        return x_grad, weight_grad, bias_grad, down_grad, up_grad, None, None, None, None


def _rows_of(x: Tensor, runs: Runs) -> Tensor:
    """The rows of all runs, [N, D]; no copy of a single run."""
    parts = [x[begin:end] for begin, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split(rows: Tensor, runs: Runs) -> Sequence[Tensor]:
    return rows.split([end - begin for begin, end in runs])


def _add_products(y: Tensor, runs: Runs, rows: Tensor, matrix: Tensor, scale: float) -> None:
    """Add scale · rows [N, K] @ matrix [K, D] to the runs of y [R, D]."""
    for (begin, end), part in zip(runs, _split(rows, runs), strict=True):
        run = y[begin:end]
        torch.addmm(run, part, matrix, alpha=scale, out=run)  # FLOP counters do not know addmm_


class PLoRALinear(nn.Linear):
    """A linear layer with a low-rank addition at image slots."""

    inplace = True
    """Whether to add into the output of the product with W, which selective checkpointing keeps."""

    def __init__(
        self, inputs: int, outputs: int, config: InternLMXcomposer2Config, name: str, bias: bool = False
    ) -> None:
        super().__init__(inputs, outputs, bias)
        rank, self.scale = config.plora(name)
        self.dropout = nn.Dropout(config.plora_dropout)
        self.Plora_A = PLoRADown(inputs, rank, bias=False)
        self.Plora_B = PLoRAUp(rank, outputs, bias=False)

    @torch.compiler.disable()  # it would be compiled again for every place of an image
    def forward(self, input: Tensor, runs: Runs | None = None) -> Tensor:
        """input [B, T, inputs]; runs of image slots in B·T, or None, which leaves the addition out.

        No run, unlike None, gives A and B gradients that are exactly zero.
        """
        if runs is None:
            return super().forward(input)
        x = input.flatten(0, -2)
        if type(self.Plora_A) is not PLoRADown or type(self.Plora_B) is not PLoRAUp:  # adapters are on them
            y = super().forward(x)
            if not runs:  # no rows, for gradients of zeros: FSDP leaves missing ones out, on this rank alone
                y = torch.cat([y, self.Plora_B(self.Plora_A(x[:0]))])
            parts = [
                y[begin:end] + self.scale * self.Plora_B(self.Plora_A(self.dropout(x[begin:end])))
                for begin, end in runs
            ]
            return put_at(runs, y, parts).unflatten(0, input.shape[:-1])
        tensors = [x, self.weight, self.bias, self.Plora_A.weight, self.Plora_B.weight]
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
        dropout = self.dropout.p if self.training else 0.0
        y = _PartialLoRA.apply(*tensors, self.scale, runs, dropout, self.inplace)
        return y.unflatten(0, input.shape[:-1])


def put_at(runs: Runs, rows: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """rows [R, D] with each run replaced by its part [end − begin, D].

    One copy forward and one backward, without an index.
    """
    sizes, done = [], 0
    for begin, end in runs:
        sizes += [begin - done, end - begin]
        done = end
    pieces = list(rows.split([*sizes, len(rows) - done]))
    pieces[1::2] = parts
    return torch.cat(pieces)


def runs_of(mask: Tensor) -> Runs:
    """Runs of True in a mask [B, T], flattened. It waits for the device."""
    edges = F.pad(mask.flatten().to(torch.int8), (1, 1)).diff().nonzero()[:, 0].tolist()
    return Runs(zip(edges[::2], edges[1::2], strict=True))
