"""Which bytes of global memory every program of a launch reads and writes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .memory import Allocations


@dataclass
class Record:
    """Accesses of one launch.

    Attributes:
        kernel: module and name.
        read: by program and name of the allocation, which of its bytes were read.
        written: the same for writes.
    """

    kernel: str
    read: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)
    written: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)

    def access(
        self, allocations: Allocations, programs: np.ndarray, index: np.ndarray, address: np.ndarray, size: int, write: bool
    ) -> None:
        """Add accesses of ``size`` bytes each at ``address``, of ``programs`` to the allocations ``index``."""
        found = self.written if write else self.read
        for program, a in np.unique(np.stack([programs, index]), axis=1).T.tolist():
            low, length = allocations.low[a], int(allocations.high[a] - allocations.low[a])
            touched = found.setdefault((program, allocations.names[a]), np.zeros(length, bool))
            own = address[(programs == program) & (index == a)]
            touched[(own - low).astype(np.int64)[:, None] + np.arange(size)] = True
