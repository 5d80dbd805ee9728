"""Global memory: host addresses, and the allocations that they must lie in."""

from collections.abc import Iterable

import numpy as np

PAGE = 4096


class _Host:
    """All memory of the process as rows of ``size`` bytes; only addresses that were checked are ever touched."""

    def __init__(self, size: int, width: int) -> None:
        shape = ((2**47 - PAGE) // size, size // width)
        self.__array_interface__ = {"shape": shape, "typestr": f"<u{width}", "data": (PAGE, False), "version": 3}


_hosts: dict[tuple[int, int], np.ndarray] = {}


def host(size: int, width: int) -> np.ndarray:
    """All memory from `PAGE` on, ``[rows of size bytes, numbers of width bytes]``."""
    if (size, width) not in _hosts:
        _hosts[size, width] = np.asarray(_Host(size, width))
    return _hosts[size, width]


class Allocations:
    """Sorted intervals of addresses; ``names[i]`` says what interval ``i`` is. Those that overlap become one."""

    def __init__(self, spans: Iterable[tuple[int, int, str]]) -> None:
        low: list[int] = []
        high: list[int] = []
        names: list[dict[str, None]] = []
        for start, end, name in sorted(s for s in spans if s[1] > s[0]):
            if high and start < high[-1]:
                high[-1] = max(end, high[-1])
                names[-1][name] = None
            else:
                low.append(start)
                high.append(end)
                names.append({name: None})
        self.low, self.high = np.array(low, np.uint64), np.array(high, np.uint64)
        self.names = ["|".join(each) for each in names]

    def find(self, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Index of the interval of every access, and which are in none."""
        if not self.names:
            return np.zeros(len(address), np.int64), np.ones(len(address), bool)
        index = np.searchsorted(self.low, address, "right") - 1
        bad = index < 0
        index[bad] = 0
        bad |= address + np.uint64(size) > self.high[index]
        return index, bad

    def near(self, address: int) -> str:
        """Where an address that lies in no interval is."""
        below = int(np.searchsorted(self.low, np.uint64(address), "right")) - 1
        found = []
        if below >= 0:
            found.append(f"{address - int(self.high[below])} bytes after the end of {self.names[below]}")
        if below + 1 < len(self.names):
            found.append(f"{int(self.low[below + 1]) - address} bytes before {self.names[below + 1]}")
        return ", ".join(found) or "there are no allocations"
