"""A model's output layer with everything that its class does behind it, such as scaling or capping logits.

    is_plain(model, Qwen3ForCausalLM)               # True: lm_head is all
    is_plain(model, Gemma2ForCausalLM)              # False
    OwnHead(model, Gemma2ForCausalLM)(hidden)       # [M, D] → [M, vocabulary], capped at 30

The scales have no common names, and two classes read the same name differently. So the class's own forward is
run on a stand-in whose base model only returns the hidden states that it is given. Whether a class does
anything behind the output layer is found out with the identity in place of that layer, without weights.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

PROBE = torch.linspace(-100, 100, 64).view(1, 8, 8)
"""Hidden states that come back from the identity unchanged only if nothing is done to logits."""


class _Given:
    """The output of a base model that gives these hidden states and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        assert index == 0, index
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


class _Base:
    """A base model that returns these hidden states whatever it is called with, and is `base` otherwise."""

    def __init__(self, base: nn.Module, hidden: Tensor) -> None:
        self._base, self._hidden = base, hidden

    def __call__(self, *args: Any, **kwargs: Any) -> _Given:
        return _Given(self._hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def own_logits(model: Any, own_class: type, hidden: Tensor, **replaced: Any) -> Tensor:
    """The logits that `own_class.forward` makes of hidden [B, T, D], with `replaced` children."""
    stand_in: Any = object.__new__(own_class)
    base = _Base(model.base_model, hidden)
    stand_in.__dict__.update(model.__dict__, **{model.base_model_prefix: base}, **replaced)
    return own_class.forward(stand_in).logits  # type: ignore[attr-defined]


class OwnHead(nn.Module):
    """Hidden states [M, D] or [B, T, D] → logits, by the class's own forward."""

    def __init__(self, model: nn.Module, own_class: type) -> None:
        super().__init__()
        self.logits = functools.partial(own_logits, model, own_class)  # not a child, which would be a cycle

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logits(hidden[None])[0] if hidden.ndim == 2 else self.logits(hidden)


def is_plain(model: Any, own_class: type) -> bool:
    """Whether the class does nothing behind the output layer; ValueError if that cannot be found out."""
    names = [name for name, child in model.named_children() if child is model.get_output_embeddings()]
    if not names or model.base_model is model:
        raise ValueError(f"{own_class.__name__} is not a base model and an output layer, as training needs")
    try:
        return torch.equal(own_logits(model, own_class, PROBE, **{names[0]: nn.Identity()}), PROBE)
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{own_class.__name__}: its output layer does not run by itself: {error}") from error
