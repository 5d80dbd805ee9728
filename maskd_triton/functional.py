"""Stateless formulas of masked distillation: validation, layout, and the choice of implementation.

Source of every formula: *Masked Distillation with Receptive Tokens*, ICLR 2023, https://arxiv.org/abs/2205.14589.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks as check
from . import _eager, _levels
from ._eager import Standardization, compose_standardization, compose_weighting
from ._levels import Levels
from ._ops.distill import masked_distill
from ._ops.learn import masked_learn
from ._ops.pool import valid_weights
from ._records import Distilled, DistillOptions, DistillTables, LearnOptions, LearnTables

__all__ = [
    "Standardization",
    "compose_standardization",
    "compose_weighting",
    "dice_loss",
    "mask_weights",
    "masked_distill_loss",
    "masked_features_and_dice",
    "receptive_masks",
]

IMPLS = ("auto", "triton", "eager")
REDUCTIONS = ("sum", "none")


def masked_distill_loss(
    student: Levels,
    teacher: Levels,
    tokens: Sequence[Tensor] | None = None,
    weighting: Sequence[tuple[Tensor, Tensor]] | None = None,
    *,
    standardize: Sequence[Standardization] | None = None,
    valid: Any = None,
    masks: Levels | None = None,
    mask_weights: Levels | None = None,
    mask_power: int = 2,
    custom_mask: bool = False,
    warmup_step: Tensor | None = None,
    custom_mask_warmup: int = 0,
    loss_weight: float | Tensor = 1.0,
    eps: float = 1e-12,
    reduction: str = "sum",
    impl: str = "auto",
) -> Tensor:
    r"""Masked feature reconstruction loss (stage 2 of MasKD), summed over feature levels.

    .. math::
        \mathcal{L} = \lambda \sum_{levels} \frac{1}{N} \sum_n \sum_t w_{nt}
        \frac{\sum_p m_{ntp}^q \sum_c (s_{ncp} - t_{ncp})^2}{C\,(\sum_p m_{ntp} + \epsilon)},
        \qquad m = \sigma(E\,t)

    With customised masks ``m = sigmoid(E t) * sigmoid(E s)``, where the mask is a constant for the gradient. The
    gradient is ``(s - t)`` times one number per pixel, so nothing of size ``[N, T, C, H, W]`` is built.

    Args:
        student: features ``[N, C_i, H_i, W_i]`` of each level: a tensor, a sequence, or a mapping matched by key.
        teacher: features of the same shapes; must not require grad.
        tokens: receptive tokens ``[T, C_i]`` of each level, frozen, of any float dtype.
        weighting: ``(rows [9, T, C_i], bias)`` of each level from :func:`compose_weighting` (with ``standardize``, from
            :func:`compose_standardization`), which give the softmax weights ``w``; None weighs all tokens ``1 / T``.
        valid: the pixels that count in a padded batch: bool or integer ``[N, H0, W0]`` (transformers' ``pixel_mask``) at the
            images' size, taken down to each level's (nearest neighbour), or an object with ``tensors`` and ``image_sizes``
            (torchvision's ``ImageList``). Others count neither in sums nor areas nor mask weights: the same as cropping every
            image, whatever they hold, NaN included. An image without a valid pixel contributes 0. None: all pixels.
        masks: ``[N, T, H_i, W_i]`` of each level, of any float dtype and at least 0, in place of those of ``tokens``, which
            must be None then: boxes, score maps, attention. Read as they are, not customised.
        mask_weights: ``[N, T]`` of each level, in place of ``weighting``; None with ``masks``: ``1 / T``.
        mask_power: power of the mask in front of ``(s - t)^2``: 2 as published, or 1.
        standardize: of each level, from :func:`compose_standardization`: the student reconstructs, and masks and weights
            see, ``(t - mean) / std`` of every channel instead of ``t``. None: the features as they are.
        custom_mask: customise the masks with the student's own.
        warmup_step: int64 scalar tensor; masks are customised once it has reached ``custom_mask_warmup`` (decided on
            the device, without a sync). None: from the start.
        custom_mask_warmup: see ``warmup_step``.
        loss_weight: factor on the loss: a number, or a scalar tensor, whose value is not looked at.
        eps: added to the mask areas; 0 reproduces the 0/0 of the original for empty masks.
        reduction: ``"sum"`` over levels, or ``"none"`` for one value per level.
        impl: ``"auto"`` (Triton for CUDA tensors, eager for others), ``"triton"`` or ``"eager"``.

    Shape:
        scalar, or ``[levels]`` for ``reduction="none"``; float32, or float64 for float64 features. An empty batch
        gives 0.

    Float16, bfloat16 and float32 may be mixed; sums are taken in float32. A layout in which ``H`` and ``W`` do not
    merge into one stride (a cropped map) is copied; contiguous, channels_last and permuted ``[N, L, C]`` are not.

    Raises:
        TypeError: a level that is no float tensor, float64 mixed with other dtypes, a mapping with a sequence.
        ValueError: level counts, keys, shapes, channels or devices that do not match; a teacher or tokens that require
            grad; a teacher computed under ``inference_mode`` where a gradient is wanted; an unknown ``reduction`` or ``impl``.
        RuntimeError: ``impl="triton"`` on CPU tensors without ``TRITON_INTERPRET=1``.

    Example:
        >>> import torch
        >>> from maskd_triton import functional as F
        >>> s, t = torch.zeros(2, 8, 4, 4, requires_grad=True), torch.ones(2, 8, 4, 4)
        >>> F.masked_distill_loss(s, t, [torch.zeros(6, 8)]).item()  # masks of 0.5 everywhere: half the MSE
        0.5
    """
    check.choice(reduction, "reduction", REDUCTIONS)
    check.choice(impl, "impl", IMPLS)
    loss_weight = check.scale(loss_weight, "loss_weight")
    eps = check.amount(eps, "eps")
    custom_mask_warmup = check.count(custom_mask_warmup, "custom_mask_warmup")
    students, teachers, labels = _levels.match(student, teacher)
    mask_power = check_power(mask_power)
    for name, given in (("tokens", tokens), ("weighting", weighting), ("standardize", standardize)):
        check.per_level(given, name, len(students))
    if (tokens is None) == (masks is None):
        raise ValueError(f"tokens and masks: expected one of them, got {'none' if masks is None else 'both'}")
    if masks is not None and (custom_mask or weighting is not None):
        raise ValueError("masks: given masks are not customised and have no weighting; give mask_weights instead")
    if mask_weights is not None and weighting is not None:
        raise ValueError("mask_weights and weighting: expected at most one of them")
    if not students:
        raise ValueError("student: expected at least one level, got none")
    first = students[0]
    for s, t, label in zip(students, teachers, labels, strict=True):
        check.pair(s, t, (f"student{label}", f"teacher{label}"), first, f"student{labels[0]}")
    _check_parameters(tokens or (), weighting, first.device)
    for i, (t, e) in enumerate(zip(teachers, tokens or (), strict=tokens is not None)):
        if e.shape[1] != t.shape[1]:
            raise ValueError(
                f"teacher{labels[i]}: expected {e.shape[1]} channels to match tokens {list(e.shape)}, got shape {list(t.shape)}"
            )
        check.frozen(e, f"tokens[{i}]")
        for part, name in zip(weighting[i] if weighting else (), ("rows", "bias"), strict=False):
            check.frozen(part, f"weighting[{i}] {name}")
    for i, (t, level) in enumerate(zip(teachers, standardize or (), strict=standardize is not None)):
        c, rows = t.shape[1], list(level.token_bias.shape)[:1] if tokens is None else [len(tokens[i])]
        for part, name, shape in zip(level, Standardization._fields, ([*rows, c], rows, [2, c]), strict=True):
            check.parameter(part, f"standardize[{i}].{name}", shape, first.device)
            check.frozen(part, f"standardize[{i}].{name}")
    check.step(warmup_step, "warmup_step", first.device)
    given_masks, given_weights = given_levels(masks, mask_weights, tokens, teachers, teacher)
    options = DistillOptions(
        tables=distill_tables(tokens or (), weighting, standardize),
        valid=_levels.valid_of_levels(valid, teachers),
        masks=given_masks,
        weights=given_weights,
        step=warmup_step,
        custom_mask=custom_mask,
        warmup=custom_mask_warmup,
        mask_power=mask_power,
        eps=eps,
    )
    return distill(students, teachers, options, loss_weight, reduction, resolve_impl(impl, first.device))[0]


def distill_tables(
    tokens: Sequence[Tensor],
    weighting: Sequence[tuple[Tensor, Tensor]] | None,
    standardize: Sequence[Standardization] | None,
) -> DistillTables:
    """The tables of all levels from those of each."""
    pool = zip(*weighting, strict=True) if weighting else ((), ())
    standard = zip(*standardize, strict=True) if standardize else ((), (), ())
    return DistillTables(tokens, *pool, *standard)


def distill(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    options: DistillOptions,
    loss_weight: float | Tensor,
    reduction: str,
    impl: str,
) -> tuple[Tensor, Distilled]:
    """:func:`masked_distill_loss` of validated arguments, and the outputs that it was made of, without gradient."""
    tables = options.tables
    if options.valid and tables.pool_rows:
        flat, weighting = [t.flatten(2) for t in teachers], list(zip(tables.pool_rows, tables.pool_bias, strict=True))
        weights = valid_weights(flat, weighting, options.valid, [t.shape[2] for t in teachers], impl)
        options = options._replace(tables=tables._replace(pool_rows=(), pool_bias=()), weights=torch.stack(weights))
    outputs = masked_distill(students, teachers, options, impl)
    per_image = outputs.per_image * loss_weight
    loss = per_image.sum() if reduction == "sum" else per_image.sum(1)
    return loss, Distilled(per_image.detach(), *outputs[1:])


def check_power(mask_power: int) -> int:
    """``mask_power``; ValueError unless it is 1 or 2."""
    power = check.integer(mask_power)
    if power not in (1, 2):
        raise ValueError(f"mask_power: expected 1 or 2, got {mask_power!r}")
    return power


def given_levels(
    masks: Levels | None,
    mask_weights: Levels | None,
    tokens: Sequence[Tensor] | None,
    teachers: Sequence[Tensor],
    teacher: Levels,
) -> tuple[list[Tensor], Tensor | None]:
    """``masks`` and ``mask_weights`` as the operator takes them; they have the keys of ``teacher``, if it is a mapping."""
    keys = list(teacher) if isinstance(teacher, Mapping) else None
    flat = [] if masks is None else _levels.maps_of_levels(masks, teachers, keys)
    if mask_weights is None:
        return flat, None
    shape = [teachers[0].shape[0], flat[0].shape[1] if flat else len(tokens[0])]  # type: ignore[index]
    like = teachers[0].new_empty((), dtype=_eager.acc_dtype(teachers[0].dtype))
    return flat, _levels.weights_of_levels(mask_weights, shape, like, teachers, keys)


def _check_parameters(tokens: Sequence[Tensor], weighting: Sequence[check.Weighting] | None, device: torch.device) -> None:
    for i, e in enumerate(tokens):
        check.tokens(e, f"tokens[{i}]", device, len(tokens[0]) if i else None)
        if weighting is not None:
            check.weighting(weighting[i], f"weighting[{i}]", e.shape, device)


def resolve_impl(impl: str, device: torch.device) -> str:
    """``"auto"`` by the tensors' device alone: Triton on ``cuda`` (CUDA or HIP), eager elsewhere."""
    if impl != "auto":
        return impl
    return "triton" if device.type == "cuda" else "eager"


def receptive_masks(x: Tensor, tokens: Tensor, token_bias: Tensor | None = None) -> Tensor:
    """Masks ``sigmoid(sum_c tokens[t, c] * x[n, c, h, w] + token_bias[t])``.

    Args: ``x [N, C, H, W]``, ``tokens [T, C]``, ``token_bias [T]`` or None.
    Returns ``[N, T, H, W]``, float32 (float64 for float64 ``x``).
    Raises ValueError or TypeError naming the argument that does not fit.

    Example:
        >>> import torch
        >>> from maskd_triton import functional as F
        >>> F.receptive_masks(torch.ones(1, 8, 2, 2), torch.zeros(6, 8)).shape
        torch.Size([1, 6, 2, 2])
    """
    check.features(x, "x")
    check.tokens(tokens, "tokens", x.device)
    check.features(x, "x", tokens.shape[1])
    if token_bias is not None:
        check.parameter(token_bias, "token_bias", [len(tokens)], x.device)
    return _eager.masks(x.flatten(2), tokens, token_bias).unflatten(2, x.shape[2:])


def mask_weights(x: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
    """Softmax over tokens of ``conv1x1(avgpool(conv3x3(x)))``, without running the 3x3 convolution.

    The convolution (padding 1) followed by the average over all positions is linear in nine sums of ``x``: all pixels,
    four borders, four corners. Exact, and differentiable in every argument.

    Args: ``x [N, C, H, W]``, ``rows [9, T, C]`` and ``bias`` from :func:`compose_weighting` or
    :func:`compose_standardization`.
    Returns ``[N, T]``, float32 (float64 for float64 ``x``). Raises ValueError or TypeError for an ``x`` that does not fit.

    Example:
        >>> import torch
        >>> from maskd_triton import functional as F
        >>> parameters = torch.randn(8, 8, 3, 3), torch.zeros(8), torch.zeros(2, 8, 1, 1), torch.zeros(2)
        >>> F.mask_weights(torch.randn(1, 8, 4, 4), *F.compose_weighting(*parameters))
        tensor([[0.5000, 0.5000]])
    """
    check.features(x, "x")
    tokens_shape = rows.shape[1:] if isinstance(rows, Tensor) and rows.dim() == 3 else (1, x.shape[1])
    check.weighting((rows, bias), "weighting", tokens_shape, x.device)
    check.features(x, "x", rows.shape[2])
    return _eager.weights(x.flatten(2), rows, bias, x.shape[2], x.shape[3])


def dice_loss(masks: Tensor) -> Tensor:
    """Mean Dice coefficient over images and ordered pairs of different masks (T = 1: zero).

    ``2 G_ij / (G_ii + G_jj + 2e-12)`` with ``G_ij = sum_p m_i m_j``. Args: ``masks [N, T, H, W]``.
    Returns a scalar, float32 (float64 for float64), also under autocast. Raises ValueError or TypeError for anything else.
    Source: section 3.2 of the paper, with the squared areas of its code.

    Example:
        >>> import torch
        >>> from maskd_triton import functional as F
        >>> left, right = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> F.dice_loss(torch.stack([left, right]).view(1, 2, 1, 2)), F.dice_loss(torch.ones(1, 2, 1, 2))
        (tensor(0.), tensor(1.))
    """
    check.features(masks, "masks")
    return _eager.dice_of_gram(_eager.gram(masks.flatten(2)))[0].sum()


def masked_features_and_dice(
    features: Sequence[Tensor],
    tokens: Sequence[Tensor],
    weighting: Sequence[tuple[Tensor, Tensor]] | None = None,
    *,
    token_bias: Sequence[Tensor] | None = None,
    valid: Any = None,
    impl: str = "auto",
) -> tuple[list[Tensor], Tensor]:
    r"""Stage 1: what the teacher's heads see, and how much the masks overlap.

    .. math::
        y = x \sum_t w_t m_t, \qquad m = \sigma(E x + b), \qquad
        \mathrm{dice} = \operatorname{mean}_n \operatorname{mean}_{i \ne j} \frac{2 G_{ij}}{G_{ii} + G_{jj} + 2 \cdot 10^{-12}},
        \quad G_{ij} = \sum_p m_i m_j

    Args:
        features: ``[N, C_i, H_i, W_i]`` of each level.
        tokens: ``[T, C_i]`` of each level.
        weighting: ``(rows, bias)`` of each level from :func:`compose_weighting`, which give the weights ``w``; None sums the
            masks without weights.
        token_bias: ``b [T]`` of each level; None: zeros, as published. With tokens, biases and weighting from
            :func:`compose_standardization`, masks and weights are those of standardised features.
        valid: the pixels that count in a padded batch, as in :func:`masked_distill_loss`: others are masked to 0 and count
            neither in the Dice sums nor in the mask weights. None: all pixels.
        impl: ``"auto"`` (Triton for CUDA tensors, eager for others), ``"triton"`` or ``"eager"``.

    Returns masked features in the shapes, dtypes and (dense) strides of ``features``, and the Dice losses ``[levels]`` in
    float32 (float64 for float64 features). Differentiable once, in every tensor; sums are taken in float32, also under
    autocast, in a fixed order. Source: sections 3.1 and 3.2 of the paper; gradients in closed form.

    Raises TypeError and ValueError naming the argument that does not fit; RuntimeError for ``impl="triton"`` on CPU tensors
    without ``TRITON_INTERPRET=1``.

    Example:
        >>> import torch
        >>> from maskd_triton import functional as F
        >>> x, tokens = torch.ones(1, 8, 2, 2), torch.zeros(6, 8)
        >>> (y,), dice = F.masked_features_and_dice([x], [tokens])  # six masks of a half
        >>> y[0, 0, 0, 0], dice.round(decimals=3)
        (tensor(3.), tensor([1.]))
    """
    return learn(features, tokens, weighting, token_bias, valid, impl)[:2]


def learn(
    features: Sequence[Tensor],
    tokens: Sequence[Tensor],
    weighting: Sequence[tuple[Tensor, Tensor]] | None,
    token_bias: Sequence[Tensor] | None,
    valid: Any,
    impl: str,
) -> tuple[list[Tensor], Tensor, list[tuple[Tensor, Tensor, Tensor | None]]]:
    """:func:`masked_features_and_dice`, and without gradients each level's masks ``[N, T, H, W]``, weights ``[N, T]`` and valid
    pixels ``[N, H, W]`` (None: all)."""
    check.choice(impl, "impl", IMPLS)
    if isinstance(features, Tensor):
        raise TypeError("features: expected a sequence of levels [N, C, H, W], got a tensor")
    for name, given in (("tokens", tokens), ("weighting", weighting), ("token_bias", token_bias)):
        check.per_level(given, name, len(features))
    if not features:
        raise ValueError("features: expected at least one level, got none")
    first = features[0]
    for i, x in enumerate(features):
        check.features(x, f"features[{i}]")
        check.alike(x, f"features[{i}]", first, "features[0]")
    _check_parameters(tokens, weighting, first.device)
    for i, (x, e) in enumerate(zip(features, tokens, strict=True)):
        check.features(x, f"features[{i}]", e.shape[1])
        if token_bias is not None:
            check.parameter(token_bias[i], f"token_bias[{i}]", [len(e)], first.device)
    impl = resolve_impl(impl, first.device)
    pixels = _levels.valid_of_levels(valid, features)
    flat, heights = [x.flatten(2) for x in features], [x.shape[2] for x in features]
    given_weights: list[Tensor] = []
    if pixels and weighting is not None:
        given_weights, weighting = valid_weights(flat, weighting, pixels, heights, impl), None
    tables = LearnTables(tokens, token_bias or (), *(zip(*weighting, strict=True) if weighting else ((), ())))
    masked, dice, kept = masked_learn(flat, LearnOptions(tables, given_weights, pixels, heights), impl)
    sizes = [x.shape[2:] for x in features]
    maps = [v.unflatten(1, size) for v, size in zip(pixels, sizes, strict=True)] if pixels else [None] * len(features)
    seen = [(m.unflatten(2, size), w, v) for m, w, v, size in zip(kept.masks, kept.weights, maps, sizes, strict=True)]
    return [y.unflatten(2, size) for y, size in zip(masked, sizes, strict=True)], dice, seen
