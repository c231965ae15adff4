"""From the configuration to a reader of samples; and how the commands of `data/` read theirs.

    config = parse_command(CheckConfig, ["data.txt", "--model_name_or_path", "DIR"], prog="data.check")
    reader, model_config = open_reader(config, read_mixture(config.data_path), model_families())

`data/` knows no model: `load_config`, `load_conversation`, `load_image_processor` and `cost_sizes` are those
of a module that is passed in. The commands import the trainer's by its name.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from data.config import DataConfig
from data.errors import DataError
from data.flags import ConfigError, parse_flags
from data.loader import OnLongSample, SampleReader
from data.mixture import Source, read_mixture
from data.packing import CostModel
from data.tokens import SampleEncoder

T = TypeVar("T", bound=DataConfig)


def open_reader(
    config: DataConfig,
    sources: Sequence[Source],
    models: Any,
    adapter_preprocessing: Mapping[str, Any] | None = None,
) -> tuple[SampleReader, Any]:
    """(the reader of samples as the model takes them, the model's configuration).

    models: the module of the model families. adapter_preprocessing: how the adapter that training goes on
    from was trained. ValueError or OSError if the model's folder cannot be used.
    """
    folder = config.model_name_or_path
    model_config = models.load_config(
        folder, config.img_size, config.hd_num, config.images_as_viewed, adapter_preprocessing
    )
    conversation = models.load_conversation(folder)
    model_config.conversation_format = conversation.format
    reader = SampleReader(
        sources,
        SampleEncoder(conversation, config.max_length),
        models.load_image_processor(model_config),
        cast(OnLongSample, config.on_long_sample),
        config.fit_images,
    )
    return reader, model_config


def cost_model(models: Any, model_config: Any, fix_vit: bool) -> CostModel:
    """What a sample costs this model; fix_vit: whether its vision tower is frozen."""
    return CostModel.from_sizes(**models.cost_sizes(model_config), trains_vision=not fix_vit)


def model_families() -> Any:
    """The module `trainer.models`, for commands; `data/` itself imports nothing of the trainer."""
    return importlib.import_module("trainer.models")


def open_data(config: DataConfig) -> tuple[SampleReader, Any]:
    """`open_reader` with all sources of the configuration; DataError with all that is wrong with the
    files."""
    problems: list[str] = []
    sources: list[Source] = []
    try:
        sources = read_mixture(config.data_path, config.given_num, config.image_root, skip_bad=True)
    except DataError as error:
        problems += str(error).splitlines()
    try:
        opened = open_reader(config, sources, model_families())
    except (ValueError, OSError) as error:
        raise DataError(*problems, *str(error).splitlines()) from error
    if problems:
        raise DataError(*problems)
    return opened


def parse_command(kind: type[T], argv: Sequence[str] | None, prog: str) -> T | None:
    """A command's flags, of which --data_path may come first without its name; None if some are wrong.

    What is wrong is printed, a line each.
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
