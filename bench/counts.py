"""What the main kernels cost, counted while they run in the emulator of ``tests/ptx``; ``python -m bench.inspect --run``.

One level of a pyramid with mask weights and customised masks, forward and backward of both stages. Instructions and wavefronts
of shared memory are given in units of the time in which a multiprocessor of an H100 moves the features from and to its memory
(`tests.ptx.counts`): above 1 that unit would set the time, not memory. Nothing is timed.
"""

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from maskd_triton import MaskedDistillLoss, MaskLearner
from tests.ptx.counts import Counts
from tests.ptx.driver import ARCHS, virtual_gpu

MAPS = {
    **{"distill.forward_kernel": 2, "distill.backward_kernel": 3, "learn.mask_kernel": 1, "learn.gate_kernel": 2},
    "learn.token_gradient_kernel": 2,
}
"""Feature maps that a kernel reads or writes, each once."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


SIZES = {(19, 8): (64, 128), (64, 6): (64, 128), (256, 8): (64, 128), (1024, 6): (32, 64), (4096, 6): (16, 32)}
"""Channels and tokens that are counted beside 256 and 6, and the pixels of their level."""


@dataclass(frozen=True)
class Case:
    """What is counted: one level of one image."""

    arch: str
    dtype: str
    layout: str
    distance: Literal["squared", "smooth_l1", "cosine"] = "squared"
    standardize: bool = False
    channels: int = 256
    tokens: int = 6
    size: tuple[int, int] = (64, 128)


@dataclass(frozen=True)
class Cost:
    """Counts of one kernel in a case.

    Attributes:
        instructions: time to issue all instructions of PTX, in units of the memory's time.
        shared: time of all wavefronts of shared memory, in the same unit.
        conflicts: the share of ``shared`` that falls to conflicts of banks.
        asked: bytes of global memory that threads ask for, by byte of the feature maps.
    """

    case: Case
    kernel: str
    instructions: float
    shared: float
    conflicts: float
    asked: float

    @classmethod
    def of(cls, case: Case, counts: Counts) -> "Cost":
        """In units of the feature maps that the kernel reads and writes."""
        map_bytes = case.channels * case.size[0] * case.size[1] * DTYPES[case.dtype].itemsize
        moved, shared = MAPS[counts.kernel] * map_bytes, counts.shared.total()
        return cls(
            *(case, counts.kernel.partition(".")[2]),
            instructions=counts.instruction_time(moved),
            shared=counts.shared_time(moved),
            conflicts=1 - counts.ideal.total() / shared if shared else 0.0,
            asked=counts.asked.total() / moved,
        )


FIGURES = ("instructions", "shared", "conflicts", "asked")


def count(case: Case) -> list[Cost]:
    """The costs of the main kernels; for other distances than squares those of stage 2."""
    return [Cost.of(case, counts) for counts in launches(case) if counts.kernel in MAPS]


def launches(case: Case) -> list[Counts]:
    """The counts of every launch that `count` takes."""
    generator, shape = torch.Generator().manual_seed(0), (1, case.channels, *case.size)
    student, teacher, upstream = (
        torch.randn(shape, generator=generator).to(DTYPES[case.dtype], memory_format=LAYOUTS[case.layout]) for _ in range(3)
    )
    learner = MaskLearner(case.channels, case.tokens, impl="triton", standardize=case.standardize)
    for name, buffer in learner.named_buffers():
        if name.endswith("pixels_seen"):
            buffer.fill_(1)  # as if the statistics were those of a teacher
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tokens that have not learned
        criterion = MaskedDistillLoss(
            case.channels, case.tokens, pretrained=learner, custom_mask_warmup=0, impl="triton", distance=case.distance,
            standardize=case.standardize,
        )  # fmt: skip
    with virtual_gpu(int(case.arch[3:])) as gpu, gpu.counting() as found:
        torch.autograd.grad(criterion(student.requires_grad_(), teacher), student)
        if case.distance == "squared":
            masked = learner(teacher)
            torch.autograd.grad([masked, learner.dice_loss()], list(learner.parameters()), [upstream, torch.ones(())])
    return found


def cases() -> Iterator[Case]:
    """Both architectures, three dtypes, both layouts; in bfloat16 on sm_90 also other distances, standardised features, and
    other channels and tokens."""
    for arch in reversed(ARCHS):
        for dtype in DTYPES:
            for layout in LAYOUTS:
                yield Case(f"sm_{arch}", dtype, layout)
    for layout in LAYOUTS:
        plain = Case("sm_90", "bf16", layout)
        yield replace(plain, distance="smooth_l1")
        yield replace(plain, distance="cosine")
        yield replace(plain, standardize=True)
        for (channels, tokens), size in SIZES.items():
            yield replace(plain, channels=channels, tokens=tokens, size=size)


def rows(costs: list[Cost]) -> list[dict[str, Any]]:
    """As JSON takes them, in digits that a count is worth."""
    return [asdict(cost.case) | {"kernel": cost.kernel} | {x: round(getattr(cost, x), 3) for x in FIGURES} for cost in costs]
