"""Shared memory of CTAs: loads, stores and asynchronous copies, and races between warps.

A place is ``granule`` bytes. Of every place is known at which barrier which warp wrote it and read it last: accesses of two
warps, one of them a write, need a barrier between them. What a copy is to bring is not there before it was waited for; what a
``wgmma`` reads may not be overwritten before that was waited for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import MemoryFault, Race
from .global_memory import GlobalMemory
from .memory import host
from .parser import SHARED_BASE

if TYPE_CHECKING:
    from .emulator import Launch


class Copy(NamedTuple):
    """An asynchronous copy under way: what goes where, and the group of every lane."""

    lanes: np.ndarray
    places: np.ndarray
    data: np.ndarray
    group: np.ndarray

    def take(self, keep: np.ndarray) -> Copy:
        """Those of some lanes."""
        return Copy(*(each[keep] for each in self))


class Operand(NamedTuple):
    """Places that a ``wgmma`` reads and the first warp, of a CTA, that waits for it."""

    granules: np.ndarray
    cta: np.ndarray
    warp: np.ndarray


class SharedMemory(GlobalMemory):
    """What a batch does to shared memory, which starts as NaN."""

    def __init__(self, launch: Launch, ctas: np.ndarray, banks: dict[str, np.ndarray]) -> None:
        super().__init__(launch, ctas, banks)
        n = len(ctas)
        self.smem = np.full(n * launch.stride, 0xFF, np.uint8)
        self.epoch = np.zeros(n, np.int32)
        self.committed = np.zeros(self.lanes, np.int32)
        self.copies: list[Copy] = []
        self.groups: list[list[Operand]] = [[]]  # of wgmma that were not waited for, the last of them open
        granules, warps = len(self.smem) >> launch.program.granule, self.threads // 32
        self.written = np.full(granules, -1, np.int32)  # epoch * 32 + warp
        self.read = np.full((warps, granules), -1, np.int32)  # epoch
        self.in_flight = np.zeros(granules, bool)

    def take_shared(self, of: SharedMemory, keep: np.ndarray) -> None:
        """Go on with the shared memory of some of another batch's CTAs."""
        n, t, stride = len(of.ctas), self.threads, self.launch.stride
        lanes = (keep[:, None] * t + np.arange(t)).ravel()
        self.smem = of.smem.reshape(n, -1)[keep].ravel()
        self.epoch, self.committed = of.epoch[keep], of.committed[lanes]
        self.written = of.written.reshape(n, -1)[keep].ravel()
        self.in_flight = of.in_flight.reshape(n, -1)[keep].ravel()
        self.read = of.read.reshape(len(of.read), n, -1)[:, keep].reshape(len(of.read), -1)
        place = np.full(n, -1)
        place[keep] = np.arange(len(keep))
        for copy in of.copies:
            cta = copy.lanes // t
            own = place[cta] >= 0
            if own.any():
                moved = (place[cta] - cta)[own]
                copy = copy.take(own)
                self.copies.append(copy._replace(lanes=copy.lanes + moved * t, places=copy.places + moved * stride))
        granules = stride >> self.launch.program.granule
        self.groups = []
        for group in of.groups:
            self.groups.append([])
            for operand in group:
                own = place[operand.cta] >= 0
                cta = place[operand.cta[own]]
                moved = operand.granules[own] + (cta - operand.cta[own]) * granules
                self.groups[-1].append(Operand(moved, cta, operand.warp[own]))

    def memory(self, size: int, width: int) -> np.ndarray:
        """All shared memory as rows of ``size`` bytes of numbers of ``width`` bytes."""
        return self.smem.view(f"u{width}").reshape(-1, size // width)

    def places(self, at: int, lanes: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        """Offsets in all shared memory of accesses that are inside and aligned."""
        bad = (address < SHARED_BASE) | (address + size > SHARED_BASE + self.launch.shared) | (address & (size - 1) != 0)
        if bad.any():
            i = int(bad.argmax())
            what = f"{size} bytes of shared memory at {int(address[i]) - SHARED_BASE} of {self.launch.shared}"
            self.fail(MemoryFault, at, lanes[i], f"out of bounds or misaligned: {what}")
        return self.base_of[lanes] + address

    def load_shared(self, k: Any, at: int, width: int, rows: list[Any], address: Any, signed: bool) -> None:
        """``ld.shared`` of ``width`` bytes into each of ``rows``."""
        lanes = self.active(k)
        if len(lanes):
            size = width * len(rows)
            places = self.places(at, lanes, self.at_lanes(address, lanes), size)
            self.reads(at, places, size, lanes)
            self.spread(self.memory(size, width)[places // size], rows, lanes, signed)

    def store_shared(self, k: Any, at: int, width: int, values: list[Any], address: Any) -> None:
        """``st.shared`` of ``values`` of ``width`` bytes."""
        lanes = self.active(k)
        if len(lanes):
            size = width * len(values)
            places = self.places(at, lanes, self.at_lanes(address, lanes), size)
            self.writes(at, places, size, lanes)
            self.stored(at, places, size, lanes, self.gathered(values, lanes, width))

    # races

    def granules(self, places: np.ndarray, size: int, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The granules of accesses, warps and barriers of each."""
        bits = self.launch.program.granule
        n = max(1, size >> bits)
        g, warp, epoch = places >> bits, self.warp_of[lanes], self.epoch[self.cta_of[lanes]]
        if n > 1:
            g = (g[:, None] + np.arange(n)).ravel()
            warp, epoch = np.repeat(warp, n), np.repeat(epoch, n)
        return g, warp, epoch

    def _raced(self, at: int, what: str, bad: np.ndarray, g: np.ndarray, lanes: np.ndarray) -> None:
        i = int(bad.argmax())
        lane = lanes[i * len(lanes) // len(g)]
        last = self.written[g[i]]
        place = (int(g[i]) << self.launch.program.granule) % self.launch.stride
        others = f"last written by warp {last & 31} at barrier {last >> 5}" if last >= 0 else "not written"
        now = f"now at barrier {self.epoch[lane // self.threads]}"
        self.fail(Race, at, lane, f"{what} of shared byte {place} ({others}; {now})")

    def reads(self, at: int, places: np.ndarray, size: int, lanes: np.ndarray) -> None:
        """Check reads, and note them."""
        g, warp, epoch = self.granules(places, size, lanes)
        last = self.written[g]
        bad = (last >> 5 == epoch) & (last & 31 != warp)
        if bad.any():
            self._raced(at, "read after write without a barrier", bad, g, lanes)
        flying = self.in_flight[g]
        if flying.any():
            self._raced(at, "read before an asynchronous copy was waited for", flying, g, lanes)
        self.read[warp, g] = epoch

    def writes(self, at: int, places: np.ndarray, size: int, lanes: np.ndarray, copy: bool = False) -> None:
        """Check writes, or asynchronous copies that begin, and note them."""
        g, warp, epoch = self.granules(places, size, lanes)
        last = self.written[g]
        bad = (last >> 5 == epoch) & (last & 31 != warp)
        if bad.any():
            self._raced(at, "write after write without a barrier", bad, g, lanes)
        for other, read in enumerate(self.read):
            bad = (read[g] == epoch) & (warp != other)
            if bad.any():
                self._raced(at, f"write after read by warp {other} without a barrier", bad, g, lanes)
        flying = self.in_flight[g]
        if flying.any():
            self._raced(at, "write over an asynchronous copy", flying, g, lanes)
        for operand in (x for group in self.groups for x in group):
            bad = np.isin(g, operand.granules)
            if bad.any() and not self.launch.program.serialised():
                self._raced(at, "write over an operand of a wgmma that was not waited for", bad, g, lanes)
        self.written[g] = epoch * 32 + warp
        if copy:
            self.in_flight[g] = True

    def stored(self, at: int, places: np.ndarray, size: int, lanes: np.ndarray, data: np.ndarray) -> None:
        """Write, and see that no two lanes write different values to one place: Triton lets several write the same."""
        rows = self.memory(size, data.itemsize)
        rows[places // size] = data
        bad = (rows[places // size] != data).any(1)
        if bad.any():
            self._differing(at, places, size, lanes, data, bad)

    def _differing(self, at: int, places: np.ndarray, size: int, lanes: np.ndarray, data: np.ndarray, bad: np.ndarray) -> None:
        """A race, unless lanes of one warp differ by rounding only: where the compiler contracts a product with one half of a
        butterfly's sum, both halves are right and hardware takes the same one every time."""
        spots, first = np.unique(places, return_inverse=True)
        warp = self.who[lanes] // 32
        lowest, highest = np.full(len(spots), 2**62), np.full(len(spots), -1)
        np.minimum.at(lowest, first, warp)
        np.maximum.at(highest, first, warp)
        one_warp = (lowest == highest)[first[bad]].all()
        close = False
        if size >= 4:
            kind = f"f{max(4, data.itemsize)}"  # stmatrix moves float32 in halves
            stored = self.memory(size, data.itemsize)[places[bad] // size]
            a, b, all_values = (np.ascontiguousarray(x).view(kind) for x in (data[bad], stored, data))
            largest = np.nanmax(np.abs(all_values), initial=0.0)
            close = np.allclose(a, b, rtol=0, atol=64 * np.finfo(a.dtype).eps * largest, equal_nan=True)
        if not (close and one_warp):
            where = "within a warp" if one_warp else "between warps"
            self.fail(Race, at, lanes[int(bad.argmax())], f"two values for one place of shared memory at once, {where}")

    # asynchronous copies

    def async_copy(self, k: Any, at: int, size: int, to: Any, address: Any, given: Any) -> None:
        """``cp.async`` of ``given`` bytes, of ``size`` by default, padded by zeros; it takes effect when it is waited for."""
        lanes = self.active(k)
        if not len(lanes):
            return
        places = self.places(at, lanes, self.at_lanes(to, lanes), size)
        full = np.full(len(lanes), size) if given is None else self.at_lanes(given, lanes)
        own = np.flatnonzero(full)
        if (full[own] != size).any():
            raise NotImplementedError(f"{self.launch.where(at)}: copies of a part")
        width = min(size, 8)
        data = np.zeros((len(lanes), size // width), f"u{width}")
        if len(own):
            data[own] = host(size, width)[self.checked(at, lanes[own], self.at_lanes(address, lanes)[own], size, write=False)]
        self.writes(at, places, size, lanes, copy=True)
        self.copies.append(Copy(lanes, places, data, self.committed[lanes]))

    def async_commit(self, k: Any) -> None:
        """``cp.async.commit_group``."""
        np.add(self.committed, 1, out=self.committed, where=k)

    def async_wait(self, k: Any, still: int) -> None:
        """``cp.async.wait_group``: all but the last ``still`` groups are there."""
        copies, self.copies = self.copies, []
        for copy in copies:
            done = copy.group < self.committed[copy.lanes] - still
            if k is not True:
                done &= k[copy.lanes]
            if not done.all():
                self.copies.append(copy.take(~done))
                copy = copy.take(done)
            if len(copy.lanes):
                size = copy.data.shape[1] * copy.data.itemsize
                self.memory(size, copy.data.itemsize)[copy.places // size] = copy.data
                g, warp, epoch = self.granules(copy.places, size, copy.lanes)
                self.in_flight[g] = False
                self.written[g] = epoch * 32 + warp

    # operands of wgmma

    def operand(self, at: int, places: np.ndarray, lanes: np.ndarray) -> None:
        """A ``wgmma`` begins to read; ``lanes``: the first of its warp group."""
        places, first = np.unique(places >> 2 << 2, return_index=True)
        lanes = lanes[first]
        for warp in range(4):  # each reads all of it
            self.reads(at, places, 4, lanes + 32 * warp)
        g, warp, _ = self.granules(places, 4, lanes)
        self.groups[-1].append(Operand(g, np.repeat(self.cta_of[lanes], len(g) // len(lanes)), warp))

    def wgmma_commit(self) -> None:
        """``wgmma.commit_group``."""
        self.groups.append([])

    def wgmma_wait(self, still: int) -> None:
        """``wgmma.wait_group``: all but the last ``still`` groups are done, until then they were reading."""
        done = max(0, len(self.groups) - 1 - still)
        for operand in (x for group in self.groups[:done] for x in group):
            for warp in range(4):
                self.read[operand.warp + warp, operand.granules] = self.epoch[operand.cta]
        del self.groups[:done]
