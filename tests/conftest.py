"""What every test runs under: one thread, the interpreter where there is no GPU, and uninitialised memory that shows.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported.
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a thread for each of pytest-xdist's processes, and for those that tests start

import torch
from helpers import TARGETS, require_private
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=TARGETS, ids=lambda target: "-".join(target))
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


@pytest.fixture(scope="module")
def large_tiles() -> Iterator[None]:
    """Fewer programs: for large maps the interpreter takes long. Tiles of every size are in `test_numbers`."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from maskd_triton.kernels import tuning

    with contextlib.ExitStack() as stack:
        for kernel in (*tuning.READING, *tuning.WRITING):
            stack.enter_context(tuning.forced(kernel, tuning.Config(64, 256, 128)))
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> Iterator[None]:
    """The interpreter patches triton.language anew for every call of one jit function by another, which takes half of the time
    of all tests. The kernel that calls has done so for our functions; what is patched for Triton's own stays patched."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    require_private(InterpretedFunction, "__call__", "rewrite")
    patching = InterpretedFunction.__call__
    patched: set[str] = set()

    def call(function: Any, *args: Any, **named: Any) -> Any:
        module = function.fn.__module__
        if module.startswith("maskd_triton") or module in patched:
            return function.rewrite()(*args, **named)
        patched.add(module)
        return patching(function, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
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
