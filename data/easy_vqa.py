"""Writes the demo's data: easy-VQA, 5,000 pictures of one coloured shape, in this project's format.

    python -m data.easy_vqa OUT

    OUT/images/train/17.png, OUT/images/test/3.png      64 × 64 pixels
    OUT/data.txt          the base model's training data: a mixture of the next three files
    OUT/open.json         10,168 questions about a colour or a shape
    OUT/yesno.json        28,407 yes-or-no questions
    OUT/text.json         English → Chinese, without a picture
    OUT/test.json         9,673 questions about the 1,000 held-out pictures, and held-out translations
    OUT/eval.txt          300 of them, to look at during the training
    OUT/chinese.txt       an adapter's training data: the training questions and answers in Chinese
    OUT/chinese.json, OUT/chinese_test.json

Every conversation is one question, as in the test: several about one picture would reveal each other's
answers.

    {"id": "colour-1", "image": ["images/train/0.png"],
     "conversations": [{"from": "user", "value": "<ImageHere>what color is the shape?"},
                       {"from": "assistant", "value": "blue"}]}

The pictures come with the package easy-vqa (MIT licence, github.com/vzhou842/easy-VQA).
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data.errors import DataError
from data.sample import PLACEHOLDER

COLOURS = {
    "black": "黑色",
    "blue": "蓝色",
    "brown": "棕色",
    "gray": "灰色",
    "green": "绿色",
    "red": "红色",
    "teal": "青色",
    "yellow": "黄色",
}
SHAPES = {"circle": "圆形", "rectangle": "矩形", "triangle": "三角形"}
ANSWERS = {**COLOURS, **SHAPES, "yes": "是", "no": "否"}
QUESTIONS = {
    "what color is the {}?": "{}是什么颜色？",
    "what is the color of the {}?": "{}的颜色是什么？",
    "what shape is in the image?": "图中是什么形状？",
    "what shape does the image contain?": "图中有什么形状？",
    "what shape is present?": "这是什么形状？",
    "what is the {}?": "{}是什么形状？",
    "is there a {}?": "有{}吗？",
    "is there not a {}?": "没有{}吗？",
    "is there a {} in the image?": "图中有{}吗？",
    "is there not a {} in the image?": "图中没有{}吗？",
    "does the image contain a {}?": "图里包含{}吗？",
    "does the image not contain a {}?": "图里不包含{}吗？",
    "is a {} present?": "{}出现了吗？",
    "is no {} present?": "{}没有出现吗？",
}
"""All of easy-VQA's questions; the blank is a shape, "shape", or a colour and "shape"."""

DATA_TXT = "# <json path> <thousands of samples an epoch>\nopen.json 12.4\nyesno.json 8.2\ntext.json 0.4\n"
EVAL_TXT = "test.json 0.3\n"
CHINESE_TXT = "chinese.json 12\n"
SIDES = (48, 64, 96)
TRANSLATE = "translate to Chinese: "
EASY_VQA_FILES = ("open.json", "yesno.json", "text.json")
EACH_HELD_OUT = 10
"""One translation in this many is used for the test."""


def in_chinese(question: str) -> str:
    """A question of easy-VQA in Chinese: "what color is the circle?" → "圆形是什么颜色？"."""
    for english, chinese in QUESTIONS.items():
        # "is there a {}?" also fits "is there a circle in the image?", with more than a noun in the blank.
        match = re.fullmatch(re.escape(english).replace(r"\{\}", "(.*)"), question)
        if match is None:
            continue
        *colour, noun = match[1].split() if match.groups() else ["shape"]
        if (noun == "shape" or noun in SHAPES) and (
            not colour or (len(colour) == 1 and colour[0] in COLOURS)
        ):
            prefix = "".join(COLOURS[word] for word in colour)
            return chinese.format(prefix + SHAPES.get(noun, "图形"))
    raise DataError(f"easy-VQA has a question without a translation: {question!r}")


def kind_of(answer: str) -> str:
    """The kind of a question's answer: colour, shape or yesno."""
    return "colour" if answer in COLOURS else "shape" if answer in SHAPES else "yesno"


def write_demo_data(folder: Path, num_images: int | None = None, unequal: bool = False) -> None:
    """Write all files to `folder`, overwriting those that exist.

    DataError if easy-vqa is not installed or has unexpected contents.

    Args:
        num_images: at most so many pictures each for training and test; None means all.
        unequal: stretch the pictures to sides of 48, 64 or 96 pixels, for a high-resolution model.
    """
    easy_vqa = _easy_vqa()
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[dict[str, Any]]] = {}
    chinese_splits: dict[str, list[dict[str, Any]]] = {}
    for split in ("train", "test"):
        paths: dict[int, str] = getattr(easy_vqa, f"get_{split}_image_paths")()
        kept = dict.fromkeys(sorted(paths)[:num_images])
        images = folder / "images" / split
        images.mkdir(parents=True, exist_ok=True)
        for number in kept:
            if unequal:
                size = SIDES[number % 3], SIDES[number // 3 % 3]
                Image.open(paths[number]).resize(size).save(images / f"{number}.png")
            else:
                shutil.copyfile(paths[number], images / f"{number}.png")
        records, translated = [], []
        questions = zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True)
        for number, (question, answer, image) in enumerate(questions):
            if image in kept:
                picture, name = f"images/{split}/{image}.png", f"{kind_of(answer)}-{number}"
                records.append(_record(name, question, answer, picture))
                translated.append(_record(name, in_chinese(question), ANSWERS[answer], picture))
        splits[split], chinese_splits[split] = records, translated

    asked = {record["conversations"][0]["value"].removeprefix(PLACEHOLDER) for record in splits["train"]}
    pairs = [*ANSWERS.items(), *((question, in_chinese(question)) for question in sorted(asked))]
    text = [_record(f"text-{i}", TRANSLATE + pair[0], pair[1]) for i, pair in enumerate(pairs)]
    held_out = text[len(ANSWERS) :: EACH_HELD_OUT]  # only questions, as each single word must be learnt
    train = splits["train"]
    _write(folder / "open.json", [record for record in train if not record["id"].startswith("yesno")])
    _write(folder / "yesno.json", [record for record in train if record["id"].startswith("yesno")])
    _write(folder / "text.json", [record for record in text if record not in held_out])
    _write(folder / "test.json", splits["test"] + held_out)
    _write(folder / "chinese.json", chinese_splits["train"])
    _write(folder / "chinese_test.json", chinese_splits["test"])
    (folder / "data.txt").write_text(DATA_TXT, encoding="utf-8")
    (folder / "eval.txt").write_text(EVAL_TXT, encoding="utf-8")
    (folder / "chinese.txt").write_text(CHINESE_TXT, encoding="utf-8")


def _easy_vqa() -> Any:
    try:
        import easy_vqa

        easy_vqa.get_test_questions()
        return easy_vqa
    except (ImportError, AttributeError, OSError) as error:
        raise DataError(
            "the demo's pictures come with the package easy-vqa, which is missing or incomplete "
            f"({error}); install it with: pip install -e '.[demo]'"
        ) from error


def _record(name: str, question: str, answer: str, image: str | None = None) -> dict[str, Any]:
    conversation = [
        {"from": "user", "value": (PLACEHOLDER if image else "") + question},
        {"from": "assistant", "value": answer},
    ]
    return {"id": name, **({"image": [image]} if image else {}), "conversations": conversation}


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a JSON array, one record per line."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; 0, or 2 where easy-vqa is missing."""
    parser = argparse.ArgumentParser(prog="data.easy_vqa", description="Write the demo's data from easy-VQA.")
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder to write to")
    folder = parser.parse_args(argv).folder
    try:
        write_demo_data(folder)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote easy-VQA to {folder}: data.txt, test.json, chinese.txt, chinese_test.json and their files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
