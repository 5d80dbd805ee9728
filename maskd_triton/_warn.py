"""Warnings that point at the user's line."""

import sys
import warnings

BETWEEN = (__package__, "torch", "contextlib")  # packages between the user's line and ours


def warn(message: str) -> None:
    """A UserWarning at the line of the user's that led here."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
