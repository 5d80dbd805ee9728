"""Stage 2: the operators ``distill`` and ``distill_backward``, and the function that joins them."""

import itertools
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
    """The losses times ``scale``, summed over levels and images (``"sum"``), over images (``"none"``) or not (``"images"``)."""

    @staticmethod
    def forward(
        impl: str,
        reduction: str,
        teacher: list[Tensor],
        options: DistillOptions,
        scale: Tensor,
        *student: Tensor,
    ) -> tuple[Tensor, ...]:
        if needs_dispatcher((*student, *teacher)):
            outputs = Distilled(*distill(list(student), teacher, impl, flat(options.tables), *options[1:]))
        else:
            outputs = _distill(student, teacher, impl, options)
        loss = outputs.per_image * scale
        if reduction != "images":
            loss = loss.sum() if reduction == "sum" else loss.sum(1)
        return loss, *outputs[:3], *outputs.masks, *outputs.cosines

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.impl, _, teacher, options, scale, *student = inputs
        outputs = _distilled(output[1:], len(student))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros as large as the masks, otherwise
        ctx.levels = len(student)
        coefficients, *maps, power, distance, beta = outputs.kept(options)
        maps = [student, teacher, *maps]
        ctx.options, ctx.lengths = (power, distance, beta), [len(x) for x in maps]
        ctx.save_for_backward(scale, outputs.per_image, coefficients, *itertools.chain(*maps))

    @staticmethod
    @once_differentiable("distill_backward")
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (5 + ctx.levels)
        scale, per_image, *saved = ctx.saved_tensors
        grad = (grad[:, None] if grad.dim() == 1 else grad).expand_as(per_image)
        to_scale = (grad * per_image).sum() if ctx.needs_input_grad[4] else None
        coefficients, *levels = saved
        student, teacher, *kept = in_lists(levels, ctx.lengths)
        arguments = student, teacher, ctx.impl, grad * scale, coefficients, *kept, *ctx.options
        return None, None, None, None, to_scale, *call(distill_backward, levels, *arguments)


def _distilled(outputs: Sequence[Tensor], levels: int) -> Distilled:
    """What `_Distill` gives beside the loss, as it was: outputs of an operator."""
    per_image, weights, coefficients = outputs[:3]
    return Distilled(per_image, weights, coefficients, outputs[3 : 3 + levels], outputs[3 + levels :])


def distill_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], options: DistillOptions, impl: str, scale: Tensor, reduction: str
) -> tuple[Tensor, Distilled]:
    """Stage 2: the loss, differentiable in ``student`` and in ``scale``, its factor, and the operator's outputs as they are."""
    loss, *outputs = _Distill.call((*student, *teacher, scale), impl, reduction, list(teacher), options, scale, *student)
    return loss, _distilled(outputs, len(student))


def masked_distill(student: Sequence[Tensor], teacher: Sequence[Tensor], options: DistillOptions, impl: str) -> Distilled:
    """The operator's outputs; its losses are differentiable in ``student``, all else has no gradient."""
    one = torch.ones((), dtype=_eager.acc_dtype(student[0].dtype), device=student[0].device)
    per_image, outputs = distill_loss(student, teacher, options, impl, one, "images")
    return outputs._replace(per_image=per_image)


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
