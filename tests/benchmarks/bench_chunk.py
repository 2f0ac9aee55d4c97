"""Times the chunked scan with pytest-benchmark (`make bench`): forward and backward, by length and by chunk size."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from cortex_core.fast_weights import chunk
from cortex_core.fast_weights.state import FastWeights
from tests.benchmarks.rows import scan


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """The tests' shape checks would be timed with it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_scan_by_length(benchmark: BenchmarkFixture, tokens: int) -> None:
    """Should grow in proportion to the length."""
    benchmark(scan.scan, scan.streams(tokens))


@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128, 256])
def test_scan_by_chunk_size(benchmark: BenchmarkFixture, chunk_size: int) -> None:
    """Short chunks are many small steps, long ones solve large triangles."""
    benchmark(scan.scan, scan.streams(1024), chunk_size)


def test_scan_without_gradients(benchmark: BenchmarkFixture) -> None:
    """As a session reads."""
    inputs = {name: value.detach() for name, value in scan.streams(4096).items()}
    keys, queries, values, gate, up = inputs.values()
    with torch.no_grad():
        state, opening = FastWeights(up), scan.Opening(gate)
        benchmark(chunk.scan, scan.RULE, keys, queries, values, opening, state, scan.SEGMENT, scan.CHUNK_SIZE)


def test_oracle(benchmark: BenchmarkFixture) -> None:
    """The same recurrence token by token."""
    benchmark.pedantic(scan.oracle, (scan.streams(256),), rounds=3, warmup_rounds=1)
