"""The command line: parse, resolve the configuration, refuse what cannot work, hand over to the command.

Plain argparse, not pydantic-settings: overrides are the same dotted `section.key=value` as in a Tune sample,
not a hundred options; every wrong value gets the one line that `pipelines.explain` writes; `--help` teaches
without building one settings class. The module behind a command, torch and ray with it, is imported last.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cortex_core.errors import ConfigError, DataError, IncompatibleError
from pipelines import ablate_options, bench_options, dream_options, sleep_options, tune_options

VERSION = "0.1.0"
"""As in pyproject.toml. Not from the installed package: a submitted job may have the sources alone."""
DESCRIPTION = "Cortex gives a frozen language model a lasting memory."
HELP = """\
RECIPE is a TOML file or the name of one that ships. KEY=VALUE overrides one setting; values need no quotes,
lists no brackets. Settings, later wins: field default < recipe < overrides.

Output: everything goes to out_dir/name (runs/demo for the demo): config.toml, checkpoints, report. Metrics of
all runs go to out_dir/mlflow.db. The same command again, under the same name, resumes.

Examples:
  cortex train demo
  cortex train demo name=short training.steps=100 cluster.num_workers=1
  cortex train my.toml backbone.name=Qwen/Qwen3-0.6B data.path=notes/ fast_weights.rank=32
  cortex evaluate runs/demo evaluation.gaps_tokens=4096,65536
  cortex sleep runs/demo
  cortex dream runs/demo-sleep
  cortex tune fast_weights --trials 16
  cortex ablate demo --variants fast_off,no_gate,source_rule training.steps=150
  cortex plan demo backbone.name=Qwen/Qwen3-30B-A3B --gpu h200 --gpus-per-node 4
  cortex bench babilong --data hub:RMT-team/babilong --limit 20
  cortex config fast_weights
  cortex ui runs

Exit codes: 0 done, 1 failed while running, 2 wrong input (one line says what), 130 interrupted.
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are told like every other wrong input."""

    def error(self, message: str) -> NoReturn:
        """One line like every other wrong input, instead of the usage followed by the line."""
        if "unrecognized arguments: -" in message and "=" in message:
            message += ". Overrides are written without dashes: training.steps=100"
        raise ConfigError(f"{message}. See {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, return the exit code. Wrong input ends here: a line per problem on stderr, exit 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except (ConfigError, DataError, IncompatibleError) as error:
        for line in str(error).splitlines():
            print(f"cortex: {line}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # the training has diverged, and would again
        print(f"cortex: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumable = arguments[:1] in (["train"], ["sleep"], ["tune"], ["ablate"], ["bench"])
        again = f"; to resume: cortex {shlex.join(arguments)}" if resumable else ""
        print(f"\ncortex: interrupted{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `cortex config | head`: nobody reads on, which is fine
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["pretrain"]:  # it has settings, and a --help, of its own
        from pipelines import pretrain

        return pretrain.main(arguments[1:])
    if arguments[:1] == ["ablate"]:
        return _ablate(arguments[1:])
    if arguments[:1] == ["tune"]:
        return _tune(arguments[1:])
    if arguments[:1] == ["dream"]:
        return _dream(arguments[1:])
    if arguments[:1] == ["plan"]:
        from pipelines import plan_options

        return plan_options.main(arguments[1:])
    given = _parser().parse_args(arguments)
    match given.command:
        case "train":
            return _train(given.recipe, given.overrides)
        case "evaluate":
            return _evaluate(Path(given.run_folder), given.overrides)
        case "sleep":
            return _sleep(Path(given.run_folder), given.overrides)
        case "bench":
            return _bench(given)
        case "config":
            from pipelines import settings

            return settings.show(given.section, given.recipe, given.overrides)
        case "ui":
            command = ui_command(Path(given.folder), given.port)
            # MLflow's job runners serve features that are not used here; without them the page is up sooner.
            quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | os.environ
            os.execve(command[0], command, quiet)  # Ctrl-C goes to MLflow alone
    print(_parser().format_help(), end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    """Subcommands take their arguments in order; only `bench`, `config` and `ui` have options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("cortex", description=DESCRIPTION, epilog=HELP, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"cortex {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands, each with its own --help")

    def command(name: str, usage: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name, usage=f"cortex {name} {usage}", description=description, epilog=epilog, formatter_class=raw,
            help=description[:1].lower() + description[1:-1], allow_abbrev=False,
        )  # fmt: skip

    def overrides(to: argparse.ArgumentParser) -> None:
        text = "settings that differ this time; cortex config lists them"
        to.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=text)

    train = command(
        "train", "RECIPE [KEY=VALUE ...]", "Train a memory, evaluate it, write a report to out_dir/name.",
        "Examples:\n  cortex train demo\n  cortex train demo name=wide fast_weights.rank=32",
    )  # fmt: skip
    train.add_argument("recipe", metavar="RECIPE", help="a TOML file, or the name of one that ships")
    overrides(train)

    evaluate = command(
        "evaluate", "RUN_FOLDER [KEY=VALUE ...]", "Ask a trained memory again, under its run's own settings.",
        "Example:\n  cortex evaluate runs/demo evaluation.gaps_tokens=4096,65536 evaluation.num_examples=400",
    )  # fmt: skip
    evaluate.add_argument("run_folder", metavar="RUN_FOLDER", help="out_dir/name of a run")
    overrides(evaluate)

    sleep_options.add(command("sleep", sleep_options.USAGE, sleep_options.DESCRIPTION, sleep_options.EPILOG))

    bench_options.add(command(
        "bench", "NAME --data DATA [--model MODEL --sidecars FOLDER] [options]",
        "Ask a memory the questions of a public long-context benchmark.", bench_options.EPILOG,
    ))  # fmt: skip

    # Only for the list: `_dispatch` hands these their arguments unparsed, for their options may stand anywhere.
    command("dream", dream_options.USAGE, dream_options.DESCRIPTION)
    command("tune", tune_options.USAGE, "Search for better settings: train many short runs and compare them.")
    command("ablate", ablate_options.USAGE, "Train variants of a memory and compare them.")
    command("plan", "RECIPE [KEY=VALUE ...] [options]", "Say whether a run fits a cluster of GPUs, and how fast it is.")
    command("pretrain", "RECIPE --out FOLDER [KEY=VALUE ...]", "Train a small backbone from scratch.")

    config = command(
        "config", "[SECTION] [--recipe RECIPE] [KEY=VALUE ...]",
        "Print every setting, or what a recipe resolves to.",
        "Examples:\n  cortex config training\n  cortex config --recipe demo training.steps=100",
    )  # fmt: skip
    text = "only this one, e.g. training; pretrain for the settings of cortex pretrain"
    config.add_argument("section", nargs="?", metavar="SECTION", help=text)
    config.add_argument("--recipe", metavar="RECIPE", help="print the resolved values as TOML instead")
    overrides(config)

    ui = command("ui", "[FOLDER] [--port PORT]", "Open MLflow on the runs in a folder.")
    ui.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="out_dir or a run's folder [runs]")
    ui.add_argument("--port", type=int, default=5000, help="where the page is served, on this machine only [5000]")
    return parser


def _bench(given: argparse.Namespace) -> int:
    from cortex_core.eval.benchmarks.example import Selection
    from pipelines import bench

    def names(given: list[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in given for name in part.split(",")))

    selection = Selection(names(given.task), names(given.length), given.limit)
    return bench.run(
        bench.Request(given.name, given.data, given.model, given.sidecars, selection, given.window, given.out)
    )


def _train(recipe: str, overrides: list[str]) -> int:
    from pipelines.config import load_config
    from pipelines.preflight import check
    from pipelines.trained import with_its_memory

    config = with_its_memory(load_config(recipe, overrides))
    check(config)
    from pipelines import stages

    return stages.run(config)


def _ablate(arguments: list[str]) -> int:
    parser = _intermixed("ablate", ablate_options.USAGE, ablate_options.DESCRIPTION, ablate_options.epilog())
    ablate_options.add(parser)
    given = parser.parse_intermixed_args(arguments)

    from pipelines.preflight import check
    from pipelines.variants import plan

    planned = plan(given.recipe, given.overrides, given.variants)
    for config in planned.variants.values():
        check(config)
    from pipelines import ablate

    return ablate.run(planned)


def _tune(arguments: list[str]) -> int:
    parser = _intermixed("tune", tune_options.USAGE, tune_options.DESCRIPTION, tune_options.epilog())
    tune_options.add(parser)
    given = parser.parse_intermixed_args(arguments)

    from pipelines.preflight import check
    from pipelines.sweep_plan import plan

    planned = plan(
        given.study, given.overrides, trials=given.trials, search=given.search, stop_early=not given.no_early_stop,
        concurrent=given.concurrent,
    )  # fmt: skip
    check(planned.config)
    from pipelines import tune

    return tune.run(planned)


def _intermixed(name: str, usage: str, description: str, epilog: str) -> Parser:
    """Of a command whose options may stand anywhere between its settings."""
    return Parser(
        f"cortex {name}", usage=f"cortex {name} {usage}", description=description, epilog=epilog, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def _evaluate(folder: Path, overrides: list[str]) -> int:
    from pipelines.trained import settings_of

    config = settings_of(folder, overrides)
    from pipelines import evaluate

    return evaluate.run(config, folder)


def _sleep(folder: Path, overrides: list[str]) -> int:
    from pipelines.config import SIDECARS_FOLDER
    from pipelines.preflight import check_out_dir
    from pipelines.trained import settings_of

    named = any(override.startswith("name=") for override in overrides)
    name = () if named else (f"name={folder.resolve().name}-sleep",)
    config = settings_of(folder, [f"sidecars={folder / SIDECARS_FOLDER}", *name, *overrides])
    check_out_dir(config)
    from pipelines import sleep

    return sleep.run(config)


def _dream(arguments: list[str]) -> int:
    from pipelines.trained import settings_of

    parser = _intermixed("dream", dream_options.USAGE, dream_options.DESCRIPTION, dream_options.EPILOG)
    dream_options.add(parser)
    given = parser.parse_intermixed_args(arguments)
    folder = Path(given.run_folder)
    config = settings_of(folder, given.overrides)
    if not (folder / "memories.safetensors").is_file():
        raise DataError(f"{folder}: has no memories.safetensors, so it has not slept. First: cortex sleep {folder}")
    from pipelines import dream

    return dream.run(config, folder, given.number)


def ui_command(folder: Path, port: int) -> list[str]:
    """What serves MLflow's page on the database of `folder`. Raises DataError if there is none."""
    from pipelines.config import DATABASE_FILE

    database = next((p for p in (folder / DATABASE_FILE, folder.parent / DATABASE_FILE) if p.is_file()), None)
    if database is None:
        raise DataError(f"{folder}: no {DATABASE_FILE} in or beside it. Give the out_dir of a run, or train first")
    uri = f"sqlite:///{database.absolute()}"
    print(f"MLflow on {uri}\nhttp://127.0.0.1:{port}   (stop with Ctrl-C)", flush=True)
    options = ["--backend-store-uri", uri, "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", "mlflow", "ui", *options]
