"""`--cache_vision_features FOLDER`: a frozen vision tower runs once an image, in all epochs of all jobs.

Input: the loaded model and the configuration. Output: files in FOLDER (`data/features.py`), fewer runs of the
tower, and how many:

    cache = VisionCache(model, plan, config, ranks)  # off, and nothing below does anything, without the flag
    StepLoader(…, features=cache.features)           # workers read features instead of pixels where they can
    cache.agree(micro_batches)                       # before the first forward of a step
    outputs = model(**micro_batch.inputs)            # the tower runs on what is not known
    cache.keep(micro_batch, outputs.tower_outputs)   # a thread writes it
    cache.counts()                                   # {"images": 64, "images_from_cache": 48}
    cache.finish()

The tower's parameters are gathered from all ranks when it runs, so it runs on every rank or on none. `agree`
settles that by one small reduction a step: of 3 ranks and 2 micro-batches

    images not known    rank 0: [2, 0]   rank 1: [0, 0]   rank 2: [1, 0]
    the tower runs      in the first micro-batch, on rank 1 with a dummy image; not at all in the second

What counts as the same tower: the values of its weights in the dtype that they compute in, and its settings.
So a full and a LoRA training on one base share the features, whatever their ranks and machines.
"""

import hashlib
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data.batch import MicroBatch
from data.features import HEADER_BYTES, FeatureFolder, folder_bytes, write_features
from trainer.config import Config
from trainer.distributed import Ranks, all_sum, is_main, log
from trainer.models import tower_settings
from trainer.plan import Plan

SECONDS_BETWEEN_SCANS = 60
"""How often rank 0 looks at what other jobs have written into the folder."""


class VisionCache:
    """One rank's part in the features of a run; `features` is None, and all calls do nothing, without one."""

    def __init__(self, model: nn.Module, plan: Plan, config: Config, ranks: Ranks) -> None:
        """Every rank must call it, with the weights loaded."""
        self.features: FeatureFolder | None = None
        if config.cache_vision_features is None:
            return
        folder = Path(config.cache_vision_features)
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        self.features = FeatureFolder(folder, _tower_fingerprint(model, plan, dtype))
        self._dummy = plan.reader.image_processor.dummy()[None]
        self._ranks, self._limit = ranks, round(config.cache_vision_gigabytes * 1e9)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="vision cache")
        self._writing: Future[None] | None = None
        self._scan: Future[int] | None = None
        self._scanned, self._held_then = time.monotonic(), 0
        (self._held,) = self._sum([folder_bytes(folder) if is_main() else 0])
        self._room = self._new_bytes = 0
        self._can_write = True
        self._window, self._total = [0, 0], [0, 0]  # images that went into the model, those that were known

    def agree(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Let the tower run on all ranks or on none, in each of a step's micro-batches."""
        if self.features is None:
            return
        outputs = [output for batch in micro_batches for output in batch.inputs.get("tower_outputs", ())]
        known = sum(output is not None for output in outputs)
        needs = [len(batch.feature_files) for batch in micro_batches]
        growth = self._new_bytes + (self._scanned_growth(any(needs)) if is_main() else 0)
        *needed, images, known, growth = self._sum([*needs, len(outputs), known, growth])
        for batch, count in zip(micro_batches, needed, strict=True):
            if count and batch.inputs["pixel_values"] is None:
                batch.inputs["pixel_values"] = self._dummy
        self._window = [self._window[0] + images, self._window[1] + known]
        self._total = [self._total[0] + images, self._total[1] + known]
        self._held += growth
        # A rank takes no more than its share of what is left: together they keep the bound.
        self._room, self._new_bytes = (self._limit - self._held) // self._ranks.world, 0

    def keep(self, batch: MicroBatch, outputs: Sequence[tuple[Tensor, int]] | None) -> None:
        """Let a thread write what the tower made of a micro-batch's images, as far as there is room.

        It waits until the micro-batch before is written: a slow disk slows the first epoch, and does not pile
        up features in memory.
        """
        if self.features is None or not batch.feature_files or not self._can_write:
            return
        assert outputs is not None
        self._wait()
        chosen: dict[Path, tuple[Tensor, int]] = {}
        for file, (patches, rows) in zip(batch.feature_files, outputs, strict=True):
            size = patches.nbytes + HEADER_BYTES
            if file not in chosen and size <= self._room:
                chosen[file] = (patches.detach(), rows)
                self._room -= size
                self._new_bytes += size
        if chosen:
            self._writing = self._threads.submit(self._write, chosen)

    def counts(self) -> dict[str, int]:
        """Of all ranks, since the last call: images that went into the model, and those that were known."""
        if self.features is None:
            return {}
        (images, known), self._window = self._window, [0, 0]
        return {"images": images, "images_from_cache": known}

    def finish(self) -> None:
        """Wait until all is written, and say what the run saved."""
        if self.features is None:
            return
        self._wait()
        images, known = self._total
        log(
            f"vision features: {known:,} of {images:,} images ({known / max(1, images):.1%}) came from "
            f"{self.features.folder}, which holds {folder_bytes(self.features.folder) / 1e9:,.1f} of at most "
            f"{self._limit / 1e9:,.1f} GB"
        )

    def _wait(self) -> None:
        if self._writing:
            self._writing.result()

    def _write(self, chosen: dict[Path, tuple[Tensor, int]]) -> None:
        for file, (patches, rows) in chosen.items():
            if not file.exists() and not write_features(file, patches.cpu(), rows):
                print(
                    f"\nwarning: {file} cannot be written: no more features are kept",
                    file=sys.stderr,
                    flush=True,
                )
                self._can_write = False
                return

    def _scanned_growth(self, wanted: bool) -> int:
        """Bytes in the folder beyond what was known when the search began: other jobs write there too."""
        if self._scan and self._scan.done():
            found, self._scan = self._scan.result(), None
            return found - self._held_then
        if wanted and self._scan is None and time.monotonic() - self._scanned > SECONDS_BETWEEN_SCANS:
            assert self.features is not None
            self._scanned, self._held_then = time.monotonic(), self._held
            self._scan = self._threads.submit(folder_bytes, self.features.folder)
        return 0

    def _sum(self, numbers: Sequence[int]) -> list[int]:
        """The sums over all ranks."""
        sums = all_sum(torch.tensor(numbers, dtype=torch.int64, device=self._ranks.device))
        return sums.tolist()


def _tower_fingerprint(model: nn.Module, plan: Plan, dtype: torch.dtype) -> str:
    """Of the tower's settings and of its weights in `dtype`; every rank calls it."""
    digest = hashlib.blake2b(f"{tower_settings(plan.model_config)} {dtype}".encode(), digest_size=10)
    for name, parameter in model.named_parameters():
        if name.startswith(plan.parts.vision) and not name.startswith(plan.parts.unused):
            weight = parameter.detach().to(dtype)
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if is_main():
                digest.update(f"{name} {tuple(whole.shape)}".encode())
                digest.update(whole.cpu().contiguous().view(torch.uint8).numpy().data)
    held = [digest.hexdigest()]
    dist.broadcast_object_list(held, src=0)
    return held[0]
