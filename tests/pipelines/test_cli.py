"""The command line as a user meets it: help, what is printed, exit codes, and that wrong input leaves no trace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from cortex_core.errors import ConfigError, DataError, IncompatibleError
from cortex_core.eval.ablations import VARIANTS
from cortex_core.training.pretrain_config import PretrainConfig
from pipelines import cli
from pipelines.config import RunConfig, load_config
from pipelines.explain import knobs
from pipelines.pretrain import load_pretrain_config


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr for wrong input."""
    before = sorted(Path().rglob("*"))
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("cortex: ")
    assert sorted(Path().rglob("*")) == before, "wrong input must write nothing"
    return line.removeprefix("cortex: ")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train"], ["required: RECIPE", "cortex train --help"]),
        (["tarin", "demo"], ["'tarin'", "'train'", "cortex --help"]),
        (["train", "nope.toml"], ["nope.toml: no such recipe", "path of a TOML file", "demo"]),
        (["train", "nope"], ["nope: no such recipe", "that ships: codes, demo"]),
        (["train", "pretrain"], ["pretrain: is a recipe of cortex pretrain, not of cortex train", "cortex pretrain --help"]),
        (["pretrain", "demo", "--out", "x"], ["demo: is a recipe of cortex train, not of cortex pretrain", "cortex train --help"]),
        (["pretrain", "nope", "--out", "x"], ["nope: no such recipe", "that ships: pretrain"]),
        (["pretrain", "pretrain", "--out", "x", "steps"], ["'steps' is not an override", "such as steps=100"]),
        (["train", "demo", "--training.steps=3"], ["--training.steps=3", "without dashes: training.steps=100"]),
        (["train", "demo", "training.steps"], ["'training.steps' is not an override", "name=value"]),
        (["train", "demo", "training.stpes=3"], ["training.stpes: unknown key", "did you mean training.steps?"]),
        (["train", "demo", "training.steps=0"], ["training.steps = 0: must be at least 1"]),
        (["train", "demo", "fast_weights.decay=2"], ["fast_weights.decay = 2: must be at most 1"]),
        (["train", "demo", "backbone.name=./none"], ['backbone.name = "./none"', "no such folder", "hub id"]),
        (["train", "demo", "data.path=./none"], ['data.path = "./none"', "no such file", "leave it out"]),
        (["train", "demo", "cluster.num_workers=4096", "training.batch_size=4096", "training.in_window_batch_size=0"],
         ["cluster.num_workers = 4096", f"at most {len(os.sched_getaffinity(0))}", "Set cluster.num_workers="]),
        (["ablate"], ["required: RECIPE", "cortex ablate --help"]),
        (["ablate", "nope"], ["nope: no such recipe", "that ships: codes, demo"]),
        (["ablate", "demo", "--variants", "no_gat,fast_off"], ["no_gat: no such variant", "Did you mean no_gate?"]),
        (["ablate", "demo", "training.steps=0", "--variants", "no_gate"], ["training.steps = 0: must be at least 1"]),
        (["ablate", "demo", "fast_weights.gate=soft"], ["fast_weights.gate=soft: variant soft_gate sets fast_weights.gate"]),
        (["ablate", "demo", "--variant=no_gate"], ["--variant=no_gate", "cortex ablate --help"]),
        (["ablate", "demo", "data.path=./none"], ['data.path = "./none"', "no such file"]),
        (["plan"], ["required: RECIPE", "cortex plan --help"]),
        (["plan", "nope"], ["nope: no such recipe", "that ships: codes, demo"]),
        (["plan", "demo", "--gpu", "h10"], ["--gpu h10: no such GPU", "h100, h200", "did you mean h100?", "--memory-gib"]),
        (["plan", "demo", "--nodes", "0"], ["--nodes", "'0'", "whole number, 1 to 100000", "cortex plan --help"]),
        (["plan", "demo", "--mfu", "40"], ["--mfu", "'40'", "at most 1", "cortex plan --help"]),
        (["plan", "demo", "--tflops", "nan"], ["--tflops", "'nan'", "a number, at least 0"]),
        (["plan", "demo", "--memory-gib", "1"], ["--context-gib 1.5: must be below 1", "--memory-gib"]),
        (["plan", "demo", "--nodes", "3", "--gpus-per-node", "5"],
         ["training.batch_size = 16", "multiple of 15", "cluster.num_workers = 15", "training.batch_size=30"]),
        (["plan", "demo", "fast_weights.rank=4096"], ["fast_weights.rank = 4096: must be at most 32"]),
        (["plan", "demo", "backbone.name=./none"], ['backbone.name = "./none"', "no such folder", "hub id"]),
        (["evaluate", "runs/none"], ["runs/none: no such folder", "out_dir/name"]),
        (["evaluate", "."], [".: has no config.toml", "out_dir/name"]),
        (["config", "trainning"], ["trainning: no such section", "fast_weights, data", "Did you mean training?"]),
        (["config", "trainning", "training.steps=5"], ["trainning: no such section"]),
        (["config", "training", "training.steps=0"], ["training.steps = 0: must be at least 1"]),
        (["config", "training.steps=0"], ["training.steps = 0: must be at least 1"]),
        (["config", "--recipe", "none"], ["none: no such recipe"]),
        (["ui"], ["runs: no mlflow.db in or beside it", "out_dir"]),
        (["ui", "--port", "x"], ["--port", "'x'", "cortex ui --help"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)  # fmt: skip
def test_wrong_input_gets_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]) -> None:
    line = refused(capsys, *arguments)
    assert [part for part in parts if part not in line] == [], line


def test_a_run_that_has_not_finished_is_not_evaluated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.toml").write_text("name = 'half'", encoding="utf-8")
    line = refused(capsys, "evaluate", "half")
    assert line.startswith("half: has no sidecars yet")
    assert line.endswith("Go on with it: cortex train half/config.toml")
    line = refused(capsys, "evaluate", "half", "training.steps=0")
    assert line.startswith("training.steps = 0: must be at least 1")


def test_several_problems_get_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "demo", "training.steps=0", "fast_weights.rank=0"]) == 2
    assert [line.partition(" = ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "cortex: fast_weights.rank", "cortex: training.steps",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [ConfigError, DataError, IncompatibleError])
def test_wrong_input_found_later_is_told_the_same_way(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def found_late(_: list[str]) -> int:
        raise kind("text.jsonl line 3: has no field 'text'")

    monkeypatch.setattr(cli, "_dispatch", found_late)
    assert refused(capsys, "train", "demo") == "text.jsonl line 3: has no field 'text'"


def test_a_defect_is_not_disguised_as_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(_: list[str]) -> int:
        raise ValueError("not the user's fault")

    monkeypatch.setattr(cli, "_dispatch", defect)
    with pytest.raises(ValueError, match="not the user's fault"):
        cli.main(["train", "demo"])


def test_a_training_that_diverged_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(_: list[str]) -> int:
        raise FloatingPointError("3 steps had a loss that is not finite")

    monkeypatch.setattr(cli, "_dispatch", diverges)
    assert cli.main(["train", "demo"]) == 1
    assert capsys.readouterr().err == "cortex: 3 steps had a loss that is not finite\n"


def test_an_interruption_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert cli.main(["train", "demo", "data.path=my notes"]) == 130
    assert capsys.readouterr().err == "\ncortex: interrupted; to resume: cortex train demo 'data.path=my notes'\n"
    assert cli.main(["ablate", "demo", "--variants", "no_gate"]) == 130
    assert capsys.readouterr().err.endswith("to resume: cortex ablate demo --variants no_gate\n")
    assert cli.main(["evaluate", "runs/demo"]) == 130
    assert capsys.readouterr().err == "\ncortex: interrupted\n"


@pytest.mark.parametrize("command", [None, "train", "evaluate", "ablate", "plan", "config", "ui"])
def test_help_teaches(capsys: pytest.CaptureFixture[str], command: str | None) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"] if command else ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "\t" not in text
    assert max(map(len, text.splitlines())) <= 110
    assert command in ("ui", None) or f"cortex {command} " in text.partition("Example")[2]
    if command is None:
        assert [
            word for word in ("train", "evaluate", "pretrain", "ablate", "config", "ui") if f"\n    {word} " not in text
        ] == []
        assert [word for word in ("Output:", "runs/demo", "mlflow.db", "Exit codes") if word not in text] == []


def test_the_help_of_ablate_says_what_each_variant_takes_away(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["ablate", "--help"])
    lines = {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert [name for name, variant in VARIANTS.items() if f"{name:<18}{variant.without}" not in lines] == []


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: cortex")


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the package is not installed."""
    monkeypatch.setattr(metadata, "version", lambda name: metadata.distribution(f"no-such-{name}"))
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    declared = tomllib.loads((Path(cli.__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
    assert capsys.readouterr().out == f"cortex {declared}\n"


def test_config_prints_every_setting_with_its_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config"]) == 0
    text = capsys.readouterr().out
    assert [knob.name for knob in knobs(RunConfig) if f"  {knob.name} = " not in text] == []
    words = " ".join(text.split())
    assert [knob.name for knob in knobs(RunConfig) if knob.doc not in words] == []
    assert "\t" not in text and max(map(len, text.splitlines())) <= 110


def test_config_prints_one_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "sharding"]) == 0
    out = capsys.readouterr().out
    assert "sharding.stage = 3" in out
    assert "training.steps" not in out


def test_config_prints_one_section_of_what_is_overridden(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "training", "training.steps=5", "seed=3"]) == 0
    assert tomllib.loads(capsys.readouterr().out) == {
        "training": load_config(None, ["training.steps=5"]).training.model_dump(mode="json")
    }
    assert cli.main(["config", "data", "--recipe", "demo"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["data"]["max_bytes"] == 8_000_000


def test_config_prints_the_settings_of_pretrain(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "pretrain"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for knob in knobs(PretrainConfig):
        assert f"{knob.name} = " in words
        assert knob.doc in words
    assert "training.steps" not in words
    assert cli.main(["config", "pretrain", "rows.early_steps=3", "steps=7"]) == 0
    printed = tomllib.loads(capsys.readouterr().out)
    assert PretrainConfig.model_validate(printed) == load_pretrain_config("pretrain", ["rows.early_steps=3", "steps=7"])


def test_config_prints_what_a_recipe_resolves_to(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["config", "--recipe", "demo", "training.steps=7", "name=x"]) == 0
    (tmp_path / "x.toml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_config("x.toml") == load_config("demo", ["training.steps=7", "name=x"])


def test_ui_serves_the_database_in_or_beside_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out" / "demo").mkdir(parents=True)
    (tmp_path / "out" / "mlflow.db").touch()
    for folder in ("out", "out/demo"):
        command = cli.ui_command(Path(folder), 5005)
        assert command[:4] == [sys.executable, "-m", "mlflow", "ui"]
        assert f"sqlite:///{tmp_path}/out/mlflow.db" in command
        assert command[-4:] == ["--host", "127.0.0.1", "--port", "5005"]


def test_a_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -u -m pipelines config | head -n 1", shell=True, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("Settings of the run\n", "")


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "train", "nope.toml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("cortex: nope.toml: no such recipe")
    assert len(done.stderr.splitlines()) == 1


def test_ctrl_c_is_answered_with_130(tmp_path: Path) -> None:
    """A real signal to a real process, while it waits for a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "slow.toml")
    code = (
        "import os, sys; from pathlib import Path; from pipelines import cli, resolve\n"
        "resolve.find_recipe = lambda recipe: print('reading', flush=True) or Path(recipe)\n"
        "sys.exit(cli.main(['train', 'slow.toml']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "\ncortex: interrupted; to resume: cortex train slow.toml\n"
