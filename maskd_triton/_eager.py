"""The algebra in plain torch: what the Triton kernels compute, on any device.

Features are ``x [N, C, P]`` with ``P = H*W`` (a view of ``[N, C, H, W]``, any strides). Nothing of size
``[N, T, C, P]`` and no 3x3 convolution is ever built. Sums are taken in ``acc_dtype``: float32, or float64 for
float64 features.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from . import _checks as check
from ._records import Distilled, DistillKept, DistillOptions, LearnOptions

DICE_EPS = 2e-12  # added to the sum of a pair's areas, as published

Function = TypeVar("Function", bound=Callable[..., object])

# A 3x3 convolution with padding 1, averaged over all positions, is linear in nine sums of the input: everything,
# minus what the window pushes over one of the four borders, plus the four corners that this takes off twice.
STRIPS = ("all", "top", "bottom", "left", "right", "top-left", "top-right", "bottom-left", "bottom-right")
_OF_ROWS_AND_COLUMNS = (4, 1, 7, 3, 5, 0, 2, 6, 8)  # the strips among pairs of (first, all, last) rows and columns


def _full_precision(function: Function) -> Function:
    """Autocast would run the products of an autocast region in half precision."""

    @functools.wraps(function)
    def run(*args: Any, **named: Any) -> object:
        first = args[0] if args else next(iter(named.values()), None)
        x = first[0] if isinstance(first, list | tuple) and first else first
        if not isinstance(x, Tensor) or not torch.amp.is_autocast_available(x.device.type):
            return function(*args, **named)
        with torch.autocast(x.device.type, enabled=False):
            return function(*args, **named)

    return run  # type: ignore[return-value]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are taken in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tap_signs(like: Tensor) -> Tensor:
    """``[9, 3, 3]``: the sign with which strip ``s`` enters the sum seen by tap ``(k, l)``.

    Computed on the device: a table from the host would have to be waited for, and no CUDA graph could hold the copy.
    """
    signs = -torch.eye(3, dtype=like.dtype, device=like.device).flip(0)  # the last tap misses the first row, the first the last
    signs[1].fill_(1)  # every tap sees all rows, but for these
    pairs = (signs[:, None, :, None] * signs[None, :, None, :]).flatten(0, 1).unbind()
    return torch.stack([pairs[i] for i in _OF_ROWS_AND_COLUMNS])


def strip_sums(x: Tensor, height: int, width: int, every: Tensor | None = None) -> Tensor:
    """Sums of ``x [N, C, P]`` over the nine `STRIPS` -> ``[N, 9, C]`` in the accumulation dtype; ``every [N, C]``: those over
    all pixels, where they are known."""
    acc = acc_dtype(x.dtype)
    image = x.unflatten(2, (height, width))
    corners = [image[:, :, i, j].to(acc) for i in (0, -1) for j in (0, -1)]
    borders = [image[:, :, 0, :], image[:, :, -1, :], image[:, :, :, 0], image[:, :, :, -1]]
    every = x.sum(2, dtype=acc) if every is None else every
    return torch.stack([every, *(b.sum(2, dtype=acc) for b in borders), *corners], dim=1)


@_full_precision
def compose_weighting(w3: Tensor, b3: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """Fold ``conv1x1(avgpool(conv3x3(x)))`` into one linear map of nine sums of ``x``.

    The nine are the sums over all pixels, over the four borders and over the four corners. With them, the logits of an image of
    P pixels are ``sum_s rows[s] @ sums[s] / P + bias``.

    Args:
        w3: weight of the 3x3 convolution, ``[C, C, 3, 3]``.
        b3: its bias, ``[C]``.
        w1: weight of the 1x1 convolution, ``[T, C, 1, 1]``.
        b1: its bias, ``[T]``.

    Returns:
        ``rows [9, T, C]`` and ``bias [T]``, differentiable in every argument.

    Raises:
        TypeError, ValueError: an argument that does not fit, named.

    Examples:
        >>> import torch
        >>> from maskd_triton import functional as F
        >>> w3, b3, w1, b1 = torch.randn(8, 8, 3, 3), torch.randn(8), torch.randn(6, 8, 1, 1), torch.randn(6)
        >>> rows, bias = F.compose_weighting(w3, b3, w1, b1)
        >>> rows.shape, bias.shape
        (torch.Size([9, 6, 8]), torch.Size([6]))
    """
    for name, value in (("w3", w3), ("w1", w1)):
        if not isinstance(value, Tensor) or value.dim() != 4:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise (ValueError if isinstance(value, Tensor) else TypeError)(
                f"{name}: expected a tensor of 4 dimensions, got {got}"
            )
    (t, c), device = w1.shape[:2], w3.device
    shapes = {"w3": (w3, [c, c, 3, 3]), "b3": (b3, [c]), "w1": (w1, [t, c, 1, 1]), "b1": (b1, [t])}
    for name, (value, shape) in shapes.items():
        check.parameter(value, name, shape, device)
    w1 = w1.flatten(1)
    taps = torch.einsum("to,ockl->tckl", w1, w3)
    rows = torch.einsum("skl,tckl->stc", tap_signs(taps), taps)
    return rows.contiguous(), w1 @ b3 + b1


class Standardization(NamedTuple):
    """Tables of one level with which raw features are masked and compared as if they were standardised.

    `compose_standardization` makes it.

    Attributes:
        tokens: ``[T, C]``, the tokens for raw features, ``E / std``.
        token_bias: ``[T]``, added to their mask logits, ``-(E / std) @ mean``.
        affine: ``[2, C]``, mean and 1 / std of every channel.

    Examples:
        >>> import torch
        >>> from maskd_triton import functional as F
        >>> raw, _ = F.compose_standardization(torch.ones(1, 2), torch.tensor([3.0, 0.0]), torch.tensor([2.0, 1.0]))
        >>> raw.tokens, raw.token_bias
        (tensor([[0.5000, 1.0000]]), tensor([-1.5000]))
    """

    tokens: Tensor
    token_bias: Tensor
    affine: Tensor


@_full_precision
def compose_standardization(
    tokens: Tensor, mean: Tensor, std: Tensor, weighting: tuple[Tensor, Tensor] | None = None
) -> tuple[Standardization, tuple[Tensor, Tensor] | None]:
    """Fold the standardisation ``(x - mean) / std`` of every channel into tokens and mask weighting.

    Mask logits and weight logits are linear in the features, so masks and weights of standardised features come from the raw
    ones at no cost. The zero padding of the 3x3 convolution pads standardised features. What the mean adds to the sum over a
    border then depends on the border's length, so the bias depends on H and W.

    Args:
        tokens: ``[T, C]``.
        mean: ``[C]``.
        std: ``[C]``.
        weighting: ``(rows, bias)`` from `compose_weighting`; None: no mask weights.

    Returns:
        A `Standardization`, and the weighting for raw features: ``rows [9, T, C]`` and ``bias [5, T]``, or None without
        ``weighting``. The bias of an image is ``bias[0] + bias[1] / H + bias[2] / W + (bias[3] + bias[4]) / (H W)``; the last
        two belong to the corners of either diagonal.

    Raises:
        TypeError, ValueError: an argument that does not fit, named.

    Examples:
        >>> import torch
        >>> from maskd_triton import functional as F
        >>> x, tokens, mean, std = torch.randn(1, 8, 4, 4), torch.randn(6, 8), torch.randn(8), torch.rand(8) + 1
        >>> raw, _ = F.compose_standardization(tokens, mean, std)
        >>> standardised = (x - mean[:, None, None]) / std[:, None, None]
        >>> masks = F.receptive_masks(x, raw.tokens, raw.token_bias)
        >>> torch.allclose(masks, F.receptive_masks(standardised, tokens), atol=1e-6)
        True
    """
    check.tokens(tokens, "tokens")
    for value, name in ((mean, "mean"), (std, "std")):
        check.parameter(value, name, [tokens.shape[1]], tokens.device)
    if weighting is not None:
        check.weighting(*weighting, tokens.shape[1], tokens.device)
    raw = tokens / std
    standardization = Standardization(raw, -(raw @ mean), torch.stack([mean, 1 / std]))
    if weighting is None:
        return standardization, None
    rows, bias = weighting
    rows = rows / std
    drift = rows @ mean  # [9, T], times a strip's length
    constants = (bias - drift[0], -drift[1:3].sum(0), -drift[3:5].sum(0), -drift[5] - drift[8], -drift[6] - drift[7])
    return standardization, (rows, torch.stack(constants))


@_full_precision
def masks(x: Tensor, tokens: Tensor, token_bias: Tensor | None = None) -> Tensor:
    """``sigmoid(tokens @ x + token_bias)``: ``x [N, C, P]``, ``tokens [T, C]`` -> ``[N, T, P]`` in the accumulation dtype."""
    acc = acc_dtype(x.dtype)
    logits = torch.bmm(tokens.to(acc).expand(len(x), -1, -1), x.to(acc))  # matmul would copy x
    if token_bias is not None:
        logits += token_bias[:, None]
    return torch.sigmoid(logits)


@_full_precision
def weights_of_sums(sums: Tensor, rows: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Softmax mask weights ``[N, T]`` from strip sums ``[N, 9, C]`` and the weighting's rows and bias."""
    bias = bias.to(sums.dtype)
    if bias.dim() == 2:
        bias = bias[0] + bias[1] / height + bias[2] / width + (bias[3] + bias[4]) / (height * width)
    logits = torch.einsum("nsc,stc->nt", sums, rows.to(sums.dtype)) / (height * width) + bias
    return torch.softmax(logits, dim=1)


def strips_of(valid: Tensor, height: int) -> Tensor:
    """How often every pixel enters each strip sum ``[N, 9, P]`` of the valid pixels, int8; ``valid [N, P]``.

    "top" are those without a valid pixel above, and so on; "top-left" what top and left count too often.
    """
    v = torch.nn.functional.pad((valid != 0).to(torch.int8).unflatten(1, (height, -1)), (1, 1, 1, 1))
    here = v[:, 1:-1, 1:-1]

    def alone(down: int, right: int) -> Tensor:
        h, w = here.shape[1:]
        return here * (1 - v[:, 1 + down : 1 + down + h, 1 + right : 1 + right + w])

    top, bottom, left, right = alone(-1, 0), alone(1, 0), alone(0, -1), alone(0, 1)
    corners = top + left - alone(-1, -1), top + right - alone(-1, 1), bottom + left - alone(1, -1), bottom + right - alone(1, 1)
    return torch.stack([here, top, bottom, left, right, *corners], 1).flatten(2)


@_full_precision
def weights_of_valid(x: Tensor, valid: Tensor, height: int, rows: Tensor, bias: Tensor) -> Tensor:
    """Softmax mask weights ``[N, T]`` of the valid pixels of ``x [N, C, P]``, differentiable; ``valid [N, P]``."""
    strips = strips_of(valid, height)
    counts = strips.sum(2).to(acc_dtype(x.dtype))  # [N, 9]: how many pixels each strip has
    sums = _valid_strip_sums(x, valid, strips)
    bias = bias.to(sums.dtype)
    pixels = counts[:, :1].clamp(min=1)  # an image without valid pixels has some weights, too
    logits = torch.einsum("nsc,stc->nt", sums, rows.to(sums.dtype)) / pixels
    if bias.dim() == 2:
        top, left, falling, rising = (counts[:, i : i + 1] for i in (1, 3, 5, 6))  # as many at the bottom, on the right, ...
        logits = logits + (top * bias[1] + left * bias[2] + falling * bias[3] + rising * bias[4]) / pixels
        bias = bias[0]
    return torch.softmax(logits + bias, dim=1)


def _valid_strip_sums(x: Tensor, valid: Tensor, strips: Tensor) -> Tensor:
    """Sums ``[N, 9, C]`` of ``x`` over the strips of valid pixels. Image by image: half features are copied in float32."""
    acc = acc_dtype(x.dtype)
    if len(x) == 0:
        return x.new_zeros((0, 9, x.shape[1]), dtype=acc)
    images = zip(x.unbind(), (valid == 0).unbind(), strips.to(acc).unbind(), strict=True)
    return torch.stack([s @ image.to(acc).masked_fill(padding, 0).t() for image, padding, s in images])


def weights(x: Tensor, rows: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Softmax mask weights ``[N, T]`` of ``x [N, C, P]``."""
    return weights_of_sums(strip_sums(x, height, width), rows, bias, height, width)


@_full_precision
def distill_forward(student: Sequence[Tensor], teacher: Sequence[Tensor], options: DistillOptions, outputs: Distilled) -> None:
    """Stage 2 of all levels ``[N, C, H, W]``; fills ``outputs``."""
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        _distill_level(s, t, options, i, outputs)


def _of_level(tensors: Sequence[Tensor], i: int) -> Any:
    return tensors[i] if tensors else None


def _distill_level(student: Tensor, teacher: Tensor, options: DistillOptions, i: int, outputs: Distilled) -> None:
    tokens, rows, bias, teacher_tokens, token_bias, statistics = (_of_level(field, i) for field in options.tables)
    valid, given, m = _of_level(options.valid, i), _of_level(options.masks, i), outputs.masks[i]
    n, c, height, width = student.shape
    student, teacher = student.flatten(2), teacher.flatten(2)
    if given is not None:
        m.copy_(given)
    else:
        m.copy_(masks(teacher, tokens if teacher_tokens is None else teacher_tokens, token_bias))
    if options.custom_mask:
        own = masks(student, tokens)
        m.mul_(own if options.customised is None else torch.where(options.customised, own, 1))
    d = _distances(student, teacher, statistics, options, _of_level(outputs.cosines, i), m.dtype)
    if valid is not None:
        m.masked_fill_((valid == 0)[:, None], 0)
        d.masked_fill_(valid == 0, 0)
    # a matrix product would add up 67200 pixels one by one
    again: dict[int, Tensor | float] = {1: 1.0, 2: m}  # of the mask's power
    a = (m * d[:, None]).mul_(again[options.mask_power]).sum(2)
    area = m.sum(2) + options.eps
    if rows is not None:
        w = weights(teacher, rows, bias, height, width)
    else:
        w = area.new_full((), 1.0 / m.shape[1]) if options.weights is None else options.weights[i]
    share = w / (max(n, 1) * (1 if options.distance == "cosine" else c)) / area
    if valid is not None or given is not None:  # an image without valid pixels counts nothing also without eps
        share = torch.where(area == 0, 0, share)
    outputs.per_image[i] = (share * a).sum(1)
    outputs.weights[i] = w
    outputs.coefficients[i] = 2 * share if options.distance == "squared" else share


COSINE_EPS = 1e-8  # the least length that a cosine divides by, as in torch


def _distances(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor | None,
    options: DistillOptions,
    cosines: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Distances ``[N, P]`` of a pixel's features in ``[N, C, P]``, but for the squared and smooth L1 ones' ``1 / C``."""
    buffer = torch.empty_like(student, dtype=dtype)
    if cosines is not None:
        # one map, however often it is written: memory is what a CPU waits for
        own = _reconstructed(student, None, buffer).square_().sum(1)
        across = _reconstructed(teacher, statistics, buffer).square_().sum(1)
        product = _reconstructed(teacher, statistics, buffer).mul_(student).sum(1)
        length, other = own.sqrt().clamp(min=COSINE_EPS), across.sqrt().clamp(min=COSINE_EPS)
        reciprocal = 1 / length / other
        cosines[:, 1] = reciprocal
        # a length that is clamped does not depend on the features
        cosines[:, 0] = torch.where(length > COSINE_EPS, product * reciprocal / length / length, 0)
        return 1 - product * reciprocal
    difference = _difference(student, teacher, statistics, buffer)
    if options.distance == "squared":
        return difference.mul_(difference).sum(1)
    if options.distance == "smooth_l1":
        zeros = difference.new_zeros(()).expand_as(difference)
        return smooth_l1_loss(difference, zeros, reduction="none", beta=options.beta).sum(1)
    raise NotImplementedError(f"distance {options.distance!r}")


@_full_precision
def distill_backward(student: Sequence[Tensor], teacher: Sequence[Tensor], grad: Tensor, kept: DistillKept) -> list[Tensor]:
    """Gradients of the per-image losses for every level of the student, in its dtype and (dense) strides."""
    product = {1: "ntp,nt->np", 2: "ntp,ntp,nt->np"}[kept.mask_power]
    results = []
    for i, (s, t, m) in enumerate(zip(student, teacher, kept.masks, strict=True)):
        factors = kept.coefficients[i] * grad[i][:, None]
        scale = torch.einsum(product, *[m] * kept.mask_power, factors).unflatten(1, s.shape[2:])
        out = torch.empty_like(s)
        precise = out if out.dtype == m.dtype else torch.empty_like(s, dtype=m.dtype)
        _slope(s, t, _of_level(kept.statistics, i), kept, _of_level(kept.cosines, i), precise).mul_(scale[:, None])
        if kept.valid:
            precise.masked_fill_((kept.valid[i] == 0).unflatten(1, s.shape[2:])[:, None], 0)
        if kept.distance == "cosine" and out.dtype == torch.float16:  # a vector of zeros has a gradient of 1e8 and more
            precise.clamp_(-65504, 65504)
        results.append(out if precise is out else out.copy_(precise))
    return results


def _slope(
    student: Tensor, teacher: Tensor, affine: Tensor | None, kept: DistillKept, cosines: Tensor | None, out: Tensor
) -> Tensor:
    """The gradient of a pixel's distance for the student's features, but for a factor per pixel; written into ``out``."""
    if cosines is not None:
        own, other = cosines.unflatten(2, student.shape[2:]).unbind(1)
        return _reconstructed(teacher, affine, out).mul_(-other[:, None]).addcmul_(student.to(out.dtype), own[:, None])
    difference = _difference(student, teacher, affine, out)
    if kept.distance == "squared":
        return difference
    if kept.distance == "smooth_l1":
        return difference.div_(kept.beta).clamp_(-1, 1)
    raise NotImplementedError(f"distance {kept.distance!r}")


def _reconstructed(teacher: Tensor, affine: Tensor | None, out: Tensor) -> Tensor:
    """``t``, or ``(t - mean) / std``, written into ``out``, in whose dtype it is computed."""
    out.copy_(teacher)
    if affine is not None:
        mean, reciprocal = affine.to(out.dtype).view(2, -1, *[1] * (out.dim() - 2))
        out.sub_(mean).mul_(reciprocal)
    return out


def _difference(student: Tensor, teacher: Tensor, affine: Tensor | None, out: Tensor) -> Tensor:
    """``s - t``, or ``s - (t - mean) / std``, written into ``out``, in whose dtype it is computed."""
    if affine is not None:
        mean, reciprocal = affine.to(out.dtype).view(2, -1, *[1] * (out.dim() - 2))
        return out.copy_(teacher).sub_(mean).mul_(-reciprocal).add_(student)
    if student.dtype == teacher.dtype == out.dtype:
        return torch.sub(student, teacher, out=out)
    return out.copy_(student).sub_(teacher)


@_full_precision
def gram(m: Tensor) -> Tensor:
    """``G[n, i, j] = sum_p m[n, i, p] m[n, j, p]`` of masks ``[N, T, P]``, in the accumulation dtype."""
    m = m.to(acc_dtype(m.dtype))
    return torch.bmm(m, m.transpose(1, 2))


def dice_of_gram(gram: Tensor) -> Tensor:
    """Every image's share ``[N]`` of the mean Dice coefficient of the ``T (T - 1)`` ordered pairs of masks, 0 for ``T = 1``."""
    n, t, _ = gram.shape
    area = torch.diagonal(gram, dim1=1, dim2=2)
    others = 1 - torch.eye(t, dtype=gram.dtype, device=gram.device)
    coefficients = 2 * gram / (area[:, :, None] + area[:, None, :] + DICE_EPS) * others
    return coefficients.sum((1, 2)) / max(n * t * (t - 1), 1)


@_full_precision
def learn(features: Sequence[Tensor], options: LearnOptions) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
    """Stage 1 of all levels ``[N, C, P]``, differentiable in everything: masked features, Dice losses ``[levels]``, masks
    ``[N, T, P]`` and mask weights ``[N, T]``."""
    levels = [_learn_level(x, options, i) for i, x in enumerate(features)]
    masked, dice, m, w = ([level[k] for level in levels] for k in range(4))
    return masked, torch.stack(dice), m, w


def _learn_level(x: Tensor, options: LearnOptions, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, token_bias, rows, bias = (_of_level(field, i) for field in options.tables)
    valid, given, height = _of_level(options.valid, i), _of_level(options.weights, i), options.heights[i]
    value = x.to(acc_dtype(x.dtype))  # once, so that its gradient is rounded once
    padding = None if valid is None else (valid == 0)[:, None]
    if padding is not None:
        value = torch.where(padding, 0, value)  # keeps strides, as masked_fill does not; a NaN would stay in gradients
    m = masks(value, tokens, token_bias)
    if padding is not None:
        m = m.masked_fill(padding, 0)
    if given is not None:
        w = given.to(m.dtype)
    elif rows is None:
        w = m.new_ones(m.shape[:2])
    else:
        w = weights(value, rows, bias, height, x.shape[2] // height)
    gate = torch.einsum("nt,ntp->np", w, m)[:, None]
    return (value * gate).to(x.dtype), dice_of_gram(gram(m)).sum(), m, w


@_full_precision
def resized_valid(x: Tensor, source: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """The valid part of every image of ``x [N, C, H, W]`` resized to that of ``goal``, as bilinear interpolation of a cropped
    image would: padding has no part in it.

    ``source [N, H, W]`` and ``goal [N, H', W']``: non-zero where pixels are valid. Returns ``[N, C, H', W']`` in the dtype of
    ``x``, and ``goal`` without those pixels that no valid one stands for.
    """
    acc = acc_dtype(x.dtype)
    source, goal = source != 0, goal != 0
    rows = _interpolation(source.any(2), goal.any(2), acc)
    columns = _interpolation(source.any(1), goal.any(1), acc)

    def resized(maps: Tensor) -> Tensor:
        return torch.einsum("nvw,nchw->nchv", columns, torch.einsum("nuh,nchw->ncuw", rows, maps))

    weight = resized(source[:, None].to(acc))
    counted = weight > 1e-3  # rounding leaves more than 0 where there is nothing
    values = resized(x.to(acc).masked_fill(~source[:, None], 0)) / weight.where(counted, 1)
    return values.to(x.dtype), (goal & counted[:, 0]).to(torch.uint8)


def _interpolation(source: Tensor, goal: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights ``[N, L', L]`` of linear interpolation from the valid range of ``source [N, L]`` to that of ``goal [N, L']``."""
    first, length = _range(source, dtype)
    first_of_goal, length_of_goal = _range(goal, dtype)
    position = torch.arange(goal.shape[1], dtype=dtype, device=goal.device) - first_of_goal + 0.5
    position = (position * (length / length_of_goal.clamp(min=1)) - 0.5).clamp(min=0).minimum((length - 1).clamp(min=0)) + first
    pixel = torch.arange(source.shape[1], dtype=dtype, device=source.device)
    return (1 - (position[:, :, None] - pixel).abs()).clamp(min=0)


def _range(valid: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """First index and length ``[N, 1]`` of the range that holds all that is valid of ``[N, L]``; length 0: nothing."""
    first = valid.to(torch.uint8).argmax(1, keepdim=True)
    after = valid.shape[1] - valid.flip(1).to(torch.uint8).argmax(1, keepdim=True)
    return first.to(dtype), torch.where(valid.any(1, keepdim=True), after - first, 0).to(dtype)
