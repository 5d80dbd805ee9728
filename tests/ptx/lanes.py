"""The lanes of CTAs that run together: their registers, which of them are active, and how a fault is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .compiler import VIEWS
from .parser import PARAM_BASE, SHARED_BASE

if TYPE_CHECKING:
    from .emulator import Launch


class Lanes:
    """Threads of ``ctas`` as lanes: ``lane // threads`` is the place of a CTA, ``lane % threads`` the thread."""

    def __init__(self, launch: Launch, ctas: np.ndarray, banks: dict[str, np.ndarray]) -> None:
        self.launch, self.kernel, self.threads = launch, launch.kernel, launch.kernel.threads
        self.ctas, self.banks = ctas, banks
        n, t = len(ctas), self.threads
        self.lanes = n * t
        for view in VIEWS:
            bank = banks["p" if view == "p" else view[1:]]
            setattr(self, view, list(bank if view == "p" else bank.view(f"{view[0]}{int(view[1:]) // 8}")))
        self.lane = np.arange(self.lanes)
        thread = np.tile(np.arange(t, dtype=np.uint32), n)
        self.cta_of, self.warp_of = np.repeat(np.arange(n), t), (thread // 32).astype(np.int32)
        self.base_of = self.cta_of * launch.stride - SHARED_BASE
        self.who = np.repeat(ctas.astype(np.int64), t) * t + thread  # of all threads of the launch
        gx, gy, gz = launch.grid
        cta, zero = np.repeat(ctas.astype(np.uint32), t), np.zeros(self.lanes, np.uint32)
        special = {
            **{"tidx": thread, "tidy": zero, "tidz": zero, "laneid": thread % 32, "warpid": thread // 32},
            **{"ntidx": zero + t, "ntidy": zero + 1, "ntidz": zero + 1},
            **{"ctaidx": cta % gx, "ctaidy": cta // gx % gy, "ctaidz": cta // gx // gy},
            **{"nctaidx": zero + gx, "nctaidy": zero + gy, "nctaidz": zero + gz},
        }
        self.special = {k: v.astype(np.uint32) for k, v in special.items()}
        self.param_views = {w: launch.params.view(f"u{w}") for w in (1, 2, 4, 8)}

    def fail(self, kind: type[Exception], at: int, lane: int, message: str) -> None:
        """Raise ``kind`` for the instruction ``at``."""
        raise kind(f"{self.launch.where(at)}\n  CTA {self.ctas[lane // self.threads]}, thread {lane % self.threads}: {message}")

    def active(self, k: Any) -> np.ndarray:
        """Indices of the lanes of a mask."""
        return self.lane if k is True or k.all() else np.flatnonzero(k)

    def at_lanes(self, x: Any, lanes: np.ndarray) -> np.ndarray:
        """The values of ``x``, which may be one for all, at ``lanes``."""
        if np.ndim(x) == 0 or len(x) == 1:
            return np.full(len(lanes), x)
        return x if lanes is self.lane else x[lanes]

    def spread(self, data: np.ndarray, rows: list[Any], lanes: np.ndarray, signed: bool) -> None:
        """Columns of what was loaded into registers, extended by their sign if ``signed``."""
        width = data.itemsize
        where = slice(None) if lanes is self.lane else lanes
        for column, row in zip(data.T, rows, strict=True):
            if row is None:
                continue
            if signed and row.itemsize > width:
                column = column.view(f"i{width}").astype(f"i{row.itemsize}").view(row.dtype)
            row[where] = column

    def gathered(self, values: list[Any], lanes: np.ndarray, width: int) -> np.ndarray:
        """Registers as columns of numbers of ``width`` bytes."""
        return np.stack([self.at_lanes(v, lanes).astype(f"u{width}") for v in values], 1)

    def load_param(self, k: Any, at: int, width: int, address: Any) -> np.ndarray:
        """A parameter at a computed address."""
        offset = np.broadcast_to(address, self.lanes) - PARAM_BASE
        lanes = self.active(k)
        own = offset[lanes]
        bad = (own < 0) | (own + width > self.kernel.param_bytes) | (own % width != 0)
        if bad.any():
            raise IndexError(f"{self.launch.where(at)}: a parameter that there is none of")
        result = np.zeros(self.lanes, f"u{width}")
        result[lanes] = self.param_views[width][own // width]
        return result
