# `make` lists the targets. Everything runs in a virtual environment in .venv that the first target makes.
PYTHON ?= python3
VENV ?= .venv
ROW ?=
N ?=
RECIPE ?= demo
ARGS ?=
RUNS ?= runs

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per process: the tests and the demo start several processes, which would fight over the cores.
export OMP_NUM_THREADS ?= 1
# They also import the same sources again and again: compiled once, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo ablate test test-slow lint fmt bench scoreboard prediction ui constraints clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Variables: PYTHON=python3.12 (3.11 or newer), ARGS="training.steps=100" (demo; also options of test, bench and scoreboard)'

setup: $(STAMP) ## Install into .venv; the other targets do it by themselves

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cortex: Python 3.11 or newer is needed, $(PYTHON) is older or absent. Try: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "cortex: $(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing into $(VENV): two to five minutes, once'
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP) ## Train and evaluate a small memory with two workers, into runs/demo
	$(BIN)/cortex train $(RECIPE) out_dir=$(RUNS) $(ARGS)

ablate: $(STAMP) ## Take parts of the demo's memory away, one at a time, and compare: ARGS='--variants no_gate,source_rule'
	$(BIN)/cortex ablate $(RECIPE) out_dir=$(RUNS) $(ARGS)

# In two processes: the slow tests one after the other in one of them, the others file by file (tests/conftest.py). If one
# of the two dies, the run ends. In one process: ARGS='-n 0'.
test: $(STAMP) ## All tests but the nightly ones, also slow ones that start real Ray clusters (without: ARGS='-m "not slow"')
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

test-slow: $(STAMP) ## Every test that starts clusters, jobs and processes, nightly ones too, one after the other
	$(BIN)/python -m pytest -n 0 -m slow $(ARGS)

lint: $(STAMP) ## Formatting, lint, types, and who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

fmt: $(STAMP) ## Format, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## Time the mechanisms
	$(BIN)/python -m pytest tests/benchmarks/bench_*.py --benchmark-only $(ARGS)

scoreboard: $(STAMP) ## Measure every figure that the project claims, or some: ROW=name,name
	$(BIN)/python -m tests.benchmarks.scoreboard $(ROW) $(ARGS)

prediction: $(STAMP) ## Measure one of the five predictions of docs/predictions.md, and judge it: N=1 to N=5
	@test -n "$(N)" || { echo "cortex: which one? make prediction N=1, up to N=5"; exit 2; }
	$(BIN)/python -m tests.benchmarks.predictions $(N) --folder $(RUNS)/predictions $(ARGS)

ui: $(STAMP) ## MLflow's web page on the runs
	$(BIN)/cortex ui $(RUNS)

# Resolved without the old file. torch and what it brings stay open: each machine takes its own build, CPU or CUDA.
constraints: ## Resolve the dependencies anew into constraints.txt
	rm -rf $(VENV)-constraints
	$(PYTHON) -m venv $(VENV)-constraints
	$(VENV)-constraints/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -e '.[dev]'
	{ echo "# Versions that were tested together; torch and its CUDA packages are left to the machine. Made by: make constraints"; \
	  $(VENV)-constraints/bin/python -m pip freeze --exclude-editable \
	  | grep -Eiv '^(#|-|torch=|triton|nvidia|cuda|setuptools=|wheel=|pip=)|@'; } > constraints.txt
	rm -rf $(VENV)-constraints

clean: ## Remove .venv and caches; runs stay
	rm -rf $(VENV) $(VENV)-constraints build dist .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	rm -rf *.egg-info
