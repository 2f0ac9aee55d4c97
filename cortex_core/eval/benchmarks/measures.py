"""How an answer is scored against an accepted one, by comparing words: 0 to 1. The best of the accepted answers counts.

They are the benchmarks' measures, written anew. What differs from the published programs, so that a figure near a
leaderboard's is not taken for the same: Chinese is compared by character, where LongBench cuts words with a dictionary;
`rouge_l` weighs precision and recall alike; `label` looks for whole words, so `one` is not found in `none`, and ends an
answer at its first line as well as at its first full stop.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from cortex_core.eval.benchmarks.example import Example, Task

_ARTICLES = frozenset({"a", "an", "the"})
_IDEOGRAPH = re.compile("([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_UNKNOWN = (
    "not mention", "no mention", "never mention", "not know", "unknown", "not enough", "not provided", "not specified",
    "not stated", "never said", "no information", "no record", "not answer", "cannot be answered", "unanswerable",
)  # fmt: skip
_CODE_REMARK = re.compile("`|#|//")


def words(text: str) -> list[str]:
    """Lower-cased, without punctuation; an ideograph is a word."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return _IDEOGRAPH.sub(r" \1 ", kept).split()


def f1(answer: str, truth: str, example: Example) -> float:
    """Harmonic mean of precision and recall of the words, articles left out. Rajpurkar et al. (2016), SQuAD."""
    got, wanted = ([word for word in words(text) if word not in _ARTICLES] for text in (answer, truth))
    return _harmonic((Counter(got) & Counter(wanted)).total(), len(got), len(wanted))


def rouge_l(answer: str, truth: str, example: Example) -> float:
    """Harmonic mean of precision and recall of the longest common subsequence of words. Lin (2004), ROUGE."""
    got, wanted = words(answer), words(truth)
    return _harmonic(common_subsequence(got, wanted), len(got), len(wanted))


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest sequence of words that both have in the same order. Wagner and Fischer (1974)."""
    longest = [0] * (len(other) + 1)
    for word in one:
        before = 0  # of the row above, one to the left
        for column, wanted in enumerate(other, start=1):
            above = longest[column]
            longest[column] = before + 1 if word == wanted else max(above, longest[column - 1])
            before = above
    return longest[-1]


def classes(answer: str, truth: str, example: Example) -> float:
    """Whether the answer names the class; shared among all classes that it names, parts of the right name excepted."""
    named = {name for name in example.classes if name in answer and (name == truth or name not in truth)}
    return 1 / len(named) if truth in named else 0.0


def numbers(answer: str, truth: str, example: Example) -> float:
    """Share of the numbers in the answer that are the right one."""
    wanted, got = re.findall(r"\d+", truth), re.findall(r"\d+", answer)
    return got.count(wanted[0]) / len(got) if wanted and got else 0.0


def code(answer: str, truth: str, example: Example) -> float:
    """Likeness of the characters of the first line that is no remark. Ratcliff and Metzener (1988)."""
    line = next((line for line in answer.lstrip("\n").split("\n") if not _CODE_REMARK.search(line)), "")
    return SequenceMatcher(None, line, truth, autojunk=False).ratio()


def label(answer: str, truth: str, example: Example) -> float:
    """Whether the first sentence names the right label or labels and no other; those in the question do not count."""
    text = re.sub(r"\s*,\s*", ",", re.split(r"[.\n]", answer.strip().lower())[0])
    truth, question = truth.strip().lower(), example.question.lower()
    wanted = {truth} if truth in example.classes else set(truth.replace(" ", "").split(","))
    if not wanted <= set(example.classes):  # not as published: all that can be said is whether it occurs
        return contains(text, truth, example)
    return float({name for name in example.classes if _has(text, name) and not _has(question, name)} == wanted)


def contains(answer: str, truth: str, example: Example) -> float:
    """Whether the words of the truth, articles left out, stand in the answer, one after another."""
    got, wanted = ([word for word in words(text) if word not in _ARTICLES] for text in (answer, truth))
    found = any(got[at : at + len(wanted)] == wanted for at in range(len(got) - len(wanted) + 1))
    return float(bool(wanted) and found)


def abstains(answer: str, truth: str, example: Example) -> float:
    """Whether the answer says, in one of a few phrases, that it is not known. Rough: only a reader can tell."""
    text = answer.lower().replace("’", "'").replace("n't", " not")
    return float(any(phrase in text for phrase in _UNKNOWN))


MEASURES: dict[str, Callable[[str, str, Example], float]] = {
    measure.__name__: measure for measure in (f1, rouge_l, classes, numbers, code, label, contains, abstains)
}
YES_OR_NO = frozenset({"label", "contains", "abstains"})
"""Measures that are 0 or 1: their mean is a proportion."""


def scores(answer: str, example: Example, task: Task) -> dict[str, float]:
    """By measure, the score of the task first."""
    if task.first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    return {name: max(MEASURES[name](answer, truth, example) for truth in example.answers) for name in task.measures}


def _has(text: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def _harmonic(common: int, got: int, wanted: int) -> float:
    """2PR / (P + R) with P = common / got, R = common / wanted."""
    return 2 * common / (got + wanted) if common else 0.0
