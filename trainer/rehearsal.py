"""Checks before the first step: disk space for a save, and memory for the longest micro-batch.

Input: the model, the data and the folder. Output: a list of problems, or an exception:

    prepare_output_dir(Path("output"), run, start, needed_bytes=120_000_000_000)
    # ["--output_dir output: a save needs 120.0 GB, but 80.3 GB are free; free disk space, or …"]
    rehearse(model, longest_micro_batch(reader, 4, packing), device, config)
    # torch.OutOfMemoryError now instead of in step 3,217
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import MicroBatch, collate
from data.errors import DataError
from data.loader import SampleReader
from data.packing import Packing
from trainer.atomic import MARKER, sweep, write_json
from trainer.config import Config
from trainer.parallelize import set_communication
from trainer.resume import Start, drop_later_lines, set_aside

PROBED = 64
"""Records of each source that are measured; a record must be tokenised to know its length."""


def bytes_of_a_save(
    model: nn.Module,
    trained: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    save_dtype: torch.dtype,
    config: Config,
) -> int:
    """Bytes of a checkpoint: the saved model, and the state to resume from (`resumable`).

    The final model takes no more space: it shares the weights of the last checkpoint.
    """
    saved = trained.values() if config.use_lora else model.parameters()
    model_bytes = save_dtype.itemsize * sum(parameter.numel() for parameter in saved)
    state_bytes = sum(tensor.numel() * tensor.dtype.itemsize for tensor in state.values())
    return model_bytes + config.makes_checkpoints * state_bytes


def prepare_output_dir(
    output_dir: Path, run: Mapping[str, Any], start: Start, needed_bytes: int
) -> list[str]:
    """Prepare the folder for a run from `start`: delete what a killed run left, and write run.json.

    Returns the problems that prevent its use. For rank 0 only.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        sweep(output_dir)
        free = shutil.disk_usage(output_dir).free
        if free < needed_bytes:
            return [
                f"--output_dir {output_dir}: a save needs {needed_bytes / 1e9:.1f} GB, but "
                f"{free / 1e9:.1f} GB are free; free disk space, or name a folder on another disk"
            ]
        (output_dir / MARKER).unlink(missing_ok=True)  # of an earlier run that finished here
        if start.folder and start.folder.resolve().parent == output_dir.resolve():
            drop_later_lines(output_dir / "metrics.jsonl", start.step)
        else:
            set_aside(output_dir / "metrics.jsonl")
        write_json(output_dir / "run.json", run)
    except OSError as error:
        return [
            f"--output_dir {output_dir}: cannot be written: {error}; make it writable, or name another folder"
        ]
    return []


def longest_micro_batch(reader: SampleReader, num_samples: int, packing: Packing | None) -> MicroBatch:
    """The longest micro-batch that training may meet.

    With packing, all lengths are known: a full row of the longest samples. Otherwise the longest
    `num_samples` samples among PROBED evenly spaced records of each source.
    """
    if packing:
        return read_batch(reader, _longest_row(packing), packed=True)
    candidates = []
    for number, source in enumerate(reader.sources):
        for index in np.unique(np.linspace(0, len(source.records) - 1, PROBED, dtype=int)):
            try:
                encoded, _ = reader.read(number, int(index), decode=False)
            except DataError:
                continue  # reported when training reads it
            if encoded.num_supervised:
                candidates.append((len(encoded.input_ids), number, int(index)))
    longest = sorted(candidates, reverse=True)[:num_samples]
    longest = (longest * math.ceil(num_samples / max(1, len(longest))))[:num_samples]
    return read_batch(reader, [(number, index) for _, number, index in longest])


def _longest_row(packing: Packing) -> list[tuple[int, int]]:
    """(source, record) of samples that fill a row: the longest first, then whatever still fits."""
    row, room = [], packing.max_tokens
    longest = [
        (int(rows[index, 0]), number, int(index))
        for number, rows in enumerate(packing.lengths)
        for index in np.argsort(rows[:, 0])[: -PROBED - 1 : -1]
        if rows[index, 2] > 0
    ]
    for tokens, number, index in sorted(longest, reverse=True):
        while tokens <= room:  # the same sample twice costs as much as two samples
            row.append((number, index))
            room -= tokens
    return row


def read_batch(
    reader: SampleReader, sample_ids: Sequence[tuple[int, int]], packed: bool = False
) -> MicroBatch:
    """Read (source, record) samples into one micro-batch, as the loader would."""
    samples, pixels = [], []
    for number, index in sample_ids:
        encoded, images = reader.read(number, index)
        samples.append(encoded)
        pixels += images
    if not pixels and any(source.records.num_images for source in reader.sources):
        pixels = [reader.image_processor.dummy()]
    return collate(samples, pixels, sample_ids, reader.encoder.pad_id, packed=packed)


def rehearse(model: Any, micro_batch: MicroBatch, device: torch.device, config: Config) -> None:
    """Run forward and backward as in a step, then drop the gradients; parameters and moments are unchanged.

    With accumulation the first of two micro-batches keeps its whole gradient on every rank, which is the peak
    memory of a step.
    """
    for is_last in (True,) if config.gradient_accumulation_steps == 1 else (False, True):
        set_communication(model, config, is_last)
        loss = model(**micro_batch.to(device).inputs).loss
        (loss / max(1, micro_batch.num_supervised)).backward()
    model.zero_grad(set_to_none=True)
