"""Start and end of the process group, who speaks, and the few reductions that the loop needs.

Input: torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), or nothing: a plain
`python -m trainer.main` becomes a group of one, so that one code path serves 1 to 64 ranks.
Output: a `Ranks` and an initialised default process group on the machine's accelerator (NCCL on CUDA), or on
the CPU with gloo.

    ranks = start()                                   # Ranks(rank=1, world=2, local_rank=1, …)
    all_sum(torch.tensor(3.0, device=ranks.device))   # 3.0 on each of 2 ranks → 6.0 on both
    log("only rank 0 says this")
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

BAD_INPUT, STOPPED, FAILED = 2, 75, 1
"""Exit statuses, beside 0: nothing was trained; stopped on request, run again to go on; anything else."""

_last_words = ""
"""What this rank said last: why it ends, where it ends with a failure."""
_neighbours: list[int] = []
"""The process ids of this machine's other ranks."""


@dataclass(frozen=True)
class Ranks:
    """This process: `rank` of `world`, `local_rank` of this machine's `local_world`, and its `device`."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device


def start(timeout_seconds: float = 1800, host_collectives: bool = False) -> Ranks:
    """Join the process group that torchrun describes, or start one of a single process.

    `timeout_seconds` bounds every collective: a rank that never arrives ends the job instead of hanging it.
    `host_collectives`: tensors in the host's memory take part in collectives too, by gloo.
    """
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
    store, rank, world = next(rendezvous("env://"))
    # torchrun may keep its store when it starts the ranks again: they must not find addresses of the dead.
    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
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
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    _meet_neighbours(store, rank, range(rank - local_rank, rank - local_rank + local_world))
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, local_world, device)


def _meet_neighbours(store: Store, rank: int, ranks: range) -> None:
    """Learn the process ids of this machine's other ranks."""
    store.set(f"process {rank}", str(os.getpid()))
    _neighbours[:] = [int(store.get(f"process {other}")) for other in ranks if other != rank]


def a_neighbour_is_gone() -> bool:
    """Whether another rank of this machine has ended, well or badly."""
    return not all(_is_alive(process) for process in _neighbours)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def device_mesh(ranks: Ranks, hybrid: bool = False) -> DeviceMesh:
    """All ranks in a row; or, hybrid, (replicate, shard): a row a node, whose ranks torchrun numbers in turn.

    4 nodes of 8 ranks: rank 13 is replica 1 of shard 5.
    """
    if not hybrid:
        return init_device_mesh(ranks.device.type, (ranks.world,), mesh_dim_names=("data",))
    shape = (ranks.world // ranks.local_world, ranks.local_world)
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))


def finish() -> None:
    """Leave the process group; a no-op where none was started."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process with an exit status, and nothing after it: a lost peer must not hold up a failure.

    torchrun's own status is 0 or 1, so the first rank of each machine writes ours into the file
    XCOMPOSER_STATUS_FILE, if named. What a failing rank said last goes where torchrun looks for its error.
    """
    if status == BAD_INPUT and not is_main():
        time.sleep(10)  # torchrun ends the others with the first that ends; let that be the one that speaks
    if int(os.environ.get("LOCAL_RANK", "0")) == 0 and "XCOMPOSER_STATUS_FILE" in os.environ:
        Path(os.environ["XCOMPOSER_STATUS_FILE"]).write_text(str(status))
    if status and _last_words and "TORCHELASTIC_ERROR_FILE" in os.environ:
        extra = {"py_callstack": _last_words, "timestamp": str(int(time.time()))}
        error = {"message": {"message": _last_words, "extraInfo": extra}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(error))
    if status == STOPPED and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        status = 0  # any other would make torchrun start the ranks again
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status) if status else sys.exit(0)


def is_main() -> bool:
    """True on the one rank that speaks and writes the run's files."""
    return int(os.environ.get("RANK", "0")) == 0


def log(message: str, every_rank: bool = False) -> None:
    """Print, by default on rank 0 alone, on the error stream: the standard output stays free for results."""
    global _last_words
    _last_words = message.strip()
    if every_rank or is_main():
        print(message, file=sys.stderr, flush=True)


def no_bar() -> bool:
    """Whether progress is to be told in lines: a bar redraws itself, which fills a log file."""
    return not is_main() or not sys.stderr.isatty()


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 runs the block, then all others together: for what is made once and cached in files."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The element-wise sum over all ranks, on the same device; `values` itself is left as it is."""
    total = values.clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a rank's dropout in one step, so that masks depend on nothing that happened before it."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)


def all_max(value: float, device: torch.device) -> float:
    """The largest value of any rank."""
    largest = torch.tensor(value, device=device, dtype=torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def agree_on_problems(problems: Sequence[str]) -> bool:
    """Say rank 0's problems, a line each, and tell every rank whether there are any.

    All ranks read the same files; that they leave together keeps one clear list from drowning in the errors
    of ranks that lost their peer.
    """
    held = [list(problems)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(held, src=0)
    if held[0]:
        log("\n".join(f"error: {problem}" for problem in held[0]))
    return bool(held[0]) or bool(problems)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank went away: the cause is that rank's, not ours."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("gloo", "Connection closed by peer", "NCCL", "Socket")
    )
