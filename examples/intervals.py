"""Means with their 95 % intervals, as the pages show them."""

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t


def interval(values: Sequence[float]) -> str:
    """Mean and half of its interval by Student's t; the mean alone of a single value, nothing of none."""
    if len(values) < 2:
        return f"{statistics.fmean(values):+.3f}" if values else ""
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+.3f} ± {half:.3f}"
