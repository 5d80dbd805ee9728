"""Compile every kernel for GPUs that are not here and report what each costs: ``python -m bench.inspect``.

Printed for every kernel and configuration, shipped or default: registers and spills of a thread, shared memory, occupancy,
widths of the global loads, and, counted in the compiled code as it stands (a loop's body once), instructions per byte of global
access and such bytes per element of a feature tile.

The launchers themselves are run, on CPU tensors, with a driver that only knows its target: what is compiled is exactly what a
launch on that GPU would compile, and nothing is executed. ``--choice`` compiles the sixth of the cases that the tests compile.
Exit status 1 if a kernel spills registers or loads features fewer 16 bytes at a time than its tiles hold, where the alignment
of its input allows that.

``--run`` runs the main kernels instead, in the emulator of ``tests/ptx``, and counts: instructions, shared memory, bytes.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from maskd_triton._records import Distilled, DistillOptions, DistillTables, LearnKept, LearnOptions, LearnTables
from maskd_triton.kernels import distill, launch, learn, pool, tuning

from . import counts, environment

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = (
    *(distill.forward_kernel, distill.finish_kernel, distill.backward_kernel),
    *(learn.mask_kernel, learn.finish_kernel, learn.gate_kernel),
    *(learn.token_gradient_kernel, learn.add_shares_kernel, learn.feature_gradient_kernel),
    pool.pool_kernel,
)
# Feature maps that a kernel reads, each of which must come 16 bytes at a time
FEATURE_MAPS = {
    **{"forward_kernel": 2, "backward_kernel": 2, "mask_kernel": 1, "gate_kernel": 1},
    **{"token_gradient_kernel": 3, "feature_gradient_kernel": 1, "pool_kernel": 1},  # the first reads x twice
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


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
    """One call of both stages; ``layout`` is "nchw" or "nhwc". Student's, in stage 1 upstream gradient's, may differ."""

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
    shipped: tuple[str, tuning.Config] | None = None  # a kernel and its configuration, instead of the default

    @property
    def _flags(self) -> list[tuple[str, bool]]:
        return [*zip("wcsvg", (self.weighted, self.custom, self.standard, self.valid, self.given), strict=True)]

    @property
    def mixed(self) -> bool:
        return bool(self.student_dtype or self.student_layout)

    def __str__(self) -> str:
        flags = "".join(f if on else "-" for f, on in self._flags)
        student = f"{self.student_dtype or self.dtype} {self.student_layout or self.layout} > " if self.mixed else ""
        sizes = " ".join(f"{h}x{w}" for h, w in self.sizes)
        shipped = f" {self.shipped}" if self.shipped else ""
        distance = f" {self.distance}" if self.distance != "squared" else ""
        return f"{student}{self.dtype} {self.layout} C{self.channels} T{self.tokens} {sizes} {flags}{distance}{shipped}"


def kernel_name(kernel: Any) -> str:
    """Both stages have a finishing kernel."""
    return "learn_finish_kernel" if kernel is learn.finish_kernel else kernel.fn.__name__


@dataclass(frozen=True)
class Facts:
    """Costs of one compiled kernel: ``load_bytes`` and ``store_bytes`` count global accesses by their width, ``elements`` are
    those of a feature tile that fall to a thread, ``occupancy`` is a share of the threads that a multiprocessor holds."""

    kernel: str
    registers: int
    spills: int
    shared: int
    load_bytes: dict[int, int]
    store_bytes: dict[int, int]
    instructions: int
    occupancy: float
    elements: float

    @property
    def bytes(self) -> int:
        """Bytes of global memory that a thread asks for."""
        return sum(width * n for widths in (self.load_bytes, self.store_bytes) for width, n in widths.items())

    def __str__(self) -> str:
        per_element = f"{self.bytes / self.elements:5.1f} B/element" if self.elements else " " * 15
        return (
            f"{self.kernel:23s} regs {self.registers:3d} spill {self.spills:3d} smem {self.shared:6d} "
            f"occupancy {self.occupancy:4.2f} {self.instructions / self.bytes:5.1f} ins/B {per_element} loads {self.load_bytes}"
        )


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and the feature elements of a tile that fall to each thread."""

    kernel: Any
    elements: float


def compile_case(case: Case, target: str) -> dict[str, Compiled]:
    """The compiled kernels of one forward and backward, by kernel name."""
    n, levels, c, k = 2, len(case.sizes), case.channels, case.tokens

    def features(dtype: str, layout: str) -> list[torch.Tensor]:
        pixels = [h * w for h, w in case.sizes]
        if layout == "nhwc":
            return [torch.empty((n, p, c), dtype=DTYPES[dtype]).transpose(1, 2) for p in pixels]
        return [torch.empty((n, c, p), dtype=DTYPES[dtype]) for p in pixels]

    def parameters(*shape: int) -> list[torch.Tensor]:
        return [torch.empty(shape) for _ in range(levels)]

    t = features(case.dtype, case.layout)
    s = features(case.student_dtype or case.dtype, case.student_layout or case.layout)
    acc = torch.float64 if case.dtype == "fp64" else torch.float32
    heights = [h for h, _ in case.sizes]
    loss, weights = torch.empty(levels, n, dtype=acc), torch.empty(levels, n, k, dtype=acc)
    pairs, masks = torch.empty(levels, n, k, k, dtype=acc), [torch.empty(n, k, h * w, dtype=acc) for h, w in case.sizes]
    tokens = parameters(k, c)
    token_bias, affine = (parameters(k), parameters(2, c)) if case.standard else ([], [])
    rows, bias = (parameters(9, k, c), parameters(5, k) if case.standard else parameters(k)) if case.weighted else ([], [])
    sums = [torch.empty(n, 9, c, dtype=acc) for _ in rows]
    valid = [torch.empty(n, h * w, dtype=torch.uint8) for h, w in case.sizes if case.valid]
    if case.valid:  # their mask weights come from the pool kernel
        rows, bias, sums = [], [], []
    given, own_weights = masks if case.given else [], [*weights] if case.valid else []
    tables = DistillTables([] if given else tokens, rows, bias, tokens if case.standard else [], token_bias, affine)
    options = DistillOptions(
        tables, valid, given, weights if valid else None, torch.zeros((), dtype=torch.int64), case.custom,
        warmup=1000, mask_power=1 if given else 2, distance=case.distance,
    )  # fmt: skip
    cosines = [torch.empty(n, 2, h * w, dtype=acc) for h, w in case.sizes if case.distance == "cosine"]
    outputs, kept = Distilled(loss, weights, weights, masks, cosines), LearnKept(weights, pairs, masks, sums)
    parameters_of_learn = LearnTables(tokens, token_bias, rows, bias)
    learn_options = LearnOptions(parameters_of_learn, own_weights, valid, heights)
    forced = tuning.forced(*case.shipped) if case.shipped else contextlib.nullcontext()
    with compiling_for(TARGETS[target]) as compiled, forced:
        student, teacher = ([x.unflatten(2, size) for x, size in zip(each, case.sizes, strict=True)] for each in (s, t))
        distill.forward(student, teacher, options, outputs)
        distill.backward(student, teacher, loss, outputs.kept(options))
        learn.forward(t, learn_options, loss, kept)
        learn.backward(t, learn_options, s, loss[:, 0], kept, parameters_of_learn, own_weights, True)
        if valid:
            pool.forward(t, valid, heights, [torch.empty(n, 9, c + 1, dtype=acc) for _ in t])
        if not case.weighted:
            learn.launch_gate(t, masks, weights, t)
    return compiled


@contextlib.contextmanager
def compiling_for(target: GPUTarget) -> Iterator[dict[str, Compiled]]:
    """Inside, a launch compiles its kernel for ``target`` and runs nothing; gives what was compiled latest, by kernel."""
    compiled: dict[str, Compiled] = {}

    def compile_only(kernel: Any) -> Any:
        def run(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            tile = kwargs.get("BLOCK_C", 0) * kwargs.get("BLOCK_P", 0)
            binary = type(kernel).run(kernel, *args, grid=grid, warmup=True, **kwargs)
            compiled[kernel_name(kernel)] = Compiled(binary, tile / (kwargs["num_warps"] * target.warp_size))

        return run

    with contextlib.ExitStack() as stack:
        before = driver.__dict__.copy()  # to ask for the active driver would look for a GPU
        stack.callback(lambda: driver.__dict__.update(before))
        driver.set_active(_TargetOnly(target))
        stack.enter_context(mock.patch.object(launch, "check_device"))
        stack.enter_context(mock.patch.object(tuning, "warp_size", return_value=target.warp_size))
        stack.callback(tuning.forget)
        tuning.forget()  # warps by another target's size
        for kernel in KERNELS:
            kernel.device_caches.clear()
            stack.enter_context(mock.patch.object(kernel, "run", compile_only(kernel)))
        yield compiled
    for kernel in KERNELS:
        kernel.device_caches.clear()


def facts(name: str, compiled: Compiled) -> Facts:
    """What one compiled kernel costs."""
    kernel = compiled.kernel
    target, shared = kernel.metadata.target, kernel.metadata.shared
    if target.backend == "hip":
        code = kernel.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.{key}:\s*(\d+)", code)[1]) for key in ("vgpr_count", "vgpr_spill_count"))  # type: ignore[index]
        loads, stores = _amd_widths(code, "load"), _amd_widths(code, "store")
        instructions = len(re.findall(r"^\s+(?:[vs]|ds|global|buffer)_\w+", code, re.M))
    else:
        code = kernel.asm["ptx"]
        usage = _resource_usage(kernel.asm["cubin"])
        registers, spills = usage["REG"], usage["STACK"] + usage["LOCAL"]
        loads, stores = _ptx_widths(code, "ld"), _ptx_widths(code, "st")
        for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^\n]*?, 0x([0-9a-f]+)", code):
            loads[int(size, 16)] = loads.get(int(size, 16), 0) + 1
        instructions = len(re.findall(r"^\s+(?:@!?%p\d+ )?[a-z][\w.:]*\s[^;]*;", code, re.M))
    share = occupancy(target, registers, shared, kernel.metadata.num_warps)
    return Facts(name, registers, spills, shared, loads, stores, instructions, share, compiled.elements)


SHARED_KIB = {80: 164, 90: 228, 100: 228}  # of a multiprocessor, CUDA C++ programming guide, "Compute Capabilities"


def occupancy(target: GPUTarget, registers: int, shared: int, num_warps: int) -> float:
    """Share of a multiprocessor's warps that registers and shared memory leave room for."""
    if target.backend == "hip":  # CDNA: 4 SIMDs of 8 waves and 512 registers a lane, 64 KiB
        programs = min(4 * min(8, 512 // (-(-registers // 8) * 8)) // num_warps, 64 * 1024 // max(shared, 1))
        return min(1.0, programs * num_warps / 32)
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * num_warps)
    by_shared = SHARED_KIB[target.arch] * 1024 // (shared + 1024)
    return min(by_registers, by_shared, 32, 64 // num_warps) * num_warps / 64


def _ptx_widths(code: str, access: str) -> dict[int, int]:
    widths: dict[int, int] = {}
    for modifiers in re.findall(rf"\b{access}\.global((?:\.[a-zA-Z0-9:_]+)*)", code):
        vector = re.search(r"\.v(\d)\b", modifiers)
        bits = re.search(r"\.[bfus](\d+)\b", modifiers)
        size = (int(vector[1]) if vector else 1) * (int(bits[1]) if bits else 0) // 8
        widths[size] = widths.get(size, 0) + 1
    return widths


def _amd_widths(code: str, access: str) -> dict[int, int]:
    widths: dict[int, int] = {}
    for suffix in re.findall(rf"^\s+(?:global|buffer)_{access}_(\w+)", code, re.M):
        size = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}.get(suffix, 1 if "byte" in suffix else 2)
        widths[size] = widths.get(size, 0) + 1
    return widths


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What the assembler that Triton chose made of a kernel, with the options that Triton gave it: registers, stack, ..."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", report)}


def cases() -> list[Case]:
    """Every branch and configuration the library can launch: dtypes, layouts, token counts, flags, odd sizes."""
    branches = [Case(d, layout, standard=s) for d in DTYPES for layout in ("nchw", "nhwc") for s in (False, True)]
    flags = [Case(weighted=w, custom=c) for w in (False, True) for c in (False, True) if not (w and c)]
    # standardised features take more registers, so they stand for both
    counts = [Case(d, tokens=t, standard=True) for d in ("bf16", "fp32", "fp64") for t in (1, 16, 32, 64)]
    counts += [Case(d, tokens=t, standard=True, weighted=False) for d in ("fp32", "fp64") for t in (6, 32)]
    counts += [Case(d, "nhwc", tokens=t, standard=True) for d in ("bf16", "fp32") for t in (16, 64)]
    mixed = [
        Case("bf16", student_dtype="fp32", standard=True),
        Case("fp32", "nhwc", student_dtype="bf16", standard=True),
        Case("bf16", student_layout="nhwc", standard=True),
        Case("fp32", "nhwc", student_layout="nchw", tokens=64, standard=True),
        Case("fp32", "nchw", student_layout="nhwc", tokens=64, standard=True),
        Case("fp16", "nchw", student_layout="nhwc", tokens=32, standard=True),
    ]
    padded = [Case(d, layout, standard=True, valid=True) for d in DTYPES for layout in ("nchw", "nhwc")]
    padded += [Case(weighted=False, custom=False, given=True, valid=v) for v in (False, True)]
    # aligned and other levels in one launch; only others; one level
    pyramid = ((50, 84), (25, 42), (13, 21))
    sizes = [Case(d, layout, sizes=pyramid, standard=True) for d in ("bf16", "fp32") for layout in ("nchw", "nhwc")]
    sizes += [Case(channels=19, tokens=8), Case(sizes=((13, 21),)), Case(sizes=((30, 35),)), Case("fp32", channels=4096)]
    # pixels that 16 bytes do not divide, and fewer channels than a tile has
    sizes += [Case("bf16", "nhwc", channels=c, tokens=t, standard=True, valid=True) for c, t in ((19, 8), (150, 32))]
    sizes += [Case("fp32", "nhwc", channels=19, tokens=16, standard=True), Case("bf16", "nhwc", channels=64, standard=True)]
    distances = [Case(d, distance=x, standard=True, valid=d != "fp16") for d in DTYPES for x in ("smooth_l1", "cosine")]
    distances += [
        Case(d, "nhwc", distance="cosine", tokens=t, standard=True) for d, t in (("bf16", 6), ("fp32", 6), ("bf16", 64))
    ]
    return branches + flags + counts + mixed + padded + sizes + distances + shipped_cases()


def shipped_cases() -> list[Case]:
    """Every configuration in ``kernels/configs``."""
    folder, dtypes = tuning.shipped_file("").parent, {16: "bf16", 32: "fp32", 64: "fp64"}
    return [
        Case(
            dtypes[key.bits], key.layout, channels=key.channels, tokens=key.tokens, standard=True, shipped=(key.kernel, config)
        )
        for path in sorted(folder.glob("*.json"))
        for key, config in tuning.read(path).items()
    ]


def choice() -> list[tuple[str, Case]]:
    """Fewer than a sixth of all targets and cases, which together cover what `covered` lists of all of them."""
    left = {job: covered(*job) for job in itertools.product(TARGETS, cases())}
    taken: list[tuple[str, Case]] = []
    while wanted := set().union(*left.values()):
        compiled = Counter(target for target, _ in taken)
        taken.append(max(left, key=lambda job: (len(left[job]), -compiled[job[0]])))
        left = {job: kinds & (wanted - left[taken[-1]]) for job, kinds in left.items()}
    return taken


def covered(target: str, case: Case) -> set[frozenset[Any]]:
    """What compiling a case for a target shows: every pair of its properties on some target; on this target its dtype, layout
    and number of tokens, and the kernels of valid pixels and of missing mask weights."""
    own = {(name, getattr(case, name)) for name in ("dtype", "layout", "tokens", "weighted", "valid")}
    return {frozenset(pair) for pair in itertools.combinations(vars(case).items(), 2)} | {frozenset((target, x)) for x in own}


def problems(case: Case, fact: Facts) -> list[str]:
    """What is wrong with a compiled kernel: spilled registers, or fewer 16-byte loads than its feature tiles need where half
    and float32 features allow them (float64 is for tests)."""
    found = [f"{fact.spills} bytes spilled"] if fact.spills else []
    dtypes = (case.dtype, case.student_dtype or case.dtype)
    layouts = (case.layout, case.student_layout or case.layout)
    sizes = [DTYPES[dtype].itemsize for dtype in dtypes]
    aligned = [
        all(
            (case.channels if layout == "nhwc" else h * w) * size % 16 == 0 for layout, size in zip(layouts, sizes, strict=True)
        )
        for h, w in case.sizes
    ]
    if fact.kernel not in FEATURE_MAPS or not any(aligned) or "fp64" in dtypes:
        return found
    wanted = FEATURE_MAPS[fact.kernel] * fact.elements * min(sizes) / 16
    # parameters are float32: loads of 2 bytes are features, and may be of levels that are not aligned or a column of the border
    column = (
        fact.elements if case.weighted and case.layout == "nchw" and fact.kernel in ("forward_kernel", "mask_kernel") else 0
    )
    # so may be single bytes of the valid pixels, one by one where their neighbours are looked at
    narrow = sum(fact.load_bytes.get(size, 0) for size in ((2,) if case.valid else (1, 2)))
    if fact.load_bytes.get(16, 0) < wanted or (all(aligned) and narrow > column):
        found.append(f"expected {wanted:g} loads of 16 bytes and at most {column:g} of 2: {fact.load_bytes}")
    return found


def _inspected(target: str, case: Case) -> list[Facts]:
    return [facts(name, kernel) for name, kernel in compile_case(case, target).items()]


def _run(out: Path | None) -> None:
    """Print `bench.counts`, and write them to ``out``."""
    found = []
    for cost in itertools.chain.from_iterable(map(counts.count, counts.cases())):
        found.append(cost)
        case, figures = cost.case, " ".join(f"{name} {getattr(cost, name):5.2f}" for name in counts.FIGURES)
        what = f"{case.arch} {case.dtype} {case.layout} {'standard' if case.standardize else case.distance:9s}"
        print(f"{what} C{case.channels} T{case.tokens} {cost.kernel:22s} {figures}", flush=True)
    if out:
        out.write_text(json.dumps(environment.describe(torch.device("cpu")) | {"rows": counts.rows(found)}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--choice", action="store_true", help="the sixth of the cases that the tests compile")
    parser.add_argument("--run", action="store_true", help="run the main kernels in the emulator of tests/ptx and count")
    parser.add_argument("--out", type=Path, help="JSON file for --run")
    parser.add_argument("--jobs", type=int, help="processes; 1: this one. Default: one for each core")
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}")
    if arguments.run:
        _run(arguments.out)
        return 0
    failed = 0
    jobs = choice() if arguments.choice else list(itertools.product(TARGETS, cases()))
    jobs = [(target, case) for target, case in jobs if target in arguments.target]
    with contextlib.ExitStack() as stack:
        if arguments.jobs == 1:
            reports: Iterator[list[Facts]] = map(_inspected, *zip(*jobs, strict=True))
        else:  # fresh processes: the compiler is not safe to fork
            pool = ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn"))
            reports = stack.enter_context(pool).map(_inspected, *zip(*jobs, strict=True))
        for (target, case), report in zip(jobs, reports, strict=True):
            for fact in report:
                wrong = problems(case, fact)
                failed += len(wrong)
                print(f"{target:7s} {case!s:40s} {fact}", *wrong, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
