"""The scoreboard: what its rows look like, what the command answers, and how ratios and processes are measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import child, kills, pairs, train_kills
from tests.benchmarks.row import Row, table
from tests.benchmarks.rows import (
    continual,
    far,
    gpu,
    optim,
    ranks,
    scales,
    seeds,
    sleep,
    sweep,
    tasks,
    wallclock,
    worlds,
)
from tests.benchmarks.rows.demo import Demo
from tests.benchmarks.scoreboard import MEASUREMENTS, Measurement, chosen, main

FIELDS = ["name", "value", "goal", "better", "unit", "n", "low", "high", "seconds"]
ALL = [name for measurement in MEASUREMENTS for name in measurement.names]


def row(name: str = "speed", value: float = 2.0, **fields: Any) -> Row:
    return Row(**{"goal": 1.0, "better": "higher", "unit": "x", "n": 3} | fields, name=name, value=value)


# --- rows and the table ----------------------------------------------------------------------------------------------


def test_a_row_is_one_line_of_json() -> None:
    line = row(low=1.5, high=2.5, seconds=0.123).json()
    assert "\n" not in line
    assert list(json.loads(line)) == FIELDS
    assert json.loads(line) == {
        "name": "speed", "value": 2.0, "goal": 1.0, "better": "higher", "unit": "x", "n": 3, "low": 1.5, "high": 2.5, "seconds": 0.1,
    }  # fmt: skip


def test_what_is_not_known_is_null_and_not_nan() -> None:
    got = json.loads(row(low=math.nan, high=math.inf).json(), parse_constant=pytest.fail)
    assert got["low"] is None and got["high"] is None


@pytest.mark.parametrize(
    ("value", "goal", "better", "met"),
    [
        (0.98, 0.98, "higher", True),
        (0.97, 0.98, "higher", False),
        (1.05, 1.05, "lower", True),
        (1.06, 1.05, "lower", False),
        (5.0, None, "lower", None),
        (math.nan, 1.0, "lower", False),
    ],
)
def test_a_goal_is_a_bound(value: float, goal: float | None, better: Any, met: bool | None) -> None:
    assert row(value=value, goal=goal, better=better).met is met


def test_the_table_is_aligned_and_says_what_was_missed() -> None:
    lines = table([row(), row("memory", 3.0, better="lower", low=2.0, high=4.0), row("bytes", goal=None)]).splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    assert [line.split("|")[-2].strip() for line in lines[2:5]] == ["met", "missed", ""]
    assert "≤ 1" in lines[3] and "2 to 4" in lines[3]
    assert lines[-1] == "1 of 2 goals met, 1 rows without a goal."


# --- the command -----------------------------------------------------------------------------------------------------


def test_names_are_unique_and_every_measurement_says_how() -> None:
    assert len(set(ALL)) == len(ALL)
    assert not set(ALL) & {measurement.group for measurement in MEASUREMENTS}
    for measurement in MEASUREMENTS:
        first = (measurement.measure.__doc__ or "").splitlines()[0]
        assert first.endswith(".") and len(first) > 30, measurement.names


def test_list_names_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert sorted(name for name in out.split() if name in set(ALL)) == sorted(ALL)
    assert "wallclock (only when named)" in out


def test_what_needs_no_model_imports_none() -> None:
    code = "import sys; from tests.benchmarks.scoreboard import main; print(main(['--list']), {*sys.modules} & {'torch', 'ray'})"
    done = subprocess.run([sys.executable, "-c", code], cwd=child.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 set()"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recall_txt_256"], "recall_txt_256: no such row, did you mean recall_text_256? --list names all"),
        (["recall_min,qqq"], "qqq: no such row? --list names all"),
        (["--nope"], "unrecognized arguments: --nope. See --help"),
        (["--run", "no/such/run"], "no/such/run holds no run: run `make demo` first"),
    ],
    ids=str,
)
def test_wrong_input_is_answered_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("scoreboard: ") and len(err.splitlines()) == 1
    assert said in err


def test_an_unfinished_or_damaged_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for state, said in (('{"state": "KILLED"}', "is not finished"), ("{", "run.json is damaged")):
        (tmp_path / "run.json").write_text(state)
        assert main(["recall_min", "--run", str(tmp_path)]) == 2
        assert said in (err := capsys.readouterr().err) and "make demo" in err


def test_without_names_everything_but_the_slow_groups_is_measured() -> None:
    slow = (wallclock, far, seeds, ranks, tasks, worlds, optim, continual, scales)
    opt_in = {
        *(name for rows in slow for name in rows.ROWS),
        *gpu.KERNEL_ROWS,
        *gpu.MODEL_ROWS,
        "long_files_bits_saved_percent",
        *sweep.KILLED_ROWS,
        sweep.OVERHEAD_ROW,
        *kills.ROWS,
        *train_kills.ROWS,
        *sleep.DREAM_ROWS,
        *scales.PREDICTION_ROWS,
    }
    assert chosen([], MEASUREMENTS) == set(ALL) - opt_in
    assert chosen(["wallclock,recall_min", "chunk_vs_oracle_speedup"], MEASUREMENTS) == {
        *wallclock.ROWS, "recall_min", "chunk_vs_oracle_speedup",
    }  # fmt: skip


def fake(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Three rows."""
    yield from (row(name, seconds=seconds) for name, seconds in (("one", 0.0), ("two", 7.0), ("three", 0.0)))


def broken(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Gives one row, then breaks."""
    yield row("four")
    raise RuntimeError("the machine said no")


FAKES = (
    Measurement(broken, ("four", "five"), "fakes", needs_run=False),
    Measurement(fake, ("one", "two", "three"), "fakes", needs_run=False),
)


def test_rows_are_printed_as_lines_and_as_a_table_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all.json"
    assert main(["one", "two", "--out", str(out)], FAKES) == 0
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [line["name"] for line in lines] == ["one", "two"]
    assert lines[1]["seconds"] == 7.0
    assert "| two" in said and "2 of 2 goals met" in said
    document = json.loads(out.read_text())
    assert document["rows"] == lines and document["schema"] == "cortex-scoreboard/1"


def test_a_row_that_cannot_be_measured_costs_no_other_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], FAKES) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line)["name"] for line in out.splitlines() if line.startswith("{")] == ["four", "one", "two", "three"]  # fmt: skip
    assert "the machine said no" in err and "scoreboard: five could not be measured" in err


# --- how it is measured ----------------------------------------------------------------------------------------------


def test_ratios_take_turns() -> None:
    turns: list[str] = []
    found = pairs.ratios(lambda: turns.append("a"), lambda: turns.append("b"), pairs=3, warm_up=1)
    assert len(found) == 3 and "".join(turns) == "baabbaab"


def test_the_interval_of_a_median_is_made_of_order_statistics() -> None:
    assert pairs.median([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0, 3)
    # P(Bin(9, 1/2) <= 1) = 10 / 512 <= 2.5 %, but not <= 2: the second smallest and the second largest.
    assert pairs.median([float(n) for n in range(1, 10)]) == (5.0, 2.0, 8.0, 9)


def test_a_fresh_process_returns_what_its_function_does() -> None:
    assert child.run("builtins:dict", a=1, b=[2]) == [{"a": 1, "b": [2]}]
    assert child.run("os:getenv", ranks=2, key="RANK") == ["0", "1"]
    assert child.run("os:getenv", variables={"CORTEX_X": "y"}, key="CORTEX_X") == ["y"]


def test_what_fails_in_a_fresh_process_is_said() -> None:
    with pytest.raises(RuntimeError, match=r"builtins:int failed in its own process \(exit 1\):(.|\n)*TypeError"):
        child.run("builtins:int", ranks=2, nothing=0)


def test_peak_memory_is_that_of_the_whole_tree(tmp_path: Path) -> None:
    held = "import time; held = b'x' * 200_000_000; time.sleep(2)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    seconds, peak_gb = wallclock._timed([sys.executable, "-c", code], tmp_path, watched=True)
    assert seconds >= 2 and 0.2 < peak_gb < 0.4
    with pytest.raises(RuntimeError, match=r"failed in a fresh clone \(exit 1\):(.|\n)*no such target"):
        wallclock._timed([sys.executable, "-c", "raise SystemExit('no such target')"], tmp_path, watched=False)
