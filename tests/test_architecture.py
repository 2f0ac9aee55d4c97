"""What holds for the sources as a whole: what is imported when, sizes, names. Layers: `lint-imports`."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cortex_core", "pipelines", "tune_spaces")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
CORE_MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "cortex_core").rglob("*.py")
)
HEAVY = {"torch", "ray", "deepspeed", "mlflow", "transformers", "pandas", "numpy", "matplotlib"}
BANNED_IN_NAMES = ("Manager", "Factory", "Registry", "Helper", "Stabilized")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_AND_IMPORT = """
import importlib, importlib.machinery, json, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in {"ray", "deepspeed", "mlflow"}:
            return super().find_spec(name, path, target)

sys.meta_path = [Without if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
for module in json.loads(sys.argv[1]):
    importlib.import_module(module)
print("imported", len(json.loads(sys.argv[1])))
"""


def test_the_core_imports_without_ray_deepspeed_and_mlflow() -> None:
    assert run_python(WITHOUT_AND_IMPORT, json.dumps(CORE_MODULES)) == f"imported {len(CORE_MODULES)}\n"


def test_without_means_without() -> None:
    with pytest.raises(AssertionError, match="No module named 'mlflow'"):
        run_python(WITHOUT_AND_IMPORT, json.dumps(["mlflow"]))


RUN_AND_LIST_IMPORTS = """
import json, sys
from pipelines.cli import main
try:
    code = main(json.loads(sys.argv[1]))
except SystemExit as stop:
    code = stop.code
sys.stdout.flush()
print("\\n" + json.dumps([code, [name for name in sys.modules if "." not in name or name.startswith("pipelines.")]]))
"""


def imported_by(*arguments: str) -> tuple[int, set[str]]:
    """Exit code of the command line, and the packages and own modules that it had loaded when it returned."""
    code, modules = json.loads(run_python(RUN_AND_LIST_IMPORTS, json.dumps(arguments)).splitlines()[-1])
    return code or 0, set(modules)


@pytest.mark.parametrize(
    "arguments",
    [[command, "--help"] for command in ("train", "ablate", "tune", "plan")] + [["--help"], ["--version"], []],
    ids=" ".join,
)
def test_help_imports_nothing_that_takes_time(arguments: list[str]) -> None:
    code, modules = imported_by(*arguments)
    assert code == 0
    assert not sorted(modules & (HEAVY | {"pipelines.config", "rich"}))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["train", "nope.toml"], 2),
        (["train", "demo", "fast_weights.rank=0"], 2),
        (["train", "demo", "fast_weights.rank=4096"], 2),
        (["train", "demo", "data.path=no/such/folder"], 2),
        (["train", "demo", "sharding.deepspeed=no/such.json"], 2),
        (["evaluate", "no/such/run"], 2),
        (["ablate", "demo", "--variants", "nope"], 2),
        (["tune", "nope"], 2),
        (["tune", "fast_weights", "fast_weights.saturation=0.6"], 2),
        (["ablate", "demo", "fast_weights.rank=4096"], 2),
        (["plan", "demo", "--gpu", "h1000"], 2),
        (["plan", "demo", "fast_weights.rank=4096"], 2),
        (["config"], 0),
        (["config", "--recipe", "demo"], 0),
        (["ui", "no/such/folder"], 2),
    ],
    ids=str,
)
def test_what_needs_no_model_imports_none(arguments: list[str], code: int) -> None:
    got, modules = imported_by(*arguments)
    assert got == code
    assert not sorted(modules & HEAVY)


@pytest.mark.parametrize("modules", ["pipelines.config, pipelines.preflight", "pipelines.mailbox"])
def test_configuration_and_mailbox_import_no_tensors(modules: str) -> None:
    imported = run_python(f"import {modules}, sys; print(*sys.modules)").split()
    assert not {module.partition(".")[0] for module in imported} & HEAVY


@pytest.mark.parametrize("module", ["pipelines.train", "pipelines.ablate", "pipelines.tune", "pipelines.launch"])
def test_drivers_and_controllers_import_no_models(module: str) -> None:
    """Seconds before the first worker is asked for; Ray Train's controller imports `pipelines.launch`."""
    assert "transformers" not in run_python(f"import {module}, sys; print(*sys.modules)").split()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_are_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{name(path)} has {lines} lines, at most {MAX_FILE_LINES}: split it by topic"


def definitions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_functions_are_small(path: Path) -> None:
    too_long = {
        node.name: length
        for node in definitions(path)
        if not isinstance(node, ast.ClassDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert not too_long, f"{name(path)}: lines per function, at most {MAX_FUNCTION_LINES}: {too_long}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_names_say_what_a_thing_does(path: Path) -> None:
    assert path.name not in {"utils.py", "helpers.py", "common.py", "misc.py"}
    classes = [node.name for node in definitions(path) if isinstance(node, ast.ClassDef)]
    banned = [c for c in classes if c.startswith("Base") or any(word in c for word in BANNED_IN_NAMES)]
    assert not banned, f"{name(path)}: {banned} name a pattern, not what the thing does"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_modules_are_documented_and_annotated_lazily(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name(path)} has no docstring"
    imports = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    has_code = any(not isinstance(node, ast.Expr) for node in tree.body)
    assert not has_code or "__future__" in imports, f"{name(path)}: from __future__ import annotations is missing"


def test_every_folder_with_sources_is_a_package() -> None:
    missing = sorted({name(path.parent) for path in SOURCES if not (path.parent / "__init__.py").is_file()})
    assert not missing, f"without an __init__.py they are not seen by lint-imports: {missing}"


def test_constraints_pin_every_dependency_but_torch() -> None:
    """torch and its CUDA packages are left open: each machine takes its own build."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    declared = [re.split(r"[^\w-]", d)[0] for d in project["dependencies"] + project["optional-dependencies"]["dev"]]
    pinned = {pin.replace("_", "-") for pin in pins}
    assert sorted(set(declared) - pinned) == ["torch"]
    assert not [pin for pin in pinned if pin.startswith(("torch", "nvidia", "cuda", "triton"))]
    assert not [line for line in lines if "/" in line]
