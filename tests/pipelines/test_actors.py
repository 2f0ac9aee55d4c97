"""What a mailbox tells of itself, and that Ray's metrics show it."""

from __future__ import annotations

import re
import time
import urllib.request
from typing import Any

import pytest
import ray

from pipelines.actors import Gauges, ask, on_head, send
from pipelines.config import ClusterConfig
from pipelines.mailbox import Mailbox, Mailboxes

NAMES = ("cortex_mailbox_waiting", "cortex_mailbox_posted_total", "cortex_mailbox_dropped_total")


def test_a_mailbox_tells_what_waits_what_came_and_what_was_lost() -> None:
    told: list[tuple[int, int, int]] = []
    mailbox = Mailbox(2, lambda *counts: told.append(counts))
    for _ in range(3):
        mailbox.post({})
    assert told == [(1, 1, 0), (2, 2, 0), (2, 3, 1)]
    mailbox.after(0)
    assert told[-1] == (2, 3, 1), "taken is what the reader says it has"
    mailbox.after(3)
    mailbox.after(1)  # a question that was late
    assert told[-1] == (0, 3, 1)
    mailbox.post({})
    assert told[-1] == (1, 4, 1), "what was pushed out had been taken"


def test_mailboxes_tell_under_their_names() -> None:
    told: list[tuple[str, int]] = []
    mailboxes = Mailboxes(lambda name: lambda waiting, posted, lost: told.append((name, waiting)))
    for name in "aba":
        mailboxes.post(name, {})
    mailboxes.after("a", 1)
    mailboxes.after("absent", 0)
    assert told == [("a", 1), ("b", 1), ("a", 2), ("a", 1)]


def scraped(run: str) -> dict[str, float]:
    """What Ray's endpoint for Prometheus says of a run, by metric."""
    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    mine = [line for line in lines if f'run="{run}"' in line]
    return {found[1]: float(found[2]) for line in mine if (found := re.match(r"ray_(\w+)\{.*\} (\S+)$", line))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "many"])
def test_rays_metrics_show_them(ray_here: ClusterConfig, kind: str) -> None:
    run, before = f"run-{kind}", ()
    if kind == "one":
        mailbox: Any = on_head(Mailbox, 4, Gauges(run))
    else:
        mailbox, before = on_head(Mailboxes, Gauges), (run,)
    for _ in range(6):
        send(mailbox.post, *before, {})
    assert len(ask(mailbox.after, *before, 3, timeout_s=60)) == 3
    expected = {NAMES[0]: 3.0, NAMES[1]: 6.0} | ({NAMES[2]: 2.0} if kind == "one" else {})
    deadline = time.monotonic() + 60
    while (shown := scraped(run)) != expected:
        assert time.monotonic() < deadline, shown
        time.sleep(1.0)
