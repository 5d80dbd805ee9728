"""What every test runs under: one thread, the interpreter where there is no GPU, and uninitialised memory that shows.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported.
"""

import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a thread for each of pytest-xdist's processes, and for those that tests start

import numpy as np
import torch
from helpers import require_private
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

_TARGETS = [("eager", "cpu"), *([("eager", "cuda"), ("triton", "cuda")] if HAS_GPU else [("triton", "cpu")])]


@pytest.fixture(params=_TARGETS, ids=lambda target: "-".join(target))
def target(request: pytest.FixtureRequest) -> tuple[str, str]:
    """An implementation and the device it runs on: with a GPU the same tests run on CUDA tensors."""
    if request.param[0] == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched."""
    pytest.importorskip("triton", reason="triton is not installed")
    from maskd_triton.kernels import launch

    names: list[str] = []
    run = launch.run

    def counting(kernel: Any, *args: Any, **kwargs: Any) -> None:
        names.append(kernel.fn.__name__)
        run(kernel, *args, **kwargs)

    monkeypatch.setattr(launch, "run", counting)
    return names


@pytest.fixture(autouse=True, scope="session")
def interpreter_as_a_gpu() -> Iterator[None]:
    """A kernel's float arguments are float32; the interpreter would hand them over in float64. And what it does besides a
    kernel's own work would take most of the time: it would patch triton.language for every call of one jit function by another,
    not once a launch, and look for overflows of integers by nine interpreted operations, not by numpy's."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    import triton.runtime.interpreter as interpreter

    require_private(interpreter, "_implicit_cvt", "_patch_lang", "GridExecutor", "InterpretedFunction")
    require_private(interpreter.GridExecutor, "__call__")
    require_private(interpreter.InterpretedFunction, "__call__", "rewrite")
    require_private(interpreter.TritonSemantic, "binary_op_sanitize_overflow_impl")
    convert = interpreter._implicit_cvt

    def rounded(argument: Any) -> Any:
        return ctypes.c_float(argument).value if type(argument) is float else convert(argument)

    launch, patched = interpreter.GridExecutor.__call__, set()

    def begin(executor: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(executor, *args, **kwargs)

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        module = function.fn.__module__
        if module not in patched:
            interpreter._patch_lang(function.fn)
            patched.add(module)
        return function.rewrite()(*args, **kwargs)

    def refuse_overflow(_semantic: Any, lhs: Any, rhs: Any, operation: Callable[..., Any]) -> None:
        a, b = lhs.handle.data, rhs.handle.data
        if a.dtype.itemsize < 8:
            exact, limits = _EXACT[operation.__name__](a, b, dtype=np.int64), np.iinfo(a.dtype)
            if exact.min() < limits.min or exact.max() > limits.max:
                raise OverflowError(f"{operation.__name__} of {a.dtype} overflows")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", rounded)
        patch.setattr(interpreter.TritonSemantic, "binary_op_sanitize_overflow_impl", refuse_overflow)
        patch.setattr(interpreter.GridExecutor, "__call__", begin)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """``empty`` means NaN: an element that is read before, or never, written spoils the result instead of hiding."""

    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            out = function(*args, **kwargs)
            if type(out) is Tensor and out.is_floating_point() and out.device.type in ("cpu", "cuda"):
                with torch.no_grad():
                    out.fill_(float("nan"))
            return out

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
