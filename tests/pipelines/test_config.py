"""One run's settings: precedence, what a typed value means, the line for each wrong one, TOML and back."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_core.config import TaskName
from cortex_core.errors import ConfigError, DataError
from pipelines.config import RunConfig, load_config, located
from pipelines.explain import knobs
from pipelines.resolve import RECIPES, find_recipe
from pipelines.toml_text import dump_toml

TASKS = ", ".join(f'"{name}"' for name in get_args(TaskName))
KNOBS = {knob.name: knob for knob in knobs(RunConfig)}


def value(config: RunConfig, name: str) -> object:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


# The other kind of recipe, for `cortex pretrain`, is parsed in the test of its own settings.
@pytest.mark.parametrize(
    "path",
    sorted(set(RECIPES.glob("*.toml")) - set(RECIPES.glob("pretrain*.toml"))),
    ids=lambda path: path.stem,
)
def test_every_recipe_that_ships_resolves(path: Path) -> None:
    assert load_config(path) == load_config(path.stem)
    assert load_config(path).name == path.stem


def test_later_layers_win(tmp_path: Path) -> None:
    path = recipe(tmp_path, "seed = 5\n[fast_weights]\nrank = 8\ndecay = 0.5\n")
    config = load_config(path, ["fast_weights.rank=4", "fast_weights.rank=2"])
    assert config.seed == 5
    assert config.fast_weights.rank == 2
    assert config.fast_weights.decay == 0.5
    assert config.fast_weights.chunk_size == KNOBS["fast_weights.chunk_size"].default
    assert load_config(path).fast_weights.rank == 8
    assert load_config() == RunConfig()


def test_text_and_values_are_the_same_override() -> None:
    typed = load_config(None, ["training.steps=7", "evaluation.gaps_tokens=0,512", "optimizer.learning_rate=1e-4"])
    given_values = {
        "training.steps": np.int64(7),
        "evaluation": {"gaps_tokens": [0, 512]},
        "optimizer.learning_rate": np.float64(1e-4),
    }
    assert load_config(None, given_values) == typed


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("backbone.name=foo", "foo"),
        ('backbone.name="foo bar"', "foo bar"),
        ("backbone.name=a=b", "a=b"),
        ("backbone.revision=1234567", "1234567"),
        ("backbone.revision=1e5", "1e5"),
        ("backbone.revision=null", None),
        ("backbone.dtype=float32", "float32"),
        ("name=true", "true"),
        ("data.path=/data/a,b.txt", "/data/a,b.txt"),
        ("data.path=~/text", "~/text"),
        ("training.steps=1_000", 1000),
        (" training.steps = 12 ", 12),
        ("training.kl_weight=2", 2.0),
        ("training.kl_weight=1e-3", 0.001),
        ("training.gradient_checkpointing=true", True),
        ("evaluation.gaps_tokens=[256,1024]", (256, 1024)),
        ("evaluation.gaps_tokens=256,1024", (256, 1024)),
        ("evaluation.gaps_tokens=256", (256,)),
        ("tasks.names=key_value,n_back", ("key_value", "n_back")),
        ("tasks.names=n_back", ("n_back",)),
        ("tasks.fillers=['text']", ("text",)),
        ("fast_weights.layers=auto", "auto"),
        ("fast_weights.layers=2", (2,)),
        ("fast_weights.layers=0,3", (0, 3)),
        ("optimizer.betas=0.8,0.9", (0.8, 0.9)),
    ],
)
def test_what_is_typed_is_what_is_meant(override: str, expected: object) -> None:
    got = value(load_config(None, [override]), override.partition("=")[0].strip())
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("fast_weights.rank=0", "fast_weights.rank = 0: must be at least 1 (default 16)"),
        ("fast_weights.chunk_size=2000", "fast_weights.chunk_size = 2000: must be at most 1024 (default 32)"),
        ("fast_weights.decay=0", "fast_weights.decay = 0: must be above 0 (default 0.98)"),
        ("training.ema_decay=1", "training.ema_decay = 1: must be below 1 (default 0.98)"),
        ("training.kl_weight=inf", "training.kl_weight = Infinity: must be a finite number (default 1.0)"),
        ("fast_weights.rank=8.5", "fast_weights.rank = 8.5: expected an integer, at least 1 (default 16)"),
        ("fast_weights.rank=true", "fast_weights.rank = true: expected an integer, at least 1 (default 16)"),
        ("fast_weights.rank='8'", 'fast_weights.rank = "8": expected an integer, at least 1 (default 16)'),
        ("fast_weights.rank=null", "fast_weights.rank = null: expected an integer, at least 1 (default 16)"),
        ("fast_weights.rank=[8]", "fast_weights.rank = [8]: expected an integer, at least 1 (default 16)"),
        ("fast_weights.controller=yes", 'fast_weights.controller = "yes": expected true or false (default true)'),
        ("training.steps=2026-01-01",
         'training.steps = "2026-01-01": expected an integer, at least 1 (default 600)'),
        ("backbone.dtype=float3",
         'backbone.dtype = "float3": expected one of "auto", "fast", "float32", "bfloat16", "float16"; '
         'did you mean "float32"? (default "auto")'),
        ("sharding.stage=2", "sharding.stage = 2: expected one of 0, 3 (default 3)"),
        ("optimizer.betas=0.9", "optimizer.betas = [0.9]: expected a list of 2, each entry a number, at least 0, at most 1 "
         "(default [0.9, 0.98])"),
        ("optimizer.betas=0.9,2", "optimizer.betas[1] = 2: must be at most 1 (default [0.9, 0.98])"),
        ("tasks.names=", "tasks.names = []: must not be empty (default [\"key_value\"])"),
        ("tasks.names=txet", f'tasks.names[0] = "txet": expected one of {TASKS}, "corpus" (default ["key_value"])'),
        ("evaluation.tasks=key_value,corpus",
         f'evaluation.tasks[1] = "corpus": expected one of {TASKS} (default ["key_value"])'),
        ("tasks.fillers=txt",
         'tasks.fillers[0] = "txt": expected one of "text", "random"; did you mean "text"? (default ["text", "random"])'),
        ("fast_weights.layers=first",
         'fast_weights.layers = ["first"]: expected a list, each entry an integer, at least 0 or "auto" (default "auto")'),
        ("seed=-1", "seed = -1: must be at least 0 (default 0)"),
        ("name=../x", "name = \"../x\": names the run's folder: use letters, digits, '.', '_' and '-', not '.' first "
         '(default "demo")'),
        ("tracking.experiment=", 'tracking.experiment = "": must not be empty (default "cortex")'),
        ("fast_weights.rnak=8", "fast_weights.rnak: unknown key in section [fast_weights]; did you mean fast_weights.rank?"),
        ("fast_weight.rank=8", "fast_weight: unknown key at the top level; did you mean fast_weights?"),
        ("rank=8", "rank: unknown key at the top level; did you mean fast_weights.rank or optimizer.rank?"),
        ("training.rank=8", "training.rank: unknown key in section [training]; did you mean fast_weights.rank or optimizer.rank?"),
        ("sharding.zzz=8", "sharding.zzz: unknown key in section [sharding]; it has: stage, offload, deepspeed"),
        ("batch_size=8", "batch_size: unknown key at the top level; did you mean training.batch_size or evaluation.batch_size or sleep.batch_size or scenario.batch_size?"),
        ("sharding=3", "sharding = 3: is a section; set one of its keys: stage, offload, deepspeed"),
        ("seed.x=3", 'seed = {"x": 3}: expected an integer, at least 0, below 4294967296 (default 0)'),
        ("fast_weights.write_strength=2.5",
         "fast_weights.write_strength = 2.5 is beyond the stability bound: along a unit key the error is multiplied by "
         "1 - write_strength each time. Choose a value below 2 (1 replaces what the key held)"),
        ("training.sparsity_span=[0.6,0.4]", "training.sparsity_span = [0.6, 0.4] must begin before it ends"),
        ("training.steps", "'training.steps' is not an override: write name=value, such as training.steps=100"),
        ("=3", "'=3' is not an override: write name=value, such as training.steps=100"),
    ],
)  # fmt: skip
def test_a_wrong_value_gets_one_line(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert str(caught.value) == line


def test_every_wrong_value_gets_its_own_line(tmp_path: Path) -> None:
    path = recipe(tmp_path, "sed = 1\n[fast_weights]\nrank = 0\n[evaluation]\ngaps_tokens = [1, -2, 'x']\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["training.steps=0"])
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "fast_weights.rank = 0",
        "training.steps = 0",
        "evaluation.gaps_tokens[1] = -2",
        'evaluation.gaps_tokens[2] = "x"',
        "sed",
    ]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["cluster.num_workers=3"], ["training.batch_size = 16 and training.in_window_batch_size = 4: must be a multiple of 3 (cluster.num_workers = 3 x", "Set training.batch_size=18 training.in_window_batch_size=6,"]),
        (["cluster.num_workers=8"], ["training.in_window_batch_size = 4: must be", "multiple of 8", "Set training.in_window_batch_size=8,"]),
        (["cluster.min_workers=3", "cluster.num_workers=4"], ["training.batch_size = 16 and training.in_window_batch_size = 4: must be a multiple of 12 (cluster.min_workers = 3 and cluster.num_workers = 4 x", "Set training.batch_size=24 training.in_window_batch_size=12,"]),
        (["cluster.min_workers=3"], ["cluster.min_workers = 3: must be at most 2, num_workers", "Lower it, raise num_workers, or leave it out: min_workers=null"]),
        (["cluster.min_workers=1", "cluster.num_workers=0"], ["cluster.min_workers = 1: must be at most 0, num_workers"]),
        (["cluster.min_workers=0"], ["cluster.min_workers = 0", "at least 1"]),
        (["training.accumulation_steps=5"], ["training.batch_size = 16 and", "accumulation_steps = 5", "multiple of 10", "Set training.batch_size=20 training.in_window_batch_size=10,"]),
        (["training.batch_size=1"], ["training.batch_size = 1:", "multiple of 2", "Set training.batch_size=2,"]),
        (["fast_weights.rule=hebbian"], ["fast_weights.write_strength = 1.0 is beyond the stability bound of rule = 'hebbian': must be at most", "= 0.0302", "Lower write_strength or decay"]),
        (["fast_weights.reversed_frac=0.5", "fast_weights.taps=1"], ["fast_weights.taps = 1 must be at least 2 with reversed_frac = 0.5", "how far back"]),
        (["fast_weights.binding=true", "fast_weights.taps=2"], ["fast_weights.taps = 2 must be at least 3 with binding = true"]),
        (["fast_weights.shared_values=true", "fast_weights.adapter_rank=8"], ["fast_weights.adapter_rank = 8 must be 0 with shared_values = true", "Choose one of the two"]),
        (["fast_weights.learn_decay=true", "fast_weights.decay=1"], ["fast_weights.decay = 1.0 cannot be learned from", "learn_decay=false"]),
        (["tasks.num_queries=100"], ["tasks.num_queries = 100 with tasks.num_pairs = 6: take at least 424 tokens, must be at most 256", "Set tasks.num_queries=58 or less"]),
        (["tasks.num_pairs=64"], ["tasks.num_queries = 6 with tasks.num_pairs = 64: take at least 280 tokens", "Lower both, or raise backbone.segment_tokens"]),
        (["tasks.num_queries=200", "training.in_window_batch_size=0"], ["take at least 824 tokens, must be at most 512 (2 x backbone.segment_tokens)"]),
        (["sharding.deepspeed=a.json", "sharding.stage=0"], ['sharding.deepspeed = "a.json"', "stage = 0", "set stage to 3, or leave deepspeed out"]),
        (["sharding.deepspeed=a.json", "sharding.offload=cpu"], ['sharding.deepspeed = "a.json"', 'takes the place of offload = "cpu"', 'set offload to "none"']),
        (["sharding.stage=0", "sharding.offload=cpu"], ['sharding.offload = "cpu"', "stage = 0", "set stage to 3"]),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    (line,) = str(caught.value).splitlines()
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    "override", ["cluster.num_workers=3", "cluster.num_workers=32", "training.accumulation_steps=5"]
)
def test_the_batch_sizes_that_are_offered_are_taken(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [override])
    offered = re.search(r"Set (.*), or change", str(caught.value))
    assert offered is not None
    load_config("demo", [override, *offered[1].split()])


def test_one_process_divides_everything() -> None:
    config = load_config(None, ["cluster.num_workers=0", "training.batch_size=7", "training.in_window_batch_size=3"])
    assert config.training.batch_size == 7
    assert load_config(None, ["training.in_window_batch_size=0"]).training.in_window_batch_size == 0


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("seed = ", ConfigError, r"not valid TOML: Invalid value .*Text needs quotes"),
        ("name = demo", ConfigError, r"not valid TOML: .*line 1"),
        ("[fast_weights]\nrank = 1\nrank = 2", ConfigError, r"not valid TOML: Cannot overwrite a value"),
        (
            "fast_weights = 3",
            ConfigError,
            r"fast_weights = 3: is a section; set one of its keys: layers, rank",
        ),
    ],
)
def test_a_recipe_that_is_not_one(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_config(recipe(tmp_path, text))


def test_a_recipe_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes("name = 'ä'".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.toml: not text in UTF-8 \(byte 8\)"):
        load_config(tmp_path / "latin.toml")


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^dmeo: no such recipe\. .* that ships: .*demo.*Did you mean demo\?$"):
        load_config("dmeo")
    with pytest.raises(DataError, match=r"that ships: demo, digits, dream, relations, text$"):
        load_config("nothing-like-it")
    with pytest.raises(DataError, match=rf"^{re.escape(str(tmp_path))}: is a folder, not a recipe"):
        load_config(tmp_path)


def test_a_file_goes_before_a_recipe_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo") == RECIPES / "demo.toml"
    Path("demo").write_text("seed = 99", encoding="utf-8")
    assert load_config("demo").seed == 99


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
VALUES = {
    "name": st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True),
    "seed": st.integers(0, 2**32 - 1),
    "out_dir": TEXT,
    "backbone.name": TEXT,
    "backbone.revision": st.none() | TEXT,
    "backbone.segment_tokens": st.integers(1, 512).map(lambda chunks: 64 * chunks),
    "fast_weights.layers": st.just("auto") | st.lists(st.integers(0, 100)).map(tuple),
    "fast_weights.decay": st.floats(0, 1, exclude_min=True),
    "fast_weights.controller": st.booleans(),
    "data.path": st.none() | TEXT,
    "tasks.names": st.lists(st.sampled_from(["key_value", "n_back"]), min_size=1).map(tuple),
    "optimizer.learning_rate": st.floats(0, exclude_min=True, allow_infinity=False),
    "optimizer.betas": st.tuples(st.floats(0, 1), st.floats(0, 1)),
    "evaluation.gaps_tokens": st.lists(st.integers(0, 2**40), min_size=1).map(tuple),
    "cluster.address": st.none() | TEXT,
    "sharding.deepspeed": st.none() | TEXT,
    "cluster.min_workers": st.none() | st.integers(1, 2),
    "cluster.worker_start_timeout_s": st.floats(0, exclude_min=True, allow_infinity=False),
    "cluster.hang_timeout_s": st.floats(0, 604_800, exclude_min=True),
    "tracking.uri": st.none() | TEXT,
    "tracking.experiment": TEXT,
}


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ([], (2,)),
        (["cluster.num_workers=0"], (1,)),
        (["cluster.min_workers=1", "cluster.num_workers=4"], (1, 2, 4)),
        (["cluster.min_workers=2", "cluster.num_workers=4", "training.accumulation_steps=2",
          "training.in_window_batch_size=16"], (2, 4)),
        (["cluster.min_workers=1", "cluster.num_workers=4", "training.in_window_batch_size=0",
          "training.batch_size=12"], (1, 2, 3, 4)),
    ],
)  # fmt: skip
def test_a_run_may_have_every_number_of_workers_that_share_its_batches(
    overrides: list[str], sizes: tuple[int, ...]
) -> None:
    assert load_config(None, overrides).world_sizes == sizes


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_toml_and_back(tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]) -> None:
    config = load_config(None, values)
    for name, expected in values.items():
        assert value(config, name) == expected
    path = tmp_path_factory.mktemp("round_trip") / "config.toml"
    path.write_text(dump_toml(config), encoding="utf-8")
    assert load_config(path) == config
    assert dump_toml(load_config(path)) == dump_toml(config)


def test_the_dump_names_every_setting_that_is_set() -> None:
    dumped = tomllib.loads(dump_toml(RunConfig()))
    flat = {f"{key}.{inner}" for key, table in dumped.items() if isinstance(table, dict) for inner in table}
    flat |= {key for key, item in dumped.items() if not isinstance(item, dict)}
    assert flat == {name for name, knob in KNOBS.items() if knob.default is not None}


def test_every_setting_is_documented_and_says_what_it_expects() -> None:
    assert not [knob.name for knob in KNOBS.values() if not knob.doc or "a value" in knob.expects]
    assert KNOBS["fast_weights.rank"].expects == "an integer, at least 1"
    assert KNOBS["training.ema_decay"].expects == "a number, at least 0, below 1"
    assert KNOBS["backbone.revision"].expects == "text or null"
    assert KNOBS["sharding.stage"].expects == "one of 0, 3"


def test_paths_do_not_depend_on_where_a_worker_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["name=a", "out_dir=out"])
    assert config.run_dir == tmp_path / "out" / "a"
    assert config.tracking_uri == f"sqlite:///{tmp_path}/out/mlflow.db"
    assert load_config(None, ["tracking.uri=http://host:5000"]).tracking_uri == "http://host:5000"


def test_paths_and_local_models_are_found_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("model", "home/model", "builtin:stdlib-1m"):
        Path(folder).mkdir(parents=True)

    def found(name: str, path: str) -> tuple[str, str | None]:
        config = located(load_config(None, {"backbone.name": name, "data.path": path, "seed": 3}))
        assert config.seed == 3
        return config.backbone.name, config.data.path

    assert found("model", "notes") == (f"{tmp_path}/model", f"{tmp_path}/notes")
    assert found("~/model", "~/a.txt") == (f"{tmp_path}/home/model", f"{tmp_path}/home/a.txt")
    assert found(str(tmp_path / "model"), "/notes") == (f"{tmp_path}/model", "/notes")
    for name in ("Qwen/Qwen3-0.6B", "gpt2", "builtin:stdlib-1m", "~/none", "~no-such-user/model"):
        assert found(name, "/notes")[0] == name
    assert located(load_config()).data.path is None
