"""The tensors of a case: a pure function of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from maskd_triton import MaskLearner
from tests.fuzz.cases import DTYPES, Case, Distillation
from tests.helpers import in_layout
from tests.problems import draw_parameters

# Decimal exponents of "huge" and "tiny" features: from those whose squares a dtype's sums can still hold to those they cannot.
_EXPONENTS = {"fp16": (2, 4), "bf16": (5, 20), "fp32": (5, 20), "fp64": (5, 160)}
_TOKEN_SCALES = {"trained": 1.0, "untrained": 0.01, "zeros": 0.0, "saturating": 100.0}


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

    @property
    def precise(self) -> torch.dtype:
        """Of sums and losses."""
        return torch.float64 if self.case.teacher.dtype == "fp64" else torch.float32

    def tensors(self) -> list[Tensor]:
        """All of them, but for those of the learner."""
        own = [*self.teacher, *self.student, *self.masks, *self.mask_weights, *self.upstream]
        return [*own, *(x for pair in self.align for x in pair), *([] if self.valid is None else [self.valid])]


def placed(x: Tensor, layout: str) -> Tensor:
    """``x`` in a layout of ``cases.LAYOUTS``: beside NaN where it is part of more; expanded, its first images or others."""
    n, c, h, w = x.shape

    def nan(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=x.dtype)

    if layout.startswith("expanded"):
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


def features(values: str, dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
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


def learned(case: Case, generator: torch.Generator) -> MaskLearner:
    learner = MaskLearner([c for c, *_ in case.levels], case.tokens, case.weighted, standardize=case.standard)
    draw_parameters(learner, generator)
    for module in learner.mask_modules:
        module.mask_token.detach().mul_(_TOKEN_SCALES[case.learned])
        if case.standard:
            module.channel_std.copy_(10 ** (2 * torch.rand(module.channels, generator=generator) - 1))
            module.channel_mean.copy_(3 * module.channel_std * torch.randn(module.channels, generator=generator))
            module.pixels_seen.fill_(1)
    return learner.double() if case.teacher.dtype == "fp64" else learner


def valid_pixels(case: Case, generator: torch.Generator) -> Tensor | None:
    """``[N, H0, W0]`` at twice the first level's size."""
    n, (h, w) = case.images, (2 * x for x in case.levels[0][1:])
    if case.valid in ("all", "none"):
        return torch.full((n, h, w), case.valid == "all")
    if case.valid == "pixels":
        return torch.rand(n, h, w, generator=generator) > 0.4
    if not case.valid:
        return None
    valid = torch.zeros(n, h, w, dtype=torch.int64)
    for image in valid:
        rows, columns = (int(torch.randint(0, most + 1, (), generator=generator)) for most in (h, w))
        image[:rows, :columns] = 1
    return valid


def of_level(valid: Tensor | None, x: Tensor) -> Tensor | None:
    """``[N, 1, H, W]``: which pixels of ``x`` count."""
    if valid is None:
        return None
    return torch.nn.functional.interpolate((valid != 0).to(torch.uint8)[:, None], x.shape[2:], mode="nearest") != 0


def spoiled(x: Tensor, given: Given) -> Tensor:
    """``x`` with rubbish in its padding."""
    counted = of_level(given.valid, x)
    return x if counted is None else torch.where(counted, x, float(given.case.rubbish))


def upstream_of(case: Case, level: tuple[int, int, int] | None, generator: torch.Generator) -> Tensor:
    """Of a level's masked features, or of the losses; of these a scalar where they are summed."""
    precise = torch.float64 if case.teacher.dtype == "fp64" else torch.float32
    if level is not None:
        layout = {"expanded": LAYOUTS_EXPANDED, "strided": LAYOUTS_STRIDED}.get(case.upstream, ("nchw",))
        g = torch.randn((case.images, *level), generator=generator) / level[0]
        chosen = layout[int(torch.randint(len(layout), (), generator=generator))]
        return placed((g * (case.upstream != "zeros")).to(DTYPES[case.teacher.dtype]), chosen)
    g = torch.randn(len(case.levels), generator=generator).to(precise)
    if isinstance(case, Distillation) and case.reduction == "sum":
        return g[0]
    if case.upstream == "expanded":
        return g[:1].expand(len(g))
    if case.upstream == "strided":
        return torch.stack([g, g * 100], 1)[:, 0]
    return g * (case.upstream != "zeros")


LAYOUTS_EXPANDED = ("expanded images", "expanded channels", "expanded pixels")
LAYOUTS_STRIDED = ("channels_last", "batch_last", "offset", "channels of more", "columns of more", "rows and columns swapped")


@torch.no_grad()
def given_by(case: Case) -> Given:
    """Every tensor of the case."""
    generator = torch.Generator().manual_seed(case.seed)
    learner = learned(case, generator)
    given = Given(case, learner, [], [], [], valid_pixels(case, generator), [], [], [])
    for i, (c, h, w) in enumerate(case.levels):
        t = features(case.teacher.values, case.teacher.dtype, (case.images, c, h, w), generator)
        if case.standard:
            module = learner.mask_modules[i]
            t = t * module.channel_std[:, None, None].double() + module.channel_mean[:, None, None].double()
        t = spoiled(t.to(DTYPES[case.teacher.dtype]), given)
        given.teacher.append(placed(t, case.teacher.layout))
        if not isinstance(case, Distillation):
            given.upstream.append(upstream_of(case, (c, h, w), generator))
            continue
        shape = (case.images, case.student_channels or c, *(case.sizes[i] if case.sizes else (h, w)))
        s = features(case.student.values, case.student.dtype, shape, generator)
        if case.student.values in ("equal", "near"):
            near = 1e-3 * (case.student.values == "near")
            s = given.teacher[i].double() + near * s
        s = spoiled(s.to(DTYPES[case.student.dtype]), given)
        given.student.append(placed(s, case.student.layout))
        if case.student_channels:
            fan_in = case.student_channels**-0.5
            parameters = fan_in * torch.randn(c, shape[1], 1, 1, generator=generator), torch.randn(c, generator=generator)
            given.align.append((parameters[0].to(given.precise), parameters[1].to(given.precise)))
        if case.masks:
            h, w = given.student[i].shape[2:] if case.resize == "teacher" else (h, w)
            m = 2 * torch.rand(1 if case.masks == "expanded" else case.images, case.tokens, h, w, generator=generator)
            m = (m > 1).float() if case.masks == "boxes" else m
            given.masks.append(spoiled(m.expand(case.images, -1, -1, -1), given).to(given.precise))
        if case.mask_weights:
            given.mask_weights.append(torch.rand(case.images, case.tokens, generator=generator).to(given.precise))
    if isinstance(case, Distillation):
        given.upstream.append(upstream_of(case, None, generator))
    return given
