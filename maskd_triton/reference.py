"""The paper's formulas, word for word, kept for tests and benchmarks.

Every formula is written as printed: ``[N, T, C, H, W]`` tensors are built and the 3x3 convolution is run, all in the
dtype of the features (give float64 for a ground truth, a low precision to measure what rounding alone costs). Gradients
come from plain autograd. Nothing else in the package may use this module.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d, cosine_similarity, interpolate, smooth_l1_loss

__all__ = [
    "dice",
    "distill_loss",
    "mask_weights",
    "masked_distance",
    "masked_features_and_dice",
    "masks",
    "resized",
    "standardised",
    "valid_box",
    "weight_logits",
]

Weighting = tuple[Tensor, Tensor, Tensor, Tensor]
"""``w3 [C, C, 3, 3]``, ``b3 [C]``, ``w1 [T, C, 1, 1]``, ``b1 [T]``: the mask weighting module of one level."""

Statistics = tuple[Tensor, Tensor]
"""``mean [C]`` and ``std [C]``: of the channels of one level."""


def standardised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``(x[n, c, h, w] - mean[c]) / std[c]``."""
    return (x - mean.to(x.dtype)[:, None, None]) / std.to(x.dtype)[:, None, None]


def masks(x: Tensor, tokens: Tensor) -> Tensor:
    """``m[n, t, h, w] = sigmoid(sum_c E[t, c] x[n, c, h, w])``."""
    return torch.sigmoid(torch.einsum("tc,nchw->nthw", tokens.to(x.dtype), x))


def resized(x: Tensor, like: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """``x`` in the height and width of ``like``, by bilinear interpolation.

    Pixels that are not ``valid [N, 1, H, W]`` have no part in it; and which pixels of ``like`` have a valid one near."""
    if valid is None:
        return (x if x.shape[2:] == like.shape[2:] else interpolate(x, like.shape[2:], mode="bilinear")), None
    values = interpolate(torch.where(valid, x, 0), like.shape[2:], mode="bilinear")
    weight = interpolate(valid.to(x.dtype), like.shape[2:], mode="bilinear")
    return values / torch.where(weight > NEAR, weight, 1), weight > NEAR


NEAR = 1e-3  # a weight that is 0 but for rounding is not near


def mask_weights(x: Tensor, w3: Tensor, b3: Tensor, w1: Tensor, b1: Tensor, valid: Tensor | None = None) -> Tensor:
    """``w[n, t] = softmax_t(conv1x1(avgpool(conv3x3(x))))``, padding 1, no activation in between.

    Pixels that are not ``valid [N, 1, H, W]`` are padding, too: 0 for the convolution and not averaged.
    """
    return torch.softmax(weight_logits(x, w3, b3, w1, b1, valid), dim=1)


def weight_logits(x: Tensor, w3: Tensor, b3: Tensor, w1: Tensor, b1: Tensor, valid: Tensor | None = None) -> Tensor:
    """``[N, T]``, of which `mask_weights` takes the softmax."""
    w3, b3, w1, b1 = (p.to(x.dtype) for p in (w3, b3, w1, b1))
    if valid is None:
        pooled = adaptive_avg_pool2d(conv2d(x, w3, b3, padding=1), 1)
    else:
        seen = conv2d(torch.where(valid, x, 0), w3, b3, padding=1)
        pooled = torch.where(valid, seen, 0).sum((2, 3), keepdim=True) / valid.sum((2, 3), keepdim=True)
    return conv2d(pooled, w1, b1).flatten(1)


def valid_box(valid: Tensor, height: int, width: int) -> tuple[slice, slice, Tensor]:
    """What of a level ``[.., height, width]`` one image's ``valid [H0, W0]`` says: rows and columns of the smallest box around
    its valid pixels (nearest neighbour), and ``[1, 1, rows, columns]``, the valid ones of the box."""
    own = interpolate((valid != 0).to(torch.uint8)[None, None], (height, width), mode="nearest")[0, 0] != 0
    rows, columns = (own.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    row, column = (slice(min(at, default=0), max(at, default=-1) + 1) for at in (rows, columns))
    return row, column, own[None, None, row, column]


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
        if distance == "smooth_l1":
            d = smooth_l1_loss(s, t, reduction="none", beta=beta).mean(1)
        elif distance == "cosine":
            d = 1 - cosine_similarity(s, t, dim=1)
        else:
            raise NotImplementedError(f"distance {distance!r}")
        weighed = (m**mask_power * d[:, None]).sum((2, 3))
    per_token = weighed / (m.sum((2, 3)) + eps)
    per_image = per_token.mean(1) if w is None else (w * per_token).sum(1)
    return per_image.sum() / max(s.shape[0], 1)


def distill_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor] | None = None,
    weighting: Sequence[Weighting] | None = None,
    *,
    standardize: Sequence[Statistics] | None = None,
    masks: Sequence[Tensor] | None = None,
    mask_weights: Sequence[Tensor] | None = None,
    valid: Tensor | None = None,
    resize: str | None = None,
    loss_weight: float | Tensor = 1.0,
    **options: Any,
) -> Tensor:
    """Stage 2, ``[levels]``: ``loss_weight * mean_n sum_t w[n, t] A[n, t] / (C (B[n, t] + eps))`` of every level.

    ``A[n, t] = sum_{c, p} (m (s - t))^2``, ``B[n, t] = sum_p m``; ``m = sigmoid(E t)``, with ``custom_mask`` times
    ``stopgrad(sigmoid(E s))``; ``w`` is 1 / T without ``weighting``. ``student``, ``teacher``: ``[N, C_i, H_i, W_i]``,
    ``tokens``: ``[T, C_i]``, one entry per level. An empty batch gives 0. ``options``: ``custom_mask``, and the options of
    `masked_distance`. What is not the paper's:

    - ``standardize``: mean and std of every level's channels; ``t`` is standardised before anything else.
    - ``masks``, ``mask_weights``: ``m`` and ``w`` of every level, given.
    - ``valid [N, H0, W0]``: every image is cut to the box around its valid pixels, at either's size; then the mean is taken.
    - ``resize``: "student" or "teacher", which is resized to the other's size (bilinear), cut before.
    """
    losses = []
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        given = (None if levels is None else levels[i] for levels in (tokens, weighting, standardize, masks, mask_weights))
        level = _Level(*given)  # type: ignore[arg-type]
        if valid is None:
            losses.append(_level_loss(s, t, level, (None, None), resize, **options))
        else:
            losses.append(_loss_of_cut_images(s, t, level, valid, resize, **options))
    return loss_weight * torch.stack(losses)


class _Level(NamedTuple):
    tokens: Tensor | None
    weighting: Weighting | None
    statistics: Statistics | None
    masks: Tensor | None
    weights: Tensor | None


def _loss_of_cut_images(s: Tensor, t: Tensor, level: _Level, valid: Tensor, resize: str | None, **options: Any) -> Tensor:
    """The mean over images, each alone and cut to the box around its valid pixels; 0 for one that has none."""
    loss = s[:0].sum()
    for n, own in enumerate(valid):
        s_row, s_column, s_valid = valid_box(own, *s.shape[2:])
        t_row, t_column, t_valid = valid_box(own, *t.shape[2:])
        row, column = (s_row, s_column) if resize == "teacher" else (t_row, t_column)
        one = slice(n, n + 1)
        m = None if level.masks is None else level.masks[one, :, row, column]
        w = None if level.weights is None else level.weights[one]
        if s_valid.numel() and t_valid.numel():
            cut = s[one, :, s_row, s_column], t[one, :, t_row, t_column]
            loss = loss + _level_loss(*cut, level._replace(masks=m, weights=w), (s_valid, t_valid), resize, **options)
    return loss / max(len(valid), 1)


def _level_loss(
    s: Tensor,
    t: Tensor,
    level: _Level,
    both_valid: tuple[Tensor | None, Tensor | None],
    resize: str | None,
    custom_mask: bool = False,
    **options: Any,
) -> Tensor:
    """Stage 2 of one level; pixels of either that are not valid, ``[N, 1, H, W]``, count nothing."""
    (s_valid, valid), near = both_valid, None
    if resize == "student":
        s, near = resized(s, t, s_valid)
    if resize == "teacher":
        (t, near), valid = resized(t, s, valid), s_valid
    if valid is not None:
        valid = valid if near is None else valid & near
        s, t = torch.where(valid, s, 0), torch.where(valid, t, 0)
    if level.statistics is not None:
        t = standardised(t, *level.statistics)
    m, w = level.masks, level.weights
    if m is None:
        assert level.tokens is not None
        m = masks(t, level.tokens)
        if custom_mask:
            m = m * masks(s, level.tokens).detach()
    if w is None and level.weighting is not None:
        w = mask_weights(t, *level.weighting, valid)
    if valid is not None:
        m = torch.where(valid, m, 0)
    return masked_distance(s, t, m, w, **options)


def dice(m: Tensor) -> Tensor:
    """``mean over n and i != j of 2 G_ij / (G_ii + G_jj + 2e-12)``, ``G_ij = sum_p m_i m_j``; 0 for one token."""
    n, t = m.shape[:2]
    g = torch.einsum("nihw,njhw->nij", m, m)
    area = g.diagonal(dim1=1, dim2=2)
    pairs = 2 * g / (area[:, :, None] + area[:, None, :] + 2e-12)
    different = 1 - torch.eye(t, dtype=m.dtype, device=m.device)
    return (pairs * different).sum() / max(n * t * (t - 1), 1)


def masked_features_and_dice(
    x: Tensor,
    tokens: Tensor,
    weighting: Weighting | None = None,
    standardize: Statistics | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Stage 1: ``y = sum_t w[n, t] m[n, t] x[n]`` (without ``weighting``: an unnormalised sum) and the Dice loss of ``m``.

    Where ``standardize`` gives mean and std, ``m`` and ``w`` are computed from standardised features. ``valid [N, H0, W0]``:
    every image is cut to the box around its valid pixels; ``y`` is 0 elsewhere, and the Dice losses are averaged.
    """
    if valid is None:
        return _masked_level(x, tokens, weighting, standardize, None)
    y, total = torch.zeros_like(x) + tokens[:0].sum(), tokens[:0].sum()
    for n, own in enumerate(valid):
        row, column, inside = valid_box(own, *x.shape[2:])
        if inside.numel():
            y[n : n + 1, :, row, column], d = _masked_level(
                x[n : n + 1, :, row, column], tokens, weighting, standardize, inside
            )
            total = total + d
    return y, total / max(len(valid), 1)


def _masked_level(
    x: Tensor, tokens: Tensor, weighting: Weighting | None, standardize: Statistics | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = x if valid is None else torch.where(valid, x, 0)
    seen = x if standardize is None else standardised(x, *standardize)
    m = masks(seen, tokens)
    w = m.new_ones(m.shape[:2]) if weighting is None else mask_weights(seen, *weighting, valid)
    m = m if valid is None else torch.where(valid, m, 0)
    y = (w[:, :, None, None, None] * m[:, :, None] * x[:, None]).sum(1)  # of [N, T, C, H, W]
    return y if valid is None else torch.where(valid, y, 0), dice(m)
