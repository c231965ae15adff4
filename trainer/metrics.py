"""What was measured and what will run: metrics.jsonl, the table at the start, memory.

Input: numbers that the loop already has. Output: files in `output_dir` and text for the terminal:

    part                    parameters  trains  learning rate  dtype     saved
    vision tower           303,507,456  no      -              bfloat16  as loaded
    projector               20,979,712  yes     1.0e-05        float32   yes
    …
"""

import json
import math
import resource
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.distributed import log
from trainer.models import Parts
from trainer.trainable import is_adapter


class MetricsFile:
    """`metrics.jsonl` in a folder: one JSON object a line, flushed, so that a killed run keeps every line.

    folder None writes nothing, so that the ranks which do not speak run the same code. tensorboard: the
    numbers go to event files in `folder`/tensorboard too (needs the package of that name).
    """

    def __init__(self, folder: Path | None, tensorboard: bool = False) -> None:
        self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8") if folder else None
        self.board = None
        if folder and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tensorboard")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line; floats keep full precision, for comparing runs exactly, and NaN becomes null."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        if self.file:
            try:
                self.file.write(json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False) + "\n")
                self.file.flush()
            except OSError as error:  # a full disk; the file's buffer keeps the line for the next flush
                log(f"\nwarning: metrics.jsonl waits for room: {error}")
        if self.board:
            for name, value in values.items():
                for key, number in (value if isinstance(value, dict) else {"": value}).items():
                    if isinstance(number, int | float):
                        self.board.add_scalar("/".join(filter(None, (kind, name, key))), number, step)
            self.board.flush()


class MemoryPeak:
    """The most memory that this rank uses: of an accelerator's allocator; on a CPU, of the resident set.

    `take()` sees what happened since it was called last, for phases of a step; `of_window()` is for lines of
    metrics.jsonl and is not disturbed by it. Only Linux can take the peak of a resident set anew; elsewhere
    `take()` is 0 on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._highest = 0

    def take(self) -> int:
        """Peak bytes since the last `take()`, and begin anew."""
        if self.device.type != "cpu":
            peak = torch.accelerator.max_memory_allocated(self.device)
            torch.accelerator.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
            Path("/proc/self/clear_refs").write_text("5")  # of proc_pid_clear_refs(5): resets VmHWM alone
        else:
            peak = 0
        self._highest = max(self._highest, peak)
        return peak

    def of_window(self) -> int:
        """Peak bytes since the last call; on a CPU, of the whole run."""
        if self.device.type != "cpu":
            self.take()
            highest, self._highest = self._highest, 0
            return highest
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return max(self._highest, peak if sys.platform == "darwin" else peak * 1024)


def part_of(name: str, parts: Parts) -> str:
    """The part of the model that a parameter belongs to: vision, projector, language, or an adapter."""
    if is_adapter(name):
        return "adapter_b" if ".lora_B." in name else "adapter"
    if name.startswith(parts.vision):
        return "vision"
    return "projector" if name.startswith(parts.projector) else "language"


def _group_of(name: str, parts: Parts) -> str:
    """The row of the start table that a parameter counts in."""
    part = part_of(name, parts)
    if part != "language":
        rows = {
            "vision": "vision tower",
            "projector": "projector",
            "adapter": "adapters",
            "adapter_b": "adapters: B",
        }
        return rows[part]
    if "Plora_" in name:
        return "language: PLoRA"
    return (
        "language: blocks" if name.startswith(parts.language_blocks + ".") else "language: embeddings, head"
    )


def model_table(
    model: nn.Module,
    parts: Parts,
    learning_rates: Mapping[str, float],
    in_adapter: Collection[str] | None = None,
) -> str:
    """Group of modules → parameters, whether they train, peak learning rate, dtype, and if they are saved.

    in_adapter: names of the parameters that an adapter's folder holds; None where the whole model is saved.
    """
    rows: dict[tuple[str, str, bool, torch.dtype, str], int] = {}
    for name, parameter in model.named_parameters():
        trains = parameter.requires_grad
        saved = "trained" if trains else "as loaded"
        if in_adapter is not None:
            saved = "in the adapter" if name in in_adapter else "no"
        key = (_group_of(name, parts), part_of(name, parts), trains, parameter.dtype, saved)
        rows[key] = rows.get(key, 0) + parameter.numel()
    lines = [
        f"{'part':<28}{'parameters':>15}  {'trains':<8}{'learning rate':<15}{'stored as':<11}saved",
    ]
    for (group, part, trains, dtype, saved), count in rows.items():
        rate = f"{learning_rates[part]:.2e}" if trains else "-"
        lines.append(
            f"{group:<28}{count:>15,}  {'yes' if trains else 'no':<8}{rate:<15}"
            f"{str(dtype).removeprefix('torch.'):<11}{saved}"
        )
    total = sum(rows.values())
    trained = sum(count for (_, _, trains, *_), count in rows.items() if trains)
    lines.append(f"{'all':<28}{total:>15,}  {trained:,} train")
    return "\n".join(lines)
