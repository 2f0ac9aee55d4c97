"""Settings in words, on a small tree of classes of its own. The lines for a run's settings: test_config.py."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from cortex_core.config import Settings
from pipelines.explain import Knob, explain, in_words, knobs, listing, nearest, parse_text, sections, show


class Wheel(Settings):
    """A wheel."""

    spokes: Annotated[int, Field(ge=3)] = 12
    """How many
    spokes."""
    tyre: str | None = None
    """Which tyre."""


class Cart(Settings):
    """A cart."""

    owner: str = "me"
    """Whose."""
    wheel: Wheel = Wheel()
    """All alike."""
    loads_kg: tuple[Annotated[float, Field(gt=0)], ...] = (1.5,)
    """What it carries."""
    colour: Literal["red", "blue"] | Annotated[int, Field(ge=0)] = "red"
    """A name or a number."""


def lines(**data: object) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Cart.model_validate(data)
    return explain(Cart, caught.value.errors(), data)


def test_knobs_are_listed_in_order_with_one_line_of_documentation() -> None:
    assert list(knobs(Cart)) == [
        Knob("owner", "me", "text", "Whose."),
        Knob("wheel.spokes", 12, "an integer, at least 3", "How many spokes."),
        Knob("wheel.tyre", None, "text or null", "Which tyre."),
        Knob("loads_kg", (1.5,), "a list, each entry a number, above 0", "What it carries."),
        Knob("colour", "red", 'one of "red", "blue" or an integer, at least 0', "A name or a number."),
    ]
    assert [knob.section for knob in knobs(Cart)] == ["", "wheel", "wheel", "", ""]


def test_a_listing_shows_every_knob_below_its_section() -> None:
    assert sections(Cart) == ["wheel"]
    assert list(listing(Cart, "wheel", width=30)) == [
        "[wheel]  All alike.",
        "  wheel.spokes = 12",
        "      How many spokes. (an",
        "      integer, at least 3)",
        "  wheel.tyre = null",
        "      Which tyre. (text or",
        "      null)",
        "",
    ]
    assert [line for line in listing(Cart) if not line.startswith(" ")] == [
        "Settings of the run", "", "[wheel]  All alike.", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool, "true or false"),
        (Literal["only"], '"only"'),
        (tuple[int, int], "a list of 2, each entry an integer"),
        (Annotated[float, Field(gt=0, lt=0.5)], "a number, above 0, below 0.5"),
        (Annotated[int, Field(le=2**40)], "an integer, at most 1099511627776"),
        (bytes, "a value"),
    ],
)
def test_types_in_words(annotation: object, words: str) -> None:
    assert in_words(annotation) == words


def test_one_line_per_setting() -> None:
    assert lines(wheel={"spokes": 2, "tyer": "x"}, loads_kg=[1, -1, "x"], colour=-1) == [
        "wheel.spokes = 2: must be at least 3 (default 12)",
        "wheel.tyer: unknown key in section [wheel]; did you mean wheel.tyre?",
        "loads_kg[1] = -1: must be above 0 (default [1.5])",
        'loads_kg[2] = "x": expected a number, above 0 (default [1.5])',
        'colour = -1: expected one of "red", "blue" or an integer, at least 0 (default "red")',
    ]


def test_a_section_is_not_a_value() -> None:
    assert lines(wheel=4) == ["wheel = 4: is a section; set one of its keys: spokes, tyre"]


def test_a_literal_offers_the_nearest() -> None:
    assert lines(colour="bleu") == [
        'colour = "bleu": expected one of "red", "blue" or an integer, at least 0; did you mean "blue"? (default "red")'
    ]


def test_long_values_are_shortened() -> None:
    (line,) = lines(wheel={"spokes": "x" * 1000})
    assert line.startswith('wheel.spokes = "xxxx') and len(line) < 150


@pytest.mark.parametrize(("value", "text"), [(None, "null"), (True, "true"), ((1, 2), "[1, 2]"), ("ä", '"ä"')])
def test_values_are_shown_as_they_are_typed(value: object, text: str) -> None:
    assert show(value) == text


def test_nearest_is_near() -> None:
    assert nearest("trainnig", ["training", "tasks"]) == "training"
    assert nearest("zzz", ["training", "tasks"]) is None


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("owner", "12", "12"),
        ("owner", "'12'", "12"),
        ("owner", "null", None),
        ("wheel.spokes", "12", 12),
        ("wheel.spokes", "twelve", "twelve"),
        ("wheel.spokes", "1\nspokes = 2", "1\nspokes = 2"),
        ("loads_kg", "1, 2.5,", [1, 2.5]),
        ("loads_kg", "", []),
        ("colour", "red", "red"),
        ("no.such.key", "12", 12),
    ],
)
def test_typed_text(name: str, text: str, value: object) -> None:
    assert parse_text(Cart, name, text) == value


@given(st.text())
def test_text_settings_take_any_text(text: str) -> None:
    got = parse_text(Cart, "owner", text)
    quoted = text.strip()[:1] in ('"', "'")
    assert got == text or quoted or text == "null"
