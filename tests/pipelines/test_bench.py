"""`cortex bench` as a user meets it: what it writes, how it goes on after an interruption, what it refuses."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from cortex_core.eval.benchmarks import results
from pipelines import bench, cli
from tests import restless, tiny
from tests.test_architecture import HEAVY, ROOT, imported_by

PUBLISHED = Path(__file__).parents[1] / "eval/benchmarks/published"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a small model whose memory matters."""
    return restless.save(tmp_path_factory.mktemp("restless"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr for wrong input."""
    before = sorted(Path().rglob("*"))
    assert cli.main(["bench", *arguments]) == 2
    line, *more = capsys.readouterr().err.splitlines()
    assert not more and line.startswith("cortex: ")
    assert sorted(Path().rglob("*")) == before, "wrong input must write nothing"
    return line.removeprefix("cortex: ")


def lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def shipped(model: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model in the place of the one that ships."""
    monkeypatch.setattr(bench, "MODEL", model[1])
    monkeypatch.setattr(bench, "SIDECARS", model[3])


@pytest.mark.usefixtures("shipped")
def test_one_flag_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    """Without naming a model; the answers lie where the command says."""
    assert cli.main(["bench", "babilong", "--data", str(PUBLISHED), "--task", "qa1", "--length", "0k"]) == 0
    out = capsys.readouterr().out
    assert "BABILong: 3 examples" in out and "runs/bench/babilong/summary.json" in out
    answers = lines("runs/bench/babilong/answers.jsonl")
    assert [row["key"] for row in answers] == ["qa1/0k/0", "qa1/0k/1", "qa1/0k/2"]
    first = answers[0]
    assert first["answers"] == ["office"] and first["question"] == "Where is John? "
    assert set(first["scores"]) == {"label"} and first["prompt_tokens"] > first["bare_tokens"] == tiny.SEGMENT
    rows = json.loads(Path("runs/bench/babilong/summary.json").read_text())
    assert [(row["task"], row["length"], row["measure"], row["n"]) for row in rows] == [("qa1", "0k", "label", 3)]
    assert rows == results.summarize(answers)
    with Path("runs/bench/babilong/summary.csv").open() as file:
        (line,) = csv.DictReader(file)
    (packed,) = parquet.read_table("runs/bench/babilong/summary.parquet").to_pylist()
    for flat in (packed, line):
        assert (flat["task"], int(flat["n"]), flat["measure"]) == ("qa1", 3, "label")
        for side in ("memory", "bare", "difference"):
            for part, name in (("value", side), ("low", f"{side}_low"), ("high", f"{side}_high")):
                assert float(flat[name]) == rows[0][side][part]
    assert len(packed) == 4 + 3 * 3


def test_the_bare_model_and_the_memory_are_shown_side_by_side(
    capsys: pytest.CaptureFixture[str], model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was answered before is scored as it stands: one right answer of two with the memory, none without."""
    rows = [("qa8/0k/0", 1.0), ("qa8/0k/1", 0.0)]
    command = ["bench", "babilong", "--data", str(PUBLISHED), "--task", "qa8", "--out", "o", *model]
    assert cli.main(command) == 0
    found = lines("o/answers.jsonl")
    changed = [
        row | {"scores": {"label": {"memory": memory, "bare": 0.0}}}
        for row, (_, memory) in zip(found, rows, strict=True)
    ]
    Path("o/answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    capsys.readouterr()
    assert cli.main(command) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  qa8"))
    assert line.split() == [
        "qa8",
        "0k",
        "label",
        "2",
        "0.500",
        "0.09…0.91",
        "0.000",
        "0.00…0.66",
        "0.500",
        *line.split()[9:],
    ]
    assert len(line.split()) == 10


@pytest.mark.parametrize(
    ("name", "count", "tasks"),
    [
        ("longbench", 5, {"hotpotqa", "lcc_e", "multifieldqa_zh", "trec"}),
        ("babilong", 7, {"qa1", "qa8"}),
        ("longmemeval", 3, {"single-session-user", "multi-session", "abstention"}),
    ],
)
def test_all_three_benchmarks(
    capsys: pytest.CaptureFixture[str], model: list[str], name: str, count: int, tasks: set[str]
) -> None:
    assert cli.main(["bench", name, "--data", str(PUBLISHED), "--out", "o", *model]) == 0
    answers, out = lines("o/answers.jsonl"), capsys.readouterr().out
    assert len(answers) == count and {row["task"] for row in answers} == tasks
    assert any(row["memory"] != row["bare"] for row in answers), "what was read matters"
    assert all(
        0 <= pair[side] <= 1 for row in answers for pair in row["scores"].values() for side in ("memory", "bare")
    )
    for task in tasks:
        assert f"  {task} " in out
    hypotheses = sorted(path.name for path in Path("o").glob("hypotheses*"))
    assert hypotheses == (["hypotheses-oracle-bare.jsonl", "hypotheses-oracle.jsonl"] if name == "longmemeval" else [])
    if hypotheses:
        assert [row["question_id"] for row in lines("o/hypotheses-oracle.jsonl")] == [
            "5a1c77e0",
            "gpt4_88e0c1d2",
            "91b3ce40_abs",
        ]


def test_what_is_answered_is_not_asked_again(capsys: pytest.CaptureFixture[str], model: list[str]) -> None:
    command = ["bench", "babilong", "--data", str(PUBLISHED), "--out", "o", *model]
    assert cli.main([*command, "--limit", "1"]) == 0
    marked = [row | {"memory": "marked"} for row in lines("o/answers.jsonl")]
    assert [row["key"] for row in marked] == ["qa1/0k/0", "qa1/1k/0", "qa8/0k/0"]
    Path("o/answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "3 of them answered before" in capsys.readouterr().out
    answers = lines("o/answers.jsonl")
    assert answers[:3] == marked and len({row["key"] for row in answers}) == len(answers) == 7
    assert cli.main([*command, "--task", "qa8"]) == 0
    assert json.loads(Path("o/summary.json").read_text())[0]["n"] == 2, "the summary is of what was asked for"
    assert lines("o/answers.jsonl") == answers


def test_an_interrupted_run_goes_on_where_it_stopped(
    capsys: pytest.CaptureFixture[str], model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["bench", "babilong", "--data", str(PUBLISHED), *model]
    assert cli.main([*command, "--out", "whole"]) == 0
    written, add = [], results.add_answer

    def stop_after_two(folder: Path, row: dict[str, Any]) -> None:
        add(folder, row)
        written.append(row["key"])
        if len(written) == 2:
            raise KeyboardInterrupt

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(results, "add_answer", stop_after_two)
        assert cli.main([*command, "--out", "o"]) == 130
    err = capsys.readouterr().err
    assert err.startswith("\ncortex: interrupted; to resume: cortex bench babilong --data ") and err.endswith(
        "--out o\n"
    )
    with Path("o/answers.jsonl").open("a") as file:
        file.write('{"key": "qa1/0k/2", "half a li')  # as a kill leaves it
    assert not Path("o/summary.json").exists()
    assert cli.main([*command, "--out", "o"]) == 0
    for name in (results.ANSWERS, results.SUMMARY):
        assert Path("o", name).read_bytes() == Path("whole", name).read_bytes(), name


def test_answers_of_another_model_or_other_data_are_not_mixed(
    capsys: pytest.CaptureFixture[str], model: list[str], tmp_path: Path
) -> None:
    command = ["bench", "babilong", "--data", str(PUBLISHED), "--limit", "1", "--task", "qa8"]
    assert cli.main([*command, *model, "--out", "o"]) == 0
    other = restless.model()
    other.sidecars.requires_grad_(False)
    next(iter(other.sidecars.parameters())).add_(1)
    other.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    assert cli.main([*command, *model[:3], str(tmp_path / "other"), "--out", "o"]) == 2
    assert "holds answers with sidecars = " in capsys.readouterr().err
    assert cli.main([*command, *model, "--window", "64", "--out", "o"]) == 2
    assert "holds answers with window = 32, not 64: give another --out" in capsys.readouterr().err
    command[3] = str(PUBLISHED / "babilong")
    assert cli.main([*command, *model, "--out", "o"]) == 2
    assert "holds answers with data = " in capsys.readouterr().err
    assert len(lines("o/answers.jsonl")) == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["required: NAME, --data", "cortex bench --help"]),
        (["babilong"], ["required: --data", "cortex bench --help"]),
        (["babylong", "--data", "x"], ["argument NAME", "'babylong'", "'babilong'"]),
        (["babilong", "--data", "no/such"], ["--data = no/such: no such file or folder", "hub:RMT-team/babilong"]),
        (["longbench", "--data", "."], ["--data = .: has no file named as LongBench is published"]),
        (["longbench", "--data", "hub:nobody/nothing"], ["hub:nobody/nothing: not in the cache", "give a folder"]),
        (["babilong", "--data", str(PUBLISHED), "--limit", "0"], ["argument --limit: '0' must be a whole number, at least 1"]),
        (["babilong", "--data", str(PUBLISHED), "--window", "x"], ["argument --window: 'x' must be a whole number"]),
        (["babilong", "--data", str(PUBLISHED), "--task", "qa1,qa21"], ["--task qa21: BABILong has no such task. It has: qa1, qa2, qa3,"]),
        (["babilong", "--data", str(PUBLISHED), "--task", "qa3"], ["--task qa3", "has none of BABILong. It has: qa1, qa8"]),
        (["babilong", "--data", str(PUBLISHED), "--model", "some/model"], ["--model some/model: needs --sidecars", "cortex train"]),
        (["babilong", "--data", str(PUBLISHED), "--sidecars", "none"], ["--sidecars none: no such folder. Give what cortex train wrote"]),
        (["babilong", "--data", str(PUBLISHED), "--sidecars", "."], ["--sidecars .: has no cortex.json. Give what cortex train wrote"]),
        (["babilong", "--data", str(PUBLISHED), "--model", "./none", "--sidecars", "x"], ["--model ./none: no such folder"]),
        (["babilong", "--data", str(PUBLISHED), "--window", "4096"], ["--window 4096: must be at least 2 and at most 64"]),
        (["babilong", "--data", str(PUBLISHED), "--out", __file__], ["test_bench.py is a file. Give another folder"]),
    ],
    ids=range(16),
)  # fmt: skip
@pytest.mark.usefixtures("shipped")
def test_wrong_input_gets_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]) -> None:
    line = refused(capsys, *arguments)
    assert [part for part in parts if part not in line] == [], line


def test_broken_data_are_told_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: list[str]
) -> None:
    path = tmp_path / "hotpotqa.jsonl"
    path.write_text((PUBLISHED / "longbench/data/hotpotqa.jsonl").read_text() + '{"_id": "x", "answers": ["a"]}\n')
    line = refused(capsys, "longbench", "--data", str(path), "--model", "no/model", *model[2:])
    assert line.startswith(f"{path} line 3 has no ")


def test_help_teaches_and_imports_nothing_that_takes_time() -> None:
    code, modules = imported_by("bench", "--help")
    assert code == 0 and not sorted(modules & (HEAVY | {"pipelines.bench", "rich"}))
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "bench", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    for word in (
        "hub:RMT-team/babilong",
        "hub:THUDM/LongBench",
        "LongBench/data.zip",
        "answers.jsonl",
        "--limit",
        "last window",
    ):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize(
    "options",
    [
        ["--data", "no/such"],
        ["--data", str(PUBLISHED), "--task", "none"],
        ["--data", str(PUBLISHED), "--length", "m"],
        ["--data", str(PUBLISHED), "--model", "a/model"],
        ["--data", str(PUBLISHED), "--model", "./none", "--sidecars", "none"],
        ["--data", str(PUBLISHED), "--sidecars", "none"],
        ["--data", str(PUBLISHED), "--out", __file__],
    ],
    ids=" ".join,
)
def test_what_is_wrong_without_a_model_imports_none(options: list[str]) -> None:
    code, modules = imported_by("bench", "longmemeval", *options)
    assert code == 2 and not sorted(modules & HEAVY)


def test_ctrl_c_ends_it_at_once_and_keeps_the_answers(model: list[str], tmp_path: Path) -> None:
    """A real signal to a real process that is reading."""
    rows = json.loads((PUBLISHED / "babilong/data/qa1/0k.json").read_text())
    rows.append(rows[0] | {"input": rows[0]["input"] * 100_000})
    (tmp_path / "qa1").mkdir()
    (tmp_path / "qa1/0k.json").write_text(json.dumps(rows))
    command = [
        sys.executable,
        "-m",
        "pipelines",
        "bench",
        "babilong",
        "--data",
        str(tmp_path / "qa1"),
        "--out",
        str(tmp_path / "o"),
        *model,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    answers = tmp_path / "o/answers.jsonl"
    try:
        while process.poll() is None and not (answers.is_file() and len(answers.read_text().splitlines()) == 3):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted; to resume: cortex bench babilong" in err and "Traceback" not in err
    assert len(lines(answers)) == 3
