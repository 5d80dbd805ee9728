"""Stage 2: the operators ``distill`` and ``distill_backward``, and the function that joins them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _eager
from .._records import Distilled, DistillKept, DistillOptions, DistillTables, flat, tables_of
from .library import (
    Function,
    call,
    differentiable,
    graph_task,
    in_lists,
    kernels,
    needs_dispatcher,
    once_differentiable,
    operator,
    outside_transforms,
)


def _new(student: Sequence[Tensor], options: DistillOptions) -> Distilled:
    return Distilled.empty(student, options, _eager.acc_dtype(student[0].dtype))


def _options(student: Sequence[Tensor], tables: list[Tensor], *others: Any) -> DistillOptions:
    return DistillOptions(tables_of(DistillTables, tables, len(student)), *others)


@operator(
    "(Tensor[] student, Tensor[] teacher, str impl, Tensor[] tables, Tensor[] valid, Tensor[] masks, Tensor? weights, "
    "Tensor? step, bool custom_mask, SymInt warmup, bool counted, SymInt mask_power, float eps, str distance, float beta) "
    "-> (Tensor, Tensor, Tensor, Tensor[], Tensor[])",
    fake=lambda student, teacher, impl, *options: _new(student, _options(student, *options)),
)
def distill(student: list[Tensor], teacher: list[Tensor], impl: str, *options: Any) -> Distilled:
    """``student``, ``teacher``: ``[N, C_i, H_i, W_i]`` of every level, any strides; ``options``: a `DistillOptions`, its
    tables flat. Returns a `Distilled`."""
    return _distill(student, teacher, impl, _options(student, *options))


def _distill(student: Sequence[Tensor], teacher: Sequence[Tensor], impl: str, options: DistillOptions) -> Distilled:
    outputs = _new(student, options)
    if options.counted and graph_task() != -1:
        options = options._replace(warmup=min(options.warmup + 1, 2**63 - 1))
    forward = kernels("distill").forward if impl == "triton" else _eager.distill_forward
    forward(student, teacher, options, outputs)
    return outputs


@operator(
    "(Tensor[] student, Tensor[] teacher, str impl, Tensor grad, Tensor coefficients, Tensor[] masks, Tensor[] cosines, "
    "Tensor[] statistics, Tensor[] valid, SymInt mask_power, str distance, float beta) -> Tensor[]",
    fake=lambda student, *_: [torch.empty_like(s) for s in student],
)
def distill_backward(student: list[Tensor], teacher: list[Tensor], impl: str, grad: Tensor, *kept: Any) -> list[Tensor]:
    """Gradients for ``student``; ``grad [levels, N]`` may have any strides, also expanded ones; ``kept``: a
    `DistillKept`."""
    backward = kernels("distill").backward if impl == "triton" else _eager.distill_backward
    return backward(student, teacher, grad, DistillKept(*kept))


class _Distill(Function):
    @staticmethod
    def forward(impl: str, teacher: list[Tensor], options: DistillOptions, *student: Tensor) -> tuple[Tensor, ...]:
        if needs_dispatcher((*student, *teacher)):
            outputs = distill(list(student), teacher, impl, flat(options.tables), *options[1:])
        else:
            outputs = _distill(student, teacher, impl, options)
        per_image, weights, coefficients, masks, cosines = outputs
        return per_image, weights, coefficients, *masks, *cosines

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.impl, teacher, options, *student = inputs
        maps = student, teacher, *_distilled(output, len(student)).kept(options)[1:5]
        ctx.options, ctx.lengths = (options.mask_power, options.distance, options.beta), [len(x) for x in maps]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros as large as the masks, otherwise
        ctx.save_for_backward(output[2], *(x for each in maps for x in each))

    @staticmethod
    @once_differentiable("distill_backward")
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (3 + ctx.lengths[0])
        coefficients, *levels = ctx.saved_tensors
        student, teacher, *kept = in_lists(levels, ctx.lengths)
        arguments = student, teacher, ctx.impl, grad, coefficients, *kept, *ctx.options
        return None, None, None, *call(distill_backward, levels, *arguments)


def _distilled(outputs: Sequence[Tensor], levels: int) -> Distilled:
    """What `_Distill` gives, flat, as it was."""
    return Distilled(outputs[0], outputs[1], outputs[2], outputs[3 : 3 + levels], outputs[3 + levels :])


def masked_distill(student: Sequence[Tensor], teacher: Sequence[Tensor], options: DistillOptions, impl: str) -> Distilled:
    """Stage 2, differentiable in ``student``; but for the losses, the outputs have no gradient."""
    outputs = _Distill.call((*student, *teacher), impl, list(teacher), options, *student)
    return _distilled(outputs, len(student))


differentiable(
    distill, lambda student, teacher, impl, *options: masked_distill(student, teacher, _options(student, *options), impl)
)


def distill_count(step: Tensor) -> None:
    """``step += 1``, but not where a backward pass repeats the call: known when it runs."""
    if graph_task() == -1:
        with outside_transforms(step):
            step.add_(1)


_count_in_graphs = operator("(Tensor(a!) step) -> ()", fake=lambda step: None)(distill_count)


def count(step: Tensor) -> None:
    """``distill_count``, also in compiled code; in an exported graph, where nothing is repeated, plain addition."""
    in_graphs = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    (_count_in_graphs if in_graphs else distill_count)(step)
