from __future__ import annotations

import json
from pathlib import Path

import pytest

from cortex_core.errors import ConfigError, DataError
from cortex_core.training.pretrain_config import PretrainConfig
from pipelines.pretrain import load_pretrain_config, main


def test_command_trains_scores_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{a}{b}{c}" for a in ("ba", "ko", "lu", "mi") for b in ("na", "re", "so", "ti") for c in "nrst"]
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.txt").write_text(" ".join(words[number:] + words[:number]) * 3)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        'name = "tiny"\nsteps = 4\nbatch_size = 2\nscore_examples = 2\ncheckpoint_every_steps = 2\n'
        "report_every_steps = 2\n[decoder]\nvocab_size = 700\nhidden_size = 32\nnum_layers = 2\nmlp_size = 32\n"
        f'window_tokens = 256\n[data]\nheld_out_frac = 0.2\npath = "{tmp_path / "text"}"\n'
    )
    out = tmp_path / "model"
    assert main([str(recipe), "--out", str(out), "steps=2", "decay_frac=0"]) == 0
    assert json.loads((out / "scores.json").read_text())["steps"] == 2
    assert main([str(recipe), "--out", str(out), "decay_frac=0"]) == 0
    assert "resuming from" in capsys.readouterr().out
    scores = json.loads((out / "scores.json").read_text())
    assert scores["steps"] == 4
    assert scores["training_tokens"] == 4 * 2 * 256


@pytest.mark.parametrize(
    ("out", "model", "checkpoint"),
    [(".", "here", "here-checkpoint"), ("..", "", "-checkpoint"), ("a/../b/", "here/b", "here/b-checkpoint")],
)
def test_any_folder_may_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, model: str, checkpoint: str
) -> None:
    written: list[str] = []
    monkeypatch.setattr("pipelines.pretrain.pretrain", lambda _, *folders: written.extend(map(str, folders)))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["pretrain", "--out", out]) == 0
    prefix = f"{tmp_path}/" if model else str(tmp_path)
    assert written == [prefix + model, prefix + checkpoint]


def test_shipped_recipe_is_the_default_configuration() -> None:
    assert load_pretrain_config("pretrain") == PretrainConfig()
    assert load_pretrain_config("pretrain", ["optimizer.name=apollo_mini"]).optimizer.name == "apollo_mini"


def test_wrong_settings_are_one_readable_line() -> None:
    for override, complaint in (
        ("stepz=3", "stepz: unknown key"),
        ("steps=0", "steps = 0: must be at least 1"),
        ("optimizer.name=sgd", 'optimizer.name = "sgd": expected one of'),
        ("decoder.hidden_size=130", "hidden_size = 130 must be a multiple of 2"),
        ("rows.key_value_frac=0.95", "the shares of task rows add up to"),
        ("steps", "'steps' is not an override"),
        ("steps.more=1", "steps is a value, not a section"),
    ):
        with pytest.raises(ConfigError) as error:
            load_pretrain_config("pretrain", [override])
        assert complaint in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="no such recipe"):
        load_pretrain_config("absent")


def test_wrong_arguments_are_one_readable_line() -> None:
    with pytest.raises(ConfigError, match=r"--out\. See cortex pretrain --help") as error:
        main(["pretrain"])
    assert "\n" not in str(error.value)


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "rows.early_steps = 50" in text
    assert "decoder.vocab_size = 2560" in text
