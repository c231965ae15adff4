"""AdamW with moments in bfloat16 or 8 bits; parameters and all arithmetic stay in float32.

Input: parameters with gradients. Output: the update of torch's AdamW, from moments that were rounded after
the previous step. Only some elements of a parameter have their moments in float32 at a time:

    moments               float32     bfloat16     8bit
    bytes a parameter     8           4            2.03

8bit is block-wise dynamic quantisation (Dettmers et al., arXiv 2110.02861) by torchao: 256 neighbours of a
row share a float32 scale, and a number is one of 256 codes, dense near zero. Parameters whose rows are not a
multiple of 256 long, such as norms and biases, keep float32 moments. As no block crosses a row, codes and
scales are sharded like the parameter, and checkpoints save them as they are, for any number of ranks. On a
CPU it is slow: a step takes some 150 nanoseconds a parameter and core; float32 takes 1, bfloat16 2.

bfloat16 rounds to nearest, with 8 bits: a second moment that decays by less than 1 / 256 a step would never
decrease, which is why `adam_beta2` must not be above 0.996 (`Config.problems`).
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from trainer.distributed import shard_of
from trainer.optim import update_options

BLOCK = 256
AT_A_TIME = 1024 * BLOCK
"""Elements processed at once, sized to fit CPU caches; 16 times as many on an accelerator. Quantising takes
some 40 bytes for each."""


def zero_moments_of(parameter: nn.Parameter, kind: str) -> dict[str, Tensor]:
    """The moments of a parameter before the first step, sharded like the parameter: `exp_avg`, `exp_avg_sq`,
    and with 8 bits `exp_avg_scale` and `exp_avg_sq_scale`, [rows, columns / 256]."""
    weight, moments = parameter.detach(), {}
    in_blocks = kind == "8bit" and weight.ndim == 2 and weight.shape[1] % BLOCK == 0
    dtype = torch.uint8 if in_blocks else torch.bfloat16 if kind == "bfloat16" else torch.float32
    for name in ("exp_avg", "exp_avg_sq"):
        moments[name] = torch.zeros_like(weight, dtype=dtype)
        if in_blocks:
            scales = weight[:, ::BLOCK]
            moments[f"{name}_scale"] = torch.zeros_like(scales, memory_format=torch.contiguous_format)
    return moments


class SmallMomentsAdamW(torch.optim.AdamW):
    """torch's AdamW with moments of `zero_moments_of`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Update all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        weights, gradients = _chunks(parameter.detach()), _chunks(parameter.grad)
        names = [name for name in state if name != "step"]
        for weight, gradient, *values in zip(
            weights, gradients, *(_chunks(state[name], "_scale" in name) for name in names), strict=True
        ):
            if weight.numel() == 0:  # the last rank's shard of a parameter with few rows
                continue
            stored = dict(zip(names, values, strict=True))
            moments = [_read(stored, name) for name in ("exp_avg", "exp_avg_sq")]
            adamw(
                [weight],
                [gradient],
                [moments[0]],
                [moments[1]],
                [],
                [state["step"].clone()],
                **update_options(group),
            )
            for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                _write(stored, name, moment)
        state["step"] += 1


def _chunks(tensor: Any, scales: bool = False) -> tuple[Tensor, ...]:
    """This rank's elements in chunks of AT_A_TIME, or the scales of as many elements."""
    local = shard_of(tensor)
    size = AT_A_TIME if local.device.type == "cpu" else 16 * AT_A_TIME
    return local.view(-1).split(size // BLOCK if scales else size)


def _read(stored: dict[str, Tensor], name: str) -> Tensor:
    """A moment in float32: the stored tensor itself if it has that dtype."""
    if stored[name].dtype != torch.uint8:
        return stored[name].float()
    codes, scales = stored[name], stored[f"{name}_scale"]
    return _quantisation().dequant_with_qmap(codes, _code_map(name, codes.device), scales)


def _write(stored: dict[str, Tensor], name: str, moment: Tensor) -> None:
    if stored[name].dtype == torch.uint8:
        scaled, scales = _quantisation().scale_tensor(moment, BLOCK)
        codes = _quantisation().quantize_8bit_with_qmap(scaled, _code_map(name, moment.device))
        stored[name].copy_(codes)
        stored[f"{name}_scale"].copy_(scales)
    elif moment is not stored[name]:
        stored[name].copy_(moment)


@functools.cache
def _quantisation() -> Any:
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns about missing kernels that are not used
    from torchao.optim import quant_utils

    return quant_utils


@functools.cache
def _code_map(name: str, device: torch.device) -> Tensor:
    """Code → number from -1 (the second moment: from 0) to 1, float32 [256]."""
    signed = name == "exp_avg"
    return torch.tensor(_quantisation().create_dynamic_map(signed), dtype=torch.float32, device=device)
