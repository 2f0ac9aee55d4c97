"""What a report says: the findings in words, the accuracies as a table, and the page that holds both.

The page is one file, without script and with nothing to fetch; it follows the reader's light or dark theme.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from string import Template
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from pipelines import drawing
from pipelines.drawing import Row, percent, token_label

# The colours of the figures, and the CSS variables that take their place on the page.
_THEME = {
    drawing.ON: "on",
    drawing.OFF: "off",
    drawing.INK: "ink",
    drawing.MUTED: "muted",
    drawing.HAIRLINE: "line",
    drawing.BAND: "band",
    drawing.PAPER: "card",
}


class Finding(NamedTuple):
    """One headline: what was measured, its value, and what stands behind it, most important first."""

    name: str
    value: str
    notes: tuple[str, ...]


def conditions(rows: Sequence[Row]) -> dict[tuple[str, str], dict[int, dict[str, Row]]]:
    """Rows by (task, filler) as they come, then by gap in rising order, then by memory "on" or "off"."""
    found: dict[tuple[str, str], dict[int, dict[str, Row]]] = {}
    for row in rows:
        gaps = found.setdefault((row["task"], row["filler"]), {})
        gaps.setdefault(row["gap_tokens"], {})[row["memory"]] = row
    return {condition: dict(sorted(gaps.items())) for condition, gaps in found.items()}


def findings(evaluation: Mapping[str, Any]) -> list[Finding]:
    """The headlines of an evaluation as plain text; what was not measured is left out."""
    found = [*_recall(evaluation), *_drift(evaluation.get("drift") or {})]
    sidecar, backbone = evaluation.get("sidecar_parameters"), evaluation.get("backbone_parameters")
    if sidecar is not None and backbone:
        note = f"{sidecar:,} beside {backbone:,} frozen ones"
        found.append(Finding("Trained parameters", percent(sidecar / backbone, 2), (note,)))
    if (state := evaluation.get("state_bytes")) is not None:
        size = f"{state / 1024:,.1f} KiB" if state >= 1024 else f"{state} bytes"
        found.append(Finding("State of a session", size, (f"{state:,} bytes for a text of any length",)))
    speed = evaluation.get("throughput") or {}
    on, off = speed.get("tokens_per_s_on"), speed.get("tokens_per_s_off")
    if on is not None:
        note = f"{percent(on / off)} of the {off:,.0f} with memory off" if off else "with memory on"
        found.append(Finding("Speed", f"{on:,.0f} tokens/s", (note,)))
    return found


def _recall(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    """Per task, the accuracy at the largest gap, under the filler that makes it hardest."""
    hardest: dict[str, tuple[int, Row, Row | None]] = {}
    for (task, _), gaps in conditions(evaluation["rows"]).items():
        for gap, pair in gaps.items():
            on, worst = pair.get("on"), hardest.get(task)
            if on and (worst is None or (gap, -on["accuracy"]) > (worst[0], -worst[1]["accuracy"])):
                hardest[task] = (gap, on, pair.get("off"))
    for task, (gap, on, off) in hardest.items():
        chance = (evaluation.get("chance") or {}).get(task)
        without = [f"memory off {percent(off['accuracy'], 1)}"] if off else []
        without += [f"chance {percent(chance, 1)}"] if chance is not None else []
        notes = [", ".join(without)] if without else []
        notes += [f"95 % interval {interval(on)}", f"filler: {on['filler']}"]
        name = f"{task}, gap {token_label(gap)}" if gap else f"{task}, in window"
        yield Finding(name, percent(on["accuracy"], 1), tuple(notes))


def _drift(drift: Mapping[str, Any]) -> Iterator[Finding]:
    """The cost to ordinary text, with the perplexities behind the ratio."""
    if drift.get("ratio") is None:
        return
    notes = []
    if drift.get("low") is not None and drift.get("high") is not None:
        notes.append(f"95 % interval {drift['low']:.4f} to {drift['high']:.4f}")
    for name, key, digits in (("perplexity", "perplexity", 2), ("bits per byte", "bits_per_byte", 3)):
        on, off = drift.get(f"{key}_on"), drift.get(f"{key}_off")
        if on is not None and off is not None:
            notes.append(f"{name} {on:.{digits}f} on, {off:.{digits}f} off")
    if drift.get("n_tokens") is not None:
        notes.append(f"{drift['n_tokens']:,} tokens of held-out text")
    yield Finding("Perplexity, on / off", f"{drift['ratio']:.4f}", tuple(notes))


def interval(row: Row) -> str:
    """The 95 % interval of a row, in percent."""
    return f"{100 * row['low']:.1f} to {100 * row['high']:.1f} %"


def page(evaluation: Mapping[str, Any], figures: Mapping[str, Figure]) -> str:
    """The whole report as HTML. `figures` holds "reach" and, where there is data, "usage" and "training"."""
    run = escape(evaluation.get("run") or "evaluation")
    created = escape(evaluation.get("created") or "")
    cards = "".join(
        f"<div class=card><dt>{escape(name)}</dt>"
        f"<dd><b>{escape(value)}</b><span>{escape('; '.join(notes))}</span></dd></div>"
        for name, value, notes in findings(evaluation)
    )
    parts = [
        heading("Cortex evaluation", run, created),
        f"<dl class=cards>{cards}</dl>",
        "<h2>How far the memory reaches</h2>",
        svg(figures["reach"], "Accuracy by gap, memory on and off"),
        _accuracies(evaluation),
    ]
    if "usage" in figures:
        parts += ["<h2>Where the gate opens</h2>", svg(figures["usage"], "Write strength by layer")]
    if "training" in figures:
        parts += ["<h2>Training</h2>", svg(figures["training"], "Loss, accuracy and speed by step")]
    parts.append(_READING)
    for name, key in (("Configuration, resolved", "config"), ("Versions", "versions")):
        if evaluation.get(key):
            parts.append(folded(name, evaluation[key]))
    return framed(run, parts)


def framed(title: str, parts: Sequence[str]) -> str:
    """A page of its own from parts that are HTML, as is the title."""
    return _FRAME.substitute(title=title, body="\n".join(parts))


def heading(kind: str, title: str, created: str) -> str:
    """The head of a page; all three are HTML."""
    return f"<header><p>{kind}</p><h1>{title}</h1><p>{created}</p></header>"


def folded(name: str, content: Any) -> str:
    """JSON that is shown on a click."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    return f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"


def _accuracies(evaluation: Mapping[str, Any]) -> str:
    """Accuracy by gap, memory on and off with 95 % intervals: a table per task and filler."""
    tables = []
    for (task, filler), gaps in conditions(evaluation["rows"]).items():
        lines = []
        for gap, pair in gaps.items():
            cells = "".join(
                f"<td class={memory}>{percent(row['accuracy'], 1)}<td class=range>{interval(row)}"
                if (row := pair.get(memory))
                else "<td><td>"
                for memory in ("on", "off")
            )
            counts = ", ".join(f"{n:,}" for n in sorted({row["n"] for row in pair.values()}))
            lines.append(f"<tr><th scope=row>{f'{gap:,}' if gap else 'in window'}{cells}<td>{counts}")
        tables.append(
            f"<div class=scroll><table><caption>{escape(task)}, filler: {escape(filler)}</caption>"
            f"<thead><tr>{_HEADS}<tbody>{''.join(lines)}</table></div>"
        )
    return "".join(tables)


_HEADS = "".join(
    f"<th scope=col>{name}"
    for name in ("gap, tokens", "memory on", "95 % interval", "memory off", "95 % interval", "examples")
)


def svg(figure: Figure, description: str) -> str:
    """The figure as inline SVG in the page's colours, without what only a file of its own needs."""
    markup = drawing.image_bytes(figure, "svg").decode()
    markup = markup[markup.index("<svg") :]
    for pattern in (r"<metadata>.*?</metadata>", r'\sxmlns(:\w+)?="[^"]*"', r'\sid="\w+_\d+"', r"<!--.*?-->"):
        markup = re.sub(pattern, "", markup, flags=re.DOTALL)
    for color, name in _THEME.items():
        markup = markup.replace(color, f"var(--{name})")
    return f'<figure role="img" aria-label="{escape(description)}">{markup}</figure>'


_READING = """<h2>How to read this</h2>
<ul>
<li>Facts come first, then a gap of filler, then a question. In the window the model still sees the facts;
beyond it only the memory can know the answer.
<li>Memory off is the frozen model alone, on the same examples. The distance between the two curves is what
the memory adds; in the window they should coincide.
<li>The 95 % intervals of accuracies are Wilson's: how far luck with the examples may have moved a number.
<li>Perplexity, on / off, compares the model with and without the memory on text that nobody asks about. 1
means that the memory leaves such text alone; above 1 it does harm.
<li>The gate decides what is written. Shut on filler, it lets facts wait at no cost; each write on filler
overwrites a little of what was kept, and so sets the reach.
</ul>"""

_FRAME = Template("""<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --on: #0072b2; --off: #c8500a; --ink: #1f2328; --muted: #656d76;
  --line: #e3e6ea; --band: #f4f6f8; --card: #ffffff; --page: #f6f8fa }
@media (prefers-color-scheme: dark) { :root { --on: #58b0ea; --off: #f2925a; --ink: #e8ebef; --muted: #9aa4af;
  --line: #30363d; --band: #1f252d; --card: #161b22; --page: #0d1117 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.25rem 4rem; color: var(--ink);
  background: var(--page); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif }
header p { margin: 0; color: var(--muted) }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.25; overflow-wrap: anywhere }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem }
.card, figure, .scroll, details { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 }
.card { padding: .8rem 1rem; overflow-wrap: anywhere }
.card dt { color: var(--muted); font-size: .85rem }
.card dd { margin: 0 }
.card b { display: block; font-size: 1.6rem; line-height: 1.3 }
.card span { display: block; color: var(--muted); font-size: .8rem; line-height: 1.4 }
figure { margin: 0 0 .75rem; padding: .5rem; overflow-x: auto }
figure svg { display: block; width: 100%; min-width: 34rem; height: auto }
.scroll { overflow-x: auto; margin: 0 0 .75rem; padding: .75rem 1rem }
table { border-collapse: collapse; width: 100%; white-space: nowrap; font-size: .9rem;
  font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem }
th, td { text-align: right; padding: .28rem .6rem; border-bottom: 1px solid var(--line); font-weight: 400 }
th:first-child { text-align: left; padding-left: 0 }
thead th { color: var(--muted); font-size: .8rem }
tbody tr:last-child > * { border-bottom: 0 }
td.on { color: var(--on); font-weight: 600 }
td.off { color: var(--off); font-weight: 600 }
td.range { color: var(--muted) }
li { margin: .35rem 0 }
details { margin: .75rem 0; padding: .7rem 1rem }
summary { cursor: pointer }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.45 }
</style>
$body
</html>
""")
