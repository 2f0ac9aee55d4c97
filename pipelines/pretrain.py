"""`cortex pretrain`: makes the small backbone that ships with the package, from a recipe, on one thread."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from cortex_core.errors import ConfigError
from cortex_core.training.pretrain_config import PretrainConfig
from pipelines.config import find_recipe
from pipelines.explain import explain, knobs, parse_text, show

DESCRIPTION = "Pretrain a small backbone and write it as a Hugging Face folder with a model card."
HELP = """\
RECIPE is a TOML file or the name of one that ships. KEY=VALUE overrides one setting; values need no quotes.

Example:
  cortex pretrain pretrain --out models/mine steps=2000 data.path=notes/

Settings:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train (or resume), score, export. Returns the exit code; wrong input raises a core error."""
    given = _parser().parse_intermixed_args(argv)
    config = load_pretrain_config(given.recipe, given.overrides)
    pretrain(config, Path(given.out), Path(given.checkpoint) if given.checkpoint else None)
    return 0


def load_pretrain_config(recipe: str, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Recipe, then dotted overrides. Raises ConfigError, a line per wrong setting, or DataError."""
    path = find_recipe(recipe)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} is not an override: write name=value, such as steps=100")
        _assign(data, name.strip(), parse_text(PretrainConfig, name.strip(), value.strip()))
    try:
        return PretrainConfig.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(PretrainConfig, error.errors(include_url=False), data))) from None


def pretrain(config: PretrainConfig, out: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    """Run to the last step, resuming from `checkpoint` if it holds one; export to `out`; the scores."""
    # Imported here: --help and a wrong value are answered without torch.
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from cortex_core.training.pretrain import STATE, Pretraining
    from cortex_core.training.pretrain_export import export, measure

    torch.set_num_threads(1)  # as in the recipe's claim, and so that sums are taken in the same order every time
    checkpoint = checkpoint or out.with_name(f"{out.name}-checkpoint")
    console = Console()
    run = Pretraining.start(config)
    if (checkpoint / STATE).is_file():
        run.resume(checkpoint)
        console.print(f"resuming from {checkpoint} at step {run.step}")
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("training", total=config.steps, completed=run.step)
        for metrics in run.run():
            progress.update(bar, completed=run.step, description=f"training, {_losses(metrics)}")
            if not console.is_terminal:
                console.print(f"step {run.step} of {config.steps}: {_losses(metrics)}")
            if run.step % config.checkpoint_every_steps == 0 or run.step == config.steps:
                run.save(checkpoint)
        bar = progress.add_task("scoring", total=None)
        scores = measure(run, config.score_examples, lambda what: progress.update(bar, description=f"scoring {what}"))
    export(run, scores, out)
    console.print(f"{out}: {scores['text']['bits_per_byte']:.3f} bits per byte on held-out text")
    for row in scores["tasks"]:
        console.print(
            f"  {row['task']}, {row['filler']} filler, {row['words']} words: {row['accuracy']:.3f} (n = {row['n']})"
        )
    return scores


def _losses(metrics: dict[str, float]) -> str:
    """The figures worth a glance."""
    shown = {
        "text": metrics["loss/text_nats"],
        "answers": metrics["loss/answer_nats"],
        "key-value": metrics.get("accuracy/key_value"),
    }
    figures = [f"{name} {value:.3f}" for name, value in shown.items() if value is not None]
    return ", ".join([*figures, f"{metrics['throughput/tokens_per_s']:,.0f} tokens/s"])


def _assign(data: dict[str, Any], name: str, value: object) -> None:
    *sections, key = name.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{name}: {section} is a value, not a section; it has no keys")
    data[key] = value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line like every other wrong input, instead of the usage followed by the line."""
        raise ConfigError(f"{message}. See {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    settings = "\n".join(f"  {knob.name} = {show(knob.default)}" for knob in knobs(PretrainConfig))
    parser = _Parser(
        prog="cortex pretrain", description=DESCRIPTION, epilog=HELP + settings,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, or the name of one that ships")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings that differ this time")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the model goes")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="where it resumes from [FOLDER-checkpoint beside --out]")
    return parser
