"""Generate answers to a file of questions or to a single one, with a model or an adapter on its base.

    python -m trainer.generate --model_name_or_path output/pets --data_path test.json
    python -m trainer.generate --model_name_or_path output/adapter --image cat.jpg --question "Which breed?"
    torchrun --nproc_per_node 8 -m trainer.generate --model_name_or_path … --data_path … # split by rank

Input: a model's folder, or an adapter's, which names its base; samples as for training, with or without the
last answer. Output: the file `--output`, one JSON object a line in the order of the samples,

    {"id": "pets-7", "question": "Breed?", "answer": "a tabby", "prediction": "A tabby", "correct": true}
    {"id": "pets-8", "error": "img/8.jpg does not exist; …"}                        # --on_bad_sample skip

and the share of correct predictions, where samples have an answer (`exact_match` in trainer/scores.py). With
`--metrics anls token_f1` such a row also has `"scores": {"anls": 0.6, "token_f1": 0.8}`, and their means are
logged. Every batch is appended to `<output>.partial`, which becomes `<output>` at the end; the same command
continues an interrupted run from it. The answer to a single `--question` goes to stdout.
"""

import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import transformers
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel

from data.batch import map_tensors
from data.errors import DataError
from data.files import replace_file
from data.flags import ConfigError, parse_flags
from data.loader import SampleReader
from data.mixture import Source, read_mixture
from data.records import Records
from data.sample import IMAGE_TAG, PLACEHOLDER
from data.tokens import Encoded, SampleEncoder
from trainer.adapter_folder import (
    CONFIG_FILE,
    adapter_preprocessing,
    adapter_template,
    read_adapter,
)
from trainer.distributed import Ranks, finish, start, step_seed
from trainer.job import (
    BAD_INPUT,
    FAILED,
    agree_on_problems,
    is_main,
    leave,
    log,
    no_bar,
    rank_zero_first,
    tell_failure,
)
from trainer.lora import adapted_model
from trainer.models import (
    answering_class,
    load_config,
    load_conversation,
    load_image_processor,
    parts_of,
    prompt_arguments,
)
from trainer.parallelize import split_tiles
from trainer.scores import exact_match, mean_scores, parse_metrics, scores

SECONDS_BETWEEN_LINES = 30.0
"""Progress is logged this often where there is no progress bar."""


@dataclass
class Questions:
    """The flags: the questions, the model, and how to generate."""

    model_name_or_path: str = ""
    """Folder of a model, or of an adapter."""
    base_model: str | None = None
    """Folder of an adapter's base; by default the one that the adapter names."""
    chat_template: str | None = None
    """File of the chat template that an adapter was trained with, if it was not its base's own."""
    data_path: str | None = None
    """.json or .jsonl file of samples."""
    image_root: str | None = None
    """Folder that image paths are relative to; by default the folder of the JSON file."""
    question: str | None = None
    """One question, instead of data_path."""
    image: tuple[str, ...] = field(default=(), metadata={"split_at_commas": False})
    """The image of that question, or several."""
    output: str = "predictions.jsonl"
    """File for the predictions of data_path."""
    metrics: tuple[str, ...] = ()
    """Metrics of the predictions, where samples have an answer: exact_match, choice (of a letter), anls,
    relaxed_accuracy, token_f1 or rouge_l."""
    on_bad_sample: str = "error"
    """For a sample that cannot be read or is too long: `error` ends the run, `skip` writes the problem
    instead of a prediction."""
    batch_size: int = 8
    """Questions per rank in a batch."""
    max_new_tokens: int = 256
    """Maximum tokens of an answer."""
    max_length: int = 4096
    """Maximum tokens of a question, image slots included."""
    do_sample: bool = False
    """Sample tokens instead of always taking the most likely one."""
    temperature: float = 1.0
    """Temperature for sampling: below 1 favours likely tokens."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens with this total probability."""
    seed: int = 42
    """Seed for sampling."""
    hd_num: int | None = None
    """High-resolution models: the maximum number of tiles of an image; by default as in training."""
    fit_images: bool = False
    """For a question over max_length, use the highest lower limit of images' tiles or size that fits."""
    vision_micro_batch: int | None = 16
    """Images or tiles that a block of the vision tower processes at a time; none: all at once."""
    images_as_viewed: bool | None = None
    """Rotate images by their EXIF data and put transparent ones on white; by default as in training."""
    bf16: bool = True
    """Compute in bfloat16; False: float32."""

    def chosen_metrics(self) -> tuple[str, ...]:
        """The names in `metrics`; ValueError with a line for each that cannot be used."""
        source = Path(self.data_path or "").stem
        return parse_metrics(self.metrics, [source])[source]

    def problems(self) -> list[str]:
        """Problems with the values of the flags, a sentence each."""
        problems = []
        if not Path(self.model_name_or_path).is_dir() or not self.model_name_or_path:
            problems.append(f"--model_name_or_path {self.model_name_or_path}: there is no such folder")
        if (self.data_path is None) == (self.question is None):
            problems.append("give either --data_path or --question")
        if self.data_path is not None and not Path(self.data_path).is_file():
            problems.append(f"--data_path {self.data_path}: there is no such file")
        if self.data_path is not None and Path(self.data_path).suffix not in (".json", ".jsonl"):
            problems.append(f"--data_path {self.data_path}: must be a .json or .jsonl file of samples")
        if self.metrics and self.data_path is None:
            problems.append("--metrics needs --data_path, whose samples hold the answers to compare with")
        try:
            self.chosen_metrics()
        except ValueError as error:
            problems += [f"--metrics: {line}" for line in str(error).splitlines()]
        if self.image and self.question is None:
            problems.append("--image needs --question; samples of --data_path name their own images")
        if self.on_bad_sample not in ("error", "skip"):
            problems.append(f"--on_bad_sample {self.on_bad_sample}: choose one of error, skip")
        for name in ("batch_size", "max_new_tokens", "max_length", "vision_micro_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                problems.append(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            problems.append("--temperature must be above 0, and --top_p above 0 and at most 1")
        if not self.do_sample and (self.temperature, self.top_p) != (1.0, 1.0):
            problems.append("--temperature and --top_p have no effect without --do_sample True")
        return problems


def load_model(
    folder: Path,
    base: Path | None,
    dtype: torch.dtype,
    vision_micro_batch: int | None = None,
    hd_num: int | None = None,
    images_as_viewed: bool | None = None,
) -> tuple[PreTrainedModel, Path]:
    """Load the model in `folder`, or the adapter there on its base; also returns the folder of the model.

    vision_micro_batch: images or tiles that a block of the vision tower processes at a time; None: all.
    hd_num, images_as_viewed: override the model's configuration.
    ValueError if a folder or value cannot be used.
    """
    transformers.logging.disable_progress_bar()
    model_folder, preprocessing = folder, None
    if (folder / CONFIG_FILE).is_file():
        peft_config, _ = read_adapter(folder)
        preprocessing = adapter_preprocessing(folder)
        model_folder = base or Path(peft_config.base_model_name_or_path or "")
        if not (model_folder / "config.json").is_file():
            raise DataError(
                f"{folder}: its base {model_folder} is not the folder of a model; set --base_model"
            )
        adapted_model(folder, model_folder)  # rejects another base
    config = load_config(
        model_folder,
        hd_num=hd_num,
        images_as_viewed=images_as_viewed,
        adapter_preprocessing=preprocessing,
    )
    load_image_processor(config)  # rejects a bad hd_num before the weights are read
    model = answering_class(config).from_pretrained(model_folder, config=config, dtype=dtype)
    parts = parts_of(model.config)
    in_tiles = {type(module) for module in parts.tiled(model)}
    if model_folder != folder:
        with warnings.catch_warnings(action="ignore"):  # transformers' deprecations of names that peft uses
            model = PeftModel.from_pretrained(model, str(folder))
    if vision_micro_batch is not None:
        # Only now, because an adapter with a trained tower adds copies of its modules.
        for module in [module for module in model.modules() if type(module) in in_tiles]:
            split_tiles(module, vision_micro_batch)
    return cast(PreTrainedModel, model).eval(), model_folder


@torch.no_grad()  # and not inference_mode, whose tensors a model in training could not use afterwards
def answer(
    model: PreTrainedModel,
    encoder: SampleEncoder,
    prompts: Sequence[Encoded],
    pictures: Mapping[str, Any],
    device: torch.device,
    **options: Any,
) -> list[str]:
    """Answer a batch of prompts, padded on the left; pictures: the model's arguments for all their images."""
    width = max(len(prompt.input_ids) for prompt in prompts)
    shape = (len(prompts), width)
    input_ids = torch.full(shape, encoder.pad_id, device=device)
    attention_mask, im_mask = torch.zeros_like(input_ids), torch.zeros(shape, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        offset = width - len(prompt.input_ids)
        input_ids[row, offset:] = torch.from_numpy(prompt.input_ids)
        im_mask[row, offset:] = torch.from_numpy(prompt.im_mask)
        attention_mask[row, offset:] = 1
    images: dict[str, Any] = {}
    if pictures:
        images = prompt_arguments(model.config, im_mask)
        images |= {name: map_tensors(value, lambda t: t.to(device)) for name, value in pictures.items()}
    generated = cast(Any, model).generate(
        input_ids=input_ids, attention_mask=attention_mask, **images, **options
    )
    return [encoder.conversation.answer_in(ids) for ids in generated[:, width:].tolist()]


def is_correct(prediction: str, expected: str) -> bool:
    """Whether both are the same answer, by `exact_match`."""
    return exact_match(prediction, [expected]) == 1.0


class OneQuestion(Source):
    """The source of `--question`; errors about it name no file and no record."""

    def where(self, index: int, record_id: str | None = None) -> str:
        return "the question"


def one_question(questions: Questions) -> Source:
    """`--question` and `--image` as a source of one record."""
    text = questions.question or ""
    if PLACEHOLDER not in text and IMAGE_TAG not in text:
        text = PLACEHOLDER * len(questions.image) + text
    record = {"image": list(questions.image), "conversations": [{"from": "user", "value": text}]}
    return OneQuestion("question", cast(Records, [record]), 1, Path(questions.image_root or ""))


def answer_some(
    reader: SampleReader,
    model: PreTrainedModel,
    questions: Sequence[tuple[int, int]],
    metrics: Sequence[Sequence[str]],
    device: torch.device,
    **options: Any,
) -> list[dict[str, Any]]:
    """One row of the output for each (source, record), with `error` for those that cannot be read.

    metrics: the scores of each source's answers; options: of transformers' `generate`.
    """
    rows: list[dict[str, Any]] = []
    prompts: list[Encoded] = []
    pixels: list[Any] = []
    asked: list[tuple[dict[str, Any], Sequence[str]]] = []
    for source, index in questions:
        try:
            sample, prompt, images = reader.read_prompt(source, index)
        except DataError as error:
            rows.append({"id": reader.sources[source].record_id(index), "error": str(error)})
            continue
        has_answer = sample.answer is not None
        question = sample.turns[-2 if has_answer else -1][1] if len(sample.turns) > has_answer else ""
        rows.append({"id": sample.id, "question": question.replace(PLACEHOLDER, "").strip()})
        if has_answer:
            rows[-1]["answer"] = sample.answer
        asked.append((rows[-1], metrics[source]))
        prompts.append(prompt)
        pixels += images
    given = reader.image_processor.batch(pixels) if pixels else {}
    predictions = answer(model, reader.encoder, prompts, given, device, **options) if prompts else []
    for (row, names), prediction in zip(asked, predictions, strict=True):
        row["prediction"] = prediction
        if "answer" in row:
            row["correct"] = is_correct(prediction, row["answer"])
            if names:
                row["scores"] = scores(prediction, [row["answer"]], names)
    return rows


class PartialOutput:
    """The rows so far, in `<output>.partial`, which becomes `<output>` at the end.

    Its first line describes model, questions and flags, so that a later run continues only its own answers.
    """

    def __init__(self, questions: Questions, records: Records) -> None:
        """DataError if the file cannot be written or contains the answers of another run."""
        self.path = Path(questions.output)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        answered_by = {k: v for k, v in vars(questions).items() if k not in ("output", "batch_size")}
        described = json.dumps({"run": answered_by, "questions": records.fingerprint}) + "\n"
        self.rows: list[dict[str, Any]] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.partial.read_bytes().splitlines(keepends=True) if self.partial.exists() else []
            lines = [line for line in lines if line.endswith(b"\n")]  # the last one may be cut off
            if lines and lines[0] != described.encode():
                raise DataError(
                    f"--output: {self.partial} contains the answers of another run, with another model, "
                    "other questions or other flags; delete it, or name another --output"
                )
            self.rows = [json.loads(line) for line in lines[1:]]
            self.file = self.partial.open("wb")
            self.file.writelines(lines or [described.encode()])
            self.file.flush()
        except OSError as error:
            raise DataError(f"--output {self.path} cannot be written: {error.strerror}") from error

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows += rows
        self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self.file.flush()

    def finish(self) -> None:
        """Move the rows to `<output>`, without the first line."""
        self.file.close()
        replace_file(self.path, self.partial.read_bytes().partition(b"\n")[2])
        self.partial.unlink()


def answer_all(
    questions: Questions, reader: SampleReader, model: PreTrainedModel, ranks: Ranks, first: int
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows from record `first` on, in order, a batch of every rank at a time; every rank calls it.

    At a record that cannot be read, unless those are skipped: the rows before it, then DataError everywhere.
    """
    total, batch = len(reader.sources[0].records), questions.batch_size * ranks.world
    bar = tqdm(total=total, initial=first, unit="question", leave=False, disable=no_bar() or total < 2)
    last_line = time.monotonic()
    options: dict[str, Any] = {"max_new_tokens": questions.max_new_tokens, "do_sample": questions.do_sample}
    if questions.do_sample:
        options |= {"temperature": questions.temperature, "top_p": questions.top_p}
    for offset in range(first, total, batch):
        indices = range(offset, min(offset + batch, total))
        torch.manual_seed(step_seed(questions.seed, offset, ranks.rank))
        mine = [(0, index) for index in indices[ranks.rank :: ranks.world]]
        metrics = [questions.chosen_metrics()]
        shares = [answer_some(reader, model, mine, metrics, ranks.device, **options)] * ranks.world
        if ranks.world > 1:
            dist.all_gather_object(shares, shares[ranks.rank])
        rows = [shares[number % ranks.world][number // ranks.world] for number in range(len(indices))]
        bad = [number for number, row in enumerate(rows) if "error" in row]
        if bad and questions.on_bad_sample == "error":
            yield rows[: bad[0]]
            bar.close()
            raise DataError(rows[bad[0]]["error"])
        yield rows
        bar.update(len(rows))
        if no_bar() and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
            log(f"{indices.stop:,} of {total:,} questions")
            last_line = time.monotonic()
    bar.close()


def open_all(questions: Questions) -> tuple[PreTrainedModel, SampleReader, PartialOutput | None]:
    """The model, the questions and, on rank 0 and for a file of questions, the output.

    ValueError or OSError if one of them cannot be used.
    """
    output = None
    if questions.data_path is None:
        sources = [one_question(questions)]
    else:
        with rank_zero_first():
            # Questions need no answer, so a file's bad records are reported when they are read.
            sources = read_mixture(
                questions.data_path, image_root=questions.image_root, skip_bad=True, show_progress=False
            )
        if is_main():
            output = PartialOutput(questions, sources[0].records)
    model, model_folder = load_model(
        Path(questions.model_name_or_path),
        Path(questions.base_model) if questions.base_model else None,
        torch.bfloat16 if questions.bf16 else torch.float32,
        questions.vision_micro_batch,
        questions.hd_num,
        questions.images_as_viewed,
    )
    template, folder = questions.chat_template, Path(questions.model_name_or_path)
    # Only a family whose format is in its code, and not in a chat template, saves this.
    trained_with = getattr(model.config, "conversation_format", None)
    if template is None and folder != model_folder:  # an adapter's folder
        template = adapter_template(folder, model_folder)
    conversation = load_conversation(model_folder, template)
    if trained_with not in (None, conversation.format):
        log(
            f"warning: {questions.model_name_or_path} was trained with another conversation format "
            f"({trained_with}) than this code has ({conversation.format}); its answers may suffer"
        )
    encoder = SampleEncoder(conversation, questions.max_length)
    processor = load_image_processor(model.config)
    return model, SampleReader(sources, encoder, processor, fit_images=questions.fit_images), output


def ask(questions: Questions, ranks: Ranks) -> int:
    """Answer all questions; returns the exit status."""
    opened = None
    problems: list[str] = []
    try:
        opened = open_all(questions)
    except (ValueError, OSError) as error:
        problems = str(error).splitlines()
    if agree_on_problems(problems) or opened is None:
        return BAD_INPUT
    model, reader, output = opened
    model = cast(Any, model).to(ranks.device)
    done = [len(output.rows) if output else 0]
    if ranks.world > 1:
        dist.broadcast_object_list(done)
    if done[0]:
        log(f"continuing after {done[0]:,} answers in {questions.output}.partial")
    try:
        for rows in answer_all(questions, reader, model, ranks, done[0]):
            if output:
                output.add(rows)
            elif is_main() and rows:
                print(rows[0]["prediction"])
    except DataError as error:
        hint = (
            f"; the answers before it are in {questions.output}.partial, and the same command continues "
            "after them; use --on_bad_sample skip to leave such samples out"
        )
        log(f"\nerror: {error}{hint if questions.data_path else ''}")
        return FAILED
    if output:
        output.finish()
        answered = [row["correct"] for row in output.rows if "correct" in row]
        skipped = sum("error" in row for row in output.rows)
        share = f", {sum(answered) / len(answered):.1%} of {len(answered):,} correct" if answered else ""
        left_out = f", {skipped:,} samples left out" if skipped else ""
        means = mean_scores(("", row["scores"]) for row in output.rows if "scores" in row).get("", {})
        by_metric = "".join(f", {metric} {mean:.1%}" for metric, mean in means.items())
        log(f"{len(output.rows) - skipped:,} predictions in {questions.output}{share}{by_metric}{left_out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, start the process group and answer; a failure is one message and a status."""
    try:
        questions = parse_flags(Questions, argv, "trainer.generate")
    except ConfigError as error:
        log("\n".join(f"error: {problem}" for problem in str(error).splitlines()))
        return BAD_INPUT
    ranks = start()
    try:
        status = ask(questions, ranks)
    except BaseException:
        tell_failure()
        raise
    finish()
    return status


if __name__ == "__main__":
    leave(main())
