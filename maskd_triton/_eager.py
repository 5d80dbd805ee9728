"""The collapsed algebra in plain torch: what the Triton kernels compute, on any device.

Features are ``x [N, C, P]`` with ``P = H*W`` (a view of ``[N, C, H, W]``, any strides). Nothing of size
``[N, T, C, P]`` and no 3x3 convolution is ever built. Sums are taken in ``acc_dtype``: float32, or float64 for
float64 features.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., object])

# A 3x3 convolution with padding 1, averaged over all positions, is linear in nine sums of the input: everything,
# minus what the window pushes over one of the four borders, plus the four corners that this takes off twice.
# Row s of this table says with which sign strip s enters the sum that tap (k, l) of the kernel sees.
STRIPS = ("all", "top", "bottom", "left", "right", "top-left", "top-right", "bottom-left", "bottom-right")
_TAP_SIGNS = (
    ((1, 1, 1), (1, 1, 1), (1, 1, 1)),
    ((0, 0, 0), (0, 0, 0), (-1, -1, -1)),  # the top row is never seen by the lower taps
    ((-1, -1, -1), (0, 0, 0), (0, 0, 0)),
    ((0, 0, -1), (0, 0, -1), (0, 0, -1)),
    ((-1, 0, 0), (-1, 0, 0), (-1, 0, 0)),
    ((0, 0, 0), (0, 0, 0), (0, 0, 1)),
    ((0, 0, 0), (0, 0, 0), (1, 0, 0)),
    ((0, 0, 1), (0, 0, 0), (0, 0, 0)),
    ((1, 0, 0), (0, 0, 0), (0, 0, 0)),
)


def _full_precision(function: Function) -> Function:
    """Autocast would run the products of an autocast region in half precision."""

    @functools.wraps(function)
    def run(x: Tensor, *args: object) -> object:
        if not torch.amp.is_autocast_available(x.device.type):
            return function(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args)

    return run  # type: ignore[return-value]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are taken in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tap_signs(like: Tensor) -> Tensor:
    """``[9, 3, 3]``: the sign with which strip ``s`` enters the sum seen by tap ``(k, l)``."""
    return torch.tensor(_TAP_SIGNS, dtype=like.dtype, device=like.device)


def strip_sums(x: Tensor, height: int, width: int) -> Tensor:
    """Sums of ``x [N, C, P]`` over the nine :data:`STRIPS` -> ``[N, 9, C]`` in the accumulation dtype."""
    acc = acc_dtype(x.dtype)
    image = x.unflatten(2, (height, width))
    corners = [image[:, :, i, j].to(acc) for i in (0, -1) for j in (0, -1)]
    borders = [image[:, :, 0, :], image[:, :, -1, :], image[:, :, :, 0], image[:, :, :, -1]]
    return torch.stack([x.sum(2, dtype=acc), *(b.sum(2, dtype=acc) for b in borders), *corners], dim=1)


@_full_precision
def compose_weighting(w3: Tensor, b3: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """Fold conv1x1(avgpool(conv3x3(.))) into one linear map of the strip sums.

    Args: ``w3 [C, C, 3, 3]``, ``b3 [C]``, ``w1 [T, C, 1, 1]``, ``b1 [T]``.
    Returns ``rows [9, T, C]`` and ``bias [T]`` such that the logits of an image are
    ``sum_s rows[s] @ strip_sums[s] / P + bias``.

    Example:
        >>> import torch
        >>> from maskd_triton import functional as F
        >>> w3, b3, w1, b1 = torch.randn(8, 8, 3, 3), torch.randn(8), torch.randn(6, 8, 1, 1), torch.randn(6)
        >>> rows, bias = F.compose_weighting(w3, b3, w1, b1)
        >>> rows.shape, bias.shape
        (torch.Size([9, 6, 8]), torch.Size([6]))
    """
    w1 = w1.flatten(1)
    taps = torch.einsum("to,ockl->tckl", w1, w3)
    rows = torch.einsum("skl,tckl->stc", tap_signs(taps), taps)
    return rows.contiguous(), w1 @ b3 + b1


@_full_precision
def masks(x: Tensor, tokens: Tensor) -> Tensor:
    """``sigmoid(tokens @ x)``: ``x [N, C, P]``, ``tokens [T, C]`` -> ``[N, T, P]`` in the accumulation dtype."""
    acc = acc_dtype(x.dtype)
    return torch.sigmoid(torch.matmul(tokens.to(acc), x.to(acc)))


@_full_precision
def weights(x: Tensor, rows: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Softmax mask weights ``[N, T]`` of ``x [N, C, P]`` from :func:`compose_weighting`'s rows and bias."""
    sums = strip_sums(x, height, width)
    logits = torch.einsum("nsc,stc->nt", sums, rows.to(sums.dtype)) / (height * width) + bias.to(sums.dtype)
    return torch.softmax(logits, dim=1)


@_full_precision
def distill_forward(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    customised: Tensor | bool,
    height: int,
    width: int,
    loss_weight: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One level of stage 2: per-image losses ``[N]``, masks ``[N, T, P]`` and gradient coefficients ``[N, T]``.

    ``grad_student = grad_loss[n] * (s - t) * sum_t coefficients[n, t] * masks[n, t, p]**2``.
    """
    n, c, _ = student.shape
    t = tokens.shape[0]
    m = masks(teacher, tokens)
    if customised is not False:
        followed = m * masks(student, tokens)
        m = followed if customised is True else torch.where(customised, followed, m)
    acc = m.dtype
    difference = student.to(acc) - teacher.to(acc)
    d = difference.mul_(difference).sum(1)
    a = torch.einsum("ntp,ntp,np->nt", m, m, d)
    b = m.sum(2)
    w = b.new_full((), 1.0 / t) if rows is None or bias is None else weights(teacher, rows, bias, height, width)
    share = w * (loss_weight / (max(n, 1) * c)) / (b + eps)
    return (share * a).sum(1), m, 2 * share


@_full_precision
def distill_backward(grad: Tensor, student: Tensor, teacher: Tensor, m: Tensor, coefficients: Tensor) -> Tensor:
    """Gradient of one level's per-image losses for ``student``, in its dtype and (dense) strides."""
    scale = torch.einsum("ntp,ntp,nt->np", m, m, coefficients * grad[:, None])
    out = torch.empty_like(student)
    if student.dtype == teacher.dtype == m.dtype:
        torch.sub(student, teacher, out=out)
        return out.mul_(scale[:, None, :])
    return out.copy_((student.to(m.dtype) - teacher.to(m.dtype)).mul_(scale[:, None, :]))


@_full_precision
def pairwise_dice(m: Tensor) -> Tensor:
    """Mean Dice coefficient of the ``T (T - 1)`` ordered pairs of ``m [N, T, P]``; 0 for ``T = 1`` or ``N = 0``."""
    n, t, _ = m.shape
    gram = torch.bmm(m, m.transpose(1, 2))
    area = torch.diagonal(gram, dim1=1, dim2=2)
    dice = 2 * gram / (area[:, :, None] + area[:, None, :] + 2e-12)
    others = 1 - torch.eye(t, dtype=m.dtype, device=m.device)
    return (dice * others).sum() / max(n * t * (t - 1), 1)


@_full_precision
def learned_weights(x: Tensor, w3: Tensor, b3: Tensor, w1: Tensor, b1: Tensor, height: int, width: int) -> Tensor:
    """Softmax mask weights ``[N, T]``, cheap to differentiate for the convolutions: no ``[T, C, C]`` product."""
    sums = strip_sums(x, height, width)
    w3, b3, w1, b1 = (p.to(sums.dtype) for p in (w3, b3, w1, b1))
    seen = torch.einsum("skl,nsc->nckl", tap_signs(sums), sums) / (height * width)
    pooled = torch.einsum("ockl,nckl->no", w3, seen) + b3
    return torch.softmax(pooled @ w1.flatten(1).T + b1, dim=1)


@_full_precision
def gate(x: Tensor, m: Tensor, w: Tensor | None) -> Tensor:
    """``x * sum_t w[n, t] m[n, t, p]`` (``w`` None: an unnormalised sum) in the dtype of ``x``."""
    a = m.sum(1) if w is None else torch.einsum("nt,ntp->np", w, m)
    return (x.to(a.dtype) * a[:, None, :]).to(x.dtype)
