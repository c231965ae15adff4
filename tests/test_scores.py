"""Metrics of generated answers against their published definitions, and which metrics a source gets."""

import random
import re
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trainer.scores import (
    METRICS,
    anls,
    choice,
    default_metrics,
    exact_match,
    levenshtein,
    mean_scores,
    parse_metrics,
    relaxed_accuracy,
    rouge_l,
    scores,
    token_f1,
)

texts = st.text(alphabet="aAbB the.,%0159 -()猫狗。，", max_size=12)
"""Short, of few characters: so that texts share some, and are numbers, letters and articles now and then."""


# --- exact match --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        (" Blue.", "blue"),
        ("是。", "是"),
        ("Ｂ", "b"),
        ("ﬁne", "fine"),
        ("STRASSE", "straße"),
        ("5%", "5％"),
    ],
)
def test_case_space_full_stop_and_compatibility_forms_do_not_matter(prediction, reference):
    assert exact_match(prediction, [reference]) == 1.0


def test_another_answer_is_not_exact_and_any_reference_may_match():
    assert exact_match("light blue", ["blue"]) == 0.0
    assert exact_match("light blue", ["blue", "Light Blue"]) == 1.0


@given(texts, texts)
def test_exact_match_is_symmetric(first, second):
    assert exact_match(first, [second]) == exact_match(second, [first])


# --- multiple choice ----------------------------------------------------------------------------------

NAMED = {
    "B": ["B", "b", "(B)", "B.", "B)", "**B**", "Ｂ", " b. ", "B. a cat", "(b) a cat", "B: cat", "B、一只猫"],
    "C": ["The answer is C", "The answer is (C).", "Answer: C", "the answer is **C**", "答案是C", "答案：C"],
    "D": [
        "D\nIts tail is long.",
        "I think it is D.",
        "Answer: I think it is D.",
        "It is (D), a dog",
        "选D",
        "\\boxed{D}",
        "选项D对",
    ],
    "A": ["A", "A. A cat", "B or C? No, the answer is A", "I choose A because of it", "A is right"],
}


@pytest.mark.parametrize("letter", NAMED)
def test_the_letter_of_an_answer_is_found_however_it_is_written(letter):
    for prediction in NAMED[letter]:
        assert choice(prediction, [letter]) == 1.0, prediction
        assert choice(prediction, [f"({letter})"]) == choice(prediction, [f"{letter}. a cat"]) == 1.0
        assert choice(prediction, ["E"]) == 0.0


@pytest.mark.parametrize(
    "prediction",
    ["", "A cat sits there.", "I see a cat", "A or B", "neither", "a cat", "e.g. this", "X-ray", "一只猫"],
)
def test_an_answer_without_a_letter_or_with_several_is_wrong(prediction):
    assert not any(choice(prediction, [letter]) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")


@given(st.sampled_from("ABCDEFGH"), st.sampled_from("ABCDEFGH"), st.sampled_from(["{}", "({})", "{}. cat"]))
def test_a_choice_is_right_exactly_if_the_letters_are_equal(letter, other, form):
    assert choice(form.format(letter), [other]) == float(letter == other)


# --- ANLS ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("The Coca", 0), ("CocaCola", 1 - 1 / 9), ("Coca cola", 1), ("Cola", 0), ("Cat", 0), (" coca  COLA", 1)],
)
def test_anls_gives_the_scores_of_the_benchmarks_own_example(prediction, expected):
    """The Robust Reading Competition's page on ST-VQA: answers "Coca Cola" and "Coca Cola Company"."""
    assert anls(prediction, ["Coca Cola", "Coca Cola Company"]) == pytest.approx(expected)


def test_anls_counts_a_similarity_of_a_half_and_nothing_below():
    assert anls("ab", ["ac"]) == 0.5
    assert anls("abc", ["ade"]) == 0.0


@given(texts, texts)
@example("", "")
def test_anls_is_symmetric_and_one_minus_the_distance_or_nothing(first, second):
    score = anls(first, [second])
    assert score == anls(second, [first])
    ours, theirs = (" ".join(text.lower().split()) for text in (first, second))
    longest = max(len(ours), len(theirs), 1)
    similarity = 1 - levenshtein(ours, theirs) / longest
    assert score == pytest.approx(similarity if similarity >= 0.5 else 0.0)


@given(texts, texts, texts)
def test_the_edit_distance_is_a_metric(first, second, third):
    assert levenshtein(first, second) == levenshtein(second, first)
    assert (levenshtein(first, second) == 0) == (first == second)
    assert levenshtein(first, third) <= levenshtein(first, second) + levenshtein(second, third)
    assert abs(len(first) - len(second)) <= levenshtein(first, second) <= max(len(first), len(second))


def test_the_edit_distance_of_textbook_pairs():
    assert levenshtein("kitten", "sitting") == levenshtein("saturday", "sunday") == 3
    assert levenshtein("", "ab") == 2


# --- relaxed accuracy ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # pix2struct's tests, whose mean over all eight is 62.5 %
        ("abc", "abc", 1),
        ("abc", "Abc", 1),
        ("Abc", "abc", 1),
        ("100%", "96%", 1),
        ("100%", "94%", 0),
        ("100%", "0.96", 1),
        ("100%", "0.94", 0),
        ("Don't", "Won't", 0),
        # the tolerance is 5 % of the reference, both ways, and none of zero
        ("95%", "100%", 1),
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("-95", "-100", 1),
        ("95", "-100", 0),
        ("0.0", "0", 1),
        ("0.01", "0", 0),
        ("12.", "12", 1),
        ("5 %", "0.05", 1),
        ("2019", "two", 0),
        ("nan", "nan", 1),
        ("inf", "5", 0),
        ("7", "inf", 0),
    ],
)
def test_a_number_may_be_five_per_cent_off_and_other_answers_must_be_exact(prediction, reference, expected):
    assert relaxed_accuracy(prediction, [reference]) == expected


@given(st.floats(-1e9, 1e9), st.floats(-0.2, 0.2))
def test_relaxed_accuracy_is_the_relative_error_of_a_number(target, error):
    prediction = target * (1 + error)
    if abs(abs(error) - 0.05) > 1e-6 and abs(target) > 1e-300:
        assert relaxed_accuracy(repr(prediction), [repr(target)]) == float(abs(error) < 0.05)


# --- token F1 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("rock", "rock n roll", 2 * (1 / 1) * (1 / 3) / (1 / 1 + 1 / 3)),
        ("The Denver Broncos!", "Denver Broncos", 1),
        ("`Needs\tA_LOT of the 'normalization'.\"‘", "needs alot of normalization‘", 1),  # as T5 tests it
        ("big big moose", "a big moose", 2 * (2 / 3) * (2 / 2) / (2 / 3 + 2 / 2)),
        ("The", "a", 1),  # no word on either side
        ("the", "cat", 0),
        ("一只黑猫。", "黑猫", 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("红色 Toyota", "红色的Toyota", 2 * 1 * (3 / 4) / (1 + 3 / 4)),
    ],
)
def test_token_f1_is_squads_and_a_chinese_character_is_a_token(prediction, reference, expected):
    assert token_f1(prediction, [reference]) == pytest.approx(expected)


@given(texts, texts)
def test_token_f1_is_symmetric_and_that_of_precision_and_recall(first, second):
    assert token_f1(first, [second]) == token_f1(second, [first])
    bare = (re.sub(r"[.,%()，。-]", "", text.lower()) for text in (first, second))
    words = (re.findall(r"[猫狗]|[a-z0-9]+", text) for text in bare)
    ours, theirs = ([word for word in listed if word not in ("a", "an", "the")] for listed in words)
    shared = sum(min(Counter(ours)[word], Counter(theirs)[word]) for word in set(ours))
    if shared:
        precision, recall = shared / len(ours), shared / len(theirs)
        assert token_f1(first, [second]) == pytest.approx(2 * precision * recall / (precision + recall))
    else:
        assert token_f1(first, [second]) == float(not ours and not theirs)


# --- ROUGE-L ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004, section 3.1
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("testing two", "testing one two", 4 / 5),  # the package's own tests
        ("", "testing one two", 0),
        ("一只黑猫", "一只猫", 2 * (3 / 4) * 1 / (3 / 4 + 1)),
    ],
)
def test_rouge_l_gives_the_scores_of_its_paper_and_reads_chinese(prediction, reference, expected):
    pytest.importorskip("rouge_score", reason="needs rouge-score: pip install -e '.[rouge]'")
    assert rouge_l(prediction, [reference]) == pytest.approx(expected)


@given(st.lists(st.sampled_from("abcd"), max_size=6), st.lists(st.sampled_from("abcd"), max_size=6))
def test_rouge_l_is_symmetric_and_below_the_f1_of_unordered_words(first, second):
    pytest.importorskip("rouge_score", reason="needs rouge-score: pip install -e '.[rouge]'")
    ours, theirs = (" ".join(f"w{letter}" for letter in letters) for letters in (first, second))
    assert rouge_l(ours, [theirs]) == pytest.approx(rouge_l(theirs, [ours]))
    assert 0 <= rouge_l(ours, [theirs]) <= token_f1(ours, [theirs]) + 1e-9
    assert rouge_l(ours, [ours]) == (1.0 if ours else 0.0), "the package gives no text nothing"


# --- all of them --------------------------------------------------------------------------------------

PLAIN = [name for name in METRICS if name != "rouge_l"]


@pytest.mark.parametrize("name", PLAIN)
@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_scores_are_in_0_to_1_and_the_best_reference_counts_in_any_order(name, prediction, references):
    score = METRICS[name](prediction, references)
    assert 0.0 <= score <= 1.0
    assert score == max(METRICS[name](prediction, [reference]) for reference in references)
    assert score == METRICS[name](prediction, random.sample(references, len(references)))


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "choice"])
@given(texts)
@example("")
@example("nan")
@example("猫。")
def test_a_text_matches_itself(name, text):
    assert METRICS[name](text, [text]) == 1.0


@pytest.mark.parametrize("name", PLAIN)
@given(st.text(max_size=40), st.text(max_size=40))
def test_no_text_is_an_error(name, prediction, reference):
    assert 0.0 <= METRICS[name](prediction, [reference]) <= 1.0


# --- which metrics, and their means -------------------------------------------------------------------


def test_single_letters_are_a_choice_and_other_answers_are_compared_as_text():
    assert default_metrics([["B"], ["a"], [" C "]]) == ("choice",)
    assert default_metrics([["B"], ["B. a cat"]]) == ("exact_match", "token_f1")
    assert default_metrics([["yes"]]) == default_metrics([]) == ("exact_match", "token_f1")


def test_metrics_of_one_source_replace_those_of_all():
    words = ["exact_match", "docvqa=anls", "chartqa=relaxed_accuracy,exact_match"]
    assert parse_metrics(words, ["docvqa", "chartqa", "pets"]) == {
        "docvqa": ("anls",),
        "chartqa": ("relaxed_accuracy", "exact_match"),
        "pets": ("exact_match",),
    }
    assert parse_metrics(["docvqa=anls", "docvqa=anls,choice"], ["docvqa", "pets"]) == {
        "docvqa": ("anls", "choice"),
        "pets": (),
    }
    assert parse_metrics([], ["pets"]) == {"pets": ()}
    assert parse_metrics(["a=b.json=anls"], ["a=b.json"]) == {"a=b.json": ("anls",)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["exact_mach"], "'exact_mach' is no metric; did you mean exact_match?"),
        (["pets=bleu"], f"'bleu' is no metric; choose from {', '.join(METRICS)}"),
        (["pet=anls"], "pet=anls: there is no source 'pet'; did you mean pets?"),
        (["pets="], f"'' is no metric; choose from {', '.join(METRICS)}"),
    ],
)
def test_an_unknown_metric_or_source_is_a_sentence_with_the_closest_name(words, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_metrics(words, ["pets", "text"])


def test_all_bad_words_are_reported_together():
    with pytest.raises(ValueError) as error:
        parse_metrics(["anlss", "pet=anls", "choice"], ["pets"])
    assert len(str(error.value).splitlines()) == 2


def test_a_metric_whose_package_is_missing_is_a_sentence(monkeypatch):
    monkeypatch.setattr("trainer.scores.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"rouge_l needs rouge-score: pip install -e '\.\[rouge\]'"):
        parse_metrics(["anls", "rouge_l"], ["pets"])


def test_means_are_taken_over_the_samples_of_a_source():
    rows = [
        ("doc", scores("Coca Cola", ["coca cola"], ["anls", "exact_match"])),
        ("doc", scores("CocaCola", ["coca cola"], ["anls", "exact_match"])),
        ("pets", scores("(B) cat", ["B"], ["choice"])),
    ]
    assert mean_scores(rows) == {
        "doc": {"anls": pytest.approx((1 + 8 / 9) / 2), "exact_match": 0.5},
        "pets": {"choice": 1.0},
    }
    assert mean_scores([]) == {}
