"""What a launch costs: warp instructions, wavefronts of shared memory, bytes asked of global memory.

Counted, not timed: instructions are those of PTX, of which a GPU's assembler makes other ones, fewer or more; caches, latency
and clocks are not modelled.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .memory import Allocations
from .parser import Kernel

BYTES, WARP_INSTRUCTIONS, WAVEFRONTS = 14.5, 4, 1
"""What a multiprocessor of an H100 does in a cycle: bytes of global memory, instructions and shared-memory wavefronts."""


@dataclass
class Counts:
    """Counts of one launch.

    Attributes:
        kernel: module and name.
        warps: of all programs.
        lines: instructions of warps by source line, ``file:line``.
        operations: instructions of warps by opcode.
        asked: bytes that lanes asked of each allocation, by its name.
        sizes: bytes of each allocation that was asked, by its name.
        shared: wavefronts of shared memory by source line and opcode. A wavefront is 128 bytes at most, in one cycle; words of
            one access that lie in the same bank follow each other.
        ideal: the same if no two words shared a bank.
    """

    kernel: str
    warps: int
    lines: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    sizes: dict[str, int] = field(default_factory=dict)
    shared: Counter[str] = field(default_factory=Counter)
    ideal: Counter[str] = field(default_factory=Counter)

    @property
    def instructions(self) -> int:
        """Of all warps."""
        return self.operations.total()

    @property
    def footprint(self) -> int:
        """Bytes of global memory, however often each was asked for."""
        return sum(min(asked, self.sizes[name]) for name, asked in self.asked.items())

    def instruction_time(self, moved: int) -> float:
        """Time to issue all instructions, in units of the time in which an H100 moves ``moved`` bytes from its memory."""
        return self.instructions / WARP_INSTRUCTIONS / (moved / BYTES)

    def shared_time(self, moved: int) -> float:
        """Time of all wavefronts of shared memory, in the same unit."""
        return self.shared.total() / WAVEFRONTS / (moved / BYTES)

    def blocks(self, kernel: Kernel, warps: np.ndarray) -> None:
        """Add the instructions of every basic block, which ``warps`` warps each have run."""
        for block, times in zip(kernel.blocks, warps.tolist(), strict=True):
            if times:
                for instruction in block.instructions:
                    self.operations[instruction.op[0]] += times
                    self.lines[instruction.source] += times

    def global_access(self, allocations: Allocations, index: np.ndarray, size: int) -> None:
        """Add accesses of ``size`` bytes each, to the allocations ``index``."""
        for a, times in zip(*np.unique(index, return_counts=True), strict=True):
            self.asked[allocations.names[a]] += int(times) * size
            self.sizes[allocations.names[a]] = int(allocations.high[a] - allocations.low[a])

    def shared_access(self, kernel: Kernel, at: int, places: np.ndarray, size: int, lanes: np.ndarray) -> None:
        """Add the accesses of ``lanes`` to ``size`` bytes each: a warp is served 128 bytes at a time."""
        words = max(1, size // 4)
        phase = lanes // 32 * 32 + lanes % 32 * max(size, 4) // 128
        word = (places >> 2)[:, None] + np.arange(words)
        distinct = np.unique((np.repeat(phase, words) << 32) | word.ravel())
        banks, times = np.unique(distinct >> 32 << 5 | distinct & 31, return_counts=True)
        _, first = np.unique(banks >> 5, return_index=True)
        self._shared(kernel, at, int(np.maximum.reduceat(times, first).sum()), len(first))

    def operand_access(self, kernel: Kernel, at: int, distinct: int) -> None:
        """Add the ``distinct`` bytes that a ``wgmma`` reads by itself, in the layouts made for it: without conflicts."""
        self._shared(kernel, at, -(-distinct // 128), -(-distinct // 128))

    def _shared(self, kernel: Kernel, at: int, wavefronts: int, ideal: int) -> None:
        instruction = kernel.instructions[at]
        where = f"{instruction.source} {instruction.op[0]}"
        self.shared[where] += wavefronts
        self.ideal[where] += ideal
