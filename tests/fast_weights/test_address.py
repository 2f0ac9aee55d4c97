"""Addresses: what they are before training, and that any split gives the same ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cortex_core.config import FastWeightsConfig
from cortex_core.fast_weights.address import Addresses, earlier

HIDDEN, HEADS, RANK, TAPS, TOKENS = 48, 3, 16, 4, 24


def new_addresses(**settings: Any) -> Addresses:
    torch.manual_seed(1)
    return Addresses(HIDDEN, HEADS, FastWeightsConfig(**{"taps": TAPS} | settings), RANK)


def trained_addresses(**settings: Any) -> Addresses:
    """All taps in use."""
    addresses = new_addresses(**settings)
    for name, weights in addresses.named_parameters():
        if name.endswith(("taps", "binding")):
            torch.nn.init.normal_(weights)
    return addresses


@torch.no_grad()
def test_at_the_start_a_token_is_stored_under_the_one_before_it() -> None:
    addresses, words = new_addresses(), torch.randn(8, HIDDEN)
    told, asked = words[None, [0, 1, 2, 3]], words[None, [5, 6, 2]]
    keys, _ = addresses(told, read=True)
    _, queries = addresses(asked, read=True)
    found = keys @ queries[:, :, -1:].transpose(-1, -2)  # the question ends with word 2, which stood at 2
    assert torch.allclose(found[:, :, 3], torch.ones_like(found[:, :, 3]), atol=1e-5)
    assert float(found[:, :, :3].abs().max()) < 0.9


@torch.no_grad()
def test_unit_length_but_for_the_first_key() -> None:
    keys, queries = new_addresses()(torch.randn(2, TOKENS, HIDDEN), read=True)
    lengths = keys.norm(dim=-1)
    assert torch.allclose(lengths[:, :, 1:], torch.ones(()), atol=1e-5) and not lengths[:, :, 0].any()
    assert torch.allclose(queries.norm(dim=-1), torch.ones(()), atol=1e-5)


@torch.no_grad()
def test_different_tokens_have_nearly_orthogonal_addresses() -> None:
    """As random directions do: the spread of the cosine is 1 / sqrt(rank)."""
    _, queries = new_addresses()(torch.randn(1, 400, HIDDEN), read=True)
    cosines = queries @ queries.transpose(-1, -2)
    others = cosines[:, :, ~torch.eye(400, dtype=torch.bool)]
    # Two random projections, one behind the other: 1/rank from the map, 1/hidden from the inputs themselves.
    assert float(others.mean().abs()) < 0.02
    assert float(others.std()) == pytest.approx((1 / RANK + 1 / HIDDEN) ** 0.5, rel=0.1)


@torch.no_grad()
def test_a_reversed_head_stores_under_a_token_itself() -> None:
    addresses, words = new_addresses(reversed_frac=1 / HEADS), torch.randn(8, HIDDEN)
    keys, _ = addresses(words[None, :4], read=True)
    _, queries = addresses(words[None, [5, 6, 2]], read=True)
    found = (keys @ queries[:, :, -1:].transpose(-1, -2))[0, :, :, 0]  # the question ends with word 2, which stood at 2
    assert float(found[0, 2]) == pytest.approx(1.0, abs=1e-5) and float(found[0, [0, 1, 3]].abs().max()) < 0.9
    assert torch.allclose(found[1:, 3], torch.ones(()), atol=1e-5)


@torch.no_grad()
def test_with_binding_the_same_token_has_another_address_after_another_one() -> None:
    """Half alike at the start, the cosine of two products with one common factor: a question in new words finds it."""
    torch.manual_seed(2)
    addresses, words = new_addresses(reversed_frac=1.0, binding=True), torch.randn(200, 4, HIDDEN)
    relation, other, far, near = words.unbind(1)
    keys, _ = addresses(torch.stack([relation, far, near], dim=1), read=True)
    found = []
    for asked in (relation, other):
        _, queries = addresses(torch.stack([asked, near], dim=1), read=True)
        found.append((keys[:, :, 2] * queries[:, :, 1]).sum(-1))
    assert torch.allclose(found[0], torch.ones(()), atol=1e-5)
    assert float(found[1].mean()) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("settings", [{"taps": taps} for taps in (1, 2, 4, 16)] + [{"binding": True}], ids=str)
@pytest.mark.parametrize("piece", [1, 3, 8])
def test_pieces_with_the_few_tokens_before_them_have_the_addresses_of_the_whole(
    settings: dict[str, Any], piece: int
) -> None:
    addresses, hidden = trained_addresses(**settings), torch.randn(2, TOKENS, HIDDEN)
    taps = settings.get("taps", TAPS)
    whole = addresses(hidden, read=True)
    context = torch.cat([torch.zeros(2, taps - 1, HIDDEN), hidden], dim=1)
    for start in range(0, TOKENS, piece):
        found = addresses(context[:, start : start + piece + taps - 1], read=True)
        for one, other in zip(whole, found, strict=True):
            assert torch.allclose(one[:, :, start : start + piece], other[:, :, taps - 1 :], atol=1e-5)


@pytest.mark.parametrize("binding", [False, True])
def test_without_a_read_the_keys_are_the_same(binding: bool) -> None:
    addresses, hidden = trained_addresses(binding=binding), torch.randn(2, TOKENS, HIDDEN)
    assert torch.equal(addresses(hidden, read=True)[0], addresses(hidden, read=False)[0])


@pytest.mark.parametrize("tap", [1, 2, 7])
def test_earlier_looks_back(tap: int) -> None:
    x = torch.arange(1.0, 13.0)[None, :, None]
    assert earlier(x, tap)[0, :, 0].tolist() == [max(at + 1.0 - tap, 0.0) for at in range(12)]


def alike(of: Addresses, inputs: Tensor) -> float:
    """Root mean square of the cosine between the addresses of different inputs."""
    _, queries = of(inputs[None], read=True)
    cosines = queries @ queries.transpose(-1, -2)
    return float(cosines[:, :, ~torch.eye(len(inputs), dtype=torch.bool)].square().mean().sqrt())


@torch.no_grad()
def test_whitened_addresses_tell_inputs_apart_that_are_much_alike() -> None:
    torch.manual_seed(1)
    scales = torch.logspace(0, -1.5, HIDDEN)  # few directions hold most of it
    inputs = torch.randn(2000, HIDDEN) * scales + 2.0 * torch.randn(HIDDEN)  # and all share a large part
    addresses = new_addresses()
    assert alike(addresses, inputs[:300]) > 0.9
    addresses.whiten(inputs[300:])
    assert alike(addresses, inputs[:300]) == pytest.approx((1 / RANK + 1 / HIDDEN) ** 0.5, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("inputs", [torch.zeros(5, HIDDEN), torch.ones(1, HIDDEN), torch.full((3, HIDDEN), 1e4)])
def test_whitening_on_what_says_nothing_leaves_usable_addresses(inputs: Tensor) -> None:
    addresses = new_addresses(binding=True)
    addresses.whiten(inputs)
    assert addresses.content.isfinite().all() and addresses.relation.isfinite().all()
    assert alike(addresses, torch.randn(300, HIDDEN)) < 0.5
