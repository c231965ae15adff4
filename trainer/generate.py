"""Answers: a file of questions, or one question about one image, from a model or a base with an adapter.

    python -m trainer.generate --model_name_or_path output/pets --data_path test.json
    python -m trainer.generate --model_name_or_path output/adapter --image cat.jpg --question "Which breed?"
    torchrun --nproc_per_node 8 -m trainer.generate --model_name_or_path … --data_path … # each takes a share

Input: a model's folder, or an adapter's (its base is the one that it names); samples as for training, with or
without the last answer. Output: `--output`, a JSON object a line in the order of the samples,

    {"id": "pets-7", "question": "Breed?", "answer": "a tabby", "prediction": "A tabby", "correct": true}

and the share of correct ones where an answer is there: equal but for case, outer space and a final full stop.
A single question's answer goes to the standard output.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import transformers
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from data.errors import DataError
from data.loader import SampleReader
from data.mixture import read_mixture
from data.sample import PLACEHOLDER
from data.tokens import Encoded, SampleEncoder
from trainer.adapter_folder import CONFIG_FILE, read_adapter
from trainer.distributed import (
    BAD_INPUT,
    FAILED,
    Ranks,
    agree_on_problems,
    finish,
    is_main,
    leave,
    log,
    rank_zero_first,
    start,
)
from trainer.flags import ConfigError, parse_flags
from trainer.lora import adapted_model
from trainer.models import load_config, load_image_processor, load_tokenizer, parts_of
from trainer.parallelize import split_tiles


@dataclass
class Questions:
    """What to ask, of which model, and how to answer."""

    model_name_or_path: str = ""
    """Folder of a model, or of an adapter."""
    base_model: str | None = None
    """Folder of an adapter's base; the one that the adapter names by default."""
    data_path: str | None = None
    """.json or .jsonl file of samples."""
    image_root: str | None = None
    """Folder that image paths are relative to; the JSON file's own folder by default."""
    question: str | None = None
    """One question, instead of data_path."""
    image: tuple[str, ...] = ()
    """The image of that question, or several."""
    output: str = "predictions.jsonl"
    """Where the predictions of data_path go."""
    batch_size: int = 8
    """Questions answered at once by a rank."""
    max_new_tokens: int = 256
    """Tokens an answer may have."""
    max_length: int = 4096
    """Tokens a question may have, image slots included."""
    do_sample: bool = False
    """Draw each token, instead of taking the likeliest."""
    temperature: float = 1.0
    """Of drawing: below 1 is more certain."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that hold this share of the probability."""
    seed: int = 42
    """Of drawing."""
    hd_num: int | None = None
    """High-resolution models: the most tiles an image is cut into."""
    fit_images: bool = False
    """High-resolution models: take the images of a question over max_length at a smaller hd_num, the largest
    that fits."""
    vision_micro_batch: int | None = 16
    """Images or tiles that a block of the vision tower computes at a time; none: all at once."""
    images_as_viewed: bool = False
    """Turn images as their EXIF data says, and lay transparent ones on white."""
    bf16: bool = True
    """Compute in bfloat16; False: float32."""

    def problems(self) -> list[str]:
        """Everything that is wrong with the values alone, a sentence each."""
        found = []
        if not Path(self.model_name_or_path).is_dir() or not self.model_name_or_path:
            found.append(f"--model_name_or_path {self.model_name_or_path}: there is no such folder")
        if (self.data_path is None) == (self.question is None):
            found.append("give either --data_path or --question")
        if self.data_path is not None and not Path(self.data_path).is_file():
            found.append(f"--data_path {self.data_path}: there is no such file")
        if self.data_path is not None and Path(self.data_path).suffix not in (".json", ".jsonl"):
            found.append(f"--data_path {self.data_path}: must be a .json or .jsonl file of samples")
        if self.image and self.question is None:
            found.append("--image goes with --question; samples of --data_path name their own")
        for name in ("batch_size", "max_new_tokens", "max_length", "vision_micro_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                found.append(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            found.append("--temperature must be above 0, and --top_p above 0 and at most 1")
        if not self.do_sample and (self.temperature, self.top_p) != (1.0, 1.0):
            found.append("--temperature and --top_p have no effect without --do_sample True")
        return found


def load_model(
    folder: Path, base: Path | None, dtype: torch.dtype, vision_micro_batch: int | None = None
) -> tuple[PreTrainedModel, Path]:
    """(the model in `folder`, or an adapter on its base; the folder that holds configuration and tokenizer).

    vision_micro_batch: images or tiles that a block of the vision tower computes at a time; None: all.
    ValueError in a sentence where either cannot be used.
    """
    transformers.logging.disable_progress_bar()
    model_folder = folder
    if (folder / CONFIG_FILE).is_file():
        peft_config, _ = read_adapter(folder)
        model_folder = base or Path(peft_config.base_model_name_or_path or "")
        if not (model_folder / "config.json").is_file():
            raise DataError(
                f"{folder}: its base {model_folder} is no model's folder; name it by --base_model"
            )
        adapted_model(folder, model_folder)  # refuses another base
    model = AutoModelForCausalLM.from_pretrained(model_folder, config=load_config(model_folder), dtype=dtype)
    parts = parts_of(model.config)
    blocks = model.get_submodule(parts.vision_blocks).children()
    in_tiles = {type(module) for module in (model.get_submodule(parts.vision_embeddings), *blocks)}
    if model_folder != folder:
        with warnings.catch_warnings(action="ignore"):  # transformers' own, of names that peft still uses
            model = PeftModel.from_pretrained(model, str(folder))
    if vision_micro_batch is not None:
        # Only now: an adapter that holds the trained tower brings a copy of its modules.
        for module in [module for module in model.modules() if type(module) in in_tiles]:
            split_tiles(module, vision_micro_batch)
    return cast(PreTrainedModel, model).eval(), model_folder


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    encoder: SampleEncoder,
    prompts: Sequence[Encoded],
    pixels: Sequence[torch.Tensor],
    **options: Any,
) -> list[str]:
    """The answers to a batch of prompts, padded on the left; pixels: of all their images, in order."""
    width = max(len(prompt.input_ids) for prompt in prompts)
    shape, device = (len(prompts), width), model.device
    input_ids = torch.full(shape, encoder.pad_id, device=device)
    attention_mask, im_mask = torch.zeros_like(input_ids), torch.zeros(shape, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        begin = width - len(prompt.input_ids)
        input_ids[row, begin:] = torch.from_numpy(prompt.input_ids)
        im_mask[row, begin:] = torch.from_numpy(prompt.im_mask)
        attention_mask[row, begin:] = 1
    images = {"pixel_values": [image.to(device) for image in pixels], "im_mask": im_mask} if pixels else {}
    generated = cast(Any, model).generate(
        input_ids=input_ids, attention_mask=attention_mask, **images, **options
    )
    texts = encoder.tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def is_correct(prediction: str, expected: str) -> bool:
    """Equal but for case, outer white space and a final full stop."""
    ours, theirs = (text.strip().rstrip(".。").casefold() for text in (prediction, expected))
    return ours == theirs


def predict(questions: Questions, reader: SampleReader, model: PreTrainedModel, ranks: Ranks) -> list[dict]:
    """This rank's share of the predictions: records rank, rank + world, … of the one source."""
    (source,) = reader.sources
    mine = range(ranks.rank, len(source.records), ranks.world)
    options: dict[str, Any] = {"max_new_tokens": questions.max_new_tokens, "do_sample": questions.do_sample}
    if questions.do_sample:
        options |= {"temperature": questions.temperature, "top_p": questions.top_p}
    found: list[dict] = []
    bar = tqdm(total=len(mine), unit="question", disable=ranks.rank != 0 or len(mine) < 2)
    for first in range(0, len(mine), questions.batch_size):
        read = [reader.read_prompt(0, index) for index in mine[first : first + questions.batch_size]]
        pixels = [image for _, _, images in read for image in images]
        predictions = answer(model, reader.encoder, [prompt for _, prompt, _ in read], pixels, **options)
        for (sample, _, _), prediction in zip(read, predictions, strict=True):
            *_, (role, text) = sample.turns
            has_answer = role == "assistant"
            question = sample.turns[-2 if has_answer else -1][1] if len(sample.turns) > has_answer else ""
            row = {"id": sample.id, "question": question.replace(PLACEHOLDER, "").strip()}
            if has_answer:
                row["answer"] = text
            row["prediction"] = prediction
            found.append(row | ({"correct": is_correct(prediction, text)} if has_answer else {}))
        bar.update(len(read))
    bar.close()
    return found


def ask(questions: Questions, ranks: Ranks, folder: Path) -> int:
    """Answer everything; `folder` is a place for a file. Returns the exit status."""
    problems, sources, model, reader = [], [], None, None
    data_path = Path(questions.data_path or folder / "question.json")
    if questions.question is not None:
        text = questions.question
        if PLACEHOLDER not in text:
            text = PLACEHOLDER * len(questions.image) + text
        images = [str(Path(path).resolve()) for path in questions.image]
        sample = {"image": images, "conversations": [{"from": "user", "value": text}]}
        data_path.write_text(json.dumps([sample]), encoding="utf-8")
    try:
        with rank_zero_first():
            # Questions need no answer, so a file's bad records show when they are read.
            sources = read_mixture(
                data_path, image_root=questions.image_root, skip_bad=True, show_progress=False
            )
        base = Path(questions.base_model) if questions.base_model else None
        dtype = torch.bfloat16 if questions.bf16 else torch.float32
        chosen, tiles = Path(questions.model_name_or_path), questions.vision_micro_batch
        model, model_folder = load_model(chosen, base, dtype, tiles)
        processor = load_image_processor(load_config(model_folder), questions.hd_num)
        encoder = SampleEncoder(load_tokenizer(model_folder), questions.max_length)
        as_viewed, fits = questions.images_as_viewed, questions.fit_images
        reader = SampleReader(sources, encoder, processor, as_viewed, fit_images=fits)
    except (ValueError, OSError) as error:
        problems += str(error).splitlines()
    if agree_on_problems(problems):
        return BAD_INPUT
    assert model is not None
    assert reader is not None
    torch.manual_seed(questions.seed + ranks.rank)
    model = cast(Any, model).to(ranks.device)
    shares: list[list[dict]] = [predict(questions, reader, model, ranks)] * ranks.world
    if ranks.world > 1:
        dist.all_gather_object(shares, shares[0])
    total = sum(map(len, shares))
    rows = [shares[index % ranks.world][index // ranks.world] for index in range(total)]
    if not is_main():
        return 0
    if questions.question is not None:
        print(rows[0]["prediction"])
        return 0
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path(questions.output).write_text("".join(lines), encoding="utf-8")
    answered = [row["correct"] for row in rows if "correct" in row]
    share = f", {sum(answered) / len(answered):.1%} of {len(answered):,} correct" if answered else ""
    log(f"{total:,} predictions in {questions.output}{share}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, join the other ranks, answer; a failure is a sentence and a status."""
    try:
        questions = parse_flags(Questions, argv, "trainer.generate")
    except ConfigError as error:
        for problem in str(error).splitlines():
            log(f"error: {problem}")
        return BAD_INPUT
    ranks = start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            status = ask(questions, ranks, Path(folder))
    except DataError as error:
        print(f"\nerror: rank {ranks.rank}: {error}", file=sys.stderr, flush=True)
        return FAILED
    finish()
    return status


if __name__ == "__main__":
    leave(main())
