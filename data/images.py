"""Image files → RGB pictures, or one sentence about why not.

    image = open_image("photo.jpg")   # the header alone is read and checked
    viewed_size(image)                # (4032, 3024)
    to_rgb(image)                     # decoded, mode RGB

Pixels are what `Image.open(path).convert("RGB")` gives, as in the original training code: a phone picture
lies as its sensor lay, and a transparent picture shows the colours under its alpha. `as_viewed=True` gives
what a person sees instead: rotated by the EXIF tag, transparency on white. An animation gives its first
frame. 16-bit grey is scaled to 8 bits (`convert` would clip nearly all of it to white). Files over
MAX_PIXELS, broken or cut files and formats outside FORMATS are refused; nothing is decoded before the header
is found good.
"""

import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

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
EXIF_ORIENTATION = 0x0112
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class ImageProcessor(Protocol):
    """What the data path needs of a model's image processor."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """[3, H, W] float32 of an RGB image."""
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
    """Reads the header; the pixels stay on disk until `to_rgb`. DataError if there is nothing to read."""
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


def to_rgb(image: Image.Image, as_viewed: bool = False) -> Image.Image:
    """Decodes an opened image. DataError if its data is cut or broken, or has no meaning as RGB."""
    path = getattr(image, "filename", "") or "the image"
    try:
        with _quiet():
            image.load()
            if as_viewed:
                image = ImageOps.exif_transpose(image)
            if image.mode in SIXTEEN_BIT_MODES:
                image = _to_8_bits(image)
            if as_viewed and image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers of unknown range; save it as 8 bits")
            return image.convert("RGB")
    except Exception as error:  # as above
        raise DataError(f"{path} cannot be decoded: {_reason(error)}") from error


def load_image(path: str | Path, as_viewed: bool = False) -> Image.Image:
    """`open_image` and `to_rgb` in one; the file is closed."""
    with open_image(path) as image:
        return to_rgb(image, as_viewed)


def viewed_size(image: Image.Image, as_viewed: bool = False) -> tuple[int, int]:
    """(width, height) that `to_rgb` will give, from the header alone."""
    try:
        with _quiet():
            turned = as_viewed and image.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)
    except Exception as error:  # as above
        raise DataError(f"{getattr(image, 'filename', '')} has broken EXIF data: {_reason(error)}") from error
    return (image.height, image.width) if turned else image.size


def _to_8_bits(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"its pixels run from {levels.min()} to {levels.max()}, more than 16 bits")
    # Mode "I" may hold 8-bit levels in 32 bits; the 16-bit modes are what they say.
    shift = 0 if image.mode == "I" and levels.max() <= 255 else 8
    return Image.fromarray((levels >> shift).astype(np.uint8))


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
