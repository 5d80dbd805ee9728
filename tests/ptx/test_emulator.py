"""The emulator against torch, numpy and exact fractions, on kernels of its own."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.ptx.arithmetic import fma32, fma64, mul_hi
from tests.ptx.driver import ARCHS, virtual_gpu

pytestmark = pytest.mark.parametrize("arch", ARCHS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0), mask=at < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64])
@pytest.mark.parametrize("offset", [0, 3])
def test_copy(arch: int, dtype: torch.dtype, offset: int) -> None:
    x = (torch.randn(5000 + offset) * 50).to(dtype)[offset:]
    y = torch.zeros_like(x)
    with virtual_gpu(arch):
        copy_kernel[(-(-5000 // 512),)](x, y, 5000, 512)
    assert torch.equal(x, y)


@triton.jit
def sum_kernel(x, y, R: tl.constexpr, C: tl.constexpr, AXIS: tl.constexpr, ACC: tl.constexpr):
    v = tl.load(x + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]).to(ACC)
    tl.store(y + tl.arange(0, C if AXIS == 0 else R), tl.sum(v, axis=AXIS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "axis"), [((16, 128), 0), ((64, 64), 1), ((128, 4), 1), ((4, 512), 0), ((4, 512), 1)])
def test_sum(arch: int, dtype: torch.dtype, shape: tuple[int, int], axis: int) -> None:
    x = torch.randn(shape).to(dtype)
    y = torch.zeros(shape[1 - axis], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with virtual_gpu(arch):
        sum_kernel[(1,)](x, y, *shape, axis, tl.float64 if dtype == torch.float64 else tl.float32)
    torch.testing.assert_close(y, x.double().sum(axis).to(y.dtype), rtol=1e-5, atol=1e-5)


@triton.jit
def dot_kernel(
    a, b, c, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    A_ACROSS: tl.constexpr, B_ACROSS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, n = tl.arange(0, M), tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        a_at = k[None, :] * M + m[:, None] if A_ACROSS else m[:, None] * K + k[None, :]
        b_at = n[None, :] * K + k[:, None] if B_ACROSS else k[:, None] * N + n[None, :]
        x = tl.load(a + a_at, mask=k[None, :] < K, other=0.0)
        total = tl.dot(x, tl.load(b + b_at, mask=k[:, None] < K, other=0.0), total, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], total)


@pytest.mark.parametrize(
    ("dtype", "m", "n", "depth", "stages", "across", "warps"),
    [
        (torch.bfloat16, 8, 32, 16, 1, (False, False), 4),
        (torch.float16, 16, 64, 32, 3, (False, True), 4),
        (torch.bfloat16, 64, 128, 64, 3, (False, False), 4),  # wgmma on sm_90 from here on
        (torch.bfloat16, 64, 64, 64, 2, (True, False), 8),
        (torch.float16, 128, 16, 32, 3, (True, True), 4),
        (torch.float16, 128, 64, 32, 3, (False, True), 8),
        (torch.float32, 16, 32, 16, 1, (False, False), 4),  # ieee: no tensor core
    ],
)
def test_dot(
    arch: int, dtype: torch.dtype, m: int, n: int, depth: int, stages: int, across: tuple[bool, bool], warps: int
) -> None:
    k = 3 * depth + 16
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.full((m, n), float("nan"))
    with virtual_gpu(arch):
        given = [x.t().contiguous() if swap else x for x, swap in zip((a, b), across, strict=True)]
        dot_kernel[(1,)](*given, c, k, m, n, depth, stages, *across, "ieee", num_warps=warps)
    torch.testing.assert_close(c, (a.double() @ b.double()).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m", [16, 64])
def test_dot_tf32(arch: int, m: int) -> None:
    a, b, c = torch.randn(m, 64), torch.randn(64, 32), torch.zeros(m, 32)
    with virtual_gpu(arch):
        dot_kernel[(1,)](a, b, c, 64, m, 32, 32, 2, False, False, "tf32")
    truncated = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b)]
    torch.testing.assert_close(c, (truncated[0] @ truncated[1]).float(), rtol=1e-4, atol=1e-4)


@triton.jit
def transpose_kernel(x, y, R: tl.constexpr, C: tl.constexpr):
    v = tl.load(x + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :])
    tl.store(y + tl.arange(0, C)[:, None] * R + tl.arange(0, R)[None, :], tl.trans(v))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float32, (16, 64)), (torch.bfloat16, (128, 128)), (torch.float64, (64, 32)), (torch.int8, (64, 32))],
)
def test_transpose(arch: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = (torch.randn(shape) * 50).to(dtype)
    y = torch.zeros(shape[::-1], dtype=dtype)
    with virtual_gpu(arch):
        transpose_kernel[(1,)](x, y, *shape)
    assert torch.equal(y, x.t())


@triton.jit
def loop_kernel(x, y, n, rows, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(0, row * 3 + 1, num_stages=3):
        total += tl.load(x + (i % rows) * n + at, mask=at < n, other=0.0)
    tl.store(y + row * n + at, total, mask=at < n)


@pytest.mark.parametrize("wide", [False, True])
def test_loops_of_different_length(arch: int, wide: bool) -> None:
    x, y = torch.randn(7, 100), torch.zeros(40, 100)
    with virtual_gpu(arch):
        loop_kernel[(40,)](x, y, 100, 7, wide, 128)
    want = torch.stack([x[torch.arange(3 * r + 1) % 7].double().sum(0) for r in range(40)])
    torch.testing.assert_close(y, want.float(), rtol=1e-5, atol=1e-5)


@triton.jit
def math_kernel(x, y, z, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    a, b, c = tl.load(x + at, mask=mask, other=1), tl.load(y + at, mask=mask, other=1), tl.load(z + at, mask=mask, other=1)
    tl.store(out + at, a // b, mask=mask)
    tl.store(out + n + at, a % b, mask=mask)
    tl.store(out + 2 * n + at, (a >> 3) ^ (b << 2) | (a & b), mask=mask)
    tl.store(out + 3 * n + at, (a // 7) + (a % 11), mask=mask)
    tl.store(out + 4 * n + at, tl.floor(c).to(tl.int32) + (c * 2.5).to(tl.int32), mask=mask)
    tl.store(out + 5 * n + at, tl.maximum(a, b) - tl.minimum(a, b) + tl.abs(a), mask=mask)
    tl.store(out + 6 * n + at, tl.where(c > 0, tl.exp(c), tl.sqrt(-c)).to(tl.int32), mask=mask)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_math(arch: int, dtype: torch.dtype) -> None:
    n = 3000
    a = torch.randint(-(2**30), 2**30, (n,)).to(dtype)
    b = torch.randint(1, 1000, (n,)).to(dtype) * torch.where(torch.rand(n) < 0.5, -1, 1).to(dtype)
    c = torch.randn(n) * 4
    out = torch.zeros(7, n, dtype=dtype)
    with virtual_gpu(arch):
        math_kernel[(-(-n // 256),)](a, b, c, out, n, 256)

    def quotient(u: Tensor, v: Tensor | int) -> Tensor:
        return torch.div(u, v, rounding_mode="trunc")

    want = [quotient(a, b), torch.fmod(a, b), (a >> 3) ^ (b << 2) | (a & b), quotient(a, 7) + torch.fmod(a, 11)]
    want += [c.floor().int() + (c * 2.5).int(), torch.maximum(a, b) - torch.minimum(a, b) + a.abs()]
    for i, w in enumerate(want):
        assert torch.equal(out[i], w.to(dtype)), i
    off = (out[6] - torch.where(c > 0, c.exp(), (-c).sqrt()).to(dtype)).abs()
    assert off.max() <= 1  # exp is another function of float32 than torch's
    assert (off != 0).sum() <= 3


@triton.jit
def tuple_kernel(xs, ns, y, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    level = tl.program_id(0)
    x, n = xs[0], ns[0]
    for i in tl.static_range(1, LEVELS):
        x, n = tl.where(level == i, xs[i], x), tl.where(level == i, ns[i], n)
    at = tl.arange(0, BLOCK)
    tl.store(y + level * BLOCK + at, tl.load(x + at, mask=at < n, other=-1.0))


def test_tuples(arch: int) -> None:
    xs = [torch.randn(n) for n in (100, 33, 128)]
    y = torch.zeros(3, 128)
    with virtual_gpu(arch):
        tuple_kernel[(3,)](tuple(xs), (100, 33, 128), y, 3, 128)
    for i, x in enumerate(xs):
        assert torch.equal(y[i, : len(x)], x)
        assert (y[i, len(x) :] == -1).all()


@triton.jit
def scan_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(x + at)
    tl.store(y + at, tl.cumsum(v, 0))
    tl.store(y + BLOCK + at, tl.flip(v, 0))
    tl.store(y + 2 * BLOCK + tl.arange(0, 1), tl.argmax(v, 0)[None].to(tl.float32))


def test_scan(arch: int) -> None:
    x, y = torch.randn(256), torch.zeros(3, 256)
    with virtual_gpu(arch):
        scan_kernel[(1,)](x, y, 256)
    torch.testing.assert_close(y[0], x.cumsum(0), rtol=1e-4, atol=1e-4)
    assert torch.equal(y[1], x.flip(0))
    assert y[2, 0] == x.argmax()


def test_arithmetic_is_exactly_rounded(arch: int) -> None:
    rng = np.random.default_rng(arch)
    a, b, c = (rng.standard_normal(2000) for _ in range(3))
    c[:1000] = -a[:1000] * b[:1000]  # cancels but for the rounding
    want = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert fma64(a, b, c).tolist() == want
    for scale in (1, 1e-20, 1e18):  # results that are subnormal, and that overflow
        x, y = (rng.standard_normal(2000).astype(np.float32) * np.float32(scale) for _ in range(2))
        with np.errstate(all="ignore"):
            z = (rng.standard_normal(2000) * scale**2 * 10.0 ** rng.integers(-9, 9, 2000)).astype(np.float32)
            got = fma32(x, y, z)
        for u, v, w, result in zip(x.tolist(), y.tolist(), z.tolist(), got, strict=True):
            if np.isfinite(w) and np.isfinite(result):
                exact = Fraction(u) * Fraction(v) + Fraction(w)
                near = [result, *(np.nextafter(result, np.float32(s * np.inf)) for s in (1, -1))]
                errors = [abs(Fraction(float(r)) - exact) for r in near if np.isfinite(r)]
                assert errors[0] == min(errors)
    for kind in (np.int64, np.uint64, np.int32, np.uint32):
        info = np.iinfo(kind)
        u, v = (rng.integers(info.min, info.max, 500, dtype=kind, endpoint=True) for _ in range(2))
        assert mul_hi(u, v).tolist() == [int(p) * int(q) >> (8 * u.itemsize) for p, q in zip(u, v, strict=True)]
