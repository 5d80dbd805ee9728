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

from maskd_triton import MaskedDistillLoss

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


def test_what_waits_is_found() -> None:
    waits: list[Callable[[Tensor], object]] = [
        lambda x: torch.tensor([1, 2]), lambda x: x[[0, 2]], lambda x: x[x > 2], lambda x: bool(x.sum() > 2), torch.unique
    ]  # fmt: skip
    for wait in waits:
        with Waits() as mode:
            wait(torch.rand(3))
        assert mode.found


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"weight_mask": False},
    "weighted": {},
    "standardised": {"standardize": True, "distance": "smooth_l1"},
    "resized": {"student_channels": [5, 4], "resize": "teacher"},
}


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_waits(options: dict[str, Any], padded: bool, target: Target) -> None:
    """A step of stage 2: no data from the host, none for it."""
    impl, device = target
    weighted, standardize = options.get("weight_mask", True), options.get("standardize", False)
    problem = Problem([(2, 5, 4, 6), (2, 4, 2, 3)], 3, weighted, torch.float32, standardize)
    criterion = problem.criterion(custom_mask_warmup=1, impl=impl, **options).to(device)
    criterion.loss_weight = torch.tensor(0.5, device=device)
    student, teacher = ([x.to(device) for x in xs] for xs in (problem.student, problem.teacher))
    student = [x.repeat(1, 1, *(2, 2) if "resize" in options else (1, 1)).requires_grad_() for x in student]
    valid = torch.rand(2, 8, 12, device=device) > 0.3 if padded else None
    with Waits() as mode:
        criterion(student, teacher, valid=valid).backward()
        criterion.diagnostics()
    assert mode.found == []


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("standardize", [False, True], ids=["", "standardised"])
def test_nothing_waits_in_stage_1(standardize: bool, padded: bool, target: Target) -> None:
    impl, device = target
    learner = trained([5, 4], 3, standardize=standardize, impl=impl).to(device)
    features = [torch.randn(2, c, 4, 6, device=device) for c in (5, 4)]
    valid = torch.rand(2, 8, 12, device=device) > 0.3 if padded else None
    with Waits() as mode:
        (sum(y.sum() for y in learner(features, valid)) + learner.dice_loss()).backward()
    assert mode.found == []


def test_nothing_waits_with_given_masks(target: Target) -> None:
    impl, device = target
    problem = Problem([(2, 5, 4, 6), (2, 4, 2, 3)], 3, dtype=torch.float32)
    student, teacher, masks, weights = (
        [x.to(device) for x in xs] for xs in (problem.student, problem.teacher, problem.masks, problem.mask_weights)
    )
    criterion = MaskedDistillLoss([5, 4], None, mask_power=1, impl=impl).to(device)
    with Waits() as mode:
        criterion([s.requires_grad_() for s in student], teacher, masks=masks, mask_weights=weights).backward()
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
    learner = trained([16] * len(SIZES), 6)
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
