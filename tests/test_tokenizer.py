"""The tokenizer against transformers 4.33.1's ids, against SentencePiece, and as a saved folder.

The published tokenizer.model is not in this repository. Tests of its ids look for it at $XCOMPOSER2_TOKENIZER
(the file or its folder), and are skipped without it. All others use a small file in the same format, `TINY`,
written below.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.models.xcomposer2.family import XComposer2
from trainer.models.xcomposer2.tokenization_xcomposer2 import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    read_sentencepiece,
    tokenizer_from_sentencepiece,
)

TEXT = Path(__file__).parent / "golden" / "text"
GOLDEN = json.loads((TEXT / "tokenizer_ids.json").read_text(encoding="utf-8"))
CONTROL_IDS = {0, 1, 2, *range(92397, 92544)}  # <unk>, <s>, </s> and [UNUSED_TOKEN_0 … 146]


# The published vocabulary -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published_file(published_tokenizer) -> Path:
    path = published_tokenizer
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == GOLDEN["tokenizer_model_sha256"], f"{path} is another vocabulary"
    return path


@pytest.fixture(scope="module")
def published(published_file):
    return tokenizer_from_sentencepiece(published_file)


def test_ids_equal_those_that_the_models_were_trained_on(published):
    for case in GOLDEN["cases"]:
        ids = published.encode(case["text"], add_special_tokens=case["add_special_tokens"])
        assert ids == case["ids"], case["text"]
    special = GOLDEN["special"]
    assert published.bos_token_id == special["bos"]
    assert published.eos_token_id == published.pad_token_id == special["eos"] == special["pad"]
    assert published.unk_token_id == special["unk"]
    assert len(published) == 92544


def test_ids_survive_saving_and_loading_the_published_vocabulary(published, tmp_path):
    published.save_pretrained(tmp_path)
    loaded = XComposer2().tokenizer(tmp_path)
    for case in GOLDEN["cases"]:
        assert loaded.encode(case["text"], add_special_tokens=case["add_special_tokens"]) == case["ids"]


def test_a_user_s_text_never_becomes_a_control_token(published):
    for text in (
        "</s>",
        "[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n",
        "<s><unk> </s> [UNUSED_TOKEN_0]",
    ):
        ids = published.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert not CONTROL_IDS & set(ids)
        assert published.decode(ids) == text
    # User-defined pieces that are ordinary text keep the ids that they were trained with.
    assert published.encode("——ｖ", add_special_tokens=False, split_special_tokens=True) == [92395, 92390]


RUNS = st.builds(
    lambda text, times: text * times,
    st.sampled_from([" ", "\n", "\t", "=", "-", "a", "0"]),
    st.integers(1, 40),
)
WORDS = [
    "[UNUSED_TOKEN_145]",
    "[UNUSED_TOKEN_14",
    "5]",
    "——",
    "—",
    "……",
    "…",
    "ｖ",
    "the",
    " def f(x):",
    "你好",
    "🙂",
    "▁",
]
# NUL: SentencePiece of today encodes it as a byte, that of 2023, and ours, as its piece 354.
ANY_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
PLAIN_TEXT = st.lists(st.one_of(ANY_TEXT, RUNS, st.sampled_from(WORDS)), max_size=8).map("".join)


def test_plain_text_has_sentencepiece_s_ids_and_decodes_to_itself(published, published_file):
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(published_file))

    @given(PLAIN_TEXT)
    @settings(max_examples=500, deadline=None)
    def check(text):
        ids = published.encode(text, add_special_tokens=False)
        assert ids == processor.encode(text)
        assert published.decode(ids) == processor.decode(ids) == text.replace("▁", " ")
        plain = published.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert not CONTROL_IDS & set(plain)

    check()


# A small vocabulary in the same format ------------------------------------------------------------

BYTE = 6
WHOLE = ["——", "——x", "[UNUSED_TOKEN_14]", "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"]
# Merges that would lead to a control token, could one be merged: its prefixes, all but the last letter.
MERGED = ["he", "th", "▁▁", "aa", "the", "▁the", "▁▁▁▁", "aaa", "in", "ing", "thing", "▁thing", "</", "你好"]
MERGED += ["[UNUSED_TOKEN_145]"[:length] for length in range(2, len("[UNUSED_TOKEN_145]"))]
LETTERS = sorted(set("".join(MERGED) + "abcdefghijklmnopqrstuvwxyz\n—</>[]0123456789"))
TINY = [
    ("<unk>", 0.0, UNKNOWN),
    ("<s>", 0.0, CONTROL),
    ("</s>", 0.0, CONTROL),
    *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
    *((text, -float(rank), NORMAL) for rank, text in enumerate(MERGED + LETTERS)),
    *((text, 0.0, USER_DEFINED) for text in WHOLE),
]


def varint(number: int) -> bytes:
    head, tail = number & 0x7F, number >> 7
    return bytes([head | 0x80]) + varint(tail) if tail else bytes([head])


def field(number: int, value: int | float | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def model_proto(pieces=TINY, model_type=2, add_dummy_prefix=0) -> bytes:
    """A tokenizer.model: the pieces, then the trainer's and the normalizer's settings."""
    head = (field(1, field(1, text) + field(2, score) + field(3, kind)) for text, score, kind in pieces)
    trainer = field(1, "corpus.txt") + field(3, model_type) + field(35, 1)
    normalizer = field(1, "identity") + field(2, b"") + field(3, add_dummy_prefix) + field(4, 0)
    return b"".join(head) + field(2, trainer) + field(3, normalizer)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "tokenizer.model").write_bytes(model_proto())
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return XComposer2().tokenizer(tiny_folder)


def reference_ids(text: str) -> list[int]:
    """What transformers 4.33.1's slow tokenizer with SentencePiece does, spelled out."""
    ids = {piece: index for index, (piece, _, _) in enumerate(TINY)}
    scores = {piece: score for piece, score, kind in TINY if kind == NORMAL}
    whole = "|".join(re.escape(piece) for piece in sorted(WHOLE, key=len, reverse=True))
    out = []
    for part in re.split(r"\s*(<unk>|<s>|</s>)\s*", text):
        if part in ("<unk>", "<s>", "</s>"):
            out.append(ids[part])
            continue
        for run in re.split(f"({whole})", part.replace(" ", "▁")):
            symbols = [run] if run in WHOLE else list(run)
            while True:
                joined = [a + b for a, b in itertools.pairwise(symbols)]
                pairs = [(scores[piece], -at) for at, piece in enumerate(joined) if piece in scores]
                if not pairs or run in WHOLE:
                    break
                at = -max(pairs)[1]  # the best score, the leftmost of equals
                symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
            for symbol in symbols:
                out += (
                    [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
                )
    return out


# Rust and Python disagree whether U+001C … U+001F are white space, so whether they go beside a </s>.
MIXED_TEXT = st.lists(
    st.sampled_from(
        [*MERGED, *WHOLE, *LETTERS, "</s>", "<s>", "<unk>", " ", "  ", "\t", "—", "🙂", "é", "\u3000"]
    ),
    max_size=20,
).map("".join)


@given(text=MIXED_TEXT)
@settings(max_examples=300, deadline=None)
def test_merges_user_defined_pieces_byte_fallback_and_stripping_follow_the_definition(tiny, text):
    assert tiny.encode(text, add_special_tokens=False) == reference_ids(text)
    assert tiny.encode(text) == [1, *reference_ids(text)]


@given(text=MIXED_TEXT)
@settings(max_examples=300, deadline=None)
def test_decoding_undoes_encoding_plain_text_to_the_last_space(tiny, text):
    ids = tiny.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tiny.decode(ids) == text.replace("▁", " ")
    assert not {0, 1, 2, *tiny.convert_tokens_to_ids(WHOLE[2:])} & set(ids)


def test_decoding_can_leave_out_control_tokens(tiny):
    ids = tiny.encode("[UNUSED_TOKEN_146] thing[UNUSED_TOKEN_145]\n</s>")
    assert tiny.decode(ids) == "<s>[UNUSED_TOKEN_146] thing[UNUSED_TOKEN_145]</s>"
    assert tiny.decode(ids, skip_special_tokens=True) == " thing"


def test_batches_pad_with_the_end_token_on_the_right_and_on_the_left_when_asked(tiny):
    batch = tiny(["the thing", "a"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][1][2:] == [2] * (len(batch["input_ids"][0]) - 2)
    assert batch["attention_mask"][1] == [1, 1] + [0] * (len(batch["input_ids"][0]) - 2)
    assert tiny(["the thing", "a"], padding=True, padding_side="left")["attention_mask"][1][:1] == [0]


def test_the_tokenizer_reaches_worker_processes(tiny):
    text = "[UNUSED_TOKEN_145]\n</s> thing"
    assert pickle.loads(pickle.dumps(tiny)).encode(text) == tiny.encode(text)


@pytest.mark.parametrize("case", ["plain", "history", "meta", "image"])
def test_the_chat_template_writes_the_original_s_prompt(tiny, case):
    chat = json.loads((TEXT / "chat_prompts.json").read_text(encoding="utf-8"))[case]
    messages = [{"role": "system", "content": chat["meta_instruction"]}] if chat["meta_instruction"] else []
    for question, answer in chat["history"]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    content = chat["query"]
    if case == "image":
        content = [{"type": "image"}, {"type": "text", "text": content.removeprefix("<ImageHere>")}]
    messages.append({"role": "user", "content": content})
    prompt = tiny.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == chat["build_inputs_prompt"]


# Folders and files --------------------------------------------------------------------------------

CLEAN_PROCESS = """
import json, sys
sys.modules["sentencepiece"] = sys.modules["google.protobuf"] = None  # importing either now fails
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
texts = json.loads(sys.stdin.read())
encoded = [tokenizer.encode(text) for text in texts]
print(json.dumps({
    "ids": encoded,
    "plain": [tokenizer.encode(text, split_special_tokens=True) for text in texts],
    "decoded": [tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded],
    "prompt": tokenizer.apply_chat_template([{"role": "user", "content": " the thing "}], tokenize=False),
    "pad": [tokenizer.pad_token_id, tokenizer.padding_side],
    "trainer": "trainer" in sys.modules,
}))
"""


def test_a_saved_folder_loads_in_a_clean_process_without_this_code_or_sentencepiece(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    auto_map = {"AutoConfig": "configuration_xcomposer2.InternLMXcomposer2Config"}
    config = {"model_type": "internlmxcomposer2", "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    texts = ["the thing", "  a\n</s> in", "[UNUSED_TOKEN_146]user\n🙂——x[UNUSED_TOKEN_145]\n</s>", "é 你好"]
    result = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN_PROCESS, str(tmp_path)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    expected = [tiny.encode(text) for text in texts]
    assert json.loads(result.stdout) == {
        "ids": expected,
        "plain": [tiny.encode(text, split_special_tokens=True) for text in texts],
        "decoded": [tiny.decode(ids, skip_special_tokens=True) for ids in expected],
        "prompt": "<s>[UNUSED_TOKEN_146]user\nthe thing[UNUSED_TOKEN_145]</s>",
        "pad": [2, "right"],
        "trainer": False,
    }


def test_a_tokenizer_json_wins_and_its_class_needs_no_remote_code(tiny, tiny_folder, tmp_path):
    tiny.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not read")
    settings_file = tmp_path / "tokenizer_config.json"
    settings_of_it = json.loads(settings_file.read_text())
    settings_of_it["tokenizer_class"] = "InternLMXComposer2Tokenizer"
    settings_of_it["auto_map"] = {"AutoTokenizer": ["tokenization_gone.InternLMXComposer2Tokenizer", None]}
    settings_file.write_text(json.dumps(settings_of_it))
    assert XComposer2().tokenizer(tmp_path).encode("a\n</s>") == tiny.encode("a\n</s>")


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_named_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} has neither tokenizer.json nor"):
        XComposer2().tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"tokenizer files of {re.escape(str(tmp_path))} cannot be read"):
        XComposer2().tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "does not hold a BPE model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "tokenizer.model cannot be read as"),
        (model_proto()[:-3], "cut off"),
        (model_proto(model_type=1), "does not hold a BPE model"),
        (model_proto(add_dummy_prefix=1), "changes text before splitting it"),
        (model_proto([*TINY, TINY[-1]]), "holds a piece twice"),
        (model_proto(TINY[:2]), "ids 0, 1, 2 are special, but there are 2 pieces"),
        (b"\x25\x00", "cut off"),
        (b"\xff" * 20, "longer than 10 bytes"),
    ],
)
def test_a_file_that_is_not_this_kind_of_model_is_refused_with_its_reason(tmp_path, data, reason):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        read_sentencepiece(path)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_files_raise_nothing_but_value_error(tmp_path_factory, data):
    whole = model_proto()
    start = data.draw(st.integers(0, len(whole)))
    damaged = whole[:start] + data.draw(st.binary(max_size=8)) + whole[start + data.draw(st.integers(0, 9)) :]
    path = tmp_path_factory.getbasetemp() / "damaged.model"
    path.write_bytes(damaged)
    with contextlib.suppress(ValueError):
        tokenizer_from_sentencepiece(path)
