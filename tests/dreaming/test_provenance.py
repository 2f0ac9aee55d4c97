"""The table of dreams: what is written, what a crash leaves, what is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_core.config import JudgeConfig
from cortex_core.dreaming import provenance
from cortex_core.dreaming.judge import judge
from cortex_core.dreaming.provenance import append, read, row, table
from cortex_core.errors import ConfigError, DataError
from tests.dreaming.scenes import dream, memory, verdict


def rows(*tickets: int) -> list[dict]:
    dreams = [dream(ticket) for ticket in tickets]
    verdicts, _ = judge(dreams, {memory(0).cue: memory(0).answer, memory(1).cue: (9,)}, JudgeConfig(set_bits=12))
    return [
        row(d, v, lambda ids: " ".join(f"<{token}>" for token in ids)) for d, v in zip(dreams, verdicts, strict=True)
    ]


def test_a_row_tells_everything() -> None:
    found = rows(1)[0]
    expected = dream(1)
    assert found["id"] == expected.id and found["walk"] == [1, 2] and found["seed"] == 0
    assert found["prompt"] == list(expected.prompt) and found["answer_text"] == "<301>"
    assert not found["passed"] and found["reasons"] == ["wrong_answer"] and found["scores"]["margin_nats"] == 2.0
    assert "answer_text" not in row(expected, verdict(True, expected.id))


def test_a_verdict_on_another_dream_is_refused() -> None:
    with pytest.raises(ConfigError, match="pair them in order"):
        row(dream(1), verdict(True, "v1/0/2"))


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "dreams.jsonl"
    append(path, rows(0, 1))
    append(path, [])
    append(path, rows(2))
    assert read(path) == rows(0, 1) + rows(2)
    assert all(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


@given(cut=st.integers(1, 200))
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "dreams.jsonl"
    append(path, rows(0, 1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert read(path) == rows(0)
    append(path, rows(2))
    assert read(path) == rows(0) + rows(2)


def test_a_torn_line_longer_than_what_is_looked_at_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_BLOCK", 7)
    path = tmp_path / "dreams.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": ' + b"1" * 40)
    append(path, [{"id": 2}])
    assert read(path) == [{"id": 1}, {"id": 2}]
    path.write_bytes(b"1" * 40)
    append(path, [{"id": 3}])
    assert read(path) == [{"id": 3}]


@pytest.mark.parametrize("wrong", [b"nonsense", b"[1]", b"\xff"])
def test_damage_elsewhere_is_refused_by_line(tmp_path: Path, wrong: bytes) -> None:
    (tmp_path / "dreams.jsonl").write_bytes(b'{"id": 1}\n' + wrong + b'\n{"id": 2}\n')
    with pytest.raises(DataError, match=r"dreams.jsonl, line 2: .*take it out"):
        read(tmp_path / "dreams.jsonl")
    with pytest.raises(DataError, match="there is no such file"):
        read(tmp_path / "none.jsonl")


def test_a_table_is_read_by_people() -> None:
    lines = table(
        rows(0, 1), ("ticket", "answer_text", "passed", "reasons", "filler_nats", "corpus_novelty")
    ).splitlines()
    assert lines[0].split() == ["ticket", "answer_text", "passed", "reasons", "filler_nats", "corpus_novelty"]
    assert lines[1].split() == ["0", "<300>", "yes", "3.00"]
    assert lines[2].split() == ["1", "<301>", "no", "wrong_answer", "3.00"]


def test_a_cell_is_one_line_and_keeps_its_end() -> None:
    shown = table([{"id": "a\nb\x1b[0m" + "x" * 60 + "question"}], ("id",), width=20).splitlines()
    assert len(shown) == 2 and shown[1].endswith("question") and len(shown[1]) == 20
    assert "\x1b" not in table([{"id": "\x1b[0m"}], ("id",))
    with pytest.raises(ConfigError, match="at least 2 characters"):
        table([], width=1)
