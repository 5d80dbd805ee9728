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
from typing import Any, NamedTuple

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
    return [_padded(s.shape[0] * num_tokens * s.shape[2] * s.shape[3]) for s in student]


def _padded(elements: int) -> int:
    return (elements + 3) // 4 * 4


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
    valid: list[Tensor],
    given: list[Tensor],
    weights: Tensor | None,
    custom_mask: bool,
    warmup_step: Tensor | None,
    custom_mask_warmup: int,
    mask_power: int,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-image losses ``[levels, N]`` (already divided by N), flat masks, gradient coefficients ``[levels, N, T]``.

    ``student``, ``teacher``: ``[N, C_i, H_i, W_i]`` per level, any strides. ``tokens``: ``[T, C_i]``. ``pool_rows``
    ``[9, T, C_i]`` and ``pool_bias`` ``[T]`` or ``[5, T]``: the weighting; both empty for ``weight_mask=False``.
    ``raw_tokens``, ``raw_bias``, ``affine``: a ``Standardization`` per level; all empty without.
    ``valid``: ``[N, P_i]`` bytes, pixels that count, per level, or none. ``given``: masks ``[N, T, P_i]`` per level in place of
    the ``tokens``, which are none then. ``weights``: ``[levels, N, T]`` in place of the weighting.
    ``warmup_step``: int64 scalar; masks follow the student once it has reached ``custom_mask_warmup`` (None: always).
    """
    num_tokens = _num_tokens(tokens, given)
    loss, masks, coefficients = _new_outputs(student, num_tokens)
    if impl == "triton":
        _kernels("distill").forward(
            student, teacher, tokens, pool_rows, pool_bias, raw_tokens, raw_bias, affine, valid, given, weights,
            custom_mask, warmup_step, custom_mask_warmup, mask_power, eps,
            loss, masks.split_with_sizes(_mask_sizes(student, num_tokens)), coefficients,
        )  # fmt: skip
        return loss, masks, coefficients
    outputs = _split_masks(masks, student, num_tokens)
    customised: Tensor | bool = custom_mask
    if custom_mask and warmup_step is not None:
        customised = warmup_step >= custom_mask_warmup
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        rows, bias = (pool_rows[i], pool_bias[i]) if pool_rows else (None, None)
        loss[i], m, coefficients[i] = _eager.distill_forward(
            s, t, tokens[i] if tokens else None, rows, bias,
            _eager.Standardization(raw_tokens[i], raw_bias[i], affine[i]) if affine else None,
            valid[i] if valid else None, given[i] if given else None, None if weights is None else weights[i],
            customised, mask_power, eps,
        )  # fmt: skip
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
    valid: list[Tensor],
    given: list[Tensor],
    weights: Tensor | None,
    custom_mask: bool,
    warmup_step: Tensor | None,
    custom_mask_warmup: int,
    mask_power: int,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_outputs(student, _num_tokens(tokens, given))


def _num_tokens(tokens: Sequence[Tensor], given: Sequence[Tensor]) -> int:
    return tokens[0].shape[0] if tokens else given[0].shape[1]


@_operator
def distill_backward(
    grad: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    masks: Tensor,
    coefficients: Tensor,
    affine: list[Tensor],
    mask_power: int,
    impl: str,
) -> list[Tensor]:
    """Gradients for ``student``; ``grad [levels, N]`` may have any strides, also expanded ones."""
    num_tokens = coefficients.shape[2]
    if impl == "triton":
        flat = masks.split_with_sizes(_mask_sizes(student, num_tokens))
        return _kernels("distill").backward(grad, student, teacher, flat, coefficients, affine, mask_power)
    levels = _split_masks(masks, student, num_tokens)
    return [
        _eager.distill_backward(grad[i], s, t, levels[i], coefficients[i], affine[i] if affine else None, mask_power)
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
    mask_power: int,
    impl: str,
) -> list[Tensor]:
    return [torch.empty_like(s) for s in student]


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arguments: tuple[Any, ...], *student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, masks, coefficients = _below_autograd(distill, list(student), *arguments)
        teacher, affine, ctx.options = arguments[0], arguments[6], (arguments[-3], arguments[-1])
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
        return None, *backward(grad, student, teacher, masks, coefficients, affine, *ctx.options)


def _distill_autograd(student: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and any(s.requires_grad for s in student):
        return _Distill.apply(arguments, *student)
    return _below_autograd(distill, student, *arguments)


_LIBRARY.impl("distill", _distill_autograd, "Autograd")


class Distilled(NamedTuple):
    """Outputs of :func:`distill`, without gradients."""

    per_image: Tensor
    masks: Tensor
    coefficients: Tensor

    def level_masks(self, sizes: Sequence[int]) -> list[Tensor]:
        """The flat masks of every level, of so many elements."""
        parts = self.masks.split_with_sizes([_padded(size) for size in sizes])
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def distill_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    tokens: Sequence[Tensor],
    weighting: Sequence[tuple[Tensor, Tensor]] | None,
    standardize: Sequence[_eager.Standardization] | None,
    valid: Sequence[Tensor],
    masks: Sequence[Tensor],
    mask_weights: Tensor | None,
    custom_mask: bool,
    warmup_step: Tensor | None,
    custom_mask_warmup: int,
    mask_power: int,
    loss_weight: float | Tensor,
    eps: float,
    reduction: str,
    impl: str,
) -> tuple[Tensor, Distilled]:
    """:func:`functional.masked_distill_loss` of arguments that are known to fit, and what it was made of.

    ``valid [N, P_i]`` bytes, ``masks [N, T, P_i]`` and ``mask_weights [levels, N, T]`` as the operator takes them.
    """
    if valid and weighting is not None:
        flat = [t.flatten(2) for t in teachers]
        mask_weights = torch.stack(valid_weights(flat, weighting, valid, [t.shape[2] for t in teachers], impl))
        weighting = None
    forward = distill if _traced([*students, *teachers]) else _distill_autograd
    per_image, used_masks, coefficients = forward(
        list(students),
        list(teachers),
        list(tokens),
        [rows for rows, _ in weighting or ()],
        [bias for _, bias in weighting or ()],
        [level.tokens for level in standardize or ()],
        [level.token_bias for level in standardize or ()],
        [level.affine for level in standardize or ()],
        list(valid),
        list(masks),
        mask_weights,
        custom_mask,
        warmup_step,
        custom_mask_warmup,
        mask_power,
        eps,
        impl,
    )
    per_image = per_image * loss_weight
    loss = per_image.sum() if reduction == "sum" else per_image.sum(1)
    return loss, Distilled(per_image.detach(), used_masks, coefficients)


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
    weights: list[Tensor],
    valid: list[Tensor],
    heights: list[int],
    impl: str,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Masked features ``[N, C_i, P_i]``, Dice losses ``[levels]``, and what :func:`_new_kept` lists for the backward pass.

    Arguments as for :func:`distill`, ``token_bias [T]`` and ``weights [N, T]`` per level or none at all; all but ``valid`` and
    ``heights`` may require grad.
    """
    levels = len(features)
    kept = _new_kept(features, tokens[0].shape[0], bool(pool_rows))
    masks, sums, (used_weights, pairs) = _in_sequences(kept, (levels, len(pool_rows), 2))
    dice = used_weights.new_empty((levels, used_weights.shape[1]))
    if impl == "triton":
        masked = _kernels("learn").forward(
            features, tokens, token_bias, pool_rows, pool_bias, weights, valid, heights, masks, sums, used_weights, pairs, dice
        )
        return masked, dice.sum(1), kept
    masked = []
    for i, x in enumerate(features):
        bias = token_bias[i] if token_bias else None
        weighting = (pool_rows[i], pool_bias[i]) if pool_rows else None
        y, dice[i], m, used_weights[i], strip_sums, pairs[i] = _eager.learn_forward(
            x, tokens[i], bias, weighting, weights[i] if weights else None, valid[i] if valid else None, heights[i]
        )
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
    weights: list[Tensor],
    valid: list[Tensor],
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
    weights: list[Tensor],
    kept: list[Tensor],
    heights: list[int],
    need_features: bool,
    impl: str,
) -> list[Tensor]:
    """Gradients of all arguments of :func:`learn` that there are, in their order; of ``features``, if needed, at the end."""
    lengths = len(tokens), len(token_bias), len(pool_rows), len(pool_bias), len(weights)
    parameters = _new_gradients([*tokens, *token_bias, *pool_rows, *pool_bias, *weights])
    to_tokens, to_token_bias, to_rows, to_bias, to_weights = _in_sequences(parameters, lengths)
    masks, sums, (used_weights, pairs) = _in_sequences(kept, (len(features), len(pool_rows), 2))
    if impl == "triton":
        to_features = _kernels("learn").backward(
            grad_masked, grad_dice, features, tokens, pool_rows, masks, sums, used_weights, pairs, heights,
            to_tokens, to_token_bias, to_rows, to_bias, to_weights, need_features,
        )  # fmt: skip
        return parameters + to_features
    to_features = []
    for i, (g, x) in enumerate(zip(grad_masked, features, strict=True)):
        weighting = (pool_rows[i], pool_bias[i], sums[i]) if pool_rows else None
        token_grad, bias_grad, rows_grad, constant_grad, weights_grad, feature_grad = _eager.learn_backward(
            g, x, tokens[i], weighting, masks[i], used_weights[i], pairs[i] * grad_dice[i], heights[i], need_features
        )
        to_tokens[i].copy_(token_grad)
        if token_bias:
            to_token_bias[i].copy_(bias_grad)
        if rows_grad is not None and constant_grad is not None:
            to_rows[i].copy_(rows_grad)
            to_bias[i].copy_(constant_grad)
        if weights:
            to_weights[i].copy_(weights_grad)
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
    weights: list[Tensor],
    kept: list[Tensor],
    heights: list[int],
    need_features: bool,
    impl: str,
) -> list[Tensor]:
    parameters = _new_gradients([*tokens, *token_bias, *pool_rows, *pool_bias, *weights])
    return parameters + ([torch.empty_like(x) for x in features] if need_features else [])


class _Learn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lengths: list[int], heights: list[int], impl: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        sequences = _in_sequences(tensors, lengths)
        masked, dice, kept = _below_autograd(learn, *sequences, heights, impl)
        ctx.lengths, ctx.heights, ctx.impl = [*lengths[:-1], len(kept)], heights, impl
        ctx.rest = lengths[-1]
        ctx.need_features = any(x.requires_grad for x in sequences[0])
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*itertools.chain(*sequences[:-1]), *kept)
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
        to_levels = to_features if ctx.need_features else itertools.repeat(None, levels)
        return None, None, None, *to_levels, *to_parameters, *itertools.repeat(None, ctx.rest)


def _learn_autograd(*arguments: Any) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    *sequences, heights, impl = arguments
    tensors = list(itertools.chain(*sequences))
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return _below_autograd(learn, *arguments)
    levels = len(sequences[0])
    outputs = _Learn.apply([len(x) for x in sequences], heights, impl, *tensors)
    return list(outputs[:levels]), outputs[levels], list(outputs[levels + 1 :])


_LIBRARY.impl("learn", _learn_autograd, "Autograd")


# --- mask weights of valid pixels -------------------------------------------------------------------------------------


@_operator
def pool(features: list[Tensor], valid: list[Tensor], heights: list[int], impl: str) -> list[Tensor]:
    """Strip sums ``[N, 9, C_i + 1]`` over the valid pixels of ``features [N, C_i, P_i]``; the last column counts pixels.

    What a 3x3 window over the valid pixels misses at their border, as ``_eager.STRIPS`` says of a whole image.
    ``valid``: ``[N, P_i]`` bytes. Differentiable in ``features``.
    """
    sums = _new_sums(features)
    if impl == "triton":
        _kernels("pool").forward(features, valid, heights, sums)
        return sums
    for out, x, v, height in zip(sums, features, valid, heights, strict=True):
        strips = _eager.strips_of(v, height).to(out.dtype)
        torch.bmm(strips, x.to(out.dtype).transpose(1, 2), out=out[:, :, :-1])
        torch.sum(strips, 2, out=out[:, :, -1])
    return sums


@_fake(pool)
def _(features: list[Tensor], valid: list[Tensor], heights: list[int], impl: str) -> list[Tensor]:
    return _new_sums(features)


def _new_sums(features: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty((x.shape[0], 9, x.shape[1] + 1), dtype=_eager.acc_dtype(x.dtype)) for x in features]


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heights: list[int], impl: str, levels: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        features, valid = _in_sequences(tensors, (levels, levels))
        ctx.heights, ctx.dtypes = heights, [x.dtype for x in features]
        ctx.save_for_backward(*valid)
        return tuple(_below_autograd(pool, features, valid, heights, impl))

    @staticmethod
    @_once_differentiable("pool")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            torch.bmm(g[:, :, :-1].transpose(1, 2), _eager.strips_of(v, height).to(g.dtype)).to(dtype)
            for g, v, height, dtype in zip(grads, ctx.saved_tensors, ctx.heights, ctx.dtypes, strict=True)
        ]
        return None, None, None, *gradients, *itertools.repeat(None, len(gradients))


def _pool_autograd(features: list[Tensor], valid: list[Tensor], heights: list[int], impl: str) -> list[Tensor]:
    if torch.is_grad_enabled() and any(x.requires_grad for x in features):
        return list(_Pool.apply(heights, impl, len(features), *features, *valid))
    return list(_below_autograd(pool, features, valid, heights, impl))


_LIBRARY.impl("pool", _pool_autograd, "Autograd")


def valid_weights(
    features: Sequence[Tensor],
    weighting: Sequence[tuple[Tensor, Tensor]],
    valid: Sequence[Tensor],
    heights: Sequence[int],
    impl: str,
) -> list[Tensor]:
    """Mask weights ``[N, T]`` of every level's valid pixels, differentiable in features and weighting."""
    sums = (pool if _traced(features) else _pool_autograd)(list(features), list(valid), list(heights), impl)
    return [_eager.weights_of_valid(each, rows, bias) for each, (rows, bias) in zip(sums, weighting, strict=True)]


def _in_sequences(tensors: Iterable[Tensor], lengths: Iterable[int]) -> list[list[Tensor]]:
    """The flat ``tensors`` as lists of these lengths."""
    left = iter(tensors)
    return [list(itertools.islice(left, length)) for length in lengths]
