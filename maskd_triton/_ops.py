"""The torch.library operators: one forward and one backward for all levels of stage 2.

``custom_op`` rather than ``triton_op``: the body is opaque to torch.compile, so the CPU path, the choice of launch
configuration and the autograd formula are the same in eager mode, under compile and in an exported graph.
"""

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import _eager


def _kernels() -> ModuleType:
    """The Triton launchers, imported on first use: the package itself must work without triton."""
    try:
        from .kernels import distill as kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            'impl="triton" needs the triton package, which is not installed: install it, or pass impl="eager"',
            name="triton",
        ) from error
    return kernels


def _split_masks(masks: Tensor, student: Sequence[Tensor], num_tokens: int) -> list[Tensor]:
    """Views ``[N, T, P]`` of the flat buffer that holds the masks of all levels."""
    parts = torch.split(masks, _mask_sizes(student, num_tokens))
    shapes = [(s.shape[0], num_tokens, s.shape[2]) for s in student]
    return [m[: math.prod(shape)].view(shape) for m, shape in zip(parts, shapes, strict=True)]


def _mask_sizes(student: Sequence[Tensor], num_tokens: int) -> list[int]:
    """Elements of each level in the flat buffer, padded so that every level starts 16-byte aligned."""
    return [(s.shape[0] * num_tokens * s.shape[2] + 3) // 4 * 4 for s in student]


def _new_outputs(student: Sequence[Tensor], num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty per-image losses [levels, N], flat masks of all levels, gradient coefficients [levels, N, T]."""
    first = student[0]
    acc, n, levels = _eager.acc_dtype(first.dtype), first.shape[0], len(student)
    return (
        first.new_empty((levels, n), dtype=acc),
        first.new_empty((sum(_mask_sizes(student, num_tokens)),), dtype=acc),
        first.new_empty((levels, n, num_tokens), dtype=acc),
    )


@torch.library.custom_op("maskd_triton::distill", mutates_args=())
def distill(
    student: list[Tensor],
    teacher: list[Tensor],
    tokens: list[Tensor],
    pool_rows: list[Tensor],
    pool_bias: list[Tensor],
    heights: list[int],
    custom_mask: bool,
    warmup_step: Tensor | None,
    custom_mask_warmup: int,
    loss_weight: float,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-image losses ``[levels, N]`` (already divided by N), flat masks, gradient coefficients ``[levels, N, T]``.

    ``student``, ``teacher``: ``[N, C_i, P_i]`` per level, any strides. ``tokens``: ``[T, C_i]``. ``pool_rows``
    ``[9, T, C_i]`` and ``pool_bias`` ``[T]`` from ``compose_weighting``; both empty for ``weight_mask=False``.
    ``warmup_step``: int64 scalar; masks follow the student once it has reached ``custom_mask_warmup`` (None: always).
    """
    loss, masks, coefficients = _new_outputs(student, tokens[0].shape[0])
    outputs = _split_masks(masks, student, tokens[0].shape[0])
    if impl == "triton":
        _kernels().forward(
            student, teacher, tokens, pool_rows, pool_bias, heights, custom_mask, warmup_step, custom_mask_warmup,
            loss_weight, eps, loss, outputs, coefficients,
        )  # fmt: skip
        return loss, masks, coefficients
    customised: Tensor | bool = custom_mask
    if custom_mask and warmup_step is not None:
        customised = warmup_step >= custom_mask_warmup
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        rows, bias = (pool_rows[i], pool_bias[i]) if pool_rows else (None, None)
        loss[i], m, coefficients[i] = _eager.distill_forward(
            s, t, tokens[i], rows, bias, customised, heights[i], s.shape[2] // heights[i], loss_weight, eps
        )
        outputs[i].copy_(m)
    return loss, masks, coefficients


@distill.register_fake
def _(
    student: list[Tensor],
    teacher: list[Tensor],
    tokens: list[Tensor],
    pool_rows: list[Tensor],
    pool_bias: list[Tensor],
    heights: list[int],
    custom_mask: bool,
    warmup_step: Tensor | None,
    custom_mask_warmup: int,
    loss_weight: float,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_outputs(student, tokens[0].shape[0])


@torch.library.custom_op("maskd_triton::distill_backward", mutates_args=())
def distill_backward(
    grad: Tensor, student: list[Tensor], teacher: list[Tensor], masks: Tensor, coefficients: Tensor, impl: str
) -> list[Tensor]:
    """Gradients for ``student``; ``grad [levels, N]`` may have any strides, also expanded ones."""
    levels = _split_masks(masks, student, coefficients.shape[2])
    if impl == "triton":
        return _kernels().backward(grad, student, teacher, levels, coefficients)
    return [
        _eager.distill_backward(grad[i], s, t, levels[i], coefficients[i])
        for i, (s, t) in enumerate(zip(student, teacher, strict=True))
    ]


@distill_backward.register_fake
def _(
    grad: Tensor, student: list[Tensor], teacher: list[Tensor], masks: Tensor, coefficients: Tensor, impl: str
) -> list[Tensor]:
    return [torch.empty_like(s) for s in student]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    student, teacher, ctx.impl = inputs[0], inputs[1], inputs[-1]
    ctx.levels, ctx.sequences = len(student), [len(x) for x in inputs[:5]]
    _, masks, coefficients = output
    ctx.mark_non_differentiable(masks, coefficients)
    ctx.save_for_backward(*student, *teacher, masks, coefficients)


def _backward(ctx, grad, _masks, _coefficients):  # type: ignore[no-untyped-def]
    *features, masks, coefficients = ctx.saved_tensors
    student, teacher = features[: ctx.levels], features[ctx.levels :]
    grads = distill_backward(grad, student, teacher, masks, coefficients, ctx.impl)
    frozen = [[None] * k for k in ctx.sequences[1:]]
    return grads, *frozen, *[None] * 7


distill.register_autograd(_backward, setup_context=_setup_context)
