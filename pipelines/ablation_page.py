"""An ablation to look at: accuracy by gap with a line per variant, and a page of its own with every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from cortex_core.eval.ablations import REFERENCE, VARIANTS
from pipelines.drawing import OFF, ON, STYLE, Row, add_title, panel_grid, percent
from pipelines.reach_panel import Curve, reach_panel, sample_note
from pipelines.report_page import folded, framed, heading, svg

# After Okabe & Ito (2008), darkened until they can be read as text; the reference and the bare model have the colours
# that memory on and off have everywhere. A variant keeps its look whichever others are drawn.
OTHERS = ("#00805c", "#a8487d", "#8a6d00", "#3b87b8", "#7a5230", "#5b5fc7")
STYLES = 4


def looks(name: str) -> tuple[str, int]:
    """Colour and line style of a variant."""
    match VARIANTS[name].made_by:
        case "nothing":
            return OFF, 0
        case _ if name == REFERENCE:
            return ON, 0
    place = [other for other in VARIANTS if other not in (REFERENCE, "baseline")].index(name)
    return OTHERS[place % len(OTHERS)], 1 + place // len(OTHERS) % (STYLES - 1)


def ablation_curves(
    rows: Sequence[Row], *, window_tokens: int | None = None, chance: Mapping[str, float] | None = None
) -> Figure:
    """Accuracy against the gap in tokens, a line per variant, a panel per task and filler.

    `rows` are those of `ablation_table.compare`. Intervals are shaded for the reference and the bare model alone.
    """
    conditions = list(dict.fromkeys((row["task"], row["filler"]) for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    with matplotlib.rc_context(STYLE):
        height = max(2.8, 0.21 * (len(names) + 1))  # room for every name at the lines' ends
        figure, grid = panel_grid(len(conditions), 1, panel_in=height, top_in=0.66, right_in=1.7)
        for place, (task, filler) in enumerate(conditions):
            axes = figure.add_subplot(grid[place, 0])
            part = [row for row in rows if (row["task"], row["filler"]) == (task, filler)]
            curves = [_curve(name, [row for row in part if row["variant"] == name]) for name in names]
            reach_panel(axes, curves[::-1], window_tokens, (chance or {}).get(task), wide=True)
            name = f"{task.replace('_', '-').capitalize()}, filler: {filler}"
            add_title(axes, name, sample_note(part).partition(",")[0], above=22)
            if place + 1 == len(conditions):
                axes.set_xlabel("tokens between the facts and the question", labelpad=1)
    return figure


def _curve(name: str, rows: Sequence[Row]) -> Curve:
    color, style = looks(name)
    return Curve(name, name, rows, color, style, band=style == 0)


def gained(row: Row) -> tuple[str, str]:
    """The difference to the reference and its interval, in points; empty where there is none."""
    if row["difference"] is None:
        return "", ""
    low, high = (f"{100 * row[key]:+.1f}" for key in ("difference_low", "difference_high"))
    return f"{100 * row['difference']:+.1f}", f"{low} to {high}"


def costs_in_words(variant: Row) -> tuple[str, ...]:
    """Perplexity ratio, share of tokens written, r of gate and surprise, parameters, bytes; empty if not measured."""
    forms = (("drift", "{:.4f}"), ("write_frac", "{:.2%}"), ("gate_surprise_r", "{:+.2f}"),
             ("sidecar_parameters", "{:,}"), ("state_bytes", "{:,}"))  # fmt: skip
    return tuple("" if variant[key] is None else form.format(variant[key]) for key, form in forms)


def page(result: Mapping[str, Any], figure: Figure) -> str:
    """The whole ablation as one HTML file, without script and with nothing to fetch."""
    run, created = escape(result.get("run") or "ablation"), escape(result.get("created") or "")
    parts = [
        heading("Cortex ablation", run, created),
        "<h2>What each variant takes away, and what it costs</h2>",
        _costs(result["variants"]),
        "<h2>How far each variant reaches</h2>",
        svg(figure, "Accuracy by gap, a line per variant"),
        *_accuracies(result["rows"]),
        _READING,
    ]
    parts += [folded("Overrides of each variant", {v["variant"]: v["overrides"] for v in result["variants"]})]
    for name, key in (("Configuration of the reference, resolved", "config"), ("Versions", "versions")):
        parts += [folded(name, result[key])] if result.get(key) else []
    return framed(run, parts)


def _costs(variants: Sequence[Row]) -> str:
    heads = ("variant", "takes away", "perplexity, on / off", "95 % interval", "tokens written", "gate and surprise, r",
             "parameters", "state, bytes")  # fmt: skip
    lines = []
    for variant in variants:
        low, high = variant["drift_low"], variant["drift_high"]
        span = f"{low:.4f} to {high:.4f}" if low is not None and high is not None else ""
        drift, *others = costs_in_words(variant)
        cells = "".join(f"<td>{cell}" for cell in (drift, span, *others))
        lines.append(f"<tr><th scope=row>{variant['variant']}<td class=range>{escape(variant['without'])}{cells}")
    return _table("", heads, lines)


def _accuracies(rows: Sequence[Row]) -> list[str]:
    """A table per task and filler: variants down, gaps across; below each accuracy the difference to the reference."""
    tables = []
    for task, filler in dict.fromkeys((row["task"], row["filler"]) for row in rows):
        part = [row for row in rows if (row["task"], row["filler"]) == (task, filler)]
        gaps = sorted({row["gap_tokens"] for row in part})
        lines = []
        for name in dict.fromkeys(row["variant"] for row in part):
            at = {row["gap_tokens"]: row for row in part if row["variant"] == name}
            cells = "".join(f"<td{' class=on' if name == REFERENCE else ''}>{_cell(at[gap])}" for gap in gaps)
            lines.append(f"<tr><th scope=row>{name}{cells}")
        counts = ", ".join(f"{n:,}" for n in sorted({row["n"] for row in part}))
        caption = f"{escape(task)}, filler: {escape(filler)}; {counts} examples per gap"
        tables.append(_table(caption, ("variant", *(f"{gap:,}" if gap else "in window" for gap in gaps)), lines))
    return tables


def _cell(row: Row) -> str:
    value, span = gained(row)
    shown = percent(row["accuracy"], 1)
    return f"{shown}<br><small>{value} ({span})</small>" if value else shown


def _table(caption: str, heads: Sequence[str], lines: Sequence[str]) -> str:
    names = "".join(f"<th scope=col>{head}" for head in heads)
    above = f"<caption>{caption}</caption>" if caption else ""
    return f"<div class=scroll><table>{above}<thead><tr>{names}<tbody>{''.join(lines)}</table></div>"


_READING = f"""<h2>How to read this</h2>
<ul>
<li>All variants are trained with the same seed on the same data and asked the same questions. mean_gate and
shuffled_surprise are not trained: they are the trained memory of {REFERENCE}, asked with its controller disturbed.
<li>Small: the accuracy minus that of {REFERENCE} in points, with the 95 % interval of a difference between answers to
the same questions (Newcombe, paired). Where it excludes 0, luck with the examples alone does not explain it.
One seed: luck with the training is not in it.
<li>The gate's correlation with surprise is reported, not chased: surprise is one of its inputs. What it is worth is
the difference of mean_gate and shuffled_surprise.
</ul>"""
