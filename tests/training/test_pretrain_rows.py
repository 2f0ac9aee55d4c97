from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cortex_core.training.pretrain import Pretraining
from cortex_core.training.pretrain_rows import KINDS, Rows, RowSource


@pytest.fixture(scope="module")
def source(started: Pretraining) -> RowSource:
    config = started.config.model_copy(update={"batch_size": 200})
    return RowSource(config, started.vocabulary, started.corpus)


def test_rows_are_a_function_of_the_step(started: Pretraining, source: RowSource) -> None:
    again = RowSource(source.config, started.vocabulary, started.corpus)
    for one, other in zip(source.batch(7), again.batch(7), strict=True):
        assert np.array_equal(one, other)
    assert not np.array_equal(source.batch(7).tokens, source.batch(8).tokens)


def test_rows_have_the_configured_shares(source: RowSource) -> None:
    late = Counter(KINDS[kind] for step in range(10, 15) for kind in source.batch(step).kinds)
    rows = source.config.rows
    assert late["key_value"] / 1000 == pytest.approx(rows.key_value_frac, abs=0.05)
    assert late["text"] / 1000 == pytest.approx(1 - rows.task_frac, abs=0.05)
    assert set(late) == {"text", "repeat", "key_value", *rows.tasks}
    assert sum(late[name] for name in {*rows.tasks}) / 1000 == pytest.approx(rows.tasks_frac, abs=0.05)
    assert late["long_addition"] > late["copy_reverse"]
    early = Counter(KINDS[kind] for kind in source.batch(0).kinds)
    assert early["key_value"] > 120


def test_no_answer_is_a_held_out_word(started: Pretraining, source: RowSource) -> None:
    held_out = started.vocabulary.held_out_words()
    for step in (0, 10):
        rows = source.batch(step)
        tasks = ~np.isin(rows.kinds, [KINDS.index("repeat")])
        asked = rows.tokens[tasks][rows.answer_weight[tasks] > 0]
        assert asked.size > 500
        assert not np.isin(asked, held_out).any()


def test_some_questions_lack_their_facts_and_cost_nothing(started: Pretraining, source: RowSource) -> None:
    remember, recall = (started.vocabulary.pieces[marker][0] for marker in (" remember", " recall"))
    batches = [source.batch(step) for step in range(10, 14)]
    rows = Rows(*(np.concatenate(column) for column in zip(*batches, strict=True)))
    key_value = rows.kinds == KINDS.index("key_value")
    bare = key_value & ~(rows.tokens == remember).any(axis=1)
    assert 0 < bare.sum() < 0.4 * key_value.sum()
    assert (rows.tokens[bare] == recall).any(axis=1).all()
    assert rows.answer_weight[bare].sum() == 0
    assert (rows.answer_weight[key_value & ~bare].sum(axis=1) > 0).all()


def test_text_rows_start_anywhere_and_count_fully(started: Pretraining, source: RowSource) -> None:
    rows = source.batch(10)
    text = rows.kinds == KINDS.index("text")
    assert (rows.text_weight[text] == 1).all()
    assert (rows.answer_weight[text] == 0).all()
    assert (rows.tokens[text, 0] != started.tokenizer.bos_token_id).all()
    assert len(set(rows.tokens[text, 0].tolist())) > 20


def test_repeats_repeat_and_only_repeats_are_asked(source: RowSource) -> None:
    rows = source.batch(10)
    for row in np.flatnonzero(rows.kinds == KINDS.index("repeat")):
        tokens, asked = rows.tokens[row], rows.answer_weight[row] > 0
        period = int(np.flatnonzero(asked)[0]) - 1
        assert np.array_equal(tokens[period:], tokens[:-period])
        assert asked[period + 1 :].all()
