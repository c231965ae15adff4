"""Where the time and the memory of a step go: phases of sampled steps, and traces for chrome://tracing.

Input: the step loop, which says what it is about to do, and hooks on the model. Output: for every
`time_phases_every`-th step a line of metrics.jsonl of the kind "phases"; for the steps of `profile` such a
line, and a trace of each rank, `output_dir/profile/rank<k>.json.gz`:

    phases.start(step)            # "data_wait" begins
    phases("optimizer")           # from here on; data_wait ends
    phases(None)                  # what follows has no name
    phases.stop(step)             # None, or {"seconds": {"data_wait": 0.01, …}, "memory_peak_bytes": {…}, …}

Other steps run as if this file did not exist, but for the clock of data_wait and saving. A sampled step runs
under torch.profiler, which makes it slower (its thousands of small records cost some microseconds each) and
waits for the device once, at its end: the phases say how the time is shared out, not how long a step takes.

Phases are data_wait, host_to_device, vision_forward, language_forward, loss, language_backward,
vision_backward, optimizer, saving; what checkpointing computes again counts as backward. In `seconds`:

- on a CPU, wall-clock time, and `communication` is the time in which a collective was under way, taken out of
  the phase that it ran in (FSDP waits for gloo there and then). `other` is the rest of the step.
- on an accelerator, time in which the kernels ran that a phase launched, so copies and kernels of several
  streams add up; `communication` is that of NCCL's kernels, which overlaps with the rest; `idle` is the time
  in which nothing ran at all. data_wait and saving are what the host spent there.

Seconds are means over ranks and steps, memory is the most of any rank.
"""

import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.profiler import profile, record_function

from trainer.config import Config
from trainer.distributed import Ranks, all_max, all_sum, log
from trainer.metrics import MemoryPeak
from trainer.models import Parts

ON_HOST = ("data_wait", "saving")
ON_DEVICE = ("host_to_device", "vision_forward", "language_forward", "loss")
ON_DEVICE += ("language_backward", "vision_backward", "optimizer")


class Phases:
    """Names the phases of a step and, in sampled steps, measures them. Every rank makes the same calls."""

    def __init__(self, model: Any, parts: Parts, ranks: Ranks, config: Config) -> None:
        self.ranks, self.every, self.traced = ranks, config.time_phases_every, config.traced_steps
        self.folder = Path(config.output_dir) / "profile"
        self.memory = MemoryPeak(ranks.device)
        self.host_seconds: defaultdict[str, float] = defaultdict(float)
        """Of all steps: "data_wait" and "saving", until the loop clears it."""
        self.profiler: profile | None = None
        self._open: dict[int, record_function] = {}
        self._last: str | None = None
        self._since = 0.0
        self._peaks: Counter[str] = Counter()
        if self.every or self.traced:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it reports each start and stop
            self._watch(model, parts)

    def start(self, step: int) -> None:
        """Begin a step: with a profiler, if it is sampled and none is at work."""
        if self.profiler is None and (step in self.traced or (self.every and step % self.every == 0)):
            self._peaks.clear()
            self.memory.take()
            self.profiler = profile()
            self.profiler.start()
            self._begun, self._first = time.perf_counter(), step
        self("data_wait")

    def __call__(self, name: str | None) -> None:
        """From here on this thread's time belongs to phase `name`, until the next call; None: to no phase."""
        last, since = self._last, self._since
        self._last, self._since = name, time.perf_counter()
        if last in ON_HOST:
            self.host_seconds[last] += self._since - since
        if self.profiler is None:
            return
        # The backward pass of an accelerator has its own thread, and a range must end where it began.
        if opened := self._open.pop(threading.get_ident(), None):
            opened.__exit__(None, None, None)
        if (peak := self.memory.take()) and last:
            self._peaks[last] = max(self._peaks[last], peak)
        if name:
            opened = self._open[threading.get_ident()] = record_function(name)
            opened.__enter__()

    def stop(self, step: int, is_last: bool) -> dict[str, Any] | None:
        """End a step; after a sampled one, and after the last of a trace, what was measured."""
        self(None)
        if self.profiler is None:
            return None
        tracing = self._first in self.traced
        if tracing and step + 1 in self.traced and not is_last:
            return None
        wall = time.perf_counter() - self._begun
        self.profiler.stop()
        finished, self.profiler = self.profiler, None
        steps, device = step + 1 - self._first, self.ranks.device
        if tracing:
            self.folder.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(self.folder / f"rank{self.ranks.rank}.json.gz"))
            log(f"\ntraces of steps {self._first} to {step} are in {self.folder}")
        measure = seconds_on_cpu if device.type == "cpu" else seconds_on_accelerator
        seconds = measure(finished.events() or [], wall)
        total = all_sum(torch.tensor(list(seconds.values()), dtype=torch.float64, device=device)).tolist()
        peaks = {name: int(all_max(self._peaks[name], device)) for name in (*ON_HOST, *ON_DEVICE)}
        return {
            "steps": steps,
            "seconds": {name: t / self.ranks.world / steps for name, t in zip(seconds, total, strict=True)},
            "memory_peak_bytes": {name: peak for name, peak in peaks.items() if peak},
        }

    def _watch(self, model: Any, parts: Parts) -> None:
        """Hooks at the edges of vision and language, on the way forward and on the gradients' way back."""

        def when_its_gradient_comes(tensor: Tensor | None, name: str) -> None:
            if self.profiler and tensor is not None and tensor.requires_grad:
                tensor.register_hook(lambda _: self(name))

        def after_projector(_: nn.Module, __: Any, features: Tensor) -> None:
            self("language_forward")
            when_its_gradient_comes(features, "vision_backward")

        def after_language(_: nn.Module, __: Any, outputs: Any) -> None:
            self("loss")
            when_its_gradient_comes(outputs.last_hidden_state, "language_backward")

        def at_the_loss(_: Tensor) -> None:
            self("loss")
            Variable._execution_engine.queue_callback(lambda: self(None))  # when the whole graph is done

        def after_model(_: nn.Module, __: Any, outputs: Any) -> None:
            self(None)
            if self.profiler and outputs.loss is not None and outputs.loss.requires_grad:
                outputs.loss.register_hook(at_the_loss)

        vision = [place[:-1] for place in (*parts.vision, *parts.projector) if place.endswith(".")]
        for place in vision:
            model.get_submodule(place).register_forward_pre_hook(lambda *_: self("vision_forward"))
        model.get_submodule(vision[-1]).register_forward_hook(after_projector)
        model.get_input_embeddings().register_forward_hook(
            lambda _, __, x: when_its_gradient_comes(x, "language_backward")
        )
        model.get_submodule(parts.language_blocks.rpartition(".")[0]).register_forward_hook(after_language)
        # Before FSDP's own hook, which gathers the parameters outside the blocks.
        model.register_forward_pre_hook(lambda *_: self("language_forward"), prepend=True)
        model.register_forward_hook(after_model)


def seconds_on_cpu(events: Iterable[Any], wall: float) -> dict[str, float]:
    """Phase → wall-clock seconds, of torch.profiler's events of a step that took `wall` seconds."""
    events = list(events)
    collectives = union([_span(e) for e in events if e.name.startswith("gloo:")])
    seconds: dict[str, float] = dict.fromkeys((*ON_HOST, *ON_DEVICE), 0.0)
    for event in events:
        if event.name in seconds and event.is_user_annotation:
            begin, end = _span(event)
            apart = sum(max(0.0, min(end, e) - max(begin, b)) for b, e in collectives)
            seconds[event.name] += (end - begin - apart) / 1e6
    seconds["communication"] = sum(end - begin for begin, end in collectives) / 1e6
    return {**seconds, "other": max(0.0, wall - sum(seconds.values()))}


def seconds_on_accelerator(events: Iterable[Any], wall: float) -> dict[str, float]:
    """Phase → seconds of the kernels that it launched, of torch.profiler's events."""
    events = list(events)
    names = (*ON_HOST, *ON_DEVICE, "communication", "other")
    seconds: dict[str, float] = dict.fromkeys(names, 0.0)
    for event in events:
        if event.device_type.name != "CPU":
            continue
        if event.name in ON_HOST and event.is_user_annotation:
            seconds[event.name] += event.time_range.elapsed_us() / 1e6
        phase = event
        while phase is not None and phase.name not in ON_DEVICE:
            phase = phase.cpu_parent
        for kernel in event.kernels:
            name = "communication" if "nccl" in kernel.name.lower() else phase.name if phase else "other"
            seconds[name] += kernel.duration / 1e6
    on_device = [e for e in events if e.device_type.name != "CPU" and not e.is_user_annotation]
    seconds["idle"] = max(0.0, wall - sum(e - b for b, e in union([_span(e) for e in on_device])) / 1e6)
    return seconds


def union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans (begin, end), merged where they overlap: [(0, 2), (1, 3), (5, 6)] → [(0, 3), (5, 6)]."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _span(event: Any) -> tuple[float, float]:
    return event.time_range.start, event.time_range.end
