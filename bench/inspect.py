"""Compile every kernel for GPUs that are not here: ``python -m bench.inspect``.

Printed for every kernel of every case: registers and spilled bytes of a thread, shared memory, and how many global loads there
are of each width. The loss and the learner themselves are called, on CPU tensors, with a driver that only knows its target:
what is compiled is what a launch on that GPU would compile, and nothing is executed. Exit status 1 if a kernel spills more than
16 bytes, or loads features fewer 16 bytes at a time than its tiles hold where the alignment of its input allows that.
"""

import argparse
import contextlib
import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from maskd_triton import functional as F
from maskd_triton.kernels import distill, launch, learn, tuning

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = (
    *(distill.forward_kernel, distill.finish_kernel, distill.backward_kernel),
    *(learn.mask_kernel, learn.gate_kernel, learn.token_gradient_kernel, learn.feature_gradient_kernel),
)
# Feature maps that a kernel reads, each of which must come 16 bytes at a time; the token gradient reads one of two twice
FEATURE_MAPS = {
    **{"forward_kernel": 2, "backward_kernel": 2, "mask_kernel": 1, "gate_kernel": 1},
    **{"token_gradient_kernel": 3, "feature_gradient_kernel": 1},
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
SPILLS = 16  # bytes that are no failure


class _TargetOnly:
    """Enough of a driver to compile without a GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0


@dataclass(frozen=True)
class Case:
    """One step of both stages, the layouts "nchw" or "nhwc"; the student's is that of stage 1's upstream gradient, too."""

    dtype: str = "bf16"
    layout: str = "nchw"
    student_dtype: str = ""
    student_layout: str = ""
    channels: int = 256
    tokens: int = 6
    sizes: tuple[tuple[int, int], ...] = ((50, 84), (24, 40))
    weighted: bool = True
    custom: bool = True
    standard: bool = False
    valid: bool = False
    given: bool = False
    distance: str = "squared"

    def __str__(self) -> str:
        shown = {k: v for k, v in vars(self).items() if k in ("dtype", "layout") or v != getattr(Case, k)}
        return " ".join(f"{name}={value}" for name, value in shown.items())

    def features(self, dtype: str, layout: str) -> list[torch.Tensor]:
        memory = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        shapes = [(2, self.channels, *size) for size in self.sizes]
        return [torch.zeros(shape, dtype=DTYPES[dtype]).contiguous(memory_format=memory) for shape in shapes]

    def step(self) -> None:
        """Forward and backward passes of both stages."""
        c, t = self.channels, self.tokens
        student = self.features(self.student_dtype or self.dtype, self.student_layout or self.layout)
        student, teacher = [x.requires_grad_() for x in student], self.features(self.dtype, self.layout)
        valid = torch.ones(2, *self.sizes[0], dtype=torch.bool) if self.valid else None

        def parameters(*shape: int) -> list[torch.Tensor]:
            return [torch.zeros(shape, dtype=torch.float64 if self.dtype == "fp64" else torch.float32) for _ in self.sizes]

        tokens, token_bias, statistics = parameters(t, c), parameters(t), parameters(2, c)
        standard = [F.Standardization(*level) for level in zip(tokens, token_bias, statistics, strict=True)]
        rows, bias = parameters(9, t, c), parameters(5, t) if self.standard else parameters(t)
        weighting = list(zip(rows, bias, strict=True)) if self.weighted else None
        if self.given:
            masks = [torch.zeros(2, t, *size) for size in self.sizes]
            loss = F.masked_distill_loss(student, teacher, masks=masks, valid=valid, distance=self.distance, impl="triton")
        else:
            loss = F.masked_distill_loss(
                student, teacher, tokens, weighting, standardize=standard if self.standard else None, custom_mask=self.custom,
                warmup_step=torch.tensor(0), custom_mask_warmup=1000, valid=valid, distance=self.distance, impl="triton",
            )  # fmt: skip
        loss.backward()
        leaves = [*teacher, *tokens, *token_bias, *rows, *bias]
        for leaf in leaves:
            leaf.requires_grad_()
        masked, dice = F.masked_features_and_dice(
            teacher, tokens, weighting, token_bias=token_bias if self.standard else None, valid=valid, impl="triton"
        )
        torch.autograd.backward([*masked, dice], [*(x.detach() for x in student), torch.ones_like(dice)])


def cases() -> list[Case]:
    """Every branch that the library can launch: dtypes, layouts, token counts, flags, odd sizes."""
    layouts, kinds = ("nchw", "nhwc"), ((False, False), (True, False), (True, True))
    plain = [Case(d, x, standard=s, valid=v) for d, x, (s, v) in itertools.product(DTYPES, layouts, kinds)]
    flags = [Case(weighted=w, custom=c) for w, c in ((False, False), (False, True), (True, False))]
    flags += [Case(given=True, valid=v) for v in (False, True)]
    counts = [Case(d, x, tokens=t, standard=True) for d in ("bf16", "fp32", "fp64") for x in layouts for t in (1, 16, 32)]
    mixed = [
        Case("bf16", student_dtype="fp32", standard=True),
        Case("fp32", "nhwc", student_dtype="bf16", standard=True),
        Case("bf16", student_layout="nhwc", standard=True),
        Case("fp32", "nchw", student_layout="nhwc", tokens=32, standard=True),
    ]
    sizes = [Case(d, x, sizes=((50, 84), (25, 42), (13, 21)), standard=True) for d in ("bf16", "fp32") for x in layouts]
    sizes += [Case(sizes=((13, 21),)), Case("fp32", channels=4096), Case("bf16", "nhwc", channels=64, standard=True)]
    narrow = ("bf16", 19, 8), ("bf16", 150, 32), ("fp32", 19, 16)
    sizes += [Case(d, "nhwc", channels=c, tokens=t, standard=True) for d, c, t in narrow]
    distances = [Case(d, x, distance=k, standard=True) for d in DTYPES for x in layouts for k in ("smooth_l1", "cosine")]
    return [*plain, *flags, *counts, *mixed, *sizes, *distances]


@dataclass(frozen=True)
class Facts:
    """What one compiled kernel costs; ``wide``: the least number of 16-byte loads that its feature tiles need."""

    kernel: str
    registers: int
    spills: int
    shared: int
    loads: tuple[tuple[int, int], ...]  # bytes and number
    wide: float

    def __str__(self) -> str:
        loads = ", ".join(f"{number} of {size}" for size, number in self.loads)
        return f"{self.kernel:23s} registers {self.registers:3d} spills {self.spills:3d} shared {self.shared:6d} loads {loads}"

    @property
    def problems(self) -> list[str]:
        found = [f"{self.spills} bytes spilled"] if self.spills > SPILLS else []
        if dict(self.loads).get(16, 0) < self.wide:
            found.append(f"expected {self.wide:g} loads of 16 bytes")
        return found


@contextlib.contextmanager
def compiling_for(target: GPUTarget) -> Iterator[Collection[Facts]]:
    """Inside, a launch compiles its kernel for ``target`` and runs nothing."""
    found: dict[str, Facts] = {}
    run = launch.run

    def compile_only(kernel: Any, numbers: launch.Numbers, *arguments: Any) -> None:
        binary, constants = run(kernel, numbers, *arguments, warmup=True), numbers.constants
        wide, align = 0.0, constants.get("ALIGN", 1)
        if align > 2:  # float64 is for tests
            tile = constants["BLOCK_C"] * constants["BLOCK_P"] / (constants["num_warps"] * target.warp_size)
            wide = FEATURE_MAPS[kernel.fn.__name__] * tile / align
        if binary.hash not in found:
            found[binary.hash] = _facts(kernel, binary, wide)

    with contextlib.ExitStack() as stack:
        before = driver.__dict__.copy()  # to ask for the active driver would look for a GPU
        stack.callback(lambda: driver.__dict__.update(before))
        driver.set_active(_TargetOnly(target))
        stack.enter_context(mock.patch.object(launch, "check_device"))
        stack.enter_context(mock.patch.object(launch, "run", compile_only))
        stack.enter_context(mock.patch.object(tuning, "warp_size", return_value=target.warp_size))
        tuning.forget()  # warps by another target's size
        stack.callback(tuning.forget)
        for kernel in KERNELS:
            kernel.device_caches.clear()
            stack.callback(kernel.device_caches.clear)
        yield found.values()


def _facts(kernel: Any, binary: Any, wide: float) -> Facts:
    if binary.metadata.target.backend == "hip":
        code = binary.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.{key}:\s*(\d+)", code)[1]) for key in ("vgpr_count", "vgpr_spill_count"))  # type: ignore[index]
        widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
        accesses = re.findall(r"^\s+(?:global|buffer)_load_(\w+)", code, re.M)
        loads = Counter(widths.get(x, 1 if "byte" in x else 2) for x in accesses)
    else:
        usage = _resource_usage(binary.asm["cubin"])
        registers, spills = usage["REG"], usage["STACK"] + usage["LOCAL"]
        loads = _ptx_loads(binary.asm["ptx"])
    return Facts(kernel.fn.__name__, registers, spills, binary.metadata.shared, tuple(sorted(loads.items())), wide)


def _ptx_loads(code: str) -> Counter[int]:
    loads = Counter(int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^\n]*?, 0x([0-9a-f]+)", code))
    for vector, bits in re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)\b", code):
        loads[int(vector or 1) * int(bits) // 8] += 1
    return loads


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What the assembler made of a kernel: registers, stack, ..."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", report)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--every", type=int, default=1, metavar="N", help="compile only every Nth case, others for each target")
    args = parser.parse_args(arguments)
    print(f"triton {triton.__version__}")
    failed = 0
    for target in args.target:
        for case in cases()[list(TARGETS).index(target) % args.every :: args.every]:
            with compiling_for(TARGETS[target]) as found:
                case.step()
            for fact in found:
                failed += len(fact.problems)
                print(target, case, fact, *fact.problems, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
