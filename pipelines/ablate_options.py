"""The command line of `cortex ablate`. Apart from `pipelines.ablate`, so that help comes without what that imports."""

from __future__ import annotations

import argparse

USAGE = "RECIPE [--variants NAME,NAME] [KEY=VALUE ...]"
DESCRIPTION = "Train variants of a memory, evaluate them, and write one table that compares them."
_EPILOG = """\
All are trained with the same seed, on the same data, and asked the same questions. {reference} is always among
them. Settings hold for all variants.

Variants, with what each takes away or replaces:
{variants}

Output: out_dir/name/ablations.json, .csv, .parquet, .png and .html, with the difference to {reference} on the
same examples and its 95 % interval; each variant's run in out_dir/name/VARIANT; in MLflow one parent run with
a child each. The same command again resumes; a variant that has finished under the same settings stays.

Examples:
  cortex ablate demo
  cortex ablate demo --variants fast_off,source_rule
  cortex ablate demo name=quick --variants no_gate training.steps=100 evaluation.gaps_tokens=0,1024
"""


def epilog() -> str:
    """What the help ends with."""
    from cortex_core.eval.ablations import REFERENCE, VARIANTS

    variants = "\n".join(f"  {name:<18}{variant.without}" for name, variant in VARIANTS.items())
    return _EPILOG.format(reference=REFERENCE, variants=variants)


def add(ablate: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    ablate.add_argument("recipe", metavar="RECIPE", help="a TOML file, or the name of one that ships")
    ablate.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings that differ this time")
    ablate.add_argument("--variants", metavar="NAME,NAME", help="only these [all]")
