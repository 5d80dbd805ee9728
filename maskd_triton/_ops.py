"""The torch.library operators: for each stage one forward and one backward for all levels.

Opaque operators rather than ``triton_op``: the CPU path, the choice of launch configuration and the autograd formula are the
same in eager mode, under compile and in an exported graph. Defined with ``torch.library.Library`` rather than ``custom_op``,
whose wrappers flatten every list several times, which takes longer than all else on the host (``python -m bench.host``).
"""

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import _eager

_LIBRARY = torch.library.Library("maskd_triton", "DEF")


def _operator(function: Callable[..., Any]) -> Any:
    """``torch.ops.maskd_triton.<name of function>``, on every device."""
    name = function.__name__
    schema = name + torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    operator = getattr(torch.ops.maskd_triton, name).default
    _FUNCTIONS[operator] = function
    return operator


_FUNCTIONS: dict[Any, Callable[..., Any]] = {}


def _fake(operator: Any) -> Callable[[Callable[..., Any]], None]:
    """Registers what ``operator`` returns for tensors without data."""
    return lambda function: torch.library.register_fake(operator.name(), function, lib=_LIBRARY)


def _traced(maps: Sequence[Tensor]) -> bool:
    """Whether the operator must be seen: by a compiler, by a mode, or by tensors that are more than memory and strides.

    Otherwise its function is called as it is: the dispatcher converts every list of tensors four times a pass, which takes
    longer than all else on the host.
    """
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or any(type(x) not in _PLAIN for x in maps)


_PLAIN = (Tensor, torch.nn.Parameter)


def _below_autograd(operator: Any, maps: Sequence[Tensor], *arguments: Any) -> Any:
    if not _traced(maps):
        return _FUNCTIONS[operator](maps, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(maps, *arguments)


class _DifferentiableOnce(torch.autograd.Function):
    """The first ``count`` tensors as they are, made to depend on all the others; to differentiate that is an error."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.operator = name
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"maskd_triton::{ctx.operator} has no derivative: the loss can be differentiated once only")


_Backward = Callable[..., tuple[Tensor | None, ...]]


def _once_differentiable(name: str) -> Callable[[_Backward], _Backward]:
    """Torch's decorator of this name makes the gradient a silent constant wherever the incoming one needs no gradient."""

    def decorator(backward: _Backward) -> _Backward:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                results = backward(ctx, *grads)
            present, inputs = ([x for x in xs if x is not None] for xs in (results, grads))
            checked = iter(_DifferentiableOnce.apply(name, len(present), *present, *inputs, *ctx.saved_tensors))
            return tuple(None if x is None else next(checked) for x in results)

        return wrapper

    return decorator


@functools.cache
def _kernels(stage: str) -> ModuleType:
    """The Triton launchers of a stage, imported on first use: the package itself must work without triton."""
    try:
        return importlib.import_module(f".kernels.{stage}", __package__)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            'impl="triton" needs the triton package, which is not installed: install it, or pass impl="eager"',
            name="triton",
        ) from error


def _split_masks(masks: Tensor, student: Sequence[Tensor], num_tokens: int) -> list[Tensor]:
    """Views ``[N, T, P]`` of the flat buffer that holds the masks of all levels."""
    parts = masks.split_with_sizes(_mask_sizes(student, num_tokens))
    shapes = [(s.shape[0], num_tokens, s.shape[2] * s.shape[3]) for s in student]
    return [m[: math.prod(shape)].view(shape) for m, shape in zip(parts, shapes, strict=True)]


def _mask_sizes(student: Sequence[Tensor], num_tokens: int) -> list[int]:
    """Elements of each level in the flat buffer, padded so that every level starts 16-byte aligned."""
    return [(s.shape[0] * num_tokens * s.shape[2] * s.shape[3] + 3) // 4 * 4 for s in student]


def _new_outputs(student: Sequence[Tensor], num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty per-image losses [levels, N], flat masks of all levels, gradient coefficients [levels, N, T]."""
    first = student[0]
    acc, n, levels = _eager.acc_dtype(first.dtype), first.shape[0], len(student)
    return (
        first.new_empty((levels, n), dtype=acc),
        first.new_empty((sum(_mask_sizes(student, num_tokens)),), dtype=acc),
        first.new_empty((levels, n, num_tokens), dtype=acc),
    )


@_operator
def distill(
    student: list[Tensor],
    teacher: list[Tensor],
    tokens: list[Tensor],
    pool_rows: list[Tensor],
    pool_bias: list[Tensor],
    raw_tokens: list[Tensor],
    raw_bias: list[Tensor],
    affine: list[Tensor],
    custom_mask: bool,
    warmup_step: Tensor | None,
    custom_mask_warmup: int,
    loss_weight: float,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-image losses ``[levels, N]`` (already divided by N), flat masks, gradient coefficients ``[levels, N, T]``.

    ``student``, ``teacher``: ``[N, C_i, H_i, W_i]`` per level, any strides. ``tokens``: ``[T, C_i]``. ``pool_rows``
    ``[9, T, C_i]`` and ``pool_bias`` ``[T]`` or ``[4, T]``: the weighting; both empty for ``weight_mask=False``.
    ``raw_tokens``, ``raw_bias``, ``affine``: a ``Standardization`` per level; all empty without.
    ``warmup_step``: int64 scalar; masks follow the student once it has reached ``custom_mask_warmup`` (None: always).
    """
    num_tokens = tokens[0].shape[0]
    loss, masks, coefficients = _new_outputs(student, num_tokens)
    if impl == "triton":
        _kernels("distill").forward(
            student, teacher, tokens, pool_rows, pool_bias, raw_tokens, raw_bias, affine,
            custom_mask, warmup_step, custom_mask_warmup, loss_weight, eps,
            loss, masks.split_with_sizes(_mask_sizes(student, num_tokens)), coefficients,
        )  # fmt: skip
        return loss, masks, coefficients
    outputs = _split_masks(masks, student, num_tokens)
    customised: Tensor | bool = custom_mask
    if custom_mask and warmup_step is not None:
        customised = warmup_step >= custom_mask_warmup
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        rows, bias = (pool_rows[i], pool_bias[i]) if pool_rows else (None, None)
        standard = _eager.Standardization(raw_tokens[i], raw_bias[i], affine[i]) if affine else None
        loss[i], m, coefficients[i] = _eager.distill_forward(
            s, t, tokens[i], rows, bias, standard, customised, loss_weight, eps
        )
        outputs[i].copy_(m)
    return loss, masks, coefficients


@_fake(distill)
def _(
    student: list[Tensor],
    teacher: list[Tensor],
    tokens: list[Tensor],
    pool_rows: list[Tensor],
    pool_bias: list[Tensor],
    raw_tokens: list[Tensor],
    raw_bias: list[Tensor],
    affine: list[Tensor],
    custom_mask: bool,
    warmup_step: Tensor | None,
    custom_mask_warmup: int,
    loss_weight: float,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_outputs(student, tokens[0].shape[0])


@_operator
def distill_backward(
    grad: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    masks: Tensor,
    coefficients: Tensor,
    affine: list[Tensor],
    impl: str,
) -> list[Tensor]:
    """Gradients for ``student``; ``grad [levels, N]`` may have any strides, also expanded ones."""
    num_tokens = coefficients.shape[2]
    if impl == "triton":
        flat = masks.split_with_sizes(_mask_sizes(student, num_tokens))
        return _kernels("distill").backward(grad, student, teacher, flat, coefficients, affine)
    levels = _split_masks(masks, student, num_tokens)
    return [
        _eager.distill_backward(grad[i], s, t, levels[i], coefficients[i], affine[i] if affine else None)
        for i, (s, t) in enumerate(zip(student, teacher, strict=True))
    ]


@_fake(distill_backward)
def _(
    grad: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    masks: Tensor,
    coefficients: Tensor,
    affine: list[Tensor],
    impl: str,
) -> list[Tensor]:
    return [torch.empty_like(s) for s in student]


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arguments: tuple[Any, ...], *student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, masks, coefficients = _below_autograd(distill, list(student), *arguments)
        teacher, affine, ctx.impl = arguments[0], arguments[6], arguments[-1]
        ctx.lengths = len(student), len(teacher), len(affine)
        ctx.mark_non_differentiable(masks, coefficients)
        ctx.set_materialize_grads(False)  # zeros as large as the masks, otherwise
        ctx.save_for_backward(masks, coefficients, *student, *teacher, *affine)
        return loss, masks, coefficients

    @staticmethod
    @_once_differentiable("distill_backward")
    def backward(ctx: Any, grad: Tensor | None, _masks: None, _coefficients: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (1 + ctx.lengths[0])
        masks, coefficients, *levels = ctx.saved_tensors
        student, teacher, affine = _in_sequences(levels, ctx.lengths)
        backward = distill_backward if _traced(student) else _FUNCTIONS[distill_backward]
        return None, *backward(grad, student, teacher, masks, coefficients, affine, ctx.impl)


def _distill_autograd(student: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and any(s.requires_grad for s in student):
        return _Distill.apply(arguments, *student)
    return _below_autograd(distill, student, *arguments)


_LIBRARY.impl("distill", _distill_autograd, "Autograd")


def distill_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    tokens: Sequence[Tensor],
    weighting: Sequence[tuple[Tensor, Tensor]] | None,
    standardize: Sequence[_eager.Standardization] | None,
    custom_mask: bool,
    warmup_step: Tensor | None,
    custom_mask_warmup: int,
    loss_weight: float,
    eps: float,
    reduction: str,
    impl: str,
) -> Tensor:
    """:func:`functional.masked_distill_loss` of features and parameters that are known to fit."""
    forward = distill if _traced([*students, *teachers]) else _distill_autograd
    per_image, _, _ = forward(
        list(students),
        list(teachers),
        list(tokens),
        [rows for rows, _ in weighting or ()],
        [bias for _, bias in weighting or ()],
        [level.tokens for level in standardize or ()],
        [level.token_bias for level in standardize or ()],
        [level.affine for level in standardize or ()],
        custom_mask,
        warmup_step,
        custom_mask_warmup,
        loss_weight,
        eps,
        impl,
    )
    return per_image.sum() if reduction == "sum" else per_image.sum(1)


# --- stage 1 ----------------------------------------------------------------------------------------------------------


def _new_kept(features: Sequence[Tensor], num_tokens: int, weighted: bool) -> list[Tensor]:
    """Empty: every level's masks ``[N, T, P]``, with mask weights every level's strip sums ``[N, 9, C]``, then mask weights
    ``[levels, N, T]`` and Dice pairs ``[levels, N, T, T]``."""
    first = features[0]
    acc, n, levels = _eager.acc_dtype(first.dtype), first.shape[0], len(features)
    masks = [first.new_empty((n, num_tokens, x.shape[2]), dtype=acc) for x in features]
    sums = [first.new_empty((n, 9, x.shape[1]), dtype=acc) for x in features if weighted]
    shapes = (levels, n, num_tokens), (levels, n, num_tokens, num_tokens)
    return [*masks, *sums, *(first.new_empty(shape, dtype=acc) for shape in shapes)]


def _new_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in parameters]


@_operator
def learn(
    features: list[Tensor],
    tokens: list[Tensor],
    token_bias: list[Tensor],
    pool_rows: list[Tensor],
    pool_bias: list[Tensor],
    heights: list[int],
    impl: str,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Masked features ``[N, C_i, P_i]``, Dice losses ``[levels]``, and what :func:`_new_kept` lists for the backward pass.

    Arguments as for :func:`distill`, ``token_bias [T]`` per level or none at all; all but ``heights`` may require grad.
    """
    levels = len(features)
    kept = _new_kept(features, tokens[0].shape[0], bool(pool_rows))
    masks, sums, (weights, pairs) = _in_sequences(kept, (levels, len(pool_rows), 2))
    dice = weights.new_empty((levels, weights.shape[1]))
    if impl == "triton":
        masked = _kernels("learn").forward(
            features, tokens, token_bias, pool_rows, pool_bias, heights, masks, sums, weights, pairs, dice
        )
        return masked, dice.sum(1), kept
    masked = []
    for i, x in enumerate(features):
        bias = token_bias[i] if token_bias else None
        weighting = (pool_rows[i], pool_bias[i]) if pool_rows else None
        y, dice[i], m, weights[i], strip_sums, pairs[i] = _eager.learn_forward(x, tokens[i], bias, weighting, heights[i])
        masked.append(y)
        masks[i].copy_(m)
        if strip_sums is not None:
            sums[i].copy_(strip_sums)
    return masked, dice.sum(1), kept


@_fake(learn)
def _(
    features: list[Tensor],
    tokens: list[Tensor],
    token_bias: list[Tensor],
    pool_rows: list[Tensor],
    pool_bias: list[Tensor],
    heights: list[int],
    impl: str,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    kept = _new_kept(features, tokens[0].shape[0], bool(pool_rows))
    return [torch.empty_like(x) for x in features], kept[0].new_empty(len(features)), kept


@_operator
def learn_backward(
    grad_masked: list[Tensor],
    grad_dice: Tensor,
    features: list[Tensor],
    tokens: list[Tensor],
    token_bias: list[Tensor],
    pool_rows: list[Tensor],
    pool_bias: list[Tensor],
    kept: list[Tensor],
    heights: list[int],
    need_features: bool,
    impl: str,
) -> list[Tensor]:
    """Gradients of all arguments of :func:`learn` that there are, in their order; of ``features``, if needed, at the end."""
    lengths = len(tokens), len(token_bias), len(pool_rows), len(pool_bias)
    parameters = _new_gradients([*tokens, *token_bias, *pool_rows, *pool_bias])
    to_tokens, to_token_bias, to_rows, to_bias = _in_sequences(parameters, lengths)
    masks, sums, (weights, pairs) = _in_sequences(kept, (len(features), len(pool_rows), 2))
    if impl == "triton":
        to_features = _kernels("learn").backward(
            grad_masked, grad_dice, features, tokens, pool_rows, masks, sums, weights, pairs, heights,
            to_tokens, to_token_bias, to_rows, to_bias, need_features,
        )  # fmt: skip
        return parameters + to_features
    to_features = []
    for i, (g, x) in enumerate(zip(grad_masked, features, strict=True)):
        weighting = (pool_rows[i], pool_bias[i], sums[i]) if pool_rows else None
        token_grad, bias_grad, rows_grad, constant_grad, feature_grad = _eager.learn_backward(
            g, x, tokens[i], weighting, masks[i], weights[i], pairs[i] * grad_dice[i], heights[i], need_features
        )
        to_tokens[i].copy_(token_grad)
        if token_bias:
            to_token_bias[i].copy_(bias_grad)
        if rows_grad is not None and constant_grad is not None:
            to_rows[i].copy_(rows_grad)
            to_bias[i].copy_(constant_grad)
        if feature_grad is not None:
            to_features.append(feature_grad)
    return parameters + to_features


@_fake(learn_backward)
def _(
    grad_masked: list[Tensor],
    grad_dice: Tensor,
    features: list[Tensor],
    tokens: list[Tensor],
    token_bias: list[Tensor],
    pool_rows: list[Tensor],
    pool_bias: list[Tensor],
    kept: list[Tensor],
    heights: list[int],
    need_features: bool,
    impl: str,
) -> list[Tensor]:
    parameters = _new_gradients([*tokens, *token_bias, *pool_rows, *pool_bias])
    return parameters + ([torch.empty_like(x) for x in features] if need_features else [])


class _Learn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lengths: list[int], heights: list[int], impl: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        sequences = _in_sequences(tensors, lengths)
        masked, dice, kept = _below_autograd(learn, *sequences, heights, impl)
        ctx.lengths, ctx.heights, ctx.impl = [*lengths, len(kept)], heights, impl
        ctx.need_features = any(x.requires_grad for x in sequences[0])
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *kept)
        return *masked, dice, *kept

    @staticmethod
    @_once_differentiable("learn_backward")
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, kept = _in_sequences(ctx.saved_tensors, ctx.lengths)
        levels, *parameters = ctx.lengths[:-1]
        grad_masked = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, tensors[0], strict=False)]
        grad_dice = kept[0].new_zeros(levels) if grads[levels] is None else grads[levels]
        results = learn_backward(grad_masked, grad_dice, *tensors, kept, ctx.heights, ctx.need_features, ctx.impl)
        to_parameters, to_features = _in_sequences(results, [sum(parameters), levels * ctx.need_features])
        return None, None, None, *(to_features if ctx.need_features else [None] * levels), *to_parameters


def _learn_autograd(*arguments: Any) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    *sequences, heights, impl = arguments
    tensors = list(itertools.chain(*sequences))
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return _below_autograd(learn, *arguments)
    levels = len(sequences[0])
    outputs = _Learn.apply([len(x) for x in sequences], heights, impl, *tensors)
    return list(outputs[:levels]), outputs[levels], list(outputs[levels + 1 :])


_LIBRARY.impl("learn", _learn_autograd, "Autograd")


def _in_sequences(tensors: Iterable[Tensor], lengths: Iterable[int]) -> list[list[Tensor]]:
    """The flat ``tensors`` as lists of these lengths."""
    left = iter(tensors)
    return [list(itertools.islice(left, length)) for length in lengths]
