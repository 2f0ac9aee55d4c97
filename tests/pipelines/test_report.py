from __future__ import annotations

import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from cortex_core.errors import DataError
from cortex_core.intervals import wilson
from pipelines.report import load_evaluation, print_summary, write_report
from pipelines.report_page import findings

FILES = {"evaluation.json", "evaluation.csv", "evaluation.parquet", "reach.png", "report.html"}
PICTURES = {"usage.png", "training.png"}
HISTORY = [{"step": 10 * i, "loss": 3.0 / i, "accuracy": i / 20, "tokens_per_s": 2e4} for i in range(1, 11)]


def evaluation(**changes: Any) -> dict[str, Any]:
    rows = []
    for filler, right in (
        ("text", {0: 199, 256: 197, 16384: 196}),
        ("random", {0: 198, 256: 195, 16384: 189}),
    ):
        for gap, memory in ((gap, memory) for gap in right for memory in ("on", "off")):
            low, high, accuracy = wilson(right[gap] if memory == "on" else (198 if gap == 0 else 9), 200)
            rows.append({"task": "key_value", "filler": filler, "gap_tokens": gap, "memory": memory,
                         "accuracy": accuracy, "n": 200, "low": low, "high": high})  # fmt: skip
    return {
        "schema": 1, "run": "demo", "created": "2026-03-04T10:11:12Z",
        "config": {"name": "demo", "training": {"steps": 600}}, "versions": {"torch": "2.13.0"}, "rows": rows,
        "drift": {"perplexity_off": 12.27, "perplexity_on": 12.304, "ratio": 1.0027, "low": 1.0011, "high": 1.0043,
                  "n_tokens": 65536, "bits_per_byte_off": 1.812, "bits_per_byte_on": 1.814},
        "usage": [{"layer": 1, "write_frac": 0.02, "mean_write_on_facts": 0.8, "mean_write_on_filler": 0.001}],
        "throughput": {"tokens_per_s_on": 18903.2, "tokens_per_s_off": 20512.0},
        "state_bytes": 8192, "sidecar_parameters": 11264, "backbone_parameters": 739840,
        "chance": {"key_value": 0.0417}, "window_tokens": 256,
    } | changes  # fmt: skip


def bare() -> dict[str, Any]:
    return {"schema": 1, "rows": evaluation()["rows"]}


class Cells(HTMLParser):
    """The text of every table cell, row by row, and of the whole page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.in_cell = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        elif self.in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_report_is_complete_and_leaves_nothing_else_behind(tmp_path: Path) -> None:
    written = write_report(evaluation(), tmp_path / "new" / "run", HISTORY)
    assert set(written) == FILES | PICTURES
    assert set(written.values()) == set((tmp_path / "new" / "run").iterdir())
    for name in ("reach.png", "usage.png", "training.png"):
        assert written[name].read_bytes().startswith(b"\x89PNG")


def test_json_parquet_and_csv_hold_the_rows_unchanged(tmp_path: Path) -> None:
    given = evaluation()
    written = write_report(given, tmp_path)
    assert load_evaluation(tmp_path) == load_evaluation(written["evaluation.json"]) == given
    frames = pd.read_parquet(written["evaluation.parquet"]), pd.read_csv(written["evaluation.csv"])
    for frame in frames:
        assert " ".join(frame.columns) == "task filler gap_tokens memory accuracy n low high"
        assert frame.to_dict("records") == given["rows"]


def test_the_table_of_the_page_holds_the_numbers_of_the_rows(tmp_path: Path) -> None:
    given = evaluation()
    cells = Cells(write_report(given, tmp_path)["report.html"].read_text())
    shown = [line for line in cells.rows if line[0] != "gap, tokens"]
    assert len(shown) == len(given["rows"]) / 2
    for line, on, off in zip(shown, given["rows"][::2], given["rows"][1::2], strict=True):
        assert line[0] == (f"{on['gap_tokens']:,}" if on["gap_tokens"] else "in window")
        assert line[1::2] == [f"{100 * on['accuracy']:.1f} %", f"{100 * off['accuracy']:.1f} %", "200"]
        assert line[2] == f"{100 * on['low']:.1f} to {100 * on['high']:.1f} %"
        assert line[4] == f"{100 * off['low']:.1f} to {100 * off['high']:.1f} %"


def test_the_headlines_are_those_of_the_hardest_filler_at_the_largest_gap() -> None:
    found = {name: (value, notes) for name, value, notes in findings(evaluation())}
    value, notes = found["key_value, gap 16k"]
    assert findings(evaluation(rows=evaluation()["rows"][::-1])) == findings(evaluation())
    assert value == "94.5 %"
    assert notes == ("memory off 4.5 %, chance 4.2 %", "95 % interval 90.4 to 96.9 %", "filler: random")
    assert found["Perplexity, on / off"] == (
        "1.0027",
        ("95 % interval 1.0011 to 1.0043", "perplexity 12.30 on, 12.27 off",
         "bits per byte 1.814 on, 1.812 off", "65,536 tokens of held-out text"),
    )  # fmt: skip
    assert found["Trained parameters"] == ("1.52 %", ("11,264 beside 739,840 frozen ones",))
    assert found["State of a session"] == ("8.0 KiB", ("8,192 bytes for a text of any length",))
    assert found["Speed"] == ("18,903 tokens/s", ("92 % of the 20,512 with memory off",))


def test_the_page_shows_headlines_pictures_reading_and_configuration(tmp_path: Path) -> None:
    page = write_report(evaluation(), tmp_path, HISTORY)["report.html"].read_text()
    cells = Cells(page)
    for name, value, notes in findings(evaluation()):
        for text in (name, value, *notes):
            assert text in cells.text
    assert sum(tag == "svg" for tag, _ in cells.tags) == 3
    assert "<h1>demo</h1>" in page
    assert "How to read this" in cells.text
    (config,) = re.findall(r"<summary>Configuration, resolved</summary><pre>(.*?)</pre>", page, re.DOTALL)
    assert json.loads(config.replace("&quot;", '"')) == evaluation()["config"]


def test_the_page_fetches_nothing_runs_nothing_and_follows_the_theme(tmp_path: Path) -> None:
    page = write_report(evaluation(), tmp_path, HISTORY)["report.html"].read_text()
    assert not re.search(r"https?:|<script|<img|<link|@import|url\((?!#)|src=", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    used = set(re.findall(r"var\(--(\w+)\)", drawings))
    assert {"on", "off", "ink", "muted", "line", "card"} <= used
    defined = [set(re.findall(r"--(\w+):", block)) for block in re.findall(r":root {(.*?)}", page, re.DOTALL)]
    assert len(defined) == 2
    assert all(used <= block for block in defined)
    assert not re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawings)


def test_strings_of_the_user_are_text_on_the_page_and_in_the_terminal(tmp_path: Path) -> None:
    hostile = "<script>alert('$body $title')</script>[red]&{0}%s"
    given = evaluation(run=hostile, created=hostile, config={hostile: hostile}, chance={hostile: 0.5})
    for row in given["rows"]:
        row["task"], row["filler"] = hostile, row["filler"] + hostile
    given["usage"][0] |= {"task": hostile, "filler": hostile}
    page = write_report(given, tmp_path, HISTORY)["report.html"].read_text()
    assert "<script" not in page
    assert Cells(page).text.count(hostile) >= 5
    assert f"{hostile}, filler: text{hostile}" in summary(given, width=200)
    assert load_evaluation(tmp_path)["run"] == hostile


def test_everything_but_the_rows_may_be_absent(tmp_path: Path) -> None:
    assert set(write_report(bare(), tmp_path)) == FILES
    nothing = dict.fromkeys(set(evaluation()) - {"schema", "rows"})
    assert set(write_report(bare() | nothing, tmp_path)) == FILES
    assert set(write_report(bare() | {"drift": {}, "usage": [], "throughput": {}, "chance": {}}, tmp_path)) == FILES
    assert [name for name, *_ in findings(bare())] == ["key_value, gap 16k"]
    only_off = bare() | {"rows": [row for row in bare()["rows"] if row["memory"] == "off"]}
    assert findings(only_off) == []
    write_report(only_off, tmp_path)
    assert "in window" in summary(only_off)


def test_a_failure_in_the_middle_leaves_the_old_report(tmp_path: Path) -> None:
    write_report(evaluation(run="first"), tmp_path, HISTORY)
    before = snapshot(tmp_path)
    with pytest.raises(AttributeError):  # the history is drawn after the reach curves
        write_report(evaluation(run="second"), tmp_path, [*HISTORY, "not a row"])  # type: ignore[list-item]
    with pytest.raises(DataError, match="rows"):
        write_report(evaluation(rows=[]), tmp_path, HISTORY)
    assert snapshot(tmp_path) == before


def test_a_new_report_takes_the_place_of_the_old_one_pictures_included(tmp_path: Path) -> None:
    write_report(evaluation(run="first"), tmp_path, HISTORY)
    (tmp_path / "notes.txt").write_text("mine")
    write_report(bare() | {"run": "second"}, tmp_path)
    assert set(snapshot(tmp_path)) == FILES | {"notes.txt"}
    assert load_evaluation(tmp_path)["run"] == "second"


def test_numpy_tuples_and_what_is_not_finite_become_json(tmp_path: Path) -> None:
    given = evaluation(config={"gaps": (0, np.int64(256)), "path": tmp_path, "values": np.arange(2)})
    given["rows"][0] |= {"n": np.int64(200), "accuracy": np.float64(given["rows"][0]["accuracy"])}
    given["drift"] |= {"ratio": float("nan"), "low": -np.inf, "high": np.float32("inf")}
    history = [{"step": np.int64(1), "loss": np.float32(2.5)}, {"step": 2, "loss": float("inf")}]
    write_report(given, tmp_path, history)
    read = load_evaluation(tmp_path)
    assert read["config"] == {"gaps": [0, 256], "path": str(tmp_path), "values": [0, 1]}
    assert [read["drift"][key] for key in ("ratio", "low", "high")] == [None, None, None]
    assert read["rows"] == evaluation()["rows"]


def test_unknown_keys_survive(tmp_path: Path) -> None:
    given = evaluation(seed=7)
    for row in given["rows"]:
        row["wall_s"] = 1.5
    written = write_report(given, tmp_path)
    assert load_evaluation(tmp_path)["seed"] == 7
    assert list(pd.read_csv(written["evaluation.csv"])["wall_s"]) == [1.5] * len(given["rows"])


def broken(**row: Any) -> dict[str, Any]:
    given = copy.deepcopy(evaluation())
    given["rows"][3] |= row
    return given


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([1, 2], "a JSON object is expected, got list"),
        (evaluation(schema=2), "schema = 2, this version reads 1"),
        ({"rows": []}, "schema = None"),
        ({"schema": 1}, "rows: Field required"),
        (evaluation(rows=[]), "rows: .*at least 1"),
        (broken(accuracy=1.7), "rows.3.accuracy: .*less than or equal to 1"),
        (broken(accuracy=float("nan")), "rows.3.accuracy"),
        (broken(memory="maybe"), "rows.3.memory: .*'on' or 'off'"),
        (broken(gap_tokens=-1), "rows.3.gap_tokens"),
        (broken(n=0), "rows.3.n"),
        (broken(low=0.5), "rows.3: .*outside its interval"),
        (evaluation(rows=[*evaluation()["rows"], evaluation()["rows"][0]]), "two rows for .*'key_value', 'text', 0, 'on'"),
        (evaluation(drift={"ratio": "one"}), "drift.ratio"),
        (evaluation(usage=[{"write_frac": 0.1}]), "usage.0.layer: Field required"),
        (evaluation(chance={"key_value": 4}), "chance.key_value"),
        (evaluation(usage=[{"layer": 1, "gate_surprise_r": 1.5}]), "usage.0.gate_surprise_r"),
        (evaluation(outcomes=["1"]), "outcomes are not those of the rows"),
        (evaluation(outcomes=["0" * 200] * 12), "outcomes are not those of the rows"),
        (evaluation(outcomes=["2" * 200] * 12), "outcomes.0"),
    ],
)  # fmt: skip
def test_a_wrong_document_is_refused_in_one_line_that_names_the_place(tmp_path: Path, document: Any, says: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=says) as caught:
        load_evaluation(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"schema": 1, "rows": [1e'])
def test_what_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "evaluation.json").write_bytes(content)
    with pytest.raises(DataError, match="not valid JSON, truncated"):
        load_evaluation(tmp_path)


def test_a_file_that_is_missing_or_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no evaluation there. Run `cortex evaluate`"):
        load_evaluation(tmp_path)
    path = write_report(evaluation(), tmp_path)["evaluation.json"]
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="not valid JSON"):
            load_evaluation(path)


def summary(given: dict[str, Any], width: int = 80, encoding: str = "utf-8") -> str:
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding)
    print_summary(given, Console(file=stream, width=width))
    stream.flush()
    return buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_summary_is_plain_and_fits_80_columns(encoding: str) -> None:
    lines = summary(evaluation(), encoding=encoding).splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in "".join(lines)
    (last,) = [line for line in lines if "90.4 to 96.9 %" in line]
    assert re.findall(r"[\d.,]+(?: to [\d.]+)? ?%?", last.replace("|", " "))[:5] == [
        "16,384 ", "94.5 %", "90.4 to 96.9 %", "4.5 %", "2.4 to 8.3 %",
    ]  # fmt: skip
    for name, value, notes in findings(evaluation()):
        assert any(name in line and value in line and notes[0] in line for line in lines)
    perfect = evaluation()
    for row in perfect["rows"]:
        row |= {"accuracy": 1.0, "low": wilson(200, 200).low, "high": 1.0}
    assert summary(perfect, encoding=encoding).count("98.1 to 100.0 %") == len(perfect["rows"]), "the widest interval"
