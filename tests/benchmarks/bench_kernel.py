"""Times the Triton kernel on a GPU with pytest-benchmark (`make bench`), against the plain form.

Forward and backward. The ratio, seconds of the kernel over seconds of the plain form, stands under `extra_info`: below 1
the kernel is faster. Skipped without a GPU. Beside flash-linear-attention: `make scoreboard ROW=gpu`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import jaxtyping
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.functional import normalize

from cortex_core.fast_weights import chunk
from cortex_core.fast_weights.kernel import delta_rule, usable
from cortex_core.fast_weights.rules import Dose, Rule
from cortex_core.fast_weights.state import FastWeights
from tests.benchmarks.pairs import median, ratios

BATCH, HEADS, HEAD_DIM = 8, 8, 64
PAIRS = 20
CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and not usable(CUDA, 16), reason="this GPU or this build of torch runs no Triton"
    ),
]


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """The tests' shape checks would be timed with it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def streams(tokens: int, rank: int, dtype: torch.dtype) -> list[Tensor]:
    """Keys, queries, values, write (also the ticks), log_decay and a state, in the order of `delta_rule`."""
    generator = torch.Generator(CUDA).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(BATCH, HEADS, *shape, generator=generator, device=CUDA)

    keys, queries = (normalize(random(tokens, rank), dim=-1).to(dtype) for _ in range(2))
    write = random(tokens).clamp(0, 1)
    log_decay = torch.full((HEADS,), math.log(0.98), device=CUDA)
    drawn = [keys, queries, random(tokens, HEAD_DIM).to(dtype), write, write.clone(), log_decay, random(rank, HEAD_DIM)]
    return [x.requires_grad_() for x in drawn]


def differentiated(inputs: list[Tensor], call: Callable[..., tuple[Tensor | None, Tensor]]) -> Callable[[], None]:
    """Forward and backward, until the GPU is done."""

    def run() -> None:
        out, final = call(*inputs)
        assert out is not None
        torch.autograd.grad(out.float().square().mean() + final.square().mean(), inputs)
        torch.cuda.synchronize()

    return run


def plain(k: Tensor, q: Tensor, v: Tensor, write: Tensor, ticks: Tensor, log_decay: Tensor, up: Tensor):  # noqa: ANN201
    """The same in PyTorch's own operations, chunks of 64."""
    given = (k.float(), q.float(), v.float(), Dose(write, ticks), FastWeights(up))
    out, state = chunk._segment(Rule(log_decay), *given, 64, True)
    return out, state.up


@pytest.mark.parametrize("rank", [16, 64, 128])
@pytest.mark.parametrize("tokens", [256, 2048, 8192])
def test_kernel_and_plain_form(
    benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch, tokens: int, rank: int
) -> None:
    """Float32, as the memory of a layer runs it."""
    monkeypatch.setattr(chunk, "_kernel_runs", lambda keys: False)
    inputs = streams(tokens, rank, torch.float32)
    kernel = differentiated(inputs, delta_rule)
    benchmark.extra_info["ratio_to_plain"] = median(
        ratios(kernel, differentiated(inputs, plain), pairs=PAIRS)
    )._asdict()
    benchmark(kernel)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_precisions(benchmark: BenchmarkFixture, precision: str) -> None:
    """Which is how much faster depends on the GPU."""
    benchmark(differentiated(streams(2048, 64, torch.float32), lambda *x: delta_rule(*x, precision=precision)))  # type: ignore[arg-type]
