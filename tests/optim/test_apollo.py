"""The optimizer against its oracle, on any shape and type, on any number of workers, and over a restart."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cortex_core.optim.apollo import Apollo
from tests.benchmarks import child
from tests.optim.oracle import OneByOne
from tests.optim.parallel_scene import STEPS

SHAPES = {
    "wide": (4, 7),
    "tall": (9, 3),
    "square": (5, 5),
    "thin": (2, 8),
    "bias": (6,),
    "number": (),
    "stack": (2, 3, 4),
}
SETTINGS: dict[str, Any] = {
    "lr": 0.03, "rank": 2, "scale_type": "channel", "scale": 1.5, "update_proj_gap": 7, "betas": (0.8, 0.95),
    "eps": 1e-6, "weight_decay": 0.1, "lengths": "exact",
}  # fmt: skip
KINDS = [("channel", 1), ("channel", 2), ("tensor", 1), ("tensor", 2)]


def weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def gradients(of: dict[str, nn.Parameter], steps: int, seed: int = 1) -> Iterator[dict[str, Tensor]]:
    """A drift and noise, of a size that differs by parameter and goes up and down."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        size = 10.0 ** ((step % 5) - 2)
        yield {n: size * (torch.randn(p.shape, generator=generator) + 0.5).to(p.dtype) for n, p in of.items()}


def train(optimizer: Apollo, of: dict[str, nn.Parameter], turns: Iterator[dict[str, Tensor]]) -> None:
    for turn in turns:
        for name, parameter in of.items():
            parameter.grad = turn[name].clone()
        optimizer.step()


def new(of: dict[str, nn.Parameter], **settings: Any) -> Apollo:
    return Apollo(of.items(), **SETTINGS | settings)


def values(of: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in of.items()}


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """To the bit."""
    torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", ["exact", "projected"])
@pytest.mark.parametrize(("scale_type", "rank"), KINDS)
def test_it_computes_what_its_oracle_does_one_number_after_the_other(scale_type: str, rank: int, lengths: str) -> None:
    of, settings = weights(), SETTINGS | {"scale_type": scale_type, "rank": rank, "lengths": lengths}
    oracle = {name: OneByOne(name, p.detach(), seed=5, **settings) for name, p in of.items()}
    optimizer = new(of, seed=5, **settings)
    for number, turn in enumerate(gradients(of, 40)):
        train(optimizer, of, iter([turn]))
        for name, single in oracle.items():
            single.step(turn[name])
            torch.testing.assert_close(
                of[name].detach().double(),
                single.value,
                rtol=1e-4,
                atol=1e-5,
                msg=lambda m, n=number, k=name: f"{k}, step {n}: {m}",
            )
    assert {name: bool(single.norm) for name, single in oracle.items()} == {
        name: "norm" in optimizer.state[p] for name, p in of.items()
    }


def test_what_is_no_matrix_is_updated_as_by_adamw() -> None:
    of, other = weights(), weights()
    optimizer = new(of, rank=99)
    adamw = torch.optim.AdamW(other.values(), lr=SETTINGS["lr"], betas=SETTINGS["betas"], eps=1e-6, weight_decay=0.1)
    for turn in gradients(of, 30):
        train(optimizer, of, iter([turn]))
        for name, parameter in other.items():
            parameter.grad = turn[name]
        adamw.step()
    torch.testing.assert_close(values(of), values(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_a_matrix_and_its_transpose_are_updated_alike(scale_type: str) -> None:
    start = torch.randn(4, 7, generator=torch.Generator().manual_seed(2))
    of, other = {"w": nn.Parameter(start.clone())}, {"w": nn.Parameter(start.T.contiguous())}
    one, two = new(of, scale_type=scale_type), new(other, scale_type=scale_type)
    for turn in gradients(of, 20):
        train(one, of, iter([turn]))
        train(two, other, iter([{"w": turn["w"].T}]))
    torch.testing.assert_close(of["w"].detach(), other["w"].detach().T, rtol=1e-5, atol=1e-6)


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 3), st.sampled_from(["channel", "tensor"]))
def test_state_is_two_moments_of_the_projection_a_norm_and_a_step(
    rows: int, columns: int, rank: int, scale_type: str
) -> None:
    of = {"w": nn.Parameter(torch.zeros(rows, columns))}
    optimizer = new(of, rank=rank, scale_type=scale_type)
    train(optimizer, of, gradients(of, 1))
    numbers = sum(value.numel() for value in optimizer.state[of["w"]].values())
    short, long = sorted((rows, columns))
    assert numbers == (2 * rank * long + 2 if short > rank else 2 * rows * columns + 1)
    assert sum(value.nbytes for value in optimizer.state[of["w"]].values()) == 4 * numbers


def test_an_exact_step_is_as_long_under_any_projection_of_a_gradient_of_rank_one() -> None:
    """One number, how far the projection lies along the gradient, decides how long the paper's first step is."""
    generator = torch.Generator().manual_seed(3)
    gradient = torch.outer(torch.randn(6, generator=generator), torch.randn(9, generator=generator))
    lengths: dict[str, list[float]] = {"exact": [], "projected": []}
    for kind, found in lengths.items():
        for seed in range(40):
            of = {"w": nn.Parameter(torch.zeros(6, 9))}
            optimizer = new(of, seed=seed, rank=1, scale_type="tensor", lengths=kind, eps=0.0, scale=1.0)
            train(optimizer, of, iter([{"w": gradient}]))
            found.append(of["w"].norm().item())
    assert lengths["exact"] == pytest.approx([SETTINGS["lr"] * 9**0.5] * 40, rel=1e-4), "Adam's first direction: signs"
    assert max(lengths["projected"]) > 20 * min(lengths["projected"])


def test_groups_have_settings_of_their_own() -> None:
    of, apart = weights(), weights()
    groups = [
        {"params": [("wide", of["wide"])], "rank": 1, "scale_type": "tensor", "scale": 3.0, "lr": 0.1},
        {"params": [("tall", of["tall"])]},
    ]
    both, single = Apollo(groups, **SETTINGS), Apollo([("tall", apart["tall"])], **SETTINGS)
    for turn in gradients(of, 5):
        for parameters in (of, apart):
            for name in ("wide", "tall"):
                parameters[name].grad = turn[name]
        both.step()
        single.step()
    assert_equal({"tall": of["tall"].detach()}, {"tall": apart["tall"].detach()})
    assert both.state[of["wide"]]["exp_avg"].shape == (1, 7)


def test_parameters_without_names_are_known_by_their_number() -> None:
    of, other = weights(), weights()
    named = Apollo([(str(n), p) for n, p in enumerate(of.values())], **SETTINGS)
    first, *rest = other.values()
    unnamed = Apollo([{"params": [first]}, {"params": rest}], **SETTINGS)
    for turn in gradients(of, 10):
        train(named, of, iter([turn]))
        train(unnamed, other, iter([turn]))
    assert_equal(values(of), values(other))


def test_a_closure_is_called_with_gradients() -> None:
    of = {"w": nn.Parameter(torch.ones(3, 4))}
    optimizer = new(of)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = of["w"].square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]


# --- gradients of every kind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale_type", "rank"), KINDS)
def test_gradients_of_zero_change_nothing_and_harm_nothing(scale_type: str, rank: int) -> None:
    of = weights()
    optimizer = new(of, scale_type=scale_type, rank=rank, weight_decay=0.0)
    before = values(of)
    zero = {name: torch.zeros_like(p) for name, p in of.items()}
    train(optimizer, of, iter([zero] * 3))
    assert_equal(values(of), before)
    train(optimizer, of, gradients(of, 3))
    matrices, moved = ("wide", "tall", "square"), values(of)
    assert all((moved[name] != before[name]).all() for name in matrices)
    train(optimizer, of, iter([zero] * 3))
    assert_equal({name: values(of)[name] for name in matrices}, {name: moved[name] for name in matrices})
    train(optimizer, of, gradients(of, 3))
    assert all(p.isfinite().all() and (p != moved[name]).any() for name, p in of.items())


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize(("rows", "columns"), [(6, 9), (9, 6)])
def test_rows_and_columns_whose_gradient_is_zero_stay_where_they_are(scale_type: str, rows: int, columns: int) -> None:
    of = {"w": nn.Parameter(torch.ones(rows, columns))}
    optimizer = new(of, scale_type=scale_type, weight_decay=0.0)
    for turn in gradients(of, 9):
        turn["w"][1], turn["w"][:, 2] = 0.0, 0.0
        train(optimizer, of, iter([turn]))
    still = torch.zeros(rows, columns, dtype=torch.bool)
    still[1], still[:, 2] = True, True
    assert torch.equal(of["w"] == 1.0, still)


@given(st.lists(st.floats(-17, 15), min_size=3, max_size=3), st.sampled_from(KINDS))
def test_gradients_of_any_size_make_steps_of_no_sudden_one(exponents: list[float], kind: tuple[str, int]) -> None:
    of = {"wide": nn.Parameter(torch.zeros(4, 7)), "tall": nn.Parameter(torch.zeros(9, 3))}
    optimizer = new(of, lr=1.0, scale=1.0, weight_decay=0.0, scale_type=kind[0], rank=kind[1])
    lengths: dict[str, list[float]] = {name: [] for name in of}
    for step, exponent in enumerate(exponents):
        generator, before = torch.Generator().manual_seed(step), values(of)
        turn = {n: 10.0**exponent * (torch.randn(p.shape, generator=generator) + 0.1) for n, p in of.items()}
        train(optimizer, of, iter([turn]))
        for name, parameter in of.items():
            lengths[name].append((parameter.detach() - before[name]).norm().item())
            assert float(optimizer.state[parameter]["norm"]) == pytest.approx(lengths[name][-1], rel=1e-3, abs=1e-6)
    for first, second, third in lengths.values():
        assert second <= 1.011 * first + 1e-6 or first < 1e-6
        assert third <= 1.011 * second + 1e-6 or second < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_too_small_to_square_do_no_harm(kind: tuple[str, int]) -> None:
    of = weights()
    optimizer = new(of, scale_type=kind[0], rank=kind[1])
    for exponent in (0, -22, -30, -44, 0, -38, 0):
        turn = {n: torch.full_like(p, 10.0**exponent) for n, p in of.items()}
        before = values(of)
        train(optimizer, of, iter([turn]))
        # Few projected numbers tell a channel's length badly: the first step, which has no limit, may be a long one.
        assert all((p - before[n]).abs().max() < 5.0 for n, p in of.items())


def test_a_parameter_without_gradient_waits() -> None:
    of = weights()
    optimizer = new(of)
    of["wide"].grad = torch.ones(4, 7)
    before = values(of)
    optimizer.step()
    assert [p in optimizer.state for p in of.values()] == [True] + [False] * (len(of) - 1)
    assert_equal({n: v for n, v in values(of).items() if n != "wide"}, {n: v for n, v in before.items() if n != "wide"})


def test_a_sparse_gradient_is_refused_by_name() -> None:
    embedding = nn.Embedding(9, 4, sparse=True)
    optimizer = Apollo(embedding.named_parameters(), **SETTINGS)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of parameter weight is sparse.*sparse=False.*SparseAdam"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("lr", -1.0, "at least 0"), ("rank", 0, "at least 1"), ("scale_type", "row", '"channel" or "tensor"'),
        ("lengths", "long", '"exact" or "projected"'), ("scale", 0.0, "above 0"),
        ("update_proj_gap", 0, "at least 1"), ("betas", (0.9, 1.0), "below 1"),
        ("eps", -1e-8, "at least 0"), ("weight_decay", -0.1, "at least 0"), ("lr", float("nan"), "at least 0"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name: str, value: Any, bound: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} = .*must be .*{bound}") as error:
        Apollo([{"params": list(weights().values()), name: value}], **SETTINGS)
    assert "\n" not in str(error.value)


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("scale_type", "rank"), KINDS)
def test_state_is_float32_whatever_the_parameters_are(dtype: torch.dtype, scale_type: str, rank: int) -> None:
    of, exact = weights(dtype), weights()
    mine, other = (new(p, scale_type=scale_type, rank=rank, lr=0.01) for p in (of, exact))
    for turn in gradients(of, 10):
        train(mine, of, iter([turn]))
        train(other, exact, iter([{name: g.float() for name, g in turn.items()}]))
    for name, parameter in of.items():
        assert parameter.dtype == dtype
        assert {value.dtype for value in mine.state[parameter].values()} == {torch.float32}
        for key, value in mine.state[parameter].items():
            assert torch.equal(value, other.state[exact[name]][key]), "moments hang on gradients, not on weights"
    size = max((exact[name] - p).abs().max() for name, p in of.items())
    assert size < {torch.bfloat16: 0.1, torch.float16: 0.01, torch.float64: 1e-4}[dtype]


# --- over a restart, and in several processes -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [0, 3, 7, 11])
def test_a_saved_run_goes_on_bit_for_bit(dtype: torch.dtype, stop: int) -> None:
    straight, first, second = weights(dtype), weights(dtype), weights(dtype)
    turns = list(gradients(straight, 20))
    train(new(straight), straight, iter(turns))
    optimizer = new(first)
    train(optimizer, first, iter(turns[:stop]))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    for name, parameter in second.items():
        parameter.data.copy_(first[name].data)
    resumed = new(second, lr=9.0)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    torch.rand(3)  # what is drawn in between does not matter
    train(resumed, second, iter(turns[stop:]))
    assert_equal(values(second), values(straight))


def test_a_state_from_before_lengths_were_a_setting_goes_on_as_it_was() -> None:
    straight, of = weights(), weights()
    turns = list(gradients(straight, 9))
    train(new(straight, lengths="projected"), straight, iter(turns))
    begun = new(of, lengths="projected")
    train(begun, of, iter(turns[:4]))
    saved = begun.state_dict()
    for group in saved["param_groups"]:
        del group["lengths"]
    resumed = new(of)
    resumed.load_state_dict(saved)
    train(resumed, of, iter(turns[4:]))
    assert_equal(values(of), values(straight))


def test_what_was_loaded_is_a_copy() -> None:
    of, other = weights(), weights()
    one, two = new(of), new(other)
    train(one, of, gradients(of, 2))
    saved = one.state_dict()
    before = copy.deepcopy(saved["state"])
    two.load_state_dict(saved)
    train(two, other, gradients(other, 2))
    assert_equal(saved["state"], before)


def test_another_seed_is_another_trajectory() -> None:
    found = []
    for seed in (0, 0, 1):
        of = weights()
        train(new(of, seed=seed), of, gradients(of, 5))
        found.append(values(of))
    assert_equal(found[0], found[1])
    changed = {name for name in SHAPES if not torch.equal(found[0][name], found[2][name])}
    assert changed == {"wide", "tall", "square"}, "where nothing is projected nothing is drawn"


def test_projections_are_drawn_anew_after_the_gap() -> None:
    """A gap that is never over, against one that ends after three steps: equal until then."""
    found = []
    for gap in (100, 3):
        of = weights()
        optimizer = new(of, update_proj_gap=gap)
        steps = []
        for turn in gradients(of, 5):
            train(optimizer, of, iter([turn]))
            steps.append(of["wide"].detach().clone())
        found.append(steps)
    assert [torch.equal(*pair) for pair in zip(*found, strict=True)] == [True, True, True, False, False]


@pytest.mark.slow
def test_one_two_and_four_workers_take_the_same_way() -> None:
    """Equal to the bit among the workers of a run; between runs as far as sums of gradients are."""
    scene = "tests.optim.parallel_scene:trajectories"
    alone, *runs = (child.run(scene, ranks=workers, timeout_s=300) for workers in (1, 2, 4))
    way = torch.tensor(alone[0])
    assert way.shape[:2] == (2, STEPS) and (way[:, 1:] - way[:, :-1]).abs().amax(2).min() > 1e-3
    for workers in runs:
        assert all(found == workers[0] for found in workers)
        torch.testing.assert_close(torch.tensor(workers[0]), way, rtol=1e-4, atol=1e-4)
