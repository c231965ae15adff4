r"""The conversation format of InternLM-XComposer2: turns → pieces of token ids.

Input: (role, text) turns, with `<ImageHere>` where an image goes. Output: pieces in order, an image or token
ids:

    conversation = Conversation(tokenizer)
    [*conversation.pieces([("user", "<ImageHere>What?"), ("assistant", "A cat.")])]
    # <s> [146] user \n | image | What? | [145] \n [146] assistant \n | A cat. | [145] </s>
    #                                                                    trained   trained

`CHAT_TEMPLATE` alone defines the text between the turns' texts. Training, `trainer.generate`, the saved
model's `chat()` and its `chat_template.jinja` all render it, so that they cannot differ: edit it here.
The template is rendered with a mark in place of each text. The text between the marks is tokenised with
control tokens recognised, and the turns' texts are tokenised as plain text, so that a literal "</s>" in a
user's text remains text. Every text between two marks or images is tokenised separately.

Trained are the texts of the assistant, and the control tokens right after them that end generation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

IMAGE = "<ImageHere>"
TURN_START, TURN_END = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"
ROLES = ("user", "assistant", "system")

# The content is stripped as in training; an image in a list of parts becomes the data's placeholder.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set parts = namespace(text='') %}
        {%- for part in message.content %}
            {%- set parts.text = parts.text + ('<ImageHere>' if part.type == 'image' else part.text) %}
        {%- endfor %}
        {%- set content = parts.text %}
    {%- endif %}
    {%- if not loop.first %}{{ '\\n' }}{% endif %}
    {{- '[UNUSED_TOKEN_146]' + message.role + '\\n' + content | trim + '[UNUSED_TOKEN_145]' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n[UNUSED_TOKEN_146]assistant\\n' }}
{%- else %}
    {{- eos_token }}
{%- endif %}"""

PROBES = (
    [("system", "a"), ("user", f"{IMAGE}b"), ("assistant", "c"), ("user", "d"), ("assistant", "e")],
    [("user", "b"), ("assistant", "c"), ("user", "d")],
)
"""Conversations whose pieces differ between two formats."""


class Piece(NamedTuple):
    """An image or consecutive token ids of a conversation."""

    ids: list[int] | None
    """None: an image."""
    role: str
    """user, assistant or system for the text of a turn; control for the format's own tokens."""
    trained: bool


class Conversation:
    """The conversation format with a tokenizer; can be pickled to worker processes.

    `format` is a hash of the ids of sample conversations; `fingerprint` also covers the tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        """ValueError if the tokenizer lacks a control token, or recognises one in a user's text."""
        self.tokenizer = tokenizer
        ends = self._id(TURN_END), self._id(tokenizer.eos_token)
        self._ends = set(ends)
        self._between: dict[tuple[tuple[str, ...], bool], list[list[int]]] = {}
        self.pad_id: int = ends[1] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.slot_id = self.pad_id
        literals = [TURN_START, TURN_END, *tokenizer.all_special_tokens]
        control_ids = {self._id(token) for token in literals if token != tokenizer.unk_token}
        for literal, ids in zip(literals, self._tokenize(literals), strict=True):
            if control_ids & set(ids):
                raise ValueError(
                    f"the tokenizer reads the text {literal!r} as a control token even with "
                    "split_special_tokens=True, so a user's text could end a turn; mark the token as special"
                )
        probes = [[*self.pieces(probe, prompt=prompt)] for probe in PROBES for prompt in (False, True)]
        self.format = hashlib.sha256(repr(probes).encode()).hexdigest()[:16]
        tokenizer_text = tokenizer.backend_tokenizer.to_str().encode()
        self.fingerprint = f"{self.format}-{hashlib.sha256(tokenizer_text).hexdigest()[:16]}"

    def pieces(
        self, turns: Sequence[tuple[str, str]], *, image_first: bool = False, prompt: bool = False
    ) -> Iterator[Piece]:
        """The pieces of a conversation, or of the prompt for an answer to it (`prompt`).

        image_first: an image without a placeholder comes before everything else, as in the 2.5 models.
        """
        between = self._literals(tuple(role for role, _ in turns), prompt)
        texts = [text.strip().split(IMAGE) for _, text in turns]
        tokenized = iter(self._tokenize([segment for segments in texts for segment in segments]))
        if image_first:
            yield Piece(None, "control", False)
        yield Piece(between[0], "control", False)
        for (role, _), segments, after in zip(turns, texts, between[1:], strict=True):
            trained = role == "assistant"
            for number in range(len(segments)):
                if number:
                    yield Piece(None, role, False)
                yield Piece(next(tokenized), role, trained)
            num_ends = next((n for n, token in enumerate(after) if token not in self._ends), len(after))
            if trained and num_ends:
                yield Piece(after[:num_ends], "control", True)
                after = after[num_ends:]
            if after:
                yield Piece(after, "control", False)

    def answer_in(self, generated: Sequence[int]) -> str:
        """The answer in the ids that a model wrote behind a prompt."""
        return self.tokenizer.decode(generated, skip_special_tokens=True).strip()

    def _literals(self, roles: tuple[str, ...], prompt: bool) -> list[list[int]]:
        """The ids before the first text, between texts, and after the last: one list more than roles."""
        if (roles, prompt) not in self._between:
            messages = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
            template = self.tokenizer.chat_template or CHAT_TEMPLATE
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
            literal, *rest = re.split(r"\ue000(\d+)\ue001", text)
            if [int(number) for number in rest[::2]] != [*range(len(roles))]:
                raise ValueError("the chat template loses, repeats or reorders turns")
            self._between[roles, prompt] = self.tokenizer(
                [literal, *rest[1::2]], add_special_tokens=False, return_attention_mask=False
            )["input_ids"]
        return self._between[roles, prompt]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, as plain text."""
        return self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )["input_ids"]

    def _id(self, token: str | None) -> int:
        token_id = None if token is None else self.tokenizer.convert_tokens_to_ids(token)
        if not isinstance(token_id, int) or token_id == self.tokenizer.unk_token_id:
            raise ValueError(
                f"the tokenizer has no {token or 'end-of-text token'}; it is not that of an "
                "InternLM-XComposer2 model"
            )
        return token_id
