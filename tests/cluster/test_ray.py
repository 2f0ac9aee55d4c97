"""The files for `ray up`: what Ray's own check says of them, without a network, and what it does not look at."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "ray"
FILES = ("local", "aws", "gcp")
CLOUDS = ("aws", "gcp")
Config = dict[str, Any]


def load(name: str) -> Config:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def problems(config: Config) -> list[str]:
    """A line for everything that is wrong with one file."""
    try:
        prepared = prepare_config(copy.deepcopy(config))
        validate_config(prepared)
    except Exception as error:  # of jsonschema, and whatever a wrong type leads to
        return [str(error).partition("\n")[0] or type(error).__name__]
    found = [f"{local}: is not in the repository" for local in config["file_mounts"].values() if not exists(local)]
    text = yaml.safe_dump(config)
    found += [
        f"{word}: a secret stands in the file" for word in re.findall(r"AKIA\w+|(?i:secret|password)\w*|hf_\w+", text)
    ]
    if not any("-c ~/cortex/constraints.txt" in command for command in config["setup_commands"]):
        found.append("setup_commands: versions are not pinned")
    for role in ("head", "worker"):
        found += [f"{role}: {line}" for line in about_start(config[f"{role}_start_ray_commands"])]
    if " --num-cpus=0 --num-gpus=0 " not in config["head_start_ray_commands"][-1]:
        found.append("head: workers may be placed on it")
    return found + (about_growth(prepared) if config["provider"]["type"] != "local" else [])


def exists(local: str) -> bool:
    return local == "~/.ray/auth_token" or (ROOT / local).exists()


def about_start(commands: list[str]) -> list[str]:
    """`ray start` knows every option, and asks for the token."""
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in (*parameter.opts, *parameter.secondary_opts)}
    words = shlex.split(commands[-1])
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    found = [f"ray start {option}: no such option" for option in options if option not in known]
    return found if "RAY_AUTH_MODE=token" in words else [*found, "anybody may start work on it"]


def about_growth(prepared: Config) -> list[str]:
    types = prepared["available_node_types"]
    head, gpu = types[prepared["head_node_type"]], types["gpu"]
    found = [] if head["resources"] == {"CPU": 0, "GPU": 0} else ["head: workers may be placed on it"]
    if gpu["resources"].get("GPU", 0) < 1:
        found.append("gpu: has no GPU")
    if gpu["min_workers"] != 0 or gpu["max_workers"] < 1:
        found.append("gpu: does not grow from none")
    return found


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_the_file(name: str) -> None:
    assert problems(load(name)) == []


@pytest.mark.parametrize("name", CLOUDS)
def test_machines_get_their_credentials_from_the_cloud(name: str) -> None:
    key = {"aws": "IamInstanceProfile", "gcp": "serviceAccounts"}[name]
    for node_type in load(name)["available_node_types"].values():
        assert node_type["node_config"][key]


def put(path: str, value: object) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        *parts, last = path.split("/")
        for part in parts:
            config = config[part]
        config[last] = value

    return change


def say(role: str, old: str, new: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        commands = config[f"{role}_start_ray_commands"]
        assert old in commands[-1]
        commands[-1] = commands[-1].replace(old, new)

    return change


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (put("cluster_nam", "x"), "'cluster_nam' was unexpected"),
        (put("setup_command", []), "'setup_command' was unexpected"),
        (put("auth/ssh_usr", "x"), "'ssh_usr' was unexpected"),
        (put("cluster_name", 3), "3 is not of type 'string'"),
        (put("setup_commands", ["pip install cortex-memory"]), "versions are not pinned"),
        (put("file_mounts/x", "no/such/folder"), "no/such/folder: is not in the repository"),
        (put("cluster_name", "my-password"), "password: a secret stands in the file"),
        (say("head", "--num-cpus=0", "--num-cpus=4"), "head: workers may be placed on it"),
        (say("head", "--port", "--prt"), "head: ray start --prt: no such option"),
        (say("worker", "RAY_AUTH_MODE=token ", ""), "worker: anybody may start work on it"),
    ],
)  # fmt: skip
def test_a_broken_copy_is_noticed(name: str, broken: Callable[[Config], None], line: str) -> None:
    config = load(name)
    broken(config)
    assert [problem for problem in problems(config) if line in problem], problems(config)


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (put("available_node_types/gpu/min_worker", 0), "'min_worker' was unexpected"),
        (put("head_node_type", "heda"), "`head_node_type` must be one of"),
        (put("available_node_types/gpu/resources", {"CPU": 8}), "gpu: has no GPU"),
        (put("available_node_types/gpu/min_workers", 1), "gpu: does not grow from none"),
        (put("available_node_types/head/resources", {"CPU": 4, "GPU": 0}), "head: workers may be placed on it"),
    ],
)  # fmt: skip
def test_a_broken_cloud_is_noticed(name: str, broken: Callable[[Config], None], line: str) -> None:
    test_a_broken_copy_is_noticed(name, broken, line)
