"""The command line of `cortex sleep`. Apart from `pipelines.sleep`, so that help comes without what that imports."""

from __future__ import annotations

import argparse

USAGE = "RUN_FOLDER [KEY=VALUE ...]"
DESCRIPTION = "Tell a trained memory facts day by day, let it sleep, and ask with empty fast weights."
EPILOG = """\
Facts that stay true stand in held-out text, some a day. Surprise decides what is written; every sleep.every_tokens
tokens the fast weights teach what they hold to slow weights, and are wiped. The backbone stays as it is.

Output, in out_dir/name (name is the run's with -sleep): sleep.json, sleep.png, and the sidecars with their slow
weights; dreamed.jsonl, if nights have dreamed. The same command again resumes what was interrupted.

Examples:
  cortex sleep runs/demo
  cortex sleep runs/demo life.num_facts=1000 sleep.slots=16384 name=long-life
  cortex sleep runs/demo sleep.dream_frac=1 name=dreams-alone
  cortex sleep runs/demo sleep.steps=16 cluster.num_workers=0
"""


def add(sleep: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    sleep.add_argument("run_folder", metavar="RUN_FOLDER", help="out_dir/name of a run, whose memory it is")
    text = "settings that differ this time; cortex config lists them"
    sleep.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=text)
