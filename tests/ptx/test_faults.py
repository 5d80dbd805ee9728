"""Errors planted in small kernels are found, and the same kernels without them pass."""

import re
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.ptx import driver
from tests.ptx.driver import ARCHS, virtual_gpu
from tests.ptx.errors import MemoryFault, PtxError, Race, Uninitialised

pytestmark = pytest.mark.parametrize("arch", ARCHS)


@triton.jit
def copy_kernel(x, y, n, SHIFT: tl.constexpr, MASKED: tl.constexpr, CLAIM: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of = at + SHIFT
    if CLAIM:
        of = tl.multiple_of(of, BLOCK)
    if MASKED:
        v = tl.load(x + of, mask=at < n, other=0.0)
    else:
        v = tl.load(x + of)
    tl.store(y + at, v, mask=at < n)


def copied(x: Tensor, shift: int = 0, masked: bool = True, claim: bool = False) -> Tensor:
    y = torch.zeros(len(x))
    copy_kernel[(-(-len(x) // 256),)](x, y, len(x), shift, masked, claim, 256)
    return y


def test_out_of_bounds_index(arch: int) -> None:
    x = torch.randn(1000)
    with virtual_gpu(arch):
        assert torch.equal(copied(x), x)
        with pytest.raises(MemoryFault, match=r"test_faults.py:\d+.*\n.*read of .* is outside: 0 bytes after the end of x"):
            copied(x, shift=1)
        with pytest.raises(MemoryFault, match=r"is outside: .* bytes before"):
            copied(x, shift=-1)


def test_a_slice_has_bounds_inside_of_its_storage(arch: int) -> None:
    x = torch.randn(1000)
    with virtual_gpu(arch):
        for part in (x[:500], x[100:600]):
            assert torch.equal(copied(part), part)
            with pytest.raises(MemoryFault, match="is outside"):
                copied(part, shift=1)


def test_missing_mask(arch: int) -> None:
    with virtual_gpu(arch):
        copied(torch.randn(512), masked=False)  # full blocks need none
        with pytest.raises(MemoryFault, match="after the end of x"):
            copied(torch.randn(500), masked=False)


def test_misalignment(arch: int) -> None:
    x, y = torch.randn(1280), torch.zeros(1024)
    with virtual_gpu(arch):
        assert torch.equal(copied(x[1:]), x[1:])  # known to be odd: narrow loads
        copy_kernel[(4,)](x, y, 1024, 0, False, True, 256)
        assert torch.equal(x[:1024], y)
        with pytest.raises(MemoryFault, match=r"read of (8|16) bytes at 0x.* is misaligned"):
            copy_kernel[(4,)](x, y, 1024, 1, False, True, 256)


def test_read_of_what_was_never_written(arch: int) -> None:
    with virtual_gpu(arch) as gpu, gpu.initcheck():
        x = torch.empty(1000)
        x[:999] = 1
        with pytest.raises(Uninitialised, match="never written"):
            copied(x)
        x[999] = 1
        y = torch.empty_like(x)
        copy_kernel[(4,)](x, y, 1000, 0, True, False, 256)
        assert torch.equal(copied(y), y)  # a kernel has written it
        assert copied(torch.empty(1000).fill_(torch.nan)).isnan().all()  # the host has


@triton.jit
def increment_kernel(x, STEP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at) + 1.0)


@triton.jit
def store_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.program_id(0))


def test_race_between_programs(arch: int) -> None:
    with virtual_gpu(arch):
        increment_kernel[(4,)](torch.zeros(1024), 256, 256)
        with pytest.raises(Race, match="of x races with another thread"):
            increment_kernel[(4,)](torch.zeros(1024), 255, 256)
        store_kernel[(1,)](torch.zeros(256), 256)
        with pytest.raises(Race, match="write of x races with another thread"):
            store_kernel[(2,)](torch.zeros(256), 256)


@triton.jit
def reverse_kernel(x, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + BLOCK + at, tl.load(x + BLOCK - 1 - at))


def test_race_of_global_memory_between_threads(arch: int) -> None:
    with virtual_gpu(arch):
        x = torch.zeros(512)
        reverse_kernel[(1,)](x, True, 256)
        assert torch.equal(x[256:], x[:256].flip(0))
        with pytest.raises(Race, match="read of x races with another thread"):
            reverse_kernel[(1,)](x, False, 256)


@triton.jit
def product_kernel(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=3):
        k = k0 + tl.arange(0, BK)
        total = tl.dot(tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :]), total)
    tl.store(c + m[:, None] * N + n[None, :], total)


def product(rows: int) -> None:
    a, b, c = torch.randn(rows, 160).bfloat16(), torch.randn(160, 64).bfloat16(), torch.zeros(rows, 64)
    product_kernel[(1,)](a, b, c, 160, rows, 64, 32)
    torch.testing.assert_close(c, (a.double() @ b.double()).float(), rtol=1e-4, atol=1e-4)


def with_ptx(change: Callable[[str], str]) -> mock._patch:
    """Kernels run as ``change`` leaves their PTX: Triton itself forgets no barrier."""
    program = driver.Program
    return mock.patch.multiple(driver, Program=lambda ptx, *args: program(change(ptx), *args), _programs={})


@pytest.mark.parametrize(
    ("what", "rows", "message"),
    [
        ("bar.sync", 16, "without a barrier"),
        ("cp.async.wait_group", 16, "read before an asynchronous copy was waited for"),
        ("wgmma.wait_group", 64, "write over an operand of a wgmma that was not waited for"),
    ],
)
def test_race_of_shared_memory(arch: int, what: str, rows: int, message: str) -> None:
    if what.startswith("wgmma") and arch < 90:
        pytest.skip("no such instruction")
    with virtual_gpu(arch):
        product(rows)
        with with_ptx(lambda ptx: re.sub(rf"^.*{what}.*$", "", ptx, flags=re.M)), pytest.raises(Race, match=message):
            product(rows)


def test_an_unknown_instruction_is_named(arch: int) -> None:
    with virtual_gpu(arch), with_ptx(lambda ptx: ptx.replace("mov.u32", "mov.odd.u32").replace("ld.global", "tex.1d")):
        with pytest.raises(NotImplementedError, match=r"copy_kernel, PTX line \d+: .*(odd|tex)"):
            copied(torch.randn(256))


def test_threads_must_meet_at_one_barrier(arch: int) -> None:
    def guarded(ptx: str) -> str:
        """Half of the threads wait at one barrier instead of the first, the others at another."""
        head, tail = re.split(r"bar(?:rier)?\.sync\s+0;", ptx, maxsplit=1)
        here, there = "bar.sync 0; bra $on;", "$there:\nbar.sync 1;"
        return f"{head}mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 64; @%p0 bra $there; {here}\n{there}\n$on:\n{tail}"

    with virtual_gpu(arch), with_ptx(guarded), pytest.raises(PtxError, match="wait at different barriers"):
        product(16)
