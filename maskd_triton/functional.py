"""Stateless formulas of masked distillation: validation, layout, and the choice of implementation.

Source of every formula: *Masked Distillation with Receptive Tokens*, ICLR 2023, https://arxiv.org/abs/2205.14589.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _eager, _levels, _ops
from ._eager import Standardization, compose_standardization, compose_weighting
from ._levels import Levels

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

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IMPLS = ("auto", "triton", "eager")
_REDUCTIONS = ("sum", "none")


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_features(x: Tensor, name: str, channels: int | None = None) -> None:
    """Raise unless ``x`` is a float ``[N, C, H, W]`` tensor with at least one pixel and ``channels`` channels."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64 features, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected features [N, C, H, W], got shape {list(x.shape)}")
    if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name}: expected at least one channel and one pixel, got shape {list(x.shape)}")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{name}: expected {channels} channels, got {x.shape[1]} (shape {list(x.shape)})")


def _check_tokens(tokens: Sequence[Tensor], weighting: Sequence[tuple[Tensor, Tensor]] | None) -> None:
    for i, e in enumerate(tokens):
        if e.dim() != 2 or 0 in e.shape:
            raise ValueError(f"tokens[{i}]: expected [T, C] with at least one token, got shape {list(e.shape)}")
        if len(e) != len(tokens[0]):
            raise ValueError(f"tokens[{i}]: expected {len(tokens[0])} tokens, as on level 0, got {len(e)}")
        if weighting is not None:
            rows, bias = weighting[i]
            if rows.shape != (9, *e.shape) or bias.shape not in (e.shape[:1], (4, len(e))):
                raise ValueError(
                    f"weighting[{i}]: expected rows {[9, *e.shape]} and bias {[len(e)]} or {[4, len(e)]}, "
                    f"got {list(rows.shape)} and {list(bias.shape)}"
                )


def _check_parameter(x: Tensor, name: str, shape: list[int], device: torch.device) -> None:
    if list(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected the device of the features, {device}, got {x.device}")


def _check_pair(s: Tensor, t: Tensor, tokens: Tensor, i: int, first: Tensor) -> None:
    check_features(t, f"teacher[{i}]")
    check_features(s, f"student[{i}]")
    if s.shape != t.shape:
        raise ValueError(
            f"student[{i}]: expected the shape of teacher[{i}], {list(t.shape)}, got {list(s.shape)} "
            "(different channels: give student_channels; different sizes: resize one of them)"
        )
    if s.shape[0] != first.shape[0]:
        raise ValueError(f"student[{i}]: expected the batch size of level 0, {first.shape[0]}, got {s.shape[0]}")
    for x, name in ((s, f"student[{i}]"), (t, f"teacher[{i}]"), (tokens, f"tokens[{i}]")):
        if x.device != first.device:
            raise ValueError(f"{name}: expected the device of student[0], {first.device}, got {x.device}")
    for x, name in ((s, f"student[{i}]"), (t, f"teacher[{i}]")):
        if (x.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(f"{name}: expected all features to be float64 or none, got {x.dtype} and {first.dtype}")
    if t.requires_grad:
        raise ValueError(
            f"teacher[{i}]: requires grad, but the loss is differentiable in the student only; "
            "compute the teacher under torch.no_grad() or pass teacher.detach()"
        )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and t.is_inference():
        raise ValueError(
            f"teacher[{i}]: an inference tensor cannot be kept for the backward pass; compute the teacher under "
            "torch.no_grad() instead of torch.inference_mode(), or pass teacher.clone()"
        )
    if tokens.requires_grad:
        raise ValueError(f"tokens[{i}]: requires grad, but tokens are frozen in stage 2; pass tokens.detach()")
    if tokens.shape[1] != t.shape[1]:
        raise ValueError(
            f"teacher[{i}]: expected {tokens.shape[1]} channels to match tokens {list(tokens.shape)}, got shape {list(t.shape)}"
        )


def masked_distill_loss(
    student: Levels,
    teacher: Levels,
    tokens: Sequence[Tensor],
    weighting: Sequence[tuple[Tensor, Tensor]] | None = None,
    *,
    standardize: Sequence[Standardization] | None = None,
    custom_mask: bool = False,
    warmup_step: Tensor | None = None,
    custom_mask_warmup: int = 0,
    loss_weight: float = 1.0,
    eps: float = 1e-12,
    reduction: str = "sum",
    impl: str = "auto",
) -> Tensor:
    r"""Masked feature reconstruction loss (stage 2 of MasKD), summed over feature levels.

    .. math::
        \mathcal{L} = \lambda \sum_{levels} \frac{1}{N} \sum_n \sum_t w_{nt}
        \frac{\sum_p m_{ntp}^2 \sum_c (s_{ncp} - t_{ncp})^2}{C\,(\sum_p m_{ntp} + \epsilon)},
        \qquad m = \sigma(E\,t)

    With customised masks ``m = sigmoid(E t) * sigmoid(E s)``, where the mask is a constant for the gradient. The
    gradient is ``(s - t)`` times one number per pixel, so nothing of size ``[N, T, C, H, W]`` is built.

    Args:
        student: features ``[N, C_i, H_i, W_i]`` of each level: a tensor, a sequence, or a mapping matched by key.
        teacher: features of the same shapes; must not require grad.
        tokens: receptive tokens ``[T, C_i]`` of each level, frozen, of any float dtype.
        weighting: ``(rows [9, T, C_i], bias)`` of each level from :func:`compose_weighting` (with ``standardize``, from
            :func:`compose_standardization`), which give the softmax weights ``w``; None weighs all tokens ``1 / T``.
        standardize: of each level, from :func:`compose_standardization`: the student reconstructs, and masks and weights
            see, ``(t - mean) / std`` of every channel instead of ``t``. None: the features as they are.
        custom_mask: customise the masks with the student's own.
        warmup_step: int64 scalar tensor; masks are customised once it has reached ``custom_mask_warmup`` (decided on
            the device, without a sync). None: from the start.
        custom_mask_warmup: see ``warmup_step``.
        loss_weight: factor on the loss.
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
    check_choice(reduction, "reduction", _REDUCTIONS)
    check_choice(impl, "impl", IMPLS)
    students, teachers = _levels.match(student, teacher)
    for name, given in (("tokens", tokens), ("weighting", weighting), ("standardize", standardize)):
        if given is not None and len(given) != len(students):
            raise ValueError(f"{name}: expected one entry for each of the {len(students)} levels, got {len(given)}")
    if not students:
        raise ValueError("student: expected at least one level, got none")
    _check_tokens(tokens, weighting)
    for i, (s, t, e) in enumerate(zip(students, teachers, tokens, strict=True)):
        _check_pair(s, t, e, i, students[0])
    for i, (level, e) in enumerate(zip(standardize or (), tokens, strict=False)):
        shapes = (list(e.shape), [e.shape[0]], [2, e.shape[1]])
        for part, name, shape in zip(level, level._fields, shapes, strict=True):
            _check_parameter(part, f"standardize[{i}].{name}", shape, students[0].device)
    per_image, _, _ = _ops.distill(
        [s.flatten(2) for s in students],
        [t.flatten(2) for t in teachers],
        list(tokens),
        [rows for rows, _ in weighting or ()],
        [bias for _, bias in weighting or ()],
        [level.tokens for level in standardize or ()],
        [level.token_bias for level in standardize or ()],
        [level.affine for level in standardize or ()],
        [s.shape[2] for s in students],
        custom_mask,
        warmup_step,
        custom_mask_warmup,
        loss_weight,
        eps,
        resolve_impl(impl, students[0].device),
    )
    return per_image.sum() if reduction == "sum" else per_image.sum(1)


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
    check_features(x, "x", tokens.shape[1])
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
    check_features(x, "x", rows.shape[2])
    return _eager.weights(x.flatten(2), rows, bias, x.shape[2], x.shape[3])


def dice_loss(masks: Tensor) -> Tensor:
    """Mean Dice coefficient over images and ordered pairs of different masks (T = 1: zero).

    ``2 G_ij / (G_ii + G_jj + 2e-12)`` with ``G_ij = sum_p m_i m_j``. Args: ``masks [N, T, H, W]``. Returns a scalar.
    Raises ValueError for any other number of dimensions. Source: section 3.2 of the paper, with the squared areas of its code.

    Example:
        >>> import torch
        >>> from maskd_triton import functional as F
        >>> left, right = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> F.dice_loss(torch.stack([left, right]).view(1, 2, 1, 2)), F.dice_loss(torch.ones(1, 2, 1, 2))
        (tensor(0.), tensor(1.))
    """
    if masks.dim() != 4:
        raise ValueError(f"masks: expected [N, T, H, W], got shape {list(masks.shape)}")
    flat = masks.flatten(2)
    return _eager.dice_of_gram(torch.bmm(flat, flat.transpose(1, 2)))[0]


def masked_features_and_dice(
    features: Sequence[Tensor],
    tokens: Sequence[Tensor],
    weighting: Sequence[tuple[Tensor, Tensor]] | None = None,
    *,
    token_bias: Sequence[Tensor] | None = None,
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
    return learn(features, tokens, weighting, token_bias, impl)[:2]


def learn(
    features: Sequence[Tensor],
    tokens: Sequence[Tensor],
    weighting: Sequence[tuple[Tensor, Tensor]] | None,
    token_bias: Sequence[Tensor] | None,
    impl: str,
) -> tuple[list[Tensor], Tensor, list[tuple[Tensor, Tensor]]]:
    """:func:`masked_features_and_dice`, and each level's masks ``[N, T, H, W]`` and weights ``[N, T]`` without gradients."""
    check_choice(impl, "impl", IMPLS)
    for name, given in (("tokens", tokens), ("weighting", weighting), ("token_bias", token_bias)):
        if given is not None and len(given) != len(features):
            raise ValueError(f"{name}: expected one entry for each of the {len(features)} levels, got {len(given)}")
    if not features:
        raise ValueError("features: expected at least one level, got none")
    _check_tokens(tokens, weighting)
    first = features[0]
    for i, (x, e) in enumerate(zip(features, tokens, strict=True)):
        check_features(x, f"features[{i}]", e.shape[1])
        for value, name in ((x, f"features[{i}]"), (e, f"tokens[{i}]")):
            if value.device != first.device:
                raise ValueError(f"{name}: expected the device of features[0], {first.device}, got {value.device}")
        if (x.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(f"features[{i}]: expected all features to be float64 or none, got {x.dtype} and {first.dtype}")
    for i, bias in enumerate(token_bias or ()):
        _check_parameter(bias, f"token_bias[{i}]", [len(tokens[i])], first.device)
    masked, dice, kept = _ops.learn(
        [x.flatten(2) for x in features],
        list(tokens),
        list(token_bias or ()),
        [rows for rows, _ in weighting or ()],
        [bias for _, bias in weighting or ()],
        [x.shape[2] for x in features],
        resolve_impl(impl, first.device),
    )
    sizes = [x.shape[2:] for x in features]
    masks, weights = kept[:: _ops.KEPT], kept[1 :: _ops.KEPT]
    seen = [(m.unflatten(2, size), w) for m, w, size in zip(masks, weights, sizes, strict=True)]
    return [y.unflatten(2, size) for y, size in zip(masked, sizes, strict=True)], dice, seen
