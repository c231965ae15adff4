"""The sizes of pictures, read on the host: a vision tower's positions and bounds follow from them.

Towers for pictures of any size compute, from the grids of their patches, where each patch is, which window it
is in and where pictures end. On the device every such step waits for it. `transformers.vision_utils` has the
functions `get_vision_…`; within `sizes_read_on_host` they work on the host's copy of the grids (`on_host` in
data/batch.py), and only their results go to the device:

    image_grid_thw [[1, 4, 4], [1, 4, 8]]  →  cu_seqlens [0, 16, 48], position_ids [48, 2], window_index [12]
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import map_tensors, on_host, to_device


@contextmanager
def sizes_read_on_host(tower: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it, those functions in the tower's file work on the host, and give their results to `device`."""
    names = vars(sys.modules[type(tower).__module__])
    ours: dict[str, Any] = {
        name: functools.partial(_from_host, function, device)
        for name, function in names.items()
        if name.startswith("get_vision_") and callable(function)
    }
    if "get_max_seqlen" in names:
        ours["get_max_seqlen"] = functools.partial(_maximum, names["get_max_seqlen"])
    own = {name: names[name] for name in ours}
    names.update(ours)
    try:
        yield
    finally:
        names.update(own)  # these alone: torch.compile puts names of its own there


def _from_host(function: Callable[..., Any], device: Any, grids: Tensor, *args: Any, **kwargs: Any) -> Any:
    return map_tensors(function(on_host(grids), *args, **kwargs), lambda result: to_device(result, device))


def _maximum(get_max_seqlen: Callable[..., Any], cu_seqlens: Tensor, *args: Any, **kwargs: Any) -> Any:
    return get_max_seqlen(on_host(cu_seqlens), *args, **kwargs)
