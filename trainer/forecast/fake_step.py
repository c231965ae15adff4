"""A step of training on tensors without memory: what one rank holds and sends, on any number of ranks.

Input: a configuration and its plan (trainer/prepare.py), and a micro-batch. The trainer's own `parallelize`,
model, loss and optimizer run, on fake tensors and a process group whose collectives do nothing:

    with fake_ranks(1024, local_world=8) as ranks:
        plan, problems = describe(config, ranks, for_training=False)
        step = fake_step(plan, config, ranks, micro_batch)
    step.peaks["backward"]         # {"parameters": 33_500_000, "gathered parameters": 1_020_000_000, …}
    step.sent                      # {("all-gather", "all ranks"): Sent(number=91, within=…, between=…), …}

Output: the bytes of all tensors' storages by what they are for, at the peak of each phase of a step, and the
collectives. `Count` counts the same in a real run, of real tensors.

Tensors are on the CPU as far as torch knows, so attention is torch's CPU kernel. What is inside a kernel, and
what CUDA, NCCL and an allocator's rounding take, is not counted. Fake tensors have no values, but models look
into integers to know shapes (grids, positions, bounds of samples): an operation on tensors that are not fake
is computed; only what parameters or pixels have a part in is not.
"""

import contextlib
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fake_collectives import CollectiveOp
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from data.batch import MicroBatch, map_tensors
from trainer.checkpoint import resumable
from trainer.config import Config
from trainer.distributed import Ranks, all_max, all_sum, device_mesh, shard_of
from trainer.loss import chunked_cross_entropy
from trainer.metrics import sum_over_ranks
from trainer.optim import adamw, clip_gradients, parameter_groups, squared_norm
from trainer.parallelize import allocate, parallelize, set_communication
from trainer.prepare import Plan
from trainer.rehearsal import bytes_of_a_save
from trainer.trainable import part_of

aten = torch.ops.aten
COMPONENTS = (
    "parameters",
    "gradients",
    "optimizer",
    "gathered parameters",
    "communication",
    "logits and loss",
    "activations",
)
"""What a storage is for. Communication is the buffers of collectives; activations include all other temporary
results."""
COLLECTIVES = {
    "_allgather_base_": ("all-gather", 1),
    "all_gather_into_tensor": ("all-gather", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 2),
    "all_reduce": ("all-reduce", 2),
    "send": ("message", 0),
}
"""Operation → what it is, and how often a ring of W ranks sends (W − 1) / W of the whole tensor."""


@dataclass
class Sent:
    """What a rank sends in the collectives of a kind: their number, and bytes within and between machines."""

    number: int = 0
    within: float = 0.0
    between: float = 0.0


class Count(TorchDispatchMode):
    """Counts the bytes of tensors' storages, by what they are for, and what is sent in collectives.

        with Count(local_world=8) as count:
            with count.phase("forward"), count.of("parameters"):
                …
        count.peaks["forward"]      # {"parameters": …}: at the moment when their sum was largest

    Storages count from the operation that makes them until they are freed. In a ring over several machines
    only some ranks send to another machine, so bytes between machines are the average of the ranks.
    """

    def __init__(self, local_world: int, fake: FakeTensorMode | None = None) -> None:
        """local_world: ranks of a machine; fake: the mode of tensors without memory, if they are."""
        super().__init__()
        self.local_world, self.fake = local_world, fake
        self.peaks: dict[str, dict[str, int]] = {}
        self.sent: dict[tuple[str, str], Sent] = {}
        """(kind of collective, dimension of the mesh) → what a rank sends."""
        self.times = 1
        """How often what runs now is to be counted as sent."""
        self.now: Counter[str] = Counter()
        self._component = "activations"
        self._storages: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self.largest, self._at_largest = 0, dict[str, int]()
        self._total = 0
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> "Count":
        resize_storage = torch.UntypedStorage.resize_
        infer_shapes = ShardingPropagator._propagate_tensor_meta_non_cached

        def resize(storage: Any, size: int) -> Any:  # FSDP frees and allocates gathered parameters by it
            result = resize_storage(storage, size)
            self._set(storage, "gathered parameters")
            return result

        def infer(*args: Any) -> Any:  # DTensor computes shapes of whole tensors, with fake ones of its own
            with _disable_current_modes():
                return infer_shapes(*args)

        self._patches.enter_context(patch.object(torch.UntypedStorage, "resize_", resize))
        self._patches.enter_context(patch.object(ShardingPropagator, infer_shapes.__name__, infer))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._patches.close()
        super().__exit__(*exception)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of a step, whose peak is recorded; the largest one, where it comes several times."""
        self.largest, self._at_largest = self._total, dict(self.now)
        yield
        if self.largest >= sum(self.peaks.get(name, {}).values()):
            self.peaks[name] = self._at_largest

    @contextlib.contextmanager
    def of(self, component: str) -> Iterator[None]:
        """Storages that are made within belong to one of COMPONENTS."""
        before, self._component = self._component, component
        yield
        self._component = before

    def assign(self, tensors: Sequence[Any], component: str) -> None:
        """The storages of these tensors belong to one of COMPONENTS from now on."""
        for tensor in tensors:
            self._set(shard_of(tensor).untyped_storage(), component)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if DTensor in types:
            return NotImplemented  # it calls the operations on its shards, which come here
        kwargs = kwargs or {}
        result = self._run(func, types, args, kwargs)
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count_sent(func, args, result)
        elif func.namespace == "fsdp" and "out" in kwargs and func._opname == "split_with_sizes_copy":
            self.assign(kwargs["out"], "gathered parameters")
        for value in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(value, Tensor) and (self.fake or not value.is_meta):  # meta tensors take no memory
                storage = value.untyped_storage()
                if storage._cdata not in self._storages:
                    self._set(storage, self._component)
        return result

    def _set(self, storage: Any, component: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is not None:
            self._add(known[1], -known[2])
        reference = weakref.ref(storage, lambda _: self._free(key)) if known is None else known[0]
        self._storages[key] = (reference, component, size)
        self._add(component, size)

    def _free(self, key: int) -> None:
        _, component, size = self._storages.pop(key)
        self._add(component, -size)

    def _add(self, component: str, size: int) -> None:
        self.now[component] += size
        self._total += size
        if self._total > self.largest:
            self.largest, self._at_largest = self._total, dict(self.now)

    def _run(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operation, computed if no tensor without values has a part in it."""
        if self.fake is None:
            return func(*args, **kwargs)
        if FakeTensor not in types:
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            has_values = all(tensor.device.type == "cpu" for tensor in tensors)
            if has_values if tensors else _makes_integers(func, args, kwargs):
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
        elif func is aten.index.Tensor:
            args = (args[0], _places(args[1]))
        return func(*args, **kwargs)

    def _count_sent(self, func: Any, args: Any, result: Any) -> None:
        if func._opname not in COLLECTIVES:
            return
        kind, rounds = COLLECTIVES[func._opname]
        group = CollectiveOp.get_process_group(func, args)
        whole = max(value.nbytes for value in tree_leaves((args, result)) if isinstance(value, Tensor))
        machines = [rank // self.local_world for rank in dist.get_process_group_ranks(group)]
        if kind == "message":
            size, crossing = whole, float(machines[args[2]] != machines[group.rank()])
        else:
            size = rounds * whole * (len(machines) - 1) / len(machines)
            following = [*machines[1:], machines[0]]
            crossing = sum(a != b for a, b in zip(machines, following, strict=True)) / len(machines)
        dimension = group.group_desc.removeprefix("mesh_").replace("default_pg", "all ranks")
        sent = self.sent.setdefault((kind, dimension), Sent())
        sent.number += self.times
        sent.within += self.times * size * (1 - crossing)
        sent.between += self.times * size * crossing


def _makes_integers(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation without tensors makes one of integers or truth values, such as arange."""
    if (dtype := kwargs.get("dtype")) is not None:
        return not (dtype.is_floating_point or dtype.is_complex)
    return func._opname == "arange" or (func._opname == "full" and isinstance(args[1], int))


def _places(indices: Any) -> list[Any]:
    """Indices in which a mask is replaced by the places where it is True: only they tell the shape."""
    found: list[Any] = []
    for index in indices:
        if type(index) is Tensor and index.dtype == torch.bool:
            with unset_fake_temporarily():
                found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


@contextlib.contextmanager
def fake_ranks(world: int, local_world: int) -> Iterator[Ranks]:
    """Rank 0 of a process group of `world` ranks, `local_world` a machine, that does not communicate."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield Ranks(0, world, 0, min(local_world, world), torch.device("cpu"))
    finally:
        dist.destroy_process_group()
        # DTensor would go on communicating in this group for a later mesh of as many ranks.
        _clear_sharding_prop_cache()


@dataclass(frozen=True)
class FakeStep:
    """What one rank does in a step."""

    peaks: dict[str, dict[str, int]]
    """Phase → bytes by component when their sum is largest; "held": between two steps."""
    sent: dict[tuple[str, str], Sent]
    save_bytes: int
    """Of a checkpoint of all ranks."""
    padding: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Parameter → bytes of its shard on every rank, and of its even share: shards are whole rows."""

    @property
    def peak_bytes(self) -> int:
        return max(sum(phase.values()) for phase in self.peaks.values())

    @property
    def held_bytes(self) -> int:
        return sum(self.peaks["held"].values())

    @property
    def sent_within_bytes(self) -> float:
        """To ranks of the same machine."""
        return sum(each.within for each in self.sent.values())

    @property
    def sent_between_bytes(self) -> float:
        """To other machines."""
        return sum(each.between for each in self.sent.values())


def fake_step(
    plan: Plan, config: Config, ranks: Ranks, micro_batch: MicroBatch, *, rounds: int = 1, gloo: bool = False
) -> FakeStep:
    """Run one step of `rounds` micro-batches, all of them `micro_batch`; `plan` cannot be used afterwards.

    gloo: the ranks are CPUs; otherwise collectives are those of accelerators.
    """
    mesh = device_mesh(ranks, hybrid=config.sharding == "hybrid")
    # Compiled code would look into values; it takes less memory, if anything.
    model: Any = parallelize(plan.model, mesh, plan.parts, replace(config, compile=False))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # gloo's gather compares addresses, which are all 0 here, to save a copy.
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    with fake, Count(ranks.local_world, fake) as count:
        _set_collectives(model, count, gloo)
        with count.of("parameters"):
            allocate(model, ranks.device, config.cpu_offload)
        model.loss_function = _counted(chunked_cross_entropy(config.loss_chunk_tokens), count)
        model.train()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        parts_by_name = {name: part_of(name, plan.parts) for name in trained}
        groups = parameter_groups(
            trained, parts_by_name, config.learning_rates, config.weight_decay, config.original_weight_decay
        )
        with count.of("optimizer"):
            optimizer = adamw(
                groups, config.adam_betas, config.adam_epsilon, ranks.device, config.optim_state
            )
        save = bytes_of_a_save(model, trained, resumable(trained, optimizer), plan.save_dtype, config)
        _run_step(model, trained, optimizer, [micro_batch] * rounds, len(plan.sources), config, ranks, count)
    padding = {parameter._param_fqn: _rows(parameter) for parameter in _fsdp_parameters(model)}
    return FakeStep(count.peaks, count.sent, save, {name: p for name, p in padding.items() if p[0] != p[1]})


def _run_step(
    model: Any,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    num_sources: int,
    config: Config,
    ranks: Ranks,
    count: Count,
) -> None:
    """The loop of trainer/main.py, without what needs values."""
    # Those between the first and the last one do what the second one does.
    rounds = len(micro_batches)
    times = [1] * rounds if rounds <= 3 else [1, rounds - 2, 1]
    with count.phase("held"):
        sum_over_ranks(micro_batches, None, False, False, ranks.device)
    for number, count.times in enumerate(times):
        set_communication(model, config, is_last=number == len(times) - 1)
        with count.phase("forward"):
            batch = _fake(micro_batches[number])
            loss = model(**batch.inputs).loss
        with count.phase("backward"):
            loss.backward()
        count.assign([p.grad for p in trained.values() if p.grad is not None], "gradients")
        whole = [parameter.unsharded_accumulated_grad for parameter in _fsdp_parameters(model)]
        count.assign([gradient for gradient in whole if gradient is not None], "gradients")
        del loss, batch
    with count.phase("optimizer step"):
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        squared_norm(gradients)
        # Window.close_step
        all_sum(torch.zeros(4 * num_sources + 1, dtype=torch.float64, device=ranks.device))
        all_max(0.0, ranks.device)
        clip_gradients(gradients, math.inf, config.max_grad_norm)
        optimizer.step()
        del gradients
        optimizer.zero_grad(set_to_none=True)


def _fake(micro_batch: MicroBatch) -> MicroBatch:
    """The micro-batch with pixels that have no values; integers keep theirs, which tell shapes."""

    def change(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype) if tensor.is_floating_point() else tensor.clone()

    inputs = {name: map_tensors(value, change) for name, value in micro_batch.inputs.items()}
    return replace(micro_batch, inputs=inputs)


def _counted(loss_function: Callable[..., Any], count: Count) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        with count.of("logits and loss"):
            return loss_function(*args, **kwargs)

    return counted


def _set_collectives(model: nn.Module, count: Count, gloo: bool) -> None:
    """Count the memory of collectives: those that `parallelize` sets for CPUs, or those of accelerators."""
    gather: Any = DefaultAllGather
    reduce: Any = DefaultReduceScatter
    if gloo:
        from trainer.extras.gloo import GlooAllGather, GlooReduceScatter

        gather, reduce = GlooAllGather, GlooReduceScatter

    class CountedAllGather(gather):
        def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
            with count.of("communication"):
                return super().allocate(*args, **kwargs)

    class CountedReduceScatter(reduce):
        def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
            with count.of("communication"):
                return super().allocate(*args, **kwargs)

        def __call__(self, output_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            with count.of("communication"):
                result = super().__call__(output_tensor, *args, **kwargs)
            count.assign([output_tensor], "gradients")
            return result

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(CountedAllGather())
            module.set_custom_reduce_scatter(CountedReduceScatter())


def _fsdp_parameters(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                yield from group.fsdp_params


def _rows(parameter: Any) -> tuple[int, int]:
    """Bytes of a rank's shard, with its padding to whole rows, and of an even share."""
    ranks, each = parameter.shard_mesh.size(), parameter.orig_dtype.itemsize
    elements = parameter.padded_sharded_param_size.numel()
    return each * elements, each * math.ceil(parameter._orig_size.numel() / ranks)
