"""Executes one PTX kernel over a grid.

CTAs run in batches, all lanes of a batch in lockstep: registers are arrays ``[lanes]``. Where threads diverge, each has its own
program counter and the lowest runs first; where whole CTAs part for long, the batch is split. Threads never run in another
order than that, so an emulated result is one of those a GPU may give; whether it is the only one is what the race checks are
for.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from .compiler import Compiler
from .errors import PtxError
from .memory import Allocations
from .parser import SIZES, Block, Kernel, parse
from .warps import Warps

LANES = 4096  # of a batch
LONG = 40  # instructions: CTAs that skip more than that leave the batch


class Program:
    """A kernel ready to run. ``serialised`` tells whether ptxas waits after every ``wgmma``, whatever the PTX says."""

    def __init__(self, ptx: str, serialised: Callable[[], bool] = lambda: False) -> None:
        self.kernel: Kernel = parse(ptx)
        self.serialised = functools.cache(serialised)
        self.granule, self.global_granule = self._granule("shared"), self._granule("global")
        Compiler(self.kernel)

    def _granule(self, space: str) -> int:
        """How many bits of an address no access of a memory tells apart."""
        plain = (i.op for i in self.kernel.instructions if i.op[0] in ("ld", "st"))
        widths = (SIZES[op[-1]] for op in plain if any(x.startswith(space) for x in op))
        return min([4, *widths]).bit_length() - 1


class Launch:
    """One run of a program.

    Args:
        params: the kernel's parameters, packed.
        shared: bytes of shared memory of a CTA.
        allocations: what global memory may be touched.
        uninitialised: for the start of an allocation, which of its bytes were written; loads of others fail.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        params: bytes,
        shared: int,
        allocations: Allocations,
        uninitialised: dict[int, np.ndarray],
    ) -> None:
        self.program, self.kernel, self.grid, self.shared = program, program.kernel, grid, shared
        self.allocations, self.uninitialised = allocations, uninitialised
        if len(params) != self.kernel.param_bytes:
            raise ValueError(f"{self.kernel.name} takes {self.kernel.param_bytes} bytes of parameters, not {len(params)}")
        self.params = np.frombuffer(params + bytes(-len(params) % 8), np.uint8)
        self.stride = -(-max(shared, 16) // 1024) * 1024
        self._shadows: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def run(self) -> None:
        """Run all CTAs."""
        ctas = np.arange(math.prod(self.grid))
        size = max(1, LANES // self.kernel.threads)
        rows = self.kernel.rows
        banks: dict[str, np.ndarray] = {}
        with np.errstate(all="ignore"):
            for start in range(0, len(ctas), size):
                own = ctas[start : start + size]
                lanes = len(own) * self.kernel.threads
                if not banks or banks["p"].shape[1] != lanes:
                    banks = {"p": np.zeros((rows["p"], lanes), bool)}
                    banks |= {b: np.zeros((rows[b], lanes), f"u{int(b) // 8}") for b in ("16", "32", "64")}
                work = [Batch(self, own, banks)]
                while work:
                    work += work.pop().run()

    def where(self, at: int) -> str:
        """An instruction in words."""
        ins = self.kernel.instructions[at]
        return f"{self.kernel.name}, PTX line {ins.line} ({ins.source}): {ins.text}"

    def shadow(self, allocation: int) -> tuple[np.ndarray, np.ndarray]:
        """Who wrote, and who read, each place of an allocation last."""
        if allocation not in self._shadows:
            low, high = int(self.allocations.low[allocation]), int(self.allocations.high[allocation])
            places = (high - 1 >> self.program.global_granule) - (low >> self.program.global_granule) + 1
            self._shadows[allocation] = np.full(places, -1, np.int64), np.full(places, -1, np.int64)
        return self._shadows[allocation]


class Batch(Warps):
    """CTAs that run together: their control flow."""

    pc = 0  # the block that all are at
    pcs: np.ndarray | None = None  # of every lane, where they differ

    def run(self) -> list["Batch"]:
        """Run to the end, or to where CTAs part: what then remains to be run."""
        blocks = self.kernel.blocks
        while True:
            while self.pcs is None:
                if self.pc >= len(blocks):
                    return []
                block = blocks[self.pc]
                block.run(self, True)
                if block.end == "branch":
                    taken = self._taken(block)
                    if taken.all():
                        self.pc = block.target
                    elif not taken.any():
                        self.pc += 1
                    elif parts := self._part(taken, block):
                        return parts
                else:
                    self.epoch += block.end == "bar"
                    self.pc = block.target if block.end in ("jump", "ret") else self.pc + 1
            self._diverged()
            if self.pcs is not None:
                return []

    def _taken(self, block: Block) -> np.ndarray:
        name, negated = block.instructions[-1].guard
        value = self.p[self.kernel.registers[name][1]]
        return ~value if negated else value

    def _part(self, taken: np.ndarray, block: Block) -> list["Batch"]:
        """Two batches if CTAs part as a whole and for long; else every thread gets its own program counter."""
        per_cta = taken.reshape(-1, self.threads)
        every = per_cta.all(1)
        first = [*(b.first for b in self.kernel.blocks), len(self.kernel.instructions)]
        ends = block.target >= len(self.kernel.blocks)
        if (every == per_cta.any(1)).all() and (ends or abs(first[block.target] - first[self.pc + 1]) > LONG):
            parts = [self._select(np.flatnonzero(every)), self._select(np.flatnonzero(~every))]
            parts[0].pc, parts[1].pc = block.target, self.pc + 1
            return parts
        self.pcs = np.where(taken, block.target, self.pc + 1)
        return []

    def _select(self, keep: np.ndarray) -> "Batch":
        """A copy of the CTAs at these places."""
        lanes = (keep[:, None] * self.threads + np.arange(self.threads)).ravel()
        other = Batch(self.launch, self.ctas[keep], {b: x[:, lanes] for b, x in self.banks.items()})
        other.take_shared(self, keep)
        return other

    def _diverged(self) -> None:
        """Lowest program counter first, until all threads are at the same or at the end."""
        blocks, pcs = self.kernel.blocks, self.pcs
        barriers = np.full(self.lanes, -1)  # where lanes wait
        while True:
            ready = (barriers < 0) & (pcs < len(blocks))
            if not ready.any():
                if (barriers < 0).all():
                    return
                self._release(barriers)
                barriers[:] = -1
            else:
                pc = int(pcs[ready].min())
                mask = ready & (pcs == pc)
                block = blocks[pc]
                block.run(self, True if mask.all() else mask)
                if block.end == "branch":
                    pcs[mask] = np.where(self._taken(block), block.target, pc + 1)[mask]
                else:
                    pcs[mask] = block.target if block.end in ("jump", "ret") else pc + 1
                if block.end == "bar":
                    barriers[mask] = pc
                    continue
            if (pcs == pcs[0]).all() and (barriers < 0).all():
                self.pc, self.pcs = int(pcs[0]), None
                return

    def _release(self, barriers: np.ndarray) -> None:
        """All threads of a CTA that have not ended wait, and all for one barrier."""
        waiting = barriers.reshape(-1, self.threads)
        for cta in np.flatnonzero((waiting >= 0).any(1)):
            texts = {self.kernel.blocks[b].instructions[-1].text for b in np.unique(waiting[cta]) if b >= 0}
            if len(texts) > 1:
                raise PtxError(f"{self.kernel.name}: threads of CTA {self.ctas[cta]} wait at different barriers")
            self.epoch[cta] += 1
