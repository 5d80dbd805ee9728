"""What a user could pick, for each stage, all as ``contender(inputs) -> outputs``: in stage 2 the loss, in stage 1 the masked
features of every level and the sum of the Dice losses."""

from collections.abc import Callable

import torch
from torch import Tensor

from maskd_triton import _eager, reference
from maskd_triton import functional as F

from .workloads import Inputs

Contender = Callable[[Inputs], list[Tensor]]


def ours(x: Inputs, impl: str = "auto") -> list[Tensor]:
    if x.stage == 2:
        return [F.masked_distill_loss(x.student, x.teacher, x.tokens, x.composed, custom_mask=True, impl=impl)]
    composed = [F.compose_weighting(*level) for level in x.weighting]
    masked, dice = F.masked_features_and_dice(x.teacher, x.tokens, composed, impl=impl)
    return [*masked, dice.sum()]


def ours_eager(x: Inputs) -> list[Tensor]:
    return ours(x, impl="eager")


def literal(x: Inputs) -> list[Tensor]:
    """The formulas as printed: ``[N, T, C, H, W]`` tensors and a 3x3 convolution per level."""
    if x.stage == 2:
        return [reference.distill_loss(x.student, x.teacher, x.tokens, x.weighting, custom_mask=True).sum()]
    levels = zip(x.teacher, x.tokens, x.weighting, strict=True)
    masked, dice = zip(*(reference.masked_features_and_dice(*level) for level in levels), strict=True)
    return [*masked, torch.stack(dice).sum()]


def plain(x: Inputs) -> list[Tensor]:
    """Our algebra in plain PyTorch, under autograd: what a careful user writes, and torch.compile can fuse."""
    return [_plain_loss(x)] if x.stage == 2 else _plain_features(x)


def _plain_features(x: Inputs) -> list[Tensor]:
    masked, total = [], x.teacher[0].new_zeros((), dtype=torch.float32)
    for t, tokens, weighting in zip(x.teacher, x.tokens, x.weighting, strict=True):
        flat, (_, _, h, w) = t.flatten(2), t.shape
        m = _eager.masks(flat, tokens)
        weights = _eager.weights(flat, *F.compose_weighting(*weighting), h, w)
        masked.append((flat * torch.einsum("nt,ntp->np", weights, m)[:, None]).to(t.dtype).unflatten(2, (h, w)))
        total = total + F.dice_loss(m[:, :, None])
    return [*masked, total]


def _plain_loss(x: Inputs) -> Tensor:
    total = x.student[0].new_zeros((), dtype=torch.float32)
    for s, t, tokens, (rows, bias) in zip(x.student, x.teacher, x.tokens, x.composed, strict=True):
        n, c, h, w = s.shape
        with torch.no_grad():
            flat = t.flatten(2)
            m = _eager.masks(flat, tokens) * _eager.masks(s.flatten(2), tokens)
            weights = _eager.weights(flat, rows, bias, h, w)
            pixel = torch.einsum("ntp,ntp,nt->np", m, m, weights / (n * c * (m.sum(2) + 1e-12)))
        d = (s.float() - t.float()).square().sum(1).flatten(1)
        total = total + (pixel * d).sum()
    return total


def mse(x: Inputs) -> list[Tensor]:
    """Plain feature MSE: the cheapest loss there is, a bound on what masks may cost."""
    pairs = zip(x.student, x.teacher, strict=True)
    return [torch.stack([torch.nn.functional.mse_loss(s.float(), t.float()) for s, t in pairs]).sum()]


SAME_RESULT: dict[str, Contender] = {"ours": ours, "ours, impl=eager": ours_eager, "literal": literal, "plain": plain}
CONTENDERS: dict[int, dict[str, Contender]] = {1: SAME_RESULT, 2: SAME_RESULT | {"feature MSE": mse}}
