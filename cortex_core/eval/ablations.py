"""Variants of the memory, each with one thing taken away or replaced: what each part is worth is the difference.

A variant is data, a set of dotted overrides like a sample of a search space, and no code. It stands here and not in a
TOML file beside the recipes: it speaks of settings of the core alone, holds for every recipe, and in Python the test
that validates it, the help and the table read the same value.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

REFERENCE = "cortex"
"""The variant that all others are compared with."""


class Variant(NamedTuple):
    """One row of an ablation."""

    without: str
    """What is taken away or replaced, in a few words."""
    overrides: Mapping[str, object] = MappingProxyType({})
    """Dotted settings over those of the recipe."""
    made_by: Literal["training", "evaluation", "nothing"] = "training"
    """`training`: a run of its own. `evaluation`: the reference's trained sidecars, asked again under the overrides.
    `nothing`: the bare model, whose answers every evaluation holds beside those of the memory."""


_UNGATED = {"fast_weights.gate": "none", "training.sparsity_weight": 0.0}
"""Without the write penalty as well, or it would make a gate of the controller."""
_HEBBIAN = {
    "fast_weights.rule": "hebbian",
    "fast_weights.decay": 0.98,
    "fast_weights.time_scales": [1.0],
    "fast_weights.learn_decay": False,
    "fast_weights.write_strength": 0.02,
    "fast_weights.rank_budget": None,
}
"""The reference's decay, and with it the largest round step that stays below -ln(decay) = 0.0202, the bound without
the anti-Hebbian term: so the two Hebbian variants differ in that term alone. Reads are scaled back by the step."""

VARIANTS: Mapping[str, Variant] = MappingProxyType({
    REFERENCE: Variant("nothing: it is the recipe as it stands"),
    "baseline": Variant("the memory: the bare model", made_by="nothing"),
    "fast_off": Variant("every write", {"fast_weights.write_strength": 0.0}),
    "no_decay": Variant("forgetting", {"fast_weights.decay": 1.0, "fast_weights.learn_decay": False}),
    "decay_per_token": Variant("decay tied to the write: every token is a tick", {"fast_weights.decay_per": "token"}),
    "soft_gate": Variant("the dead zone: no write is quite 0", {"fast_weights.gate": "soft"}),
    "no_gate": Variant("the write gate: every token is written", _UNGATED),
    "no_controller": Variant("surprise and the other signals", {"fast_weights.controller": False}),
    "fixed_strength": Variant(
        "gate and controller: every token is written equally", _UNGATED | {"fast_weights.controller": False}
    ),
    "mean_gate": Variant(
        "the controller's choice of tokens: its gate at its mean", {"fast_weights.controller_test": "mean_gate"},
        made_by="evaluation",
    ),
    "shuffled_surprise": Variant(
        "true surprise: the controller is told that of other tokens",
        {"fast_weights.controller_test": "shuffled_surprise"}, made_by="evaluation",
    ),
    "hebbian": Variant(
        "error correction: Hebbian writes, decay gated by the write",
        _HEBBIAN | {"fast_weights.anti_hebbian_rate": 0.01},
    ),
    "no_anti_hebbian": Variant(
        "error correction and the anti-Hebbian term", _HEBBIAN | {"fast_weights.anti_hebbian_rate": 0.0}
    ),
    "source_rule": Variant(
        "the rule itself: the published one and its constants",
        _UNGATED | {
            "fast_weights.rule": "source",
            "fast_weights.decay": 0.95,
            "fast_weights.decay_per": "token",
            "fast_weights.time_scales": [1.0],
            "fast_weights.learn_decay": False,
            "fast_weights.write_strength": 0.05,
            "fast_weights.anti_hebbian_rate": 0.01,
            "fast_weights.controller": True,
            "fast_weights.rank_budget": None,
        },
    ),
})  # fmt: skip
"""By name, in the order in which they are run and shown."""
