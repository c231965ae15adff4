"""Features of a frozen vision tower, kept on disk: an image is decoded and computed once for all jobs.

    features = FeatureFolder(Path("features"), tower="3f9a…")     # a fingerprint of weights and dtype
    picture = features.load(open_image("cat.jpg"), processor, as_viewed=False)
    picture.output                                                # None: unknown, so picture.pixels is there
    write_features(picture.file, patches, rows=1)                 # what the tower made of the pixels
    features.load(open_image("copy_of_cat.jpg"), processor, as_viewed=False).output   # (patches, 1)

An image's file is named by the hash of its bytes and of what is done to its pixels, in a folder a tower:
`features/3f9a…/07/07c1….safetensors`. It holds `patches` [views, patches, width], as the tower gave them, and
in its header the rows of tiles and a checksum. Files appear whole, by a rename, whoever else writes them, and
never change. One that is damaged is removed with a warning, and so made again.
"""

import contextlib
import hashlib
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from data.errors import DataError
from data.images import ImageProcessor, to_rgb
from data.records import write_atomically

logger = logging.getLogger(__name__)

HEADER_BYTES = 1024
"""A file's header takes less."""
VERSION = 1
"""Raise it when pixels are made differently, or the layout changes."""


@dataclass(frozen=True)
class Picture:
    """An image on its way to the model: its pixels, or what the tower made of them before."""

    file: Path
    """Where its features are, or belong."""
    pixels: torch.Tensor | None
    """[3, H, W]"""
    output: tuple[torch.Tensor, int] | None
    """[views, patches, width], and the rows of tiles."""


@dataclass(frozen=True)
class FeatureFolder:
    """The features of one tower; workers read them, the training process writes what is missing."""

    folder: Path
    tower: str
    """Whatever but the picture the features depend on, as a name of a folder."""

    def load(self, image: Image.Image, processor: ImageProcessor, as_viewed: bool) -> Picture:
        """Of an opened image the features, or if there are none its pixels. DataError as of `to_rgb`."""
        path = Path(image.filename)  # type: ignore[attr-defined]  (of Image.open)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        digest = hashlib.blake2b(repr((VERSION, processor, as_viewed)).encode(), digest_size=20)
        digest.update(content)
        name = digest.hexdigest()
        file = self.folder / self.tower / name[:2] / f"{name}.safetensors"
        output = read_features(file)
        return Picture(file, None if output else processor(to_rgb(image, as_viewed)), output)


def read_features(file: Path) -> tuple[torch.Tensor, int] | None:
    """(patches, rows of tiles) of a file; None if there is none, or a damaged one, which goes."""
    try:
        with safe_open(file, framework="pt") as opened:
            patches, header = opened.get_tensor("patches"), opened.metadata()
        rows = int(header["rows"])
        if header["checksum"] != _checksum(patches, rows):
            raise ValueError("its content does not fit its checksum")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged and will be made again: %s", file, error)
        with contextlib.suppress(OSError):
            file.unlink()
        return None
    return patches, rows


def write_features(file: Path, patches: torch.Tensor, rows: int) -> bool:
    """Keep a picture's features, `patches` on the CPU; False if the folder cannot be written."""
    patches = patches.contiguous()
    header = {"rows": str(rows), "checksum": _checksum(patches, rows)}
    return write_atomically(file, save({"patches": patches}, header))


def _checksum(patches: torch.Tensor, rows: int) -> str:
    start = zlib.crc32(repr((rows, tuple(patches.shape), patches.dtype)).encode())
    return f"{zlib.crc32(patches.view(torch.uint8).numpy().data, start):08x}"


def folder_bytes(folder: Path) -> int:
    """What all files below a folder take, others' half-written ones too."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total
