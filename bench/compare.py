"""Two files of results side by side."""

from collections.abc import Callable
from typing import Any

SLOWER = 1.1  # a median this many times the earlier one is worse, if the quartiles do not overlap either
LARGER = 1.05  # extra memory this many times the earlier
KEY = ("workload", "mode", "contender")
SAME_MACHINE = ("device", "threads")


def report(before: dict[str, Any], after: dict[str, Any], tell: Callable[[str], object]) -> int:
    """Tell every row's change of time and memory; how many got worse. ValueError for results of different machines."""
    for name in SAME_MACHINE:
        if before[name] != after[name]:
            raise ValueError(f"--against: expected results with {name} {after[name]!r}, got {before[name]!r}")
    earlier = {tuple(row[k] for k in KEY): row for row in before["rows"]}
    pairs = [(earlier.pop(tuple(row[k] for k in KEY), None), row) for row in after["rows"]]
    worse = 0
    tell(f"\nagainst {before['commit']} of {before['date'][:10]}")
    for old, new in pairs:
        name = ", ".join(new[k] for k in KEY)
        if old is None:
            tell(f"  {name}: new")
            continue
        slower, larger = new["median_ms"] / old["median_ms"], _ratio(new["peak_extra_bytes"], old["peak_extra_bytes"])
        found = [
            *(["SLOWER"] if slower > SLOWER and new["lower_ms"] > old["upper_ms"] else []),
            *(["LARGER"] if larger > LARGER else []),
        ]
        worse += bool(found)
        tell(" ".join([f"  {name}: time x {slower:.2f}, memory x {larger:.2f}", *found]))
    for key in earlier:
        tell(f"  {', '.join(key)}: not measured any more")
    tell(f"{worse} of {len(pairs)} got worse")
    return worse


def _ratio(new: int, old: int) -> float:
    return 1.0 if new == old else new / max(old, 1)
