"""The paper's formulas, word for word, kept for tests and benchmarks.

Every formula is written as it is printed: ``[N, T, C, H, W]`` tensors are built and the 3x3 convolution is run, all in the
dtype of the features (give float64 for a ground truth, a low precision to measure what rounding alone costs). Gradients
come from plain autograd. Nothing else in the package may use this module.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d, cosine_similarity, smooth_l1_loss

__all__ = [
    "dice",
    "distill_loss",
    "distill_loss_levels",
    "mask_weights",
    "masked_distance",
    "masked_features_and_dice",
    "masks",
]

Weighting = tuple[Tensor, Tensor, Tensor, Tensor]
"""``w3 [C, C, 3, 3]``, ``b3 [C]``, ``w1 [T, C, 1, 1]``, ``b1 [T]``: the mask weighting module of one level."""


def masks(x: Tensor, tokens: Tensor) -> Tensor:
    """``m[n, t, h, w] = sigmoid(sum_c E[t, c] x[n, c, h, w])``."""
    return torch.sigmoid(torch.einsum("tc,nchw->nthw", tokens.to(x.dtype), x))


def mask_weights(x: Tensor, w3: Tensor, b3: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    """``w[n, t] = softmax_t(conv1x1(avgpool(conv3x3(x))))``, padding 1, no activation in between."""
    w3, b3, w1, b1 = (p.to(x.dtype) for p in (w3, b3, w1, b1))
    pooled = adaptive_avg_pool2d(conv2d(x, w3, b3, padding=1), 1)
    return torch.softmax(conv2d(pooled, w1, b1).flatten(1), dim=1)


def masked_distance(
    s: Tensor,
    t: Tensor,
    m: Tensor,
    w: Tensor | None = None,
    *,
    mask_power: int = 2,
    distance: str = "squared",
    beta: float = 1.0,
    eps: float = 1e-12,
) -> Tensor:
    """Stage 2 of one level, with masks ``m [N, T, H, W]`` and weights ``w [N, T]`` (None: 1 / T); see `distill_loss`.

    ``mask_power=1`` puts ``m`` itself before the squared difference, in place of its square. Distances other than
    ``"squared"`` are not the paper's; they are torch's ``smooth_l1_loss`` and ``1 - cosine_similarity``.
    """
    if distance == "squared":
        factor = m if mask_power == 2 else m.sqrt()
        masked = factor[:, :, None] * (s - t)[:, None]  # [N, T, C, H, W]
        weighed = masked.square().sum((2, 3, 4)) / s.shape[1]
    else:
        smooth = distance == "smooth_l1"
        d = smooth_l1_loss(s, t, reduction="none", beta=beta).mean(1) if smooth else 1 - cosine_similarity(s, t, dim=1)
        weighed = (m**mask_power * d[:, None]).sum((2, 3))
    per_token = weighed / (m.sum((2, 3)) + eps)
    per_image = per_token.mean(1) if w is None else (w * per_token).sum(1)
    return per_image.sum() / max(s.shape[0], 1)


def distill_loss_levels(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    weighting: Sequence[Weighting] | None = None,
    *,
    custom_mask: bool = False,
    loss_weight: float = 1.0,
    **options: Any,
) -> Tensor:
    """Stage 2, one loss per level, ``[levels]``; see `distill_loss`."""
    losses = []
    for i, (s, t, e) in enumerate(zip(student, teacher, tokens, strict=True)):
        m = masks(t, e)
        if custom_mask:
            m = m * masks(s, e).detach()
        w = None if weighting is None else mask_weights(t, *weighting[i])
        losses.append(loss_weight * masked_distance(s, t, m, w, **options))
    return torch.stack(losses)


def distill_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    weighting: Sequence[Weighting] | None = None,
    *,
    custom_mask: bool = False,
    loss_weight: float = 1.0,
    **options: Any,
) -> Tensor:
    """Stage 2: ``loss_weight * sum over levels of mean_n sum_t w[n, t] A[n, t] / (C (B[n, t] + eps))``.

    ``A[n, t] = sum_{c, p} (m (s - t))^2``, ``B[n, t] = sum_p m``; ``m = sigmoid(E t)``, with ``custom_mask`` times
    ``stopgrad(sigmoid(E s))``; ``w`` is 1 / T without ``weighting``. ``student``, ``teacher``: ``[N, C_i, H_i, W_i]``,
    ``tokens``: ``[T, C_i]``, one entry per level. An empty batch gives 0. ``options``: those of `masked_distance`.
    """
    return distill_loss_levels(
        student, teacher, tokens, weighting, custom_mask=custom_mask, loss_weight=loss_weight, **options
    ).sum()


def dice(m: Tensor) -> Tensor:
    """``mean over n and i != j of 2 G_ij / (G_ii + G_jj + 2e-12)``, ``G_ij = sum_p m_i m_j``; 0 for one token."""
    n, t = m.shape[:2]
    total = m.sum() * 0
    for i in range(t):
        for j in range(t):
            if i != j:
                shared = (m[:, i] * m[:, j]).sum((1, 2))
                areas = m[:, i].square().sum((1, 2)) + m[:, j].square().sum((1, 2))
                total = total + (2 * shared / (areas + 2e-12)).sum()
    return total / max(n * t * (t - 1), 1)


def masked_features_and_dice(
    x: Tensor, tokens: Tensor, weighting: Weighting | None = None, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Stage 1: ``y = sum_t w[n, t] m[n, t] x[n]`` (without ``weighting``: an unnormalised sum) and the Dice loss of ``m``.

    ``m`` and ``w`` are those of ``seen`` (standardised features) instead of ``x``, where it is given.
    """
    seen = x if seen is None else seen
    m = masks(seen, tokens)
    w = m.new_ones(m.shape[:2]) if weighting is None else mask_weights(seen, *weighting)
    masked = w[:, :, None, None, None] * m[:, :, None] * x[:, None]  # [N, T, C, H, W]
    return masked.sum(1), dice(m)
