"""A sample → token ids, labels and image slots.

    user "<ImageHere>What?", assistant "A cat.", an image of 2 tokens
    text    <s> [146] user \\n  ▢   ▢  What ? [145] \\n [146] assistant \\n  A  cat . [145] </s>
    ids      1  92543 …   364 pad pad  …   … 92542 364 92543  …  …   364  …   …  … 92542   2
    labels  -100  (all to here)                                        -100  A  cat . 92542   2

The conversation format belongs to the model and is passed in (`Conversation`): it splits a conversation into
pieces of token ids and marks the trained ones. The roles decide what is trained; no text is searched for
control tokens.

A sample longer than max_length loses its tail; an image is kept whole or dropped with everything after it.
(`data.loader.SampleReader` may shrink the images first, or reject the sample.)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data.sample import Sample

IGNORED = -100
SLOT = -1
"""In the ids that stand for an image: the place of one of its features."""


class Piece(Protocol):
    """A run of token ids in a conversation, or an image."""

    @property
    def ids(self) -> list[int] | None:
        """None for an image."""
        ...

    @property
    def role(self) -> str:
        """user, assistant or system for a turn's text; control for what the format inserts between texts."""
        ...

    @property
    def trained(self) -> bool: ...


class Conversation(Protocol):
    """The interface of a model's conversation format."""

    tokenizer: Any
    pad_id: int
    slot_id: int
    """The id at image slots."""
    format: str
    """Changes whenever the pieces of a conversation may change."""
    fingerprint: str
    """Changes whenever the ids or labels of a conversation may change: `format`, and the tokenizer."""

    def pieces(
        self, turns: Sequence[tuple[str, str]], *, image_first: bool = False, prompt: bool = False
    ) -> Iterator[Piece]:
        """The pieces of a conversation of (role, text) turns; `prompt`: up to the start of an answer."""
        ...

    def answer_in(self, generated: Sequence[int]) -> str:
        """The answer in the ids that a model wrote behind a prompt."""
        ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample of T tokens, at most max_length. The first label is always ignored."""

    input_ids: np.ndarray
    """int64 [T]; the conversation's slot_id at image slots."""
    labels: np.ndarray
    """int64 [T], not shifted: the id of a trained token, else -100."""
    im_mask: np.ndarray
    """bool [T]: True at image slots."""
    image_tokens: list[int]
    """Tokens of each image before the cut at max_length: its slots, and what the model puts around them."""
    is_cut: bool = False
    """Whether max_length cut something off."""
    image_limit: str | None = None
    """The limit of its images' size that was lowered to make the sample fit, as in "hd_num=4", else None."""
    position_ids: np.ndarray | None = None
    """int64 [k, T] where the model gives a token k positions; None: 0, 1, 2, …"""

    @property
    def num_image_slots(self) -> int:
        return int(self.im_mask.sum())

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORED).sum())


class SampleEncoder:
    """Turns samples into token ids, in one conversation format. Pickles to worker processes."""

    def __init__(self, conversation: Conversation, max_length: int):
        self.conversation, self.max_length = conversation, max_length
        self.tokenizer, self.pad_id = conversation.tokenizer, conversation.pad_id

    def encode(self, sample: Sample, image_tokens: Callable[[int], np.ndarray]) -> Encoded:
        """The sample cut at max_length.

        Args: image_tokens: the ids of the sample's i-th image, SLOT where a feature goes; not called for
            images after the cut.
        """
        return self.join(self.pieces(sample), image_tokens)

    def pieces(self, sample: Sample) -> list[Piece]:
        """All text and images of a sample in order, not cut."""
        return [*self.conversation.pieces(sample.turns, image_first=sample.image_first)]

    def prompt_pieces(self, sample: Sample) -> list[Piece]:
        """The prompt for generating the last answer: the turns before it, and an assistant's header."""
        turns = sample.turns if sample.answer is None else sample.turns[:-1]
        return [*self.conversation.pieces(turns, image_first=sample.image_first, prompt=True)]

    def join(self, pieces: Iterable[Piece], image_tokens: Callable[[int], np.ndarray]) -> Encoded:
        """`encode` for pieces that are already tokenised, so that smaller images can be tried cheaply."""
        ids: list[int] = []
        supervised: list[tuple[int, int]] = []
        sizes: list[int] = []
        is_cut = has_answer = False
        for piece in pieces:
            begin, room = len(ids), self.max_length - len(ids)
            if piece.ids is not None:
                size = len(piece.ids)
                ids += piece.ids[:room]
                if piece.trained:
                    supervised.append((begin, len(ids)))
                    has_answer |= piece.role == "assistant" and room > 0
            elif not room:
                size = 1
            elif (size := len(image := image_tokens(len(sizes)))) <= room:
                ids += image.tolist()
                sizes.append(size)
            if size > room:
                is_cut = True
                break
        input_ids = np.array(ids, dtype=np.int64)
        im_mask = input_ids == SLOT
        input_ids[im_mask] = self.conversation.slot_id
        labels = np.full(len(ids), IGNORED, dtype=np.int64)
        # What stands before and behind answers is not trained alone.
        for begin, end in supervised if has_answer or not is_cut else ():
            labels[begin:end] = input_ids[begin:end]
        labels[:1] = IGNORED  # no token comes before it
        return Encoded(input_ids, labels, im_mask, sizes, is_cut)
