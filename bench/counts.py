"""What the main kernels cost, counted while they run in the emulator of ``tests/ptx``; ``python -m bench.inspect --run``.

One level of a pyramid with mask weights and customised masks, forward and backward of both stages. Instructions and wavefronts
of shared memory are given in units of the time in which a multiprocessor of an H100 moves the features from and to its memory
(`tests.ptx.counts`): above 1 that unit would set the time, not memory. Nothing is timed.
"""

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Cost:
    """Counts of one kernel.

    Attributes:
        instructions: time to issue all instructions of PTX, in units of the memory's time.
        shared: time of all wavefronts of shared memory, in the same unit.
        conflicts: the share of ``shared`` that falls to conflicts of banks.
        asked: bytes of global memory that threads ask for, by byte of the feature maps.
    """

    arch: str
    dtype: str
    layout: str
    distance: str
    kernel: str
    instructions: float
    shared: float
    conflicts: float
    asked: float

    @classmethod
    def of(cls, counts: Counts, map_bytes: int, arch: str, dtype: str, layout: str, distance: str) -> "Cost":
        """In units of the feature maps that the kernel reads and writes."""
        moved, shared = MAPS[counts.kernel] * map_bytes, counts.shared.total()
        return cls(
            *(arch, dtype, layout, distance, counts.kernel.partition(".")[2]),
            instructions=counts.instruction_time(moved),
            shared=counts.shared_time(moved),
            conflicts=1 - counts.ideal.total() / shared if shared else 0.0,
            asked=counts.asked.total() / moved,
        )


FIGURES = ("instructions", "shared", "conflicts", "asked")


def count(
    arch: int,
    dtype: str,
    layout: str,
    distance: Literal["squared", "smooth_l1", "cosine"] = "squared",
    channels: int = 256,
    tokens: int = 6,
    size: tuple[int, int] = (64, 128),
) -> list[Cost]:
    """The costs of the main kernels on one image; for other distances than squares those of stage 2."""
    map_bytes = channels * size[0] * size[1] * DTYPES[dtype].itemsize
    found = launches(arch, dtype, layout, distance, channels, tokens, size)
    return [Cost.of(counts, map_bytes, f"sm_{arch}", dtype, layout, distance) for counts in found if counts.kernel in MAPS]


def launches(
    arch: int,
    dtype: str,
    layout: str,
    distance: Literal["squared", "smooth_l1", "cosine"],
    channels: int,
    tokens: int,
    size: tuple[int, int],
) -> list[Counts]:
    """The counts of every launch that `count` takes."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, upstream = (
        torch.randn(1, channels, *size, generator=generator).to(DTYPES[dtype], memory_format=LAYOUTS[layout]) for _ in range(3)
    )
    learner = MaskLearner(channels, tokens, impl="triton")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tokens that have not learned
        criterion = MaskedDistillLoss(
            channels, tokens, pretrained=learner, custom_mask_warmup=0, impl="triton", distance=distance
        )
    with virtual_gpu(arch) as gpu, gpu.counting() as found:
        torch.autograd.grad(criterion(student.requires_grad_(), teacher), student)
        if distance == "squared":
            masked = learner(teacher)
            torch.autograd.grad([masked, learner.dice_loss()], list(learner.parameters()), [upstream, torch.ones(())])
    return found


def every() -> Iterator[Cost]:
    """Both architectures, three dtypes, both layouts; the other distances in bfloat16 on sm_90."""
    for arch in reversed(ARCHS):
        for dtype in DTYPES:
            for layout in LAYOUTS:
                yield from count(arch, dtype, layout)
    for layout in LAYOUTS:
        yield from count(90, "bf16", layout, "smooth_l1")
        yield from count(90, "bf16", layout, "cosine")


def rows(costs: list[Cost]) -> list[dict[str, Any]]:
    """As JSON takes them, in digits that a count is worth."""
    return [{k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(cost).items()} for cost in costs]
