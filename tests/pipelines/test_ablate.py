"""`cortex ablate` from end to end, in this process: what it leaves, what it does not repeat, and that it goes on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import ray
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from cortex_core.backbone.sidecar_files import WEIGHTS
from cortex_core.errors import ConfigError
from cortex_core.eval.ablations import REFERENCE
from cortex_core.intervals import paired_difference
from pipelines import ablate, cli, cluster, evaluate, train
from pipelines.config import SIDECARS_FOLDER, RunConfig, load_config
from pipelines.runs import STATE_FILE
from pipelines.runs import locked as folder_locked
from pipelines.toml_text import dump_toml
from pipelines.variants import Plan, plan
from tests import tiny

# mlflow, of pandas, while it logs a table.
pytestmark = pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes:DeprecationWarning")

NAMES = "baseline,fast_off,mean_gate"
STEPS = 6


def planned(out: Path, *overrides: str, names: str = NAMES) -> Plan:
    """An ablation of the tiny run, from a recipe file as a user has one."""
    recipe = out / "tiny.toml"
    recipe.write_text(dump_toml(tiny.run_config(out)), encoding="utf-8")
    return plan(recipe, overrides, names)


def result(of: Plan) -> dict:
    return json.loads((of.config.run_dir / "ablations.json").read_text())


def evaluation(of: Plan, name: str) -> dict:
    return json.loads((of.config.run_dir / name / "evaluation.json").read_text())


def in_mlflow(of: Plan) -> tuple[list[MlflowRun], dict[str, MlflowRun]]:
    """Runs without a parent, and children of the first of them by name; a name appears once."""
    client = MlflowClient(tracking_uri=of.config.tracking_uri)
    experiment = client.get_experiment_by_name(of.config.tracking.experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(children) == len({run.info.run_name for run in children})
    return parents, {str(run.info.run_name): run for run in children}


def stamps(of: Plan) -> dict[str, int]:
    """When each variant's result was written."""
    return {
        name: (of.config.run_dir / name / "evaluation.json").stat().st_mtime_ns
        for name in of.variants
        if name != "baseline"
    }


@contextmanager
def counted_steps(counts: list[int]) -> Iterator[None]:
    """Appends the number of optimizer steps that were taken in the block."""
    before = itertools.count()
    handle = register_optimizer_step_post_hook(lambda *_: next(before) and None)
    try:
        yield
    finally:
        handle.remove()
        counts.append(next(before))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Callable[[Path], None]) -> Plan:
    """An ablation that nothing interrupted. Do not change its folder."""
    out = tmp_path_factory.mktemp("finished")
    mlflow_database(out)
    of = planned(out)
    assert ablate.run(of) == 0
    return of


@pytest.fixture
def fresh(tmp_path: Path, mlflow_database: Callable[[Path], None]) -> Path:
    mlflow_database(tmp_path)
    return tmp_path


def test_accuracies_are_those_of_the_variants_own_evaluations(finished: Plan) -> None:
    rows = result(finished)["rows"]
    assert [row["variant"] for row in rows[::2]] == [REFERENCE, "baseline", "fast_off", "mean_gate"]
    for row in rows:
        name, memory = (REFERENCE, "off") if row["variant"] == "baseline" else (row["variant"], "on")
        (own,) = [
            other
            for other in evaluation(finished, name)["rows"]
            if other["memory"] == memory and other["gap_tokens"] == row["gap_tokens"]
        ]
        assert {key: row[key] for key in own if key != "memory"} == {key: own[key] for key in own if key != "memory"}
    off = [(row["accuracy"], row["n"]) for row in rows if row["variant"] == "fast_off"]
    assert off == [(row["accuracy"], row["n"]) for row in rows if row["variant"] == "baseline"], (
        "no writes, no difference"
    )


def answers(document: dict, gap: int, memory: str) -> list[bool]:
    """Whether each example was right, from the outcomes of a variant's own evaluation."""
    (right,) = [
        outcomes
        for row, outcomes in zip(document["rows"], document["outcomes"], strict=True)
        if (row["gap_tokens"], row["memory"]) == (gap, memory)
    ]
    return [one == "1" for one in right]


def test_differences_are_over_the_same_examples(finished: Plan) -> None:
    reference = evaluation(finished, REFERENCE)
    for row in result(finished)["rows"]:
        found = (row["difference"], row["difference_low"], row["difference_high"])
        bare = row["variant"] == "baseline"
        own = reference if bare else evaluation(finished, row["variant"])
        ours = answers(own, row["gap_tokens"], "off" if bare else "on")
        theirs = answers(reference, row["gap_tokens"], "on")
        assert len(ours) == len(theirs) == row["n"] and sum(ours) / row["n"] == row["accuracy"]
        low, high, value = paired_difference(ours, theirs)
        assert found == ((None, None, None) if row["variant"] == REFERENCE else (value, low, high))


def test_costs_are_those_of_the_variants_own_evaluations(finished: Plan) -> None:
    costs = {variant["variant"]: variant for variant in result(finished)["variants"]}
    for name in (REFERENCE, "fast_off", "mean_gate"):
        own = evaluation(finished, name)
        assert costs[name]["drift"] == own["drift"]["ratio"] and costs[name]["drift_high"] == own["drift"]["high"]
        assert costs[name]["write_frac"] == own["usage"][0]["write_frac"]
        assert costs[name]["gate_surprise_r"] == own["usage"][0]["gate_surprise_r"]
        assert costs[name]["sidecar_parameters"] == own["sidecar_parameters"] > 0
        assert costs[name]["state_bytes"] == own["state_bytes"] > 0
    assert costs["fast_off"]["write_frac"] == 0.0 and costs["fast_off"]["drift"] == 1.0
    assert -1 <= costs[REFERENCE]["gate_surprise_r"] <= 1
    bare = costs["baseline"]
    assert (bare["drift"], bare["write_frac"], bare["gate_surprise_r"], bare["sidecar_parameters"]) == (
        1.0,
        0.0,
        None,
        0,
    )


def test_the_table_is_the_same_in_every_format(finished: Plan) -> None:
    folder, found = finished.config.run_dir, result(finished)
    expected = pd.DataFrame(found["rows"])
    for key in ("drift", "write_frac", "sidecar_parameters", "state_bytes"):
        expected[key] = expected["variant"].map({variant["variant"]: variant[key] for variant in found["variants"]})
    for other in (pd.read_csv(folder / "ablations.csv"), pd.read_parquet(folder / "ablations.parquet")):
        pd.testing.assert_frame_equal(other[list(expected.columns)], expected, check_dtype=False)
    assert (folder / "ablations.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "ablations.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert [name for name in finished.variants if f"<th scope=row>{name}" not in page] == []


def test_the_reference_is_an_ordinary_run(finished: Plan, fresh: Path) -> None:
    """Of the same recipe, with the same result to the bit."""
    config = tiny.run_config(fresh)
    assert train.run(config) == 0
    ours, theirs = finished.config.run_dir / REFERENCE, config.run_dir
    one, other = (json.loads((folder / "evaluation.json").read_text()) for folder in (ours, theirs))
    assert one["rows"] == other["rows"] and one["outcomes"] == other["outcomes"]
    assert tiny.same(load_file(ours / SIDECARS_FOLDER / WEIGHTS), load_file(theirs / SIDECARS_FOLDER / WEIGHTS))
    assert {path.name for path in theirs.iterdir()} == {path.name for path in ours.iterdir()}


def test_a_test_of_the_controller_asks_the_references_sidecars(finished: Plan, tmp_path: Path) -> None:
    folder = finished.config.run_dir
    weights = [load_file(folder / name / SIDECARS_FOLDER / WEIGHTS) for name in (REFERENCE, "mean_gate", "fast_off")]
    assert tiny.same(weights[0], weights[1]) and not tiny.same(weights[0], weights[2])
    asked = load_config(folder / "mean_gate" / "config.toml")
    assert asked.fast_weights.controller_test == "mean_gate"
    assert not (folder / "mean_gate" / "training.png").exists(), "nothing was trained"
    again = tiny.run_config(tmp_path, fast_weights__controller_test="mean_gate", name="again")
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / SIDECARS_FOLDER).symlink_to(folder / REFERENCE / SIDECARS_FOLDER)
    assert evaluate.run(again, tmp_path / "again") == 0
    other = json.loads((tmp_path / "again" / "evaluation" / "evaluation.json").read_text())
    own = evaluation(finished, "mean_gate")
    assert (own["rows"], own["usage"]) == (other["rows"], other["usage"])
    assert own["usage"] != evaluation(finished, REFERENCE)["usage"]


def test_mlflow_holds_a_parent_with_a_child_per_variant(finished: Plan) -> None:
    (parent,), children = in_mlflow(finished)
    assert parent.info.run_name == "tiny-ablations" and parent.info.status == "FINISHED"
    assert set(children) == {REFERENCE, "fast_off", "mean_gate"}
    for name, child in children.items():
        assert child.info.status == "FINISHED"
        drift = evaluation(finished, name)["drift"]["ratio"]
        assert child.data.metrics["drift/ratio"] == pytest.approx(drift)
    assert children["fast_off"].data.params["fast_weights.write_strength"] == "0.0"
    client = MlflowClient(tracking_uri=finished.config.tracking_uri)
    files = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"ablations.json", "ablations.csv", "ablations.png", "ablations.html", "ablations_rows.json"} <= files


def test_what_has_finished_is_not_repeated_and_more_may_be_asked_for(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of, counts = planned(fresh, names="fast_off"), list[int]()
    with counted_steps(counts):
        assert ablate.run(of) == 0
    before, said = stamps(of), capsys.readouterr().out
    assert "variant 1 of 2: cortex\n" in said and "variant 2 of 2: fast_off\n" in said
    more = planned(fresh, names="fast_off,no_controller,shuffled_surprise")
    with counted_steps(counts):
        assert ablate.run(more) == 0
    said = capsys.readouterr().out
    assert "variant 1 of 4: cortex, done\n" in said and "variant 3 of 4: no_controller\n" in said
    assert counts == [2 * STEPS, STEPS]
    assert before.items() <= stamps(more).items()
    assert [variant["variant"] for variant in result(more)["variants"]] == [
        REFERENCE, "fast_off", "no_controller", "shuffled_surprise",
    ]  # fmt: skip
    parents, children = in_mlflow(more)
    assert len(parents) == 1 and set(children) == set(more.variants)


def test_it_goes_on_where_it_was_interrupted(fresh: Path, finished: Plan) -> None:
    of, counts = planned(fresh), list[int]()
    with tiny.interrupted_in(STEPS + 4):
        ablate.run(of)
    (parent,), children = in_mlflow(of)
    assert parent.info.status == children["fast_off"].info.status == "KILLED"
    assert json.loads((of.config.run_dir / "fast_off" / STATE_FILE).read_text())["state"] == "KILLED"
    assert not (of.config.run_dir / "ablations.json").exists()
    before = (of.config.run_dir / REFERENCE / "evaluation.json").stat().st_mtime_ns
    with counted_steps(counts):
        assert ablate.run(of) == 0
    assert counts == [STEPS - 2], "from the checkpoint after step 2"
    assert stamps(of)[REFERENCE] == before
    assert result(of)["rows"] == result(finished)["rows"]
    (parent,), children = in_mlflow(of)
    assert parent.info.status == "FINISHED" and {child.info.status for child in children.values()} == {"FINISHED"}


def test_other_settings_are_run_anew(fresh: Path) -> None:
    of = planned(fresh, names="mean_gate")
    assert ablate.run(of) == 0
    before = stamps(of)
    other = planned(fresh, "evaluation.gaps_tokens=0,40", names="mean_gate")
    assert ablate.run(other) == 0
    assert all(stamps(other)[name] != before[name] for name in before)
    assert {row["gap_tokens"] for row in result(other)["rows"]} == {0, 40}


def test_a_folder_that_another_process_works_on_is_refused(fresh: Path) -> None:
    of = planned(fresh, names="fast_off")
    with folder_locked(of.config.run_dir), pytest.raises(ConfigError, match="another process is working on this run"):
        ablate.run(of)


def test_the_command_takes_options_and_overrides_in_any_order(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned(fresh)
    arguments = [str(fresh / "tiny.toml"), "--variants", "baseline", "training.steps=2", "name=short"]
    assert cli.main(["ablate", *arguments]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.partition("key_value, filler")[2].partition("Page")[0].splitlines())) <= 80
    assert f"Page      {fresh / 'short' / 'ablations.html'}" in said.splitlines()
    assert {row["variant"] for row in json.loads((fresh / "short" / "ablations.json").read_text())["rows"]} == {
        REFERENCE,
        "baseline",
    }


def test_configurations_differ_in_what_is_taken_away_alone(finished: Plan) -> None:
    def kept(name: str) -> RunConfig:
        return load_config(finished.config.run_dir / name / "config.toml")

    one, other = kept(REFERENCE).model_dump(), kept("fast_off").model_dump()
    assert one["fast_weights"] | {"write_strength": 0.0} == other["fast_weights"]
    assert {key for key in one if one[key] != other[key]} == {"name", "fast_weights"}


@pytest.mark.slow
def test_two_workers_and_one_ray_for_all_variants(fresh: Path, finished: Plan) -> None:
    """The backbone in shards; what they find is what one process finds, up to the order of sums."""
    starts: list[object] = []
    start = cluster._start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_start", lambda settings: starts.append(settings) or start(settings))
        of = planned(
            fresh, "cluster.num_workers=2", "cluster.cpus_per_worker=0.5", "sharding.stage=3", names="fast_off"
        )
        assert ablate.run(of) == 0
    assert len(starts) == 1 and not ray.is_initialized()
    for name in (REFERENCE, "fast_off"):
        one, other = (load_file(each.config.run_dir / name / SIDECARS_FOLDER / WEIGHTS) for each in (of, finished))
        assert tiny.furthest(one, other) < 1e-3
    assert [(row["variant"], row["gap_tokens"], row["n"]) for row in result(of)["rows"]] == [
        (row["variant"], row["gap_tokens"], row["n"])
        for row in result(finished)["rows"]
        if row["variant"] in (REFERENCE, "fast_off")
    ]
    (parent,), children = in_mlflow(of)
    assert parent.info.status == "FINISHED" and set(children) == {REFERENCE, "fast_off"}
