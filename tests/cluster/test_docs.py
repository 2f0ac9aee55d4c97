"""docs/cluster.md: its commands are valid, and it names every file in cluster/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click import Command, Group
from ray.scripts.scripts import cli

from pipelines.config import load_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text()
COMMANDS = [line.partition(" #")[0].strip() for block in re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
            for line in block.splitlines()]  # fmt: skip


def test_the_settings_are_valid() -> None:
    found = [match for c in COMMANDS if (match := re.search(r"(?:pipelines\.train|cortex train) (\S+) ?(.*)", c))]
    assert len(found) >= 3
    for match in found:
        load_config(match[1], match[2].split())


def test_what_it_names_is_there_and_everything_is_named() -> None:
    named = set(re.findall(r"\bcluster/[\w/.*-]*\w", PAGE))
    assert [path for path in named if not list(ROOT.glob(path))] == []
    folders = {"deepspeed": "`{}`", "kuberay": "cluster/kuberay/", "ray": "cluster/ray/{}", "image": "cluster/image/{}"}
    files = [path for path in (ROOT / "cluster").rglob("*") if path.is_file()]
    assert [f for f in files if folders[f.parent.name].format(f.name) not in PAGE] == []


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("ray ")])
def test_ray_knows_the_command_and_its_options(line: str) -> None:
    command: Command = cli
    words = line.partition(" -- ")[0].split()[1:]
    while isinstance(command, Group):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    assert [word for word in words if word.startswith("-") and word not in known] == []
