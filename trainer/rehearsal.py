"""Checks before the first step: disk space for a save, and memory for the longest micro-batch.

Input: the model, the data and the folder. Output: a list of problems, or an exception:

    prepare_output_dir(Path("output"), run, start, needed_bytes=120_000_000_000)
    # ["--output_dir output: a save needs 120.0 GB, but 80.3 GB are free; free disk space, or …"]
    for micro_batch in largest_micro_batches(reader, 4, packing):
        rehearse(model, micro_batch, device, config)     # torch.OutOfMemoryError now, not in step 3,217
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.batch import MicroBatch, collate
from data.errors import DataError
from data.loader import SampleReader
from data.packing import Packing
from trainer.atomic import MARKER, sweep, write_json
from trainer.config import Config
from trainer.parallelize import set_communication
from trainer.resume import Start, drop_later_lines, set_aside, with_starts
from trainer.trackers import ID_FILE

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
            set_aside(output_dir / "eval")
            (output_dir / ID_FILE).unlink(missing_ok=True)
        write_json(output_dir / "run.json", with_starts(run, output_dir, start))
    except OSError as error:
        return [
            f"--output_dir {output_dir}: cannot be written: {error}; make it writable, or name another folder"
        ]
    return []


def largest_micro_batches(
    reader: SampleReader, num_samples: int, packing: Packing | None
) -> list[MicroBatch]:
    """The micro-batch with most tokens, and the one with most image slots, that training may contain.

    Either may take most memory, the second because of the vision tower. One batch if both are the same. With
    packing, all lengths are known: a full row of the longest samples, and one of those with most slots per
    token. Otherwise the `num_samples` largest samples among PROBED evenly spaced records of each source.
    """
    sizes = all_sizes(reader, packing)
    tokens, slots = sizes[:, 0], sizes[:, 1]
    batches: dict[tuple[tuple[int, int], ...], MicroBatch] = {}
    for size in (tokens, slots / tokens if packing else slots):
        ascending = sizes[np.lexsort((tokens, size))]
        chosen = _fill_row(ascending, packing.max_tokens) if packing else ascending[: -num_samples - 1 : -1]
        if not packing and len(chosen):
            chosen = np.resize(chosen, (num_samples, 4))  # repeats them
        sample_ids = tuple((int(source), int(index)) for *_, source, index in chosen)
        if sample_ids not in batches:
            batches[sample_ids] = read_batch(reader, sample_ids, packed=packing is not None)
    return list(batches.values())


def all_sizes(reader: SampleReader, packing: Packing | None) -> np.ndarray:
    """[samples, 4]: tokens, image slots, source and record of all measured samples that are trained on;
    without packing, of PROBED records of each source."""
    if packing is None:
        return _probed_sizes(reader)
    found = [np.zeros((0, 4), np.int64)]
    for source, rows in enumerate(packing.lengths):
        (records,) = np.nonzero(rows[:, 2] > 0)
        found.append(np.column_stack([rows[records, :2], np.full(len(records), source), records]))
    return np.concatenate(found)


def _probed_sizes(reader: SampleReader) -> np.ndarray:
    """`all_sizes` of PROBED records of each source, measured here."""
    found = []
    for number, source in enumerate(reader.sources):
        for index in np.unique(np.linspace(0, len(source.records) - 1, PROBED, dtype=int)):
            try:
                encoded, _ = reader.read(number, int(index), decode=False)
            except DataError:
                continue  # reported when training reads it
            if encoded.num_supervised:
                found.append((len(encoded.input_ids), encoded.num_image_slots, number, int(index)))
    return np.array(found, np.int64).reshape(-1, 4)


def _fill_row(ascending: np.ndarray, room: int) -> np.ndarray:
    """Samples that fill a row: the last one that fits, as often as it fits, and so on."""
    row = [np.zeros((0, 4), np.int64)]
    while len(fits := np.flatnonzero(ascending[:, 0] <= room)):
        sample = ascending[fits[-1]]
        row.append(np.tile(sample, (room // sample[0], 1)))  # one sample twice costs as much as two samples
        room %= sample[0]
    return np.concatenate(row)


def read_batch(
    reader: SampleReader, sample_ids: Sequence[tuple[int, int]], packed: bool = False
) -> MicroBatch:
    """Read (source, record) samples into one micro-batch, as the loader would."""
    samples, pictures = [], []
    for number, index in sample_ids:
        encoded, images = reader.read(number, index)
        samples.append(encoded)
        pictures += images
    return collate(samples, reader.batch(pictures), sample_ids, reader.encoder.pad_id, packed=packed)


def rehearse(model: Any, micro_batch: MicroBatch, device: torch.device, config: Config) -> None:
    """`forward_backward`, then drop the gradients; parameters and moments are unchanged."""
    forward_backward(model, micro_batch, device, config)
    model.zero_grad(set_to_none=True)


def forward_backward(model: Any, micro_batch: MicroBatch, device: torch.device, config: Config) -> None:
    """Run forward and backward as in a step.

    With accumulation the first of two micro-batches keeps its whole gradient on every rank, which is the peak
    memory of a step.
    """
    for is_last in (True,) if config.accumulation(dist.get_world_size()) == 1 else (False, True):
        set_communication(model, config, is_last)
        loss = model(**micro_batch.to(device).inputs).loss
        (loss / max(1, micro_batch.num_supervised)).backward()
