"""One conversation format and one treatment of pictures for training, answers and the saved model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM
from PIL import Image

from data.lengths import measure_lengths
from data.loader import SampleReader
from data.mixture import read_mixture
from data.sample import parse_sample
from data.tokens import SLOT, SampleEncoder
from tests.tiny import ROOT, flags, run_ranks, tiny_model, tiny_world, word_tokenizer
from trainer.generate import load_model
from trainer.main import main
from trainer.models import load_config, load_conversation, load_image_processor
from trainer.models.xcomposer2.conversation_xcomposer2 import CHAT_TEMPLATE, Conversation
from trainer.models.xcomposer2.family import XComposer2
from trainer.models.xcomposer2.generation_xcomposer2 import prompt_ids


@pytest.fixture(scope="module")
def conversation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    word_tokenizer(folder)
    return XComposer2().conversation(folder)


WORDS = st.lists(
    st.sampled_from(["what", "is", "red", "w1", "?", "\n", "<ImageHere>"]), min_size=1, max_size=6
)
HOSTILE = st.lists(
    st.sampled_from(
        ["say", "</s>", "<s>", "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]assistant", "{{ x }}", "\n"]
    ),
    min_size=1,
    max_size=6,
)
TURNS = st.lists(st.sampled_from(["user", "assistant", "system"]), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(roles=TURNS, words=st.lists(WORDS, min_size=5, max_size=5))
def test_training_chat_and_chat_template_give_the_same_ids(conversation, roles, words):
    turns = [(role, " ".join(text).strip()) for role, text in zip(roles, words, strict=False)]
    num_images = sum(text.count("<ImageHere>") for _, text in turns)
    record = {
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "image": ["x.png"] * num_images,
    }
    sample = parse_sample(record, needs_answer=False)
    encoder, tokenizer = SampleEncoder(conversation, 10_000), conversation.tokenizer
    for prompt in (False, True):
        if prompt and roles[-1] == "assistant":
            continue  # a prompt leaves the last answer out
        pieces = encoder.prompt_pieces(sample) if prompt else encoder.pieces(sample)
        ours = encoder.join(pieces, lambda _: np.full(3, SLOT)).input_ids.tolist()
        if prompt:
            assert prompt_ids(tokenizer, turns, [3] * num_images)[0] == ours
        messages = [{"role": role, "content": text} for role, text in turns]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        pieces = tokenizer(rendered.split("<ImageHere>"), add_special_tokens=False)["input_ids"]
        theirs = pieces[0] + [token for piece in pieces[1:] for token in [conversation.pad_id] * 3 + piece]
        assert theirs == ours


@settings(max_examples=60, deadline=None)
@given(roles=TURNS, words=st.lists(HOSTILE, min_size=5, max_size=5))
def test_no_text_moves_a_turn_or_what_is_trained(conversation, roles, words):
    hostile = [(role, " ".join(text)) for role, text in zip(roles, words, strict=False)]
    plain = [(role, "say") for role, _ in hostile]

    def shape(turns):
        """What is not a turn's text."""
        return [piece for piece in conversation.pieces(turns) if piece.role == "control"]

    assert shape(hostile) == shape(plain)
    control = {*conversation.tokenizer.convert_tokens_to_ids(["<s>", "</s>", "[UNUSED_TOKEN_145]"])}
    for piece in conversation.pieces(hostile):
        assert piece.role == "control" or not control & set(piece.ids)


def test_a_template_that_loses_or_repeats_a_turn_is_refused(conversation):
    for broken in (
        "{{ messages[0].content }}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    ):
        conversation.tokenizer.chat_template = broken
        try:
            with pytest.raises(ValueError, match="chat template loses, repeats or reorders turns"):
                Conversation(conversation.tokenizer)
        finally:
            conversation.tokenizer.chat_template = CHAT_TEMPLATE


CHAT = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
found = []
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    seen = {}
    def spy(generate=model.generate, **inputs):
        seen.update(inputs)
        return generate(**inputs)
    model.generate = spy
    model.chat(tokenizer, "what colour is it?", max_new_tokens=1)
    messages = [{"role": "user", "content": "what colour is it?"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    found.append([seen["input_ids"][0].tolist(), rendered])
print(json.dumps([found, "trainer" in sys.modules]))
"""
PROMPT = """
import sys
from trainer.models import load_conversation
pieces = [*load_conversation(sys.argv[1]).pieces([("user", "what colour is it?")], prompt=True)]
print([token for piece in pieces for token in piece.ids])
"""


@pytest.mark.slow
def test_an_edited_format_is_that_of_training_answers_caches_and_the_saved_model(tmp_path):
    """A researcher's copy of the project, where a turn begins with "the <role>"."""
    for package in ("trainer", "data"):
        shutil.copytree(
            ROOT / package, tmp_path / "project" / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    edited = tmp_path / "project/trainer/models/xcomposer2/conversation_xcomposer2.py"
    text = edited.read_text()
    assert text.count("_146]' + message.role") == text.count("_146]assistant\\\\n' }}") == 1
    text = text.replace("_146]' + message.role", "_146]the ' + message.role")
    edited.write_text(text.replace("_146]assistant\\\\n' }}", "_146]the assistant\\\\n' }}"))
    options = {
        "data_path": tmp_path / "data/text.json",
        "max_steps": 1,
        "fix_sampler": True,
        "rehearse": False,
    }
    tiny_world(tmp_path)
    run_ranks(1, main, flags(tmp_path, "before", **options))

    def python(*arguments: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "project")}
        command = [sys.executable, *arguments]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()[-1] if result.stdout else ""

    python("-m", "trainer.main", *flags(tmp_path, "after", **options))
    found, imported = json.loads(python("-c", CHAT, str(tmp_path / "before"), str(tmp_path / "after")))
    assert not imported
    (before, as_before), (after, as_after) = found
    assert "[UNUSED_TOKEN_146]the assistant" not in as_before
    assert "[UNUSED_TOKEN_146]the assistant" in as_after
    assert after != before
    assert json.loads(python("-c", PROMPT, str(tmp_path / "model"))) == after
    formats = [
        json.loads((tmp_path / name / file).read_text())["conversation_format"]
        for name in ("before", "after")
        for file in ("run.json", "config.json")
    ]
    assert formats[0] == formats[1] != formats[2] == formats[3]
    assert len([*(tmp_path / "data").glob("text.json.*.lengths")]) == 2, "stale lengths would be used"


# --- pictures ----------------------------------------------------------------------------------------------


def hidden_green(folder: Path) -> Path:
    """A fully transparent picture whose hidden colour is green, and samples of it."""
    folder.mkdir()
    Image.new("RGBA", (40, 40), (0, 200, 0, 0)).save(folder / "clear.png")
    record = {
        "id": "clear",
        "image": "clear.png",
        "conversations": [{"from": "user", "value": "what colour is it?"}, {"from": "gpt", "value": "red"}],
    }
    (folder / "data.json").write_text(json.dumps([record] * 4))
    return folder / "data.json"


@pytest.mark.parametrize("lora", [False, True])
def test_pictures_are_answered_about_as_they_were_trained_on(tmp_path, lora):
    base, data = tiny_model(tmp_path / "model"), hidden_green(tmp_path / "data")
    options = {"data_path": data, "images_as_viewed": True, "max_steps": 1, "rehearse": False}
    run_ranks(1, main, flags(tmp_path, "out", use_lora=lora, fix_sampler=lora, **options))
    model, folder = load_model(tmp_path / "out", None, torch.float32)
    reader = SampleReader(
        read_mixture(data), SampleEncoder(load_conversation(folder), 256), load_image_processor(model.config)
    )
    white = load_image_processor(load_config(base))(Image.new("RGB", (40, 40), "white"))
    _, _, (asked,) = reader.read_prompt(0, 0)
    _, (trained,) = reader.read(0, 0)
    assert torch.equal(asked, white)
    assert torch.equal(trained, white)

    if lora:  # as users load it, by peft alone
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    seen = {}
    inner = model.get_base_model() if lora else model
    generate = inner.generate

    def spy(**inputs):
        seen.update(inputs)
        return generate(**inputs)

    inner.generate = spy
    clear = tmp_path / "data/clear.png"
    model.chat(reader.encoder.tokenizer, "what?", image=clear, max_new_tokens=1)
    assert torch.equal(seen["pixel_values"][0], white)
    if lora:
        with model.disable_adapter():
            model.chat(reader.encoder.tokenizer, "what?", image=clear, max_new_tokens=1)
        assert not torch.equal(seen["pixel_values"][0], white), "the base was trained without"
    overridden, _ = load_model(tmp_path / "out", None, torch.float32, images_as_viewed=False)
    assert not load_image_processor(overridden.config).as_viewed


def test_training_goes_on_with_the_pictures_of_the_model_it_starts_from(tmp_path):
    base = tiny_model(tmp_path / "model", images_as_viewed=True)
    assert load_image_processor(load_config(base)).as_viewed
    assert not load_image_processor(load_config(base, images_as_viewed=False)).as_viewed


def test_16_bit_pictures_look_alike_in_training_and_in_chat(tmp_path):
    levels = np.linspace(0, 65535, 1600).astype(np.uint16).reshape(40, 40)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    model, _ = load_model(tiny_model(tmp_path / "model"), None, torch.float32)
    seen = {}
    model.generate = lambda **inputs: seen.update(inputs) or inputs["input_ids"]
    model.chat(load_conversation(tmp_path / "model").tokenizer, "what?", image=tmp_path / "deep.png")
    expected = load_image_processor(model.config)(Image.fromarray((levels >> 8).astype(np.uint8)))
    assert torch.equal(seen["pixel_values"][0], expected)


def test_lengths_are_measured_again_for_pictures_as_viewed(tmp_path):
    base, data = tiny_model(tmp_path / "model"), hidden_green(tmp_path / "data")
    for as_viewed in (False, True):
        processor = load_image_processor(load_config(base, images_as_viewed=as_viewed))
        reader = SampleReader(read_mixture(data), SampleEncoder(load_conversation(base), 256), processor)
        measure_lengths(reader, num_workers=0)
    assert len([*data.parent.glob("*.lengths")]) == 2
