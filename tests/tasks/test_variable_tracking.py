from __future__ import annotations

from collections import Counter

import pytest
from transformers import PreTrainedTokenizerBase

from cortex_core.errors import ConfigError
from cortex_core.tasks.filler import RandomFiller
from cortex_core.tasks.variable_tracking import VariableTracking
from cortex_core.tasks.vocabulary import TaskVocabulary


def run(facts: list[str]) -> tuple[dict[str, str], dict[str, int]]:
    """What every variable is bound to at the end, and over how many copies: the lines carried out one by one."""
    bound: dict[str, str] = {}
    hops: dict[str, int] = {}
    for fact in facts:
        verb, variable, source = fact.removesuffix(";").split()
        assert variable not in bound
        assert (source in bound) == (verb == "copy"), "a copy comes after what it copies"
        bound[variable] = bound[source] if verb == "copy" else source
        hops[variable] = hops[source] + 1 if verb == "copy" else 0
    return bound, hops


@pytest.mark.parametrize(("num_chains", "hops"), [(1, 1), (2, 2), (2, 3), (3, 1)])
def test_a_variable_is_answered_with_its_value_now(bpe: PreTrainedTokenizerBase, num_chains: int, hops: int) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    task = VariableTracking(vocabulary, RandomFiller(vocabulary), "held_out", 0, num_chains, hops)
    asked_hops: Counter[int] = Counter()
    for index in range(30):
        facts, queries = task.sheet(index, 20)
        bound, distance = run([bpe.decode(part.tokens) for part in facts])
        assert Counter(distance.values()) == dict.fromkeys(range(hops + 1), num_chains)
        assert len(set(bound.values())) == num_chains
        for query in queries:
            marker, variable, value = bpe.decode(query.tokens).removesuffix(";").split()
            assert (marker, bound[variable]) == ("value", value)
        variables = [query.tokens[1] for query in queries]
        assert len(set(variables[: len(bound)])) == len(bound), "each is asked once, then again"
        asked_hops[distance[bpe.decode([variables[0]]).strip()]] += 1
    assert set(asked_hops) == set(range(hops + 1))


def test_chains_are_told_in_turns(vocabulary: TaskVocabulary) -> None:
    task = VariableTracking(vocabulary, RandomFiller(vocabulary))
    let = vocabulary.pieces[" let"][0]
    second_starts = Counter(
        [part.tokens[0] for part in task.sheet(index, 1).facts].index(let, 1) for index in range(60)
    )
    assert set(second_starts) == {1, 2, 3}
    assert task.scattered


def test_sizes(vocabulary: TaskVocabulary) -> None:
    task = VariableTracking(vocabulary, RandomFiller(vocabulary))
    assert task.overhead_tokens(0) == len(vocabulary.prefix) + 6 * 4 + 4
    assert task.chance() == 1 / 2
    lone = VariableTracking(vocabulary, RandomFiller(vocabulary), num_chains=1)
    assert lone.chance() == 1 / len(vocabulary.values["train"])


def test_what_cannot_be_told_is_refused(vocabulary: TaskVocabulary) -> None:
    for sizes, complaint in (((0, 2), "num_chains = 0 must be at least 1"), ((2, 4), "hops = 4 must lie in 1 to 3"),
                             ((2, 0), "hops = 0 must lie in 1 to 3"), ((9, 3), "variable_tracking needs 36 keys")):  # fmt: skip
        with pytest.raises(ConfigError, match=complaint):
            VariableTracking(vocabulary, RandomFiller(vocabulary), "held_out", 0, *sizes)
