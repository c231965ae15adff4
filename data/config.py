"""The flags that data depends on: the same for training and for the commands of `data/`.

    @dataclass
    class CheckConfig(DataConfig):
        num_ranks: int = 1
        '''Processes that the training will have.'''

    parse_flags(CheckConfig, ["--data_path", "data.txt", "--model_name_or_path", "base"], prog="data.check")

Names and defaults are those of the original scripts and of Hugging Face wherever they have one.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def may_change(default: Any) -> Any:
    """A flag that may differ between a run and the run that resumes it: the training's numbers do not depend
    on it, rounding apart, or resuming compares what it comes to (the data, the steps) instead of its value.

    A flag without this is part of the training; a resumed run that changes it is refused.
    """
    return field(default=default, metadata={"may_change": True})


@dataclass
class DataConfig:
    """Which model, which data, and how an optimizer step is made of it."""

    # --- model and data ------------------------------------------------------------------------------
    model_name_or_path: str = may_change("")
    """Folder of the model to start from: config.json, *.safetensors and a tokenizer."""
    chat_template: str | None = may_change(None)
    """File of a Jinja chat template, for a model of transformers that has none, or instead of its own; the
    trained model's folder keeps it. XComposer2 has its own format."""
    img_size: int | None = None
    """Side of the square that images are resized to, in pixels; the checkpoint's own by default."""
    hd_num: int | None = None
    """High-resolution models: the most tiles an image is cut into; -1 or absent: as the model was trained.
    Stored with the trained model."""
    data_path: str = may_change("data.txt")
    """data.txt (lines `<json path> <number>`), or one .json / .jsonl file."""
    given_num: bool = may_change(True)
    """Numbers in data.txt are thousands of samples an epoch; False: ratios of each file."""
    image_root: str | None = may_change(None)
    """Folder that image paths are relative to; each JSON file's own folder by default."""
    images_as_viewed: bool | None = None
    """Turn images as their EXIF data says, and lay transparent ones on white. By default as the model to
    start from was trained; published models were trained without. The choice is stored with the trained
    model."""
    max_length: int = 4096
    """Most tokens of a sample, image slots included; an image is never cut."""
    on_long_sample: str = "truncate"
    """A sample over max_length: `truncate` loses its tail, `skip` counts it and leaves it out, `error` ends
    the run."""
    fit_images: bool = False
    """Take the images of a sample over max_length at a lower limit of tiles (hd_num, max_patches) or of size,
    the highest that fits, and log it; on_long_sample is for what still does not."""
    packing: bool = may_change(True)
    """A micro-batch is one row of whole samples without padding, and ranks get rows of equal cost; samples do
    not see each other, and the loss is the same. False: padded micro-batches."""

    # --- what a step is made of ----------------------------------------------------------------------
    per_device_train_batch_size: int = may_change(1)
    """Samples a rank computes at once. Packed, they are as many as fit into this × max_length tokens."""
    gradient_accumulation_steps: int | None = may_change(None)
    """Micro-batches a rank sums before a step, 1 by default; global batch = this × per-device batch × ranks.
    Packed, a step takes no more of them than its tokens need, seldom as many as this."""
    global_batch_size: int | None = may_change(None)
    """Samples of a step, the same ones on any number of ranks, instead of gradient_accumulation_steps: a step
    takes as many micro-batches as they need, and ranks may have unequal shares."""
    seed: int = 42
    """Of the data order, dropout, and newly made weights."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values alone, a sentence each; no file but paths' existence."""
        found = []
        if not self.model_name_or_path:
            found.append("--model_name_or_path is missing: name the folder of the model to start from")
        elif not Path(self.model_name_or_path).is_dir():
            found.append(
                f"--model_name_or_path {self.model_name_or_path}: there is no such folder; "
                "download the model first, nothing is fetched from a hub"
            )
        if not Path(self.data_path).is_file():
            found.append(f"--data_path {self.data_path}: there is no such file")
        if self.image_root is not None and not Path(self.image_root).is_dir():
            found.append(f"--image_root {self.image_root}: there is no such folder")
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            found.append(f"--chat_template {self.chat_template}: there is no such file")
        if self.on_long_sample not in ("truncate", "skip", "error"):
            found.append(f"--on_long_sample {self.on_long_sample}: choose one of truncate, skip, error")
        if self.hd_num is not None and self.hd_num < 1 and self.hd_num != -1:
            found.append(f"--hd_num {self.hd_num}: must be at least 1, or -1 for the model's own")
        if self.img_size is not None and self.hd_num not in (None, -1):
            found.append(
                "--img_size and --hd_num exclude each other: the first is for square-image models, "
                "the second for high-resolution ones"
            )
        return found + self.too_small(
            img_size=1,
            max_length=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            global_batch_size=1,
            seed=0,
        )

    def global_batch(self, num_ranks: int) -> int:
        """Samples of an optimizer step."""
        accumulated = self.gradient_accumulation_steps or 1
        return self.global_batch_size or self.per_device_train_batch_size * accumulated * num_ranks

    def accumulation(self, num_ranks: int) -> int:
        """The most micro-batches that a rank sums before a step."""
        return -(-self.global_batch(num_ranks) // (self.per_device_train_batch_size * num_ranks))

    def batch_problems(self, num_ranks: int) -> list[str]:
        """A sentence if the flags that make up a step contradict each other on this number of ranks."""
        batch, accumulated = self.global_batch_size, self.gradient_accumulation_steps
        size = self.per_device_train_batch_size
        if batch is None or accumulated is None or batch == size * accumulated * num_ranks:
            return []
        return [
            f"--global_batch_size {batch} is not {size} per device × {accumulated} accumulated × {num_ranks} "
            f"ranks = {size * accumulated * num_ranks}: leave out --gradient_accumulation_steps, which "
            "follows from it"
        ]

    @property
    def row_tokens(self) -> int:
        """Most tokens of a packed row: a micro-batch takes no more memory than a padded one may."""
        return self.per_device_train_batch_size * self.max_length

    def too_small(self, **least: float) -> list[str]:
        """A sentence for each of these fields whose value is below the least that it may be."""
        return [
            f"--{name} {value}: must be at least {low}"
            for name, low in least.items()
            if (value := getattr(self, name)) is not None and value < low
        ]
