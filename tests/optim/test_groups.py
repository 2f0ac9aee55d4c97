"""The optimizer that a configuration gets: which, with what settings, over which groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from cortex_core.config import OptimizerConfig, UpdateConfig
from cortex_core.optim.apollo import Apollo
from cortex_core.optim.groups import build_optimizer, rank_of
from cortex_core.training.pretrain_config import PretrainConfig

SHAPES = {
    "embed.weight": (60, 16),
    "up.weight": (40, 16),
    "down.weight": (16, 40),
    "small.weight": (3, 8),
    "bias": (16,),
}


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}


def built(of: dict[str, nn.Parameter], **update: Any) -> torch.optim.Optimizer:
    """Two groups, with a rate each."""
    members = list(of.values())
    groups = [{"params": members[:2], "lr": 0.1, "peak_lr": 0.1}, {"params": members[2:], "lr": 0.2, "peak_lr": 0.2}]
    return build_optimizer(of, groups, UpdateConfig(**update), betas=(0.7, 0.8), weight_decay=0.3, seed=4)


def by_name(of: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    names = {id(p): name for name, p in of.items()}
    found = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(of)
    return dict(found)


def test_adamw_is_the_default_and_torchs_own() -> None:
    optimizer = built(parameters())
    assert type(optimizer) is torch.optim.AdamW and len(optimizer.param_groups) == 2
    assert [(g["lr"], g["betas"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.1, (0.7, 0.8), 0.3), (0.2, (0.7, 0.8), 0.3),
    ]  # fmt: skip
    assert UpdateConfig() == UpdateConfig(name="adamw") and PretrainConfig().optimizer == UpdateConfig()


@pytest.mark.parametrize(
    ("name", "ranks", "scale_type", "scale"),
    [
        ("apollo", {"embed.weight": 4, "up.weight": 4, "down.weight": 4}, "channel", 1.0),
        ("apollo_mini", dict.fromkeys(("embed.weight", "up.weight", "down.weight", "small.weight"), 1), "tensor", math.sqrt(128)),
    ],
)  # fmt: skip
def test_apollo_has_the_papers_settings_but_for_lengths(
    name: str, ranks: dict[str, int], scale_type: str, scale: float
) -> None:
    of = parameters()
    optimizer = built(of, name=name)
    assert isinstance(optimizer, Apollo) and optimizer.seed == 4
    for parameter, group in by_name(of, optimizer).items():
        assert group["lr"] == group["peak_lr"] == (0.1 if parameter in ("embed.weight", "up.weight") else 0.2)
        assert (group["scale_type"], group["scale"], group["update_proj_gap"]) == (scale_type, scale, 200)
        assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.7, 0.8), 0.3, 1e-8)
        assert group["rank"] == ranks.get(parameter, group["rank"]) and group["lengths"] == "exact"
        assert dict(zip(group["param_names"], group["params"], strict=True))[parameter] is of[parameter]
    for parameter in of.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = {
        name: tuple(optimizer.state[p]["exp_avg"].shape) for name, p in of.items() if "norm" in optimizer.state[p]
    }
    expected = {parameter: (rank, max(SHAPES[parameter])) for parameter, rank in ranks.items()}
    assert {parameter: moments[parameter] for parameter in expected} == expected and "bias" not in moments


@pytest.mark.parametrize("name", ["apollo", "apollo_mini"])
def test_given_settings_win(name: str) -> None:
    of = parameters()
    optimizer = built(of, name=name, rank=3, scale=2.5, update_proj_gap=7, lengths="projected")
    assert len(optimizer.param_groups) == 2
    given = {(g["rank"], g["scale"], g["update_proj_gap"], g["lengths"]) for g in optimizer.param_groups}
    assert given == {(3, 2.5, 7, "projected")}


@pytest.mark.parametrize(
    ("shape", "update", "rank"),
    [
        ((128, 256), {"name": "apollo"}, 32), ((2560, 128), {"name": "apollo"}, 32), ((3, 3), {"name": "apollo"}, 1),
        ((9,), {"name": "apollo"}, 1), ((128, 256), {"name": "apollo_mini"}, 1),
        ((128, 256), {"name": "apollo_mini", "rank": 4}, 4), ((128, 256), {"name": "apollo", "rank": 2}, 2),
    ],
)  # fmt: skip
def test_the_rank_is_a_quarter_of_the_shorter_side_or_one(
    shape: tuple[int, ...], update: dict[str, Any], rank: int
) -> None:
    assert rank_of(torch.zeros(shape), UpdateConfig(**update)) == rank


@pytest.mark.parametrize(
    "wrong", [{"name": "sgd"}, {"rank": 0}, {"scale": 0.0}, {"update_proj_gap": 0}, {"lengths": "long"}, {"seed": 1}]
)
def test_settings_are_bounded_and_closed(wrong: dict[str, Any]) -> None:
    for settings in (UpdateConfig, OptimizerConfig):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            settings.model_validate(wrong)
