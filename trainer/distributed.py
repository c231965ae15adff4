"""The process group, and the reductions that the loop needs.

Input: torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), or nothing: a plain
`python -m trainer.main` becomes a group of one, so that the same code serves any number of ranks.
Output: a `Ranks` and an initialised default process group on the machine's accelerator (NCCL on CUDA), or on
the CPU with gloo.

    ranks = start()                                   # Ranks(rank=1, world=2, local_rank=1, …)
    all_sum(torch.tensor(3.0, device=ranks.device))   # 3.0 on each of 2 ranks → 6.0 on both
    finish()
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor

from data.batch import to_device
from trainer import machines
from trainer.job import allow_many_sockets, local_world, meet, part


@dataclass(frozen=True)
class Ranks:
    """This process: `rank` of `world`, `local_rank` of this machine's `local_world`, and its `device`."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device


def make_deterministic() -> None:
    """Make every operation return the same bits for the same input, or raise an error if it cannot.

    Call it before `start`: NCCL then avoids NVLink's own sums (NVLS), whose order varies.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # read by transformers
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Filling memory that is written next would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def start(timeout_seconds: float = 1800, host_collectives: bool = False) -> Ranks:
    """Join the process group that torchrun describes, or start one of a single process.

    timeout_seconds: timeout of every collective, so that a missing rank ends the job instead of hanging it.
    host_collectives: also initialise gloo for tensors in host memory.
    """
    allow_many_sockets()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        device = torch.device("cpu")
    else:
        device = torch.device(accelerator.type, local_rank)
        torch.accelerator.set_device_index(local_rank)
    # torch prefers cuDNN's attention on H100 and B200, which spends 0.4 to 1 s on a plan for every new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # By default torch rounds the inputs of float32 convolutions to TF32, though not those of matrix products.
    torch.backends.cudnn.allow_tf32 = False
    store, rank, world = meet()
    machines.use_interface_towards(store, os.environ["MASTER_ADDR"])
    backend = dist.get_default_backend_for_device(device.type)
    if host_collectives and device.type != "cpu":
        backend = f"cpu:gloo,{device.type}:{backend}"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if device.type != "cpu" else None,
    )
    return Ranks(rank, world, local_rank, local_world(), device)


def device_mesh(ranks: Ranks, hybrid: bool = False) -> DeviceMesh:
    """A one-dimensional mesh of all ranks; hybrid: a (replicate, shard) mesh, where each row is a node.

    4 nodes of 8 ranks: rank 13 is replica 1 of shard 5.
    """
    if not hybrid:
        return init_device_mesh(ranks.device.type, (ranks.world,), mesh_dim_names=("data",))
    shape = (ranks.world // ranks.local_world, ranks.local_world)
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))
    whole: Any = dist.group.WORLD
    if options := whole._get_backend(ranks.device).options:  # a forecast's group has none, and never waits
        for group in mesh.get_all_groups():  # which begin with the backend's time limit instead of `start`'s
            _set_pg_timeout(options._timeout, group)
    return mesh


def finish() -> None:
    """Wait for all ranks and destroy the process group; a no-op if none was started."""
    if dist.is_initialized():
        part()  # before the barrier: behind it, no rank takes the end of another for a failure
        barrier()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def shard_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor, not copied; a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The element-wise sum over all ranks, on the same device; `values` itself is unchanged."""
    total = values.clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a rank's dropout in one step, so that masks do not depend on earlier steps."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)


def all_max(value: float, device: torch.device) -> torch.Tensor:
    """The largest value of any rank, a float64 scalar on the device, which the host does not wait for."""
    largest = to_device(torch.tensor(value, dtype=torch.float64), device)
    if dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest
