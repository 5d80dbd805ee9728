"""Stateless formulas of masked distillation: validation, layout, and the choice of implementation.

Source of every formula: *Masked Distillation with Receptive Tokens*, ICLR 2023, https://arxiv.org/abs/2205.14589.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks as check
from . import _eager, _levels, _ops
from ._eager import Standardization, compose_standardization, compose_weighting
from ._levels import Levels, Matched
from ._records import Distilled, DistillOptions, DistillTables, Latest, LearnOptions, LearnTables, Seen

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

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sum": lambda losses: losses.sum(), "none": lambda losses: losses.sum(1)}
DISTANCES = ("squared", "smooth_l1", "cosine")


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
    distance: str = "squared",
    beta: float = 1.0,
    custom_mask: bool = False,
    warmup_step: Tensor | None = None,
    custom_mask_warmup: int = 0,
    loss_weight: float | Tensor = 1.0,
    eps: float = 1e-12,
    reduction: str = "sum",
    impl: str = "auto",
) -> Tensor:
    r"""Masked feature reconstruction loss (stage 2 of MasKD), summed over feature levels.

    $$
    \mathcal{L} = \lambda \sum_{levels} \frac{1}{N} \sum_n \sum_t w_{nt}
    \frac{\sum_p m_{ntp}^q \sum_c (s_{ncp} - t_{ncp})^2}{C\,(\sum_p m_{ntp} + \epsilon)},
    \qquad m = \sigma(E\,t)
    $$

    With customised masks ``m = sigmoid(E t) * sigmoid(E s)``. Masks are constants for the gradient, which is ``(s - t)`` times
    one number per pixel. So nothing of size ``[N, T, C, H, W]`` is built.

    Args:
        student: features ``[N, C_i, H_i, W_i]`` of each level: a tensor, a sequence, or a mapping, matched by key.
        teacher: features of the same shapes; must not require grad.
        tokens: receptive tokens ``[T, C_i]`` of each level, in the order of ``teacher``: frozen, of any float dtype, at
            most 32.
        weighting: ``(rows [9, T, C_i], bias)`` of each level from `compose_weighting` (with ``standardize``, from
            `compose_standardization`), which give the softmax weights ``w``; None weighs all tokens ``1 / T``.
        standardize: of each level, from `compose_standardization`: the student reconstructs ``(t - mean) / std`` of every
            channel instead of ``t``, and masks and weights see the same. None: the features are not standardised.
        valid: the pixels that count in a padded batch: bool or integer ``[N, H0, W0]`` (transformers' ``pixel_mask``) at the
            images' size, down-sampled to each level (nearest neighbour); or an object with ``tensors`` and ``image_sizes``
            (torchvision's ``ImageList``). Other pixels count neither in sums nor areas nor mask weights, whatever they hold,
            NaN included: the result is the same as for cropped images. An image without a valid pixel contributes 0.
            None: all pixels.
        masks: boxes, score maps or attention, ``[N, T, H_i, W_i]`` of each level, bool or of any float dtype and at least 0,
            which is not checked, as that would wait for the device. They replace the masks of ``tokens``, which must be None,
            and are not customised.
        mask_weights: ``[N, T]`` of each level, in place of ``weighting``; None with ``masks``: ``1 / T``.
        mask_power: power of the mask in front of the distance: 2 as published, or 1.
        distance: between the features of a pixel. ``"squared"``, as published: ``mean_c (s - t)^2``. ``"smooth_l1"``:
            ``mean_c rho(s - t)`` with ``rho(x) = x^2 / (2 beta)`` where ``|x| < beta`` and ``|x| - beta / 2`` elsewhere.
            ``"cosine"``: ``1 - s.t / (|s| |t|)``, with lengths of at least 1e-8, as in torch.
        beta: of ``"smooth_l1"``, from 1e-30 to 1e30.
        custom_mask: customise the masks with the student's own.
        warmup_step: int64 scalar tensor; masks are customised once it has reached ``custom_mask_warmup`` (decided on
            the device, without a sync). None: from the start.
        custom_mask_warmup: see ``warmup_step``.
        loss_weight: factor on the loss: a number, or a scalar tensor, which is not copied to the host.
        eps: added to the mask areas; 0 reproduces the 0/0 of the original for empty masks of tokens. An empty mask that
            ``masks`` gives counts nothing.
        reduction: ``"sum"`` over levels, or ``"none"`` for one value per level.
        impl: ``"auto"`` (Triton for CUDA tensors, eager for others), ``"triton"`` or ``"eager"``.

    Returns:
        A scalar, or ``[levels]`` for ``reduction="none"``; float32, or float64 for float64 features. An empty batch
        gives 0.

    Float16, bfloat16 and float32 may be mixed; sums are taken in float32. A layout in which ``H`` and ``W`` do not
    merge into one stride (a cropped map) is copied; contiguous, channels_last and permuted ``[N, L, C]`` are not.

    Raises:
        TypeError: a level that is no float tensor, float64 mixed with other dtypes, a mapping with a sequence.
        ValueError: level counts, keys, shapes, channels or devices that do not match; a teacher or tokens that require
            grad; a teacher computed under ``inference_mode`` where a gradient is wanted; an unknown ``reduction`` or ``impl``.
        RuntimeError: ``impl="triton"`` on CPU tensors without ``TRITON_INTERPRET=1``.

    Examples:
        >>> import torch
        >>> from maskd_triton import functional as F
        >>> s, t = torch.zeros(2, 8, 4, 4, requires_grad=True), torch.ones(2, 8, 4, 4)
        >>> F.masked_distill_loss(s, t, [torch.zeros(6, 8)]).item()  # masks of 0.5 everywhere: half the MSE
        0.5
    """
    levels = _levels.match(student, teacher)
    if not levels.students:
        raise ValueError("student: expected at least one level, got none")
    if (tokens is None) == (masks is None):
        raise ValueError(f"tokens and masks: expected one of them, got {'none' if masks is None else 'both'}")
    if masks is not None and (custom_mask or weighting is not None):
        raise ValueError("masks: given masks are not customised and have no weighting; give mask_weights instead")
    if mask_weights is not None and weighting is not None:
        raise ValueError("mask_weights and weighting: expected at most one of them")
    for name, given in (("tokens", tokens), ("weighting", weighting), ("standardize", standardize)):
        check.per_level(given, name, len(levels.teachers))
    teachers = levels.teachers
    check.levels(teachers, "teacher", levels.labels, [None] * len(teachers))
    if warmup_step is not None:
        check.on_device(check.counter(warmup_step, "warmup_step"), "warmup_step", teachers[0].device)
    warmup = check.count(custom_mask_warmup, "custom_mask_warmup")
    of_tokens = _by_part(standardize, "standardize", 3, "compose_standardization")
    tables = DistillTables(statistics=of_tokens[2])
    if tokens is not None:
        tables = DistillTables(tokens, *_by_part(weighting, "weighting", 2, "compose_weighting"), *of_tokens)
    check.tables(tables, teachers, constant=True)
    options = DistillOptions(
        tables=tables,
        valid=_levels.valid_of_levels(valid, teachers),
        custom_mask=check.flag(custom_mask, "custom_mask"),
        customised=None if warmup_step is None else warmup_step >= warmup,
        mask_power=check.mask_power(mask_power),
        distance=check_distance(distance),
        beta=check.positive(beta, "beta"),
        eps=check.eps(eps),
    )
    loss_weight = check.loss_weight(loss_weight)
    return distill(levels, options, masks, mask_weights, loss_weight, reduction, impl)[0]


def _by_part(given: Sequence[Any] | None, name: str, parts: int, source: str) -> list[list[Tensor]]:
    """The tensors of every level's tuple, part by part."""
    for i, level in enumerate(given or ()):
        if not isinstance(level, tuple | list) or len(level) != parts:
            raise TypeError(f"{name}[{i}]: expected the {parts} tensors that {source} gives, got {type(level).__name__}")
    return [[level[k] for level in given or ()] for k in range(parts)]


def distill(
    levels: Matched,
    options: DistillOptions,
    masks: Levels | None,
    mask_weights: Levels | None,
    loss_weight: float | Tensor,
    reduction: str,
    impl: str,
    channels: Sequence[int] = (),
) -> tuple[Tensor, Latest]:
    """The one door of stage 2: checks what differs from call to call, and gives the loss.

    ``options``: checked by the caller with its tables, without given masks and weights. ``channels``: of every level; none:
    any.
    Returns the loss, and what ``diagnostics()`` reads, without gradient.
    """
    check.choice(reduction, "reduction", REDUCTIONS)
    students, teachers, labels = levels.students, levels.teachers, levels.labels
    for i, (s, t, label) in enumerate(zip(students, teachers, labels, strict=True)):
        names = f"student{label}", f"teacher{label}"
        check.pair(s, t, names, channels[i] if channels else None, students[0], f"student{labels[0]}")
    weighted = bool(options.tables.pool_rows) or mask_weights is not None
    impl = resolve_impl(impl, students[0].device)
    outputs = _ops.distill(students, teachers, _with_given(levels, options, masks, mask_weights), impl)
    # a copy of a tensor: whoever schedules the weight may write to it before the backward pass
    scale = loss_weight.clone() if isinstance(loss_weight, Tensor) else loss_weight
    losses = outputs.per_image * scale
    loss = REDUCTIONS[reduction](losses)
    seen = Distilled(losses.detach(), *outputs[1:])
    return loss, Latest(seen, [t.shape for t in teachers], levels.keys, options.valid, weighted)


def _with_given(levels: Matched, options: DistillOptions, masks: Levels | None, mask_weights: Levels | None) -> DistillOptions:
    """``options`` with masks and weights that come with the call, or that valid pixels have."""
    teachers, tables = levels.teachers, options.tables
    if masks is not None:
        options = options._replace(masks=_levels.masks_of_levels(masks, levels))
    if mask_weights is not None:
        shape = [teachers[0].shape[0], options.num_tokens]
        acc = _eager.acc_dtype(teachers[0].dtype)
        return options._replace(weights=_levels.weights_of_levels(mask_weights, shape, acc, levels))
    if options.valid and tables.pool_rows:
        weights = [
            _eager.weights_of_valid(t.flatten(2), v, t.shape[2], rows, bias)
            for t, v, rows, bias in zip(teachers, options.valid, tables.pool_rows, tables.pool_bias, strict=True)
        ]
        options = options._replace(weights=torch.stack(weights), tables=tables._replace(pool_rows=(), pool_bias=()))
    return options


def check_distance(distance: Any, name: str = "distance") -> str:
    """``distance``; ValueError unless it is one of `DISTANCES`."""
    return check.choice(distance, name, DISTANCES)


def resolve_impl(impl: str, device: torch.device) -> str:
    """``"auto"`` by the device alone: Triton on ``cuda`` (CUDA or HIP), eager elsewhere; ValueError for other names."""
    if check.impl(impl) != "auto":
        return impl
    return "triton" if device.type == "cuda" else "eager"


def receptive_masks(x: Tensor, tokens: Tensor, token_bias: Tensor | None = None) -> Tensor:
    """Masks ``sigmoid(sum_c tokens[t, c] * x[n, c, h, w] + token_bias[t])``.

    Args:
        x: features ``[N, C, H, W]``.
        tokens: ``[T, C]``.
        token_bias: ``[T]``; None: zeros.

    Returns:
        ``[N, T, H, W]``, float32 (float64 for float64 ``x``).

    Raises:
        TypeError, ValueError: an argument that does not fit, named.

    Examples:
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

    The convolution (padding 1) followed by the average over all positions is linear in nine sums of ``x``: over all pixels, the
    four borders and the four corners. So the result is exact. It is differentiable in every argument.

    Args:
        x: features ``[N, C, H, W]``.
        rows: ``[9, T, C]``, from `compose_weighting` or `compose_standardization`.
        bias: ``[T]`` or ``[5, T]``, from the same.

    Returns:
        ``[N, T]``, float32 (float64 for float64 ``x``).

    Raises:
        TypeError, ValueError: an argument that does not fit, named.

    Examples:
        >>> import torch
        >>> from maskd_triton import functional as F
        >>> parameters = torch.randn(8, 8, 3, 3), torch.zeros(8), torch.zeros(2, 8, 1, 1), torch.zeros(2)
        >>> F.mask_weights(torch.randn(1, 8, 4, 4), *F.compose_weighting(*parameters))
        tensor([[0.5000, 0.5000]])
    """
    check.features(x, "x")
    check.weighting(rows, bias, x.shape[1], x.device)
    return _eager.weights(x.flatten(2), rows, bias, x.shape[2], x.shape[3])


def dice_loss(masks: Tensor) -> Tensor:
    """Mean Dice coefficient over images and ordered pairs of different masks (T = 1: zero).

    A pair's coefficient is ``2 G_ij / (G_ii + G_jj + 2e-12)`` with ``G_ij = sum_p m_i m_j``: section 3.2 of the paper, with the
    squared areas of its code.

    Args:
        masks: ``[N, T, H, W]``.

    Returns:
        A scalar, float32 (float64 for float64 masks), also under autocast.

    Raises:
        TypeError, ValueError: masks of another kind or shape.

    Examples:
        >>> import torch
        >>> from maskd_triton import functional as F
        >>> left, right = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> F.dice_loss(torch.stack([left, right]).view(1, 2, 1, 2)), F.dice_loss(torch.ones(1, 2, 1, 2))
        (tensor(0.), tensor(1.))
    """
    check.features(masks, "masks")
    return _eager.dice_of_gram(_eager.gram(masks.flatten(2))).sum()


def masked_features_and_dice(
    features: Sequence[Tensor],
    tokens: Sequence[Tensor],
    weighting: Sequence[tuple[Tensor, Tensor]] | None = None,
    *,
    token_bias: Sequence[Tensor] | None = None,
    valid: Any = None,
    impl: str = "auto",
) -> tuple[list[Tensor], Tensor]:
    r"""Masked features and Dice losses (stage 1 of MasKD): what the teacher's heads see, and how much the masks overlap.

    $$
    y = x \sum_t w_t m_t, \qquad m = \sigma(E x + b), \qquad
    \mathrm{dice} = \operatorname{mean}_n \operatorname{mean}_{i \ne j} \frac{2 G_{ij}}{G_{ii} + G_{jj} + 2 \cdot 10^{-12}},
    \quad G_{ij} = \sum_p m_i m_j
    $$

    Args:
        features: ``[N, C_i, H_i, W_i]`` of each level.
        tokens: ``[T, C_i]`` of each level.
        weighting: ``(rows, bias)`` of each level from `compose_weighting`, which give the weights ``w``; None sums the
            masks without weights.
        token_bias: ``b [T]`` of each level; None: zeros, as published. With tokens, biases and weighting from
            `compose_standardization`, masks and weights are computed from standardised features.
        valid: the pixels that count in a padded batch, as in `masked_distill_loss`: others are masked to 0 and count
            neither in the Dice sums nor in the mask weights. None: all pixels.
        impl: ``"auto"`` (Triton for CUDA tensors, eager for others), ``"triton"`` or ``"eager"``.

    Returns:
        Masked features in the shapes, dtypes and (dense) strides of ``features``, and the Dice losses ``[levels]`` in float32
        (float64 for float64 features). Both are differentiable once, in every tensor.

    Sums are taken in float32, also under autocast, in a fixed order. Source: sections 3.1 and 3.2 of the paper; gradients in
    closed form.

    Raises:
        TypeError, ValueError: an argument that does not fit, named.
        RuntimeError: ``impl="triton"`` on CPU tensors without ``TRITON_INTERPRET=1``.

    Examples:
        >>> import torch
        >>> from maskd_triton import functional as F
        >>> x, tokens = torch.ones(1, 8, 2, 2), torch.zeros(6, 8)
        >>> (y,), dice = F.masked_features_and_dice([x], [tokens])  # six masks of a half
        >>> y[0, 0, 0, 0], dice.round(decimals=3)
        (tensor(3.), tensor([1.]))
    """
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        got = "a tensor" if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"features: expected a sequence of levels [N, C, H, W], got {got}")
    if tokens is None:
        raise TypeError("tokens: expected a sequence with one entry per level, got None")
    for name, given in (("tokens", tokens), ("weighting", weighting), ("token_bias", token_bias)):
        check.per_level(given, name, len(features))
    if not features:
        raise ValueError("features: expected at least one level, got none")
    for i, x in enumerate(features):
        check.features(x, f"features[{i}]")
    tables = LearnTables(tokens, token_bias or (), *_by_part(weighting, "weighting", 2, "compose_weighting"))
    return learn(features, tables, valid, impl)[:2]


def learn(features: Sequence[Tensor], tables: LearnTables, valid: Any, impl: str) -> tuple[list[Tensor], Tensor, list[Seen]]:
    """The one door of stage 1, for features that fit the tables: masked features, Dice losses, and what they are made of."""
    first = features[0]
    check.tables(tables, features, constant=False)
    learns = any(x.requires_grad for field in tables for x in field)
    for i, x in enumerate(features):
        check.alike(x, f"features[{i}]", first, "features[0]")
        if not torch.compiler.is_compiling():
            check.readable(x, f"features[{i}]")
            if learns:
                check.recordable(x, f"features[{i}]")
    pixels = _levels.valid_of_levels(valid, features)
    flat, heights, sizes = [x.flatten(2) for x in features], [x.shape[2] for x in features], [x.shape[2:] for x in features]
    weights: list[Tensor] = []
    if pixels and tables.pool_rows:
        pools = zip(flat, pixels, heights, tables.pool_rows, tables.pool_bias, strict=True)
        weights = [_eager.weights_of_valid(*level) for level in pools]
        tables = tables._replace(pool_rows=(), pool_bias=())
    options = LearnOptions(tables, weights, pixels, heights)
    learn_levels = {"triton": _ops.learn, "eager": _eager.learn}[resolve_impl(impl, first.device)]
    masked, dice, masks, used = learn_levels(flat, options)
    maps = [v.unflatten(1, size) for v, size in zip(pixels, sizes, strict=True)] if pixels else [None] * len(features)
    each = zip(masks, used, maps, sizes, strict=True)
    seen = [Seen(m.detach().unflatten(2, size), w.detach(), v) for m, w, v, size in each]
    return [y.unflatten(2, size) for y, size in zip(masked, sizes, strict=True)], dice, seen
