"""Rows about speed, each a ratio of two ways that take turns."""

from __future__ import annotations

from collections.abc import Iterator, Set

from tests.benchmarks import pairs
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

PIPELINE_PAIRS, ORACLE_PAIRS, SCAN_PAIRS, DECODE_PAIRS = 5, 5, 15, 45
SHORT_TEXT, LONG_TEXT, READ_TOKENS, DECODED = 1024, 1 << 20, 65_536, 64


def pipeline_throughput_ratio(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Training tokens/s of one worker under Ray Train with ZeRO-3, over those of the same loop in a bare process.

    Both run `worker.train` on the demo's settings and the same batches; the bare process knows no Ray and loads the
    backbone whole. Each is a fresh process per run of 15 steps, of which the first 5 warm up. Five pairs in one
    session, alternately, while the same cluster is up; median, smallest to largest. Ray lowers the priority of its
    workers, which on a busy machine would measure the neighbours: here it may not.
    """
    from tests.benchmarks.rows import two_ways

    ratio = pairs.median(two_ways.interleaved(demo.config, PIPELINE_PAIRS))
    yield Row("pipeline_throughput_ratio", ratio.value, 0.9, "higher", "", ratio.n, ratio.low, ratio.high)


def chunk_vs_oracle_speedup(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """How many times faster the chunked scan is than the same recurrence token by token, forward and backward together.

    4,096 tokens, 4 heads of 64 dimensions, rank 16, one thread, gradients of all inputs. 5 pairs in one process,
    alternating; median, smallest to largest.
    """
    from tests.benchmarks.rows import scan

    inputs = scan.streams(scan.TOKENS)
    with pairs.one_thread():
        found = pairs.ratios(
            lambda: scan.oracle(inputs, needs_surprise=False),
            lambda: scan.scan(inputs, needs_surprise=False),
            pairs=ORACLE_PAIRS,
            warm_up=1,
        )
    ratio = pairs.median(found)
    yield Row("chunk_vs_oracle_speedup", ratio.value, 40.0, "higher", "x", ratio.n, ratio.low, ratio.high)


def chunk_vs_transformers_speedup(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """How many times faster the chunked scan is than the gated delta rule that transformers runs on a CPU (Qwen3-Next).

    The same recurrence on the same numbers: 4,096 tokens, 4 heads of 64 dimensions, keys of 16, one thread. Forward
    and backward with gradients of all inputs, and forward alone. Both at their default chunk (32, 64). 15 pairs in one
    process, alternating; median with its 95 % interval.
    """
    import torch

    from tests.benchmarks.rows import scan

    inputs = scan.streams(scan.TOKENS)
    for name, goal, gradients in (
        ("chunk_vs_transformers_speedup", 2.0, True),
        ("chunk_vs_transformers_speedup_forward", None, False),
    ):
        if name not in wanted:
            continue
        with pairs.one_thread(), torch.set_grad_enabled(gradients):
            found = pairs.ratios(
                lambda gradients=gradients: scan.transformers_scan(inputs, gradients=gradients),
                lambda gradients=gradients: scan.scan(inputs, needs_surprise=False, gradients=gradients),
                pairs=SCAN_PAIRS,
            )
        ratio = pairs.median(found)
        yield Row(name, ratio.value, goal, "higher", "x", ratio.n, ratio.low, ratio.high)


def decode_after_long_text_ratio(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Tokens per second of generation with a session that has read 1,048,576 tokens, over one that has read 1,024.

    Held-out text, one row, 64 new tokens a call after a prompt of 64. 45 pairs in one process, alternating; median with
    its 95 % interval.
    """
    import torch

    model = demo.model
    device = model.backbone.device
    sessions = []
    for tokens in (SHORT_TEXT, LONG_TEXT):
        session = model.new_session()
        for first in range(0, tokens, READ_TOKENS):
            count = min(READ_TOKENS, tokens - first)
            excerpt = demo.corpus.excerpt((first,), count, "held_out")
            model.read(torch.from_numpy(excerpt)[None].to(device), session)
        sessions.append(session)
    prompt = torch.from_numpy(demo.excerpts(1, DECODED)).to(device)

    def decode(session) -> None:  # noqa: ANN001
        model.generate(prompt, session=session.fork(), max_new_tokens=DECODED, min_new_tokens=DECODED, do_sample=False)

    found = pairs.ratios(lambda: decode(sessions[0]), lambda: decode(sessions[1]), pairs=DECODE_PAIRS)
    ratio = pairs.median(found)
    yield Row("decode_after_long_text_ratio", ratio.value, 0.98, "higher", "", ratio.n, ratio.low, ratio.high)


def backward_bytes(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Bytes per token that the chunked scan keeps for its backward pass, at 16,384 tokens over those at 1,024.

    And those of the token-by-token recurrence over the chunked one's, at 1,024. Counted exactly: the storage of every tensor that autograd saves, each once, without the inputs. 4 heads of 64
    dimensions, rank 16. States are kept per chunk, not per token: what is left grows with the length and no faster.
    """
    from tests.benchmarks.rows import scan

    def kept(tokens: int, run) -> float:  # noqa: ANN001
        return scan.saved_bytes(run, scan.streams(tokens)) / tokens

    short, long = (kept(tokens, scan.scan_forward) for tokens in (1024, 16_384))
    yield Row("backward_bytes_growth", long / short, 1.02, "lower", "", 1)
    yield Row("backward_bytes_oracle_over_chunk", kept(1024, scan.oracle_forward) / short, None, "higher", "x", 1)
