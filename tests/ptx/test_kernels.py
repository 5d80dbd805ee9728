"""Compiled kernels on the emulated GPUs: every kernel, against eager float64, and nothing but what each kernel may touch.

The cases are a choice, not a product: each value of each option with several of the others. Memory counts as touched wrongly
outside of the views that are passed, and as uninitialised until a kernel or the host has written it.
"""

import contextlib
import copy
import importlib
import math
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import JITFunction

from maskd_triton import MaskedDistillLoss, MaskLearner, kernels
from maskd_triton.kernels import tuning
from tests.ptx.driver import ARCHS, virtual_gpu

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
PYRAMID = ((13, 17), (12, 16), (7, 9), (3, 5), (1, 1))
CHANNELS = (16, 24, 19, 32, 7)


@dataclass(frozen=True)
class Case:
    """``dtype`` and ``layout`` are the teacher's; ``other`` are the student's, in stage 1 those of the upstream gradient.

    ``place``: a slice of channels or columns of larger maps, or a storage offset of 3 elements; ``given``: masks come with the
    call; ``inputs``: the features' gradient is wanted; ``stages``: of the load pipeline, where a tuner chose another one.
    """

    dtype: str = "fp32"
    layout: str = "nchw"
    tokens: int = 6
    levels: int = 2
    other_dtype: str = ""
    other_layout: str = ""
    place: str = ""
    weighted: bool = True
    standard: bool = False
    valid: bool = False
    given: bool = False
    custom: bool = True
    power: int = 2
    distance: str = "squared"
    inputs: bool = True
    same_channels: int = 0
    stages: int = 1

    def __str__(self) -> str:
        other = f"-of-{self.other_dtype or self.dtype}-{self.other_layout or self.layout}"
        flags = [name for name in ("weighted", "standard", "valid", "given", "custom", "inputs") if getattr(self, name)]
        maps = self.layout + (other if self.other_dtype or self.other_layout else "")
        staged = [f"stages{self.stages}"] if self.stages > 1 else []
        return "-".join(
            [self.dtype, maps, f"{self.tokens}x{self.levels}", *flags, self.distance, self.place or "whole", *staged]
        )

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        sizes = PYRAMID[: self.levels]
        return [(2, self.same_channels or c, *size) for c, size in zip(CHANNELS, sizes, strict=False)]

    def maps(self, dtype: str = "", layout: str = "") -> list[Tensor]:
        """Random features of every level, exact in the dtype."""
        return [placed(torch.randn(s).to(DTYPES[dtype or self.dtype]), layout or self.layout, self.place) for s in self.shapes]

    def pixels(self) -> Tensor | None:
        """Images of different sizes in one batch, where ``valid``."""
        if not self.valid:
            return None
        h, w = PYRAMID[0]
        valid = torch.zeros(2, h, w, dtype=torch.bool)
        valid[0, : h * 3 // 5] = True
        valid[1, :, : w * 3 // 4] = True
        return valid


def placed(x: Tensor, layout: str, place: str) -> Tensor:
    """The same values in a layout, possibly inside of a larger tensor that is NaN elsewhere."""
    n, c, h, w = x.shape
    order = {"nchw": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1), "batch_last": (1, 2, 3, 0)}[layout]
    lengths = [n, c + 3 * (place == "channels"), h, w + 3 * (place == "columns")]
    offset = 3 if place == "offset" else 0
    flat = torch.full((offset + lengths[0] * lengths[1] * lengths[2] * lengths[3],), float("nan"), dtype=x.dtype)
    whole = flat[offset:].view([lengths[i] for i in order]).permute([order.index(i) for i in range(4)])
    part = whole[:, 2 : 2 + c] if place == "channels" else whole[..., 1 : 1 + w] if place == "columns" else whole
    return part.copy_(x)


def learner_of(case: Case) -> MaskLearner:
    """A learner whose parameters have the size of trained ones."""
    learner = MaskLearner([s[1] for s in case.shapes], case.tokens, case.weighted, standardize=case.standard, impl="triton")
    with torch.no_grad():
        for name, value in learner.state_dict().items():
            if name.endswith("mask_token"):
                value.normal_(std=0.3)
            elif name.endswith(("bias", "channel_mean")):
                value.normal_()
            elif name.endswith("channel_std"):
                value.uniform_(0.5, 2)
            elif name.endswith("pixels_seen"):
                value.fill_(1)
    return learner.double() if case.dtype == "fp64" else learner


Outputs = dict[str, list[Tensor]]
Measured = Callable[..., Outputs]


def noisy(x: Tensor, noise: float) -> Tensor:
    """Every element off by a part of itself, ``noise`` in the mean."""
    return x * (1 + noise * torch.randn_like(x)) if noise else x


def noisy_softmax(noise: float, softmax: Callable[..., Tensor] = torch.softmax) -> Callable[..., Tensor]:
    """Softmax whose weights are off, and whose gradient ``w (dw - sum w dw)`` is off by a part of ``w dw``. Where one weight is
    near 1, little is left of the difference."""

    def softmax_off(logits: Tensor, dim: int) -> Tensor:
        weights = softmax(logits, dim)
        off = (noisy(weights, noise) - weights).detach()
        return weights + off * (1 + logits - logits.detach())

    return softmax_off


def stage_2(case: Case) -> Measured:
    """Losses of every level and the student's gradients, as a function of the implementation, of a dtype for all, and of the
    noise of all that goes in."""
    student, teacher = case.maps(case.other_dtype, case.other_layout), case.maps()
    precise = torch.float64 if case.dtype == "fp64" else torch.float32
    criterion = MaskedDistillLoss(
        [s[1] for s in case.shapes], None if case.given else case.tokens, weight_mask=case.weighted, standardize=case.standard,
        custom_mask=case.custom, custom_mask_warmup=0, mask_power=case.power, distance=case.distance, loss_weight=2.5, beta=0.7,
        pretrained=None if case.given else learner_of(case),
    ).to(precise)  # fmt: skip
    masks = [torch.rand(2, case.tokens, h, w, dtype=precise) for _, _, h, w in case.shapes]
    weights = [torch.rand(2, case.tokens, dtype=precise) for _ in masks]
    upstream = 1 + torch.rand(case.levels)

    def measured(impl: str, dtype: torch.dtype | None = None, noise: float = 0.0) -> Outputs:
        module = copy.deepcopy(criterion).to(dtype or precise)
        module.impl = impl
        for table in module.buffers():
            if noise and table.is_floating_point():
                table.copy_(noisy(table, noise))
        every = student, teacher, masks, weights
        s, t, m, w = ([noisy(x.detach().to(dtype or x.dtype), noise) for x in each] for each in every)
        s = [x.requires_grad_() for x in s]
        options: dict[str, Any] = {"masks": m, "mask_weights": w if case.weighted else None} if case.given else {}
        loss = module(s, t, reduction="none", valid=case.pixels(), **options)
        gradients = torch.autograd.grad((loss * upstream.to(loss)).sum(), s)
        return {"loss": [loss.detach()], "gradient": list(gradients)}

    return measured


def stage_1(case: Case) -> Measured:
    """Masked features, Dice loss and all gradients."""
    features, learner = case.maps(), learner_of(case)
    upstream = [g / s[1] for g, s in zip(case.maps(case.other_dtype, case.other_layout), case.shapes, strict=True)]
    upstream = [placed(g, case.other_layout or case.layout, "") for g in upstream]

    def measured(impl: str, dtype: torch.dtype | None = None, noise: float = 0.0) -> Outputs:
        module = copy.deepcopy(learner).to(dtype or next(learner.parameters()).dtype)
        for part in (module, *module.mask_modules):
            part.impl = impl
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(noisy(parameter, noise))
        x, g = ([noisy(v.detach().to(dtype or v.dtype), noise) for v in each] for each in (features, upstream))
        x = [v.requires_grad_(case.inputs) for v in x]
        y = module(x, case.pixels())
        dice = module.dice_loss()
        wanted = [p for p in module.parameters() if p.requires_grad]
        found = torch.autograd.grad([*y, dice], [*wanted, *(x if case.inputs else [])], [*g, torch.full_like(dice, 2.0)])
        parameters, gradients = list(found[: len(wanted)]), list(found[len(wanted) :])
        masked = [v.detach() for v in y]
        return {"masked": masked, "dice": [dice.detach()], "parameters": parameters, "features": gradients}

    return measured


CASES = {
    2: [
        Case("fp32", "nchw", tokens=6, levels=2),
        Case("bf16", "channels_last", tokens=6, levels=5, standard=True),
        Case("fp16", "nchw", tokens=8, levels=3, valid=True),
        Case("fp64", "channels_last", tokens=5, levels=2, standard=True, valid=True),
        Case("fp64", "nchw", tokens=1, levels=1, weighted=False, power=1),
        Case("fp32", "channels_last", tokens=3, levels=4, custom=False),
        Case("fp32", "channels_last", other_layout="nchw", standard=True, levels=3),
        Case("fp32", "channels_last", other_dtype="bf16", other_layout="nchw"),
        Case("bf16", "nchw", other_dtype="fp32", standard=True),
        Case("fp16", "channels_last", other_dtype="fp32", tokens=17, levels=1),
        Case("fp32", "nchw", tokens=9, given=True, power=1),
        Case("bf16", "channels_last", tokens=3, given=True, valid=True, weighted=False),
        Case("fp16", "nchw", tokens=16, weighted=False, place="channels"),
        Case("bf16", "nchw", tokens=32, same_channels=40),
        Case("fp16", "channels_last", tokens=31, levels=1, same_channels=40),
        Case("bf16", "channels_last", tokens=32, same_channels=40),
        Case("fp32", "nchw", tokens=32, levels=1),
        Case("bf16", "nchw", place="offset"),
        Case("fp32", "channels_last", place="offset"),
        Case("bf16", "channels_last", place="channels", standard=True),
        Case("fp32", "nchw", place="columns", levels=1),
        Case("fp32", "batch_last", levels=1),
        Case("fp32", "nchw", distance="smooth_l1", levels=3),
        Case("bf16", "channels_last", distance="smooth_l1", standard=True, valid=True),
        Case("fp32", "channels_last", distance="cosine", standard=True, levels=3),
        Case("bf16", "nchw", other_dtype="fp32", distance="cosine", valid=True, power=1),
        Case("fp64", "nchw", distance="cosine", tokens=3, given=True),
        Case("bf16", "channels_last"),
        Case("fp32", "nchw", distance="cosine", valid=True),
        Case("fp32", "nchw", same_channels=40, stages=3),
        Case("bf16", "channels_last", tokens=32, same_channels=40, stages=3),
    ],
    1: [
        Case("fp32", "nchw", tokens=6, levels=2),
        Case("bf16", "channels_last", tokens=6, levels=5, standard=True),
        Case("fp16", "nchw", tokens=8, levels=3, valid=True),
        Case("fp64", "channels_last", tokens=5, levels=2, standard=True, valid=True),
        Case("fp64", "nchw", tokens=1, levels=1, weighted=False),
        Case("fp32", "channels_last", tokens=3, levels=4, weighted=False, standard=True),
        Case("fp32", "nchw", other_layout="channels_last", inputs=False),
        Case("bf16", "channels_last", other_layout="nchw", levels=3),
        Case("fp16", "channels_last", tokens=16, weighted=False, place="channels"),
        Case("bf16", "nchw", tokens=32, same_channels=40),
        Case("fp16", "nchw", tokens=32, same_channels=40, inputs=False),
        Case("bf16", "channels_last", tokens=32, same_channels=40),
        Case("fp32", "nchw", tokens=32, levels=1, inputs=False),
        Case("bf16", "nchw", place="offset"),
        Case("fp32", "channels_last", place="offset", inputs=False),
        Case("fp32", "nchw", place="columns", levels=1),
        Case("fp32", "batch_last", levels=1),
        Case("fp32", "channels_last", same_channels=40, stages=2),
        Case("bf16", "nchw", tokens=32, same_channels=40, stages=3, inputs=False),
    ],
}
# Half of the last place of what enters a product: float32 tokens enter one with half features in two parts
UNITS = {"fp64": 2**-53, "fp32": 2**-24, "fp16": 2**-22, "bf16": 2**-16}
STEPS = 8  # roundings of this size on the way from input to output


def error(got: Tensor, want: Tensor) -> float:
    """The largest, relative to the largest value; infinite for NaN."""
    largest = want.abs().max().item()
    off = (got.double() - want.double()).abs().max().item() / (largest or 1.0)
    return off if off == off else float("inf")


def bounds(case: Case, measured: Measured, want: Outputs) -> dict[str, list[float]]:
    """The error that rounding may make of each output, but for that of its own dtype. It follows from how far the output moves
    in float64, at most, when all inputs, the mask weights and the terms of their gradient are off by a unit, so that sums
    and differences which cancel are allowed more."""
    unit = max(UNITS[dtype] for dtype in (case.dtype, case.other_dtype or case.dtype))
    last = UNITS["fp64" if case.dtype == "fp64" else "fp32"]
    terms = max(math.prod(shape) for shape in case.shapes)  # of a sum over images, channels and pixels
    steps = STEPS + math.sqrt(terms) * last / unit  # its roundings are those of a random walk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "softmax", noisy_softmax(unit))
        moved = [measured("eager", torch.float64, unit) for _ in range(16)]
    return {
        name: [steps * max(error(each[name][i], exact) for each in moved) + STEPS * last for i, exact in enumerate(values)]
        for name, values in want.items()
    }


def launched(stage: int, case: Case) -> set[str]:
    """The kernels that a step takes."""
    if stage == 2:
        return {"distill.forward_kernel", "distill.finish_kernel", "distill.backward_kernel"}
    gated = {"learn.gate_kernel"} if case.weighted and not case.valid else set()
    wanted = {"learn.feature_gradient_kernel"} if case.inputs else set()
    return {"learn.mask_kernel", "learn.token_gradient_kernel"} | gated | wanted


@pytest.mark.parametrize("seed", range(int(os.environ.get("MASKD_PTX_SEEDS", "1"))))
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("stage", "case"), [(stage, case) for stage in CASES for case in CASES[stage]], ids=str)
def test_as_eager_float64(stage: int, case: Case, arch: int, seed: int) -> None:
    torch.manual_seed(seed)
    measured = (stage_1 if stage == 1 else stage_2)(case)
    with virtual_gpu(arch) as gpu, gpu.initcheck(), contextlib.ExitStack() as stack:
        for kernel in tuning.READING if case.stages > 1 else ():
            stack.enter_context(tuning.forced(kernel, tuning.Config(16, 32, 128, case.stages)))
        got = measured("triton")
    assert gpu.launches.keys() == launched(stage, case)
    want = measured("eager", torch.float64)
    for name, allowed in bounds(case, measured, want).items():
        # to its own dtype; a gradient that also comes through the weights of valid pixels: either way, and their sum
        roundings = 3 if name == "features" and case.valid and case.weighted else 1
        for x, exact, bound in zip(got[name], want[name], allowed, strict=True):
            assert error(x, exact) <= bound + roundings * torch.finfo(x.dtype).eps / 2, name


def test_every_kernel_is_launched() -> None:
    entries = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        for name, value in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                entries.add(f"{value.fn.__module__.rpartition('.')[2]}.{value.fn.__name__}")
    assert entries == set().union(*(launched(stage, case) for stage in CASES for case in CASES[stage]))
