"""A configuration → a reader of samples, for training and for the commands of `data/`.

    reader, model_config = open_reader(config, read_mixture(config.data_path), trainer.models)   # training
    config = parse_command(CheckConfig, ["data.txt", "--model_name_or_path", "DIR"], prog="data.check")
    reader, cost = open_data(config)                                                             # commands

`data/` knows no model: its configuration, conversation format, image processor and sizes come from a module
that is passed in. The commands import `trainer.models` by name.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from data.config import DataConfig
from data.errors import DataError
from data.flags import ConfigError, parse_flags
from data.loader import OnLongSample, SampleReader
from data.mixture import Source, read_mixture
from data.packing import CostModel
from data.tokens import SampleEncoder

T = TypeVar("T", bound=DataConfig)


@dataclass
class CommandConfig(DataConfig):
    """Flags that the commands of `data/` share."""

    # --- the command ---------------------------------------------------------------------------------
    fix_vit: bool = True
    """Whether the training freezes the vision tower: the cost of images, and so packing, depends on it."""
    num_workers: int | None = None
    """Processes that read the data; one per core by default."""

    def problems(self) -> list[str]:
        return super().problems() + self.too_small(num_workers=0)


def open_reader(
    config: DataConfig,
    sources: Sequence[Source],
    models: Any,
    adapter_preprocessing: Mapping[str, Any] | None = None,
    adapter_template: str | Path | None = None,
) -> tuple[SampleReader, Any]:
    """A reader of samples in the form that the model takes, and the model's configuration.

    ValueError or OSError if the model's folder cannot be used.

    Args:
        models: the module of the model families, `trainer.models`.
        adapter_preprocessing: the preprocessing of the adapter that training continues from.
        adapter_template: the file of its chat template, where `chat_template` is not given.
    """
    folder = config.model_name_or_path
    model_config = models.load_config(
        folder, config.img_size, config.hd_num, config.images_as_viewed, adapter_preprocessing
    )
    conversation = models.load_conversation(folder, config.chat_template or adapter_template)
    models.set_options(model_config, conversation_format=conversation.format)
    reader = SampleReader(
        sources,
        SampleEncoder(conversation, config.max_length),
        models.load_image_processor(model_config),
        cast(OnLongSample, config.on_long_sample),
        config.fit_images,
        positions=partial(models.positions_of, model_config),
    )
    return reader, model_config


def cost_model(models: Any, model_config: Any, fix_vit: bool) -> CostModel:
    """The cost of samples for this model; fix_vit: whether its vision tower is frozen."""
    return CostModel.from_sizes(**models.cost_sizes(model_config), trains_vision=not fix_vit)


def open_data(config: CommandConfig) -> tuple[SampleReader, CostModel]:
    """A command's reader of all sources and cost of samples; DataError with all problems of the files."""
    models = importlib.import_module("trainer.models")  # only the commands need the trainer
    problems: list[str] = []
    sources: list[Source] = []
    try:
        sources = read_mixture(config.data_path, config.given_num, config.image_root, skip_bad=True)
    except DataError as error:
        problems += str(error).splitlines()
    try:
        reader, model_config = open_reader(config, sources, models)
    except (ValueError, OSError) as error:
        raise DataError(*problems, *str(error).splitlines()) from error
    if problems:
        raise DataError(*problems)
    return reader, cost_model(models, model_config, config.fix_vit)


def parse_command(kind: type[T], argv: Sequence[str] | None, prog: str) -> T | None:
    """A command's flags; the first word may be the data path without `--data_path`.

    Prints all problems and returns None if the flags cannot be used.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--data_path")
    try:
        return parse_flags(kind, words, prog)
    except ConfigError as error:
        for problem in str(error).splitlines():
            print(f"error: {problem}", file=sys.stderr)
        return None
