"""Cortex: a memory that lasts, for frozen language models.

The names that users import. They are loaded on first use: `cortex_core.config` must not cost an import of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cortex_core.config import FastWeightsConfig

if TYPE_CHECKING:
    from cortex_core.backbone.model import Cortex
    from cortex_core.backbone.session import Session

__all__ = ["Cortex", "FastWeightsConfig", "Session"]


def __getattr__(name: str) -> Any:
    if name == "Cortex":
        from cortex_core.backbone.model import Cortex

        return Cortex
    if name == "Session":
        from cortex_core.backbone.session import Session

        return Session
    raise AttributeError(f"module 'cortex_core' has no attribute {name!r}")
