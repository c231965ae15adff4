"""Run a processor of transformers on a picture's size instead of its pixels.

    shapes = shapes_alone(processor)                                # a copy
    blank = np.broadcast_to(np.uint8(0), (3, 3024, 4032))           # a picture of 4032×3024, in one byte
    shapes.image_processor([blank])["image_grid_thw"]               # Qwen2.5-VL: [[1, 216, 288]]

The processor's own code computes sizes, tiles and grids. Resizing, rescaling and normalising, which take the
time, give arrays of zeros that have a shape and hardly any memory. Nothing of transformers is changed, so
other threads may process pictures at the same time.
"""

import copy
import types
from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend


def _with_globals(function: Any, **replaced: Any) -> Any:
    """A copy of a function that finds other functions under these global names."""
    copied = types.FunctionType(function.__code__, {**function.__globals__, **replaced}, function.__name__)
    copied.__defaults__, copied.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copied


def _resized(image: np.ndarray, size: tuple[int, int], **_: Any) -> np.ndarray:
    return np.broadcast_to(image.dtype.type(0), (len(image), *size))


class _ShapesAlone(PilBackend):
    """The PIL backend, giving zeros that take no memory in place of pixels. Pictures are [3, H, W] arrays."""

    resize = _with_globals(PilBackend.resize, np_resize=_resized)

    def process_image(self, image: np.ndarray, *_: Any, **__: Any) -> np.ndarray:
        return image

    def rescale(self, image: np.ndarray, *_: Any, **__: Any) -> np.ndarray:
        return np.broadcast_to(np.float32(0), image.shape)

    normalize = rescale


def shapes_alone(processor: Any) -> Any:
    """A copy of the processor whose image processor computes only the shapes of pixels.

    Its class keeps its methods, and their `super()` is `_ShapesAlone` where it was the PIL backend.
    """
    shapes = copy.copy(processor)
    shapes.image_processor = copy.copy(processor.image_processor)
    cls = type(shapes.image_processor)
    if issubclass(cls, PilBackend):
        shapes.image_processor.__class__ = types.new_class(cls.__name__, (cls, _ShapesAlone))
    return shapes
