"""The command line of `cortex tune`. Apart from `pipelines.tune`, so that help comes without what that imports."""

from __future__ import annotations

import argparse
from typing import get_args

from pipelines.bench_options import positive
from tune_spaces.study import Search

USAGE = "STUDY [--trials N] [options] [KEY=VALUE ...]"
DESCRIPTION = "Search for better settings: train many short runs, stop the poor ones early, compare them."
_EPILOG = """\
STUDY is a TOML file or the name of one that ships:
{studies}

A study names settings, a range for each, and the recipe that it varies. Every trial is an ordinary run on Ray Train.
Trials are compared by their loss on validation questions, whose words are neither trained on nor evaluated. A setting
that is given as KEY=VALUE is the same in all trials, and not varied; any other holds for all trials as well.
With pbt (population-based training) all trials wait at each validation; the worst quarter then goes on from weights of
the best, with settings near theirs. It varies optimizer.* and weights of training alone: what a run outlives.

A study of your own:
  about = "how much a memory needs"
  recipe = "demo"
  [overrides]
  training.steps = 60
  [space]
  fast_weights.rank = [8, 16, 32]
  optimizer.learning_rate = {{ low = 1e-3, high = 1e-2, log = true }}

Output, in out_dir/name: sweep.html, parallel.png, sensitivity.png, sweep.csv, .parquet and .json; best.toml, the recipe
with the best trial's values; each trial's run in trials/. In MLflow one parent run with a child per trial. The same
command again goes on where the first was stopped or killed.

Examples:
  cortex tune fast_weights
  cortex tune learning --trials 32 name=rates fast_weights.rank=16
  cortex tune mine.toml --search grid --no-early-stop
  cortex tune learning --search pbt --trials 8
  cortex tune sparsity cluster.address=auto cluster.num_workers=2 cluster.use_gpu=true out_dir=/shared/runs
"""


def epilog() -> str:
    """What the help ends with."""
    from importlib import import_module

    from tune_spaces.study import SHIPPED

    studies = [import_module(f"tune_spaces.{name}").STUDY for name in SHIPPED]
    return _EPILOG.format(studies="\n".join(f"  {study.name:<14}{study.about}" for study in studies))


def add(tune: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    tune.add_argument("study", metavar="STUDY", help="a TOML file, or the name of a study that ships")
    tune.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all trials")
    tune.add_argument("--trials", type=positive, metavar="N", help="how many [16, or what the study says]")
    text = "trials at a time, at most [as many as there are CPUs or GPUs for]"
    tune.add_argument("--concurrent", type=positive, metavar="N", help=text)
    text = "tpe learns from the trials before, random does not, grid tries every point; pbt: poor trials take over the "
    text += "weights of good ones as they go, with settings near theirs [tpe]"
    tune.add_argument("--search", choices=get_args(Search), help=text)
    text = "let every trial take all its steps [poor ones are stopped]"
    tune.add_argument("--no-early-stop", action="store_true", help=text)
