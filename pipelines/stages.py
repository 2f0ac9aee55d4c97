"""`cortex train`: whichever stage a recipe is of."""

from __future__ import annotations

from pipelines.config import RunConfig


def run(config: RunConfig) -> int:
    """Run the stage to its end. Returns the exit code."""
    if config.stage == "codes":
        from pipelines import codes

        return codes.run(config)
    if config.stage == "sleep":
        from pipelines import sleep

        return sleep.run(config)
    from pipelines import train

    return train.run(config)
