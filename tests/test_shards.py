"""The shards of a checkpoint: a rank opens what holds its rows, and what is not whole is a sentence."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import trainer.shards
from tests.tiny import run_ranks
from trainer.atomic import RESUME
from trainer.checkpoint import LoadError, load
from trainer.distributed import start
from trainer.shards import INDEX, index_of, read_index, read_rows, save_tensors, span, write_index

SHARD = "shard-{:05d}-model-00001-of-00001.safetensors"
SHAPES = {"matrix": (150, 3), "same_rows": (150,), "few_rows": (40, 2), "step": ()}


def whole(name: str) -> Tensor:
    return torch.arange(math.prod(SHAPES[name]), dtype=torch.float32).view(SHAPES[name]) + len(name)


def rows_of(num_rows: int, rank: int, world: int) -> slice:
    """The rows that fully_shard gives a rank."""
    share = math.ceil(num_rows / world)
    return slice(min(rank * share, num_rows), min((rank + 1) * share, num_rows))


def write_shards(folder: Path, world: int) -> list[Tensor]:
    """What `world` ranks write of SHAPES: scalars by rank 0, and nothing for a rank without rows. Returns the
    spans for `write_index`."""
    spans = []
    for rank in range(world):
        tensors, offsets = {}, {}
        for name, shape in SHAPES.items():
            rows = rows_of(shape[0], rank, world) if shape else slice(0, int(rank == 0))
            if rows.stop > rows.start:
                tensors[name] = whole(name)[rows].contiguous() if shape else whole(name)
                offsets[name] = [rows.start, *[0] * (len(shape) - 1)] if shape else []
        with patch("torch.distributed.get_rank", return_value=rank):
            save_tensors(tensors, offsets, folder)
        written = {name: span(rows, offsets[name]) for name, rows in tensors.items()}
        spans.append(torch.tensor([written.get(name, (0, 0)) for name in SHAPES]))
    return spans


def read_as(folder: Path, rank: int, world: int) -> None:
    """Read the rows of one rank of `world`, alone; prints the names of the files that it opens."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    tensors: dict[str, Tensor] = {}
    for name, shape in SHAPES.items():
        if not shape:
            tensors[name] = torch.zeros(())
            continue
        rows = rows_of(shape[0], rank, world)
        local = torch.zeros(rows.stop - rows.start, *shape[1:])
        like = whole(name)
        tensors[name] = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride()
        )
    opened, safe_open = [], trainer.shards.safe_open

    def counted(path: Path, framework: str) -> Any:
        opened.append(Path(path).name)
        return safe_open(path, framework)

    trainer.shards.safe_open = counted
    read_rows(folder, tensors)
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            assert torch.equal(tensor.to_local(), whole(name)[rows_of(SHAPES[name][0], rank, world)]), name
        else:
            assert torch.equal(tensor, whole(name)), name
    print(json.dumps(opened))


def test_a_rank_opens_no_shard_without_its_rows_however_many_there_are(tmp_path):
    write_index(tmp_path, SHAPES, write_shards(tmp_path, 64))  # 3 rows of 150 each, in 50 of them
    cases = {(5, 64): [1, 6], (5, 24): [1, 11, 12, 13, 14], (63, 64): [1]}
    for (rank, world), numbers in cases.items():
        (output,) = run_ranks(1, read_as, tmp_path, rank, world)
        assert json.loads(output.splitlines()[-1]) == [SHARD.format(number) for number in numbers]
    (tmp_path / INDEX).unlink()
    (output,) = run_ranks(1, read_as, tmp_path, 5, 24)  # as checkpoints without an index are read
    assert len(json.loads(output.splitlines()[-1])) == 50 + len(cases[5, 24])


def test_tensors_with_as_many_rows_share_their_part_of_the_index(tmp_path):
    write_index(tmp_path, SHAPES, write_shards(tmp_path, 64))
    index = read_index(tmp_path)
    assert len(index.layouts) == len({shape[:1] for shape in SHAPES.values()})
    from_headers = index_of(tmp_path)
    for name, shape in SHAPES.items():
        rows = slice(0, shape[0] if shape else 1)
        assert index.find(name, shape, rows) == from_headers.find(name, shape, rows)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


BROKEN: dict[str, tuple[bool, Callable[[Path], Any], str]] = {
    "a missing shard": (
        True,
        lambda folder: (folder / SHARD.format(2)).unlink(),
        "shard-00002.*cannot be read",
    ),
    "half a shard": (True, lambda folder: cut_short(folder / SHARD.format(2)), "shard-00002.*cannot be read"),
    "another shard": (
        True,
        lambda folder: (folder / SHARD.format(2)).write_bytes((folder / SHARD.format(4)).read_bytes()),
        "shard-00002.*cannot be read: matrix has other rows than the index says",
    ),
    "half an index": (True, lambda folder: cut_short(folder / INDEX), "index.json cannot be read"),
    "half a shard, no index": (
        False,
        lambda folder: cut_short(folder / SHARD.format(2)),
        "shard-00002.*cannot be read",
    ),
    "rows in the middle": (
        False,
        lambda folder: (folder / SHARD.format(2)).unlink(),
        r"matrix lacks some of its rows 0 to 149",
    ),
    "rows at the end": (
        False,
        lambda folder: (folder / SHARD.format(4)).unlink(),
        r"matrix has shape \[114, 3\] instead of \[150, 3\]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_missing_or_damaged_is_named(tmp_path, case):
    has_index, spoil, said = BROKEN[case]
    spans = write_shards(tmp_path, 4)
    if has_index:
        write_index(tmp_path, SHAPES, spans)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=said):
        read_rows(tmp_path, {name: torch.zeros(shape) for name, shape in SHAPES.items()})


def test_a_tensor_that_is_not_there_or_has_another_shape_is_named(tmp_path):
    write_shards(tmp_path, 4)
    with pytest.raises(ValueError, match="bias is missing"):
        read_rows(tmp_path, {"bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"matrix has shape \[150, 3\] instead of \[150, 4\]"):
        read_rows(tmp_path, {"matrix": torch.zeros(150, 4)})


def test_shards_that_do_not_hold_every_row_get_no_index(tmp_path):
    spans = write_shards(tmp_path, 4)
    with pytest.raises(ValueError, match="matrix lacks some of its rows 0 to 149"):
        write_index(tmp_path, SHAPES, [*spans[:2], spans[2] * 0, spans[3]])
    (tmp_path / SHARD.format(3)).unlink()  # as if its rank's machine had another file system
    with pytest.raises(ValueError, match=r"rank 2 wrote .*shard-00003.* which another rank does not see"):
        write_index(tmp_path, SHAPES, spans)
    assert not (tmp_path / INDEX).exists()


def load_or_say(folder: Path) -> None:
    rank = start().rank
    names = ["step"] if rank == 0 else ["matrix"]  # only rank 1 needs the second shard
    try:
        load(folder, {name: torch.zeros(SHAPES[name]) for name in names})
    except LoadError as error:
        print(error)


def test_a_shard_that_one_rank_cannot_read_is_the_same_sentence_on_all(tmp_path):
    write_index(tmp_path / RESUME, SHAPES, write_shards(tmp_path / RESUME, 4))
    (tmp_path / RESUME / SHARD.format(2)).unlink()
    first, second = run_ranks(2, load_or_say, tmp_path)
    assert first == second
    assert first.startswith(f"{tmp_path}/{RESUME}: {SHARD.format(2)} cannot be read: ")
