"""Both stages as functions with a gradient: one forward and one backward pass for all levels.

Under torch.compile each pass is one opaque operator of ``torch.library``, so that the CPU path and the choice of launch
configuration are those of eager mode. Otherwise its function is called as it is: the dispatcher takes half as long again.
"""

import functools
import importlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _eager
from ._records import Distilled, DistillKept, DistillOptions, DistillTables, LearnKept, LearnOptions, LearnTables
from ._torch import graph_task, in_transforms


@functools.cache
def kernels(stage: str) -> ModuleType:
    """The Triton launchers of a stage, imported on first use: the package itself must work without triton."""
    try:
        launchers = importlib.import_module(f".kernels.{stage}", __package__)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            'impl="triton" needs the triton package, which is not installed: install it, or pass impl="eager"',
            name="triton",
        ) from error
    if os.environ.get("MASKD_TRITON_AUTOTUNE") == "1":
        importlib.import_module(".kernels.autotune", __package__).enable()
    return launchers


def in_lists(tensors: Iterable[Tensor], lengths: Iterable[int]) -> list[list[Tensor]]:
    """The flat ``tensors`` as lists of these lengths."""
    left = iter(tensors)
    return [list(itertools.islice(left, length)) for length in lengths]


class _Once(torch.autograd.Function):
    """The first ``count`` tensors as they are, made to depend on all the others; to differentiate that is an error."""

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("maskd_triton: the losses can be differentiated once only, their gradients have no derivative")


Backward = Callable[..., tuple[Tensor | None, ...]]


def once_differentiable(backward: Backward) -> Backward:
    """As torch's decorator of this name, which makes a gradient a silent constant if the incoming one needs no gradient."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        present = [x for x in results if x is not None]
        marked = iter(_Once.apply(len(present), *present, *ctx.saved_tensors))
        return tuple(None if x is None else next(marked) for x in results)

    return wrapper


def _with_context(function: type[torch.autograd.Function]) -> Any:
    """The same with a ``forward`` that takes the context: a call takes 20 us less, but torch.func and dynamo refuse it."""

    class WithContext(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function.forward(*inputs)
            function.setup_context(ctx, inputs, output)
            return output

        backward = function.backward

    return WithContext


def _apply(function: Any, plain: Any, wanted: Iterable[Tensor], *args: Any) -> Any:
    """``function.apply``, also in compiled code: dynamo takes the first argument of a ``forward`` that has no gradient for a
    context. ``plain``: `_with_context` of it."""
    if not torch.compiler.is_compiling():
        return (function if in_transforms() else plain).apply(*args)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in wanted)):
        return function.forward(*args)
    return function.apply(*args)


# Stage 2


def _customised(step: Tensor, warmup: int, counts: bool) -> Tensor:
    return step >= warmup + (counts and graph_task() != -1)


@torch.library.custom_op("maskd_triton::customised", mutates_args=())
def customised_operator(step: Tensor, warmup: int, counts: bool) -> Tensor:
    """`customised` in compiled code, where an activation checkpoint repeats the graph, not Python."""
    return _customised(step, warmup, counts)


@customised_operator.register_fake
def _(step: Tensor, warmup: int, counts: bool) -> Tensor:
    return step.new_empty((), dtype=torch.bool)


def customised(step: Tensor, warmup: int, counts: bool) -> Tensor:
    """Whether ``step`` calls before this one are a whole warm-up; a call that a backward pass repeats finds itself counted."""
    return (customised_operator if torch.compiler.is_compiling() else _customised)(step, warmup, counts)


def _distill_passes(impl: str) -> tuple[Callable[..., None], Callable[..., list[Tensor]]]:
    """Forward and backward of an implementation."""
    if impl == "triton":
        launchers = kernels("distill")
        return launchers.forward, launchers.backward
    if impl == "eager":
        return _eager.distill_forward, _eager.distill_backward
    raise ValueError(f"impl: no branch for {impl!r}")


def _distill(student: Sequence[Tensor], teacher: Sequence[Tensor], impl: str, options: DistillOptions) -> Distilled:
    outputs = Distilled.empty(student, options, _eager.acc_dtype(student[0].dtype))
    forward, _ = _distill_passes(impl)
    forward(student, teacher, options, outputs)
    return outputs


def _options(*options: Any) -> DistillOptions:
    fields = len(DistillTables._fields)
    return DistillOptions(DistillTables(*options[:fields]), *options[fields:])


@torch.library.custom_op(
    "maskd_triton::distill",
    mutates_args=(),
    schema="(Tensor[] student, Tensor[] teacher, str impl, Tensor[] tokens, Tensor[] pool_rows, Tensor[] pool_bias, "
    "Tensor[] teacher_tokens, Tensor[] token_bias, Tensor[] statistics, Tensor[] valid, Tensor[] masks, Tensor? weights, "
    "Tensor? customised, bool custom_mask, int mask_power, float eps, str distance, float beta) "
    "-> (Tensor, Tensor, Tensor, Tensor[], Tensor[])",
)
def distill_operator(student: list[Tensor], teacher: list[Tensor], impl: str, *options: Any) -> tuple[Any, ...]:
    """A `Distilled` of levels ``[N, C_i, H_i, W_i]``, any strides; ``options``: a `DistillOptions`, its tables flat."""
    return tuple(_distill(student, teacher, impl, _options(*options)))


@distill_operator.register_fake
def _(student: list[Tensor], teacher: list[Tensor], impl: str, *options: Any) -> tuple[Any, ...]:
    return tuple(Distilled.empty(student, _options(*options), _eager.acc_dtype(student[0].dtype)))


def _distill_backward(
    student: Sequence[Tensor], teacher: Sequence[Tensor], impl: str, grad: Tensor, *kept: Any
) -> list[Tensor]:
    _, backward = _distill_passes(impl)
    return backward(student, teacher, grad, DistillKept(*kept))


@torch.library.custom_op(
    "maskd_triton::distill_backward",
    mutates_args=(),
    schema="(Tensor[] student, Tensor[] teacher, str impl, Tensor grad, Tensor coefficients, Tensor[] masks, Tensor[] cosines, "
    "Tensor[] statistics, Tensor[] valid, int mask_power, str distance, float beta) -> Tensor[]",
)
def distill_backward_operator(student: list[Tensor], *args: Any) -> list[Tensor]:
    """Gradients of ``student``; ``grad [levels, N]`` may have any strides; the last arguments are a `DistillKept`."""
    return _distill_backward(student, *args)


@distill_backward_operator.register_fake
def _(student: list[Tensor], *args: Any) -> list[Tensor]:
    return [torch.empty_like(s) for s in student]


class _Distill(torch.autograd.Function):
    """The losses ``[levels, N]``, and the other outputs of a `Distilled`, which have no gradient."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        impl, teacher, options, *student = inputs
        if torch.compiler.is_compiling():
            outputs = Distilled(*distill_operator(student, teacher, impl, *options.tables, *options[1:]))
        else:
            outputs = _distill(student, teacher, impl, options)
        return outputs.per_image, outputs.weights, outputs.coefficients, *outputs.masks, *outputs.cosines

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.impl, teacher, options, *student = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros as large as the masks, otherwise
        coefficients, *maps, power, distance, beta = _distilled(output, len(student)).kept(options)
        maps = [student, teacher, *maps]
        ctx.options, ctx.lengths = (power, distance, beta), [len(x) for x in maps]
        ctx.save_for_backward(coefficients, *itertools.chain(*maps))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (3 + ctx.lengths[0])
        coefficients, *maps = ctx.saved_tensors
        student, teacher, *kept = in_lists(maps, ctx.lengths)
        backward = distill_backward_operator if torch.compiler.is_compiling() or in_transforms() else _distill_backward
        return None, None, None, *backward(student, teacher, ctx.impl, grad, coefficients, *kept, *ctx.options)


_PlainDistill = _with_context(_Distill)


def _distilled(outputs: Sequence[Tensor], levels: int) -> Distilled:
    """Name the tensors that `_Distill` gives."""
    per_image, weights, coefficients = outputs[:3]
    return Distilled(per_image, weights, coefficients, outputs[3 : 3 + levels], outputs[3 + levels :])


def distill(student: Sequence[Tensor], teacher: Sequence[Tensor], options: DistillOptions, impl: str) -> Distilled:
    """Stage 2: losses per level and image, differentiable in ``student``, and what they are made of, without gradient."""
    return _distilled(_apply(_Distill, _PlainDistill, student, impl, list(teacher), options, *student), len(student))


# Stage 1 on Triton; in plain torch it needs no gradient of its own (`_eager.learn`)


def _learn(features: Sequence[Tensor], options: LearnOptions) -> tuple[list[Tensor], Tensor, LearnKept]:
    kept = LearnKept.empty(features, options.tables, _eager.acc_dtype(features[0].dtype))
    dice = kept.weights.new_empty(kept.weights.shape[:2])
    return kernels("learn").forward(features, options, dice, kept), dice.sum(1), kept


def _learn_options(*options: Any) -> LearnOptions:
    fields = len(LearnTables._fields)
    return LearnOptions(LearnTables(*options[:fields]), *options[fields:])


_LEARN_OPTIONS = (
    "Tensor[] features, Tensor[] tokens, Tensor[] token_bias, Tensor[] pool_rows, Tensor[] pool_bias, "
    "Tensor[] weights, Tensor[] valid, int[] heights"
)


@torch.library.custom_op(
    "maskd_triton::learn",
    mutates_args=(),
    schema=f"({_LEARN_OPTIONS}) -> (Tensor[], Tensor, Tensor, Tensor, Tensor[], Tensor[])",
)
def learn_operator(features: list[Tensor], *options: Any) -> tuple[Any, ...]:
    """Masked features ``[N, C_i, P_i]``, Dice losses ``[levels]`` and a `LearnKept` of features ``[N, C_i, P_i]``, any strides;
    ``options``: a `LearnOptions`, its tables flat."""
    masked, dice, kept = _learn(features, _learn_options(*options))
    return masked, dice, *kept


@learn_operator.register_fake
def _(features: list[Tensor], *options: Any) -> tuple[Any, ...]:
    kept = LearnKept.empty(features, _learn_options(*options).tables, _eager.acc_dtype(features[0].dtype))
    return [torch.empty_like(x) for x in features], kept.weights.new_empty(len(features)), *kept


def _learn_backward(
    features: Sequence[Tensor],
    options: LearnOptions,
    grad_masked: Sequence[Tensor],
    grad_dice: Tensor,
    kept: LearnKept,
    need_features: bool,
) -> list[Tensor]:
    """Gradients of the tables, field by field, of given weights, and of ``features``, if needed."""
    to_tables = LearnTables(*map(_contiguous_like, options.tables))
    to_weights = _contiguous_like(options.weights)
    backward = kernels("learn").backward
    to_features = backward(features, options, grad_masked, grad_dice, kept, to_tables, to_weights, need_features)
    return [*itertools.chain(*to_tables), *to_weights, *to_features]


def _contiguous_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


@torch.library.custom_op(
    "maskd_triton::learn_backward",
    mutates_args=(),
    schema=f"({_LEARN_OPTIONS}, Tensor[] grad_masked, Tensor grad_dice, Tensor used_weights, Tensor grams, Tensor[] masks, "
    "Tensor[] sums, bool need_features) -> Tensor[]",
)
def learn_backward_operator(features: list[Tensor], *args: Any) -> list[Tensor]:
    """Call `_learn_backward` with flat arguments."""
    *options, grad_masked, grad_dice, used_weights, grams, masks, sums, need_features = args
    kept = LearnKept(used_weights, grams, masks, sums)
    return _learn_backward(features, _learn_options(*options), grad_masked, grad_dice, kept, need_features)


@learn_backward_operator.register_fake
def _(features: list[Tensor], *args: Any) -> list[Tensor]:
    tables, weights = args[: len(LearnTables._fields)], args[len(LearnTables._fields)]
    return _contiguous_like([*itertools.chain(*tables), *weights]) + [torch.empty_like(x) for x in features if args[-1]]


class _Learn(torch.autograd.Function):
    """Masked features and Dice losses; a `LearnKept`, which has no gradient, follows."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        lengths, valid, heights, *tensors = inputs
        features, *tables, weights = in_lists(tensors, lengths)
        if torch.compiler.is_compiling():
            masked, dice, *kept = learn_operator(features, *tables, weights, valid, heights)
        else:
            masked, dice, kept = _learn(features, LearnOptions(LearnTables(*tables), weights, valid, heights))
        used_weights, grams, masks, sums = kept
        return *masked, dice, used_weights, grams, *masks, *sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        lengths, valid, ctx.heights, *tensors = inputs
        levels = lengths[0]
        kept = output[levels + 1 :]
        ctx.lengths = *lengths, len(valid), 1, 1, levels, len(kept) - 2 - levels
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *valid, *kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        lists = in_lists(ctx.saved_tensors, ctx.lengths)
        features, *tables, weights, valid, (used_weights,), (grams,), masks, sums = lists
        levels = len(features)
        grad_masked = [torch.zeros_like(x) if g is None else g.resolve_neg() for g, x in zip(grads, features, strict=False)]
        grad_dice = grads[levels]
        grad_dice = used_weights.new_zeros(levels) if grad_dice is None else grad_dice.resolve_neg()
        need_features = any(ctx.needs_input_grad[3 : 3 + levels])
        if torch.compiler.is_compiling() or in_transforms():
            results = learn_backward_operator(
                features, *tables, weights, valid, ctx.heights, grad_masked, grad_dice, used_weights, grams, masks,
                sums, need_features,
            )  # fmt: skip
        else:
            options = LearnOptions(LearnTables(*tables), weights, valid, ctx.heights)
            kept = LearnKept(used_weights, grams, masks, sums)
            results = _learn_backward(features, options, grad_masked, grad_dice, kept, need_features)
        parameters = sum(map(len, (*tables, weights)))
        to_features = results[parameters:] if need_features else (None,) * levels
        return None, None, None, *to_features, *results[:parameters]


_PlainLearn = _with_context(_Learn)


def learn(features: Sequence[Tensor], options: LearnOptions) -> tuple[list[Tensor], Tensor, list[Tensor], Sequence[Tensor]]:
    """Do what `_eager.learn` does, but differentiable once."""
    tables, weights, valid, heights = options
    lists = features, *tables, weights
    lengths, tensors = tuple(map(len, lists)), list(itertools.chain(*lists))
    outputs = _apply(_Learn, _PlainLearn, tensors, lengths, list(valid), list(heights), *tensors)
    levels = len(features)
    masked, (dice, used_weights, _), masks = in_lists(outputs, (levels, 3, levels))
    return masked, dice, masks, list(used_weights)
