"""One record of a user's JSON file → a `Sample` whose every field is known to be usable.

    {"id": "pets-7", "image": ["img/7.jpg"],
     "conversations": [{"from": "human", "value": " <ImageHere>What is it? "},
                       {"from": "gpt", "value": "A cat."}]}
    → Sample(id="pets-7", turns=[("user", "<ImageHere>What is it?"), ("assistant", "A cat.")],
             images=["img/7.jpg"], image_first=False)

Roles are case-insensitive: human or user; assistant, bot or gpt; system. Every `<ImageHere>` takes the next
image. A single image without a placeholder goes before the text (`image_first`), the 2.5 models' convention.
What is wrong is a `DataError` that names the field; the caller says which file and which record.
"""

from dataclasses import dataclass
from typing import Any

from data.errors import DataError

PLACEHOLDER = "<ImageHere>"
ROLES = {
    "human": "user",
    "user": "user",
    "assistant": "assistant",
    "bot": "assistant",
    "gpt": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation and the paths of its images, in the order of their placeholders."""

    id: str | None
    turns: list[tuple[str, str]]
    """(role, text): role is user, assistant or system; the text is stripped and may hold placeholders."""
    images: list[str]
    """Paths as the file gives them: relative to the JSON file's folder or to the image root."""
    image_first: bool


def parse_sample(record: Any, needs_answer: bool = True) -> Sample:
    """Checks a parsed JSON value and returns it as a `Sample`; DataError says what is wrong with it.

    needs_answer: refuse a conversation without an assistant turn, which nothing can be learnt from.
    """
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object with 'conversations', not {_kind(record)}")
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        found = (
            "has no" if conversations is None else f"needs a non-empty list, not {_kind(conversations)}, as"
        )
        raise DataError(f"{found} 'conversations'; give [{{'from': 'user', 'value': …}}, …]")
    turns = [_parse_turn(turn, number) for number, turn in enumerate(conversations)]
    if needs_answer and all(role != "assistant" for role, _ in turns):
        raise DataError(
            "has no assistant turn, so there is nothing to learn from it; add one or drop the record"
        )
    images = _parse_images(record.get("image"))
    num_placeholders = sum(text.count(PLACEHOLDER) for _, text in turns)
    image_first = len(images) == 1 and num_placeholders == 0
    if num_placeholders != len(images) and not image_first:
        raise DataError(
            f"has {num_placeholders} {PLACEHOLDER} but {len(images)} images; each image needs one"
        )
    record_id = record.get("id")
    return Sample(None if record_id is None else str(record_id), turns, images, image_first)


def _parse_turn(turn: Any, number: int) -> tuple[str, str]:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise DataError(f"turn {number} must be an object with 'from' and 'value'")
    role, text = turn["from"], turn["value"]
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise DataError(f"turn {number} has the unknown role {role!r:.60}; use one of {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise DataError(f"turn {number} has {_kind(text)} as its 'value'; it must be a string")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise DataError(
            f"turn {number} holds half of a surrogate pair (\\ud800–\\udfff), which is no character"
        )
    return ROLES[role.lower()], text.strip()


def _parse_images(value: Any) -> list[str]:
    """The paths under 'image': a string, a list of strings, or nothing (absent, null, "" or [])."""
    images = [value] if isinstance(value, str) and value else value or []
    if not isinstance(images, list) or not all(isinstance(path, str) and path for path in images):
        raise DataError("'image' must be a path or a list of paths")
    return images


def _kind(value: Any) -> str:
    """A JSON value's kind in words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return f"an empty {type(value).__name__}" if value in ([], {}) else kinds.get(type(value), "a number")
