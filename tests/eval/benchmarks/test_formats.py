"""The three published formats, on records written for these tests, and what a command line's --data may be."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from cortex_core.errors import ConfigError, DataError
from cortex_core.eval.benchmarks import babilong, longbench, longmemeval
from cortex_core.eval.benchmarks.example import Example, Place, Selection, by_size
from cortex_core.eval.benchmarks.measures import MEASURES
from cortex_core.eval.benchmarks.sources import BENCHMARKS, Catalogue, open_benchmark

PUBLISHED = Path(__file__).parent / "published"
EVERYTHING = Selection()


def found(name: str, data: Path | str = PUBLISHED, selection: Selection = EVERYTHING) -> dict[str, Example]:
    catalogue = open_benchmark(name, str(data), selection)
    examples = {example.key: example for example in catalogue.examples()}
    assert catalogue.keys() == list(examples)
    return examples


def refusal(name: str, data: Path | str, selection: Selection = EVERYTHING, kind: type[ValueError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        open_benchmark(name, str(data), selection).keys()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- LongBench ----------------------------------------------------------------------------------------------------------


def test_longbench_records() -> None:
    examples = found("longbench")
    assert [(e.task, e.length) for e in examples.values()] == [
        ("hotpotqa", "0-4k"), ("hotpotqa", "8k+"), ("lcc_e", "0-4k"), ("multifieldqa_zh", "0-4k"), ("trec", "4-8k"),
    ]  # fmt: skip
    first = examples["hotpotqa/b5f1d0c7e94a4b7f8a62c3d81e05f914"]
    assert first.question == "Which river flows past the mill that Ines Aldou built?"
    assert first.answers == ("the Tesk", "River Tesk") and first.classes == ()
    assert len(first.context) == 1 and first.context[0].startswith("Passage 1:\nThe Carrow Mill")
    (trec,) = (e for e in examples.values() if e.task == "trec")
    assert trec.classes == ("Number", "Person", "Location", "Other location")


def test_longbench_tasks_are_the_published_ones() -> None:
    assert len(longbench.TASKS) == 21 + 13
    assert longbench.TASKS["samsum_e"] is longbench.TASKS["samsum"]
    first_line = {name for name, task in longbench.TASKS.items() if task.first_line}
    assert first_line == {"trec", "triviaqa", "samsum", "lsht", "trec_e", "triviaqa_e", "samsum_e"}
    by_measure = {
        m: sorted(n for n, t in longbench.TASKS.items() if t.measures == (m,) and n[-2:] != "_e") for m in MEASURES
    }
    assert by_measure["rouge_l"] == ["gov_report", "multi_news", "qmsum", "samsum"]
    assert by_measure["char_rouge_l"] == ["dureader", "vcsum"] and by_measure["char_f1"] == ["multifieldqa_zh"]
    assert by_measure["classes"] == ["lsht", "trec"] and by_measure["code"] == ["lcc", "repobench-p"]
    assert by_measure["numbers"] == ["passage_count", "passage_retrieval_en", "passage_retrieval_zh"]
    assert [longbench.length_of(size) for size in (0, 3999, 4000, 7999, 8000)] == [
        "0-4k",
        "0-4k",
        "4-8k",
        "4-8k",
        "8k+",
    ]


def test_longbench_as_archive_or_parquet_is_the_same(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (PUBLISHED / "longbench/data").iterdir():
            archive.write(path, f"data/{path.name}")
    assert found("longbench", tmp_path / "data.zip") == found("longbench", tmp_path) == found("longbench")
    rows = [json.loads(line) for line in (PUBLISHED / "longbench/data/trec.jsonl").read_text().splitlines()]
    (tmp_path / "copy/trec").mkdir(parents=True)
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "copy/trec/test-00000-of-00001.parquet")
    assert found("longbench", tmp_path / "copy") == found("longbench", selection=Selection(("trec",)))


def test_a_longbench_file_of_any_name_says_what_it_is(tmp_path: Path) -> None:
    shutil.copy(PUBLISHED / "longbench/data/trec.jsonl", tmp_path / "mine.jsonl")
    assert [e.task for e in found("longbench", tmp_path / "mine.jsonl").values()] == ["trec"]
    (tmp_path / "mine.jsonl").write_text('{"dataset": "other", "_id": "1"}\n')
    assert "mine.jsonl line 1 has dataset 'other', unknown in LongBench" in refusal(
        "longbench", tmp_path / "mine.jsonl"
    )


# --- BABILong -----------------------------------------------------------------------------------------------------------


def test_babilong_records() -> None:
    examples = found("babilong")
    assert list(examples) == ["qa1/0k/0", "qa1/0k/1", "qa1/0k/2", "qa1/1k/0", "qa1/1k/1", "qa8/0k/0", "qa8/0k/1"]
    example = examples["qa8/0k/0"]
    assert example.answers == ("apple,milk",) and example.question == "What is Mary carrying? "
    assert example.context == ("Mary took the apple. Mary picked up the milk there.",)
    assert example.classes == babilong.LABELS["qa8"]
    assert babilong.LABELS.keys() == babilong.TASKS.keys() == {f"qa{n}" for n in range(1, 21)}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("data/qa1/10M.json", Place("qa1", "10M")),
        ("128k/qa10-00001-of-00002.parquet", Place("qa10", "128k")),
        ("qa2/4k-00000-of-00001.parquet", Place("qa2", "4k")),
        ("qa2_4k.jsonl", Place("qa2", "4k")),
        ("data/qa21/4k.json", None),
        ("data/qa1/readme.json", None),
        ("data/qa1/4k.csv", None),
    ],
)
def test_babilong_names(name: str, place: Place | None) -> None:
    assert babilong.place(name) == place


def test_babilong_in_several_parquet_files_is_numbered_through(tmp_path: Path) -> None:
    rows = json.loads((PUBLISHED / "babilong/data/qa1/0k.json").read_text())
    (tmp_path / "0k").mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows[:2]), tmp_path / "0k/qa1-00000-of-00002.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows[2:]), tmp_path / "0k/qa1-00001-of-00002.parquet")
    assert found("babilong", tmp_path) == found("babilong", selection=Selection(("qa1",), ("0k",)))


def test_a_babilong_file_needs_its_name(tmp_path: Path) -> None:
    shutil.copy(PUBLISHED / "babilong/data/qa1/0k.json", tmp_path / "mine.json")
    assert "mine.json: its name does not tell task and length" in refusal("babilong", tmp_path / "mine.json")
    assert len(found("babilong", PUBLISHED / "babilong/data/qa1/0k.json")) == 3


# --- LongMemEval --------------------------------------------------------------------------------------------------------


def test_longmemeval_records() -> None:
    examples = found("longmemeval")
    assert [(e.key, e.task) for e in examples.values()] == [
        ("oracle/5a1c77e0", "single-session-user"),
        ("oracle/gpt4_88e0c1d2", "multi-session"),
        ("oracle/91b3ce40_abs", "abstention"),
    ]
    boat = examples["oracle/5a1c77e0"]
    assert boat.context[0] == (
        "\n[2023/05/21 (Sun) 09:05]\nUser: I have painted my boat, the Petrel, green.\nAssistant: Green suits a boat.\n"
    ), "sessions in order of their dates"
    assert "lentil" in boat.context[1] and boat.date == "2023/06/02 (Fri) 10:15"
    assert examples["oracle/gpt4_88e0c1d2"].answers == ("3",), "an answer may be a number"
    closing = longmemeval.TASKS[boat.task].closing(boat)
    assert "[2023/06/02 (Fri) 10:15]" in closing and boat.question in closing


@pytest.mark.parametrize(
    ("name", "length"),
    [("longmemeval_s", "s"), ("longmemeval_m.json", "m"), ("d/longmemeval_s_cleaned.json", "s"), ("notes.json", None)],
)
def test_longmemeval_names(name: str, length: str | None) -> None:
    assert longmemeval.place(name) == (length and Place(length=length))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"question_type": "other"}, "question_type 'other', unknown in LongMemEval"),
        ({"haystack_dates": ["2023"]}, "not as many 'haystack_sessions' as 'haystack_dates'"),
        ({"haystack_sessions": [], "haystack_dates": []}, "at least one"),
        ({"haystack_sessions": [3, []]}, "has int in 'haystack_sessions', expected lists of turns"),
        ({"haystack_sessions": [["hello"], []]}, "has str in 'haystack_sessions', expected role and content"),
        ({"haystack_sessions": [[{"role": "user"}], []]}, "no text in 'content'"),
        ({"answer": None}, "no text in 'answer'"),
    ],
    ids=range(7),
)
def test_longmemeval_records_are_checked(tmp_path: Path, change: dict, says: str) -> None:
    rows = json.loads((PUBLISHED / "longmemeval_oracle.json").read_text())
    rows[0] |= change
    (tmp_path / "longmemeval_s.json").write_text(json.dumps(rows))
    line = refusal("longmemeval", tmp_path)
    assert "longmemeval_s.json record 1" in line and says in line


# --- what is selected ---------------------------------------------------------------------------------------------------


def test_only_what_is_asked_for() -> None:
    assert list(found("babilong", selection=Selection(("qa1",), ("1k",)))) == ["qa1/1k/0", "qa1/1k/1"]
    assert list(found("babilong", selection=Selection(limit=1))) == ["qa1/0k/0", "qa1/1k/0", "qa8/0k/0"]
    assert list(found("longmemeval", selection=Selection(("multi-session",)))) == ["oracle/gpt4_88e0c1d2"]
    assert len(found("longbench", selection=Selection(("hotpotqa",), ("8k+",)))) == 1


def test_files_that_are_not_selected_are_not_read(tmp_path: Path) -> None:
    shutil.copytree(PUBLISHED / "babilong", tmp_path / "b")
    (tmp_path / "b/data/qa8/0k.json").write_text("broken by an editor")
    assert len(found("babilong", tmp_path, Selection(("qa1",)))) == 5
    assert "qa8/0k.json record 1 is not JSON" in refusal("babilong", tmp_path)


def test_a_file_is_read_as_far_as_needed(tmp_path: Path) -> None:
    """Where its name says that all of it is of one task and length."""
    (tmp_path / "qa1").mkdir()
    text = (PUBLISHED / "babilong/data/qa1/0k.json").read_text()
    (tmp_path / "qa1/0k.json").write_text(text.rstrip()[:-1] + ', "broken by an editor"]')
    assert len(found("babilong", tmp_path, Selection(limit=3))) == 3
    assert "record 4 is not a JSON object" in refusal("babilong", tmp_path, Selection(limit=4))


def test_a_selection_that_is_not_there_is_told_what_is() -> None:
    line = refusal("longmemeval", "/", Selection(("qa1",)), ConfigError)
    assert line.startswith("--task qa1: LongMemEval has no such task. It has: abstention, knowledge-update, multi-")
    line = refusal("babilong", PUBLISHED, Selection(("qa1", "qa9")), ConfigError)
    assert line == f"--task qa9: {PUBLISHED} has none of BABILong. It has: qa1, qa8"
    line = refusal("longmemeval", PUBLISHED, Selection(lengths=("s",)), ConfigError)
    assert "--length s" in line and "It has: oracle" in line
    assert "is selected, or in it" in refusal("babilong", PUBLISHED, Selection(("qa8",), ("1k",)))


def test_what_lies_there_twice_is_read_once(tmp_path: Path) -> None:
    shutil.copytree(PUBLISHED / "longbench", tmp_path, dirs_exist_ok=True)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/trec.jsonl", "never read")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/qasper.jsonl").write_text("never read either")
    assert found("longbench", tmp_path) == found("longbench")


def test_an_id_that_comes_again_is_asked_again(tmp_path: Path) -> None:
    line = (PUBLISHED / "longbench/data/trec.jsonl").read_text()
    (tmp_path / "trec.jsonl").write_text(line * 3)
    name = json.loads(line)["_id"]
    assert list(found("longbench", tmp_path)) == [f"trec/{name}", f"trec/{name}#2", f"trec/{name}#3"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_data_that_are_not_there(tmp_path: Path, name: str) -> None:
    assert f"no such file or folder. Give what you have downloaded, or hub:{BENCHMARKS[name].hub}" in refusal(
        name, tmp_path / "x"
    )
    assert "has no file named as" in refusal(name, tmp_path)
    (tmp_path / "x.csv").write_text("")
    assert "is not one of .json, .jsonl, .parquet, .zip, or a folder" in refusal(name, tmp_path / "x.csv")


def test_names_sort_by_size() -> None:
    assert sorted(["1M", "16k", "4k", "10M", "0k"], key=by_size) == ["0k", "4k", "16k", "1M", "10M"]
    assert sorted(["qa10", "qa2", "8k+", "0-4k", "s"], key=by_size) == ["0-4k", "8k+", "qa2", "qa10", "s"]


def test_a_question_may_have_braces() -> None:
    example = Example("k", "k", "lcc", "0-4k", ("x",), "{date} {question} {0} %s", ("a",), date="today")
    assert longbench.TASKS["lcc"].closing(example) == "{date} {question} {0} %s"


def test_a_catalogue_is_read_again_from_the_start() -> None:
    catalogue = open_benchmark("babilong", str(PUBLISHED), Selection(limit=1))
    assert isinstance(catalogue, Catalogue)
    assert [e.key for e in catalogue.examples()] == [e.key for e in catalogue.examples()] == catalogue.keys()
