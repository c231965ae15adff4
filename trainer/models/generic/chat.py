r"""The conversation format of any tokenizer with a chat template: turns → pieces of token ids.

Input: (role, text) turns, with `<ImageHere>` where a picture goes. Output: pieces in order, a picture or
token ids. With the template of Qwen2-VL:

    conversation = TemplateConversation(tokenizer, image_token="<|image_pad|>")
    [*conversation.pieces([("user", "<ImageHere>What?"), ("assistant", "A cat.")])]
    # <|im_start|>system\n…<|im_end|>\n<|im_start|>user\n<|vision_start|> | picture | <|vision_end|> |
    # What? | <|im_end|>\n<|im_start|>assistant\n | A cat. | <|im_end|> | \n
    #                                               trained   trained

The template is rendered once, with a mark in place of each text, so that it cannot look into the texts; the
white space around a text stays outside its mark, so that a template which trims does so as always. The texts
then replace the marks, and the whole is tokenised in one go, as `apply_chat_template(tokenize=True)` does:
the ids are the same, merges across the border of template and text included.

Two things differ on purpose. A control token that a text spells out ("<|im_end|>") stays text: the string is
cut inside the token and both sides are tokenised separately, so that no text ends a turn or adds a picture.
And an answer keeps its own <think> block, in place of an empty one that the template would put before it.

Trained are all tokens that overlap an assistant's text, the token behind it that ends generation, with white
space in between if the template has any, and the `opening`: what stands between the prompt for an answer and
its text, which a model has to write itself. In Qwen3 that is "<think>\n\n</think>\n\n", mostly nothing.
Whatever else the template adds is not trained.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from trainer.models.xcomposer2.conversation_xcomposer2 import IMAGE, Piece

ROLES = ("control", "system", "user", "assistant")
"""A token that overlaps two of them belongs to the later one."""
CONTROL, ASSISTANT = 0, 3
THINKING = ("<think>", "</think>")
"""Tokens that models write themselves: they remain tokens in texts."""
EMPTY_THINKING = re.compile(r"<think>\s*</think>\s*\Z")
EMPTY_THINKING_FIRST = re.compile(r"\A<think>\s*</think>\s*")
MARK = re.compile("\ue000(\\d+)\ue001")

PROBES = (
    [("user", "b"), ("assistant", "c")],
    [("user", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e")],
    [("system", "a"), ("user", "b"), ("assistant", "c")],
    [("user", f"{IMAGE}b{IMAGE}"), ("assistant", "c")],
)
"""Conversations whose pieces differ between two formats."""


class TemplateConversation:
    """A tokenizer with its chat template; can be pickled to worker processes."""

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        image_token: str | None = None,
        generation_eos: Collection[int] = (),
        final_end: str | None = None,
    ) -> None:
        """ValueError if there is no template, or if it cannot render a question and an answer.

        Args:
            chat_template: a template's text, instead of the tokenizer's own.
            image_token: what the template puts for a picture; None: the model takes no pictures.
            generation_eos: ids that end generation, in addition to the tokenizer's end-of-text token.
            final_end: the token that ends generation, for a template that leaves the last answer open.
        """
        if not (chat_template or tokenizer.chat_template):
            raise ValueError("the tokenizer has no chat template; give one with --chat_template FILE")
        if not tokenizer.is_fast:
            raise ValueError("the tokenizer does not tell a token's characters; it needs a tokenizer.json")
        self.tokenizer, self.final_end = tokenizer, final_end
        self.chat_template = tokenizer.get_chat_template(chat_template)
        eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.pad_id: int = eos_id if pad_id is None else pad_id
        if self.pad_id is None:
            raise ValueError("the tokenizer has neither a padding nor an end-of-text token")
        added = tokenizer.added_tokens_decoder
        ids = {token.content: token_id for token_id, token in added.items()}
        for token in (image_token, final_end):
            if token is not None and token not in ids:
                raise ValueError(f"the tokenizer has no token {token!r}")
        self.image_token, self._image_id = image_token, ids.get(image_token)
        self.slot_id: int = self.pad_id if self._image_id is None else self._image_id
        """The caller sets another, where a picture's slots are other tokens than the template's."""
        self._ends = {*generation_eos, eos_id, ids.get(final_end)} - {None}
        control = {i for i, token in added.items() if token.special or i in {*self._ends, self._image_id}}
        self._control = {i: added[i].content for i in control if added[i].content not in THINKING}
        self._in_parts: set[tuple[str, bool]] = set()
        """(role, has pictures) of the texts that the template takes as a list of parts, not as a string."""
        self.opening = ""
        """What a model writes before the text of an answer."""
        self._choose_forms()
        list(self.pieces(PROBES[0]))  # raises what is wrong with the template
        self.opening = self._find_opening()
        probes = [self._probe(probe) for probe in PROBES]
        probes += [self._probe(probe[:-1], prompt=True) for probe in PROBES]
        pieces = [piece for probe in probes for piece in probe or () if piece.role == "control"]
        used = {i for piece in pieces for i in piece.ids or ()}
        # Tokens of the template need not be marked as special. White space may be a token too, as in Gemma.
        contents = {i: added[i].content for i in used & added.keys()}
        self._control |= {i: text for i, text in contents.items() if text.strip() and text not in THINKING}
        format_text = repr((probes, self.chat_template, sorted(self._control), sorted(self._ends)))
        self.format = hashlib.sha256(format_text.encode()).hexdigest()[:16]
        tokenizer_hash = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]
        self.fingerprint = f"{self.format}-{tokenizer_hash}"

    def pieces(
        self, turns: Sequence[tuple[str, str]], *, image_first: bool = False, prompt: bool = False
    ) -> Iterator[Piece]:
        """The pieces of a conversation, or of the prompt for an answer to it (`prompt`).

        image_first: a picture without a placeholder comes at the start of the first user's text.
        """
        if image_first:
            first = next((n for n, (role, _) in enumerate(turns) if role == "user"), 0)
            turns = [(role, IMAGE * (n == first) + text) for n, (role, text) in enumerate(turns)]
        text, owners, answers = self._fill(turns, prompt)
        ids, starts, stops, roles = self._tokenize(text, owners)
        trained = roles == ASSISTANT
        is_end = np.isin(ids, [*self._ends])
        empty_answers = [begin for begin, end in answers if begin == end]
        behind = [*np.flatnonzero(trained[:-1] & ~trained[1:]) + 1, *np.searchsorted(starts, empty_answers)]
        for begin, _ in answers if self.opening else ():
            before = text[:begin].rstrip()  # white space of the answer itself may stand there
            if before.endswith(self.opening.rstrip()):
                first = np.searchsorted(stops, len(before) - len(self.opening.rstrip()), side="right")
                last = np.searchsorted(starts, begin)
                trained[first:last] |= roles[first:last] == CONTROL
        for begin in behind:
            for end in range(begin, len(ids)):
                if is_end[end]:
                    trained[begin : end + 1] = True
                if is_end[end] or text[starts[end] : stops[end]].strip():
                    break

        is_picture = ids == self._image_id  # no text gives one
        pictures = [role for role, text in turns for _ in range(text.count(IMAGE))]
        if (found := int(is_picture.sum())) != len(pictures):
            where = " and ".join(_name(turns, n) for n, (_, text) in enumerate(turns) if IMAGE in text)
            expected = f"{len(pictures)} pictures in {where or 'all turns'}"
            raise ValueError(f"the chat template puts {found} image tokens for {expected}")
        in_order = iter(pictures)
        changes = is_picture[1:] | is_picture[:-1] | (roles[1:] != roles[:-1]) | (trained[1:] != trained[:-1])
        for begin, end in pairwise([0, *np.flatnonzero(changes) + 1, len(ids)] if len(ids) else ()):
            if is_picture[begin]:
                yield Piece(None, next(in_order), False)
            else:
                yield Piece(ids[begin:end].tolist(), ROLES[roles[begin]], bool(trained[begin]))

    def answer_in(self, generated: Sequence[int]) -> str:
        """The answer in the ids that a model wrote: without the opening or an empty think block, special
        tokens, and white space around."""
        opening = self.tokenizer.encode(self.opening.rstrip(), add_special_tokens=False)
        if list(generated[: len(opening)]) == opening:
            generated = generated[len(opening) :]
        text = self.tokenizer.decode(generated, skip_special_tokens=True).strip()
        return EMPTY_THINKING_FIRST.sub("", text).strip()

    def _find_opening(self) -> str:
        """What the template puts between the prompt for an answer and its text; "" for white space alone, and
        for a template that renders no question without its answer."""
        try:
            prompt, _ = self._render(PROBES[0][:-1], prompt=True)
        except ValueError:
            return ""
        frame, _ = self._render(PROBES[0], prompt=False)
        before = frame[: [*MARK.finditer(frame)][-1].start()]
        opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
        return opening if opening.strip() else ""

    def _fill(
        self, turns: Sequence[tuple[str, str]], prompt: bool
    ) -> tuple[str, bytearray, list[tuple[int, int]]]:
        """The rendered conversation, the index in ROLES of each character, and where answers begin and end.

        ValueError if the template refuses the conversation or does not give back each text once, in order.
        """
        frame, texts = self._render(turns, prompt)
        if not all(core for _, core in texts):  # a template may leave out the header of an empty text
            unmarked, _ = self._render(turns, prompt, mark_empty=False)
            if MARK.sub(lambda mark: mark[0] * bool(texts[int(mark[1])][1]), frame) != unmarked:
                frame = unmarked
        literals, marks = MARK.split(frame)[::2], [int(number) for number in MARK.findall(frame)]
        for number, (turn, core) in enumerate(texts):
            if (count := marks.count(number)) != 1 and (core or count):
                raise ValueError(f"the chat template {'repeats' if count else 'loses'} {_name(turns, turn)}")
        for before, after in pairwise(marks):
            if before > after:
                moved = _name(turns, texts[after][0])
                raise ValueError(f"the chat template moves {moved} behind a later text")
        if self.final_end and not prompt and turns[-1][0] == "assistant" and not literals[-1].strip():
            literals[-1] = self.final_end

        text, owners, answers = "", bytearray(), []
        for literal, number in zip(literals, [*marks, None], strict=True):
            turn, core = (0, "") if number is None else texts[number]
            role = CONTROL if number is None else ROLES.index(turns[turn][0])
            if role == ASSISTANT and core.startswith(THINKING[0]):
                literal = EMPTY_THINKING.sub("", literal)
            text += literal + core
            owners += bytes([CONTROL]) * len(literal) + bytes([role]) * len(core)
            if role == ASSISTANT:
                answers.append((len(text) - len(core), len(text)))
        return text, owners, answers

    def _render(
        self, turns: Sequence[tuple[str, str]], prompt: bool, mark_empty: bool = True
    ) -> tuple[str, list[tuple[int, str]]]:
        """The conversation with marks in place of texts, and the turn and the text of each mark."""
        texts: list[tuple[int, str]] = []
        messages = []
        for number, (role, text) in enumerate(turns):
            segments = text.split(IMAGE)
            if len(segments) > 1 and self.image_token is None:
                raise ValueError(f"{_name(turns, number)} has a picture, but the model takes only text")
            for i, segment in enumerate(segments):
                if (core := segment.strip()) or len(segments) == 1:
                    begin = len(segment) - len(segment.lstrip())
                    mark = f"\ue000{len(texts)}\ue001" if core or mark_empty else ""
                    segments[i] = segment[:begin] + mark + segment[begin + len(core) :]
                    texts.append((number, core))
            content: Any = (self.image_token or "").join(segments)
            if (role, len(segments) > 1) in self._in_parts:
                content = []
                for i, segment in enumerate(segments):
                    if i:
                        content.append({"type": "image"})
                    if segment or len(segments) == 1:
                        content.append({"type": "text", "text": segment})
            messages.append({"role": role, "content": content})
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template is code, and may raise anything
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return rendered, texts

    def _choose_forms(self) -> None:
        """Find by role whether the template takes a string or a list of parts, and renders it faithfully.

        A string is preferred for text alone, a list for text with pictures.
        """
        talk = [("user", "b"), ("assistant", "c")]
        for in_parts in (set(), {"user", "assistant"}, {"user"}, {"assistant"}, set()):
            self._in_parts = {(role, False) for role in in_parts}
            if self._probe(talk):
                break
        for role, pictured in [("system", False), *((r, True) for r in ROLES[1:] if self.image_token)]:
            turns = [("system", "a"), *talk] if role == "system" else talk
            turns = [(r, IMAGE * (pictured and r == role) + text) for r, text in turns]
            as_string = self._probe(turns) is not None
            self._in_parts.add((role, pictured))
            as_parts = self._probe(turns) is not None
            if (as_string and not as_parts) or (as_string == as_parts and not pictured):
                self._in_parts.remove((role, pictured))

    def _probe(self, turns: Sequence[tuple[str, str]], prompt: bool = False) -> list[Piece] | None:
        """The pieces, or None if the template does not give back all texts and pictures.

        A list that the template prints literally counts as lost: Python escapes the characters of marks.
        """
        try:
            return [*self.pieces(turns, prompt=prompt)]
        except ValueError:
            return None

    def _tokenize(self, text: str, owners: bytearray) -> tuple[np.ndarray, ...]:
        """Ids, first characters, ends and roles of the tokens; no turn's text gives a control token.

        The text is cut inside each control token that overlaps a turn's text, until there is none.
        """
        cuts = [0, len(text)]
        # Characters of each role before a place in the text.
        ends_before = np.zeros((len(ROLES), len(text) + 1), dtype=np.int64)
        for role in range(len(ROLES)):
            np.cumsum(np.frombuffer(owners, dtype=np.uint8) == role, out=ends_before[role, 1:])
        while True:
            parts = [self._tokenize_part(text, begin, stop) for begin, stop in pairwise(cuts)]
            ids, starts, stops = np.concatenate(parts, axis=1)
            # Some byte-level tokenizers trim the space off a token, so that one of a space has no characters.
            starts = np.minimum(starts, np.maximum(stops - 1, 0))
            roles = np.zeros(len(ids), dtype=np.int64)
            for role in range(CONTROL + 1, len(ROLES)):
                roles[ends_before[role, stops] > ends_before[role, starts]] = role
            forged = np.isin(ids, [*self._control]) & (roles != CONTROL)
            inside = []
            for token_id, start, stop in zip(ids[forged], starts[forged], stops[forged], strict=True):
                spelling = self._control[int(token_id)]
                place = text.find(spelling, start, stop)
                if place < 0 and token_id == self.tokenizer.unk_token_id:
                    continue  # a character that the tokenizer does not know
                inside.append(max(place, int(start)) + 1)
                if inside[-1] >= stop:
                    raise ValueError(
                        f"a text holds {spelling!r}, which the tokenizer reads as a control token"
                    )
            if not inside:
                return ids, starts, stops, roles
            cuts = sorted([*cuts, *inside])

    def _tokenize_part(self, text: str, begin: int, stop: int, lead: str = "\n") -> np.ndarray:
        """int64 [3, n]: id, start and stop of the tokens of text[begin:stop].

        A tokenizer may put a space before the start of a text. A part that lies within the text is therefore
        tokenised behind a newline, whose tokens are then dropped.
        """
        lead = lead if begin else ""
        encoding = self.tokenizer(
            lead + text[begin:stop],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
        )
        ids = np.array(encoding["input_ids"], dtype=np.int64)
        starts, stops = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        if lead and ((starts < 1) & (stops > 1)).any():  # the newline was merged with what follows
            return self._tokenize_part(text, begin, stop, lead="")
        shift = begin - len(lead)
        tokens = np.stack([ids, starts + shift, stops + shift])
        return tokens[:, stops > 1] if lead else tokens


def _name(turns: Sequence[tuple[str, str]], number: int) -> str:
    return f"turn {number} ({turns[number][0]})"
