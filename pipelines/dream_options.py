"""The command line of `cortex dream`. Apart from `pipelines.dream`, so that help comes without what that imports."""

from __future__ import annotations

import argparse

from pipelines.bench_options import positive

USAGE = "RUN_FOLDER [KEY=VALUE ...] [--number N]"
DESCRIPTION = "Let a model that has slept dream of what it read, and judge the dreams."
EPILOG = """\
Memories that a walk over their graph brings together make a scene: lines of some, text that the model goes on with,
and a question about one. The model answers, and the judge compares with what was written; every rejection has a reason.

Output, in RUN_FOLDER/dreams: dreams.jsonl, a line per dream with all that it came from, dreams.json, memories.png.

Examples:
  cortex dream runs/demo-sleep
  cortex dream runs/demo-sleep --number 1000 scenario.max_lines=6 cluster.num_workers=4
"""


def add(dream: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    dream.add_argument("run_folder", metavar="RUN_FOLDER", help="out_dir/name of a run of cortex sleep")
    text = "settings that differ this time; cortex config lists them"
    dream.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=text)
    dream.add_argument("--number", type=positive, default=128, metavar="N", help="dreams [128]")
