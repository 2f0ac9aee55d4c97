"""A sweep as one HTML file, without script and with nothing to fetch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from pipelines.drawing import Row, percent
from pipelines.follow import shown
from pipelines.report_page import folded, framed, heading, svg


def page(result: Mapping[str, Any], lines: Figure, panels: Figure, changes: Figure | None = None) -> str:
    """`result` is what `sweep_table.sweep_result` returns; the figures are those of `sweep_pictures` and
    `schedule_picture`."""
    sweep, created = escape(result["sweep"]), escape(result["created"])
    parts = [
        heading("Cortex sweep", sweep, created),
        f"<p>{escape(result['about'])}</p>",
        "<h2>Every trial</h2>",
        svg(lines, "Every trial as a line across its settings to its validation loss"),
        _trials(result["space"], result["rows"]),
        *([] if changes is None else _schedule(result, changes)),
        "<h2>What each setting does</h2>",
        svg(panels, "Validation loss against each setting"),
        _reading(result),
    ]
    parts += [folded("Ranges", result["space"]), folded("Configuration, resolved", result["config"])]
    return framed(sweep, parts)


def _trials(space: Mapping[str, Any], rows: Sequence[Row]) -> str:
    heads = ("trial", *space, "steps", "validation loss, nats", "recall", "held-out recall", "perplexity, on / off", "")
    names = "".join(f"<th scope=col>{escape(head.rpartition('.')[2])}" for head in heads)
    lines = []
    for place, row in enumerate(rows):
        best = place == 0 and row["state"] == "finished"
        values = [escape(shown(row["sample"].get(name))) for name in space]
        numbers = [
            "" if row[key] is None else form(row[key])
            for key, form in (
                ("step", "{:,}".format), ("loss_nats", "{:.3f}".format), ("recall", lambda x: percent(x, 1)),
                ("held_out_recall", lambda x: percent(x, 1)), ("drift", "{:.4f}".format),
            )
        ]  # fmt: skip
        note = "" if row["state"] == "finished" else row["state"] + (f": {row['reason']}" if row["reason"] else "")
        cells = "".join(f"<td{' class=on' if best else ''}>{cell}" for cell in (*values, *numbers))
        lines.append(f"<tr><th scope=row>{escape(row['trial'])}{cells}<td class=range>{escape(note)}")
    return f"<div class=scroll><table><thead><tr>{names}<tbody>{''.join(lines)}</table></div>"


def _schedule(result: Mapping[str, Any], changes: Figure) -> list[str]:
    """How the best trial's weights came about, and the picture for all."""
    best, lines = result["rows"][0], []
    heads = "".join(
        f"<th scope=col>{escape(name.rpartition('.')[2])}" for name in ("to step", "trial", *result["space"])
    )
    for part in best.get("schedule", []):
        values = [escape(shown(part["sample"].get(name))) for name in result["space"]]
        cells = "".join(f"<td>{cell}" for cell in (escape(part["trial"]), *values))
        lines.append(f"<tr><th scope=row>{part['step']:,}{cells}")
    return [
        "<h2>What the settings became</h2>",
        svg(changes, "Every setting against the step, for each trial"),
        f"<p>The way to the weights of {escape(best['trial'])}, the first in the table:</p>",
        f"<div class=scroll><table><thead><tr>{heads}<tbody>{''.join(lines)}</table></div>",
    ]


def _reading(result: Mapping[str, Any]) -> str:
    asked = result["validation"]
    gaps = " and ".join(f"{gap:,}" for gap in asked["gaps_tokens"])
    common, early = result["common_step"], ""
    if result["stop_early"]:
        early = f"""<li>Trials that did worse than others after as many steps were stopped early (ASHA). Losses of
different steps do not compare: where settings are compared, it is after step {common}, which all have reached."""
    if result["search"] == "pbt":
        early = """<li>At each validation the worst quarter of the trials took over the weights of the best, with
settings near theirs (population-based training). The table and the other pictures show a trial's last settings: its
loss is not theirs alone. What is worth repeating is the schedule."""
    return f"""<h2>How to read this</h2>
<ul>
<li>Trials are compared by their validation loss: how unlikely the right answer was, in nats per token, {gaps} tokens
after the facts, {asked["num_examples"]} examples per task, filler and gap, the same ones for all. Its words are neither
trained on nor part of the evaluation.
<li>Held-out recall comes from the evaluation at a trial's end, on words that no choice was made by: the mean over its
tasks, fillers and gaps. It is what the chosen settings are worth; do not choose by it.
{early}
<li>A trial here is short. Differences that are small beside those between trials with like values say nothing.
</ul>"""
