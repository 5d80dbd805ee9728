"""The tensors of a case: a pure function of it, and of ``MASKD_TEST_SEED``, which shifts every seed."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskd_triton import MaskLearner
from tests.cases import DTYPES, Case
from tests.helpers import SEED, draw_parameters, in_layout, moved

# Decimal exponents of "huge" and "tiny" features: from those whose squares a dtype's sums can still hold to those they cannot.
_EXPONENTS = {"fp16": (2, 4), "bf16": (5, 20), "fp32": (5, 20), "fp64": (5, 160)}
_LISTS = ("teacher", "student", "masks", "mask_weights", "upstream")
_TOKEN_SCALES = {"trained": 1.0, "untrained": 0.01, "zeros": 0.0, "saturating": 100.0}
# sigmoid(-1e4) is 0 in float64, too; kernels take tokens beside float16 features up to 65504
_FIXED = {"open": 6e4, "closed": -1e4, "one closed": -1e4}
_EXPANDED = ("expanded images", "expanded channels", "expanded pixels")
_STRIDED = ("channels_last", "batch_last", "offset", "channels of more", "columns of more", "rows and columns swapped")


@dataclass
class Given:
    """What a case gives to the library: a list has an entry per level.

    Attributes:
        learner: tokens, mask weights and statistics.
        student: empty in stage 1.
        align: weight and bias, empty without.
        upstream: of the losses in stage 2, of the masked features in stage 1.
    """

    case: Case
    learner: MaskLearner
    teacher: list[Tensor]
    student: list[Tensor]
    align: list[tuple[Tensor, Tensor]]
    valid: Tensor | None
    masks: list[Tensor]
    mask_weights: list[Tensor]
    upstream: list[Tensor]

    def on(self, device: str) -> "Given":
        """The same there, with strides and offsets."""
        lists = {name: [moved(x, device) for x in getattr(self, name)] for name in _LISTS}
        align = [(weight.to(device), bias.to(device)) for weight, bias in self.align]
        valid = None if self.valid is None else self.valid.to(device)
        return replace(self, learner=copy.deepcopy(self.learner).to(device), align=align, valid=valid, **lists)

    def tensors(self) -> list[Tensor]:
        """All of them, but for those of the learner."""
        own = [x for name in _LISTS for x in getattr(self, name)]
        return [*own, *(x for pair in self.align for x in pair), *([] if self.valid is None else [self.valid])]


@torch.no_grad()
def given_by(case: Case) -> Given:
    """Every tensor of the case."""
    generator = torch.Generator().manual_seed(case.seed + 7919 * SEED)
    learner = _learned(case, generator)
    given = Given(case, learner, [], [], [], _valid_pixels(case, generator), [], [], [])
    for i, (c, h, w) in enumerate(case.levels):
        t = _features(case.teacher.values, case.teacher.dtype, (case.images, c, h, w), generator)
        if case.standardize:
            module = learner.mask_modules[i]
            t = t * module.channel_std[:, None, None].double() + module.channel_mean[:, None, None].double()
        t = counted(t.to(DTYPES[case.teacher.dtype]), given.valid, float(case.rubbish))
        given.teacher.append(placed(t, case.teacher.layout))
        if case.stage == 1:
            given.upstream.append(_upstream_of_features(case, (c, h, w), generator))
        else:
            _distillation(given, i, generator)
    if case.stage == 2:
        given.upstream.append(_upstream_of_losses(case, generator))
    return given


def _distillation(given: Given, i: int, generator: torch.Generator) -> None:
    """The student's features of a level, its align, its masks and their weights."""
    case, (c, h, w) = given.case, given.case.levels[i]
    h, w = case.sizes[i % len(case.sizes)] if case.resize else (h, w)
    s = _features(case.student.values, case.student.dtype, (case.images, case.align or c, h, w), generator)
    if case.student.values in ("equal", "near"):
        s = given.teacher[i].double() + 1e-3 * (case.student.values == "near") * s
    given.student.append(
        placed(counted(s.to(DTYPES[case.student.dtype]), given.valid, float(case.rubbish)), case.student.layout)
    )
    if case.align:
        weight = case.align**-0.5 * torch.randn(c, case.align, 1, 1, generator=generator)
        given.align.append((weight.to(case.precise), torch.randn(c, generator=generator).to(case.precise)))
    if case.masks:
        h, w = given.student[i].shape[2:] if case.resize == "teacher" else given.teacher[i].shape[2:]
        m = 2 * torch.rand(1 if case.masks == "expanded" else case.images, case.tokens, h, w, generator=generator)
        m = (m > 1).to(m.dtype) if case.masks in ("boxes", "bool") else m
        spoiled = counted(m.expand(case.images, -1, -1, -1), given.valid, float(case.rubbish)).to(case.precise)
        given.masks.append(m.expand(case.images, -1, -1, -1) > 0 if case.masks == "bool" else spoiled)
    if case.mask_weights:
        given.mask_weights.append(torch.rand(case.images, case.tokens, generator=generator).to(case.precise))


def placed(x: Tensor, layout: str) -> Tensor:
    """``x`` in a layout of ``cases.LAYOUTS``: beside NaN where it is part of more; expanded, its first images or others."""
    n, c, h, w = x.shape

    def nan(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=x.dtype)

    if layout in _EXPANDED:
        return {"images": x[:1], "channels": x[:, :1], "pixels": x[:, :, :1, :1]}[layout.split()[1]].clone().expand(x.shape)
    if layout == "offset":
        whole = nan(x.numel() + 3)[3:].view(x.shape)
    elif layout == "channels of more":
        whole = nan(n, c + 3, h, w)[:, 2 : 2 + c]
    elif layout == "columns of more":
        whole = nan(n, c, h, w + 3)[..., 1 : 1 + w]
    elif layout == "every second channel":
        whole = nan(n, 2 * c, h, w)[:, ::2]
    elif layout == "rows and columns swapped":
        whole = nan(n, c, w, h).transpose(2, 3)
    else:
        return in_layout(x, layout)
    return whole.copy_(x)


def _features(values: str, dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """In float64, to be rounded to the dtype."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    low, high = _EXPONENTS[dtype]
    exponent = low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64)
    if values in ("zeros", "ones"):
        return torch.full_like(x, float(values == "ones"))
    if values == "far from zero":
        return 100 + x
    if values in ("huge", "tiny"):
        return x * 10 ** (exponent if values == "huge" else -exponent)
    if values == "images of all sizes":
        return x * (10.0 ** torch.arange(-2, shape[0] - 2, dtype=torch.float64)).view(-1, 1, 1, 1)
    if values in ("inf", "nan") and x.numel():
        at = torch.randint(x.numel(), (1,), generator=generator)
        x.view(-1)[at] = float(values)
    return x


def _learned(case: Case, generator: torch.Generator) -> MaskLearner:
    """Statistics of channels of very different size and offset."""
    learner = MaskLearner([c for c, *_ in case.levels], case.tokens, case.weighted, standardize=case.standardize or False)
    draw_parameters(learner, generator)
    for module in learner.mask_modules:
        token = module.mask_token.detach()
        token.mul_(_TOKEN_SCALES.get(case.learned, 1.0))
        if case.learned in _FIXED:
            token[: 1 if case.learned == "one closed" else None] = _FIXED[case.learned]
        if case.standardize:
            channels = 1 if case.standardize == "isotropic" else module.channels
            module.channel_std.copy_(10 ** (2 * torch.rand(channels, generator=generator) - 1))
            module.channel_mean.copy_(3 * module.channel_std * torch.randn(module.channels, generator=generator))
            module.pixels_seen.fill_(1)
    return learner.double() if case.precise == torch.float64 else learner


def _valid_pixels(case: Case, generator: torch.Generator) -> Tensor | None:
    """``[N, H0, W0]`` at twice the first level's size."""
    n, (h, w) = case.images, (2 * x for x in case.levels[0][1:])
    if not case.valid:
        return None
    if case.valid in ("all", "none"):
        return torch.full((n, h, w), case.valid == "all")
    if case.valid == "pixels":
        return torch.rand(n, h, w, generator=generator) > 0.4
    valid = torch.zeros(n, h, w, dtype=torch.int64)
    for image in valid:
        top, left, rows, columns = (int(torch.randint(0, most + 1, (), generator=generator)) for most in (h // 2, w // 2, h, w))
        if case.valid == "letterbox":  # in the middle of padding
            image[top : top + rows, left : left + columns] = 1
        else:
            image[:rows, :columns] = 1
    return valid


def counted(x: Tensor, valid: Tensor | None, rubbish: float) -> Tensor:
    """``x`` with ``rubbish`` where no pixel counts."""
    if valid is None:
        return x
    own = torch.nn.functional.interpolate((valid != 0).to(torch.uint8)[:, None], x.shape[2:], mode="nearest")
    return torch.where(own != 0, x, rubbish)


def _upstream_of_features(case: Case, level: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    layouts = {"expanded": _EXPANDED, "strided": _STRIDED}.get(case.upstream, ("nchw",))
    g = torch.randn((case.images, *level), generator=generator) / level[0]
    layout = layouts[int(torch.randint(len(layouts), (), generator=generator))]
    return placed((g * (case.upstream != "zeros")).to(DTYPES[case.teacher.dtype]), layout)


def _upstream_of_losses(case: Case, generator: torch.Generator) -> Tensor:
    """A scalar where they are summed."""
    g = torch.randn(len(case.levels), generator=generator).to(case.precise)
    if case.reduction == "sum":
        return g[0]
    if case.upstream == "expanded":
        return g[:1].expand(len(g))
    if case.upstream == "strided":
        return torch.stack([g, g * 100], 1)[:, 0]
    return g * (case.upstream != "zeros")
