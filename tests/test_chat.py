"""Any chat template: the ids of transformers, nothing that a text could forge, and what is trained.

The templates and tokenizers are those of tests/chat_cases.py.
"""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import (
    Tokenizer,
    models,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

from data.tokens import SampleEncoder
from tests.chat_cases import (
    CASES,
    CLOSED,
    CONVERSATIONS,
    FORMATS,
    HOSTILE,
    TOKENIZERS,
    any_tokenizer,
    each_format,
    ids_of,
    messages_of,
    suited,
    talks,
)
from trainer.models.generic.chat import IMAGE, TemplateConversation

# --- the ids -----------------------------------------------------------------------------------------------


@each_format
@settings(max_examples=40, deadline=None)
@given(kind=any_tokenizer, turns=talks())
def test_the_ids_are_those_of_transformers(name, kind, turns):
    ours, format, tokenizer = CONVERSATIONS[kind, name], FORMATS[name], TOKENIZERS[kind]
    turns = suited(turns, format)
    for prompt in (False, True):
        messages = messages_of(turns[:-1] if prompt else turns, format)
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=format.template, add_generation_prompt=prompt
        )["input_ids"]
        pieces = [*ours.pieces(turns[:-1] if prompt else turns, prompt=prompt)]
        assert ids_of(pieces, tokenizer) == theirs
        assert [piece.role for piece in pieces if piece.ids is None] == ["user"] * sum(
            text.count(IMAGE) for _, text in turns
        )


def squeezed(text):
    """The text without white space, which decoders of SentencePiece add and control tokens may swallow."""
    return "".join(text.replace("\u2581", " ").split())


@each_format
@settings(max_examples=40, deadline=None)
@given(kind=any_tokenizer, turns=talks())
def test_answers_and_the_token_that_ends_them_are_trained(name, kind, turns):
    ours, format, tokenizer = CLOSED[kind, name], FORMATS[name], TOKENIZERS[kind]
    turns = suited(turns, format)
    pieces = [*ours.pieces(turns)]
    trained = tokenizer.decode([i for piece in pieces if piece.trained for i in piece.ids])
    answers = [text for role, text in turns if role == "assistant"]
    answers[-1:] = [format.opening + answer for answer in answers[-1:]]
    expected = "".join(answer + (format.end or "") for answer in answers)
    if format.end is None:
        expected += format.final_end
    assert squeezed(trained) == squeezed(expected)
    assert all(piece.role in ("assistant", "control") for piece in pieces if piece.trained)
    users = [i for piece in pieces if piece.role == "user" and piece.ids for i in piece.ids]
    asked = "".join(text.replace(IMAGE, "") for role, text in turns if role == "user")
    assert squeezed(tokenizer.decode(users)) == squeezed(asked)


@each_format
@settings(max_examples=40, deadline=None)
@given(kind=any_tokenizer, turns=talks([*HOSTILE, "a", " ", "\n", "<"], empty=False))
def test_no_text_forges_a_control_token(name, kind, turns):
    ours, tokenizer = CLOSED[kind, name], TOKENIZERS[kind]
    hostile = suited(turns, FORMATS[name])
    benign = [
        (role, IMAGE.join("x" if part.strip() else part for part in text.split(IMAGE)))
        for role, text in hostile
    ]
    used = [token for token in HOSTILE if token != "<start_of_turn>" or token in ours.chat_template]
    control = {
        *tokenizer.convert_tokens_to_ids(used)
    }  # "<unk>" among them, as these tokenizers know all bytes

    def skeleton(turns):
        """The control tokens and pictures, in order, with what is trained of them."""
        found = []
        for piece in ours.pieces(turns):
            assert piece.role == "control" or piece.ids is None or not control & {*piece.ids}
            found += [(i, piece.trained) for i in piece.ids or [None] if i is None or i in control]
        return found

    assert skeleton(hostile) == skeleton(benign)
    said = "".join(text.replace(IMAGE, "") for _, text in hostile)
    pieces = [piece for piece in ours.pieces(hostile) if piece.ids and piece.role != "control"]
    assert squeezed(tokenizer.decode([i for piece in pieces for i in piece.ids])) == squeezed(said)


@pytest.mark.parametrize("kind", ["byte-level", "SentencePiece"])
def test_a_control_token_taken_apart_gets_no_space(kind):
    ours = CONVERSATIONS[kind, "Llama-3: headers"]
    text = "a<|eot|>b <|head|> c"
    (ids,) = (
        piece.ids for piece in ours.pieces([("user", text), ("assistant", "d")]) if piece.role == "user"
    )
    assert ours.tokenizer.decode(ids).lstrip(" ") == text


def test_a_turn_that_the_template_leaves_out_when_empty_stays_out():
    template = (
        "{% for m in messages %}{% if m.content %}{{ m.role + '\n' + m.content + eos_token }}{% endif %}"
    )
    tokenizer = TOKENIZERS["byte-level"]
    ours = TemplateConversation(tokenizer, template + "{% endfor %}")
    turns = [("system", ""), ("user", "b"), ("assistant", "c")]
    assert ids_of(ours.pieces(turns), tokenizer) == ids_of(ours.pieces(turns[1:]), tokenizer)


def test_the_final_end_stands_directly_behind_the_last_answer():
    for name in (
        "LLaVA-1.5: pictures first, the last answer open",
        "GLM: strings alone for answers, the last answer open",
    ):
        ours, end = CLOSED["byte-level", name], FORMATS[name].final_end
        turns = [("user", "b"), ("assistant", "c")]
        text = ours.tokenizer.decode(ids_of(ours.pieces(turns), ours.tokenizer))
        assert text.endswith("c" + end)
        prompt = ours.tokenizer.decode(ids_of(ours.pieces(turns[:1], prompt=True), ours.tokenizer))
        assert not prompt.endswith(end)


def test_a_character_that_the_tokenizer_does_not_know_is_no_control_token():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    ours = TemplateConversation(fast, "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    pieces = [*ours.pieces([("user", "你 a </s>"), ("assistant", "a")])]
    assert [piece.ids for piece in pieces] == [[0, 1, 0, 0], [2], [1], [2]]


def test_a_hostile_text_costs_few_rounds():
    ours = CONVERSATIONS["byte-level", "Llama-3: headers"]
    turns = [("user", "<|eot|>" * 3000), ("assistant", "b")]
    assert sum(piece.role == "user" for piece in ours.pieces(turns)) == 1


def test_an_answer_s_own_thinking_replaces_an_empty_block():
    name = "Qwen3: an empty think block in the last answer"
    for kind, tokenizer in TOKENIZERS.items():
        ours = CONVERSATIONS[kind, name]
        turns = [("user", "why?"), ("assistant", "<think>\nhm\n</think>\n\nA cat.")]
        theirs = tokenizer.apply_chat_template(
            messages_of(turns, FORMATS[name]), chat_template=FORMATS[name].template
        )
        pieces = [*ours.pieces(turns)]
        assert ids_of(pieces, tokenizer) == theirs["input_ids"]
        (answer,) = (piece.ids for piece in pieces if piece.role == "assistant")
        assert {*tokenizer.convert_tokens_to_ids(["<think>", "</think>"])} <= {*answer}
        plain = [*ours.pieces([("user", "why?"), ("assistant", "A cat.")])]
        assert [piece.trained for piece in plain] == [False, False, False, True, True, True, False]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", FORMATS)
def test_all_that_a_model_has_to_write_is_trained_and_its_answer_is_found_in_it(kind, name):
    """Behind the prompt for an answer, up to the token that ends generation."""
    ours, tokenizer = CONVERSATIONS[kind, name], TOKENIZERS[kind]
    turns = [("user", "b"), ("assistant", "A cat."), ("user", "why?"), ("assistant", "It purrs.")]
    whole, prompt = ([*ours.pieces(part, prompt=p)] for part, p in ((turns, False), (turns[:-1], True)))
    begin = len(ids_of(prompt, tokenizer))
    trained = np.repeat([piece.trained for piece in whole], [len(piece.ids) for piece in whole])
    ids = np.array(ids_of(whole, tokenizer))
    assert ids[:begin].tolist() == ids_of(prompt, tokenizer)
    written = ids[begin:][: np.flatnonzero(trained[begin:])[-1] + 1]
    left_out = written[~trained[begin:][: len(written)]]
    assert not tokenizer.decode(left_out).strip()
    assert ours.answer_in(written.tolist()) == "It purrs."


def test_a_sample_cut_before_its_answer_trains_nothing_though_the_opening_is_left():
    ours = CONVERSATIONS["byte-level", "Qwen3: an empty think block in the last answer"]
    pieces = [*ours.pieces([("user", "why?"), ("assistant", "A cat.")])]
    before = sum(len(piece.ids) for piece in pieces[: [piece.role for piece in pieces].index("assistant")])
    assert any(piece.trained and piece.role == "control" for piece in pieces[:-2])
    for max_length, trains in ((before - 1, False), (before, False), (before + 1, True)):
        encoded = SampleEncoder(ours, max_length).join(pieces, lambda image: np.empty(0))
        assert encoded.is_cut
        assert (encoded.num_supervised > 0) == trains


def test_a_template_that_renders_no_question_alone_trains_all_the_same():
    template = (
        "{% if messages[-1].role != 'assistant' %}{{ raise_exception('no answer') }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content + '<|im_end|>' }}{% endfor %}"
    )
    ours = TemplateConversation(TOKENIZERS["byte-level"], template)
    assert ours.opening == ""
    assert [piece.trained for piece in ours.pieces([("user", "b"), ("assistant", "c")])].count(True) == 1


def test_only_the_whole_opening_is_left_out_of_an_answer():
    tokenizer = TOKENIZERS["byte-level"]
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content + '\n' }}{% endfor %}"
    ours = TemplateConversation(tokenizer, template)
    assert ours.opening == "<|im_start|>assistant "
    for written, answer in (("assistantship", "assistantship"), ("<|im_start|>assistant ship", "ship")):
        assert ours.answer_in(tokenizer.encode(written, add_special_tokens=False)) == answer


def test_a_picture_without_a_placeholder_comes_first_in_the_first_question():
    ours = CONVERSATIONS["byte-level", "ChatML with a default system prompt"]
    turns = [("system", "a"), ("user", "b"), ("assistant", "c")]
    placed = [("system", "a"), ("user", IMAGE + "b"), ("assistant", "c")]
    assert [*ours.pieces(turns, image_first=True)] == [*ours.pieces(placed)]


def test_a_template_of_strings_gets_the_image_token_in_the_string():
    template = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
    tokenizer = TOKENIZERS["byte-level"]
    ours = TemplateConversation(tokenizer, template, "<|image_pad|>")
    text = tokenizer.decode(ids_of(ours.pieces([("user", f"a{IMAGE}b"), ("assistant", "c")]), tokenizer))
    assert text == "<|im_start|>a<|image_pad|>b<|im_end|><|im_start|>c<|im_end|>"


# --- refusals ----------------------------------------------------------------------------------------------

EACH = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
LONG = "{% if messages | length > 3 %}"
REFUSED = {
    "loses turn 1 \\(assistant\\)": LONG + "{{ messages[0].content }}{% else %}" + EACH + "{% endif %}",
    "repeats turn 0 \\(user\\)": LONG + "{{ messages[0].content }}{% endif %}" + EACH,
    "moves turn 2 \\(user\\) behind a later text": LONG
    + "{% for m in messages | reverse %}{{ m.content }}{% endfor %}{% else %}"
    + EACH
    + "{% endif %}",
    "refuses the conversation: Too many turns": LONG
    + "{{ raise_exception('Too many turns') }}{% endif %}"
    + EACH,
    "refuses the conversation: .*nothing": LONG + "{{ nothing.at.all }}{% endif %}" + EACH,
    "puts 1 image tokens for 0 pictures": LONG + "<|image_pad|>{% endif %}" + EACH,
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_template_that_loses_moves_or_refuses_a_turn_is_an_error(message):
    ours = TemplateConversation(TOKENIZERS["byte-level"], REFUSED[message], "<|image_pad|>")
    turns = [("user", "b"), ("assistant", "c")]
    assert [*ours.pieces(turns)]
    with pytest.raises(ValueError, match=f"^the chat template {message}"):
        [*ours.pieces([*turns, *turns])]


def test_a_refused_system_prompt_or_picture_is_an_error():
    gemma = CONVERSATIONS["SentencePiece", "Gemma: trims, calls the assistant model"]
    with pytest.raises(ValueError, match="refuses the conversation: No system role"):
        [*gemma.pieces([("system", "a"), ("user", "b"), ("assistant", "c")])]
    llava = FORMATS["LLaVA-1.5: pictures first, the last answer open"].template
    lost = TemplateConversation(gemma.tokenizer, llava.replace("<|image_pad|>", ""), "<|image_pad|>")
    with pytest.raises(ValueError, match="puts 0 image tokens for 1 pictures in turn 0 \\(user\\)"):
        [*lost.pieces([("user", f"{IMAGE}b"), ("assistant", "c")])]
    llama = CONVERSATIONS["SentencePiece", "Llama-3: headers"]
    with pytest.raises(ValueError, match="turn 0 \\(user\\) has a picture, but the model takes only text"):
        [*llama.pieces([("user", f"{IMAGE}b"), ("assistant", "c")])]


def test_what_cannot_work_is_an_error_at_once():
    tokenizer = TOKENIZERS["byte-level"]
    with pytest.raises(ValueError, match="no chat template; give one with --chat_template FILE"):
        TemplateConversation(tokenizer)
    with pytest.raises(ValueError, match="loses turn 1 \\(assistant\\)"):
        TemplateConversation(tokenizer, "{{ messages[0].content }}")
    with pytest.raises(ValueError, match="no token '<missing>'"):
        TemplateConversation(tokenizer, EACH, "<missing>")


# --- workers and caches ------------------------------------------------------------------------------------


def test_a_copy_in_a_worker_gives_the_same_pieces():
    for ours in CONVERSATIONS.values():
        copy = pickle.loads(pickle.dumps(ours))
        turns = [("user", "b <|im_end|>"), ("assistant", "c")]
        assert [*copy.pieces(turns)] == [*ours.pieces(turns)]
        assert copy.fingerprint == ours.fingerprint


def test_the_fingerprint_changes_with_the_format_and_the_tokenizer():
    fingerprints = {ours.fingerprint for ours in [*CONVERSATIONS.values(), *CLOSED.values()]}
    opened = sum(format.final_end is not None for format in FORMATS.values()) * len(TOKENIZERS)
    assert len(fingerprints) == len(CASES) + opened
