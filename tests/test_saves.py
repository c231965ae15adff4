"""Saves in a thread: the shards are those of torch's writer, and training is neither changed nor held up."""

import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter, filesystem
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import trainer.checkpoint
import trainer.weights
from tests.fault_cases import fault_flags
from tests.tiny import run_ranks
from trainer.atomic import RESUME, Jobs
from trainer.checkpoint import Checkpoints, load
from trainer.config import Config
from trainer.distributed import device_mesh, start
from trainer.lock import Lock
from trainer.main import main
from trainer.weights import local_rows

SHAPES = {"even.weight": (8, 6), "uneven.weight": (5, 3), "bias": (7,), "one_row.weight": (1, 4)}
SHARD = "shard-0000{}-model-00001-of-00001.safetensors"


def example_state(mesh: DeviceMesh) -> dict[str, Tensor]:
    """Parameters with their moments, in several dtypes and shardings, and the plain scalars of Adam."""
    tensors: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        whole = 100 * number + torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
        moments = {f"{name}.exp_avg": -whole.bfloat16(), f"{name}.exp_avg_sq": whole.to(torch.uint8)}
        for key, tensor in {name: whole, **moments}.items():
            placements = [Replicate(), Shard(0)][-mesh.ndim :]
            tensors[key] = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
        tensors[f"{name}.step"] = torch.tensor(float(number))
    return tensors


def write_nothing(folder: Path, jobs: Jobs) -> None:
    pass


def checkpoints_in(folder: Path, asynchronous: bool = True) -> Checkpoints:
    flags = Config(output_dir=str(folder), async_save=asynchronous)
    return Checkpoints({}, flags, Lock(folder), steps_per_epoch=1, last_step=9)


def save_example(folder: Path, asynchronous: bool, ranks_of_a_node: int | None = None) -> None:
    if ranks_of_a_node:
        os.environ["LOCAL_WORLD_SIZE"] = str(ranks_of_a_node)
    mesh = device_mesh(start(), hybrid=ranks_of_a_node is not None)
    checkpoints = checkpoints_in(folder, asynchronous)
    tensors = example_state(mesh)
    checkpoints.save(1, write_nothing, tensors, {})
    if asynchronous:
        for tensor in tensors.values():
            tensor.zero_()  # as training would change them
    checkpoints.wait()
    assert not checkpoints.failed


def save_example_with_torch(folder: Path) -> None:
    writer = HuggingFaceStorageWriter(str(folder / RESUME), save_distributed=True)
    dcp.save(example_state(device_mesh(start())), storage_writer=writer)


def load_example(folder: Path) -> None:
    expected = example_state(device_mesh(start()))
    loaded = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    load(folder, loaded)
    for name, tensor in expected.items():
        assert torch.equal(local_rows(loaded[name])[0], local_rows(tensor)[0]), name


def content(path: Path) -> tuple[dict, dict[str, tuple[list[int], Tensor]]]:
    """The metadata of a shard, and its tensors that are not empty with their offsets."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        offsets = json.loads(metadata.pop("DCP_SHARDING_INFO"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert offsets.keys() == tensors.keys()
    rows = {name: (offsets[name]["saved_offsets"], t) for name, t in tensors.items() if t.numel()}
    return metadata, rows


@pytest.mark.parametrize("asynchronous", [True, False])
def test_shards_are_what_torchs_own_writer_writes(tmp_path, asynchronous):
    run_ranks(2, save_example, tmp_path / "ours", asynchronous)
    run_ranks(2, save_example_with_torch, tmp_path / "torchs")
    plain = []
    for rank in (1, 2):
        our_metadata, ours = content(tmp_path / "ours" / "checkpoint-1" / RESUME / SHARD.format(rank))
        metadata, theirs = content(tmp_path / "torchs" / RESUME / SHARD.format(rank))
        assert our_metadata == metadata
        plain += [name for name in ours if name.endswith(".step")]
        for rows in (ours, theirs):  # any rank may write these
            for name in [name for name in rows if name.endswith(".step")]:
                del rows[name]
        assert ours.keys() == theirs.keys()
        for name, (offset, tensor) in ours.items():
            assert offset == theirs[name][0], name
            assert torch.equal(tensor, theirs[name][1]), name
    assert sorted(plain) == sorted(f"{name}.step" for name in SHAPES)


def test_whoever_may_read_a_new_file_may_read_all_that_a_run_saves(fault_world, tmp_path):
    (tmp_path / "new").touch()
    saved = [path for path in (fault_world / "straight").rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in saved) >= 3
    mode = (tmp_path / "new").stat().st_mode
    assert [path for path in saved if path.stat().st_mode != mode] == []


def test_any_number_of_ranks_loads_what_torchs_writer_wrote_and_ours(tmp_path):
    run_ranks(2, save_example_with_torch, tmp_path / "torchs")  # as checkpoints were written before
    run_ranks(3, save_example, tmp_path / "ours", True)
    for folder in (tmp_path / "torchs", tmp_path / "ours" / "checkpoint-1"):
        for ranks in (1, 2, 4):
            run_ranks(ranks, load_example, folder)


def test_ranks_that_hold_the_same_rows_share_the_writing(tmp_path):
    run_ranks(4, save_example, tmp_path, True, 2)
    folder = tmp_path / "checkpoint-1"
    shards = [content(folder / RESUME / SHARD.format(rank))[1] for rank in (1, 2, 3, 4)]
    written = [sum(tensor.nbytes for _, tensor in rows.values()) for rows in shards]
    assert sum(written) == sum((4 + 2 + 1) * math.prod(shape) + 4 for shape in SHAPES.values())
    for first, second in ((0, 2), (1, 3)):  # of the same shard, on two nodes
        largest = max(tensor.nbytes for _, tensor in shards[first].values())
        assert abs(written[first] - written[second]) <= largest + 4 * len(SHAPES)
    run_ranks(2, load_example, folder)


def main_that_logs_memory(log: Path, argv: list[str]) -> int:
    """The run; `log` gets a line for every file of tensors of rank 0: its name, and their addresses."""

    def logging(save: Callable[..., None], place: int) -> Callable[..., None]:
        def save_and_log(tensors: dict[str, Tensor], *rest: object) -> None:
            addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
            if os.environ["RANK"] == "0":
                with log.open("a") as file:
                    file.write(json.dumps([Path(str(rest[place])).name, addresses]) + "\n")
            save(tensors, *rest)

        return save_and_log

    trainer.checkpoint.save_tensors = logging(trainer.checkpoint.save_tensors, 1)
    trainer.weights.write_safetensors = logging(trainer.weights.write_safetensors, 0)
    return main(argv)


def test_every_save_copies_into_the_memory_of_the_first(fault_world, tmp_path):
    log = tmp_path / "log"
    run_ranks(2, main_that_logs_memory, log, fault_flags(fault_world, tmp_path / "run"))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for name in ("model.safetensors", RESUME):
        first, *later = [addresses for file, addresses in lines if file == name]
        assert len(later) == 7  # a save every step
        assert all(addresses == first for addresses in later)
        assert len(set(first.values())) == len(first)


def save_where_cuda_is_available(folder: Path) -> None:
    """A save whose thread believes it is on the third GPU of a machine."""
    start()
    checkpoints = checkpoints_in(folder)
    weight = torch.randn(64, 64)
    used: list[object] = []

    def write_model(folder: Path, jobs: Jobs) -> None:
        contents = {"weight": jobs.on_host("weight", weight)}
        jobs.later(lambda: safetensors.torch.save_file(contents, folder / "model.safetensors"))

    def set_device_index(index: int) -> None:
        used.append((index, threading.current_thread().name))

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("not in a save")

    def serialize_file(*arguments: object, **options: object) -> None:
        used.append("serialize_file")
        safetensors.serialize_file(*arguments, **options)

    torch.cuda.is_available = lambda: True
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_device_index = lambda: 2
    torch.accelerator.set_device_index = set_device_index
    torch.accelerator.synchronize = lambda: used.append("synchronize")
    filesystem._OverlappingCpuLoader.__init__ = forbidden
    safetensors.torch.save = safetensors.torch.serialize = forbidden
    safetensors.torch.serialize_file = serialize_file
    checkpoints.save(1, write_model, {"weight": weight}, {})
    checkpoints.wait()
    assert not checkpoints.failed
    assert used == ["synchronize", (2, "checkpoint-1"), "serialize_file", "serialize_file"]


def test_on_cuda_the_thread_sets_its_device_and_files_are_written_without_the_interpreter_lock(tmp_path):
    """`serialize_file` releases the lock while it works, unlike `serialize`, which torch's writer calls."""
    run_ranks(1, save_where_cuda_is_available, tmp_path)


def longest_gap(is_over: Callable[[], bool]) -> float:
    """Seconds of the longest time between two turns of this thread, which wants one every millisecond."""
    longest, last = 0.0, time.perf_counter()
    while not is_over():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def measure_gaps(folder: Path) -> None:
    start()
    checkpoints = checkpoints_in(folder)
    tensors = {f"weight.{i}": torch.randn(25_000_000) for i in range(4)}
    for step in range(1, 5):
        checkpoints.save(step, write_nothing, tensors, {})
        began = time.perf_counter()
        saved = folder / f"checkpoint-{step}"
        busy = longest_gap(lambda saved=saved: checkpoints.newest == saved or checkpoints.failed)
        end = 2 * time.perf_counter() - began
        idle = longest_gap(lambda end=end: time.perf_counter() > end)
        checkpoints.wait()
        print(json.dumps([busy, idle]))


@pytest.mark.slow
def test_a_large_shard_never_keeps_the_interpreter_from_the_training_loop(tmp_path):
    """400 MB: torch's own writer keeps it for some 0.3 s of every save. The best of four saves, because other
    processes of the machine can only make a gap longer."""
    (output,) = run_ranks(1, measure_gaps, tmp_path)
    gaps = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    assert len(gaps) == 4
    assert min(busy - idle for busy, idle in gaps) < 0.05
