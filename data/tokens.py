"""A sample → token ids, labels and image slots.

    user "<ImageHere>What?", assistant "A cat.", an image of 2 tokens
    text    <s> [146] user \\n  ▢   ▢  What ? [145] \\n [146] assistant \\n  A  cat . [145] </s>
    ids      1  92543 …   364 pad pad  …   … 92542 364 92543  …  …   364  …   …  … 92542   2
    labels  -100  (all to here)                                        -100  A  cat . 92542   2

What is trained comes from the roles, never from looking for control tokens: the answers' tokens, the [145]
behind each, and the final </s> if the last turn is an answer. Control tokens are put in as ids and a user's
text is tokenised with them switched off, so that a literal "[UNUSED_TOKEN_145]" or "</s>" in it stays text.
Every stretch of text between control tokens and images is tokenised by itself; <s> precedes the first one.
There is no "\\n" before the final </s>: the original's tokenizer strips it there.

A sample longer than max_length loses its tail; an image is kept whole or left out with all that follows it.
(`data.loader.SampleReader` may lower the size of its images first, or refuse it.)
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.errors import DataError
from data.sample import PLACEHOLDER, Sample

IGNORED = -100
TURN_START, TURN_END = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"
ROLE_NAMES = ("user", "assistant", "system")


Part = tuple[list[int] | None, bool]
"""(ids, is it trained) of a stretch of text; None for the ids of an image."""


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
    """Turns samples into token ids with one tokenizer. Pickles to worker processes.

    Attributes: `tokenizer`, `max_length`, `pad_id`; `fingerprint`, which differs where the ids may.
    """

    def __init__(self, tokenizer: Any, max_length: int):
        """DataError if the tokenizer lacks a control token or reads one out of plain text."""
        self.tokenizer, self.max_length = tokenizer, max_length
        self._bos = self._require(tokenizer.bos_token, "bos_token")
        self._eos = self._require(tokenizer.eos_token, "eos_token")
        self._start, self._end = self._require(TURN_START, TURN_START), self._require(TURN_END, TURN_END)
        self.pad_id: int = self._eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.fingerprint = f"{max_length}-{_digest(tokenizer)}"
        newline, *headers = self._tokenize(["\n", *(f"{role}\n" for role in ROLE_NAMES)])
        self._newline = newline
        self._headers: dict[str, list[int]] = dict(zip(ROLE_NAMES, headers, strict=True))
        literals = [TURN_START, TURN_END, *tokenizer.all_special_tokens]
        control_ids = set(tokenizer.convert_tokens_to_ids(literals)) - {tokenizer.unk_token_id}
        for literal, ids in zip(literals, self._tokenize(literals), strict=True):
            if control_ids & set(ids):
                raise DataError(
                    f"the tokenizer reads the text {literal!r} as a control token even with"
                    " split_special_tokens=True, so a user's text could end a turn; mark the token as special"
                )

    def encode(self, sample: Sample, num_image_tokens: Callable[[int], int]) -> Encoded:
        """Args: num_image_tokens: the slots of the sample's i-th image, asked for only as far as needed."""
        return self.join(self.parts(sample), num_image_tokens)

    def prompt_parts(self, sample: Sample) -> list[Part]:
        """What an answer is generated after: the turns before the last answer, and an assistant's header."""
        turns = sample.turns[:-1] if sample.turns[-1][0] == "assistant" else sample.turns
        parts = list(self.parts(replace(sample, turns=turns)))
        parts[-1] = [*self._newline, self._start, *self._headers["assistant"]], False  # in place of </s>
        return parts

    def join(self, parts: Iterable[Part], num_image_tokens: Callable[[int], int]) -> Encoded:
        """`encode` of what `parts` gave: once tokenised, a sample can be tried with smaller images."""
        ids: list[int] = []
        supervised: list[tuple[int, int]] = []
        slots: list[tuple[int, int]] = []
        is_cut = False
        for part, trained in parts:  # none is left out unseen: the last one, </s>, has an id
            begin, room = len(ids), self.max_length - len(ids)
            num_slots = num_image_tokens(len(slots)) if part is None and room else 0
            if room == 0 or num_slots > room:
                is_cut = True
                break
            if part is None:
                ids += [self.pad_id] * num_slots
                slots.append((begin, len(ids)))
            else:
                ids += part[:room]
                if trained:
                    supervised.append((begin, len(ids)))
        input_ids = np.array(ids, dtype=np.int64)
        labels, im_mask = np.full(len(ids), IGNORED, dtype=np.int64), np.zeros(len(ids), dtype=bool)
        for begin, end in supervised:
            labels[begin:end] = input_ids[begin:end]
        for begin, end in slots:
            im_mask[begin:end] = True
        return Encoded(input_ids, labels, im_mask, [end - begin for begin, end in slots], is_cut)

    def parts(self, sample: Sample) -> Iterator[Part]:
        """Every stretch of text and every image in order, however long they are together."""
        pieces = [text.split(PLACEHOLDER) for _, text in sample.turns]
        tokenized = iter(self._tokenize([piece for turn in pieces for piece in turn]))
        if sample.image_first:
            yield None, False
        yield [self._bos], False
        for number, (role, _) in enumerate(sample.turns):
            trained = role == "assistant"
            yield [*(self._newline if number else []), self._start, *self._headers[role]], False
            for index in range(len(pieces[number])):
                if index:
                    yield None, False
                yield next(tokenized), trained
            yield [self._end], trained
        yield [self._eos], sample.turns[-1][0] == "assistant"

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, as plain text."""
        return self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )["input_ids"]

    def _require(self, token: str | None, what: str) -> int:
        token_id = None if token is None else self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or (
            token_id == self.tokenizer.unk_token_id and token != self.tokenizer.unk_token
        ):
            raise DataError(f"the tokenizer has no {what}; it is not one of an InternLM-XComposer2 model")
        return token_id


def _digest(tokenizer: Any) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]
