"""What changes from step to step: the loss weight, and the warm-up, which counts a step once."""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import trained
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from maskd_triton import MaskedDistillLoss
from maskd_triton import functional as F
from maskd_triton._ops.library import graph_task

LEARNER = trained([8, 6], 4)
torch.manual_seed(0)
STUDENT = [torch.randn(2, c, 4, 5) for c in (8, 6)]
TEACHER = [torch.randn(2, c, 4, 5) for c in (8, 6)]


def criterion_of(**options: Any) -> MaskedDistillLoss:
    return MaskedDistillLoss([8, 6], 4, pretrained=LEARNER, **options)


def leaves() -> list[Tensor]:
    return [s.clone().requires_grad_() for s in STUDENT]


# --- the loss weight --------------------------------------------------------------------------------------------------

KINDS: list[Callable[[float], Any]] = [
    float,
    np.float32,
    np.float64,
    np.array,
    torch.tensor,
    lambda w: torch.tensor(w).double(),
]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_weight_is_a_buffer(kind: Callable[[float], Any]) -> None:
    criterion, one = criterion_of(), criterion_of()(STUDENT, TEACHER)
    at = criterion.loss_weight.data_ptr()
    criterion.loss_weight = kind(2.5)
    assert criterion.loss_weight.data_ptr() == at  # what a captured CUDA graph reads
    assert (criterion.loss_weight.shape, criterion.loss_weight.dtype) == ((), torch.float32)
    assert torch.equal(criterion(STUDENT, TEACHER), 2.5 * one)
    assert torch.equal(criterion(STUDENT, TEACHER, reduction="none").sum(), 2.5 * one)
    assert torch.equal(sum(level.loss for level in criterion.diagnostics().values()), 2.5 * one)
    student = leaves()
    criterion(student, TEACHER).backward()
    want = leaves()
    criterion_of()(want, TEACHER).backward()
    for s, w in zip(student, want, strict=True):
        torch.testing.assert_close(s.grad, 2.5 * w.grad)
    assert "loss_weight=2.5" in repr(criterion)
    other = criterion_of()
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other(STUDENT, TEACHER), 2.5 * one)
    assert torch.equal(copy.deepcopy(other)(STUDENT, TEACHER), 2.5 * one)


def test_older_state_dicts_leave_the_loss_weight() -> None:
    criterion = criterion_of(loss_weight=3)
    state = {k: v for k, v in criterion_of().state_dict().items() if k != "loss_weight"}
    criterion.load_state_dict(state)
    assert criterion.loss_weight == 3
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        meta = [MaskedDistillLoss([8, 6], 4, loss_weight=3) for _ in range(2)]
    meta[0].load_state_dict(state, assign=True)
    meta[1].to_empty(device="cpu").load_state_dict(state)
    for late in meta:
        assert torch.equal(late(STUDENT, TEACHER), criterion(STUDENT, TEACHER))


@pytest.mark.parametrize("value", [-1.0, float("nan"), "1", None, True, np.ones(1), torch.ones(1), torch.tensor(True)])
def test_wrong_loss_weights(value: Any) -> None:
    criterion = criterion_of()
    with pytest.raises((TypeError, ValueError), match="loss_weight: expected"):
        criterion.loss_weight = value
    assert criterion.loss_weight == 1
    with pytest.raises((TypeError, ValueError), match="loss_weight: expected"):
        F.masked_distill_loss(STUDENT[0], TEACHER[0], [torch.zeros(4, 8)], loss_weight=value)


def test_gradient_of_a_loss_weight() -> None:
    """A tensor is a factor like any other; what is written into the criterion's buffer would get none."""
    criterion = criterion_of()
    with pytest.raises(ValueError, match="loss_weight: requires grad, but is written into a buffer"):
        criterion.loss_weight = torch.nn.Parameter(torch.tensor(2.0))
    weight = torch.tensor(2.0, requires_grad=True)
    loss = F.masked_distill_loss(STUDENT[0], TEACHER[0], [torch.zeros(4, 8)], loss_weight=weight)
    loss.backward()
    assert torch.equal(2 * weight.grad, loss)


def test_a_weight_written_before_the_backward_pass() -> None:
    """A loss has the weight of its own call, and so have its gradient and the diagnostics; in a compiled graph, which keeps the
    buffer itself, torch refuses."""
    criterion, want, student = criterion_of(loss_weight=2.0), leaves(), leaves()
    criterion(want, TEACHER).backward()
    loss = criterion(student, TEACHER)
    criterion.loss_weight = 0.5
    loss.backward()
    assert all(torch.equal(s.grad, w.grad) for s, w in zip(student, want, strict=True))
    torch.testing.assert_close(sum(level.loss for level in criterion.diagnostics().values()), loss.detach())
    torch._dynamo.reset()
    loss = torch.compile(criterion, backend="aot_eager")(leaves(), TEACHER)
    criterion.loss_weight = 2.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_schedule_under_compile() -> None:
    """One graph for any number of values, with the loss of each, and none at the end of the distillation."""
    torch._dynamo.reset()
    criterion, counter = criterion_of(), CompileCounterWithBackend("aot_eager")
    compiled, one = torch.compile(criterion, backend=counter, fullgraph=True), criterion_of()(STUDENT, TEACHER)
    for step in range(12):
        criterion.loss_weight = max(0.0, 1 - step / 10)
        torch.testing.assert_close(compiled(STUDENT, TEACHER), one * max(0.0, 1 - step / 10))
    assert counter.frame_count == 1


def test_a_schedule_inside_of_what_is_compiled() -> None:
    """The weight of the step is an argument: torch makes a float that changes an input of the graph."""
    torch._dynamo.reset()
    criterion, counter = criterion_of(), CompileCounterWithBackend("aot_eager")
    one = criterion_of()(STUDENT, TEACHER)

    @torch.compile(backend=counter, fullgraph=True)
    def step(weight: float) -> Tensor:
        criterion.loss_weight = weight
        return criterion(STUDENT, TEACHER)

    for i in range(12):
        torch.testing.assert_close(step(max(0.0, 1 - i / 10)), one * max(0.0, 1 - i / 10))
        assert criterion.loss_weight == pytest.approx(max(0.0, 1 - i / 10))
    assert counter.frame_count <= 3  # a float, any float, and 0.0, which torch compiles by itself


# --- the warm-up ------------------------------------------------------------------------------------------------------


def run(criterion: MaskedDistillLoss, reentrant: bool | None, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one call inside a region that a backward pass repeats; None: without checkpointing."""
    student, gain = leaves(), torch.tensor(0.7, requires_grad=True)

    def region(*levels: Tensor) -> Tensor:
        return (criterion([x * gain for x in levels], TEACHER, **options) * gain).exp()

    loss = region(*student) if reentrant is None else checkpoint(region, *student, use_reentrant=reentrant)
    loss.backward()
    return loss.detach(), [gain.grad, *(s.grad for s in student)]


@pytest.mark.parametrize("mode", ["counted", "not advanced", "eval"])
@pytest.mark.parametrize("step", [0, 1, 2, 3])  # masks are customised from the third call on
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_calls_count_once(reentrant: bool, step: int, mode: str) -> None:
    results = []
    for kind in (None, reentrant):
        criterion = criterion_of(custom_mask_warmup=2).train(mode != "eval")
        criterion.warmup_step.fill_(step)
        results.append(run(criterion, kind, advance=mode == "counted"))
        assert int(criterion.warmup_step) == step + (mode == "counted")
        assert criterion.diagnostics()[0].coverage.isfinite().all()  # of the call, not of half a repetition
    (loss, gradients), (again, repeated) = results
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, repeated, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_several_checkpointed_calls_of_one_backward_pass(reentrant: bool) -> None:
    """Counted after it, all of them are repeated as they were, also at the step that ends the warm-up."""
    results = []
    for kind in (None, reentrant):
        criterion, students = criterion_of(custom_mask_warmup=1), [leaves(), leaves()]
        for _ in range(2):
            for student in students:
                for s in student:
                    s.grad = None

            def call(*levels: Tensor, criterion: MaskedDistillLoss = criterion) -> Tensor:
                return criterion(list(levels), TEACHER, advance=False)

            losses = [call(*s) if kind is None else checkpoint(call, *s, use_reentrant=kind) for s in students]
            sum(losses).backward()
            criterion.warmup_step += 1
            results.append([s.grad.clone() for student in students for s in student])
    assert all(torch.equal(a, b) for a, b in zip(results[0] + results[1], results[2] + results[3], strict=True))
    assert not torch.equal(results[0][0], results[1][0])  # the warm-up ended


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["criterion", "region"])
@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_compiled_and_checkpointed_calls_count_once(reentrant: bool, step: int, compiled: str) -> None:
    """Code that is compiled once runs in the forward and in the backward pass; the checkpoint is around it or inside."""
    torch._dynamo.reset()
    results = []
    for kind in (None, reentrant):
        criterion = criterion_of(custom_mask_warmup=2)
        criterion.warmup_step.fill_(step)
        if kind is None:
            results.append(run(criterion, None))
        elif compiled == "criterion":
            results.append(run(torch.compile(criterion, backend="aot_eager", fullgraph=True), kind))
        else:
            student, gain = leaves(), torch.tensor(0.7, requires_grad=True)

            @functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
            def repeated(*levels: Tensor) -> Tensor:
                def region(*xs: Tensor) -> Tensor:
                    return (criterion([x * gain for x in xs], TEACHER) * gain).exp()  # noqa: B023

                return checkpoint(region, *levels, use_reentrant=reentrant)

            loss = repeated(*student)
            loss.backward()
            results.append((loss.detach(), [gain.grad, *(s.grad for s in student)]))
        assert int(criterion.warmup_step) == step + 1
    (loss, gradients), (again, others) = results
    torch.testing.assert_close(loss, again)
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("warmup", [0, 2**63 - 1])
def test_checkpointed_calls_at_the_ends(warmup: int) -> None:
    plain, repeated = (run(criterion_of(custom_mask_warmup=warmup), kind) for kind in (None, False))
    assert all(torch.equal(a, b) for a, b in zip(plain[1], repeated[1], strict=True))


def test_graph_task() -> None:
    """torch's private word for it, which a new version may take away."""
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(graph_task() != -1))
    assert graph_task() == -1
    y.backward()
    assert seen == [True]
    assert graph_task() == -1
