"""Metrics of generated answers: functions (prediction, references) → a float in [0, 1], by name in `METRICS`.

The references of a sample are its right answers, of which the best match counts; our data has one, the last
assistant turn.

    exact_match("Blue.", ["blue"])                                          # 1.0
    scores("(B) a cat", ["B"], ["choice", "token_f1"])                      # {"choice": 1.0, "token_f1": 0.5}
    parse_metrics(["exact_match", "doc=anls"], ["doc", "pets"])
    # {"doc": ("anls",), "pets": ("exact_match",)}
    mean_scores([("doc", {"anls": 0.8}), ("doc", {"anls": 0.4})])           # {"doc": {"anls": 0.6}}

CIDEr is left out: its package, pycocoevalcap, needs Java.
"""

import difflib
import math
import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

Metric = Callable[[str, Sequence[str]], float]

RELATIVE_ERROR = 0.05
"""Relative error of a number that `relaxed_accuracy` tolerates."""
ANLS_THRESHOLD = 0.5
"""Least similarity that counts in `anls`; below it, the answer is another text and not one misread."""
CJK = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
"""Characters of Chinese and Japanese, which has no spaces between words, as the inside of a regular
expression's brackets."""
PUNCTUATION = frozenset(string.punctuation) | {
    chr(code) for code in (*range(0x3001, 0x3040), *range(0xFF01, 0xFF66)) if not chr(code).isalnum()
}
"""ASCII punctuation, as in SQuAD's script, and that of Chinese and Japanese."""


# --- metrics ------------------------------------------------------------------------------------------


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is a reference, apart from case, outer white space, a final full stop and Unicode's
    compatibility forms (NFKC: full-width letters, ligatures); else 0."""
    return float(_normalised(prediction) in map(_normalised, references))


def _normalised(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\s.。]+$", "", text.strip())


def choice(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction names the letter of a reference, which is "B", "(B)" or "B. a cat"; else 0.

    In this order: an answer that is a letter or begins with one ("b", "(B)", "B. a cat"), the last "answer is
    B" or "答案：B", and a capital that is a word of its own, if there is only one such letter.
    """
    named = _named_letter(prediction)
    return float(named is not None and named in map(_leading_letter, references))


def _leading_letter(text: str) -> str | None:
    """The letter that an answer is or begins with."""
    text = unicodedata.normalize("NFKC", text)
    found = re.fullmatch(r"\W*([A-Za-z])\W*", text)
    found = found or re.match(rf"\W*([A-Za-z])(?:[).:,、*]+(?=[\s{CJK}])|\s*\n)", text)
    return found[1].upper() if found else None


def _named_letter(text: str) -> str | None:
    """The letter that an answer names, somewhere; None for no letter, or several."""
    if letter := _leading_letter(text):
        return letter
    text = unicodedata.normalize("NFKC", text)
    answer_is = r"(?i:answer(?:\s+is)?(?:\W+(?:option|choice))?)|答案[是为為]?(?:选项|选)?"
    # "I" before a word in lower case is the pronoun: "Answer: I think it is B."
    if stated := re.findall(rf"(?:{answer_is})\W*(?!I(?: [a-z]|['’]))([A-Z])(?![A-Za-z])", text):
        return stated[-1]
    # The article at the start of a sentence and the pronoun are no choices, as in "A cat, I think".
    after_a_letter = r"(?:and|as|because|is|or|since)\b"
    text = re.sub(rf"(?:^|[.!?\n]\s*)A(?= (?!{after_a_letter})[a-z])|\bI(?= [a-z]|['’])", "", text)
    letters = set(re.findall(r"(?<![A-Za-z0-9'’-])[A-Z](?![A-Za-z0-9'’-])", text))
    return letters.pop() if len(letters) == 1 else None


def anls(prediction: str, references: Sequence[str]) -> float:
    """Average Normalized Levenshtein Similarity (ST-VQA, Biten et al. 2019; DocVQA): 1 − edit distance /
    length of the longer text, or 0 if that is below 0.5. Neither case nor the amount of white space matters.

    "CocaCola" is 1 − 1/9 for "Coca Cola". Exactly 0.5 counts, as in the benchmarks' own scripts; in the paper
    it does not.
    """
    return max(_similarity(prediction, reference) for reference in references)


def _similarity(prediction: str, reference: str) -> float:
    ours, theirs = (" ".join(text.lower().split()) for text in (prediction, reference))
    longest = max(len(ours), len(theirs))
    # The distance is at least the difference of the lengths.
    if abs(len(ours) - len(theirs)) > longest * (1 - ANLS_THRESHOLD):
        return 0.0
    similarity = 1 - levenshtein(ours, theirs) / longest if longest else 1.0
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def levenshtein(first: str, second: str) -> int:
    """The fewest insertions, deletions and replacements of a character that turn one text into the other."""
    distances = list(range(len(second) + 1))  # from what was read of `first` to each beginning of `second`
    for i, ours in enumerate(first, 1):
        before, distances[0] = distances[0], i
        for j, theirs in enumerate(second, 1):
            replaced = before + (ours != theirs)
            before, distances[j] = distances[j], min(replaced, distances[j] + 1, distances[j - 1] + 1)
    return distances[-1]


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """ChartQA's accuracy (Masry et al. 2022): a number may be 5 % off, a percentage is a hundredth of its
    number, and any other answer is compared as in `exact_match`."""
    return float(any(_is_close(prediction, reference) for reference in references))


def _is_close(prediction: str, reference: str) -> bool:
    ours, theirs = _number(prediction), _number(reference)
    if ours is None or theirs is None or not math.isfinite(theirs):
        return exact_match(prediction, [reference]) == 1.0
    # The last factor is for rounding: 95 % is exactly 5 % off 100 %.
    return abs(ours - theirs) <= RELATIVE_ERROR * abs(theirs) * (1 + 1e-9)


def _number(text: str) -> float | None:
    text = _normalised(text)
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """SQuAD's F1 of the words that prediction and reference share (Rajpurkar et al. 2016), in lower case and
    without punctuation and the articles a, an and the. A Chinese or Japanese character is a word.

    Without any word on one side, 1 if the other has none either, else 0, as in the script of SQuAD 2.0.
    """
    return max(_f1(_words(prediction), _words(reference)) for reference in references)


def _words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in PUNCTUATION)
    text = re.sub(rf"([{CJK}])", r" \1 ", text)
    return re.sub(r"\b(?:a|an|the)\b", " ", text).split()


def _f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))  # = 2 PR / (P + R)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """The F1 of ROUGE-L (Lin 2004), by Google's package rouge-score, without stemming. A Chinese or Japanese
    character is a word; the package's own words are Latin alone."""
    return max(_rouge().score(reference, prediction)["rougeL"].fmeasure for reference in references)


class _RougeWords:
    """For text in ASCII, the words of rouge-score's own tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(rf"[{CJK}]|[^\W_{CJK}]+", text.lower())


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_RougeWords())


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "choice": choice,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}


# --- which metrics, and their means -------------------------------------------------------------------


def default_metrics(references: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The metrics of a source, given the references of each of its samples: `choice` where every one is a
    single letter, else `exact_match` and `token_f1`."""
    letters = (re.fullmatch(r"\s*[A-Za-z]\s*", text) for texts in references for text in texts)
    return ("choice",) if references and all(letters) else ("exact_match", "token_f1")


def parse_metrics(words: Sequence[str], sources: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The metrics of each source, from words of a command line: names for all sources, and `source=names`,
    which replaces these for one. Empty where no word concerns a source: see `default_metrics`.

    ValueError with a line for each unknown name or source, and for each metric whose package is missing.
    """
    problems: list[str] = []
    general: list[str] = []
    own: dict[str, tuple[str, ...]] = {}
    for word in words:
        source, separator, listed = word.rpartition("=")
        names = tuple(name.strip() for name in listed.split(","))
        problems += [problem for name in names if (problem := _problem(name))]
        if not separator:
            general += names
        elif source in sources:
            own[source] = own.get(source, ()) + names
        else:
            problems.append(f"{word}: there is no source {source!r}; {closest(source, sources)}")
    if problems:
        raise ValueError("\n".join(problems))
    chosen = {source: own.get(source, tuple(general)) for source in sources}
    return {source: tuple(dict.fromkeys(names)) for source, names in chosen.items()}


def _problem(name: str) -> str | None:
    """What is wrong with the name of a metric, if anything."""
    if name not in METRICS:
        return f"{name!r} is no metric; {closest(name, list(METRICS))}"
    if name == "rouge_l" and find_spec("rouge_score") is None:
        return "rouge_l needs rouge-score: pip install -e '.[rouge]'"
    return None


def closest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the known one that was probably meant, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"


def scores(prediction: str, references: Sequence[str], names: Iterable[str]) -> dict[str, float]:
    """The scores of a prediction, by metric."""
    return {name: METRICS[name](prediction, references) for name in names}


def mean_scores(rows: Iterable[tuple[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """The means by source and metric of (source, scores by metric) pairs, one pair a sample."""
    found: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for source, by_metric in rows:
        for metric, score in by_metric.items():
            found[source][metric].append(score)
    return {
        source: {metric: sum(values) / len(values) for metric, values in by_metric.items()}
        for source, by_metric in found.items()
    }
