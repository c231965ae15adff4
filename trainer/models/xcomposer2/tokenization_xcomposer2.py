r"""The tokenizer of InternLM-XComposer2, read from its SentencePiece file by `tokenizers` alone.

Input: the path of a `tokenizer.model`, the only vocabulary file of published checkpoints.
Output: a `PreTrainedTokenizerFast` that gives the ids of the original's slow tokenizer (transformers 4.33.1),
and whose `save_pretrained` writes a `tokenizer.json` that `AutoTokenizer` loads without this code.

    >>> tokenizer = tokenizer_from_sentencepiece("internlm-xcomposer2-vl-7b/tokenizer.model")
    >>> tokenizer.encode("[UNUSED_TOKEN_146]user\nQ1[UNUSED_TOKEN_145]\n</s>")
    [1, 92543, 1008, 364, 343, 312, 92542, 2]
    >>> tokenizer.encode("A1</s>", add_special_tokens=False, split_special_tokens=True)  # text of a user
    [290, 312, 654, 269, 330]

How SentencePiece's BPE becomes the BPE of `tokenizers`:
- SentencePiece joins the neighbours whose concatenation is the piece of highest score. The pieces in order of
  their score, each with all its splits into two pieces, are the equivalent list of merges.
- A user-defined piece is matched before any merge, the longest first, and never merged: an added token.
- `<s>`, `</s>`, `<unk>` and `[UNUSED_TOKEN_*]` are *special* added tokens: with `split_special_tokens=True`
  they are plain characters of the text, so that a user's text cannot bring in a control token. The other
  user-defined pieces (`——`, `……`, full-width letters) are ordinary text and stay whole in both modes.
- transformers 4.33.1 strips the white space around `<s>`, `</s>` and `<unk>`, and the models were trained on
  that: `…[UNUSED_TOKEN_145]\n</s>` ends in 92542, 2 and not in 92542, 364, 2.
- What no piece covers becomes UTF-8 bytes, `<0xF0><0x9F>…`, which decoding joins again. Decoding inverts
  encoding exactly, leading spaces included; bytes that are not UTF-8 decode to a � each.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from .conversation_xcomposer2 import CHAT_TEMPLATE

# The kinds of piece and of model, numbered as in sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
BPE_MODEL = 2

SPACE = "▁"  # SentencePiece's visible space, U+2581


@dataclass(frozen=True)
class SentencePieceModel:
    """The fields of a SentencePiece BPE file that the conversion uses."""

    pieces: list[tuple[str, float, int]]
    """(text, score, kind), in the order of the ids."""
    unk_id: int
    bos_id: int
    eos_id: int
    byte_fallback: bool


def tokenizer_from_sentencepiece(path: str | Path) -> PreTrainedTokenizerFast:
    """Convert a SentencePiece BPE file; pads with `</s>` on the right, as the original does.

    Raises ValueError for a file that is not SentencePiece's, is cut off, or holds another kind of model.
    """
    model = read_sentencepiece(path)
    tokenizer = Tokenizer(
        BPE(
            vocab={text: index for index, (text, _, _) in enumerate(model.pieces)},
            merges=_merges(model.pieces),
            unk_token=model.pieces[model.unk_id][0],
            byte_fallback=model.byte_fallback,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    added = (UNKNOWN, CONTROL, USER_DEFINED)
    tokenizer.add_tokens([_added_token(text, kind) for text, _, kind in model.pieces if kind in added])
    bos, eos, unk = (model.pieces[index][0] for index in (model.bos_id, model.eos_id, model.unk_id))
    return fast_tokenizer(tokenizer, bos, eos, unk)


def fast_tokenizer(tokenizer: Tokenizer, bos: str, eos: str, unk: str) -> PreTrainedTokenizerFast:
    """Add what all XComposer2 tokenizers share: decoding, `bos` first, padding and the chat template."""
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        pad_token=eos,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _added_token(text: str, kind: int) -> AddedToken:
    strip = kind in (UNKNOWN, CONTROL)
    special = strip or text.startswith("[UNUSED_TOKEN_")
    return AddedToken(text, lstrip=strip, rstrip=strip, normalized=False, special=special)


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """All (left, right) whose concatenation is a piece, in descending order of the piece's score.

    Only normal pieces take part: a user's text must never merge into a control or a user-defined piece.
    """
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    merges = []
    for text in sorted(scores, key=scores.__getitem__, reverse=True):
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                merges.append((left, right))
    return merges


# The file is a protocol-buffer message of a few fields, parsed here so that protobuf need not be installed.


def read_sentencepiece(path: str | Path) -> SentencePieceModel:
    """Parse a `tokenizer.model`; ValueError with path and reason if it cannot be converted."""
    try:
        return _parse_model(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as InternLM2's SentencePiece model: {error}") from error


def _parse_model(data: bytes) -> SentencePieceModel:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_bytes(value)))
            (score,) = struct.unpack("<f", _bytes(piece.get(2, bytes(4)), size=4))
            pieces.append((_bytes(piece.get(1, b"")).decode(), score, _int(piece.get(3, NORMAL))))
        elif number == 2:
            trainer.update(_fields(_bytes(value)))
        elif number == 3:
            normalizer.update(_fields(_bytes(value)))

    if trainer.get(3) != BPE_MODEL:
        raise ValueError("it does not hold a BPE model")
    # precompiled_charsmap, add_dummy_prefix, remove_extra_whitespaces: the file must leave text as it is.
    if normalizer.get(2) or normalizer.get(3, 1) or normalizer.get(4, 1):
        raise ValueError("it changes text before splitting it, which InternLM2's model does not")
    unk_id, bos_id, eos_id = (_int(trainer.get(40 + index, index)) for index in range(3))
    if max(unk_id, bos_id, eos_id) >= len(pieces):
        raise ValueError(f"ids {unk_id}, {bos_id}, {eos_id} are special, but there are {len(pieces)} pieces")
    if len({text for text, _, _ in pieces}) != len(pieces):
        raise ValueError("it holds a piece twice")
    return SentencePieceModel(pieces, unk_id, bos_id, eos_id, byte_fallback=bool(trainer.get(35, 0)))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protocol-buffer message: an int for a varint, else bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire_type = key & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire_type == 2:
            size, at = _varint(message, at)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"a field has the unknown wire type {wire_type}")
        if size > len(message) - at:
            raise ValueError("it is cut off")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The little-endian base-128 number at `at`, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it is cut off")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is longer than 10 bytes")


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("a field that should be a number is not one")
    return value


def _bytes(value: int | bytes, size: int | None = None) -> bytes:
    if not isinstance(value, bytes) or size not in (None, len(value)):
        raise ValueError("a field has the wrong type")
    return value
