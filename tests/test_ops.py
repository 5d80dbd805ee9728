"""Operators and autograd: opcheck, gradcheck, torch.func, gradients that are taken once, twice or not at all."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from problems import Problem, Target, trained
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from maskd_triton import MaskedDistillLoss, MaskModule
from maskd_triton import functional as F

pytestmark = pytest.mark.filterwarnings("ignore:student")  # most tests look at the loss alone
OPS = torch.ops.maskd_triton
C, SIZES = (5, 7), ((3, 4), (2, 3))
KINDS = ["plain", "weighted standard", "valid cosine", "given"]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def levels(layout: str = "nchw") -> list[Tensor]:
    if layout == "nhwc":
        return [normal(2, *size, c).permute(0, 3, 1, 2) for c, size in zip(C, SIZES, strict=True)]
    return [normal(2, c, *size) for c, size in zip(C, SIZES, strict=True)]


def tables(kind: str, name: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [normal(*shape) for shape in shapes] if name in kind else []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), [*((kind, "nchw") for kind in KINDS), ("weighted standard", "nhwc")])
def test_opcheck_of_stage_2(kind: str, layout: str, target: Target) -> None:
    torch.manual_seed(0)
    student, teacher, given = levels(layout), levels(layout), kind == "given"
    pixels = [h * w for h, w in SIZES]
    statistics = tables(kind, "standard", *((2, c) for c in C))
    valid = [(normal(2, p) > 0).byte() for p in pixels] if "valid" in kind else []
    distance = ("cosine" if "cosine" in kind else "squared", 1.0)
    forward = [
        *(student, teacher, target[0], [] if given else [normal(3, c) for c in C]),
        *(tables(kind, "weighted", *((9, 3, c) for c in C)), tables(kind, "weighted", *[(5, 3) if statistics else (3,)] * 2)),
        *(tables(kind, "standard", *((3, c) for c in C)), tables(kind, "standard", *[(3,)] * 2), statistics, valid),
        *(tables(kind, "given", *((2, 3, p) for p in pixels)), normal(2, 2, 3) if given else None),
        *(None if given else torch.tensor(True), not given, 2, 1e-12, *distance),
    ]
    forward = moved(forward, target[1])
    opcheck(OPS.distill, forward)
    per_image, _, coefficients, masks, cosines = OPS.distill(*forward)
    kept = [coefficients, masks, cosines, forward[8], forward[9], 2, *distance]
    opcheck(OPS.distill_backward, [*forward[:3], torch.rand_like(per_image), *kept])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "weighted", "valid given"])
def test_opcheck_of_stage_1(kind: str, target: Target) -> None:
    if target[0] == "eager":
        pytest.skip("in plain torch, stage 1 is no operator")
    torch.manual_seed(0)
    features = [x.flatten(2) for x in levels()]
    valid = [(normal(2, x.shape[2]) > 0).byte() for x in features] if "valid" in kind else []
    options = [
        *([normal(3, c) for c in C], tables(kind, "weighted", (3,), (3,)), tables(kind, "weighted", *((9, 3, c) for c in C))),
        *(tables(kind, "weighted", (3,), (3,)), tables(kind, "given", (2, 3), (2, 3)), valid, [h for h, _ in SIZES]),
    ]
    forward = moved([features, *options], target[1])
    opcheck(OPS.learn, forward)
    masked, dice, *kept = OPS.learn(*forward)
    for need_features in (True, False):
        opcheck(OPS.learn_backward, [*forward, masked, torch.rand_like(dice), *kept, need_features])


def moved(x: Any, device: str) -> Any:
    if isinstance(x, list):
        return [moved(part, device) for part in x]
    return x.to(device) if isinstance(x, Tensor) else x


@pytest.mark.slow
def test_opcheck_of_the_warm_up() -> None:
    for counts in (True, False):
        opcheck(OPS.customised, (torch.tensor(3), 3, counts))


# --- autograd ---------------------------------------------------------------------------------------------------------

PROBLEM = Problem([(2, 5, 3, 4), (2, 4, 2, 2)], 3)


def double(target: Target, **options: Any) -> MaskedDistillLoss:
    return PROBLEM.criterion(custom_mask=False, impl=target[0], **options).to(target[1]).double()


def maps(target: Target, narrow: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    return [s[:, :narrow].to(target[1]) for s in PROBLEM.student], [t.to(target[1]) for t in PROBLEM.teacher]


def in_reverse(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(inputs), inputs)


@pytest.mark.parametrize("distance", F.DISTANCES)
def test_grad_of_features(distance: str, target: Target) -> None:
    """By torch.func, as by autograd; both calls count."""
    criterion, (student, teacher) = double(target, distance=distance), maps(target)

    def loss(x: list[Tensor]) -> Tensor:
        return criterion(x, teacher, valid=torch.ones(2, 6, 8, device=target[1]).tril().bool())

    for got, want in zip(torch.func.grad(loss)(student), in_reverse(loss, student), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert int(criterion.warmup_step) == 2


def test_grad_of_align(target: Target) -> None:
    criterion, inputs = double(target, student_channels=2), maps(target, 2)
    parameters = {name: p.detach() for name, p in criterion.named_parameters()}
    got = torch.func.grad(lambda p: torch.func.functional_call(criterion, p, inputs))(parameters)
    criterion([s.requires_grad_() for s in inputs[0]], inputs[1]).backward()
    for name, p in criterion.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-12, atol=1e-15)


def test_grad_of_tokens(target: Target) -> None:
    torch.manual_seed(0)
    module = MaskModule(5, 3, impl=target[0]).to(target[1]).double()
    x = maps(target)[1][0]

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y, dice = torch.func.functional_call(module, parameters, (x,))
        return y.square().sum() + dice

    got, got_x = torch.func.grad(loss, argnums=(0, 1))({name: p.detach() for name, p in module.named_parameters()}, x)
    leaf = x.clone().requires_grad_()
    loss(dict(module.named_parameters()), leaf).backward()
    torch.testing.assert_close(got_x, leaf.grad, rtol=1e-12, atol=1e-15)
    for name, p in module.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-12, atol=1e-15)


def test_a_second_derivative_is_an_error(target: Target) -> None:
    """No silent constant, whatever the gradient is multiplied with. Stage 1 in plain torch has one."""
    criterion, (student, teacher) = double(target), maps(target)
    leaves = [s.clone().requires_grad_() for s in student]
    first = torch.autograd.grad(criterion(leaves, teacher), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    module = MaskModule(5, 3, impl=target[0]).to(target[1]).double()
    leaf = teacher[0].clone().requires_grad_()
    y, dice = module(leaf)
    (first,) = torch.autograd.grad(y.square().sum() + dice, leaf, create_graph=True)
    expected = pytest.raises(RuntimeError, match="differentiated once only") if target[0] == "triton" else nullcontext()
    with expected:
        first.square().sum().backward()


def test_graphs_that_are_retained_or_freed(target: Target) -> None:
    criterion, (student, teacher) = double(target), maps(target)
    leaves = [s.clone().requires_grad_() for s in student]
    before = [x.clone() for x in (*leaves, *teacher)]
    loss = criterion(leaves, teacher)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))
    assert all(map(torch.equal, before, (*leaves, *teacher)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = criterion(leaves, teacher)
        assert torch.equal(found, loss)
        assert not found.requires_grad


def test_traces() -> None:
    """Fake tensors, and a trace with symbolic sizes."""
    criterion = MaskedDistillLoss(C, 3, pretrained=trained(list(C), 3)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        student, teacher = levels("nhwc"), levels("nhwc")
        grads = in_reverse(lambda x: criterion(x, teacher), student)
    assert all(isinstance(x, FakeTensor) for x in grads)
    assert [g.stride() for g in grads] == [s.stride() for s in student]
    student, teacher = levels(), levels()
    traced = make_fx(lambda s, t: criterion(s, t), tracing_mode="symbolic", _allow_non_fake_inputs=True)(student, teacher)
    torch.testing.assert_close(traced(student, teacher), criterion(student, teacher))
