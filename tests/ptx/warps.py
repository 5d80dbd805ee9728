"""What lanes do together: shuffles, votes, matrices of 8x8 and tensor cores."""

from typing import Any

import numpy as np

from .arithmetic import from_bf16
from .errors import PtxError
from .shared_memory import SharedMemory

_TF32 = np.uint32(0xFFFFE000)  # the bits of float32 that tensor cores read


class Warps(SharedMemory):
    """Instructions of whole warps, and of warp groups."""

    def warps(self, k: Any, at: int) -> Any:
        """Indices of active warps, whole ones only."""
        if k is True:
            return slice(None)
        per_warp = k.reshape(-1, 32)
        every = per_warp.all(1)
        part = every != per_warp.any(1)
        if part.any():
            self.fail(PtxError, at, int(part.argmax()) * 32, "a part of the warp does not take part")
        return slice(None) if every.all() else np.flatnonzero(every)

    def by_warp(self, x: Any) -> np.ndarray:
        """``[warps, 32]`` of a register."""
        return np.broadcast_to(x, self.lanes).reshape(-1, 32)

    def shuffle(self, k: Any, at: int, mode: str, value: Any, lane: Any, clamp: Any) -> tuple[np.ndarray, np.ndarray]:
        """``shfl.sync``: the values of other lanes, and which were in range."""
        self.warps(k, at)
        value, own = self.by_warp(value), np.arange(32)
        if np.ndim(lane) == np.ndim(clamp) == 0:  # the same for all: nearly always
            b, c = int(lane) & 31, int(clamp)
        else:
            b, c = self.by_warp(lane).astype(np.int64) & 31, self.by_warp(clamp).astype(np.int64)
        segment, limit = (c >> 8) & 31, c & 31
        last, first = (own & segment) | (limit & ~segment), own & segment
        j = {"bfly": own ^ b, "down": own + b, "up": own - b, "idx": first | (b & ~segment)}[mode]
        valid = j >= last if mode == "up" else j <= last
        j = np.where(valid, j, own)
        found = value[:, j] if j.ndim == 1 else np.take_along_axis(value, j, 1)
        return found.ravel(), np.broadcast_to(valid, value.shape).ravel()

    def reduce_warp(self, k: Any, at: int, function: np.ufunc, value: Any) -> np.ndarray:
        """``redux.sync``."""
        self.warps(k, at)
        value = self.by_warp(value)
        return np.repeat(function.reduce(value, axis=1, dtype=value.dtype), 32)

    def vote(self, k: Any, mode: str, value: Any) -> np.ndarray:
        """``vote.sync`` of the active lanes."""
        active, value = self.by_warp(k), self.by_warp(value)
        if mode == "ballot":
            bits = (value & active).astype(np.uint32) << np.arange(32, dtype=np.uint32)
            return np.repeat(bits.sum(1, dtype=np.uint32), 32)
        return np.repeat((value & active).any(1) if mode == "any" else (value | ~active).all(1), 32)

    # matrices of 8x8

    def _matrix_rows(self, k: Any, at: int, count: int, address: Any) -> tuple[Any, np.ndarray, np.ndarray]:
        warps = self.warps(k, at)
        lanes = self.lane.reshape(-1, 32)[warps][:, : 8 * count].ravel()
        return warps, lanes, self.places(at, lanes, self.at_lanes(address, lanes), 16)

    def load_matrix(self, k: Any, at: int, count: int, across: bool, rows: list[Any], address: Any) -> None:
        """``ldmatrix``, transposed where ``across``."""
        warps, lanes, places = self._matrix_rows(k, at, count, address)
        if not len(lanes):
            return
        self.reads(at, places, 16, lanes)
        m = self.memory(16, 2)[places // 16].reshape(-1, count, 8, 8)
        m = np.ascontiguousarray(m.swapaxes(2, 3) if across else m)
        words = m.view(np.uint32).reshape(-1, count, 32)
        for i, row in enumerate(rows):
            row.reshape(-1, 32)[warps] = words[:, i]

    def store_matrix(self, k: Any, at: int, count: int, across: bool, values: list[Any], address: Any) -> None:
        """``stmatrix``, transposed where ``across``."""
        warps, lanes, places = self._matrix_rows(k, at, count, address)
        if not len(lanes):
            return
        m = np.stack([self.by_warp(v)[warps] for v in values], 1)  # [warps, count, 32]
        m = m.view(np.uint16).reshape(-1, count, 8, 8)
        m = m.swapaxes(2, 3) if across else m
        self.writes(at, places, 16, lanes)
        self.stored(at, places, 16, lanes, np.ascontiguousarray(m).reshape(-1, 8))

    # tensor cores: products in float32, which is exact, and sums in float32

    def _fragment(self, values: list[Any], warps: Any, kind: str, row_halves: int) -> np.ndarray:
        """``[warps, 8 * row_halves, k]`` of registers whose order is halves of k, halves of rows."""
        words = np.stack([self.by_warp(v)[warps] for v in values])
        pieces = self._numbers(words.reshape(-1, row_halves, words.shape[1], 8, 4), kind)  # kh rh w g t e
        return pieces.transpose(2, 1, 3, 0, 4, 5).reshape(words.shape[1], 8 * row_halves, -1)

    def _numbers(self, words: np.ndarray, kind: str) -> np.ndarray:
        """The numbers in registers: two a word, or one for tf32."""
        if kind == "tf32":
            return (words & _TF32).view(np.float32)[..., None]
        pair = np.ascontiguousarray(words)[..., None].view(np.uint16)
        return from_bf16(pair) if kind == "bf16" else pair.view(np.float16).astype(np.float32)

    def mma(self, k: Any, at: int, kind: str, out: list[Any], a: list[Any], b: list[Any], c: list[Any]) -> None:
        """``mma.sync``."""
        warps = self.warps(k, at)
        left, right = self._fragment(a, warps, kind, 2), self._fragment(b, warps, kind, 1)
        d = np.matmul(left, right.swapaxes(1, 2)).reshape(-1, 2, 8, 4, 2)  # w rh g t e
        for i, row in enumerate(out):
            old = self.by_warp(c[i])[warps].view(np.float32)
            row.reshape(-1, 32)[warps] = (old + d[:, i // 2, :, :, i % 2].reshape(-1, 32)).view(np.uint32)

    def wgmma(self, k: Any, at: int, n: int, kind: str, out: list[Any], a: Any, b: Any, scale: Any, across: list[int]) -> None:
        """``wgmma.mma_async``, computed at once; what it reads counts as being read until it was waited for."""
        self.warps(k, at)
        per_group = np.broadcast_to(k, self.lanes).reshape(-1, 128)
        groups = np.flatnonzero(per_group.all(1))
        if len(groups) != np.count_nonzero(per_group.any(1)):
            raise PtxError(f"{self.launch.where(at)}: a part of the warp group does not take part")
        if not len(groups):
            return
        warps = (groups[:, None] * 4 + np.arange(4)).ravel()
        right = self._wgmma_operand(at, b, n, kind, across[1], groups)
        if isinstance(a, list):
            left = self._fragment(a, warps, kind, 2).reshape(len(groups), 64, -1)
        else:
            left = self._wgmma_operand(at, a, 64, kind, across[0], groups)
        d = np.matmul(left, right.swapaxes(1, 2)).reshape(len(warps), 2, 8, n // 8, 4, 2)  # w rh g n8 t e
        keep = self.by_warp(scale)[warps]
        for i, row in enumerate(out):
            own = row.reshape(-1, 32)
            old = np.where(keep, own[warps].view(np.float32), np.float32(0))
            own[warps] = (old + d[:, i // 2 % 2, :, i // 4, :, i % 2].reshape(-1, 32)).view(np.uint32)

    def _wgmma_operand(self, at: int, descriptor: Any, rows: int, kind: str, across: int, groups: np.ndarray) -> np.ndarray:
        """``[groups, rows, k]``: an operand in shared memory; ``across``: rows next to each other, else k. Layouts: CUTLASS,
        ``mma_sm90_desc.hpp``."""
        descriptor = np.broadcast_to(descriptor, self.lanes).reshape(-1, 128)[groups].astype(np.int64)
        if (descriptor != descriptor[:, :1]).any():
            raise PtxError(f"{self.launch.where(at)}: the descriptor differs between threads")
        descriptor = descriptor[:, 0]
        width = 4 if kind == "tf32" else 2
        depth, unit = 32 // width, 16 // width
        start, lead, stride = (((descriptor >> s & 0x3FFF) << 4)[:, None, None] for s in (0, 16, 32))
        swizzle = int(descriptor[0] >> 62 & 3)
        if (descriptor >> 62 & 3 != swizzle).any() or (descriptor >> 49 & 7).any():
            raise NotImplementedError(f"{self.launch.where(at)}: descriptor")
        atom = {0: 16, 1: 128, 2: 64, 3: 32}[swizzle]  # bytes of a row of a swizzled atom
        i, j = np.arange(rows)[:, None], np.arange(depth)[None, :]
        if across:
            many = atom // width
            far, near = (stride, lead) if swizzle == 0 else (lead, stride)
            offset = i % many * width + i // many * far + j % 8 * atom + j // 8 * near
        elif swizzle:
            offset = i % 8 * atom + i // 8 * stride + j * width
        else:
            offset = i % 8 * 16 + i // 8 * stride + j % unit * width + j // unit * lead
        address = start + offset
        address = (address ^ ((address >> 3) & {0: 0, 1: 0x70, 2: 0x30, 3: 0x10}[swizzle])).reshape(len(groups), -1)
        lanes = np.repeat(groups * 128, address.shape[1])
        places = self.places(at, lanes, address.ravel(), width)
        self.operand(at, places, lanes)
        data = self.memory(width, width)[places // width, 0].reshape(len(groups), rows, depth)
        if kind == "tf32":
            return (data & _TF32).view(np.float32)
        return from_bf16(data) if kind == "bf16" else data.view(np.float16).astype(np.float32)
