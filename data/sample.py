"""One record of a user's JSON file → a checked `Sample`.

    {"id": "pets-7", "image": ["img/7.jpg"],
     "conversations": [{"from": "human", "value": " <ImageHere>What is it? "},
                       {"from": "gpt", "value": "A cat."}]}
    → Sample(id="pets-7", turns=[("user", "<ImageHere>What is it?"), ("assistant", "A cat.")],
             images=["img/7.jpg"], image_first=False)

Roles are case-insensitive: human or user; assistant, bot or gpt; system. Every `<ImageHere>` stands for the
next image. A single image without a placeholder goes before the text (`image_first`), as the 2.5 models
expect.

The formats of other projects are read too:

    LLaVA, ShareGPT   `<image>` is a placeholder if that makes the counts match, and stays text if
                      `<ImageHere>` alone matches the images; `images` is `image`
    OpenAI            `messages` with `role` and `content`; content is a string or a list of parts,
                      {"type": "text", "text": …}, {"type": "image", "image": path} or
                      {"type": "image_url", "image_url": {"url": path}}; an image part without a path takes
                      the next of the record's `images`
    LLaMA-Factory     a text under `system` is a system turn before the others

A path may be written as a URL, `file:///data/my%20cat.jpg`; other URLs are rejected.

A mistake is a `DataError` that names the field; the caller adds the file and the record.
"""

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from data.errors import DataError

PLACEHOLDER = "<ImageHere>"
IMAGE_TAG = "<image>"
TAGS = (IMAGE_TAG, "<video>", "<audio>")
"""Placeholders for images, videos and audio in other projects' data; here they may be plain text."""
ROLES = {
    "human": "user",
    "user": "user",
    "assistant": "assistant",
    "bot": "assistant",
    "gpt": "assistant",
    "system": "system",
}
VIDEO_AND_AUDIO = {"video", "videos", "audio", "audios"}
KNOWN_KEYS = {"id", "image", "images", "conversations", "messages", "system", *VIDEO_AND_AUDIO}
TRAINED_KEYS = ("weight", "loss", "train", "loss_weight")
"""Keys of a turn that say in other projects whether it is trained on."""
FILE_URL = re.compile(r"file://(?:localhost)?(?=/)", re.IGNORECASE)
URL = re.compile(r"data:|[a-z][a-z0-9+]*://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation and the paths of its images, in the order of their placeholders."""

    id: str | None
    turns: list[tuple[str, str]]
    """(role, text): role is user, assistant or system; the text is stripped and may contain placeholders."""
    images: list[str]
    """Paths as in the file: relative to the JSON file's folder or to the image root."""
    image_first: bool
    unknown_keys: tuple[str, ...] = ()
    """Keys of the record that are not used, perhaps because they are misspelt."""

    @property
    def answer(self) -> str | None:
        """The last turn's text if it is the assistant's: what a model's answer is compared with."""
        role, text = self.turns[-1]
        return text if role == "assistant" else None

    @property
    def tags_as_text(self) -> list[str]:
        """Other projects' placeholders that stay text in this sample."""
        return [tag for tag in TAGS if any(tag in text for _, text in self.turns)]


def parse_sample(record: Any, needs_answer: bool = True) -> Sample:
    """Checks a parsed JSON value and returns it as a `Sample`; DataError if it cannot be used.

    needs_answer: reject a conversation without an assistant turn, from which nothing can be learnt.
    """
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object with 'conversations', not {_kind(record)}")
    unknown_keys = tuple(sorted(record.keys() - KNOWN_KEYS))
    for key in sorted(VIDEO_AND_AUDIO.intersection(record)):
        if record[key]:
            raise DataError(f"has {key!r}, but the model takes only text and images; drop the record")
    key, conversations = _only_one(record, "conversations", "messages")
    if not isinstance(conversations, list) or not conversations:
        found = (
            "has no" if conversations is None else f"needs a non-empty list, not {_kind(conversations)}, as"
        )
        raise DataError(f"{found} {key!r}; give [{{'from': 'user', 'value': …}}, …]")
    part_paths: list[str | None] = []
    turns = [_parse_turn(turn, number, part_paths) for number, turn in enumerate(conversations)]
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"has {_kind(system)} as 'system'; it must be a string")
    if system and system.strip():
        if any(role == "system" for role, _ in turns):
            raise DataError("has 'system' and a system turn; keep one of them")
        turns.insert(0, ("system", system.strip()))
    if needs_answer and all(role != "assistant" for role, _ in turns):
        raise DataError(
            "has no assistant turn, so there is nothing to learn from it; add one or drop the record"
        )
    images = _parse_images(record, part_paths)
    num_placeholders = sum(text.count(PLACEHOLDER) for _, text in turns)
    num_tags = sum(text.count(IMAGE_TAG) for _, text in turns)
    if num_placeholders != len(images) == num_placeholders + num_tags:
        turns = [(role, text.replace(IMAGE_TAG, PLACEHOLDER)) for role, text in turns]
        num_placeholders, num_tags = len(images), 0
    image_first = len(images) == 1 and num_placeholders + num_tags == 0
    if num_placeholders != len(images) and not image_first:
        tags = f" and {num_tags} {IMAGE_TAG}" if num_tags and images else ""
        raise DataError(
            f"has {num_placeholders} {PLACEHOLDER}{tags} but {len(images)} images; each image needs one"
        )
    record_id = record.get("id")
    return Sample(None if record_id is None else str(record_id), turns, images, image_first, unknown_keys)


def _only_one(record: dict[str, Any], usual: str, other: str) -> tuple[str, Any]:
    """Key and value of whichever of two keys the record has; DataError if their values differ."""
    first, second = record.get(usual), record.get(other)
    if first and second and first != second:
        raise DataError(f"has {usual!r} and {other!r}, and they differ; keep one of them")
    return (usual, first) if first or second is None else (other, second)


def _parse_turn(turn: Any, number: int, part_paths: list[str | None]) -> tuple[str, str]:
    """(role, text); an image part becomes a placeholder, and its path or None is appended to `part_paths`."""
    if isinstance(turn, dict) and "from" in turn and "value" in turn:
        role, text = turn["from"], turn["value"]
    elif isinstance(turn, dict) and "role" in turn and "content" in turn:
        role, text = turn["role"], turn["content"]
    else:
        raise DataError(
            f"turn {number} must be an object with 'from' and 'value', or with 'role' and 'content'"
        )
    if not isinstance(role, str) or role.lower() not in ROLES:
        found = f"{role!r:.60}" if isinstance(role, str) else _kind(role)
        raise DataError(f"turn {number} has the unknown role {found}; use one of {', '.join(ROLES)}")
    for key in TRAINED_KEYS if ROLES[role.lower()] == "assistant" else ():
        if turn.get(key) not in (None, True):  # 1 equals True
            raise DataError(
                f"turn {number} has {key!r}: {turn[key]!r:.60}, but every answer is trained on alike; "
                "drop the key to train on this one too, or drop the record"
            )
    if isinstance(text, list) and text:
        text = "".join(_parse_part(part, f"turn {number} has a part", part_paths) for part in text)
    if not isinstance(text, str):
        raise DataError(f"turn {number} has {_kind(text)} as its text; it must be a string")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise DataError(
            f"turn {number} has half of a surrogate pair (\\ud800–\\udfff), which is not a character"
        )
    return ROLES[role.lower()], text.strip()


def _parse_part(part: Any, subject: str, part_paths: list[str | None]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("image", "image_url"):
        path = part.get(kind)
        path = path.get("url") if isinstance(path, dict) else path
        if path is not None and not isinstance(path, str):
            raise DataError(f"{subject} with {_kind(path)} as {kind!r}; it must be a path")
        part_paths.append(path or None)
        return PLACEHOLDER
    found = f"of the type {kind!r:.60}" if isinstance(kind, str) else "without a type"
    raise DataError(
        f"{subject} {found}; give {{'type': 'text', 'text': …}} or {{'type': 'image', 'image': path}}, "
        "as the model takes only text and images"
    )


def _parse_images(record: dict[str, Any], part_paths: list[str | None]) -> list[str]:
    """The paths of the images, from 'image' or 'images', or from the image parts."""
    paths = {key: _parse_paths(key, record[key]) for key in ("image", "images") if key in record}
    _, images = _only_one(paths, "image", "images")
    images = images or []
    if named := [path for path in part_paths if path]:
        if len(named) < len(part_paths):
            raise DataError("has a path in some of its image parts and none in others; give all or none")
        if images and images != named:
            raise DataError("has images in its parts and others under 'images'; keep one of them")
        images = named
    images = [unquote(path[match.end() :]) if (match := FILE_URL.match(path)) else path for path in images]
    if urls := [path for path in images if URL.match(path)]:
        raise DataError(
            f"has the URL {urls[0]!r:.60} as an image; images are read from files: save it and give its path"
        )
    return images


def _parse_paths(key: str, value: Any) -> list[str]:
    """A string, a list of strings, or nothing (absent, null, "" or [])."""
    paths = [value] if isinstance(value, str) and value else value or []
    if not isinstance(paths, list):
        raise DataError(f"has {_kind(value)} as {key!r}: {key!r} must be a path or a list of paths")
    if wrong := [path for path in paths if not (isinstance(path, str) and path)]:
        raise DataError(f"has {_kind(wrong[0])} in {key!r}: {key!r} must be a path or a list of paths")
    return paths


def _kind(value: Any) -> str:
    """The kind of a JSON value, for messages."""
    if value in ({}, [], ""):
        return {dict: "an empty object", list: "an empty list", str: "an empty string"}[type(value)]
    if value != value:
        return "NaN, which is not JSON,"
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
