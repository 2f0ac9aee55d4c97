"""The configuration in words: what a knob expects, what is wrong with a value, which name was meant.

Works on any tree of `Settings` classes; `pipelines.config` applies it to `RunConfig`.
"""

from __future__ import annotations

import difflib
import json
import textwrap
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types as bounds
from pydantic import BaseModel
from pydantic.fields import FieldInfo

KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


class Knob(NamedTuple):
    """One setting."""

    name: str
    """Dotted, as in an override."""
    default: object
    expects: str
    doc: str

    @property
    def section(self) -> str:
        """The part before the dot; empty for a top-level key."""
        return self.name.rpartition(".")[0]


def knobs(model: type[BaseModel], prefix: str = "") -> Iterator[Knob]:
    """Every setting below `model`, depth first, in the order of definition."""
    for name, field in model.model_fields.items():
        if inner := _model(field):
            yield from knobs(inner, f"{prefix}{name}.")
        else:
            expects = in_words(field.annotation, field.metadata)
            yield Knob(prefix + name, field.default, expects, " ".join((field.description or "").split()))


def sections(model: type[BaseModel]) -> list[str]:
    """Names of the sections below `model`, in the order of definition."""
    return [name for name, field in model.model_fields.items() if _model(field)]


def listing(model: type[BaseModel], only: str | None = None, width: int = 100) -> Iterator[str]:
    """Lines that show every setting, or those of one section, with default, meaning and what it expects."""
    listed = list(knobs(model))
    for name in ["", *sections(model)] if only is None else [only]:
        yield f"[{name}]  {model.model_fields[name].description}" if name else "Settings of the run"
        for knob in listed:
            if knob.section == name:
                yield f"  {knob.name} = {show(knob.default)}"
                yield from textwrap.wrap(
                    f"{knob.doc} ({knob.expects})", width, initial_indent=" " * 6, subsequent_indent=" " * 6
                )
        yield ""


def show(value: object) -> str:
    """A value as it would be typed in TOML, shortened when it is long; None is `null`."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that `name` most probably is a misspelling of."""
    return next(iter(difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)), None)


def in_words(annotation: Any, metadata: Sequence[object] = ()) -> str:
    """What a value of this type has to be, for example `an integer, at least 1`."""
    origin, args = get_origin(annotation), list[Any](get_args(annotation))
    if origin is Annotated:
        return in_words(args[0], [*metadata, *_flat(args[1:])])
    if origin is Literal:
        return "one of " + ", ".join(map(show, args)) if len(args) > 1 else show(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else in_words(arg, metadata) for arg in args)
    limits = ", ".join(filter(None, map(_limit, _flat(metadata))))
    if origin is tuple:
        count = "" if args[1:] == [Ellipsis] else f" of {len(args)}"
        return f"a list{count}, each entry {in_words(args[0])}"
    words = KINDS.get(annotation, "a value")
    return f"{words}, {limits}" if limits and annotation is not str else words


def _flat(metadata: Iterable[object]) -> list[object]:
    """Bounds inside an `Annotated` stand in a `Field(...)`; those of a field stand on their own."""
    return [m for item in metadata for m in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _limit(bound: object) -> str | None:
    match bound:
        case bounds.Ge(ge=x):
            return f"at least {_number(x)}"
        case bounds.Gt(gt=x):
            return f"above {_number(x)}"
        case bounds.Le(le=x):
            return f"at most {_number(x)}"
        case bounds.Lt(lt=x):
            return f"below {_number(x)}"
    return None


def _number(x: Any) -> str:
    return f"{x:g}" if isinstance(x, float) else str(x)


def _model(field: FieldInfo | None) -> type[BaseModel] | None:
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _find(model: type[BaseModel], path: Sequence[object]) -> tuple[FieldInfo | None, int]:
    """The field that `path` leads to or into, and how many of its parts name it."""
    field, depth, inner = None, 0, model
    while inner is not None and depth < len(path):
        field, depth = inner.model_fields.get(str(path[depth])), depth + 1
        inner = _model(field)
    return field, depth


def parse_text(model: type[BaseModel], name: str, text: str) -> object:
    """The value that `text`, typed on a command line, means for the setting `name`.

    A TOML literal where it is one, else text; text settings take everything as it stands, lists take `1,2` as
    well as `[1,2]`, and `null` is None. Types and bounds are checked later, together with the recipe's.
    """
    value = _literal(text)
    if text == "null":
        return None
    field, _ = _find(model, name.split("."))
    kinds = _alternatives(field.annotation) if field else []
    if str in kinds:
        return value if isinstance(value, str) else text
    if any(get_origin(kind) is tuple for kind in kinds) and not isinstance(value, list):
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        parts = [part.strip() for part in text.split(",")]
        return value if value in words else [_literal(part) for part in parts if part]
    return value


def _literal(text: str) -> object:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if table.keys() == {"value"} else text  # more keys: a line break inside the text


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]


def explain(model: type[BaseModel], errors: Iterable[Mapping[str, Any]], data: Mapping[str, Any]) -> list[str]:
    """One line per wrong setting, from pydantic's `errors` about `data`: name, value, bound, a way out."""
    lines: dict[str, str] = {}
    for error in errors:
        path, kind = error["loc"], error["type"]
        field, depth = _find(model, path)
        name = ".".join(map(str, path[:depth]))
        if kind == "extra_forbidden":
            lines.setdefault(name, _unknown(model, path))
        elif kind == "value_error" and (field is None or _model(field)):
            # A rule over several settings; one inside a section names them bare.
            rule = str(error["ctx"]["error"])
            lines.setdefault(rule, f"{name}.{rule}" if name else rule)
        elif field is None or _model(field):
            keys = ", ".join((_model(field) or model).model_fields)
            lines.setdefault(name, f"{name} = {show(error['input'])}: is a section; set one of its keys: {keys}")
        elif kind != "too_short" or not error["input"]:  # else: counts the valid entries, the others have lines
            key, line = _about_value(error, name, field, path[depth:], _get(data, path[:depth]))
            lines.setdefault(key, line)
    return list(lines.values())


def _about_value(
    error: Mapping[str, Any], name: str, field: FieldInfo, rest: Sequence[object], value: object
) -> tuple[str, str]:
    """Name of the wrong value, and its line. `rest` is what pydantic's path adds to the setting's own."""
    wanted, metadata = field.annotation, field.metadata
    index = rest[0] if rest and isinstance(rest[0], int) and error["type"] != "missing" else None
    if index is not None and len(_alternatives(wanted)) == 1:  # one entry of a list is wrong
        items = [arg for arg in get_args(wanted) if arg is not Ellipsis]
        wanted, metadata = items[min(index, len(items) - 1)], ()
        name, value = f"{name}[{index}]", error["input"]
    # A union reports once per alternative, each with its own reason: what it expects in all says more.
    reason = _reason(error) if len(_alternatives(wanted)) == 1 else None
    if reason is None:
        reason = f"expected {in_words(wanted, metadata)}"
        if isinstance(value, str) and (near := nearest(value, _words(wanted))):
            reason += f"; did you mean {show(near)}?"
    return name, f"{name} = {show(value)}: {reason} (default {show(field.default)})"


def _reason(error: Mapping[str, Any]) -> str | None:
    """Why a value of the right type is refused, or None when it is the type that is wrong."""
    context = error.get("ctx", {})
    match error["type"]:
        case "greater_than_equal":
            return f"must be at least {_number(context['ge'])}"
        case "greater_than":
            return f"must be above {_number(context['gt'])}"
        case "less_than_equal":
            return f"must be at most {_number(context['le'])}"
        case "less_than":
            return f"must be below {_number(context['lt'])}"
        case "finite_number":
            return "must be a finite number"
        case "too_short" | "string_too_short":
            return "must not be empty"
        case "value_error":
            return str(context["error"])
    return None


def _get(data: object, path: Sequence[object]) -> object:
    for key in path:
        data = data.get(str(key)) if isinstance(data, Mapping) else None
    return data


def _words(annotation: Any) -> list[str]:
    """Every text that some `Literal` inside the annotation admits."""
    if get_origin(annotation) is Literal:
        return [word for word in get_args(annotation) if isinstance(word, str)]
    return [word for inner in get_args(annotation) for word in _words(inner)]


def _unknown(model: type[BaseModel], path: Sequence[object]) -> str:
    *parents, key = map(str, path)
    field, _ = _find(model, parents)
    section = _model(field) if parents else model
    where = f"in section [{'.'.join(parents)}]" if parents else "at the top level"
    siblings = {name: ".".join([*parents, name]) for name in (section.model_fields if section else ())}
    anywhere: dict[str, str] = {}
    for knob in knobs(model):
        leaf = knob.name.rpartition(".")[2]
        anywhere[leaf] = f"{anywhere[leaf]} or {knob.name}" if leaf in anywhere else knob.name
    meant = anywhere.get(key) or siblings.get(nearest(key, siblings) or "")
    meant = meant or anywhere.get(nearest(key, anywhere) or "")
    hint = f"did you mean {meant}?" if meant else f"it has: {', '.join(siblings)}"
    return f"{'.'.join(map(str, path))}: unknown key {where}; {hint}"
