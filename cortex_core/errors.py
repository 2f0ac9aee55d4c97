"""The three ways a user's input can be wrong. Each message names the value, the bound and the remedy.

All three are `ValueError`s, pickle across Ray actors, and end a command with exit code 2 and one line.
"""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of its bounds, or contradicts another one."""


class DataError(ValueError):
    """A file or folder is missing, empty, truncated, hostile, or not in the format that was promised."""


class IncompatibleError(ValueError):
    """Two things that should fit do not: a backbone that cannot be attached, a session of another model."""


USER_ERRORS = (ConfigError, DataError, IncompatibleError)
"""All three, for `except`."""
FINAL_ERRORS = (*USER_ERRORS, FloatingPointError)
"""What a run would raise again if it were tried again. FloatingPointError: training has diverged."""
