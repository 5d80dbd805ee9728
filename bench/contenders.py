"""What a user could pick for stage 2, all as ``loss(inputs) -> scalar``."""

from collections.abc import Callable

import torch
from torch import Tensor

from maskd_triton import _eager, reference
from maskd_triton import functional as F

from .workloads import Inputs

Contender = Callable[[Inputs], Tensor]


def ours(x: Inputs, impl: str = "auto") -> Tensor:
    return F.masked_distill_loss(x.student, x.teacher, x.tokens, x.composed, custom_mask=x.custom_mask, impl=impl)


def ours_eager(x: Inputs) -> Tensor:
    return ours(x, impl="eager")


def literal(x: Inputs) -> Tensor:
    """The formulas as printed: four ``[N, T, C, H, W]`` tensors and a 3x3 convolution per level."""
    return reference.distill_loss(x.student, x.teacher, x.tokens, x.weighting, custom_mask=x.custom_mask)


def collapsed(x: Inputs) -> Tensor:
    """The collapsed algebra under plain autograd: what a careful user writes, and torch.compile can fuse."""
    total = x.student[0].new_zeros((), dtype=torch.float32)
    for s, t, tokens, (rows, bias) in zip(x.student, x.teacher, x.tokens, x.composed, strict=True):
        n, c, h, w = s.shape
        with torch.no_grad():
            flat = t.flatten(2)
            m = _eager.masks(flat, tokens)
            if x.custom_mask:
                m = m * _eager.masks(s.flatten(2), tokens)
            weights = _eager.weights(flat, rows, bias, h, w)
            pixel = torch.einsum("ntp,ntp,nt->np", m, m, weights / (n * c * (m.sum(2) + 1e-12)))
        d = (s.float() - t.float()).square().sum(1).flatten(1)
        total = total + (pixel * d).sum()
    return total


def mse(x: Inputs) -> Tensor:
    """Plain feature MSE: the cheapest loss there is, a bound on what masks may cost."""
    pairs = zip(x.student, x.teacher, strict=True)
    return torch.stack([torch.nn.functional.mse_loss(s.float(), t.float()) for s, t in pairs]).sum()


CONTENDERS: dict[str, Contender] = {
    "ours": ours,
    "ours, impl=eager": ours_eager,
    "literal": literal,
    "collapsed": collapsed,
    "feature MSE": mse,
}
SAME_LOSS = ("ours", "ours, impl=eager", "literal", "collapsed")
