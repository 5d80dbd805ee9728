"""A driver for Triton whose device is the emulator: ``with virtual_gpu(90): kernel[grid](cpu_tensors)``.

Everything up to PTX is Triton's own: binder, specialisation, cache, compiler. The binary is the PTX text, kept in a cache of
its own; ptxas does not run.
"""

import contextlib
import inspect
import itertools
import os
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas
from triton.runtime.driver import driver

from .emulator import Launch, Program
from .memory import Allocations

ARCHS = (80, 90)
_SHARED = {80: 166912, 90: 232448}  # bytes that a CTA may have
_FORMATS = {
    **{"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"},
    **{"fp16": "e", "fp32": "f", "fp64": "d"},
}
# A NaN that no calculation gives: the host may write others
_UNWRITTEN = {
    **{torch.float16: (torch.int16, 0x7E5A), torch.bfloat16: (torch.int16, 0x7FDA)},
    **{torch.float32: (torch.int32, 0x7FC0BA5E), torch.float64: (torch.int64, 0x7FF8BA5EBA5EBA5E)},
}
_programs: dict[bytes, Program] = {}


def _loaded(ptx: bytes, arch: int) -> Program:
    if ptx not in _programs:
        _programs[ptx] = Program(ptx.decode(), lambda: "instructions are serialized" in _ptxas(ptx, arch))
    return _programs[ptx]


def _ptxas(ptx: bytes, arch: int) -> str:
    """What ptxas says of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        ptxas = get_ptxas(arch) if inspect.signature(get_ptxas).parameters else get_ptxas()  # Triton 3.5 has one for all
        command = [ptxas.path, "-v", f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}", file.name, "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@dataclass
class Device:
    """A virtual GPU. ``launches`` counts those of every kernel, by module and name: ``learn.mask_kernel``.

    ``_fresh`` holds of every storage that is checked: its bits, those of NaN, and which bytes were written.
    """

    arch: int
    launches: Counter[str] = field(default_factory=Counter)
    _fresh: dict[int, tuple[Tensor, int, np.ndarray]] = field(default_factory=dict)

    @contextlib.contextmanager
    def initcheck(self) -> Iterator[None]:
        """Inside, what torch allocates is NaN, and a kernel may only read what a kernel or the host has written."""

        def marked(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                out = function(*args, **kwargs)
                if type(out) is Tensor and out.is_floating_point() and out.numel():
                    self._mark(out)
                return out

            return call

        with contextlib.ExitStack() as stack:
            for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
                stack.enter_context(mock.patch.object(owner, name, marked(getattr(owner, name))))
            stack.callback(self._fresh.clear)
            yield

    def _mark(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        integer, nan = _UNWRITTEN[x.dtype]
        bits = torch.tensor((), dtype=integer).set_(storage).fill_(nan)
        self._fresh[storage.data_ptr()] = bits, nan, np.zeros(storage.nbytes(), bool)

    def uninitialised(self) -> dict[int, np.ndarray]:
        """Bytes that were written, of every storage that is checked; elements that the host changed among them."""
        for bits, nan, written in self._fresh.values():
            written |= np.repeat((bits != nan).numpy(), bits.element_size())
        return {low: written for low, (_, _, written) in self._fresh.items()}


def _span(x: Tensor) -> tuple[int, int]:
    """Where the elements of a view lie; not its storage, so that a slice's neighbours are out of bounds."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _flat(signature: Any, values: Any, name: str) -> Iterator[tuple[str, Any, str]]:
    """Kernel parameters of nested tuples, without constants."""
    if isinstance(signature, tuple):
        for i, (s, v) in enumerate(zip(signature, values, strict=True)):
            yield from _flat(s, v, f"{name}[{i}]")
    elif signature != "constexpr":
        yield signature, values, name


class _Launcher:
    """Packs arguments and launches, as the C code that Triton would build does."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.signature, self.metadata = src.signature, metadata
        self.name = f"{src.fn.fn.__module__.rpartition('.')[2]}.{src.fn.fn.__name__}"

    def __call__(
        self, x: int, y: int, z: int, _stream: int, ptx: bytes, _packed: Any, about: Any, enter: Any, leave: Any, *args: Any
    ) -> None:
        if enter is not None:
            enter(about)
        device: Device = driver.active.device
        spans: list[tuple[int, int, str]] = []
        packed = b""
        for kind, value, name in itertools.chain.from_iterable(
            _flat(s, v, n) for (n, s), v in zip(self.signature.items(), args, strict=True)
        ):
            if kind[0] == "*":
                form = "Q"
                if isinstance(value, Tensor):
                    spans.append((*_span(value), name))
                    value = value.data_ptr()
            else:
                form = _FORMATS[kind]
            packed += bytes(-len(packed) % struct.calcsize(form)) + struct.pack("<" + form, value or 0)
        packed += bytes(-len(packed) % 8)
        for size in (self.metadata.global_scratch_size, self.metadata.profile_scratch_size):
            if size:
                raise NotImplementedError(f"{self.name}: scratch memory")
            packed += bytes(8)
        program = _loaded(ptx, device.arch)
        Launch(program, (x, y, z), packed, self.metadata.shared, Allocations(spans), device.uninitialised()).run()
        device.launches[self.name] += 1
        if leave is not None:
            leave(about)


class _Utils:
    def __init__(self, arch: int) -> None:
        self.arch = arch

    def load_binary(self, name: str, kernel: bytes, _shared: int, _device: int) -> tuple[str, bytes, int, int, int]:
        return name, kernel, 0, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED[self.arch], "multiprocessor_count": 132, "warpSize": 32}


class _Driver:
    """What Triton asks of the active driver."""

    launcher_cls = _Launcher

    def __init__(self, device: Device) -> None:
        self.device, self.utils = device, _Utils(device.arch)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.device.arch, 32)

    def get_current_device(self) -> int:
        return self.device.arch  # kernels keep a cache for each

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _ptx_as_binary(_backend: Any, src: str, _metadata: Any, _options: Any, _capability: int) -> bytes:
    return src.encode()


@contextlib.contextmanager
def virtual_gpu(arch: int = 90) -> Iterator[Device]:
    """Inside, Triton kernels compile for ``sm_<arch>`` and run in the emulator on CPU tensors, every access checked."""
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled")
    device = Device(arch)
    with contextlib.ExitStack() as stack:
        before = driver.__dict__.copy()  # to ask for the active driver would look for a GPU
        stack.callback(lambda: driver.__dict__.update(before))
        driver.set_active(_Driver(device))
        stack.enter_context(mock.patch.object(CUDABackend, "make_cubin", _ptx_as_binary))
        stack.enter_context(knobs.cache.scope())
        knobs.cache.dir = str(Path(knobs.cache.dir, "emulated"))
        with contextlib.suppress(ImportError):  # where the emulator runs other kernels
            from maskd_triton.kernels import launch

            stack.enter_context(mock.patch.object(launch, "check_device"))
        yield device
