"""torch.func, forward-mode derivatives, hooks on saved tensors, export, and a package that is imported twice."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import trained
from torch import Tensor
from torch.autograd import forward_ad

from maskd_triton import MaskedDistillLoss, MaskLearner, MaskModule
from maskd_triton import functional as F

Target = tuple[str, str]
ROOT = Path(__file__).parent.parent
FORWARD_MODE = "forward-mode derivatives .* are not supported; use backward"


def double(target: Target, standardize: bool = False, **options: Any) -> MaskedDistillLoss:
    torch.manual_seed(0)
    learner = trained([5, 4], 3, standardize=standardize)
    options |= {"standardize": standardize, "pretrained": learner, "impl": target[0], "custom_mask": False}
    return MaskedDistillLoss([5, 4], 3, **options).to(target[1]).double()


def maps(target: Target, *batch: int) -> list[Tensor]:
    return [torch.randn(*batch, 2, *shape, device=target[1], dtype=torch.float64) for shape in ((5, 3, 4), (4, 2, 2))]


def in_reverse(function: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    return torch.autograd.grad(function(leaves), leaves)


@pytest.mark.parametrize("valid", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("standardize", [False, True], ids=["", "standard"])
@pytest.mark.parametrize("distance", F.DISTANCES)
def test_grad_of_features(distance: str, standardize: bool, valid: bool, target: Target) -> None:
    criterion, student, teacher = double(target, standardize, distance=distance), maps(target), maps(target)
    mask = torch.rand(2, 6, 8, device=target[1]) > 0.3 if valid else None

    def loss(levels: list[Tensor]) -> Tensor:
        return criterion(levels, teacher, valid=mask)

    for got, want in zip(torch.func.grad(loss)(student), in_reverse(loss, student), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert int(criterion.warmup_step) == 2  # both calls count


def test_grad_through_functional_call(target: Target) -> None:
    criterion = double(target, student_channels=[5, 4])
    parameters = {name: p.detach() for name, p in criterion.named_parameters() if p.requires_grad}
    student, teacher = maps(target), maps(target)
    got = torch.func.grad(lambda p: torch.func.functional_call(criterion, p, (student, teacher)))(parameters)
    criterion(student, teacher).backward()
    assert set(got) == set(parameters)
    for name, p in criterion.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("padded", [False, True])
def test_grad_of_tokens(padded: bool, target: Target) -> None:
    """Stage 1: the learner's parameters, and the teacher's features."""
    torch.manual_seed(0)
    module = MaskModule(5, 3, impl=target[0]).to(target[1]).double()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = maps(target)[0]
    valid = torch.rand(2, 3, 4, device=target[1]) > 0.3 if padded else None

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y, dice = torch.func.functional_call(module, parameters, (x, valid))
        return y.square().sum() + dice

    got, got_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    leaf = x.clone().requires_grad_()
    loss(dict(module.named_parameters()), leaf).backward()
    torch.testing.assert_close(got_x, leaf.grad, rtol=1e-12, atol=1e-15)
    for name, p in module.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("distance", F.DISTANCES)
def test_vmap_and_jacrev(distance: str, target: Target) -> None:
    """A batch of students, gradients of each, and the Jacobian of the levels' losses."""
    criterion, students, teacher = double(target, distance=distance).eval(), maps(target, 3), maps(target)

    def loss(first: Tensor, second: Tensor) -> Tensor:
        return criterion([first, second], teacher)

    each = [loss(*levels) for levels in zip(*students, strict=True)]
    torch.testing.assert_close(torch.vmap(loss)(*students), torch.stack(each), rtol=1e-12, atol=0)
    grads = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(*students)
    for i in range(3):
        want = in_reverse(lambda levels: criterion(levels, teacher), [x[i] for x in students])
        for got, expected in zip(grads, want, strict=True):
            torch.testing.assert_close(got[i], expected, rtol=1e-12, atol=0)
    student = [x[0] for x in students]
    jacobian = torch.func.jacrev(lambda levels: criterion(levels, teacher, reduction="none"))(student)
    for i, (rows, expected) in enumerate(zip(jacobian, in_reverse(lambda x: criterion(x, teacher), student), strict=True)):
        torch.testing.assert_close(rows[i], expected, rtol=1e-12, atol=0)
        assert not rows[1 - i].any()


def test_vmap_of_stage_1(target: Target) -> None:
    module = MaskModule(5, 3, impl=target[0]).to(target[1]).double()
    x = maps(target, 3)[0]
    y, dice = torch.vmap(module)(x)
    for i in range(3):
        torch.testing.assert_close((y[i], dice[i]), module(x[i]), rtol=1e-12, atol=0)


def test_what_is_not_supported_says_so(target: Target) -> None:
    criterion, student, teacher = double(target).eval(), maps(target), maps(target)
    tangents = [torch.ones_like(x) for x in student]

    def loss(*levels: Tensor) -> Tensor:
        return criterion(list(levels), teacher)

    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        torch.func.jvp(loss, tuple(student), tuple(tangents))
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        torch.func.jacfwd(loss)(*student)
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        torch.func.hessian(loss)(*student)
    with pytest.raises(NotImplementedError, match=FORWARD_MODE), forward_ad.dual_level():
        loss(*(forward_ad.make_dual(x, t) for x, t in zip(student, tangents, strict=True)))
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):  # also of the teacher, which is a constant
        torch.func.jvp(lambda t: criterion(student, [t, teacher[1]]), (teacher[0],), (tangents[0],))
    with pytest.raises(RuntimeError, match="distill_backward has no derivative"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x, student[1]).square().sum())(student[0])
    module = MaskModule(5, 3, impl=target[0]).to(target[1]).double()
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        torch.func.jvp(lambda x: module(x)[1], (student[0],), (tangents[0],))


def test_saved_tensors_can_be_packed(target: Target) -> None:
    """Activation offloading: what is kept for the backward pass goes through the hooks."""
    criterion, student, teacher = double(target, True), maps(target), maps(target)
    want = in_reverse(lambda levels: criterion(levels, teacher), student)
    packed: list[Tensor] = []

    def pack(x: Tensor) -> int:
        packed.append(x.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i]):
        got = in_reverse(lambda levels: criterion(levels, teacher), student)
    assert len(packed) >= 9  # student, teacher, masks, statistics of two levels, coefficients
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_retained_graphs_and_modes_without_gradient(target: Target) -> None:
    criterion, teacher = double(target), maps(target)
    student = [x.requires_grad_() for x in maps(target)]
    loss = criterion(student, teacher)
    first = torch.autograd.grad(loss, student, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, student), strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)
    with torch.no_grad():
        assert torch.equal(criterion(student, teacher), loss)
    with torch.inference_mode():
        assert torch.equal(criterion([x + 0 for x in student], teacher), loss)
    assert not criterion([x.detach() for x in student], teacher).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool, target: Target) -> None:
    criterion, learner = double(target).eval(), MaskLearner([5, 4], 3, impl=target[0]).to(target[1]).double()
    student, teacher = maps(target), maps(target)
    stages = [(criterion, (student, teacher), "distill")] + [(learner, (teacher,), "learn")] * (not strict)
    for module, inputs, name in stages:
        exported = torch.export.export(module, inputs, strict=strict)
        assert f"maskd_triton.{name}.default" in exported.graph_module.code
        torch.testing.assert_close(exported.module()(*inputs), module(*inputs), rtol=1e-12, atol=0)
    graph = torch.export.export(criterion, (student, teacher), strict=strict).module()  # trains, too
    got, want = (in_reverse(lambda x, f=f: f(x, teacher), student) for f in (graph, criterion))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(got, want, strict=True))


class Aligned(torch.nn.Module):
    """A student whose features require grad where the graph is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.neck = torch.nn.Conv2d(3, 5, 1)
        self.criterion = MaskedDistillLoss(5, 3, pretrained=MaskLearner(5, 3), student_channels=5)

    def forward(self, x: Tensor, teacher: Tensor) -> Tensor:
        return self.criterion(self.neck(x), teacher)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_student_trains(strict: bool) -> None:
    torch.manual_seed(0)
    module, x, teacher = Aligned().eval(), torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    graph = torch.export.export(module, (x, teacher), strict=strict).module()
    graph(x, teacher).backward()
    module(x, teacher).backward()
    want = dict(module.named_parameters())
    assert all(torch.allclose(p.grad, want[name].grad) for name, p in graph.named_parameters())


def test_batches_of_gradients_get_a_sentence(target: Target) -> None:
    criterion, student, teacher = double(target).eval(), maps(target), maps(target)
    losses = criterion([x.requires_grad_() for x in student], teacher, reduction="none")
    up = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    with pytest.raises(NotImplementedError, match="batches of gradients"):
        torch.autograd.grad(losses, student, up, is_grads_batched=True)


@pytest.mark.slow
def test_the_package_can_be_imported_twice() -> None:
    result = subprocess.run([sys.executable, "tests/programs/twice.py"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "computed\n"), result.stderr[-2000:]
