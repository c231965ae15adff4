"""A sample → token ids, labels and image slots.

    user "<ImageHere>What?", assistant "A cat.", an image of 2 tokens
    text    <s> [146] user \\n  ▢   ▢  What ? [145] \\n [146] assistant \\n  A  cat . [145] </s>
    ids      1  92543 …   364 pad pad  …   … 92542 364 92543  …  …   364  …   …  … 92542   2
    labels  -100  (all to here)                                        -100  A  cat . 92542   2

The conversation format belongs to the model and is passed in (`Conversation`): it gives the stretches of ids
and says which are trained. What is trained follows from the roles, never from looking for control tokens in a
text.

A sample longer than max_length loses its tail; an image is kept whole or left out with all that follows it.
(`data.loader.SampleReader` may lower the size of its images first, or refuse it.)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data.sample import Sample

IGNORED = -100


class Part(Protocol):
    """A stretch of a conversation."""

    @property
    def ids(self) -> list[int] | None:
        """None for an image."""
        ...

    @property
    def role(self) -> str:
        """user, assistant or system for a turn's text; control for what the format puts between texts."""
        ...

    @property
    def trained(self) -> bool: ...


class Conversation(Protocol):
    """What the data path needs of a model's conversation format."""

    tokenizer: Any
    pad_id: int
    fingerprint: str
    """Differs where the ids or the labels may."""

    def pieces(
        self, turns: Sequence[tuple[str, str]], *, image_first: bool = False, prompt: bool = False
    ) -> Iterator[Part]:
        """The stretches of a conversation of (role, text) turns; `prompt`: up to where an answer begins."""
        ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample of T tokens, at most max_length. The first label is always ignored."""

    input_ids: np.ndarray
    """int64 [T]; the pad id at image slots."""
    labels: np.ndarray
    """int64 [T], not shifted: the id where it is trained, else -100."""
    im_mask: np.ndarray
    """bool [T]: the image slots."""
    image_tokens: list[int]
    """Slots of each image that is in; images behind the cut are not."""
    is_cut: bool = False
    """max_length took something off."""
    hd_num: int | None = None
    """The most tiles of an image, where that was lowered to make the sample fit."""

    @property
    def num_image_slots(self) -> int:
        return sum(self.image_tokens)

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORED).sum())


class SampleEncoder:
    """Turns samples into token ids, in one conversation format. Pickles to worker processes."""

    def __init__(self, conversation: Conversation, max_length: int):
        self.conversation, self.max_length = conversation, max_length
        self.tokenizer, self.pad_id = conversation.tokenizer, conversation.pad_id

    def encode(self, sample: Sample, num_image_tokens: Callable[[int], int]) -> Encoded:
        """Args: num_image_tokens: the slots of the sample's i-th image, asked for only as far as needed."""
        return self.join(self.parts(sample), num_image_tokens)

    def parts(self, sample: Sample) -> list[Part]:
        """Every stretch of text and every image in order, however long they are together."""
        return [*self.conversation.pieces(sample.turns, image_first=sample.image_first)]

    def prompt_parts(self, sample: Sample) -> list[Part]:
        """What an answer is generated after: the turns before the last answer, and an assistant's header."""
        turns = sample.turns[:-1] if sample.turns[-1][0] == "assistant" else sample.turns
        return [*self.conversation.pieces(turns, image_first=sample.image_first, prompt=True)]

    def join(self, parts: Iterable[Part], num_image_tokens: Callable[[int], int]) -> Encoded:
        """`encode` of what `parts` gave: once tokenised, a sample can be tried with smaller images."""
        ids: list[int] = []
        supervised: list[tuple[int, int]] = []
        slots: list[tuple[int, int]] = []
        is_cut = False
        for part in parts:
            begin, room = len(ids), self.max_length - len(ids)
            if part.ids is not None:
                size = len(part.ids)
                ids += part.ids[:room]
                if part.trained:
                    supervised.append((begin, len(ids)))
            elif (size := num_image_tokens(len(slots)) if room else 1) <= room:
                ids += [self.pad_id] * size
                slots.append((begin, len(ids)))
            if size > room:
                is_cut = True
                break
        input_ids = np.array(ids, dtype=np.int64)
        labels, im_mask = np.full(len(ids), IGNORED, dtype=np.int64), np.zeros(len(ids), dtype=bool)
        for begin, end in supervised:
            labels[begin:end] = input_ids[begin:end]
        for begin, end in slots:
            im_mask[begin:end] = True
        return Encoded(input_ids, labels, im_mask, [end - begin for begin, end in slots], is_cut)
