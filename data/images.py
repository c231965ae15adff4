"""Image files → pictures for a model's processor, or a DataError with the reason.

    image = open_image("photo.jpg")   # reads and checks only the header
    size_of(image, processor)         # (4032, 3024)
    process(image, processor)         # decoded: what the model takes, such as float32 [3, H, W]

The model's `ImageProcessor` computes the pixels. Images over MAX_PIXELS, broken or truncated files and
formats not in FORMATS are rejected, and nothing is decoded before the header is checked.
"""

import base64
import io
import stat
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from data.errors import DataError

Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
    if name in Image.OPEN
)
"""Formats allowed, if this Pillow can read them. Some of its other formats start programs (EPS)."""
MAX_PIXELS = 100_000_000
"""300 MB decoded. Even a small file may claim any size in its header."""

T = TypeVar("T")


class ImageProcessor(Protocol):
    """The interface of a model's image processor. Its `repr` includes every setting that changes pixels."""

    def __call__(self, image: Image.Image) -> Any:
        """The picture of an image of any mode: a tensor, or a dictionary of them; ValueError if it cannot be
        converted to RGB."""
        ...

    def batch(self, pictures: Sequence[Any]) -> dict[str, Any]:
        """Pictures, in order → the model's keyword arguments, in tensors or lists of them."""
        ...

    @property
    def as_viewed(self) -> bool:
        """Whether images are turned by their EXIF data and transparent ones are put on white."""
        ...

    def rgb(self, image: Image.Image) -> Image.Image:
        """The RGB picture before resizing, the first step of processing."""
        ...

    def resize(self, image: Image.Image) -> Image.Image:
        """The RGB picture as the model sees it, as far as it can be shown."""
        ...

    def size(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) of `rgb(image)`, from the header alone."""
        ...

    def tokens(self, width: int, height: int) -> np.ndarray:
        """int64 ids that stand for a picture of this size, `data.tokens.SLOT` where a feature goes."""
        ...

    def num_tokens(self, width: int, height: int) -> int:
        """How many they are."""
        ...

    def check(self, image: Image.Image) -> None:
        """ValueError unless the tokens by an opened picture's size are those by its pixels."""
        ...

    def dummy(self) -> Any:
        """The smallest valid picture."""
        ...

    def smaller(self) -> "Mapping[str, ImageProcessor]":
        """The same processor with lower and lower limits of a picture's size, by limit ("hd_num=4").

        ValueError with the reason if it has no limit that could be lowered.
        """
        ...


def open_image(path: str | Path) -> Image.Image:
    """Reads the header; `process` reads the pixels. DataError if the file cannot be used."""
    try:
        # A folder cannot be read, and reading a pipe or a device may never end.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ValueError("it is not a file")
        with warnings.catch_warnings(action="ignore"):  # of images that are rejected anyway, or harmless
            image = Image.open(path, formats=FORMATS)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; paths start at the JSON file or --image_root") from error
    except Exception as error:  # decoders raise exceptions of any type on a broken header
        raise DataError(f"{path} cannot be opened: {_reason(error)}") from error
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        image.close()
        raise DataError(f"{path} has {width}×{height} pixels; from 1 to {MAX_PIXELS:,} are allowed")
    return image


def process(image: Image.Image, function: Callable[[Image.Image], T]) -> T:
    """Decodes an opened image and returns `function(image)`; function: a processor, or one step of it.

    DataError if the data is truncated or broken or cannot be converted to RGB.
    """
    path = getattr(image, "filename", "") or "the image"
    try:
        with warnings.catch_warnings(action="ignore"):
            image.load()
            return function(image)
    except Exception as error:  # decoders raise exceptions of any type on broken data
        raise DataError(f"{path} cannot be decoded: {_reason(error)}") from error


def size_of(image: Image.Image, processor: ImageProcessor) -> tuple[int, int]:
    """(width, height) of an opened image as the processor will see it, read from the header."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return processor.size(image)
    except Exception as error:
        raise DataError(f"{getattr(image, 'filename', '')} has broken EXIF data: {_reason(error)}") from error


def jpeg_uri(image: Image.Image, quality: int) -> str:
    """An RGB picture as the address of a picture in an HTML page that needs no other file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "its format is none of " + ", ".join(FORMATS)
    return str(error).splitlines()[0] if str(error) else type(error).__name__
