"""Adaptive rank: what is measured, what is kept, and that what is dropped is gone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cortex_core.config import FastWeightsConfig
from cortex_core.fast_weights.address import Addresses
from cortex_core.fast_weights.ranks import Usage, allocate, importance
from cortex_core.fast_weights.sidecar import LayerShape, Sidecar

HIDDEN, HEADS, RANK = 12, 2, 4


def addresses(*, binding: bool = False) -> Addresses:
    torch.manual_seed(0)
    made = Addresses(HIDDEN, HEADS, FastWeightsConfig(taps=3 if binding else 2, binding=binding), RANK)
    nn.init.normal_(made.key_taps)
    nn.init.normal_(made.query_taps)
    return made


def loss_of(made: Addresses) -> torch.Tensor:
    """Of keys and queries, in random proportions."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 7, HIDDEN, generator=generator)
    keys, queries = made(hidden, read=True)
    return (keys * torch.randn(keys.shape, generator=generator)).sum() + (queries**3).sum()


@pytest.mark.parametrize("binding", [False, True])
def test_importance_is_the_squared_derivative_by_the_scale_of_a_dimension(binding: bool) -> None:
    made = addresses(binding=binding)
    loss_of(made).backward()
    found = importance(made)
    for head in range(HEADS):
        for dimension in range(RANK):
            column, change = head * RANK + dimension, []
            for scale in (1 + 1e-2, 1 - 1e-2):
                with torch.no_grad():
                    kept = made.content[:, column].clone()
                    made.content[:, column] *= scale
                    change.append(float(loss_of(made)))
                    made.content[:, column] = kept
            assert float(found[head, dimension]) == pytest.approx(
                ((change[0] - change[1]) / 2e-2) ** 2, rel=2e-2, abs=1e-4
            )


def test_the_budget_goes_where_it_matters_most_over_all_layers_and_heads() -> None:
    first, second = torch.tensor([[9.0, 1, 8, 1], [1, 1, 1, 1]]), torch.tensor([[7.0, 6, 5, 0], [0, 0, 0, 0]])
    kept = allocate([first, second], 5)
    assert kept[0].tolist() == [[True, False, True, False], [False] * 4]
    assert kept[1].tolist() == [[True, True, True, False], [False] * 4]


@pytest.mark.parametrize("keep", [0, 3, 8])
def test_of_equals_the_earlier_are_kept_and_the_number_is_exact(keep: int) -> None:
    (live,) = allocate([torch.ones(2, 4)], keep)
    assert live.flatten().tolist() == [n < keep for n in range(8)]


def test_a_dimension_that_was_dropped_is_neither_written_nor_asked() -> None:
    made = addresses()
    made.live[0, 1] = made.live[1, 3] = 0
    keys, queries = made(torch.randn(2, 5, HIDDEN), read=True)
    assert not keys[:, 0, :, 1].any() and not queries[:, 1, :, 3].any()
    assert torch.allclose(keys.norm(dim=-1)[:, :, 1:], torch.ones(2, HEADS, 4), atol=1e-5)


def test_usage_is_averaged_and_spends_the_budget() -> None:
    sidecars = nn.ModuleDict({
        str(n): Sidecar(LayerShape(HIDDEN, HEADS, 4, 4), FastWeightsConfig(rank=RANK)) for n in (1, 3)
    })  # fmt: skip
    usage = Usage(sidecars)
    assert [*usage.addresses] == ["1.addresses", "3.addresses"]
    for scale in (1.0, 3.0):
        for module in usage.addresses.values():
            module.content.grad = torch.zeros_like(module.content)
        used = usage.addresses["3.addresses"].content
        used.grad = scale * used.detach()
        usage.measure()
    assert not usage.scores["1.addresses"].any() and usage.scores["3.addresses"].all()
    usage.prune(1.5)
    live = [int(module.live.sum()) for module in usage.addresses.values()]
    assert live == [0, 6]
    context = 3 * HIDDEN * 4
    assert [s.state_bytes for s in sidecars.values()] == [context, 6 * 4 * 4 + context]  # type: ignore[union-attr]
