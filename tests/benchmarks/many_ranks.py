"""What a job of many ranks costs each of them, measured on one machine.

    python -m tests.benchmarks.many_ranks shards --ranks 1024 --tensors 900
    python -m tests.benchmarks.many_ranks sockets --ranks 32

`shards` writes what so many ranks write of small tensors and reads one rank's rows: by the index, by the
headers of all shards as in older checkpoints, and with torch's own reader alone, without the plans of all
ranks that it would also collect on rank 0. Output, a line a way: CPU seconds, files opened, memory at most.

`sockets` starts a process group of gloo on ranks without a model, with TORCH_GLOO_LAZY_INIT and without, and
runs some collectives of a trainer's start. Output: sockets of the last rank, and seconds.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import safetensors
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.tiny import run_ranks
from trainer.distributed import barrier, finish, start
from trainer.shards import INDEX, read_rows, save_tensors, write_index

ROWS, COLUMNS = 4, 2
"""Of a tensor on each rank."""


def names_of(tensors: int) -> list[str]:
    return [f"model.layers.{i // 9}.attention.weight_{i % 9}.exp_avg" for i in range(tensors)]


def write_shards(folder: Path, ranks: int, tensors: int) -> None:
    for rank in range(ranks):
        shard = {name: torch.full((ROWS, COLUMNS), float(rank)) for name in names_of(tensors)}
        offsets = {name: [rank * ROWS, 0] for name in shard}
        with (
            patch("torch.distributed.get_rank", return_value=rank),
            patch("trainer.shards.sync_to_disk"),
        ):
            save_tensors(shard, offsets, folder)


def read(folder: Path, way: str, ranks: int, tensors: int) -> None:
    """Read one rank's rows; prints what it took."""
    rank = ranks // 2
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    rows: dict[str, Tensor] = {
        name: DTensor.from_local(torch.zeros(ROWS, COLUMNS), mesh, [Shard(0)], run_check=False)
        for name in names_of(tensors)
    }
    opened, safe_open = 0, safetensors.safe_open

    def counted(filename: str | Path, framework: str) -> object:
        nonlocal opened
        opened += 1
        return safe_open(filename, framework)

    spans = [torch.tensor([[r * ROWS, (r + 1) * ROWS]] * tensors) for r in range(ranks)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with patch("safetensors.safe_open", counted), patch("trainer.shards.safe_open", counted):
        if way == "write the index":
            write_index(folder, {name: tensor.shape for name, tensor in rows.items()}, spans)
        elif way == "torch's own reader":
            load(rows, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        else:
            read_rows(folder, rows)
    seconds = time.process_time() - started
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if way != "write the index":
        assert all((t.to_local() == rank).all() for t in rows.values() if isinstance(t, DTensor))
    print(json.dumps({"way": way, "seconds": round(seconds, 2), "opened": opened, "MB": round(memory)}))


def shards(ranks: int, tensors: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, ranks, tensors)
        for way in ("headers", "write the index", "index", "torch's own reader"):
            (output,) = run_ranks(1, read, folder, way, ranks, tensors, timeout=1200)
            print(output.splitlines()[-1], flush=True)
        print(f"the index has {(folder / INDEX).stat().st_size:,} bytes")


def join(lazy: str) -> None:
    """Join a group, as the trainer does; prints this rank's sockets, and the seconds that it took."""
    os.environ["TORCH_GLOO_LAZY_INIT"] = lazy
    started = time.perf_counter()
    start()
    second = dist.new_group(backend="gloo")
    joined = time.perf_counter() - started
    dist.all_gather_object([None] * dist.get_world_size(), "hello", group=second)
    dist.all_reduce(torch.ones(6))
    barrier()
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    sockets = sum(link.startswith("socket:") for link in links)
    barrier()
    finish()
    used = time.perf_counter() - started
    print(json.dumps({"lazy": lazy, "sockets": sockets, "joined": round(joined, 2), "all": round(used, 2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["shards", "sockets"])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--tensors", type=int, default=900)
    arguments = parser.parse_args()
    if arguments.what == "shards":
        shards(arguments.ranks, arguments.tensors)
        return
    for lazy in ("0", "1"):
        outputs = run_ranks(arguments.ranks, join, lazy, timeout=1200)
        print(outputs[-1].splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
