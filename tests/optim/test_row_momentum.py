"""One step size per tensor: how far rows move, and that it learns what its neighbours must not lose."""

from __future__ import annotations

import pytest
import torch

from cortex_core.optim.row_momentum import RowMomentum


def moved(gradient: torch.Tensor, lr: float = 0.5, steps: int = 1) -> torch.Tensor:
    """By how much a parameter moves against the same gradient."""
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = RowMomentum([parameter], lr)
    for _ in range(steps):
        parameter.grad = gradient.clone()
        optimizer.step()
    return -parameter.detach()


def test_rows_move_in_proportion_and_the_strongest_by_the_rate() -> None:
    gradient = torch.tensor([[3.0, -4.0, 0.0], [0.3, 0.0, -0.4], [0.0, 0.0, 0.0]])
    found = moved(gradient)
    torch.testing.assert_close(found / found[0, 0], gradient / 3.0)
    assert found[0].square().mean().sqrt().item() == pytest.approx(0.5)
    torch.testing.assert_close(moved(gradient, steps=7), 7 * found)


def test_the_unit_of_the_loss_does_not_matter() -> None:
    gradient = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved(gradient), moved(1e-12 * gradient))
    torch.testing.assert_close(moved(gradient), moved(1e12 * gradient))


def test_nothing_moves_without_a_gradient() -> None:
    assert moved(torch.zeros(3, 2)).count_nonzero() == 0
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    RowMomentum([parameter], 1.0).step()
    assert torch.equal(parameter, torch.ones(2, 2))


def test_it_goes_on_from_its_state() -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(4, 3, generator=generator) for _ in range(6)]
    ways = []
    for interrupted in (False, True):
        parameter = torch.nn.Parameter(torch.zeros(4, 3))
        optimizer = RowMomentum([parameter], 0.1)
        for number, gradient in enumerate(gradients):
            if interrupted and number == 3:
                state = optimizer.state_dict()
                optimizer = RowMomentum([parameter], 0.9)
                optimizer.load_state_dict(state)
            parameter.grad = gradient
            optimizer.step(lambda: 0.0)
        ways.append(parameter.detach())
    assert torch.equal(*ways)


@pytest.mark.parametrize("name", ["row", "adam"])
def test_what_other_rows_hold_stays(name: str) -> None:
    """A row that answers a question a thousand times more weakly than another leaves what it holds nearly as it is;
    Adam moves it as far."""
    strength, target = torch.tensor([1.0, 1e-3]), torch.tensor([2.0, -1.0])
    table = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = RowMomentum([table], 0.1) if name == "row" else torch.optim.Adam([table], 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (strength @ table - target).square().sum().backward()
        optimizer.step()
    learned = table.detach()
    error, neighbour = float((strength @ learned - target).abs().max()), float(learned[1].abs().max())
    assert error < 0.2
    assert neighbour < 0.01 if name == "row" else neighbour > 1.0
