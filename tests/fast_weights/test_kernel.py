"""The Triton kernel against the token-by-token oracle: outputs, every gradient, final state.

It runs on a CUDA device or, an operation at a time, in Triton's interpreter on the CPU (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from cortex_core.fast_weights import chunk, kernel
from cortex_core.fast_weights.kernel import delta_rule, usable
from cortex_core.fast_weights.rules import Dose, Rule, step_by_step
from cortex_core.fast_weights.state import FastWeights
from tests.fast_weights.rule_scenes import RULES, SEGMENT, gate_of, gradients, relative_error, state_of, streams

TRITON = importlib.util.find_spec("triton") is not None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(
    not TRITON or (DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs Triton, and a CUDA device or Triton's interpreter (TRITON_INTERPRET=1)",
)
EXACT = 1e-5  # float32 in another order
ROOT = Path(__file__).resolve().parents[2]
ROUNDED = 2**-7  # one rounding to bfloat16: to nearest on a GPU, towards 0 in the interpreter


class Scene(NamedTuple):
    """Everything that `delta_rule` is differentiated by, in its order."""

    keys: Tensor
    queries: Tensor
    values: Tensor
    write: Tensor
    ticks: Tensor
    log_decay: Tensor
    initial: Tensor

    def changed(self, change: Callable[[Tensor], Tensor]) -> Scene:
        return Scene(*map(change, self))


@dataclass
class Given:
    """The doses themselves."""

    scene: Scene
    needs_surprise: bool = False

    def __call__(self, surprise: Tensor | None, now: slice) -> Dose:
        return Dose(self.scene.write[:, :, now], self.scene.ticks[:, :, now])


def scene(tokens: int, rank: int = 16, dim: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> Scene:
    """Two heads with decays of their own; ticks that are not the writes; about half of both exactly 0."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(1, 2, *shape, generator=generator)

    drawn = Scene(
        normalize(random(tokens, rank), dim=-1).to(dtype),
        normalize(random(tokens, rank), dim=-1).to(dtype),
        random(tokens, dim).to(dtype),
        random(tokens).clamp(0, 1),
        random(tokens).clamp(0, 1),
        torch.tensor([0.9, 0.99]).log(),
        random(rank, dim),
    )
    return drawn.changed(lambda x: x.to(DEVICE).requires_grad_())


def oracle(given: Scene) -> tuple[Tensor, Tensor]:
    """In float32 whatever the inputs are."""
    whole = given.changed(Tensor.float)
    start = FastWeights(whole.initial)
    rule = Rule(whole.log_decay)
    outputs, final = step_by_step(rule, whole.keys, whole.queries, whole.values, Given(whole), start, start)
    return outputs, final.up


def pulled(given: Scene, outputs: Tensor | None, final: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a random weighting of outputs and final state."""
    generator = torch.Generator().manual_seed(1)
    results = [x for x in (final, outputs) if x is not None]
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in results]
    return torch.autograd.grad(results, [*given], weights, allow_unused=True)


def assert_equals_the_oracle(given: Scene, tolerance: float = EXACT, **options: object) -> None:
    """Outputs, final state and gradients; the state, float32 in any case, to the last digits."""
    expected, state = oracle(given)
    outputs, final = delta_rule(*given, **options)  # type: ignore[arg-type]
    assert outputs is not None and outputs.dtype == given.values.dtype
    assert relative_error(expected, outputs) < tolerance
    assert relative_error(state, final) < (EXACT if tolerance == ROUNDED else tolerance)
    for name, a, b in zip(Scene._fields, pulled(given, expected, state), pulled(given, outputs, final), strict=True):
        assert a is not None and b is not None and a.dtype == b.dtype
        assert relative_error(a.float(), b.float()) < tolerance, name


@needs_triton
@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 130])
def test_equals_the_oracle_at_any_length(tokens: int) -> None:
    assert_equals_the_oracle(scene(tokens))


@needs_triton
@pytest.mark.parametrize(("rank", "dim"), [(8, 64), (12, 40), (32, 96), (64, 64), (128, 128)])
def test_equals_the_oracle_at_any_size(rank: int, dim: int) -> None:
    """Also at sizes that are no power of two, or smaller or larger than one tile."""
    assert_equals_the_oracle(scene(45, rank, dim))


@needs_triton
@pytest.mark.parametrize("log_decay", [0.0, math.log(1e-3), math.log(1e-6)])
def test_decays_of_any_size(log_decay: float) -> None:
    given = scene(70)
    decays = torch.full_like(given.log_decay, log_decay).requires_grad_()
    assert_equals_the_oracle(given._replace(log_decay=decays))


@needs_triton
@pytest.mark.parametrize("strength", [0.1, 1.0, 1.9])
def test_one_key_written_again_and_again(strength: float) -> None:
    """The triangle is full, and its inverse would drown in a power series of it. At 1.9 every error lives on for long."""
    given = scene(40)
    keys = given.keys.detach()[:, :, :1].expand_as(given.keys).requires_grad_()
    write = torch.full_like(given.write, strength).requires_grad_()
    assert_equals_the_oracle(given._replace(keys=keys, write=write), 5 * EXACT)


@needs_triton
def test_values_that_all_heads_share() -> None:
    """One tensor, expanded over the heads (`FastWeightsConfig.shared_values`)."""
    given = scene(40, dim=96)
    assert_equals_the_oracle(
        given._replace(values=given.values.detach()[:, :1].expand_as(given.values).requires_grad_())
    )


@needs_triton
def test_bfloat16_inputs_cost_the_rounding_of_what_is_returned() -> None:
    """Everything inside is float32: outputs and gradients are off by their own rounding, the state not even by that."""
    assert_equals_the_oracle(scene(70, dtype=torch.bfloat16), ROUNDED, precision="tf32x3")


@needs_triton
def test_bfloat16_inputs_have_products_of_eleven_bits() -> None:
    """Unless asked otherwise. What is kept from token to token is float32 all the same."""
    given = scene(70, dtype=torch.bfloat16)
    expected, state = oracle(given)
    outputs, final = delta_rule(*given)
    assert outputs is not None and final.dtype == torch.float32
    assert relative_error(expected, outputs) < ROUNDED and relative_error(state, final) < 2**-8
    for name, a, b in zip(Scene._fields, pulled(given, expected, state), pulled(given, outputs, final), strict=True):
        assert a is not None and b is not None and relative_error(a.float(), b.float()) < 2**-6, name


@needs_triton
@pytest.mark.parametrize("chunk_size", [1, 16, 1000])
def test_the_chunk_size_changes_nothing_but_the_speed(chunk_size: int) -> None:
    assert_equals_the_oracle(scene(50), chunk_size=chunk_size)


@needs_triton
@pytest.mark.parametrize("rank", [16, 64])
def test_plain_float32_products_are_an_option(rank: int) -> None:
    assert_equals_the_oracle(scene(50, rank), precision="ieee")


@needs_triton
def test_rows_may_lie_anywhere() -> None:
    """As layers give them: heads behind tokens, a part of a longer stream, the same for all rows."""
    given = scene(80)

    def laid_out(x: Tensor) -> Tensor:
        x = x.detach()
        if x.dim() < 3 or x.shape[2] != 80:
            return x.clone().requires_grad_()
        return x.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 13:50].requires_grad_()

    part = given.changed(laid_out)
    assert not part.keys.is_contiguous() and not part.write.is_contiguous()
    assert_equals_the_oracle(part)
    columns = part._replace(
        values=part.values.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
    )
    assert columns.values.stride(-1) != 1
    assert_equals_the_oracle(columns)


@needs_triton
def test_state_alone_is_the_same_state_with_the_same_gradients() -> None:
    given = scene(50)
    _, expected = delta_rule(*given)
    outputs, final = delta_rule(*given, read=False)
    assert outputs is None and torch.equal(final, expected)
    for name, a, b in zip(Scene._fields, pulled(given, None, expected), pulled(given, None, final), strict=True):
        if name == "queries":
            assert b is None and a is not None and not a.any()
        else:
            assert a is not None and b is not None and relative_error(a, b) < EXACT, name


@needs_triton
@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_a_gap_without_writes_leaves_the_state_bit_for_bit(precision: kernel.Precision) -> None:
    given = scene(100)
    shut = given._replace(write=torch.zeros_like(given.write), ticks=torch.zeros_like(given.ticks))
    _, final = delta_rule(*shut, precision=precision)
    assert torch.equal(final, given.initial)


@needs_triton
@settings(max_examples=5)
@given(cut=st.integers(1, 59), seed=st.integers(0, 1000))
def test_a_stream_may_be_split_anywhere(cut: int, seed: int) -> None:
    whole = scene(60, seed=seed).changed(Tensor.detach)
    expected, final = delta_rule(*whole)
    state, parts = whole.initial, []
    for part in (slice(0, cut), slice(cut, 60)):
        k, q, v, w, ticks = (x[:, :, part] for x in whole[:5])
        out, state = delta_rule(k, q, v, w, ticks, whole.log_decay, state)
        assert out is not None
        parts.append(out)
    assert expected is not None
    assert relative_error(expected, torch.cat(parts, dim=2)) < EXACT and relative_error(final, state) < EXACT


@needs_triton
def test_rows_and_heads_are_independent() -> None:
    """Another row of the batch, or another head, changes no bit."""
    alone = scene(40).changed(Tensor.detach)
    other = scene(40, seed=1).changed(Tensor.detach)
    both = Scene(*(torch.cat([a, b]) if a.dim() > 1 else a for a, b in zip(alone, other, strict=True)))
    expected, final = delta_rule(*alone)
    outputs, finals = delta_rule(*both)
    assert expected is not None and outputs is not None
    assert torch.equal(outputs[:1], expected) and torch.equal(finals[:1], final)


@needs_triton
def test_what_is_kept_for_the_backward_pass() -> None:
    """The inputs and a state per chunk; nothing that is square in the chunk or the rank."""
    tokens, rank, dim = 130, 32, 32
    given = scene(tokens, rank, dim)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        delta_rule(*given)
    numbers = sum({x.data_ptr(): x.numel() for x in kept}.values())
    states = (math.ceil(tokens / 32) + 1) * rank * dim
    assert numbers <= 2 * (tokens * (2 * rank + dim + 4) + states)


@needs_triton
@pytest.mark.parametrize("needs_surprise", [True, False])
def test_scan_runs_it(monkeypatch: pytest.MonkeyPatch, needs_surprise: bool) -> None:
    """Segment by segment with surprise, all at once without; the same as the plain form, gradients included."""
    inputs = {part: x.requires_grad_() for part, x in streams("delta", SEGMENT + 7).items()}
    rule, moved = RULES["delta"], {part: x.to(DEVICE) for part, x in inputs.items()}
    rule = rule._replace(log_decay=rule.log_decay.to(DEVICE))
    found = []
    for runs in (False, True):
        monkeypatch.setattr(chunk, "_kernel_runs", lambda keys, runs=runs: runs)
        gate = gate_of("delta", moved, needs_surprise=needs_surprise)
        k, q, v = (moved[part] for part in ("keys", "queries", "values"))
        result = chunk.scan(rule, k, q, v, gate, state_of(moved), SEGMENT, 16)
        assert result.outputs is not None
        outputs, final = result.outputs.cpu(), result.final.map(Tensor.cpu)
        found.append((outputs, final.up, *gradients(outputs, final, inputs)))
    assert all(relative_error(a, b) < EXACT for a, b in zip(*found, strict=True))


def test_a_cpu_runs_the_plain_form_and_imports_no_kernel() -> None:
    code = (
        "import sys, torch\n"
        "from tests.fast_weights.rule_scenes import RULES, gate_of, state_of, streams\n"
        "from cortex_core.fast_weights.chunk import scan\n"
        "s = streams('delta', 20)\n"
        "scan(RULES['delta'], s['keys'], s['queries'], s['values'], gate_of('delta', s), state_of(s), 50, 16)\n"
        "print('cortex_core.fast_weights.kernel' in sys.modules, 'triton' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300,
                          cwd=ROOT)  # fmt: skip
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize(
    ("device", "rank", "setting"), [("cpu", 16, ""), ("cuda", kernel.MAX_RANK + 1, ""), ("cuda", 16, "off")]
)
def test_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch, device: str, rank: int, setting: str) -> None:
    monkeypatch.setenv("CORTEX_KERNEL", setting)
    assert not usable(torch.device(device), rank)


@pytest.mark.gpu
def test_a_gpu_of_today_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CORTEX_KERNEL", raising=False)
    assert usable(DEVICE, 16) == (TRITON and torch.cuda.get_device_capability() >= (8, 0))


COMPILE = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cortex_core.fast_weights import kernel, kernel_passes

sizes = json.loads(sys.argv[1])
precision = "tf32x3"
launch = kernel._Launch(**sizes, cut=kernel.TABLE[precision, sizes["rank"]], reads=True, precision=precision)
for name in launch.cut._fields[1:]:
    if getattr(launch.cut, name) is None:
        continue
    passed = getattr(kernel_passes, name.removesuffix("_backward"))
    options = launch.options(name)
    resources = {key: options.pop(key) for key in ("num_warps", "num_stages")}
    fixed = {"rank": launch.rank, "dim": launch.dim, "chunk": launch.chunk, "reads": True, **options,
             "alone": launch.cut.errors is None}
    constants = {k: v for k, v in (fixed | {"backward": "_backward" in name}).items() if k in passed.arg_names}
    # Triton makes a constant of an integer that is 1.
    constants |= {k: 1 for k in ("heads", "tokens", "chunks") if k in passed.arg_names and sizes["tokens"] == 1}
    integer = re.compile("heads|tokens|chunks|.*_[bht]")
    signature = {k: "constexpr" if k in constants else "i32" if integer.fullmatch(k) else "*fp32"
                 for k in passed.arg_names}
    compiled = triton.compile(ASTSource(passed, signature, constants), target=GPUTarget("cuda", 80, 32),
                              options=resources)
    print(json.dumps([name, compiled.metadata.shared, len(compiled.asm["cubin"]) > 0]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize(("tokens", "rank", "passes"), [(1, 16, 6), (1000, 16, 6), (1000, 64, 7)])
def test_all_passes_compile_for_a_gpu(tokens: int, rank: int, passes: int) -> None:
    """Needs no GPU. The interpreter takes code that the compiler does not; 99 KiB is the least shared memory since 8.0."""
    sizes = {"batch": 1, "heads": 1 if tokens == 1 else 4, "tokens": tokens, "rank": rank, "dim": 64}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE, json.dumps(sizes)], capture_output=True, text=True,
                          check=False, timeout=500, env=environment, cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == passes and all(shared <= 99 * 1024 and code for _, shared, code in rows)
