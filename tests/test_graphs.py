"""CUDA graphs: what no graph can hold does not happen; a captured step replays with the results of eager steps, across
the warm-up switch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Problem, Target, trained
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maskd_triton import MaskedDistillLoss, MaskLearner
from maskd_triton._ops import library

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
SIZES = ((2, 16, 24, 32), (2, 16, 13, 21), (2, 16, 7, 11))
WAITS = {"lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "_unique2"}  # data from the host, or for it


class Waits(TorchDispatchMode):
    """Collects the operators that would make the host or the device wait for the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1]
        if name in WAITS or (name == "index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [lambda x: torch.tensor([1, 2]), lambda x: x[[0, 2]], lambda x: x[x > 2], lambda x: bool(x.sum() > 2), torch.unique],
    ids=["table", "indices", "mask", "condition", "unique"],
)
def test_what_waits_is_found(wait: Callable[[Tensor], object]) -> None:
    with Waits() as mode:
        wait(torch.rand(3))
    assert mode.found


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("standardize", [False, True], ids=["", "standard"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_nothing_waits(
    weighted: bool, standardize: bool, padded: bool, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of each stage: no data from the host, none for it."""
    monkeypatch.setattr(library, "is_in_torch_dispatch_mode", lambda: False)  # operators are looked into, too
    impl, device = target
    problem = Problem([(2, 5, 4, 6), (2, 4, 2, 3)], 3, weighted, torch.float32, standardize)
    learner, criterion = problem.learner.to(device), problem.criterion(custom_mask_warmup=1, impl=impl).to(device)
    learner.impl = impl
    student, teacher = ([x.to(device) for x in xs] for xs in (problem.student, problem.teacher))
    student = [x.requires_grad_() for x in student]
    valid = torch.rand(2, 8, 12, device=device) > 0.3 if padded else None
    with Waits() as mode:
        criterion(student, teacher, valid=valid).backward()
        criterion.diagnostics()
        (sum(y.sum() for y in learner(teacher, valid)) + learner.dice_loss()).backward()
    assert mode.found == []


def test_nothing_waits_with_other_options(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "is_in_torch_dispatch_mode", lambda: False)
    impl, device = target
    problem = Problem([(2, 5, 4, 6), (2, 4, 2, 3)], 3, dtype=torch.float32)
    student, teacher, masks, weights = (
        [x.to(device) for x in xs] for xs in (problem.student, problem.teacher, problem.masks, problem.mask_weights)
    )
    options = {"student_channels": [5, 4], "resize": "teacher", "impl": impl}
    aligned = problem.criterion(**options).to(device)
    without = MaskedDistillLoss([5, 4], None, mask_power=1, **options).to(device)
    large = [x.repeat(1, 1, 2, 2) for x in student]
    with Waits() as mode:
        aligned(large, teacher).backward()
        aligned(large, teacher, advance=False).backward()
        without(student, teacher, masks=masks, mask_weights=weights).backward()
    assert mode.found == []


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of ``step`` and the results that every replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_of_stage_1_replays(dtype: torch.dtype) -> None:
    learner = trained([16] * len(SIZES), 6).cuda()
    features = [torch.randn(size, device="cuda", dtype=dtype) for size in SIZES]

    def step() -> list[Tensor]:
        outputs = [*learner(features), learner.dice_loss()]
        grads = torch.autograd.grad(outputs, list(learner.parameters()), [torch.ones_like(y) for y in outputs])
        return [*(y.detach() for y in outputs), *grads]

    graph, results = captured(step)
    for i in range(3):
        for x in features:
            x.normal_()
        graph.replay()
        assert all(torch.equal(got, want) for got, want in zip(results, step(), strict=True)), i


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_replays(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    learner = MaskLearner([16] * len(SIZES), 6)
    criterion = MaskedDistillLoss([16] * len(SIZES), 6, pretrained=learner, custom_mask_warmup=3).cuda()
    eager = copy.deepcopy(criterion)
    student = [torch.randn(size, device="cuda", dtype=dtype).requires_grad_() for size in SIZES]
    teacher = [torch.randn(size, device="cuda", dtype=dtype) for size in SIZES]

    def step(of: MaskedDistillLoss) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = of(student, teacher)
        return loss.detach(), torch.autograd.grad(loss, student)

    graph, (loss, grads) = captured(lambda: step(criterion))
    criterion.warmup_step.zero_()
    for i in range(6):
        with torch.no_grad():
            for x in (*student, *teacher):
                x.normal_()
        graph.replay()
        want_loss, want_grads = step(eager)
        assert torch.equal(loss, want_loss), i
        assert all(torch.equal(g, w) for g, w in zip(grads, want_grads, strict=True)), i
        assert torch.equal(criterion.warmup_step, eager.warmup_step)
