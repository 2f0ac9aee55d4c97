"""`cortex pretrain`: makes the small backbone that ships with the package, from a recipe, on one thread."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cortex_core.training.pretrain_config import PretrainConfig
from pipelines.cli import Parser
from pipelines.explain import listing
from pipelines.resolve import find_recipe, resolve
from pipelines.settings import help_width

DESCRIPTION = "Pretrain a small backbone and write it as a Hugging Face folder with a model card."
HELP = """\
RECIPE is a TOML file or the name of one that ships. KEY=VALUE overrides one setting; values need no quotes.

Example:
  cortex pretrain pretrain --out models/mine steps=2000 data.path=notes/

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train (or resume), score, export. Returns the exit code; wrong input raises a core error."""
    given = _parser().parse_intermixed_args(argv)
    config = load_pretrain_config(given.recipe, given.overrides)
    out = Path(os.path.abspath(given.out))  # `.` has no name that a neighbour could be called after
    checkpoint = Path(given.checkpoint) if given.checkpoint else out.parent / f"{out.name}-checkpoint"
    pretrain(config, out, checkpoint)
    return 0


def load_pretrain_config(recipe: str, overrides: Sequence[str] = ()) -> PretrainConfig:
    """`resolve` for a backbone."""
    return resolve(PretrainConfig, find_recipe(recipe, "pretrain"), overrides)


def pretrain(config: PretrainConfig, out: Path, checkpoint: Path) -> dict[str, Any]:
    """Run to the last step, resuming from `checkpoint` if it holds one; export to `out`; the scores."""
    # Imported here: --help and a wrong value are answered without torch.
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from cortex_core.training.pretrain import STATE, Pretraining
    from cortex_core.training.pretrain_export import export, measure

    torch.set_num_threads(config.threads)
    console = Console()
    run = Pretraining.start(config)
    if (checkpoint / STATE).is_file():
        run.resume(checkpoint)
        console.print(f"resuming from {checkpoint} at step {run.step}")
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("training", total=config.steps, completed=run.step)
        for metrics in run.run(checkpoint):
            progress.update(bar, completed=run.step, description=f"training, {_losses(metrics)}")
            if not console.is_terminal:
                console.print(f"step {run.step} of {config.steps}: {_losses(metrics)}")
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
    shown = {"text": metrics["loss/text_nats"], "answers": metrics["loss/answer_nats"]}
    shown |= {name.removeprefix("accuracy/"): value for name, value in metrics.items() if name.startswith("accuracy/")}
    figures = [f"{name} {value:.2f}" for name, value in shown.items()]
    return ", ".join([*figures, f"{metrics['throughput/tokens_per_s']:,.0f} tokens/s"])


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="cortex pretrain", description=DESCRIPTION,
        epilog=HELP + "\n".join(listing(PretrainConfig, width=help_width())),
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, or the name of one that ships")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings that differ this time")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the model goes")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="where it resumes from [FOLDER-checkpoint beside --out]")
    return parser


if __name__ == "__main__":
    import sys

    from pipelines.cli import main as command

    sys.exit(command(["pretrain", *sys.argv[1:]]))
