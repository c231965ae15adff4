"""Tokenizers and chat templates with the structure of published ones, and random conversations.

CONVERSATIONS["byte-level", "Llama-3: headers"]    # a tokenizer that is trained here, with a template
"""

import json
from typing import NamedTuple

import pytest
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from trainer.models.generic.chat import IMAGE, TemplateConversation

# --- tokenizers --------------------------------------------------------------------------------------------

SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<end_of_turn>",
    "<|start|>",
]
SPECIAL += ["<|head|>", "<|/head|>", "<|eot|>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "[gMASK]"]
UNMARKED = ["<start_of_turn>", "<think>", "</think>", "<tool_call>", "\n\n"]
STRIPS = AddedToken("<|vision|>", special=True, normalized=False, lstrip=True, rstrip=True)
CORPUS = [
    "hello world, what is this?\n",
    "USER: ASSISTANT: user assistant system",
    "A cat is red. 5 cats",
    "été",
]


def byte_level(trim_offsets: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 9, trainer)
    return tokenizer


def sentencepiece(legacy: bool) -> Tokenizer:
    """Spaces are "▁": a prefix after each control token (`legacy`), or at the start of the text alone."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # no token spans two words
    alphabet = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=alphabet, show_progress=False)
    tokenizer.train_from_iterator([line.replace("\n", "") for line in CORPUS * 9], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"], state["pre_tokenizer"] = [], None  # the bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers with control tokens, some of them not marked as special."""
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_special_tokens([STRIPS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in UNMARKED])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = {
    "byte-level": finish(byte_level(trim_offsets=False)),
    "byte-level, trimmed offsets": finish(byte_level(trim_offsets=True)),
    "SentencePiece": finish(sentencepiece(legacy=False)),
    "SentencePiece, legacy": finish(sentencepiece(legacy=True)),
}

# --- templates ---------------------------------------------------------------------------------------------


class Format(NamedTuple):
    template: str
    image_token: str | None
    end: str | None
    """The token behind each answer."""
    in_parts: bool = False
    """Whether transformers needs a list of parts for a text without pictures."""
    system: bool = True
    final_end: str | None = None
    opening: str = ""
    """What the template puts before the last answer, and not into the prompt for it."""


PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}"
    "<|vision|><|image_pad|><|vision|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
)
DEFAULT_SYSTEM = "<|im_start|>system\nYou are helpful.<|im_end|>\n"
FORMATS = {
    "ChatML with a default system prompt": Format(
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}" + DEFAULT_SYSTEM + "{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' }}" + PARTS + "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|image_pad|>",
        "<|im_end|>",
    ),
    "LLaVA-1.5: pictures first, the last answer open": Format(
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role | upper + ': ' }}{% endif %}"
        "{% for p in m.content | selectattr('type', 'equalto', 'image') %}{{ '<|image_pad|>\n' }}{% endfor %}"
        "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "<|image_pad|>",
        None,
        in_parts=True,
        final_end="</s>",
    ),
    "Gemma: trims, calls the assistant model": Format(
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('No system role') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}"
        "{% if p.type == 'image' %}<|image_pad|>{% else %}{{ p.text | trim }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{{ '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<|image_pad|>",
        "<end_of_turn>",
        system=False,
    ),
    "Llama-3: headers": Format(
        "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim"
        " + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}",
        None,
        "<|eot|>",
    ),
    "Mistral: [INST], a space before the answer": Format(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
        None,
        "</s>",
    ),
    "Llama-2: a space behind the answer": Format(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ ' ' + m.content.strip() + ' ' +"
        " eos_token }}{% else %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}{% endif %}{% endfor %}",
        None,
        "</s>",
    ),
    "Qwen3: an empty think block in the last answer": Format(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set c = m.content %}{% set t = '' %}"
        "{% if m.role == 'assistant' and '</think>' in c %}"
        "{% set t = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + t + '\n</think>\n\n' }}{% endif %}"
        "{{ c + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        None,
        "<|im_end|>",
        opening="<think>\n\n</think>\n\n",
    ),
    "GLM: strings alone for answers, the last answer open": Format(
        "[gMASK]{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
        "{% if m.role == 'assistant' %}{{ m.content }}"
        "{% else %}" + PARTS + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|image_pad|>",
        "<|user|>",
        final_end="<|user|>",
    ),
}


def conversation(kind: str, name: str, final_end: bool = False) -> TemplateConversation:
    tokenizer, format = TOKENIZERS[kind], FORMATS[name]
    ends = tokenizer.convert_tokens_to_ids([format.end] if format.end else [])
    end = format.final_end if final_end else None
    return TemplateConversation(tokenizer, format.template, format.image_token, ends, end)


CASES = [(kind, name) for kind in TOKENIZERS for name in FORMATS]
CONVERSATIONS = {case: conversation(*case) for case in CASES}
CLOSED = {case: conversation(*case, final_end=True) for case in CASES}
each_format = pytest.mark.parametrize("name", FORMATS)
any_tokenizer = st.sampled_from([*TOKENIZERS])

BENIGN = [
    "a",
    "hello",
    "5",
    ".",
    "?",
    "été",
    "e\u0301",
    "你好",
    "🙂",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\u00a0",
]
BENIGN += ["USER:", "<|im", "</", "{{ x }}", "\ue0000\ue001", "\u2581", "<tool_call>"]
HOSTILE = [*SPECIAL, "<start_of_turn>", STRIPS.content]


@st.composite
def talks(draw, fragments=BENIGN, empty=True):
    """Questions with pictures and answers, and possibly a system prompt."""
    text = st.lists(st.sampled_from(fragments), min_size=not empty, max_size=5).map("".join)
    turns = [("system", draw(text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        question = IMAGE.join(draw(st.lists(text, min_size=1, max_size=3)))
        turns += [("user", question), ("assistant", draw(text))]
    return turns


def suited(turns, format):
    """The turns without what the format does not know."""
    turns = [(role, text) for role, text in turns if format.system or role != "system"]
    return [(role, text if format.image_token else text.replace(IMAGE, "")) for role, text in turns]


def messages_of(turns, format):
    """The conversation as transformers takes it."""
    messages = []
    for role, text in turns:
        content = text
        if IMAGE in text or format.in_parts:
            content = []
            for number, segment in enumerate(text.split(IMAGE)):
                content += [{"type": "image"}] * (number > 0)
                content += [{"type": "text", "text": segment}] * (segment != "" or IMAGE not in text)
        messages.append({"role": role, "content": content})
    return messages


def ids_of(pieces, tokenizer):
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return [i for piece in pieces for i in ([image] if piece.ids is None else piece.ids)]
