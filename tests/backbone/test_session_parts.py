"""Session files of eight bits, and with a log: identity or a known error, and a clear refusal of everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.segments import NEVER
from cortex_core.backbone.session import Session
from cortex_core.errors import ConfigError, DataError
from cortex_core.fast_weights.quantised import LEVELS, from_int8, to_int8
from tests.backbone.families import VOCAB, random_ids, with_memory

TOKENS = 110


@pytest.fixture
def model() -> Cortex:
    return with_memory()


@pytest.fixture
def session(model: Cortex) -> Session:
    """Two rows with a log: writes before its start, two sources, some that expire, one forgotten in the open segment."""
    session, ids = model.new_session(2, log_writes=40), random_ids(2, TOKENS)
    with torch.no_grad():
        model.read(ids[:, :60], session, source="a")
        model.read(ids[:, 60:90], session, source="b", ttl_tokens=500)
        model.read(ids[:, 90:], session)
    model.forget(session, positions=(105, 106))
    return session


def edit(path: Path, change: Callable[[dict[str, Tensor]], object], **metadata: str) -> None:
    """Change a file's tensors in place, and its metadata."""
    with safe_open(path, framework="pt") as file:
        kept = file.metadata() | metadata
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=kept)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@torch.no_grad()
def test_a_log_comes_back_and_goes_on(model: Cortex, session: Session, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "chat"
    session.save(path, dtype=dtype)
    again = model.load_session(path)
    assert again.writes() == session.writes()
    assert {w.source for w in again.writes()} == {"a", "b", None}
    assert again.num_bytes == session.num_bytes
    after = random_ids(2, 60, seed=9)
    for one in (session, again):
        assert model.forget(one, "b") > 0
        model.read(after, one, source="c")
    assert [w[:6] for w in map(_plain, again.writes())] == [w[:6] for w in map(_plain, session.writes())]
    bound = 1e-6 if dtype == "float32" else 2e-2
    for layer, state in session.states.items():
        assert float((again.states[layer].up - state.up).abs().max()) <= bound * float(state.up.abs().max())
    with pytest.raises(ConfigError, match="have left the log of 40"):
        model.forget(again, "a")


def _plain(write: object) -> tuple:
    return (*(getattr(write, name) for name in ("layer", "row", "position", "token_id", "source", "expires")),)


def test_eight_bits_are_within_half_a_step() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 16, 32, generator=generator) * torch.logspace(-30, 8, 16)[:, None]
    x[0, 0, 0], x[0, 0, 1] = 0.0, 1e-42
    integers, scale = to_int8(x)
    assert integers.dtype == torch.int8 and scale.shape == (3, 4, 16, 1)
    assert bool((scale > 0).all()) and bool(torch.isfinite(scale).all())
    error = (from_int8(integers, scale) - x).abs()
    rows = x.abs().amax(-1, keepdim=True)
    assert bool((error <= rows / LEVELS * 0.5 * (1 + 1e-4) + 1e-41).all())
    assert bool((integers.abs().amax(-1)[rows[..., 0] > 1e-36] == LEVELS).all())  # all of the range is used
    assert torch.equal(from_int8(*to_int8(torch.zeros(2, 5))), torch.zeros(2, 5))


@pytest.mark.parametrize("width", [32, 64, 128])
def test_eight_bits_take_at_most_30_percent(width: int) -> None:
    x = torch.randn(2, 4, 16, width)
    assert sum(part.numel() * part.element_size() for part in to_int8(x)) <= 0.30 * x.numel() * 4


@torch.no_grad()
def test_an_int8_session_is_float32_again(model: Cortex, tmp_path: Path) -> None:
    session = model.new_session(2)
    model.read(random_ids(2, 100), session)
    session.save(tmp_path / "full")
    session.save(tmp_path / "small", dtype="int8")
    again = model.load_session(tmp_path / "small")
    for layer, state in session.states.items():
        assert again.states[layer].up.dtype == torch.float32
        error = (again.states[layer].up - state.up).abs()
        assert bool((error <= state.up.abs().amax(-1, keepdim=True) / 2 / LEVELS * (1 + 1e-4)).all())
        assert float(error.max()) > 0
    assert again.num_bytes == session.num_bytes
    model.read(random_ids(2, 40, seed=4), again)
    again.save(tmp_path / "small", dtype="int8")
    with pytest.raises(ConfigError, match="dtype = 'int4': a session is saved as 'float32' or 'int8'"):
        session.save(tmp_path / "no", dtype="int4")


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("version", [1, 2])
def test_files_of_earlier_versions_are_read(model: Cortex, tmp_path: Path, version: int, dtype: str) -> None:
    """They had nothing of what stood before the open segment."""
    session = model.new_session(2)
    model.read(random_ids(2, 70), session)
    session.save(tmp_path / "new", dtype)
    session.save(tmp_path / "old", dtype)

    def without_context(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "context" in name]:
            del tensors[name]

    edit(tmp_path / "old", without_context, schema=f"cortex-session/{version}")
    old, new = (model.load_session(tmp_path / name) for name in ("old", "new"))
    for layer, state in old.states.items():
        assert torch.equal(state.up, new.states[layer].up)
        assert state.context.shape == new.states[layer].context.shape and not state.context.any()
        assert new.states[layer].context.any()
    edit(tmp_path / "new", without_context)
    with pytest.raises(DataError, match=r"layer\.1\.context.* is missing"):
        model.load_session(tmp_path / "new")


def put(name: str, value: object, index: object = ...) -> Callable[[dict[str, Tensor]], None]:
    """One entry of a tensor, or all of it, replaced."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("layer.1.up.scale", 0.0, (0, 0, 0)), "scales that are not positive"),
        (put("base.2.up.scale", -1.0, (0, 0, 0)), "scales that are not positive"),
        (put("layer.1.up.scale", float("inf"), (0, 0, 0)), "numbers that are not finite"),
        (lambda t: t.pop("layer.1.up.scale"), r"layer\.1\.up\.scale is missing, expected torch.float32 \[2, 4, 8, 1\]"),
        (lambda t: t.update({"layer.1.up": t["layer.1.up"].float()}), r"layer\.1\.up is torch.float32"),
        (lambda t: t.update({"layer.7.up": torch.zeros(2)}), r"layer\.7\.up is no part of a session"),
        (put("log.1.positions", 0, (0, 5)), r"log\.1\.positions that do not ascend"),
        (put("log.1.positions", 96, (0, 39)), r"log\.1\.positions that do not ascend within the session"),
        (put("log.1.counts", 41, 0), r"log\.1\.counts outside the log"),
        (put("log.2.start", -1, 0), r"log\.2\.start outside the session"),
        (put("log.1.token_ids", VOCAB, (0, 0)), r"log\.1\.token_ids outside the vocabulary"),
        (put("log.1.sources", 2, (0, 0)), r"log\.1\.sources outside the labels"),
        (put("open.source", -2, (0, 0)), r"open\.source outside the labels"),
        (put("open.expires", -1, (0, 0)), r"open\.expires outside the session"),
        (put("log.1.expires", 5, (0, 0)), r"log\.1\.expires that should be over"),
        (put("log.1.expires", NEVER + 1, (0, 0)), r"log\.1\.expires that should be over"),
        (put("log.1.write", 1.5, (0, 0, 0)), r"log\.1\.write stronger than write_strength"),
        (put("log.1.write", -0.1, (0, 0, 0)), r"log\.1\.write or ticks below 0"),
        (put("log.1.ticks", 7.0, (0, 0, 0)), r"log\.1\.write or ticks below 0 or above"),
        (put("log.1.keys", 1.0, (0, 0, 0)), r"log\.1\.keys longer than 1"),
        (put("log.1.values", float("nan"), (0, 0, 0)), "numbers that are not finite"),
        (lambda t: t.update({"folded": t["folded"][:, :1].clone()}), r"folded is torch.bool \[2, 1\], expected"),
        (lambda t: t.pop("open.silent"), r"open\.silent is missing"),
        (lambda t: t.pop("log.2.write"), r"log\.2\.write is missing"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(
    model: Cortex, session: Session, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    session.save(tmp_path / "chat", dtype="int8")
    edit(tmp_path / "chat", change)
    with pytest.raises(DataError, match=message):
        model.load_session(tmp_path / "chat")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"log": "{"}, "settings of its log are unreadable"),
        ({"log": "3"}, "settings of its log are unreadable"),
        ({"log": json.dumps({"capacity": 0, "labels": ["a", "b"]})}, "settings of its log are unreadable"),
        ({"log": json.dumps({"capacity": True, "labels": ["a", "b"]})}, "settings of its log are unreadable"),
        ({"log": json.dumps({"capacity": 40, "labels": ["a", "a"]})}, "settings of its log are unreadable"),
        ({"log": json.dumps({"capacity": 40, "labels": ["a", 7]})}, "settings of its log are unreadable"),
        ({"log": json.dumps({"capacity": 9, "labels": ["a", "b"]})}, "40 writes in a log of 9"),
        ({"dtype": "int4"}, "dtype is 'int4', this version reads 'float32' and 'int8'"),
        ({"dtype": "int8"}, r"\.scale is missing|up is torch.float32"),
    ],
)  # fmt: skip
def test_damaged_settings_are_refused(
    model: Cortex, session: Session, tmp_path: Path, metadata: dict[str, str], message: str
) -> None:
    session.save(tmp_path / "chat")
    edit(tmp_path / "chat", lambda tensors: None, **metadata)
    with pytest.raises(DataError, match=message):
        model.load_session(tmp_path / "chat")
