"""What rows measure, on a small run that was trained for it; and how figures are made of what runs left."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cortex_core.config import CodesConfig, UnfreezeConfig, UpdateConfig
from cortex_core.intervals import paired_difference, wilson
from cortex_core.training.pretrain_config import DecoderConfig
from pipelines.config import CONFIG_FILE, SIDECARS_FOLDER
from pipelines.toml_text import dump_toml
from tests import tiny
from tests.benchmarks import optimizer_runs, rank_picture
from tests.benchmarks.optimizer_runs import Losses
from tests.benchmarks.rows import (
    codes,
    cost,
    needles,
    optim,
    ranks,
    recall,
    safety,
    seeds,
    sharding,
    tasks,
    text,
    unfreezing,
    worlds,
)
from tests.benchmarks.rows.demo import Demo

# --- rows on a real run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """A finished run of the tiny backbone, with a memory that recalls."""
    config = tiny.run_config(tmp_path_factory.mktemp("runs"))
    config.run_dir.mkdir(parents=True)
    (config.run_dir / CONFIG_FILE).write_text(dump_toml(config))
    (config.run_dir / "run.json").write_text('{"state": "FINISHED"}')
    tiny.trained().save_pretrained(config.run_dir / SIDECARS_FOLDER)
    found = Demo(config.run_dir)
    found.check()
    return found


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "NUM_EXAMPLES", 20)
    monkeypatch.setattr(recall, "GAPS", (40, 70))
    monkeypatch.setattr(recall, "FAR", 130)
    monkeypatch.setattr(cost, "DRIFT_TOKENS", 2048)
    monkeypatch.setattr(cost, "READING_PAIRS", 2)


@pytest.mark.usefixtures("few")
def test_recall_rows(demo: Demo) -> None:
    wanted = {"recall_text_40", "recall_random_130", "recall_min"}
    rows = {found.name: found for found in recall.recall_by_gap(demo, wanted)}
    assert rows.keys() == wanted and set(demo.answers) == {
        ("text", 40), ("text", 70), ("random", 40), ("random", 70), ("random", 130),
    }  # fmt: skip
    assert rows["recall_min"].value == min(
        sum(demo.answers[filler, gap].with_memory) / 20 for filler in ("text", "random") for gap in (40, 70)
    )
    assert 0.5 < rows["recall_text_40"].value <= 1 and rows["recall_text_40"].n == 20
    assert (rows["recall_text_40"].low, rows["recall_text_40"].high) == wilson(
        round(rows["recall_text_40"].value * 20), 20
    )[:2]
    (bare,) = recall.bare_beyond_window(demo, {"bare_beyond_window"})
    assert bare.value == max(sum(a.bare) / 20 for key, a in demo.answers.items() if key[1] != 130) < 0.5


def test_rows_about_forgetting_and_small_files(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fact that was forgotten is, its neighbour is not; eight bits lose little."""
    monkeypatch.setattr(safety, "NUM_EXAMPLES", 40)
    monkeypatch.setattr(safety, "GAP", 70)
    rows = {found.name: found for found in safety.forgetting_one_fact(demo, set())}
    assert tuple(rows) == safety.FORGET_ROWS
    forgotten, before, loss = rows.values()
    assert (forgotten.n, before.n, loss.n) == (40, 40, 40 * (tiny.PAIRS - 1))
    assert before.value > 0.5 and forgotten.value < before.value / 2 and loss.value < 15
    points, ratio = safety.int8_sessions(demo, set())
    assert points.n == 40 * tiny.PAIRS and abs(points.value) < 10
    parts = [part for state in demo.model.empty_states(1).values() for part in state if part is not None]
    whole = sum(4 * part.numel() for part in parts)
    small = sum(part.numel() + 4 * part.numel() // part.shape[-1] for part in parts)
    assert len(parts) == 2 and ratio.value == pytest.approx(small / whole)


def test_needles_are_looked_for_in_a_longer_haystack(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needles, "PER_FILLER", 20)
    single, multi_key = needles.needles(demo, {"needle_single_recall", "needle_multi_key_recall"})
    assert (single.name, single.n, multi_key.name, multi_key.n) == (
        "needle_single_recall", 40, "needle_multi_key_recall", 40,
    )  # fmt: skip
    assert 0.5 < single.value <= 1 and multi_key.value < single.value


@pytest.mark.usefixtures("few")
def test_rows_about_the_window_and_the_text(demo: Demo) -> None:
    (loss,) = recall.in_window_recall_loss_points(demo, set())
    assert loss.n == 60 and loss.low is not None and loss.high is not None and loss.low <= loss.value <= loss.high
    (cut,) = recall.cut_question_recall(demo, set())
    assert cut.n == recall.NUM_EXAMPLES and 0.0 <= cut.value <= 1.0
    (drift,) = cost.text_perplexity_drift_percent(demo, set())
    assert drift.n == 8 and abs(drift.value) < 50
    (overhead,) = cost.memory_overhead_ratio(demo, set())
    assert overhead.value > 0 and overhead.n == 2


@pytest.mark.usefixtures("few")
def test_peak_of_an_evaluation(demo: Demo) -> None:
    held = bytearray(300_000_000)
    held[:] = b"x" * len(held)
    del held  # an earlier peak does not count
    assert 1e8 < cost.peak_of_evaluation(str(demo.folder), 40) < 1.5 * _resident_bytes()


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


@pytest.mark.slow
def test_rows_from_two_ranks(demo: Demo) -> None:
    rows = {found.name: found for found in sharding.sharding_of_the_demo(demo, set())}
    assert tuple(rows) == sharding.DEMO_ROWS
    assert {name for name, found in rows.items() if not found.met} <= {"frozen_parameters_per_rank_peak_backward"}


# --- sleep -----------------------------------------------------------------------------------------------------------


def test_codes_are_asked_for_held_out_segments(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    few = CodesConfig(num_streams=2, held_out_streams=2, stream_tokens=1024, steps=20, code_size=16)
    monkeypatch.setitem(demo.__dict__, "config", demo.config.model_copy(update={"codes": few}))
    monkeypatch.setattr(codes, "SEEDS", (0, 1))
    rows = {found.name: found for found in codes.segment_codes(demo, {*codes.ROWS})}
    assert tuple(rows) == codes.ROWS and all(row.n == 2 for row in rows.values())
    assert all(row.value <= 1.0 for row in rows.values()) and rows[codes.MEAN].value > 0.0
    assert 0.0 < rows[codes.WROTE].value <= 1.0


def test_the_backbone_learns_facts_and_is_given_back(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfreezing, "SEEDS", (0, 1))
    monkeypatch.setattr(unfreezing, "FACTS", 4)
    monkeypatch.setattr(unfreezing, "TEXT_ROWS", 2)
    monkeypatch.setattr(unfreezing, "SETTINGS", UnfreezeConfig(max_text_nats=1.0, max_probe_nats=1.0, steps=4))
    known, behind, text, rollbacks, changed = unfreezing.facts_in_the_backbone(demo, {*unfreezing.ROWS})
    assert (known.name, behind.n, text.n) == (unfreezing.KNOWN, 8, 4) and math.isfinite(text.value)
    assert rollbacks.n > 0, "nights have tried steps"
    assert changed.value == 0.0 and changed.n > 1000 and changed.met


# --- five seeds ------------------------------------------------------------------------------------------------------


def evaluation(right: dict[tuple[str, int], int], n: int = 100) -> dict[str, Any]:
    """An evaluation.json in which every cell is answered but for those named; and rows that must not count."""
    rows = [
        {"task": "key_value", "filler": f, "gap_tokens": g, "memory": m, "accuracy": right.get((f, g), n) / n, "n": n}
        for f in ("text", "random")
        for g in (0, *seeds.GAPS)
        for m in ("on", "off")
    ]
    for row in rows:
        if row["memory"] == "off" or row["gap_tokens"] == 0:
            row["accuracy"] = 0.0
    return {"rows": [*rows, rows[0] | {"task": "n_back", "memory": "on", "gap_tokens": 256, "accuracy": 0.0}]}


def test_seeds_are_added_up_cell_by_cell_and_compared_as_wholes() -> None:
    runs = [seeds.hits(evaluation({("text", 512): 100 - 2 * seed})) for seed in range(5)]
    found = {row.name: row for row in seeds.rows_of(runs)}
    assert tuple(found) == seeds.ROWS
    expected = wilson(480, 500)
    assert (found["seeds_recall_text_512"].value, found["seeds_recall_text_512"].n) == (0.96, 500)
    assert found["seeds_recall_text_512"].low == pytest.approx(expected.low)
    assert found[seeds.MIN_ROW].value == 0.96 and not found[seeds.MIN_ROW].met
    assert found["seeds_recall_random_512"].value == 1.0 and found["seeds_recall_random_512"].met
    assert found[seeds.SPREAD_ROW].value == pytest.approx(100 * 8 / 1800) and found[seeds.SPREAD_ROW].n == 5


# --- ranks -----------------------------------------------------------------------------------------------------------


def ranked(near: str, far: str, state_bytes: int) -> dict[str, Any]:
    """An evaluation of two examples under two fillers at two gaps; without memory none is right, which must not count."""
    return {
        "rows": [{"gap_tokens": gap, "memory": memory} for memory in ("on", "off") for gap in ranks.GAPS * 2],
        "outcomes": [near, far, near, far, "00", "00", "00", "00"], "state_bytes": state_bytes,
    }  # fmt: skip


def test_an_adaptive_rank_is_compared_on_the_same_examples() -> None:
    documents = {"rank_8_recall": ranked("10", "00", 4096), "adaptive_rank_recall": ranked("11", "10", 4000)}
    found = {row.name: row for row in ranks.rows_of(documents)}
    assert {name: row.value for name, row in found.items()} == pytest.approx({
        "rank_8_recall": 0.25, "adaptive_rank_recall": 0.75, "adaptive_rank_gain_points": 50.0,
        "adaptive_rank_state_bytes_ratio": 4000 / 4096,
    })  # fmt: skip
    assert {row.n for row in found.values()} == {2, 1}, "answers about one example are not independent"
    assert found["rank_8_recall"].low == pytest.approx(wilson(0.5, 2).low)
    assert (found[ranks.GAIN_ROW].low, found[ranks.GAIN_ROW].high) == pytest.approx((50.0, 50.0)), "both gained as much"


def test_only_the_ranks_that_are_needed_are_trained(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, int, float | None]] = []

    def evaluations(out_dir: Path, runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        trained.extend(
            (name, given["fast_weights.rank"], given.get("fast_weights.rank_budget")) for name, given in runs.items()
        )
        return {name: ranked("11", "11", 1) for name in runs}

    monkeypatch.setattr(ranks.trained, "evaluations", evaluations)
    assert [row.name for row in ranks.recall_by_rank(demo, {"rank_16_recall"})] == ["rank_16_recall"]
    assert [row.name for row in ranks.recall_by_rank(demo, {ranks.GAIN_ROW})] == [ranks.GAIN_ROW]
    assert trained == [("demo-rank_16", 16, None), ("demo-rank_8", 8, None), ("demo-adaptive_rank", 32, 8)]


def test_ranks_are_drawn_from_what_the_scoreboard_wrote(tmp_path: Path) -> None:
    rows = [
        {"name": f"rank_{rank}_recall", "value": value, "low": value - 0.02, "high": value + 0.01}
        for rank, value in ((32, 0.98), (8, 0.9), (16, 0.95))
    ] + [{"name": "large_forward_overhead_rank_8", "value": 1.06, "low": 1.05, "high": 1.08}]
    by_name = {row["name"]: row for row in rows}
    assert [(p.rank, p.value) for p in rank_picture.points(by_name, r"rank_(\d+)_recall")] == [
        (8, 0.9), (16, 0.95), (32, 0.98),
    ]  # fmt: skip
    recall_panel, cost_panel = rank_picture.draw(by_name).axes
    assert recall_panel.lines[0].get_ydata().tolist() == [0.9, 0.95, 0.98] and recall_panel.get_yticks().max() <= 1.0
    assert cost_panel.lines[0].get_ydata().tolist() == [1.06]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    assert rank_picture.main([str(tmp_path / "rows.json"), "--out", str(tmp_path / "ranks.png")]) == 0
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


# --- optimizers ------------------------------------------------------------------------------------------------------


def test_the_grid_of_learning_rates_moves_until_the_best_one_is_in_its_middle() -> None:
    asked: list[tuple[float, int]] = []

    def train(rate: float, seed: int) -> Losses:
        asked.append((rate, seed))
        return Losses(abs(math.log2(rate / 8.0)), rate + seed)

    assert [run.held_out for run in optim.best_runs(train, 2.0)] == pytest.approx([8.0 + seed for seed in optim.SEEDS])
    assert sorted(rate for rate, seed in asked if seed == 0) == pytest.approx([2.0 ** (n / 2) for n in range(9)])
    assert len(asked) == len(set(asked)) == 9 * len(optim.SEEDS)
    asked.clear()
    assert optim.best_runs(train, 8.0)[0].validation == 0.0 and len(asked) == 5 * len(optim.SEEDS)


def test_a_rate_that_only_one_seed_can_bear_is_not_the_best() -> None:
    def train(rate: float, seed: int) -> Losses:
        diverged = seed == optim.SEEDS[-1] and rate > 9.0
        return Losses(math.inf if diverged else 1.0 / rate, rate)

    assert [run.held_out for run in optim.best_runs(train, 8.0)] == pytest.approx([8.0] * len(optim.SEEDS))


def test_perplexities_are_compared_seed_by_seed(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    centre = {"adamw": 1.0, "apollo": 2.0, "apollo_mini": 4.0}
    monkeypatch.setattr(optim, "CENTRES", centre)

    def train(update: UpdateConfig, rate: float, seed: int) -> Losses:
        added = {"adamw": 0.0, "apollo": 0.01 * seed, "apollo_mini": math.log(0.9)}[update.name]
        return Losses(abs(math.log(rate / centre[update.name])), 5.0 + seed + added)

    monkeypatch.setattr(optimizer_runs, "train", train)
    mini, apollo = optim.perplexity(demo, {*optim.PERPLEXITY_ROWS})
    assert (mini.name, mini.n, apollo.name) == (optim.PERPLEXITY_ROWS[0], 6, optim.PERPLEXITY_ROWS[1])
    assert (mini.value, mini.low, mini.high) == pytest.approx((0.9, 0.9, 0.9)) and mini.met
    assert apollo.value == pytest.approx(math.exp(0.025)) and not apollo.met
    assert apollo.low is not None and 1.0 < apollo.low < apollo.value
    assert [row.name for row in optim.perplexity(demo, {optim.PERPLEXITY_ROWS[1]})] == [optim.PERPLEXITY_ROWS[1]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a few thousand weights that reads a few words."""
    shape = DecoderConfig(vocab_size=700, hidden_size=16, num_layers=1, num_heads=2, mlp_size=16)
    settings = {"steps": 30, "batch_size": 4, "warmup_steps": 3, "decoder": shape}
    monkeypatch.setattr(optimizer_runs, "CONFIG", optimizer_runs.CONFIG.model_copy(update=settings))
    monkeypatch.setattr(optimizer_runs, "WINDOW", 16)
    monkeypatch.setattr(optimizer_runs, "EVALUATED", 8)
    monkeypatch.setattr(optimizer_runs, "corpus", tiny.corpus)
    monkeypatch.setattr(optim, "STEP_PAIRS", 3)
    optimizer_runs.texts.cache_clear()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["adamw", "apollo", "apollo_mini"])
def test_a_small_model_learns_from_its_optimizer(name: Any) -> None:
    none, some, again = (optimizer_runs.train(UpdateConfig(name=name), rate, 0) for rate in (1e-9, 2e-2, 2e-2))
    assert some == again and some.held_out < none.held_out - 0.1 and some.validation < none.validation - 0.1
    validation, held_out = optimizer_runs.texts()
    assert validation.shape == held_out.shape == (8, 16) and not torch.equal(validation, held_out)
    assert optimizer_runs.train(UpdateConfig(name=name), math.inf, 0) == (math.inf, math.inf)


@pytest.mark.usefixtures("small")
def test_what_apollo_costs_is_measured_beside_adamw(demo: Demo) -> None:
    share, step, update = optim.cost(demo, {*optim.COST_ROWS})
    assert (share.name, step.name, update.name) == optim.COST_ROWS and (step.n, update.goal) == (3, None)
    trained = optimizer_runs.Trained(UpdateConfig(name="apollo_mini"), 0)
    trained.step(1e-3)
    numbers = [2 * max(p.shape) + 2 if p.ndim == 2 else 2 * p.numel() + 1 for p in trained.model.parameters()]
    assert trained.state_numbers == sum(numbers)
    assert share.value == sum(numbers) / sum(2 * p.numel() + 1 for p in trained.model.parameters())
    assert step.value > 0 and update.value > 0


# --- other tasks -----------------------------------------------------------------------------------------------------


def test_tasks_are_added_up_over_fillers_and_their_window_is_compared_in_pairs() -> None:
    cells = [
        (gap, filler, memory) for gap in (0, *tasks.GAPS) for filler in ("text", "random") for memory in ("on", "off")
    ]
    outcomes = {cell: "0000" if cell[0] and cell[2] == "off" else "1111" for cell in cells}
    outcomes[1024, "random", "on"] = "1010"
    outcomes[0, "text", "on"] = "1101"
    document = {
        "rows": [{"gap_tokens": gap, "filler": filler, "memory": memory} for gap, filler, memory in cells],
        "outcomes": list(outcomes.values()),
    }
    found = {row.name: row for row in tasks.rows_of("n_back", document)}
    assert tuple(found) == tuple(name for name in tasks.ROWS if name.startswith("n_back"))
    assert (found["n_back_recall_512"].value, found["n_back_recall_512"].n) == (1.0, 4)
    assert found["n_back_recall_1024"].value == found["n_back_recall_min"].value == 0.75
    loss = paired_difference([True] * 4, [True, True, False, True])
    assert found["n_back_in_window_loss_points"].value == 25.0 and found["n_back_in_window_loss_points"].n == 4
    assert found["n_back_in_window_loss_points"].high == pytest.approx(100 * loss.high)


def test_stories_are_averaged_over_all_five_kinds() -> None:
    def document(answers: str) -> dict[str, Any]:
        cells = [(0, "on", "1111"), (0, "off", "1000"), (worlds.GAP, "on", answers), (worlds.GAP, "off", "0000")]
        return {
            "rows": [
                {"gap_tokens": gap, "memory": memory, "accuracy": letters.count("1") / 4, "n": 4}
                for gap, memory, letters in cells
            ],
            "outcomes": [letters for _, _, letters in cells],
        }

    told = dict(zip(worlds.RUNS, ("1111", "1110", "1100", "1000", "0000"), strict=True))
    found = {row.name: row for row in worlds.rows_of({task: document(letters) for task, letters in told.items()})}
    assert tuple(found) == worlds.ROWS
    assert [found[f"{task}_recall_{worlds.GAP}"].value for task in told] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert found["world_qa3_bare_in_window"].value == 0.25
    average = found[worlds.AVERAGE_ROW]
    assert (average.value, average.n) == (0.5, 20) and average.low is not None and average.low < 0.5
    assert worlds.AVERAGE_ROW not in {row.name for row in worlds.rows_of({"world_qa1": document("1111")})}


# --- long files ------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_a_ratio_of_sums_with_its_interval() -> None:
    value, low, high = text.saved_percent([90.0, 180.0, 270.0], [100.0, 200.0, 300.0])
    assert (value, low, high) == pytest.approx((10.0, 10.0, 10.0))
    value, low, high = text.saved_percent([95.0, 170.0, 270.0], [100.0, 200.0, 300.0])
    assert value == pytest.approx(100 * 65 / 600) and low < value < high
    assert value - low == pytest.approx(high - value)


def test_long_files_are_read_whole_and_short_ones_are_left_out(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = [*demo.corpus.held_out_starts.tolist(), len(demo.corpus.held_out)]
    lengths = sorted(end - start for start, end in itertools.pairwise(starts))
    width = demo.model.segment_tokens
    for windows in (lengths[0] // width, lengths[-1] // width - 1):
        monkeypatch.setattr(text, "MIN_WINDOWS", windows)
        (found,) = text.long_files_bits_saved_percent(demo, set())
        assert found.n == sum(length > windows * width for length in lengths) > 1
        assert found.low is not None and found.high is not None and found.low < found.value < found.high
