"""Multi-query associative recall with the published sizes: one memory layer, trained from scratch, against its state."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Set

from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

NUM_SEQUENCES, BATCH, SEED, TEST_SEED = 200, 25, 0, 20_001
WIDTH = RANK = VALUE_DIM = 128
WRITE_STRENGTH = 0.1
"""A tenth: with more pairs than dimensions, whole steps of the delta rule erase what other keys hold."""
GOAL, MOST_FLOATS = 0.99, 16_384

SIZES = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
ROWS = ("mqar_average", *(f"mqar_{tokens}_{pairs}" for tokens, pairs in SIZES), "mqar_state_floats")


def associative_recall(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Answers that are right, averaged over the seven test sizes of Arora et al. 2024 (up to 256 pairs, 1,024 tokens).

    Vocabulary 8,192, questions by power law, random ids between them. Embedding, one memory layer of rank 128 with a
    state of 16,384 numbers, tied output; no attention. Trained on 200 batches of 8,192 tokens of the published training
    sizes (up to 64 pairs), seed 0, then asked about 200 other sequences per size. Intervals over sequences.
    """
    import torch

    from cortex_core.config import FastWeightsConfig
    from cortex_core.intervals import mean_interval
    from cortex_core.tasks.mqar import TEST, VOCAB_SIZE
    from tests.benchmarks.recall_model import RecallModel, answers, train

    torch.manual_seed(SEED)
    config = FastWeightsConfig(rank=RANK, decay=1.0, controller=False, write_strength=WRITE_STRENGTH)
    model = RecallModel(VOCAB_SIZE, WIDTH, VALUE_DIM, config)
    train(model, SEED)
    by_size: dict[tuple[int, int], list[float]] = {}
    with torch.no_grad():
        for portion in TEST:
            task, shares = portion.task, []
            for first in range(0, NUM_SEQUENCES, BATCH):
                batch = task.batch(range(first, first + BATCH), split="held_out", seed=TEST_SEED)
                logits, expected = answers(model, batch)
                shares += (logits.argmax(-1) == expected).view(BATCH, task.num_pairs).float().mean(1).tolist()
            by_size[task.num_tokens, task.num_pairs] = shares
    for (tokens, num_pairs), shares in by_size.items():
        found = mean_interval(shares, lowest=0.0, highest=1.0)
        yield Row(f"mqar_{tokens}_{num_pairs}", found.value, None, "higher", "", len(shares), found.low, found.high)
    means = [statistics.fmean(shares) for shares in by_size.values()]
    spread = 1.96 * sum(statistics.variance(s) / len(s) for s in by_size.values()) ** 0.5 / len(means)
    mean = statistics.fmean(means)
    n = len(means) * NUM_SEQUENCES
    yield Row("mqar_average", mean, GOAL, "higher", "", n, mean - spread, min(1.0, mean + spread))
    yield Row("mqar_state_floats", model.state_floats, MOST_FLOATS, "lower", "", 1)
