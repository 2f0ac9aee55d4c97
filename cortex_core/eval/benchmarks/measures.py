"""How an answer is scored against an accepted one: 0 to 1. The best of the accepted answers counts.

`f1`, `rouge_l`, `classes`, `numbers` and `code` give what LongBench's published program gives, `label` what BABILong's
gives, peculiarities included. The others are our own: `char_f1` and `char_rouge_l` take each ideograph of a Chinese
text for a word, where LongBench cuts words with a dictionary; `contains` and `abstains` stand in for LongMemEval's
judge, which is a language model. Figures of our own measures are not those of a leaderboard.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from itertools import chain

from cortex_core.eval.benchmarks.example import Example, Task

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_IDEOGRAPH = re.compile("([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_UNKNOWN = (
    "not mention", "no mention", "never mention", "not know", "unknown", "not enough", "not provided", "not specified",
    "not stated", "never said", "no information", "no record", "not answer", "cannot be answered", "unanswerable",
)  # fmt: skip
_CODE_REMARK = re.compile("`|#|//")


def f1(answer: str, truth: str, example: Example) -> float:
    """Harmonic mean of precision and recall of the words. Rajpurkar et al. (2016), SQuAD."""
    return _f1(_words(answer), _words(truth))


def char_f1(answer: str, truth: str, example: Example) -> float:
    """The same where each ideograph is a word."""
    got, wanted = (_IDEOGRAPH.sub(r" \1 ", _plain(text)).split() for text in (answer, truth))
    return _f1(got, wanted)


def rouge_l(answer: str, truth: str, example: Example) -> float:
    """Harmonic mean of precision and recall of the distinct words that two texts have in the same order.

    Sentence against sentence: what any sentence of the answer has in common with any of the truth is joined. Lin
    (2004), ROUGE-L on the level of summaries; sentences end at full stops, and case and punctuation count.
    """
    got, wanted = _sentences(answer), _sentences(truth)
    common = {word for one in wanted for other in got for word in common_subsequence(one, other)}
    return _harmonic(len(common), len(set(chain(*got))), len(set(chain(*wanted))))


def char_rouge_l(answer: str, truth: str, example: Example) -> float:
    """The same where each ideograph is a word."""
    return rouge_l(_IDEOGRAPH.sub(r" \1 ", answer), _IDEOGRAPH.sub(r" \1 ", truth), example)


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """The longest sequence of words that both have in the same order. Wagner and Fischer (1974).

    Of several, the one that is found from the end by leaving out words of `other` first.
    """
    longest = [[0] * (len(other) + 1)]
    for word in one:
        above, row = longest[-1], [0]
        for column, wanted in enumerate(other):
            row.append(above[column] + 1 if word == wanted else max(above[column + 1], row[column]))
        longest.append(row)
    words, i, j = [], len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            words.append(one[i])
        elif longest[i - 1][j] > longest[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words[::-1]


def classes(answer: str, truth: str, example: Example) -> float:
    """Whether the answer names the class; shared among all classes that it names, parts of the right name excepted."""
    named = [name for name in example.classes if name in answer]
    for name in named:  # while it is shortened, as published: of two such parts in a row the second stays
        if name in truth and name != truth:
            named.remove(name)
    return 1 / len(named) if truth in named else 0.0


def numbers(answer: str, truth: str, example: Example) -> float:
    """Share of the numbers in the answer that are the right one."""
    wanted, got = re.findall(r"\d+", truth), re.findall(r"\d+", answer)
    return got.count(wanted[0]) / len(got) if wanted and got else 0.0


def code(answer: str, truth: str, example: Example) -> float:
    """Likeness of the characters of the first line that is no remark, in hundredths. Ratcliff and Metzener (1988)."""
    line = next((line for line in answer.lstrip("\n").split("\n") if not _CODE_REMARK.search(line)), "")
    return round(100 * SequenceMatcher(None, line, truth).ratio()) / 100 if line and truth else float(line == truth)


def label(answer: str, truth: str, example: Example) -> float:
    """Whether the first sentence names the right label or labels and no other; those in the question do not count.

    A label is looked for anywhere, also within words. As `one` is in `none`, the answer none of qa7 is never right.
    """
    text, question = re.split(r"\.|<context>|<example>", answer.lower())[0], example.question.lower()
    several = "," in truth and len(truth) > len("e,s")  # directions are labels of their own
    wanted = set(truth.lower().split(",") if several else [truth.lower()])
    return float({name for name in example.classes if name in text and name not in question} == wanted)


def contains(answer: str, truth: str, example: Example) -> float:
    """Whether the words of the truth, articles left out, stand in the answer, one after another."""
    got, wanted = _words(_plain(answer)), _words(_plain(truth))
    found = any(got[at : at + len(wanted)] == wanted for at in range(len(got) - len(wanted) + 1))
    return float(bool(wanted) and found)


def abstains(answer: str, truth: str, example: Example) -> float:
    """Whether the answer says, in one of a few phrases, that it is not known. Rough: only a reader can tell."""
    text = answer.lower().replace("’", "'").replace("n't", " not")
    return float(any(phrase in text for phrase in _UNKNOWN))


MEASURES: dict[str, Callable[[str, str, Example], float]] = {
    measure.__name__: measure
    for measure in (
        f1,
        char_f1,
        rouge_l,
        char_rouge_l,
        classes,
        numbers,
        code,
        label,
        contains,
        abstains,
    )
}
YES_OR_NO = frozenset({"label", "contains", "abstains"})
"""Measures that are 0 or 1: their mean is a proportion."""


def scores(answer: str, example: Example, task: Task) -> dict[str, float]:
    """By measure, the score of the task first."""
    if task.first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    return {name: max(MEASURES[name](answer, truth, example) for truth in example.answers) for name in task.measures}


def _words(text: str) -> list[str]:
    """Lower-cased, without ASCII punctuation and articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return _ARTICLE.sub(" ", kept).split()


def _plain(text: str) -> str:
    """Lower-cased, without punctuation of any script."""
    return "".join(c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P")


def _sentences(text: str) -> list[list[str]]:
    """Words of each; one that is nothing but spaces has one word, which is empty."""
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _f1(got: list[str], wanted: list[str]) -> float:
    return _harmonic((Counter(got) & Counter(wanted)).total(), len(got), len(wanted))


def _harmonic(common: int, got: int, wanted: int) -> float:
    """2PR / (P + R) with P = common / got, R = common / wanted."""
    return 2 * common / (got + wanted) if common else 0.0
