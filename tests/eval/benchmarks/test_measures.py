"""Scores, with values worked out by hand from the published definitions."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_core.eval.benchmarks import babilong, longbench, longmemeval
from cortex_core.eval.benchmarks.example import Example
from cortex_core.eval.benchmarks.measures import MEASURES, YES_OR_NO, common_subsequence, scores

FEW = st.lists(st.sampled_from("abc"), max_size=7)


def example(task: str = "x", *answers: str, question: str = "", classes: tuple[str, ...] = ()) -> Example:
    return Example("k", "k", task, "4k", ("",), question, answers or ("",), classes)


def score(measure: str, answer: str, truth: str, **more: object) -> float:
    return MEASURES[measure](answer, truth, example("x", truth, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("the Tesk", "Tesk", 1.0),
        ("River Tesk flows there", "the Tesk", 2 * (1 / 4) * 1 / (1 / 4 + 1)),  # precision 1/4, recall 1
        ("red red blue", "red green", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),  # a word counts as often as in both
        ("", "Tesk", 0.0),
        ("the", "a", 0.0),
        ("It's the River-Tesk, (1869).", "its rivertesk 1869", 1.0),  # punctuation goes without a trace
        ("“Tesk”", "Tesk", 0.0),  # but only that of ASCII
        ("a–b", "b", 0.0),  # an article beside a dash is one
    ],
)
def test_f1(answer: str, truth: str, expected: float) -> None:
    assert score("f1", answer, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4),
        ("the gunman kill police", "police kill the gunman", 2 / 4),
        ("a b. c", "a x b y c z", 2 * 3 / (3 + 6)),  # sentences are joined
        ("a b", "a x. y b", 2 * 2 / (2 + 4)),
        ("a a a b", "a b", 1.0),  # distinct words
        ("A b", "a b", 1 / 2),  # case and punctuation count
        ("a, b", "a b", 1 / 2),
        ("a b. ", "a b.", 2 * 2 / (3 + 2)),  # a space behind the last full stop is a sentence of one empty word
        ("", "words", 0.0),
        ("...", "words", 0.0),
    ],
)
def test_rouge_l(answer: str, truth: str, expected: float) -> None:
    assert score("rouge_l", answer, truth) == pytest.approx(expected)


def test_an_ideograph_is_a_word() -> None:
    assert score("char_f1", "建成于1931年。", "1931年") == pytest.approx(2 * 2 / (5 + 2))
    assert score("f1", "建成于1931年", "1931年") == 0
    assert score("char_rouge_l", "桥在河北", "桥在北岸") == pytest.approx(2 * 3 / (4 + 4))
    assert score("char_rouge_l", "桥 在", "桥在") == 1


@given(FEW, FEW)
def test_the_longest_common_subsequence_is_the_longest(one: list[str], other: list[str]) -> None:
    def parts(of: list[str]) -> set[tuple[str, ...]]:
        return {part for size in range(len(of) + 1) for part in itertools.combinations(of, size)}

    common, found = parts(one) & parts(other), common_subsequence(one, other)
    assert tuple(found) in common and len(found) == max(map(len, common))


def test_of_several_longest_subsequences_the_published_one_is_taken() -> None:
    """It matters: rouge_l joins the words of several sentences."""
    assert common_subsequence(list("ab"), list("ba")) == ["b"]
    assert common_subsequence(list("abc"), list("cab")) == ["a", "b"]
    assert common_subsequence(list("abcd"), list("badc")) == ["b", "d"]


CLASSES = ("Number", "Person", "Location", "Other location")


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("Person", "Person", 1.0),
        ("a Person or a Number", "Person", 1 / 2),
        ("Other location", "Other location", 1.0),
        ("Location", "Person", 0.0),
        ("nothing", "Person", 0.0),
    ],
)
def test_classes(answer: str, truth: str, expected: float) -> None:
    assert score("classes", answer, truth, classes=CLASSES) == expected


def test_a_part_of_the_right_class_does_not_count_against_it() -> None:
    assert score("classes", "Other Location", "Other Location", classes=("Location", "Other Location")) == 1
    assert score("classes", "Other Location", "Location", classes=("Location", "Other Location")) == 1 / 2
    assert score("classes", "abc", "abc", classes=("a", "b", "abc")) == 1 / 2, "of two parts in a row one stays"


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        (" 12\n\nParagraph 3", "Paragraph 12", 1 / 2),
        ("Paragraph 12", "Paragraph 12", 1.0),
        ("It is 7.", "7", 1.0),
        ("17", "7", 0.0),
        ("none", "7", 0.0),
        ("段落5", "段落5", 1.0),
    ],
)
def test_numbers(answer: str, truth: str, expected: float) -> None:
    assert score("numbers", answer, truth) == expected


def test_code_compares_the_first_line_that_is_no_remark() -> None:
    assert score("code", "\n```python\n# area\n    return product\nmore", "    return product") == 1
    assert score("code", "abcd", "bcde") == 2 * 3 / 8  # three characters in common
    assert score("code", "abc", "abd") == 0.67, "in hundredths"
    assert score("code", "# only a remark", "x = 1") == 0 == score("code", "x = 1", "")
    assert score("code", "# only a remark", "") == 1
    assert score("code", "x" + "ab" * 120, "ab" * 120) < 0.5 < score("code", "xab", "ab"), (
        "frequent ones of long lines are junk"
    )
    assert score("code", "return product", "    return product") == 0.88, "2 * 14 / 32: indentation is part of a line"


@pytest.mark.parametrize(
    ("task", "question", "answer", "truth", "expected"),
    [
        ("qa1", "Where is John?", " The office.", "office", 1),
        ("qa1", "Where is John?", "the office. Not the kitchen.", "office", 1),
        ("qa1", "Where is John?", "office\nWhere is Mary? garden", "office", 0),
        ("qa1", "Where is John?", "office<example>garden", "office", 1),
        ("qa1", "Where is John?", "the office or the garden", "office", 0),
        ("qa1", "Where is John?", "at home", "office", 0),
        ("qa3", "Where was the apple before the kitchen?", "Before the kitchen it was in the garden", "garden", 1),
        ("qa5", "What did Fred give to Bill?", "Fred gave Bill the milk", "milk", 1),
        ("qa6", "Is Mary in the office?", "No, nobody knows", "no", 1),
        ("qa6", "Is Mary in the office?", "Nobody", "no", 1),  # a label counts within a word, too
        ("qa7", "How many?", "none", "none", 0),  # so one is found in none
        ("qa7", "How many?", "two", "two", 1),
        ("qa8", "What is Mary carrying?", "milk, apple", "apple,milk", 1),
        ("qa8", "What is Mary carrying?", "apple", "apple,milk", 0),
        ("qa8", "What is Mary carrying?", "apple, milk and football", "apple,milk", 0),
        ("qa19", "How do you go?", "S,e", "s,e", 1),
        ("qa19", "How do you go?", "s, e", "s,e", 0),
        ("qa19", "How do you go?", "e,s", "s,e", 0),
        ("qa5", "Who gave the milk to Mary?", "Bill", "Bill", 1),
    ],
)
def test_label(task: str, question: str, answer: str, truth: str, expected: int) -> None:
    assert score("label", answer, truth, question=question, classes=babilong.LABELS[task]) == expected


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("Your boat is called Petrel.", "the Petrel", 1),
        ("Storm petrels", "Petrel", 0),
        ("45 minutes each way", "45 minutes", 1),
        ("minutes: 45", "45 minutes", 0),
        ("anything", "", 0),
    ],
)
def test_contains(answer: str, truth: str, expected: int) -> None:
    assert score("contains", answer, truth) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("You did not mention a truck.", 1),
        ("You didn’t mention it", 1),
        ("I don't know", 1),
        ("In the yard.", 0),
        ("", 0),
    ],
)
def test_abstains(answer: str, expected: int) -> None:
    assert score("abstains", answer, "You did not mention a truck.") == expected


def test_the_best_of_the_accepted_answers_counts() -> None:
    task = longbench.TASKS["hotpotqa"]
    assert scores("River Tesk", example("hotpotqa", "the Tesk", "River Tesk"), task) == {"f1": 1.0}
    assert scores("River Tesk", example("hotpotqa", "Ob", "Tesk"), task) == {"f1": pytest.approx(2 / 3)}


def test_examples_that_the_model_makes_up_do_not_count() -> None:
    room = example("qa1", "office", question="Where is John?", classes=babilong.LABELS["qa1"])
    assert scores(" office\nQuestion: Where is Mary? garden", room, babilong.TASKS["qa1"]) == {"label": 1.0}
    answer = "\nPerson\nQuestion: How far ?\nType: Number"
    one = example("trec", "Person", classes=CLASSES)
    assert scores(answer, one, longbench.TASKS["trec"]) == {"classes": 1.0}
    assert scores(answer, example("hotpotqa", "Person"), longbench.TASKS["hotpotqa"])["f1"] < 0.5


def test_every_task_has_measures_and_its_score_first() -> None:
    for tasks in (longbench.TASKS, babilong.TASKS, longmemeval.TASKS):
        for name, task in tasks.items():
            assert task.measures and set(task.measures) <= MEASURES.keys(), name
            assert task.max_new_tokens >= 20, name
    assert longmemeval.TASKS["multi-session"].measures == ("contains", "f1")


texts = st.text(st.sampled_from("ab 1.,\n年"), max_size=30)


@given(texts, texts, st.sampled_from(sorted(MEASURES)))
def test_scores_are_shares(answer: str, truth: str, measure: str) -> None:
    found = score(measure, answer, truth, classes=("a", "b"))
    assert found in (0, 1) if measure in YES_OR_NO else 0 <= found <= 1
