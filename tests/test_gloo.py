"""Gathers and reduce-scatters by gloo's messages against what they are defined as, bit for bit."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from tests.same_training import sharded
from tests.tiny import run_ranks, tiny_model
from trainer.distributed import start
from trainer.extras.gloo import GlooAllGather, GlooReduceScatter


def numbers(rank, length, dtype):
    """What rank `rank` has, known to all: of many magnitudes, so that the order of a sum shows."""
    random = torch.Generator().manual_seed(rank)
    return (torch.randn(length, generator=random) * 10 ** torch.randn(length, generator=random)).to(dtype)


def both_collectives(members):
    start()
    group = dist.new_group(members) if members else dist.group.WORLD
    members = members or list(range(dist.get_world_size()))
    if dist.get_rank() in members:
        check_both(group, members)
    dist.barrier()


def check_both(group, members):
    world, rank = group.size(), group.rank()
    for dtype in (torch.float32, torch.bfloat16):
        for length in (1, 3, 50_000):
            gather, expected = GlooAllGather(), torch.cat([numbers(m, length, dtype) for m in members])
            given = expected.chunk(world)[rank].clone()
            output = gather.allocate((world * length,), dtype=dtype, device=torch.device("cpu"))
            gather(output, given, group)
            assert torch.equal(output, expected)
            output.zero_()
            in_place = output.chunk(world)[rank].copy_(given)  # as FSDP calls it
            gather(output, in_place, group)
            assert torch.equal(output, expected)

            rows = [numbers(m, world * length, dtype).chunk(world)[rank] for m in members]
            expected = rows[0] + rows[1]
            for row in rows[2:]:
                expected += row
            given = numbers(dist.get_rank(), world * length, dtype)
            output = torch.empty(length, dtype=dtype)
            GlooReduceScatter()(output, given, group, dist.ReduceOp.SUM)
            assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("ranks", "members"), [(2, None), pytest.param(3, None, marks=pytest.mark.slow), (4, None), (4, [1, 3])]
)
def test_every_rank_gets_the_whole_and_its_part_of_the_sum_in_the_order_of_ranks(ranks, members):
    run_ranks(ranks, both_collectives, members)


def ways_of(folder):
    model, _ = sharded(folder)
    groups = [
        g
        for m in model.modules()
        if isinstance(m, FSDPModule)
        for g in m._get_fsdp_state()._fsdp_param_groups
    ]
    assert groups
    assert {type(g._all_gather_comm) for g in groups} == {GlooAllGather}
    assert {type(g._reduce_scatter_comm) for g in groups} == {GlooReduceScatter}


def test_all_groups_of_a_model_on_cpus_are_gathered_and_reduced_so(tmp_path):
    run_ranks(1, ways_of, tiny_model(tmp_path / "model"))
