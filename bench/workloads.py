"""Named inputs of the sizes people train with."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskd_triton import functional as F
from maskd_triton.reference import Weighting

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = ("nchw", "channels_last")


@dataclass(frozen=True)
class Workload:
    """Feature levels ``(C, H, W)`` of a batch, and number of tokens."""

    name: str
    levels: tuple[tuple[int, int, int], ...]
    batch: int
    tokens: int = 6
    dtype: str = "fp32"
    layout: str = "nchw"
    stage: int = 2

    def __str__(self) -> str:
        return f"stage {self.stage}: {self.name} N{self.batch} {self.dtype} {self.layout}"

    @property
    def feature_bytes(self) -> int:
        """Bytes of one feature tensor of all levels."""
        return self.batch * sum(c * h * w for c, h, w in self.levels) * DTYPES[self.dtype].itemsize


def pyramid(height: int, width: int, channels: int = 256, levels: int = 5) -> tuple[tuple[int, int, int], ...]:
    """An FPN's levels, strides 4, 8, 16, ... of an image."""
    return tuple((channels, -(-height // 2**k), -(-width // 2**k)) for k in range(2, 2 + levels))


WORKLOADS = {
    w.name: w
    for w in (
        Workload("fpn", pyramid(800, 1344), batch=2),
        Workload("fpn_odd", pyramid(789, 1333), batch=2),
        Workload("segmentation", ((19, 64, 128), (19, 128, 256)), batch=16, tokens=8),
        Workload("vit", ((1024, 37, 37),), batch=16, layout="channels_last"),
        Workload("tiny", ((256, 7, 7),), batch=2),
    )
}


def _grown(**changes: int) -> Workload:
    """One level of 64x64 pixels, 256 channels, 6 tokens, 2 images, with changes."""
    size = {"side": 64, "channels": 256, "tokens": 6, "images": 2} | changes
    level = (size["channels"], size["side"], size["side"])
    name = " ".join(f"{name} {value}" for name, value in changes.items())
    return Workload(f"one level, {name}", (level,), batch=size["images"], tokens=size["tokens"])


GROWTH = {
    "pixels": {side**2: _grown(side=side) for side in (8, 16, 32, 64, 128, 256)},
    "channels": {c: _grown(channels=c) for c in (16, 64, 256, 1024)},
    "tokens": {t: _grown(tokens=t) for t in (1, 2, 4, 8, 16, 32)},
    "images": {n: _grown(images=n) for n in (1, 2, 4, 8, 16)},
}


@dataclass
class Inputs:
    """Tensors of a workload. ``leaves`` require grad: the student in stage 2, tokens and mask weighting in stage 1, where the
    teacher is frozen and ``student`` is the gradient that its heads send back to the masked features."""

    stage: int
    student: list[Tensor]
    teacher: list[Tensor]
    tokens: list[Tensor]
    weighting: list[Weighting]
    composed: list[tuple[Tensor, Tensor]]

    @property
    def leaves(self) -> list[Tensor]:
        return self.student if self.stage == 2 else [*self.tokens, *(p for level in self.weighting for p in level)]

    def forget(self) -> None:
        """Drop the gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    def image(self, i: int) -> "Inputs":
        """Copies for one image, in float64."""
        images = ([x.detach()[i : i + 1].double() for x in levels] for levels in (self.student, self.teacher))
        tokens = [e.detach().double() for e in self.tokens]
        weighting = [tuple(p.detach().double() for p in level) for level in self.weighting]
        return _with_leaves(Inputs(self.stage, *images, tokens, weighting, []))


def make_inputs(workload: Workload, device: torch.device) -> Inputs:
    """Random features, and parameters of the size trained ones have."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) * scale

    def features() -> list[Tensor]:
        memory = torch.channels_last if workload.layout == "channels_last" else torch.contiguous_format
        shapes = [(workload.batch, *level) for level in workload.levels]
        return [normal(*shape).to(DTYPES[workload.dtype], memory_format=memory) for shape in shapes]

    t, channels = workload.tokens, [c for c, _, _ in workload.levels]
    weighting = [
        (normal(c, c, 3, 3, scale=a), normal(c), normal(t, c, 1, 1, scale=a), normal(t))
        for c, a in ((c, c**-0.5) for c in channels)
    ]
    student, teacher, tokens = features(), features(), [normal(t, c, scale=c**-0.5) for c in channels]
    composed = [F.compose_weighting(*level) for level in weighting]
    return _with_leaves(Inputs(workload.stage, student, teacher, tokens, weighting, composed))


def _with_leaves(inputs: Inputs) -> Inputs:
    for leaf in inputs.leaves:
        leaf.requires_grad_()
    return inputs


def variant(workload: Workload, **changes: object) -> Workload:
    """The workload with those settings that are not None changed."""
    return replace(workload, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]
