"""How good a judge is, by dreams of which it is known otherwise whether they are good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cortex_core.dreaming.judge import Verdict
from cortex_core.errors import ConfigError
from cortex_core.intervals import wilson


class Share(NamedTuple):
    """A share of n, with its 95 % Wilson interval. Of nothing, nothing is known: None, between 0 and 1."""

    value: float | None
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, count: int, n: int) -> Share:
        """`count` of `n`."""
        if not n:
            return cls(None, 0, 0.0, 1.0)
        found = wilson(count, n)
        return cls(found.value, n, found.low, found.high)


class Quality(NamedTuple):
    """Of a judge, on one sample of dreams."""

    precision: Share
    """Good ones among those that passed."""
    kept: Share
    """Those that passed among all: the yield."""
    false_pass: Share
    """Those that passed among the bad ones: f."""
    miss: Share
    """Those that were rejected among the good ones: m."""
    good: Share
    """Good ones among all: p."""

    @property
    def contamination(self) -> float | None:
        """Share of bad ones in what passes, by `contamination`; None where f, m or p is unknown."""
        rates = (self.false_pass.value, self.good.value, self.miss.value)
        if self.good.value in (0.0, 1.0):  # one of f and m is of nothing, and does not matter
            rates = tuple(0.0 if rate is None else rate for rate in rates)
        if any(rate is None for rate in rates):
            return None
        return contamination(*rates)  # type: ignore[arg-type]

    def row(self) -> dict[str, float | int | None]:
        """All figures by name, for a table."""
        shares = {"yield" if name == "kept" else name: share for name, share in self._asdict().items()}
        parts = {f"{name}_{part}": found for name, share in shares.items() for part, found in share._asdict().items()}
        return parts | {"contamination": self.contamination}


def contamination(false_pass: float, good: float, miss: float) -> float | None:
    """f (1 - p) / (f (1 - p) + (1 - m) p); None where nothing passes. Raises ConfigError for what is no share."""
    for name, share in (("false_pass", false_pass), ("good", good), ("miss", miss)):
        if not 0 <= share <= 1:
            raise ConfigError(f"{name} = {share} must be a share, 0 to 1")
    bad, well = false_pass * (1 - good), (1 - miss) * good
    return bad / (bad + well) if bad + well else None


def measure(verdicts: Sequence[Verdict], labels: Sequence[bool]) -> Quality:
    """Against labels, one per verdict: whether the dream is good. Raises ConfigError for another number of them."""
    if len(verdicts) != len(labels):
        raise ConfigError(f"{len(verdicts)} verdicts and {len(labels)} labels: give one label per verdict, in order")
    cells = [(verdict.passed, bool(label)) for verdict, label in zip(verdicts, labels, strict=True)]
    hits, false, missed = (cells.count(cell) for cell in ((True, True), (True, False), (False, True)))
    good, passed, bad = hits + missed, hits + false, len(cells) - hits - missed
    return Quality(
        precision=Share.of(hits, passed),
        kept=Share.of(passed, len(cells)),
        false_pass=Share.of(false, bad),
        miss=Share.of(missed, good),
        good=Share.of(good, len(cells)),
    )
