"""The arithmetic on its own: Adam's directions, what they do to lengths, how fast a norm may grow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cortex_core.optim.scaling import GROWTH, ScaleType, adam_directions, factors, limited

BETAS = (0.9, 0.99)
SEEDS, SIZES = st.integers(0, 2**31), st.integers(1, 6)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state(*shape: int) -> dict[str, Tensor]:
    return {"step": torch.zeros(()), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}


def run(gradients: list[Tensor], eps: float = 1e-8) -> Tensor:
    """Adam's direction after all of them."""
    kept = state(*gradients[0].shape)
    for gradient in gradients:
        kept["step"] += 1
        (direction,) = adam_directions([gradient], [kept], BETAS, eps)
    return direction


def test_directions_are_those_of_torchs_adam() -> None:
    weights = [torch.nn.Parameter(normal(number, 3, number + 1)) for number in range(3)]
    optimizer = torch.optim.Adam(weights, lr=1.0, betas=BETAS, eps=1e-3)
    states = [state(*w.shape) for w in weights]
    for step in range(7):
        before = [w.detach().clone() for w in weights]
        for number, weight in enumerate(weights):
            weight.grad = normal(100 * step + number, *weight.shape)
        optimizer.step()
        for kept in states:
            kept["step"] += 1
        found = adam_directions([w.grad for w in weights if w.grad is not None], states, BETAS, 1e-3)
        for old, new, direction in zip(before, weights, found, strict=True):
            torch.testing.assert_close(old - new.detach(), direction, atol=1e-5, rtol=1e-5)


def test_members_of_a_list_may_be_at_different_steps() -> None:
    gradients = [normal(n, 4) for n in range(3)]
    late, early = state(4), state(4)
    for gradient in gradients[:2]:
        late["step"] += 1
        adam_directions([gradient], [late], BETAS, 1e-8)
    late["step"] += 1
    early["step"] += 1
    found = adam_directions([gradients[2], gradients[2]], [late, early], BETAS, 1e-8)
    torch.testing.assert_close(found, [run(gradients), run(gradients[2:])])


@given(SEEDS, SIZES, SIZES, st.floats(1e-6, 1e6))
def test_a_scaled_gradient_hangs_on_no_unit(seed: int, rank: int, columns: int, unit: float) -> None:
    """Gradients in another unit, all of them: factors go down by it, scaled gradients stay, and so does their direction."""
    seen = [normal(seed + n, rank, columns) for n in range(4)]
    for scale_type in ("channel", "tensor"):
        plain = factors(seen[-1], run(seen, eps=0.0), scale_type)
        other = factors(unit * seen[-1], run([unit * x for x in seen], eps=0.0), scale_type)
        torch.testing.assert_close(other * unit, plain, rtol=1e-3, atol=0.0)


@given(SEEDS, SIZES, st.integers(1, 9))
def test_a_scaled_gradient_points_where_the_gradient_does(seed: int, rows: int, columns: int) -> None:
    gradient = normal(seed, rows, columns)
    direction = run([normal(seed + 1, rows, columns), gradient])
    whole, single = (factors(gradient, direction, kind) for kind in ("tensor", "channel"))
    assert whole.shape == () and whole > 0 and single.shape == (columns,) and (single > 0).all()
    cosine = torch.nn.functional.cosine_similarity(gradient * single, gradient, dim=0)
    torch.testing.assert_close(cosine, torch.ones(columns))


@given(SEEDS, SIZES, st.integers(1, 9))
def test_a_projection_that_turns_nothing_gives_adams_own_channel_scale(seed: int, rows: int, columns: int) -> None:
    """Full rank, P orthogonal: its rows are those of the identity in any order, with any sign.

    (Adam's second moment sees single numbers: an orthogonal matrix that mixes them gives another direction.)
    """
    gradients = [normal(seed + n, rows, columns) for n in range(5)]
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (rows, 1), generator=generator) * 2.0 - 1.0
    turned = signs * torch.eye(rows)[torch.randperm(rows, generator=generator)]
    found = factors(turned @ gradients[-1], run([turned @ g for g in gradients]), "channel")
    expected = run(gradients).norm(dim=0) / gradients[-1].norm(dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_nothing_seen_is_scaled_to_nothing(scale_type: ScaleType) -> None:
    seen = normal(0, 2, 4)
    seen[:, 1] = 0.0
    found = factors(seen, run([normal(1, 2, 4), seen]), scale_type)
    assert found.isfinite().all() and (scale_type == "tensor" or found[1] == 0.0)
    assert (factors(torch.zeros(2, 4), run([normal(1, 2, 4)]), scale_type) == 0.0).all()


@given(SEEDS, st.booleans(), st.just(0.0) | st.floats(1e-6, 100.0))
def test_a_norm_grows_by_a_hundredth_at_most(seed: int, by_channel: bool, last: float) -> None:
    gradient, before = normal(seed, 3, 5), torch.tensor(last)
    factor = normal(seed + 1, 5).abs() if by_channel else normal(seed + 1).abs()
    free = (factor * gradient).norm()
    kept, norm = limited(factor, gradient, before)
    torch.testing.assert_close((kept * gradient).norm(), norm, rtol=1e-4, atol=1e-30)
    expected = torch.minimum(free, GROWTH * before) if last > 0 else free
    torch.testing.assert_close(norm, expected, rtol=1e-4, atol=1e-30)
    torch.testing.assert_close(kept, factor * (norm / free), rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("last", [0.0, 2.0])
def test_a_vanished_gradient_has_no_norm_and_sets_no_limit(last: float) -> None:
    kept, norm = limited(torch.tensor(0.0), torch.zeros(3, 5), torch.tensor(last))
    assert (kept, norm) == (0.0, 0.0)
    gradient = normal(0, 3, 5)
    kept, norm = limited(torch.tensor(3.0), gradient, norm)
    assert kept == 3.0
    torch.testing.assert_close(norm, 3.0 * gradient.norm())
