"""Loads and stores of global memory: inside a tensor, aligned, of what was written, and not racing."""

from typing import Any

import numpy as np

from .errors import MemoryFault, Race, Uninitialised
from .lanes import Lanes
from .memory import PAGE, host

EPOCHS = 20  # bits of a stamp that count the barriers of a CTA; the others are the thread


class GlobalMemory(Lanes):
    """What a batch does to global memory; ``epoch`` counts the barriers of every CTA."""

    epoch: np.ndarray

    def load_global(self, k: Any, at: int, width: int, rows: list[Any], address: Any, signed: bool) -> None:
        """``ld.global`` of ``width`` bytes into each of ``rows``."""
        lanes = self.active(k)
        if len(lanes):
            size = width * len(rows)
            index = self.checked(at, lanes, self.at_lanes(address, lanes), size, write=False)
            self.spread(host(size, width)[index], rows, lanes, signed)

    def store_global(self, k: Any, at: int, width: int, values: list[Any], address: Any) -> None:
        """``st.global`` of ``values`` of ``width`` bytes."""
        lanes = self.active(k)
        if len(lanes):
            size = width * len(values)
            index = self.checked(at, lanes, self.at_lanes(address, lanes), size, write=True)
            host(size, width)[index] = self.gathered(values, lanes, width)

    def checked(self, at: int, lanes: np.ndarray, address: np.ndarray, size: int, write: bool) -> np.ndarray:
        """Rows of `memory.host` of accesses that may be made."""
        access = "write" if write else "read"
        index, bad = self.launch.allocations.find(address, size)
        if bad.any():
            i = int(bad.argmax())
            near = self.launch.allocations.near(int(address[i]))
            self.fail(MemoryFault, at, lanes[i], f"{access} of {size} bytes at {int(address[i]):#x} is outside: {near}")
        odd = (address & np.uint64(size - 1)) != 0
        if odd.any():
            i = int(odd.argmax())
            self.fail(MemoryFault, at, lanes[i], f"{access} of {size} bytes at {int(address[i]):#x} is misaligned")
        for low, written in self.launch.uninitialised.items():
            self._initialised(at, lanes, address, size, write, low, written)
        self._race(at, lanes, address, size, write, index)
        return (address - np.uint64(PAGE)) // np.uint64(size)

    def _initialised(
        self, at: int, lanes: np.ndarray, address: np.ndarray, size: int, write: bool, low: int, written: np.ndarray
    ) -> None:
        own = np.flatnonzero((address >= np.uint64(low)) & (address < np.uint64(low + len(written))))
        if not len(own):
            return
        places = (address[own] - np.uint64(low)).astype(np.int64)[:, None] + np.arange(size)
        if write:
            written[places] = True
        elif not (there := written[places].all(1)).all():
            i = own[(~there).argmax()]
            self.fail(Uninitialised, at, lanes[i], f"{size} bytes at {int(address[i]):#x} were never written")

    def _race(self, at: int, lanes: np.ndarray, address: np.ndarray, size: int, write: bool, index: np.ndarray) -> None:
        """Accesses of one place by two threads, at least one of them a write, with no barrier of a CTA between them."""
        stamps = (self.who[lanes] << EPOCHS) | self.epoch[self.cta_of[lanes]]
        bits = self.launch.program.global_granule
        for a in np.unique(index):
            own = index == a
            written, read = self.launch.shadow(int(a))
            base = self.launch.allocations.low[a] >> np.uint64(bits)
            places = ((address[own] >> np.uint64(bits)) - base).astype(np.int64)[:, None] + np.arange(max(1, size >> bits))
            mine = np.broadcast_to(stamps[own, None], places.shape)
            bad = self._clash(written[places], mine)
            if write:
                bad |= self._clash(read[places], mine)
                written[places] = mine
                bad |= written[places] != mine
            else:
                read[places] = mine
            if bad.any():
                lane = lanes[np.flatnonzero(own)[bad.any(1).argmax()]]
                name = self.launch.allocations.names[a]
                self.fail(Race, at, lane, f"{'write' if write else 'read'} of {name} races with another thread")

    def _clash(self, old: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """Whether a stamp is that of another thread, which no barrier orders."""
        thread, own = old >> EPOCHS, mine >> EPOCHS
        unordered = (thread // self.threads != own // self.threads) | (old & (2**EPOCHS - 1) == mine & (2**EPOCHS - 1))
        return (old >= 0) & (thread != own) & unordered
