"""Which frozen model is used, and how much of a text it sees at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cortex_core.config.settings import Settings

ASSETS = Path(__file__).resolve().parent.parent / "assets"
"""Models that ship with the package, a folder each."""
BUILTIN = "builtin:"
"""What the name of a model that ships begins with."""


class BackboneConfig(Settings):
    """The frozen language model."""

    name: str = "builtin:stdlib-1m"
    """A Hugging Face hub id, a local folder, or `builtin:<folder>` for a model that ships with the package."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); None takes the default branch."""
    dtype: Literal["auto", "fast", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights: `auto` takes the checkpoint's, `fast` bfloat16 where the processor multiplies it
    natively and else float32. The memory itself is always float32."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """The attention that the memory wraps."""
    segment_tokens: Annotated[int, Field(ge=8)] = 256
    """Tokens that attention sees at once; memory carries everything before them. At most the model's own window."""
