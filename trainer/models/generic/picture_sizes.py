"""The sizes of pictures, read on the host: a vision tower's positions and bounds follow from them.

Towers for pictures of any size compute, from the grids of their patches, where each patch is, which window it
is in and where pictures end. On the device every such step waits for it. `transformers.vision_utils` has the
functions `get_vision_…` for this. Here they work on the host's copy of the grids (see `on_host`), and only
their results go to the device:

    image_grid_thw [[1, 4, 4], [1, 4, 8]]  →  cu_seqlens [0, 16, 48], position_ids [48, 2], window_index [12]

    read_sizes_on_host(model.visual)       # before training; calls without a host's copy are as before
    with results_on(device):
        model.visual(pixels, grids)
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import map_tensors, on_host, to_device

_device: ContextVar[torch.device | None] = ContextVar("device", default=None)


@contextlib.contextmanager
def results_on(device: torch.device) -> Iterator[None]:
    """Within it, what is computed from sizes on the host goes to this device."""
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)


def read_sizes_on_host(tower: nn.Module) -> None:
    """Replace the functions of sizes in the file of the tower's class."""
    names = vars(sys.modules[type(tower).__module__])
    for name, function in list(names.items()):
        if isinstance(function, functools.partial) or not callable(function):
            continue
        if name.startswith("get_vision_"):
            names[name] = functools.partial(_of_sizes, function)
        elif name == "get_max_seqlen":
            names[name] = functools.partial(_on_host, function)


def _on_host(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function's result for the host's copies of the tensors that it is given."""
    return function(
        *map_tensors(args, on_host), **{name: map_tensors(v, on_host) for name, v in kwargs.items()}
    )


def _of_sizes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    sizes = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    device = _device.get() or sizes.device
    return map_tensors(_on_host(function, *args, **kwargs), lambda result: to_device(result, device))
