"""The demo: a small model learns to answer questions about pictures, then an adapter adds Chinese.

    ./torchrun.sh demo [OUT]                          # or: python -m trainer.demo OUT; an XComposer2
    ./torchrun.sh demo [OUT] --family qwen2_5_vl      # or another family of transformers

Input: the package easy-vqa, 5,000 pictures of one coloured shape with questions. Output in OUT (output/demo):

    data/         the pictures and questions as this project's own files (data/easy_vqa.py)
    base/         a randomly initialised model with its own tokenizer (trainer/models/demo_bases.py)
    model/        that model after full fine-tuning, and its predictions on held-out pictures; report.html
                  tells how it learned, with answers to held-out pictures during training
    adapter/      a LoRA adapter on it, after the same questions in Chinese
    demo.json     the results that are printed at the end

Every step is a command that a user would type, printed before it runs. For a higher accuracy train longer:
`python -m trainer.demo OUT --epochs 12`. With `--high_resolution` XComposer2 uses tiles, like 2.5, and the
pictures differ in size.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data.easy_vqa import EASY_VQA_FILES, kind_of, write_demo_data
from data.errors import DataError
from trainer.job import BAD_INPUT, FAILED
from trainer.models.demo_bases import DEMO_BASES

TRAIN = """
    --bf16 False --gradient_checkpointing False --plora_dropout 0 --max_length 256
    --packing False --vision_micro_batch none --reshard_after_forward False
    --per_device_train_batch_size 16 --warmup_ratio 0.03 --logging_steps 20 --save_strategy no
    --dataloader_num_workers 1
"""
EVALUATE = """
    --eval_strategy steps --eval_steps 500 --eval_on_start True --eval_generate 24 --eval_max_new_tokens 16
"""
LORA = "--use_lora True --lora_r 16 --lora_alpha 32 --lora_dropout 0 --fix_sampler True"
KINDS = {"colour": "12 %", "shape": "33 %", "yesno": "50 %"}
"""Kind of question → the accuracy of guessing among its answers."""

Answers = list[dict[str, Any]]


def num_ranks() -> int:
    """Two, or one if the machine has a single accelerator."""
    return min(2, torch.accelerator.device_count() or 2)


def run(module: str, *arguments: object) -> None:
    """Run a module of this project by torchrun on `num_ranks()` ranks; raises if it fails."""
    ranks = num_ranks()
    words = [str(word) for word in arguments]
    print(f"\n$ torchrun --nproc_per_node {ranks} -m {module} {shlex.join(words)}", flush=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    subprocess.run([*launcher, "-m", module, *words], check=True, env={"OMP_NUM_THREADS": "1", **os.environ})


def ask(model: Path, questions: Path, tiles: Sequence[str]) -> Answers:
    """The model's greedy answers to a file of questions."""
    output = model / f"{questions.stem}-predictions.jsonl"
    run(
        "trainer.generate", "--model_name_or_path", model, "--data_path", questions, "--output", output,
        "--bf16", "False", "--batch_size", "128", "--max_new_tokens", "16", *tiles,
    )  # fmt: skip
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def share_correct(answers: Iterable[Mapping[str, Any]]) -> float:
    correct = [answer["correct"] for answer in answers]
    return sum(correct) / len(correct)


def blind_share(train: Sequence[Path], answers: Answers) -> float:
    """The best accuracy without pictures: each question gets its most frequent answer in training."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for path in train:
        for record in json.loads(path.read_text(encoding="utf-8")):
            question, answer = (turn["value"] for turn in record["conversations"])
            seen[question.removeprefix("<ImageHere>")][answer] += 1
    guesses = {question: counts.most_common(1)[0][0] for question, counts in seen.items()}
    return sum(guesses.get(row["question"]) == row["answer"] for row in answers) / len(answers)


def table(answers: Answers, number: int = 12) -> str:
    """A random selection of questions with their answers and predictions."""
    rows = random.Random(0).sample(answers, min(number, len(answers)))
    lines = [f"{'question':<44}{'answer':<12}{'prediction':<12}"]
    for row in rows:
        verdict = "right" if row["correct"] else "WRONG"
        lines.append(f"{row['question']:<44}{row['answer']:<12}{row['prediction']:<12}{verdict}")
    return "\n".join(lines)


def prepare(out: Path) -> None:
    """Create the folder or empty that of an earlier demo; DataError if it contains anything else."""
    if out.exists() and any(out.iterdir()) and not (out / "demo.json").is_file():
        raise DataError(f"{out} contains something other than a demo; name another folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "demo.json").write_text("{}\n", encoding="utf-8")


def demo(
    out: Path,
    epochs: float,
    num_images: int | None,
    high_resolution: bool = False,
    family: str = "xcomposer2",
) -> dict[str, Any]:
    """Run the whole demo; returns the content of demo.json: shares of correct answers, and seconds.

    family: a key of DEMO_BASES. DataError where it has no model for high_resolution.
    """
    started = time.perf_counter()
    chosen = DEMO_BASES[family]
    make_base = chosen.make_high_resolution if high_resolution else chosen.make
    if make_base is None:
        raise DataError(f"the demo has no model with tiles of {family}; leave --high_resolution out")
    prepare(out)
    data, base, model, adapter = (out / name for name in ("data", "base", "model", "adapter"))
    tiles = ["--hd_num", "4"] if high_resolution else []
    write_demo_data(data, num_images, unequal=high_resolution)
    texts = [
        turn["value"].removeprefix("<ImageHere>")
        for name in (*EASY_VQA_FILES, "chinese.json")
        for record in json.loads((data / name).read_text(encoding="utf-8"))
        for turn in record["conversations"]
    ]
    make_base(base, texts)

    # One rank takes two micro-batches a step: the batches are the same.
    flags = [*TRAIN.split(), "--gradient_accumulation_steps", 2 // num_ranks(), *tiles]
    run(
        "trainer.main", "--model_name_or_path", base, "--data_path", data / "data.txt", "--output_dir", model,
        "--num_train_epochs", epochs, "--fix_vit", False, "--learning_rate", chosen.learning_rate, *flags,
        "--eval_data_path", data / "eval.txt", *EVALUATE.split(),
    )  # fmt: skip
    answers = ask(model, data / "test.json", tiles)
    seconds_base = time.perf_counter() - started

    before = ask(model, data / "chinese_test.json", tiles)
    run(
        "trainer.main", "--model_name_or_path", model, "--data_path", data / "chinese.txt",
        "--output_dir", adapter, *LORA.split(), "--learning_rate", chosen.lora_learning_rate, *flags,
    )  # fmt: skip
    after = ask(adapter, data / "chinese_test.json", tiles)

    pictures = [row for row in answers if not row["id"].startswith("text")]
    kinds = {kind: [row for row in pictures if kind_of(row["answer"]) == kind] for kind in KINDS}
    result = {
        **{kind: share_correct(rows) for kind, rows in kinds.items()},
        "all": share_correct(pictures),
        "blind": blind_share([data / name for name in EASY_VQA_FILES if name != "text.json"], pictures),
        "text": share_correct(row for row in answers if row["id"].startswith("text")),
        "chinese_before": share_correct(before),
        "chinese_after": share_correct(after),
        "seconds_base": seconds_base,
        "seconds": time.perf_counter() - started,
    }
    (out / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nHeld-out pictures, asked in English\n{table(answers)}")
    print(f"\nThe same after the adapter, in Chinese\n{table(after, 6)}\n")
    for kind, chance in KINDS.items():
        print(f"{kind:<24}{result[kind]:>7.1%}   guessing: {chance}, {len(kinds[kind]):,} questions")
    print(f"{'all':<24}{result['all']:>7.1%}   best answer without looking: {result['blind']:.1%}")
    print(f"{'translation':<24}{result['text']:>7.1%}   text alone")
    print(f"{'in Chinese, before':<24}{result['chinese_before']:>7.1%}   the model without the adapter")
    print(f"{'in Chinese, after':<24}{result['chinese_after']:>7.1%}   with the adapter, as peft loads it")
    print(
        f"\n{result['seconds']:.0f} seconds, {seconds_base:.0f} of them for the full model; in {out}: "
        "model/, adapter/ (they load in transformers and peft without this project), data/, demo.json\n"
        f"How it learned, on one page: open {model / 'report.html'}"
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; a failure is one clear message and a status."""
    parser = argparse.ArgumentParser(prog="trainer.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("output/demo"), metavar="OUT")
    parser.add_argument(
        "--family", choices=DEMO_BASES, default="xcomposer2", help="which model (default: xcomposer2)"
    )
    parser.add_argument("--epochs", type=float, default=3.5, help="passes of full fine-tuning (default: 3.5)")
    parser.add_argument("--num_images", type=int, help="use only this many pictures, for a quick try")
    parser.add_argument(
        "--high_resolution", action="store_true", help="a model with tiles, and pictures of different sizes"
    )
    arguments = parser.parse_args(argv)
    try:
        demo(**vars(arguments))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except subprocess.CalledProcessError:
        print("error: the command above failed; its error is printed there", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\ninterrupted; ./torchrun.sh demo starts over", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
