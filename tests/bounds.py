"""How far a result may be from the formulas in float64: what is summed says so, not what one run happened to give on one CPU.

Every factor of every sum is moved by up to `UNITS_OF_TERMS` units in the last place of the dtype that sums are taken in, in the
literal formulas in float64. How far that moves a result, at the most of `SAMPLES` draws, is what roundings may cost, however
a sum is arranged: much where terms are many or cancel, little where they do not. To it comes the rounding of sums, and of what
is stored in half precision. So a bound is a function of the case and its seed alone, the same on every host.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from maskd_triton import reference

UNITS_OF_TERMS = 64
UNITS_OF_HALVES = 8  # half units of what torch rounds to half precision on the way: aligned and resized features
SAMPLES = 3
UNITS_OF_SUMS = {torch.float32: 8, torch.float64: 100}  # of the largest value; in float64, of the formulas themselves, too


def unit_of(precise: torch.dtype, impl: str, dtypes: Sequence[str]) -> float:
    """Half a unit in the last place of sums; a factor enters a kernel's product with bfloat16 features with 16 bits."""
    if impl == "triton" and "bf16" in dtypes:
        return 2.0**-17
    return torch.finfo(precise).eps / 2


def bound(want: Tensor, moved: Sequence[Tensor], unit: float, units: float, last: float = 0.0) -> float:
    """The largest error that ``want`` may have.

    Args:
        want: the result in float64.
        moved: the same with all that is summed off by units in the last place, see `Moved`.
        unit: half a unit in the last place of sums.
        units: as many as sums may be off, relative to the largest value.
        last: relative error of a result that is rounded to half precision.
    """
    if not want.numel():
        return 0.0
    largest = max((x - want).abs().nan_to_num().max().item() for x in moved)
    return largest + (units * unit + last) * want.abs().max().item()


class Moved:
    """``with Moved(unit, seed):`` the formulas of ``reference`` compute with all that they sum off by up to 64 ``unit``.

    Also a function: ``x`` with every element moved by a random part of ``units`` times ``unit`` of itself, or of ``size``.
    """

    def __init__(self, unit: float, seed: int, standardised: bool = False, resized: float = 0.0) -> None:
        """``resized``: relative error of resized features, which are rounded to their dtype."""
        self.unit, self.standard, self.rounded = unit, standardised, resized
        self.generator = torch.Generator().manual_seed(seed)
        self.sizes: dict[int, tuple[Tensor, Tensor]] = {}  # of standardised features: those of the terms of x - mean
        self.patch = pytest.MonkeyPatch()

    def __call__(self, x: Tensor, size: Tensor | None = None, units: float = UNITS_OF_TERMS) -> Tensor:
        by = units * self.unit * (2 * torch.rand(x.shape, generator=self.generator, dtype=torch.float64) - 1)
        return x * (1 + by) if size is None else x + by * size

    def gradient(self, y: Tensor, units: float) -> Tensor:
        """``y`` as it is, whose gradient is moved."""
        moved = self(y, units=units)
        return moved - (moved - y).detach()

    def __enter__(self) -> "Moved":
        for function in (
            self.standardised,
            self.resized,
            self.masks,
            self.weight_logits,
            self.mask_weights,
            self.masked_distance,
        ):
            name = function.__name__
            self.patch.setattr(reference, name, _with(function, getattr(reference, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()

    def size(self, x: Tensor) -> Tensor:
        return self.sizes[id(x)][1] if id(x) in self.sizes else x.abs()

    def standardised(self, formula: Callable[..., Tensor], x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        y = formula(x, mean, std)
        self.sizes[id(y)] = y, (x.abs() + mean.abs()[:, None, None]) / std[:, None, None]
        return y

    def resized(self, formula: Callable[..., Any], x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor | None]:
        (y, near), half = formula(self(x), *others), UNITS_OF_HALVES * self.rounded / self.unit
        return self.gradient(self(y, units=half), half), near

    def masks(self, formula: Callable[..., Tensor], x: Tensor, tokens: Tensor) -> Tensor:
        m = self(formula(self(x, self.size(x)), self(tokens.to(x.dtype))))
        logits = torch.einsum("tc,nchw->nthw", tokens.to(x.dtype), x)
        # 1 - m, a factor of the gradient, has the error of m
        return m + (self(m) - m).detach() * (logits - logits.detach()).nan_to_num()

    def weight_logits(self, formula: Callable[..., Tensor], x: Tensor, *convs: Any) -> Tensor:
        (w3, b3, w1, b1), valid = (p.to(x.dtype) for p in convs[:4]), convs[4]
        inside = torch.ones_like(x[:, :1], dtype=torch.bool) if valid is None else valid
        moved, size = self(w3), torch.where(inside, self.size(x), 0)
        # the sums of all taps over all pixels, of which those outside are taken off again: their rounding stays
        outside = torch.einsum("oikl,ni->no", moved - w3, size.sum((2, 3)) / inside.sum((2, 3)))
        x, b3, w1, b1 = self(x, size), self(b3), self(w1), self(b1)
        one = [formula(x[n : n + 1], moved, b3 + outside[n], w1, b1, inside[n : n + 1]) for n in range(len(x))]
        return torch.cat(one) if one else formula(x, moved, b3, w1, b1)

    def mask_weights(self, _: Callable[..., Tensor], x: Tensor, *convs: Any) -> Tensor:
        scores = reference.weight_logits(x, *convs[:4], convs[4] if len(convs) > 4 else None)
        w = torch.softmax(scores, 1)
        # off forward, and in the gradient, where it is a difference of the weights' gradients
        return w + (self(w) - w).detach() * (1 + scores - scores.detach())

    def masked_distance(
        self, formula: Callable[..., Tensor], s: Tensor, t: Tensor, m: Tensor, w: Tensor | None = None, **options: Any
    ) -> Tensor:
        if options.get("distance") != "cosine":
            return formula(s, self(t, units=4) if self.standard else t, m, w, **options)
        s, t = self(s), self(t)  # a difference of directions, not of features
        # 1 less a number near 1, whose gradient is a difference, too
        share = m ** options["mask_power"] / (m.sum((2, 3), keepdim=True) + options["eps"])
        share = share.mean(1) if w is None else torch.einsum("nt,nthw->nhw", w, share)
        direction = s / s.detach().norm(dim=1, keepdim=True).clamp(min=1e-8)
        off = (share * (self(direction) - direction).sum(1)).sum() / max(len(s), 1)
        return formula(s, t, m, w, **options) + off

    def aligned(self, x: Tensor, weight: Tensor, bias: Tensor, half: float) -> Tensor:
        """A 1x1 convolution; ``half``: relative error of what is rounded to half precision, its parameters and its output."""
        units = UNITS_OF_TERMS + UNITS_OF_HALVES * half / self.unit
        y = conv2d(x, self(weight, units=units), self(bias, units=units))
        return self.gradient(self(y, units=units), units)


def _with(function: Callable[..., Any], formula: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: function(formula, *args, **options)
