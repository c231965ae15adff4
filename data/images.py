"""Image files → pictures that a model's processor can take, or one sentence about why not.

    image = open_image("photo.jpg")   # the header alone is read and checked
    size_of(image, processor)         # (4032, 3024)
    process(image, processor)         # decoded: float32 [3, H, W]

What becomes of the pixels is the processor's matter (`ImageProcessor`). Files over MAX_PIXELS, broken or cut
files and formats outside FORMATS are refused; nothing is decoded before the header is found good.
"""

import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from PIL import Image

from data.errors import DataError

Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
    if name in Image.OPEN
)
"""What this Pillow can read of what people train on. Of its other formats some start programs (EPS)."""
MAX_PIXELS = 100_000_000
"""300 MB decoded. A header may claim any size; the file need not be large."""

T = TypeVar("T")


class ImageProcessor(Protocol):
    """What the data path needs of a model's image processor. Its `repr` names all that the pixels depend
    on."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """[3, H, W] float32 of an image of any mode; ValueError for one that has no meaning as RGB."""
        ...

    @property
    def as_viewed(self) -> bool:
        """Whether images are turned by their EXIF data, and transparent ones laid on white."""
        ...

    def rgb(self, image: Image.Image) -> Image.Image:
        """What the first step of that makes of the image: its RGB picture, before resizing."""
        ...

    def size(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) of `rgb(image)`, from the header alone."""
        ...

    def num_tokens(self, width: int, height: int) -> int:
        """Image slots that a picture of this size takes."""
        ...

    def dummy(self) -> torch.Tensor:
        """The smallest valid [3, H, W]."""
        ...

    @property
    def hd_num(self) -> int | None:
        """The most tiles that a picture is cut into; None where all pictures take the same slots."""
        ...

    def smaller(self) -> "Sequence[ImageProcessor]":
        """The same with fewer and fewer tiles, down to one; empty where there are no fewer."""
        ...


def open_image(path: str | Path) -> Image.Image:
    """Reads the header; the pixels stay on disk until `process`. DataError if there is nothing to read."""
    try:
        # A folder cannot be read, and a pipe or a device may never end.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ValueError("it is not a file")
        with _quiet():
            image = Image.open(path, formats=FORMATS)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; paths start at the JSON file or --image_root") from error
    except Exception as error:  # decoders raise what they like on a broken header
        raise DataError(f"{path} cannot be opened: {_reason(error)}") from error
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        image.close()
        raise DataError(f"{path} has {width}×{height} pixels; from 1 to {MAX_PIXELS:,} are allowed")
    return image


def process(image: Image.Image, function: Callable[[Image.Image], T]) -> T:
    """`function(image)` of an opened image, which decodes it: a processor, or a part of one.

    DataError if the image's data is cut or broken, or has no meaning as RGB.
    """
    path = getattr(image, "filename", "") or "the image"
    try:
        with _quiet():
            image.load()
            return function(image)
    except Exception as error:  # decoders raise what they like on broken data
        raise DataError(f"{path} cannot be decoded: {_reason(error)}") from error


def size_of(image: Image.Image, processor: ImageProcessor) -> tuple[int, int]:
    """(width, height) of an opened image as the processor will see it, from the header alone."""
    try:
        with _quiet():
            return processor.size(image)
    except Exception as error:  # as above
        raise DataError(f"{getattr(image, 'filename', '')} has broken EXIF data: {_reason(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow's warnings say what is refused or does not matter, on every worker's terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "its format is none of " + ", ".join(FORMATS)
    return str(error).splitlines()[0] if str(error) else type(error).__name__
