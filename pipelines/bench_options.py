"""The command line of `cortex bench`. Apart from `pipelines.bench`, so that help comes without what that imports."""

from __future__ import annotations

import argparse

EPILOG = """\
NAME is longbench, babilong or longmemeval. DATA is what you have of it in its published format: a folder, a file or a
zip archive; or hub:OWNER/NAME, which is fetched into the hub's cache: hub:THUDM/LongBench, hub:RMT-team/babilong (qa1
to qa5 up to 32k, unless told otherwise), hub:xiaowu0162/longmemeval-cleaned (s, unless told otherwise).

The memory reads all of the context, segment by segment; the bare model sees the last window of the same prompt. Both
answer greedily. LongBench and BABILong are scored as published, but for three Chinese sets (char_…: each ideograph is a
word). LongMemEval's official score is a judge's: give it the hypotheses-*.jsonl that are written; the scores here only
compare words. The prompts are our own: compare memory and bare model, not a leaderboard.

Output, in FOLDER: answers.jsonl, a line as soon as an example is answered; summary.json, .csv and .parquet, means with
95 % intervals by task and length. The same command again asks only what is missing.

Examples:
  cortex bench babilong --data hub:RMT-team/babilong --task qa1 qa2 --length 4k 16k --limit 50
  cortex bench longbench --data LongBench/data.zip --task hotpotqa qasper_e
  cortex bench longmemeval --data longmemeval_s.json --model Qwen/Qwen3-0.6B --sidecars runs/mine/sidecars
"""


def add(bench: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    bench.add_argument("name", metavar="NAME", choices=("longbench", "babilong", "longmemeval"), help="the benchmark")
    bench.add_argument("--data", required=True, metavar="DATA", help="a folder, a file, or hub:OWNER/NAME[@REVISION]")
    bench.add_argument("--model", metavar="MODEL", help="hub id or folder of the backbone [the small one that ships]")
    bench.add_argument("--sidecars", metavar="FOLDER", help="its memory: runs/NAME/sidecars [the one that ships]")
    bench.add_argument("--task", nargs="+", default=[], metavar="TASK", help="only these, e.g. qa1 or hotpotqa")
    bench.add_argument("--length", nargs="+", default=[], metavar="LENGTH", help="only these: 4k; 8k+; s, m, oracle")
    bench.add_argument("--limit", type=positive, metavar="N", help="only the first N of each task and length")
    text = "tokens of the prompt that the bare model sees [one segment, as much as the memory's attention]"
    bench.add_argument("--window", type=positive, metavar="N", help=text)
    bench.add_argument("--out", metavar="FOLDER", help="where answers are kept [runs/bench/NAME]")


def positive(text: str) -> int:
    """A whole number from 1 up, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return number
