"""Deltas on disk: what is loaded is what was saved, and whatever else comes is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cortex_core.backbone.fingerprint import fingerprint
from cortex_core.backbone.low_rank import LowRankDeltas, linear_modules
from cortex_core.backbone.low_rank_files import SCHEMA, load_deltas, save_deltas
from cortex_core.errors import ConfigError, DataError
from tests.backbone.families import bare, random_ids
from tests.tiny import same, weights

NAMES = ("model.layers.0.mlp.up_proj", "model.layers.2.self_attn.v_proj")
Tensors = dict[str, Tensor]
Table = dict[str, Any]


def learned(seed: int = 0) -> LowRankDeltas:
    deltas = LowRankDeltas(bare("llama"), NAMES, rank=2, scale=0.5, seed=seed)
    with torch.no_grad():
        for value in deltas.up:
            value.normal_(generator=torch.Generator().manual_seed(seed))
    return deltas


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_deltas(learned(), tmp_path / "deep" / "deltas.safetensors", bare("llama"))
    return tmp_path / "deep" / "deltas.safetensors"


def content(path: Path) -> tuple[Tensors, Table]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["notes"])  # noqa: SIM118


def rewritten(path: Path, tensors: Tensors, table: Any, schema: str = SCHEMA) -> None:
    save_file(
        tensors, path, metadata={"schema": schema, "notes": table if isinstance(table, str) else json.dumps(table)}
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
@torch.no_grad()
def test_what_is_loaded_is_what_was_saved(family: str, tmp_path: Path) -> None:
    backbone, ids = bare(family), random_ids(1, 9)
    deltas = LowRankDeltas(backbone, linear_modules(backbone), rank=2, scale=0.3, seed=5)
    for value in deltas.up:
        value.normal_(std=0.3)
    save_deltas(deltas, tmp_path / "d", backbone)
    again = load_deltas(tmp_path / "d", bare(family))
    assert (again.names, again.rank, again.scale) == (deltas.names, 2, 0.3)
    assert same(weights(again), weights(deltas))
    with deltas.attached(backbone):
        expected = backbone(input_ids=ids).logits
    with again.attached(backbone):
        assert torch.equal(backbone(input_ids=ids).logits, expected)


def test_the_backbone_may_be_in_bfloat16(path: Path) -> None:
    assert same(weights(load_deltas(path, bare("llama", dtype=torch.bfloat16))), weights(learned()))


def test_a_file_is_replaced_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def dies(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("cortex_core.files.save_file", dies)
        with pytest.raises(OSError, match="disk full"):
            save_deltas(learned(1), path, bare("llama"))
    assert path.read_bytes() == before
    save_deltas(learned(1), path, bare("llama"))
    assert same(weights(load_deltas(path, bare("llama"))), weights(learned(1)))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_nobody_could_load_is_not_saved(tmp_path: Path) -> None:
    deltas = learned()
    with torch.no_grad():
        deltas.up[0][0, 0] = float("nan")
    with pytest.raises(ConfigError, match="not finite and cannot be saved"):
        save_deltas(deltas, tmp_path / "d", bare("llama"))
    assert not list(tmp_path.iterdir())


def without(name: str) -> Callable[[Tensors, Table], tuple[Tensors, Table]]:
    return lambda tensors, table: ({n: v for n, v in tensors.items() if n != name}, table)


def with_value(name: str, value: Tensor) -> Callable[[Tensors, Table], tuple[Tensors, Table]]:
    return lambda tensors, table: (tensors | {name: value}, table)


def saying(**entries: Any) -> Callable[[Tensors, Table], tuple[Tensors, Table]]:
    return lambda tensors, table: (tensors, table | entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("up.1"), r"up\.1 \[16, 2\] float32 is missing"),
        (with_value("up.2", torch.zeros(16, 2)), r"up\.2 .* not what its table promises"),
        (with_value("up.0", torch.zeros(48, 3)), r"up\.0 .* not what its table promises"),
        (with_value("up.0", torch.zeros(48, 2, dtype=torch.bfloat16)), r"up\.0 .* not what its table promises"),
        (with_value("down.1", torch.full((2, 32), float("nan"))), r"down\.1 holds numbers that are not finite"),
        (with_value("down.1", torch.full((2, 32), float("inf"))), r"down\.1 holds numbers that are not finite"),
        (saying(backbone="0123456789abcdef"), r"another backbone \(0123456789abcdef, this one is"),
        (saying(modules=[*NAMES[:1], "model.layers.7.mlp.up_proj"]), "do not fit the backbone .*is no module of it"),
        (saying(modules=["model.norm"]), "do not fit the backbone .*not a linear module"),
        (saying(modules=[NAMES[0], NAMES[0]]), "do not fit the backbone .*each once"),
        (saying(modules=[]), "modules: Tuple should have at least 1 item"),
        (saying(modules=7), "modules: Input should be a valid tuple"),
        (saying(rank=10**9), "do not fit the backbone .*rank = 1000000000"),
        (saying(rank=0), "rank: Input should be greater than or equal to 1"),
        (saying(scale="wide"), "scale: Input should be a valid number"),
        (saying(scale=float("nan")), "scale: Input should be a finite number"),
        (saying(modules=["two\nlines"]), r"'two\\nlines' is no module of it"),
        (saying(**{"two\nlines": 1}), "two lines: Extra inputs are not permitted"),
        (saying(code="import os"), "code: Extra inputs are not permitted"),
        (lambda tensors, table: (tensors, []), "its notes are list, not a table"),
        (lambda tensors, table: (tensors, "{not json"), "its notes are unreadable"),
        (lambda tensors, table: (tensors, "[" * 100_000), "its notes are unreadable"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(
    path: Path, change: Callable[[Tensors, Table], tuple[Tensors, Table]], message: str
) -> None:
    rewritten(path, *change(*content(path)))
    with pytest.raises(DataError, match=message) as raised:
        load_deltas(path, bare("llama"))
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_files_that_are_none_are_refused(path: Path) -> None:
    for wrong, message in ((path.parent, "no such file"), (path.with_name("nope"), "no such file")):
        with pytest.raises(DataError, match=message):
            load_deltas(wrong, bare("llama"))
    rewritten(path, *content(path), schema="cortex-sidecars/2")
    with pytest.raises(DataError, match=r"schema is 'cortex-sidecars/2', this version reads 'cortex-low-rank/1'"):
        load_deltas(path, bare("llama"))


def test_a_backbone_with_other_weights_is_another_one(path: Path) -> None:
    other = bare("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert fingerprint(other) != fingerprint(bare("llama"))
    with pytest.raises(DataError, match="another backbone"):
        load_deltas(path, other)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.data())
def test_damage_anywhere_is_refused_or_harmless(path: Path, data: st.DataObject) -> None:
    """Cut off or with some bytes changed: a DataError, or finite deltas of the same modules."""
    whole = path.read_bytes()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 1)), max_size=4)):
        if damaged:
            damaged[place] = data.draw(st.integers(0, 255))
    (broken := path.with_name("broken")).write_bytes(damaged)
    try:
        deltas = load_deltas(broken, bare("llama"))
    except DataError:
        return
    assert deltas.names == NAMES
    assert deltas.is_finite
