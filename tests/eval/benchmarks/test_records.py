"""Reading published files: every form gives the same records, one at a time, and whatever is broken is told in one line."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_core.errors import DataError
from cortex_core.eval.benchmarks import records as module
from cortex_core.eval.benchmarks.records import Part, Record, members, records

ROWS = [{"text": "one"}, {"text": 'two "quoted" \\ [}],{', "more": [1, {"deep": None}]}, {"text": "drei\u2028é"}]


def values(path: Path, member: str | None = None) -> list[dict]:
    return [record.values for record in records(Part(path, member))]


def refusal(path: Path, member: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        values(path, member)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_forms_give_the_same_records(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    (tmp_path / "a.jsonl").write_text(f"\n{lines}\n\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2), encoding="utf-8-sig")
    (tmp_path / "bare").write_text(lines, encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "a.jsonl", "data/a.jsonl")
    for path, member in (("a.jsonl", None), ("a.json", None), ("bare", None), ("a.zip", "data/a.jsonl")):
        assert values(tmp_path / path, member) == ROWS
    parquet.write_table(
        arrow.Table.from_pylist([{"text": row["text"], "many": ["x"]} for row in ROWS]), tmp_path / "a.parquet"
    )
    assert values(tmp_path / "a.parquet") == [{"text": row["text"], "many": ["x"]} for row in ROWS]


documents = st.lists(
    st.dictionaries(
        st.text(max_size=5),
        st.one_of(
            st.text(max_size=40), st.integers(), st.booleans(), st.none(), st.lists(st.text(max_size=9), max_size=3)
        ),
        max_size=4,
    ),
    max_size=5,
)


@given(documents, st.integers(1, 60), st.sampled_from([None, 3]), st.booleans())
def test_a_list_is_read_whatever_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict], block: int, indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("blocks") / "x.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_CHARACTERS", block)
        assert values(path) == rows


@pytest.mark.parametrize("cut", [1, 5, 12, 30])
def test_a_list_that_breaks_off_gives_what_is_whole_and_then_says_where(tmp_path: Path, cut: int) -> None:
    text = json.dumps([{"text": f"number {n}"} for n in range(3)])
    (tmp_path / "x.json").write_text(text[:-cut], encoding="utf-8")
    found, whole = [], text[:-cut].count("}")
    assert 1 <= whole <= 3
    with pytest.raises(DataError, match=rf"x\.json record {whole + 1} breaks off.*download it again"):
        found.extend(records(Part(tmp_path / "x.json")))
    assert [record.values["text"] for record in found] == [f"number {n}" for n in range(whole)]


def test_a_long_record_is_not_scanned_again_for_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans, real = [], json.JSONDecoder.raw_decode
    monkeypatch.setattr(json.JSONDecoder, "raw_decode", lambda self, s, idx: scans.append(idx) or real(self, s, idx))
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 16)
    (tmp_path / "x.json").write_text(json.dumps([{"text": "x" * 16_000}, {"text": "y"}]))
    assert len(values(tmp_path / "x.json")) == 2
    assert len(scans) <= 16, "the file has a thousand blocks; they double"


def test_nothing_is_read_ahead(tmp_path: Path) -> None:
    """A gigabyte behind the first record costs nothing until it is asked for."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "first"}\n{"text": broken', encoding="utf-8")
    reader = records(Part(path))
    assert next(reader) == Record(f"{path} line 1", {"text": "first"})
    with pytest.raises(DataError, match="line 2 is not JSON"):
        next(reader)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", b'{"a": 1}\n\n{"a": }\n', "x.jsonl line 3 is not JSON: Expecting value"),
        ("x.jsonl", b"[1, 2]\n", "x.jsonl line 1 is not a JSON object"),
        ("x.json", b'[{"a": 1}, 7]', "x.json record 2 is not a JSON object"),
        ("x.json", b'[{"a": 1}, {"b" 2}' + b" " * 40 + b"]", "x.json record 2 is not JSON: Expecting ':' delimiter"),
        ("x.json", b'{"a": "\xff"}', "x.json is not UTF-8 text"),
        ("x.jsonl", b'{"a": ' + b"[" * 100_000, "x.jsonl line 1 is not JSON: nested too deeply"),
        ("x.json", b'[{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]", "x.json record 1 is not JSON: nested too deeply"),
        ("x.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "x.jsonl line 1 is not JSON: Exceeds the limit"),
        ("x.parquet", b"PAR1 no", "x.parquet is not a whole parquet file"),
    ],
    ids=range(9),
)  # fmt: skip
def test_what_is_broken_is_told_with_its_place(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert says in refusal(tmp_path / name)


def test_a_record_may_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RECORD_CHARACTERS", 1000)
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 64)
    (tmp_path / "x.jsonl").write_text('{"a": "' + "x" * 2000 + '"}')
    (tmp_path / "x.json").write_text('[{"a": "' + "x" * 5000 + '"}]')
    assert "x.jsonl line 1 is longer than 1000 characters" in refusal(tmp_path / "x.jsonl")
    assert "x.json record 1 is longer than 1000 characters" in refusal(tmp_path / "x.json")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "x.json")


# --- archives -----------------------------------------------------------------------------------------------------------


def test_members_are_listed_in_order_without_what_macos_adds(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("data/b.jsonl", "data/a.jsonl", "__MACOSX/data/._a.jsonl", "data/"):
            archive.writestr(name, "")
    assert [part.member for part in members(tmp_path / "x.zip")] == ["data/a.jsonl", "data/b.jsonl"]


def test_nothing_is_unpacked_wherever_a_member_points(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with zipfile.ZipFile(inside / "x.zip", "w") as archive:
        archive.writestr("../../escaped.jsonl", '{"a": 1}\n')
    (part,) = members(inside / "x.zip")
    assert [record.values for record in records(part)] == [{"a": 1}]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["inside", "x.zip"]


def test_a_broken_archive_is_told(tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"no\.zip is not a whole zip archive"):
        members(tmp_path / "no.zip")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jsonl", '{"a": "' + "z" * 100 + '"}\n')
    raw = bytearray((tmp_path / "x.zip").read_bytes())
    raw[raw.index(b"zzzz")] ^= 1
    (tmp_path / "x.zip").write_bytes(raw)
    assert "Bad CRC-32" in refusal(tmp_path / "x.zip", "a.jsonl")
    for flags in (raw.index(b"PK\x03\x04") + 6, raw.index(b"PK\x01\x02") + 8):
        raw[flags] |= 1  # encrypted
    (tmp_path / "x.zip").write_bytes(raw)
    assert "cannot be unpacked" in refusal(tmp_path / "x.zip", "a.jsonl")


# --- fields -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "value", "says"),
    [
        ("text", 3, "f line 1 has no text in 'x'"),
        ("text", None, "f line 1 has no text in 'x'"),
        ("text", "a\ud800", "half of a surrogate pair"),
        ("texts", "a", "has str in 'x', expected a list of texts"),
        ("texts", ["a", 1], "f line 1 has no text in 'x'"),
        ("number", "3", "no whole number in 'x'"),
        ("number", True, "no whole number in 'x'"),
    ],
)
def test_fields_are_checked(method: str, value: object, says: str) -> None:
    with pytest.raises(DataError, match=says):
        getattr(Record("f line 1", {"x": value}), method)("x")


def test_fields_are_given_as_they_are() -> None:
    record = Record("f", {"a": "", "b": ["x", ""], "c": None, "d": 4})
    assert (record.text("a"), record.texts("b"), record.texts("c"), record.texts("e"), record.number("d")) == (
        "",
        ("x", ""),
        (),
        (),
        4,
    )
