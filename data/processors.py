"""What the commands of `data/` share: their flags, and from flags to a reader of samples.

    reader = open_data(parser.parse_args(["data.txt", "--model_name_or_path", "DIR"]), skip_bad=True)

`data/` knows no model. The conversation format and the image processor come from a module that is named by a
flag, `trainer.models` by default: its `load_config(folder, img_size, hd_num, images_as_viewed)`,
`load_conversation(folder)` and `load_image_processor(config)` are called.
"""

import argparse
import importlib
from typing import get_args

from data.errors import DataError
from data.loader import OnLongSample, SampleReader
from data.mixture import read_mixture
from data.tokens import SampleEncoder


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which data and which model; their names and defaults are the trainer's."""
    flag = parser.add_argument
    flag("data_path", help="data.txt, or one .json / .jsonl file")
    flag("--model_name_or_path", required=True, help="folder with config.json and a tokenizer")
    flag("--given_num", type=boolean, default=True, help="numbers in data.txt are thousands of samples")
    flag("--image_root", help="where image paths start; each JSON file's folder by default")
    flag("--max_length", type=int, default=4096, help="tokens a sample is cut to")
    flag("--on_long_sample", choices=get_args(OnLongSample), default="truncate", help="over max_length")
    flag("--fit_images", type=boolean, default=False, help="lower hd_num for samples over max_length")
    flag("--img_size", type=int, help="side of the square that images are resized to")
    flag("--hd_num", type=int, help="high-resolution models: the most tiles an image is cut into")
    flag("--images_as_viewed", type=boolean, help="EXIF rotation, and transparency on white")
    flag("--per_device_train_batch_size", type=int, default=1)
    flag("--gradient_accumulation_steps", type=int, default=1)
    flag("--num_ranks", type=int, default=1, help="processes that the training will have")
    flag("--seed", type=int, default=42)
    flag("--num_workers", type=int, help="processes; one a core by default")
    flag("--processors", default="trainer.models", help="module that loads tokenizer and image processor")


def open_data(arguments: argparse.Namespace, *, skip_bad: bool) -> SampleReader:
    """Everything that the flags name, loaded; DataError with all that is wrong with the files."""
    module = importlib.import_module(arguments.processors)
    try:
        folder, viewed = arguments.model_name_or_path, arguments.images_as_viewed
        config = module.load_config(folder, arguments.img_size, arguments.hd_num, viewed)
        conversation = module.load_conversation(folder)
        image_processor = module.load_image_processor(config)
    except (ValueError, OSError) as error:
        raise DataError(*str(error).splitlines()) from error
    return SampleReader(
        read_mixture(arguments.data_path, arguments.given_num, arguments.image_root, skip_bad=skip_bad),
        SampleEncoder(conversation, arguments.max_length),
        image_processor,
        arguments.on_long_sample,
        arguments.fit_images,
    )
