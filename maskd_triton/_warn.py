"""Warnings that point at the user's line."""

import sys
import warnings


def warn(message: str) -> None:
    """A UserWarning at the first frame outside of this package."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
