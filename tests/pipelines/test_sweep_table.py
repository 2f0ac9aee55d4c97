"""The result of a sweep, drawn and as a page; and what of its record is believed."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ray.tune.schedulers import TrialScheduler
from rich.console import Console

from cortex_core.eval.metric_names import LOSS, RECALL
from pipelines.schedule_picture import schedules
from pipelines.search import Rungs
from pipelines.sweep_pictures import Axis, parallel_coordinates, sensitivity
from pipelines.sweep_plan import SweepPlan, plan
from pipelines.sweep_record import RESULTS_FILE, Clone, Exchange, exchanges, recorded, write_exchanges
from pipelines.sweep_table import FILES, best_of, print_sweep, sweep_result, write_sweep
from tune_spaces.study import Real


def line(trial: str, step: int, loss: float, sample: dict[str, Any]) -> str:
    return json.dumps({"trial": trial, "step": step, LOSS: loss, RECALL: 1 / (1 + loss), "sample": sample}) + "\n"


@pytest.fixture
def made(tmp_path: Path) -> SweepPlan:
    """A sweep's folder as three trials leave it: finished, stopped early, failed."""
    planned = plan("fast_weights", [f"out_dir={tmp_path}"], trials=3)
    folder = planned.config.run_dir
    samples = [
        {"fast_weights.rank": rank, "fast_weights.decay": decay, "fast_weights.write_strength": 0.7, "fast_weights.dead_zone": 0.3}
        for rank, decay in ((8, 0.98), (4, 0.9), (32, 0.9))
    ]  # fmt: skip
    for name, state in (("aa", "FINISHED"), ("bb", "KILLED")):
        (folder / "trials" / name).mkdir(parents=True)
        run = {"attempt": 0, "state": state, "mlflow_run_id": name * 8}
        (folder / "trials" / name / "run.json").write_text(json.dumps(run))
    rows = [{"task": "key_value", "filler": "text", "gap_tokens": g, "memory": m, "accuracy": a, "n": 10, "low": 0, "high": 1}
            for g, m, a in ((0, "on", 1.0), (0, "off", 0.9), (70, "on", 0.5), (70, "off", 0.0))]  # fmt: skip
    evaluation = {"schema": 1, "rows": rows, "drift": {"ratio": 1.001}}
    (folder / "trials" / "aa" / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / RESULTS_FILE).write_text(
        line("aa", 20, 3.0, samples[0]) + line("bb", 20, 2.5, samples[1]) + line("aa", 40, 2.8, samples[0])
        + line("aa", 40, 2.6, samples[0]) + line("aa", 120, 1.0, samples[0]) + '{"trial": "aa", "st'
    )  # fmt: skip
    failure = {"trial": "cc", "sample": samples[2], "reason": "ConfigError: [red]no[/]"}
    (folder / "failures.jsonl").write_text(json.dumps(failure) + "\n")
    return planned


def test_rows_say_how_each_trial_ended(made: SweepPlan) -> None:
    result = sweep_result(made)
    assert [(row["trial"], row["state"]) for row in result["rows"]] == [
        ("aa", "finished"),
        ("bb", "stopped early"),
        ("cc", "failed"),
    ]
    first, second, third = result["rows"]
    assert result["common_step"] == 20 and [row["loss_nats_at_common_step"] for row in result["rows"]] == [
        3.0,
        2.5,
        None,
    ]
    assert first["loss_nats"] == 1.0 and first["held_out_recall"] == 0.75 and first["drift"] == 1.001
    assert second["held_out_recall"] is None and second["step"] == 20 and third["reason"] == "ConfigError: [red]no[/]"
    assert best_of(result) == first, "the other has a lower loss at step 20, but has not taken all steps"


def test_a_step_that_was_done_again_counts_once(made: SweepPlan) -> None:
    """And a line that was cut off when the driver was killed counts for nothing."""
    found = [(r["step"], r[LOSS]) for r in recorded(made.config.run_dir / RESULTS_FILE) if r["trial"] == "aa"]
    assert found == [(20, 3.0), (40, 2.6), (120, 1.0)]
    assert recorded(made.config.run_dir / "nothing") == []


def test_every_file_is_written(made: SweepPlan) -> None:
    folder, result = made.config.run_dir, sweep_result(made)
    assert set(write_sweep(result, folder)) == set(FILES)
    assert json.loads((folder / "sweep.json").read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    for frame in (pd.read_csv(folder / "sweep.csv"), pd.read_parquet(folder / "sweep.parquet")):
        assert list(frame["fast_weights.rank"]) == [8, 4, 32] and "sample" not in frame
    html = (folder / "sweep.html").read_text()
    assert "<script" not in html and html.count("<figure") == 2 and "[red]no[/]" in html and "stopped early" in html


def test_a_population_shows_how_its_settings_changed(made: SweepPlan) -> None:
    """`bb` went on from the weights of `aa` after step 20, and `aa` from those of `bb` after step 40."""
    folder, name = made.config.run_dir, "optimizer.learning_rate"
    population = made._replace(study=replace(made.study, search="pbt", space={name: Real(1e-3, 1e-1, log=True)}))
    rates = {
        ("aa", 20): 0.001,
        ("bb", 20): 0.1,
        ("aa", 40): 0.001,
        ("bb", 40): 0.002,
        ("aa", 120): 0.004,
        ("bb", 120): 0.002,
    }
    (folder / RESULTS_FILE).write_text(
        "".join(line(trial, step, 1.0 if trial == "aa" else 2.0, {name: rate}) for (trial, step), rate in rates.items())
    )
    clones = [
        Exchange(20, (Clone("bb", "aa", {name: 0.002}, 1),)),
        Exchange(40, (Clone("aa", "bb", {name: 0.004}, 1),)),
    ]
    write_exchanges(folder, clones)
    assert exchanges(folder) == clones
    result = sweep_result(population)
    assert [(part["step"], part["trial"], part["sample"][name]) for part in result["rows"][0]["schedule"]] == [
        (20, "aa", 0.001), (40, "bb", 0.002), (120, "aa", 0.004),
    ]  # fmt: skip
    assert result["rows"][-1]["state"] == "failed" and result["rows"][-1]["schedule"] == []
    assert set(write_sweep(result, folder)) == {*FILES, "schedule.png"}
    frame = pd.read_parquet(folder / "sweep.parquet")
    assert frame[name].tolist()[:2] == [0.004, 0.002] and "schedule" not in frame
    html = (folder / "sweep.html").read_text()
    assert html.count("<figure") == 3 and "What the settings became" in html and "population-based" in html
    (axes,) = schedules(result).axes
    assert [len(each.get_xdata()) for each in axes.lines if len(each.get_xdata()) > 2] == [4, 4]


def test_a_sweep_in_which_nothing_came_of_any_trial_is_drawn_as_well(made: SweepPlan) -> None:
    (made.config.run_dir / RESULTS_FILE).unlink()
    result = sweep_result(made)
    assert best_of(result) is None and [row["state"] for row in result["rows"]] == ["failed"]
    write_sweep(result, made.config.run_dir)


def test_the_table_in_the_terminal(made: SweepPlan) -> None:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    print_sweep(sweep_result(made), console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "aa" in said and "1.000" in said and "75.0 %" in said
    assert "trial cc failed: ConfigError: [red]no[/]" in said


def test_every_trial_is_a_line_and_a_dot(made: SweepPlan) -> None:
    result = sweep_result(made)
    (axes,) = parallel_coordinates(result).axes
    assert len([each for each in axes.lines if len(each.get_xdata()) == 5]) == 2
    table, *panels = sensitivity(result).axes
    assert len(panels) == 4 and len(table.images) == 1
    for panel in panels:
        dots = [each for each in panel.lines if each.get_marker() == "o"]
        assert sorted(len(each.get_xdata()) for each in dots) == [1, 1]


def test_places_on_an_axis() -> None:
    rank, rate = (
        Axis("a.rank", {"kind": "Choice", "values": (4, 8)}),
        Axis("b", {"kind": "Real", "low": 1e-3, "high": 1e-1, "log": True}),
    )
    assert [rank.place(4), rank.place(8)] == [0.25, 0.75] and rank.cells == 2 and rank.cell(8) == 1
    assert rate.place(1e-2) == pytest.approx(0.5) and [rate.cell(x) for x in (1e-3, 1e-2, 1e-1)] == [0, 1, 2]
    assert [text for _, text in rate.ticks()] == ["0.001", "0.01", "0.1"]


class ATrial:
    """As much of a trial as the scheduler looks at."""

    def __init__(self, name: str) -> None:
        self.trial_id = name


def test_rungs_are_those_of_before_the_interruption(tmp_path: Path) -> None:
    """A trial that is poor beside others that ended before the driver was killed is stopped, as it would have been."""
    record = tmp_path / RESULTS_FILE

    def verdict() -> str:
        rungs = Rungs(str(record), steps=120, grace=40)
        rungs.set_search_properties(LOSS, "min")
        for name in ("a", "b", "c", "d"):
            rungs.on_trial_add(None, ATrial(name))
        return rungs.on_trial_result(None, ATrial("d"), {"step": 40, LOSS: 3.0})  # type: ignore[arg-type]

    assert verdict() == TrialScheduler.CONTINUE, "nothing is known of the others"
    record.write_text("".join(line(name, 40, loss, {}) for name, loss in (("a", 1.0), ("b", 2.0), ("c", 1.5))))
    assert verdict() == TrialScheduler.STOP
    record.write_text("".join(line(name, 40, loss, {}) for name, loss in (("a", 4.0), ("b", 5.0), ("c", 6.0))))
    assert verdict() == TrialScheduler.CONTINUE


def test_nobody_is_stopped_at_the_last_step(tmp_path: Path) -> None:
    """All that is left of such a trial is its evaluation."""
    rungs = Rungs(str(tmp_path / RESULTS_FILE), steps=120, grace=40)
    rungs.set_search_properties(LOSS, "min")
    for name, loss in (("a", 0.1), ("b", 0.2), ("c", 9.0)):
        rungs.on_trial_add(None, ATrial(name))
        for step, at_step in ((40, 0.05), (120, loss)):
            found = rungs.on_trial_result(None, ATrial(name), {"step": step, LOSS: at_step})  # type: ignore[arg-type]
            assert found == TrialScheduler.CONTINUE
