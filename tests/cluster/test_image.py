"""The image, as far as it can be judged without building it: what each instruction says, and that it finds its files."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "cluster" / "image" / "Dockerfile").read_text()
IGNORED = (ROOT / ".dockerignore").read_text()
INSTRUCTIONS = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD"}
BASES = {"ubuntu:24.04": "python3.12"}


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction with its arguments on one line."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.partition(" ")[0].upper(), line.partition(" ")[2].strip()) for line in joined.splitlines()]


def problems(text: str, ignored: str = IGNORED) -> list[str]:
    """A line for everything that is wrong with a Dockerfile."""
    steps = instructions(text)
    found = [f"{name}: is not used here" for name, _ in steps if name not in INSTRUCTIONS]
    for name, arguments in steps:
        if name in ("ARG", "ENV") and re.search(r"(?i)(token|secret|password|\bkey)\w*=", arguments):
            found.append(f"{name} {arguments}: a secret would stay in the image")
        if name == "ENV" and re.search("OMP_NUM_THREADS|PYTHONDONTWRITEBYTECODE", arguments):
            found.append(f"{name} {arguments}: slows every worker down")
        if name == "COPY":
            found += about_copy(arguments.split(), ignored)
        if name == "RUN" and "apt-get install" in arguments and "rm -rf /var/lib/apt/lists/*" not in arguments:
            found.append("RUN apt-get: leaves its lists in the layer")
    return [*found, *about_versions(text, steps), *about_user(steps), *about_layers(steps)]


def about_copy(words: list[str], ignored: str) -> Iterator[str]:
    if words[0].startswith("--from="):
        return
    for source in words[:-1]:
        if not (ROOT / source).exists():
            yield f"COPY {source}: is not in the repository"
        elif not sent(source, ignored):
            yield f"COPY {source}: .dockerignore leaves it out"


def sent(path: str, ignored: str) -> bool:
    """Whether a path is part of what is sent to the builder; the last line that matches decides."""
    kept = True
    for line in filter(None, (line.strip() for line in ignored.splitlines())):
        pattern = line.removeprefix("!")
        if not line.startswith("#") and any(fnmatch(str(part), pattern) for part in (Path(path), *Path(path).parents)):
            kept = line.startswith("!")
    return kept


def about_versions(text: str, steps: list[tuple[str, str]]) -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = [dependency for dependency in project["dependencies"] if dependency.startswith("torch==")]
    if not re.search(rf"pip install .*\b{re.escape(torch)}(\s|$)", text, flags=re.MULTILINE):
        yield f"pip install: pyproject.toml has {torch}"
    if "pip install . -c constraints.txt" not in text:
        yield "pip install: versions are not pinned"
    if f":{project['version']} ." not in text:
        yield f"the command at the top does not make version {project['version']}"
    (base,) = [arguments.partition("=")[2] for name, arguments in steps if arguments.startswith("BASE=")] or [""]
    python = BASES.get(base)
    if python is None or set(re.findall(r"\bpython3(?:\.\d+)?", text)) != {python}:
        yield f"ARG BASE={base}: is not pinned, or the Python is another"


def about_user(steps: list[tuple[str, str]]) -> Iterator[str]:
    users = [arguments for name, arguments in steps if name == "USER"]
    if not users or not users[-1].isdecimal() or users[-1] == "0":
        yield "USER: must be a number, and not root's"
    elif not any(f"useradd --uid {users[-1]} " in arguments for name, arguments in steps if name == "RUN"):
        yield f"USER {users[-1]}: is not made"
    if steps[-1][0] != "CMD" or not steps[-1][1].startswith("["):
        yield "CMD: must come last, as a list"


def about_layers(steps: list[tuple[str, str]]) -> Iterator[str]:
    """Sources come after the dependencies: to change one does not install the others anew."""
    order = [n for n, (_, arguments) in enumerate(steps) if "-c constraints.txt" in arguments]
    sources = [n for n, (name, arguments) in enumerate(steps) if name == "COPY" and arguments.startswith("cortex_core")]
    if not order or not sources or sources[0] < order[0]:
        yield "COPY cortex_core: comes before the dependencies"


def test_the_image_is_right() -> None:
    assert problems(DOCKERFILE) == []


def test_little_is_sent_to_the_builder() -> None:
    tracked = (".git", ".venv", "runs", "tests", "docs", "cluster/ray", "cortex_core/__pycache__")
    assert [path for path in tracked if sent(path, IGNORED)] == []
    assert sent("cortex_core/config", IGNORED) and sent("cluster/deepspeed/zero3.json", IGNORED)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("COPY pipelines pipelines", "ADD https://example.org/x.tar.gz /x", "ADD: is not used here"),
        ("COPY pipelines pipelines", "COPY pipeline pipelines", "COPY pipeline: is not in the repository"),
        ("COPY pipelines pipelines", "COPY tests tests", "COPY tests: .dockerignore leaves it out"),
        ("ARG BASE=ubuntu:24.04", "ARG BASE=ubuntu:latest", "ARG BASE=ubuntu:latest: is not pinned"),
        ("python3.12-venv", "python3.11-venv", "the Python is another"),
        ("torch==2.13.0", "torch==2.12.0", "pyproject.toml has torch=="),
        ("torch==2.13.0", "torch", "pyproject.toml has torch=="),
        ("pip install . -c constraints.txt", "pip install .", "versions are not pinned"),
        ("cortex:0.1.0 .", "cortex:0.2.0 .", "does not make version"),
        ("PYTHONUNBUFFERED=1", "HF_TOKEN=hf_x", "a secret would stay in the image"),
        ("ARG TORCH_INDEX=", "ARG PIP_PASSWORD=", "a secret would stay in the image"),
        ("PYTHONUNBUFFERED=1", "OMP_NUM_THREADS=1", "slows every worker down"),
        ("USER 10001", "USER root", "USER: must be a number"),
        ("USER 10001", "", "USER: must be a number"),
        ("USER 10001", "USER 10002", "USER 10002: is not made"),
        (" && rm -rf /var/lib/apt/lists/*", "", "leaves its lists"),
        ('CMD ["cortex", "--help"]', "CMD cortex --help", "CMD: must come last, as a list"),
        ("WORKDIR /src", "COPY cortex_core cortex_core", "comes before the dependencies"),
    ],
)  # fmt: skip
def test_a_broken_copy_is_noticed(old: str, new: str, line: str) -> None:
    assert old in DOCKERFILE
    broken = problems(DOCKERFILE.replace(old, new))
    assert [problem for problem in broken if line in problem], broken
