"""Rotary position embeddings (RoPE, arXiv 2104.09864) of XComposer2's language model.

Input: positions [B, T], then queries and keys [..., E]. Output: their rotations, in float32.

    cos, sin = RotaryEmbedding(config)(position_ids)  # [B, T, E] each
    first, second = sin.chunk(2, dim=-1)
    q = Rotate.apply(q, cos, torch.cat([-first, second], dim=-1))

Beyond max_position_embeddings the 2.5 models rotate more slowly the longer a sample is (dynamic NTK scaling).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .configuration_xcomposer2 import InternLMXcomposer2Config


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the positions, with dynamic NTK scaling beyond max_position_embeddings.

    A pure function of the positions: a cache, as in the original and transformers, keeps the scaling of an
    earlier long batch, and a buffer would be corrupted by `.to(bfloat16)` and `to_empty`. Computing E/2
    frequencies in every forward pass is cheap.
    """

    def __init__(self, config: InternLMXcomposer2Config) -> None:
        super().__init__()
        parameters = config.rope_parameters
        self.theta = float(parameters["rope_theta"])
        self.factor = float(parameters["factor"]) if parameters["rope_type"] == "dynamic" else None
        self.max_positions = config.max_position_embeddings
        self.width = config.hidden_size // config.num_attention_heads

    def forward(self, position_ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """position_ids [B, T] → cosines and sines, [B, T, E] float32.

        lengths: of each token's sample, [B, T] or [B, 1]; None: a row ends at its highest position.
        """
        exponents = torch.arange(0, self.width, 2, device=position_ids.device).float() / self.width
        base: float | Tensor = self.theta
        if self.factor is not None:
            if lengths is None:
                lengths = position_ids.amax(-1, keepdim=True) + 1
            growth = self.factor * lengths[..., None] / self.max_positions - (self.factor - 1)
            base = base * growth.clamp(min=1) ** (self.width / (self.width - 2))
        angles = position_ids[..., None].float() * (1.0 / base**exponents)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


class Rotate(torch.autograd.Function):
    """x · cos + (−x2, x1) · sin for the halves (x1, x2) of x, in float32; four kernels forward and backward.

    The backward pass is the rotation by the opposite angle, so x is not kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [..., E] → the same shape and dtype; cos, and sin with its first half negated: float32."""
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _rotate(grad_outputs[0], cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos).addcmul_(torch.cat([second, first], dim=-1), sin, value=direction).to(x.dtype)
