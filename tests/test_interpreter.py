"""The interpreter as ``conftest.py`` leaves it."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled here")


@triton.jit
def combine_kernel(out_ptr, x_ptr, OPERATION: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 2))
    if OPERATION == "add":
        x = x + x
    elif OPERATION == "sub":
        x = -2 - x
    else:
        x = x * x
    tl.store(out_ptr + tl.arange(0, 2), x)


@pytest.mark.parametrize(("operation", "largest"), [("add", 2**30 - 1), ("sub", 2**31 - 2), ("mul", 46340)])
def test_an_overflow_of_integers_is_refused(operation: str, largest: int) -> None:
    x = torch.tensor([0, largest], dtype=torch.int32)
    out = torch.zeros_like(x)
    combine_kernel[(1,)](out, x, operation)
    assert out[1] == {"add": 2 * largest, "sub": -2 - largest, "mul": largest**2}[operation]
    with pytest.raises(Exception, match=f"{operation} of int32 overflows"):
        combine_kernel[(1,)](out, x + 1, operation)


@triton.jit
def scaled_kernel(out_ptr, scale):
    tl.store(out_ptr, scale)


def test_float_arguments_are_float32() -> None:
    out = torch.zeros((), dtype=torch.float64)
    scaled_kernel[(1,)](out, 0.1)
    assert out == torch.tensor(0.1, dtype=torch.float32).double()
