"""The shards of a resumable checkpoint: every rank writes its rows, and any number of ranks read theirs.

Input: a model's parameters and moments by name, DTensors sharded by rows or plain tensors. Output: `resume/`
of a checkpoint, in the Hugging Face format of torch.distributed.checkpoint:

    shard-00001-model-00001-of-00001.safetensors    rank 0's rows and, in the header, where they begin
    shard-00002-model-00001-of-00001.safetensors    rank 1's
    index.json                                      which rows of which tensor are in which file

4 ranks wrote 10 rows as 0 to 2, 3 to 5, 6 to 8 and 9. Of 2 ranks, the second reads rows 5 to 9: row 5 from
the second shard, and the third and fourth whole. It opens no other file, and no rank needs to know what
another one reads. Without index.json, as in older checkpoints, the headers of all shards are read instead.

torch's own reader builds a plan of all ranks on rank 0, and every rank opens every file for it. Its writer
serialises a whole shard under the interpreter lock, which would stop the training loop, where `save_file`
releases it.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.files import replace_file, sync_to_disk
from trainer.atomic import write_safetensors
from trainer.job import is_main
from trainer.weights import local_rows

INDEX = "index.json"
SHARDING = "DCP_SHARDING_INFO"
"""The entry of a shard's header with the index of each tensor's first element in the whole tensor."""
Layout = tuple[tuple[int, int, int], ...]
"""(place in `Index.files`, first row, row after the last) of a tensor's parts, by first row."""


@dataclass
class Index:
    """Which rows of which tensor are in which shard.

    Tensors with the same number of rows mostly share a layout, so that 1,024 shards of a thousand tensors
    have an index of some hundred kilobytes.
    """

    files: list[str]
    layouts: list[Layout]
    tensors: dict[str, tuple[list[int], int]]
    """Name → shape of the whole tensor, and its place in `layouts`."""

    def find(self, name: str, shape: Sequence[int], rows: slice) -> list[tuple[int, int, int, int]]:
        """The parts that hold these rows of a tensor: file, its first row, and the rows wanted from it.

        ValueError if the tensor or some of the rows are missing, or if it has another shape.
        """
        if name not in self.tensors:
            raise ValueError(f"{name} is missing")
        saved, layout = self.tensors[name]
        if list(saved) != list(shape):
            raise ValueError(f"{name} has shape {list(saved)} instead of {list(shape)}")
        found = [
            (file, first, max(first, rows.start), min(last, rows.stop))
            for file, first, last in self.layouts[layout]
            if first < rows.stop and rows.start < last
        ]
        if sum(last - first for *_, first, last in found) != rows.stop - rows.start:
            raise ValueError(f"{name} lacks some of its rows {rows.start} to {rows.stop - 1}")
        return found


def rows_to_write(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, list[int]]]:
    """What this rank writes of `tensors`: name, its rows, and the index of their first element in the whole
    tensor.

    Ranks that hold the same rows, on a mesh of (replicate, shard), take turns; rank 0 writes plain tensors.
    """
    written = Counter[int]()  # replica → bytes: the same on all replicas
    for name, tensor in tensors.items():
        rows, where = local_rows(tensor)
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            replica, replicas = (mesh.get_local_rank(0), mesh.size(0)) if mesh.ndim == 2 else (0, 1)
            turn = min(range(replicas), key=written.__getitem__)
            written[turn] += rows.nbytes
            is_mine = turn == replica and rows.numel() > 0
        else:
            is_mine = is_main()
        if is_mine:
            yield name, rows, [rows_of.start for rows_of in where]


def file_name(rank: int) -> str:
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def save_tensors(tensors: dict[str, Tensor], offsets: Mapping[str, list[int]], folder: Path) -> None:
    """Write this rank's shard to `folder`; offsets: from `rows_to_write`."""
    if tensors:
        folder.mkdir(exist_ok=True)
        path = folder / file_name(dist.get_rank())
        sharding = {name: {"saved_offsets": offset} for name, offset in offsets.items()}
        metadata = {SHARDING: json.dumps(sharding), "DCP_VERSION": "1.0", "format": "pt"}
        write_safetensors(tensors, path, metadata)
        sync_to_disk(path)  # by the machine that wrote it


def span(rows: Tensor, offset: Sequence[int]) -> tuple[int, int]:
    """First row and row after the last, in the whole tensor, of `rows_to_write`; a scalar is one row."""
    return (offset[0], offset[0] + len(rows)) if offset else (0, 1)


def write_index(folder: Path, shapes: Mapping[str, Sequence[int]], spans: Sequence[Tensor]) -> None:
    """Write the index of the shards in `folder`; for one rank. ValueError if they do not hold every row.

    shapes: of the whole tensors by name; spans: the `span` of what each rank wrote of them, int64
    [tensors, 2], or two equal numbers where that is nothing.
    """

    @cache  # by the bytes of an array [ranks, 2], which are mostly those of another tensor too
    def parts_of(content: bytes) -> Layout:
        by_rank = np.frombuffer(content, np.int64).reshape(-1, 2).tolist()
        parts = [(rank, first, last) for rank, (first, last) in enumerate(by_rank) if first < last]
        return tuple(sorted(parts, key=lambda part: part[1]))

    by_tensor = torch.stack(list(spans), 1).numpy()
    layouts = {name: parts_of(rows.tobytes()) for name, rows in zip(shapes, by_tensor, strict=True)}
    index = _index([file_name(rank) for rank in range(len(spans))], shapes, layouts)
    checked: set[tuple[int, ...]] = set()  # a layout, and a number of rows
    for name, (shape, layout) in index.tensors.items():
        if (layout, *shape[:1]) not in checked:
            index.find(name, shape, slice(0, shape[0] if shape else 1))
            checked.add((layout, *shape[:1]))
    for rank in sorted({rank for layout in index.layouts for rank, _, _ in layout}):
        if not (folder / file_name(rank)).is_file():
            raise ValueError(f"rank {rank} wrote {folder / file_name(rank)}, which another rank does not see")
    replace_file(folder / INDEX, json.dumps(asdict(index), separators=(",", ":")).encode())


def _index(files: list[str], shapes: Mapping[str, Sequence[int]], layouts: Mapping[str, Layout]) -> Index:
    numbers: dict[Layout, int] = {}
    tensors = {
        name: (list(shapes[name]), numbers.setdefault(layout, len(numbers)))
        for name, layout in layouts.items()
    }
    return Index(files, list(numbers), tensors)


def index_of(folder: Path) -> Index:
    """The index of the shards in `folder`, from their headers; ValueError if one cannot be read."""
    paths = sorted(folder.glob("*.safetensors"))
    shapes: dict[str, list[int]] = {}
    parts: dict[str, dict[int, tuple[int, int, int]]] = defaultdict(dict)  # by first row
    for number, path in enumerate(paths):
        try:
            with safe_open(path, framework="pt") as file:
                offsets = json.loads(file.metadata()[SHARDING])
                shape_of = {name: file.get_slice(name).get_shape() for name in offsets}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path.name} cannot be read: {error}") from None
        for name, shape in shape_of.items():
            first, rows = (offsets[name]["saved_offsets"][0], shape[0]) if shape else (0, 1)
            if rows:
                parts[name][first] = number, first, first + rows
                length = max(first + rows, shapes[name][0]) if name in shapes and shape else first + rows
                shapes[name] = [length, *shape[1:]] if shape else []
    layouts = {name: tuple(by_row[first] for first in sorted(by_row)) for name, by_row in parts.items()}
    return _index([path.name for path in paths], shapes, layouts)


def read_index(folder: Path) -> Index:
    """The index of the shards in `folder`, from its file or, without one, from the headers; ValueError if it
    cannot be read."""
    if not (folder / INDEX).exists():
        return index_of(folder)
    try:
        return Index(**json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{INDEX} cannot be read: {error}") from None


@torch.no_grad()
def read_rows(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill this rank's rows of `tensors` from the shards in `folder`, of any number of ranks.

    ValueError if a tensor or some of its rows are missing or of another shape, or if a shard cannot be read.
    """
    index = read_index(folder)
    wanted: dict[int, list[tuple[str, Tensor, slice]]] = defaultdict(list)
    for name, tensor in tensors.items():
        target, where = local_rows(tensor)
        rows = where[0] if where else slice(0, 1)
        for file, offset, first, last in index.find(name, tensor.shape, rows):
            place = target[first - rows.start : last - rows.start] if where else target
            wanted[file].append((name, place, slice(first - offset, last - offset)))
    for number, parts in sorted(wanted.items()):
        try:
            with safe_open(folder / index.files[number], framework="pt") as file:
                for name, place, rows in parts:
                    values = file.get_slice(name)[rows] if place.ndim else file.get_tensor(name)
                    if values.shape != place.shape:
                        raise ValueError(f"{name} has other rows than the index says")
                    place.copy_(values)
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{index.files[number]} cannot be read: {error}") from None
