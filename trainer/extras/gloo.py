"""FSDP's all-gather and reduce-scatter between CPUs, by gloo's point-to-point messages.

Input and output are those of FSDP2's `AllGather` and `ReduceScatter`. 2 ranks, each with one of two numbers:

    gather           [1, _] and [_, 2]  →  [1, 2] on both
    reduce-scatter   [1, 2] and [3, 4]  →  [4] on rank 0, [6] on rank 1

gloo's own collectives first copy the whole tensor into new memory, and its reduce-scatter is an all-reduce
most of which is discarded: on 2 ranks they take two to three times as long as these
(`python -m tests.benchmarks.gloo`). Sums are formed in the order of the ranks. Accelerators use NCCL's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter


class _Messages:
    """Allocation and exchange of both collectives."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def exchange(self, sent: Sequence[Tensor], received: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        """Send sent[k] to rank k of the group, and fill received[k] from it; a rank's own are not copied."""
        rank, world = group.rank(), group.size()
        works: list[Any] = []
        for distance in range(1, world):
            before, behind = (rank - distance) % world, (rank + distance) % world
            works.append(dist.irecv(received[before], group=group, group_src=before))
            works.append(dist.isend(sent[behind], group=group, group_dst=behind))
        for work in works:
            work.wait()


class GlooAllGather(_Messages, AllGather):
    """Rank k's input, [n], becomes row k of every rank's output, [ranks × n]."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        rows = output_tensor.chunk(group.size())
        own = rows[group.rank()]
        if own.data_ptr() != input_tensor.data_ptr():
            own.copy_(input_tensor)
        self.exchange([own] * group.size(), rows, group)


class GlooReduceScatter(_Messages, ReduceScatter):
    """Row k of every rank's input, [ranks × n], is summed into rank k's output, [n]."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM, op
        rows = input_tensor.chunk(group.size())
        terms = [row if k == group.rank() else torch.empty_like(row) for k, row in enumerate(rows)]
        self.exchange(rows, terms, group)
        torch.add(terms[0], terms[1], out=output_tensor)
        for term in terms[2:]:
            output_tensor += term
