"""What DeepSpeed is told: the defaults, a user's file in place of `offload`, and the lines for a file that cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cortex_core.errors import ConfigError, DataError
from pipelines import zero3
from pipelines.config import RunConfig, ShardingConfig, load_config, located
from pipelines.preflight import check_deepspeed

SHIPPED = Path(__file__).parents[2] / "cluster" / "deepspeed"
OURS = {"train_micro_batch_size_per_gpu", "steps_per_print", "bf16", "fp16"}


def told(file: str | None = None, offload: Any = "none", **values: Any) -> dict[str, Any]:
    defaults = {"dtype": "bfloat16", "micro_batch": 1, "pin_memory": True}
    return zero3.settings(**defaults | values, offload=offload, file=file)


def without_ours(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in OURS}


def written(folder: Path, content: object) -> str:
    path = folder / "own.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_the_files_that_ship_say_what_the_settings_say() -> None:
    plain, cpu = (json.loads((SHIPPED / f"{name}.json").read_text()) for name in ("zero3", "zero3_cpu_offload"))
    assert plain == without_ours(told())
    assert cpu == without_ours(told(offload="cpu"))
    unpinned = without_ours(told(offload="cpu", pin_memory=False))
    unpinned["zero_optimization"]["offload_param"]["pin_memory"] = True
    assert cpu == unpinned


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_the_files_that_ship_are_known_to_deepspeed(path: Path) -> None:
    """With its own classes, which refuse a key that they do not know. At the top level it refuses nothing."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    settings = told(str(path))
    checked = DeepSpeedConfig(settings)
    assert checked.zero_optimization_stage == 3 and checked.bfloat16_config.enabled
    assert checked.zero_config.param_persistence_threshold == 0
    device = "nvme" if "nvme" in path.stem else "cpu" if "cpu" in path.stem else None
    assert getattr(checked.zero_config.offload_param, "device", None) == device
    assert set(without_ours(settings)) == {"zero_optimization"}
    for inside in filter(None, (settings["zero_optimization"], settings["zero_optimization"].get("offload_param"))):
        inside["no_such_key"] = 1
        with pytest.raises(ValidationError, match="no_such_key"):
            DeepSpeedConfig(settings)
        del inside["no_such_key"]


def test_a_file_goes_before_the_defaults_and_cortex_before_both(tmp_path: Path) -> None:
    zero = {"stage": 3, "stage3_max_reuse_distance": 7, "stage3_prefetch_bucket_size": "auto"}
    file = written(tmp_path, {"zero_optimization": zero, "aio": {"queue_depth": 16}})
    got = told(file, dtype="float16", micro_batch=4)
    assert got["aio"] == {"queue_depth": 16}
    assert got["zero_optimization"] == zero3.STAGE_3 | {"stage3_max_reuse_distance": 7}
    assert got["train_micro_batch_size_per_gpu"] == 4
    assert got["fp16"] == {"enabled": True} and got["bf16"] == {"enabled": False}
    assert zero3.STAGE_3["stage3_max_reuse_distance"] == 0, "the defaults were changed"


def configured(file: str, *overrides: str) -> RunConfig:
    return load_config(None, [f"sharding.deepspeed={file}", *overrides])


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{", ("is not JSON", "line 1")),
        ([3], ("zero_optimization.stage = null: must be 3",)),
        ({"zero_optimisation": {"stage": 3}}, ("zero_optimization.stage = null: must be 3",)),
        ({"zero_optimization": {"stage": 2}}, ("zero_optimization.stage = 2: must be 3", "sharding.stage=0")),
        ({"zero_optimization": {"stage": True}}, ("zero_optimization.stage = true: must be 3",)),
        ({"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}}, ("fp16: must not be", "use backbone.dtype instead")),
        ({"zero_optimization": {"stage": 3}, "optimizer": {}, "train_batch_size": "auto"},
         ("optimizer, train_batch_size: must not be", "use optimizer.*, training.batch_size instead")),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
         ("zero_optimization.offload_optimizer: must not be",)),
    ],
)  # fmt: skip
def test_a_file_that_cannot_work_gets_one_line(tmp_path: Path, content: object, parts: tuple[str, ...]) -> None:
    file = written(tmp_path, content)
    with pytest.raises(ConfigError) as error:
        check_deepspeed(configured(file))
    (line,) = str(error.value).splitlines()
    assert line.startswith(f'sharding.deepspeed = "{file}": ')
    assert [part for part in parts if part not in line] == [], line


@pytest.mark.parametrize(
    ("content", "device"),
    [
        ({}, "none"), ({"offload_param": "auto"}, "none"), ({"offload_param": {}}, "none"),
        ({"offload_param": {"device": "none"}}, "none"), ({"offload_param": {"device": "cpu"}}, "cpu"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/x"}}, "nvme"),
    ],
)  # fmt: skip
def test_where_weights_rest(tmp_path: Path, content: dict[str, object], device: str) -> None:
    file = written(tmp_path, {"zero_optimization": {"stage": 3, **content}})
    assert zero3.offload_of(configured(file).sharding) == device
    assert zero3.offload_of(ShardingConfig(offload="cpu")) == "cpu" and zero3.offload_of(ShardingConfig()) == "none"


def test_every_key_that_is_refused_names_a_setting() -> None:
    config = RunConfig()
    for setting in zero3.NOT_IN_A_FILE.values():
        section, _, name = setting.partition(".")
        assert name == "*" or hasattr(getattr(config, section), name), setting


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match=r"cannot be read on \S+ \(.*every node sees"):
            check_deepspeed(configured(str(path)))


def test_it_is_found_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    written(tmp_path, {"zero_optimization": {"stage": 3}})
    assert located(configured("own.json")).sharding.deepspeed == str(tmp_path / "own.json")
    assert located(configured("~/own.json")).sharding.deepspeed == str(tmp_path / "home" / "own.json")
    assert located(load_config()).sharding.deepspeed is None
    check_deepspeed(configured("own.json"))
    check_deepspeed(load_config())
