"""Stage 1: the operators ``learn`` and ``learn_backward``, and the function that joins them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _eager
from .._records import LearnKept, LearnOptions, LearnTables, flat, tables_of
from .library import Function, call, differentiable, in_lists, kernels, once_differentiable, operator


def _new(features: Sequence[Tensor], tables: LearnTables) -> LearnKept:
    return LearnKept.empty(features, tables, _eager.acc_dtype(features[0].dtype))


def _options(features: Sequence[Tensor], tables: list[Tensor], *others: Any) -> LearnOptions:
    return LearnOptions(tables_of(LearnTables, tables, len(features)), *others)


def _fake(features: list[Tensor], impl: str, tables: list[Tensor], *_: Any) -> tuple[Any, ...]:
    kept = _new(features, tables_of(LearnTables, tables, len(features)))
    return [torch.empty_like(x) for x in features], kept.weights.new_empty(len(features)), *kept


@operator(
    "(Tensor[] features, str impl, Tensor[] tables, Tensor[] weights, Tensor[] valid, SymInt[] heights) "
    "-> (Tensor[], Tensor, Tensor, Tensor, Tensor[], Tensor[])",
    fake=_fake,
)
def learn(features: list[Tensor], impl: str, tables: list[Tensor], *others: Any) -> tuple[Any, ...]:
    """Masked features ``[N, C_i, P_i]``, Dice losses ``[levels]``, and a `LearnKept`.

    ``features``: ``[N, C_i, P_i]`` of every level, any strides; the rest is a `LearnOptions`, its tables flat.
    """
    options = _options(features, tables, *others)
    kept = _new(features, options.tables)
    dice = kept.weights.new_empty(kept.weights.shape[:2])
    forward = kernels("learn").forward if impl == "triton" else _eager.learn_forward
    return forward(features, options, dice, kept), dice.sum(1), *kept


def _new_gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def _fake_backward(
    features: list[Tensor], impl: str, tables: list[Tensor], weights: list[Tensor], *others: Any
) -> list[Tensor]:
    return _new_gradients([*tables, *weights]) + [torch.empty_like(x) for x in features if others[-1]]


@operator(
    "(Tensor[] features, str impl, Tensor[] tables, Tensor[] weights, Tensor[] valid, SymInt[] heights, Tensor[] grad_masked, "
    "Tensor grad_dice, Tensor used_weights, Tensor pairs, Tensor[] masks, Tensor[] sums, bool need_features) -> Tensor[]",
    fake=_fake_backward,
)
def learn_backward(
    features: list[Tensor],
    impl: str,
    tables: list[Tensor],
    weights: list[Tensor],
    valid: list[Tensor],
    heights: list[int],
    grad_masked: list[Tensor],
    grad_dice: Tensor,
    *kept: Any,
) -> list[Tensor]:
    """Gradients of ``tables`` and ``weights``, in their order, and of ``features``, if needed, at the end."""
    *saved, need_features = kept
    levels = len(features)
    options = _options(features, tables, weights, valid, heights)
    to_tables, to_weights = _new_gradients(tables), _new_gradients(weights)
    backward = kernels("learn").backward if impl == "triton" else _eager.learn_backward
    to_features = backward(
        features, options, grad_masked, grad_dice, LearnKept(*saved),
        tables_of(LearnTables, to_tables, levels), to_weights, need_features,
    )  # fmt: skip
    return [*to_tables, *to_weights, *to_features]


class _Learn(Function):
    @staticmethod
    def forward(
        impl: str, lengths: tuple[int, ...], valid: list[Tensor], heights: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        features, tables, weights = in_lists(tensors, lengths)
        masked, dice, used, pairs, masks, sums = call(learn, tensors, features, impl, tables, weights, valid, heights)
        return *masked, dice, used, pairs, *masks, *sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.impl, lengths, valid, ctx.heights, *tensors = inputs
        levels = lengths[0]
        kept = output[levels + 1 :]
        ctx.lengths = *lengths, len(valid), 1, 1, levels, len(kept) - 2 - levels
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *valid, *kept)

    @staticmethod
    @once_differentiable("learn_backward")
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        features, tables, weights, valid, (used,), (pairs,), masks, sums = in_lists(ctx.saved_tensors, ctx.lengths)
        levels = len(features)
        grad_masked = [torch.zeros_like(x) if g is None else g.resolve_neg() for g, x in zip(grads, features, strict=False)]
        grad_dice = grads[levels]
        grad_dice = used.new_zeros(levels) if grad_dice is None else grad_dice.resolve_neg()
        need_features = any(ctx.needs_input_grad[4 : 4 + levels])
        results = call(
            learn_backward, (*features, *grad_masked), features, ctx.impl, tables, weights, valid, ctx.heights, grad_masked,
            grad_dice, used, pairs, masks, sums, need_features,
        )  # fmt: skip
        parameters = len(tables) + len(weights)
        to_features = results[parameters:] if need_features else (None,) * levels
        return None, None, None, None, *to_features, *results[:parameters]


def masked_learn(features: Sequence[Tensor], options: LearnOptions, impl: str) -> tuple[list[Tensor], Tensor, LearnKept]:
    """Masked features ``[N, C_i, P_i]`` and Dice losses ``[levels]``, differentiable in all but ``valid``; and what is kept."""
    tables, weights, valid, heights = options
    lists = features, flat(tables), weights
    lengths, tensors = tuple(len(each) for each in lists), [x for each in lists for x in each]
    outputs = _Learn.call(tensors, impl, lengths, list(valid), list(heights), *tensors)
    levels = len(features)
    masked, (dice, used, pairs), masks, sums = in_lists(outputs, (levels, 3, levels, len(tables.pool_rows)))
    return masked, dice, LearnKept(used, pairs, masks, sums)


def _differentiable(features: list[Tensor], impl: str, *options: Any) -> tuple[Any, ...]:
    masked, dice, kept = masked_learn(features, _options(features, *options), impl)
    return masked, dice, *kept


differentiable(learn, _differentiable)
