"""Variants of the backward pass, off until a measured file chooses them, give what the plain one gives."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import in_layout, rounding
from problems import Problem, close
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maskd_triton import functional as F

pytest.importorskip("triton", reason="triton is not installed")
from maskd_triton.kernels import distill, tuning

TRITON = ("triton", "cuda" if torch.cuda.is_available() else "cpu")
LEVELS = [(3, 16, 2, 8), (3, 12, 3, 5)]
IN_PLACE = {"reverse": True, "hints": True, "keep": True}
ALL = IN_PLACE | {"with_loss": True}


@contextlib.contextmanager
def chosen(**changes: bool) -> Iterator[None]:
    """Inside, the backward kernel has a configuration with these changes."""
    with tuning.forced("backward_kernel", tuning.Config(16, 32, 128, **changes)):
        yield


LEVEL = 3 * 3 * 16 * 2 * 8  # elements of the first level in all images, of student, teacher and gradient


@pytest.fixture(autouse=True)
def a_small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it holds two images of a level of float32: four parts."""
    monkeypatch.setattr(tuning, "_l2_bytes", lambda device: 2 * 4 * LEVEL * 2 // 3)


@pytest.mark.parametrize(
    ("most", "sizes", "parts"),
    [
        (300, (40, 30, 20), [([0, 1, 2], 0, 3)]),
        (210, (40, 30, 20), [([0, 1], 0, 3), ([2], 0, 3)]),
        (100, (40, 30, 3), [([0], 0, 2), ([0], 2, 1), ([1, 2], 0, 3)]),
        (30, (40, 10, 3), [([0], 0, 1), ([0], 1, 1), ([0], 2, 1), ([1], 0, 3), ([2], 0, 3)]),
        (100, (3, 40), [([1], 0, 2), ([1], 2, 1), ([0], 0, 3)]),
    ],
)
def test_parts_of_a_pyramid(most: int, sizes: tuple[int, ...], parts: list[tuple[list[int], int, int]]) -> None:
    """Of three images; levels that fit together stay together."""
    assert tuning.parts(3, sizes, most) == parts
    maps = [torch.empty(3, size, dtype=torch.uint8) for size in sizes]
    with mock.patch.object(tuning, "_l2_bytes", return_value=4 * most):
        assert tuning.parts_in_l2(3, maps, maps) == parts


@pytest.mark.parametrize(
    ("most", "first", "kept"),
    [
        (300, [], [(0, 3, 0, 3)]),
        (150, [(0, 1, 0, 3)], [(1, 3, 0, 3)]),
        (190, [(0, 1, 0, 2)], [(0, 1, 2, 1), (1, 3, 0, 3)]),
        (80, [(0, 1, 0, 3), (1, 2, 0, 3)], [(2, 3, 0, 3)]),
        (10, [(0, 2, 0, 3), (2, 3, 0, 3)], []),
    ],
)
def test_what_is_kept(most: int, first: list[tuple[int, ...]], kept: list[tuple[int, ...]]) -> None:
    """Of three images of 40, 30 and 20 bytes a level: levels from and to, first image and number."""
    parts = tuning.cut(3, (40, 30, 20), most)
    assert [[(p[0].start, p[0].stop, *p[1:]) for p in each] for each in parts] == [first, kept]


def same(got: tuple[Tensor, list[Tensor]], want: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


MAPS = [
    *((torch.bfloat16, "nchw"), (torch.bfloat16, "channels_last"), (torch.float16, "channels_last")),
    *((torch.float32, "nchw"), (torch.float64, "channels_last")),
]


@pytest.mark.parametrize(("dtype", "layout"), MAPS, ids=str)
@pytest.mark.parametrize("changes", [IN_PLACE, ALL], ids=["in place", "all"])
def test_bits_of_the_plain_pass(changes: dict[str, bool], dtype: torch.dtype, layout: str) -> None:
    problem = Problem(LEVELS, 3, dtype=dtype)
    with chosen():
        want = problem.ours(TRITON, layout, custom_mask=True)
    with chosen(**changes):
        same(problem.ours(TRITON, layout, custom_mask=True), want)


OPTIONS: dict[str, Callable[[Problem, str], dict[str, Any]]] = {
    "smooth l1": lambda problem, device: {"distance": "smooth_l1", "beta": 0.5},
    "cosine": lambda problem, device: {"distance": "cosine"},
    "valid": lambda problem, device: {"valid": (problem.masks[0][:, 0] > 0.3).to(device)},
    "given": lambda problem, device: {"masks": [m.to(device) for m in problem.masks], "mask_power": 1},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str) -> None:
    problem = Problem(LEVELS, 3, dtype=torch.float32)
    if options == "given":
        problem.loss = _loss_under_given_masks(problem)  # type: ignore[method-assign]
    given = OPTIONS[options](problem, TRITON[1])
    with chosen():
        want = problem.ours(TRITON, **given)
    with chosen(**ALL):
        same(problem.ours(TRITON, **given), want)


def _loss_under_given_masks(problem: Problem) -> Callable[..., Tensor]:
    def loss(target: tuple[str, str], student: list[Tensor], teacher: list[Tensor], **options: Any) -> Tensor:
        return F.masked_distill_loss(student, [t.to(target[1]) for t in teacher], None, None, impl=target[0], **options)

    return loss


@pytest.mark.parametrize("standardize", [False, True], ids=["", "standardize"])
def test_a_criterion_with_a_weight(standardize: bool, launches: list[str]) -> None:
    """The weight is in the gradients already, so that nothing is left for the backward pass to multiply."""
    problem = Problem(LEVELS, 3, dtype=torch.float32, standardize=standardize)
    found = []
    for changes in ({}, {"with_loss": True}):
        criterion = problem.criterion(loss_weight=3.0, impl="triton").to(TRITON[1])
        student = [s.to(TRITON[1]).requires_grad_() for s in problem.student]
        with chosen(**changes):
            launches.clear()
            loss = criterion(student, [t.to(TRITON[1]) for t in problem.teacher])
            if changes:
                assert launches == ["forward_kernel", "finish_kernel", "backward_kernel"] * 4
            loss.backward()
            if changes:
                assert launches[12:] == ["rescale_kernel"]
        found.append((loss.detach(), [s.grad for s in student]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)


UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": torch.ones_like,
    "expanded": lambda loss: torch.tensor(0.25).expand_as(loss),
    "strided": lambda loss: torch.linspace(-2, 2, 2 * loss.numel()).view(*loss.shape, 2)[..., 0],
    "power of 2": lambda loss: torch.full_like(loss, 2.0**16),
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_upstream_gradients(upstream: str, dtype: torch.dtype) -> None:
    """A factor that is no power of 2 rounds half precision a second time."""
    reduction = "none" if upstream in ("expanded", "strided") else "sum"
    problem = Problem(LEVELS, 3, dtype=dtype)
    student = [s.to(TRITON[1]).requires_grad_() for s in problem.student]
    found = []
    for changes in ({}, {"with_loss": True}):
        with chosen(**changes):
            loss = problem.loss(TRITON, student, reduction=reduction)
            found.append(torch.autograd.grad(loss, student, UPSTREAM[upstream](loss.detach().cpu()).to(loss)))
    exact = upstream in ("ones", "zero", "power of 2", "expanded")
    for got, want in zip(found[1], found[0], strict=True):
        bound = 0 if exact and dtype == torch.bfloat16 else max(3 * rounding(dtype, TRITON), 1e-6)
        torch.testing.assert_close(got, want, rtol=bound, atol=0)


def test_values_of_the_literal_formulas() -> None:
    problem = Problem(LEVELS, 3)
    losses, grads = problem.literal(custom_mask=True)
    with chosen(**ALL):
        got, got_grads = problem.ours(TRITON, custom_mask=True)
    close(got, losses, 1e-12)
    for g, e in zip(got_grads, grads, strict=True):
        close(g, e, 1e-12)


@pytest.fixture
def problem() -> Problem:
    return Problem(LEVELS, 3, dtype=torch.float32)


@pytest.fixture
def student(problem: Problem) -> list[Tensor]:
    return [s.to(TRITON[1]).requires_grad_() for s in problem.student]


@pytest.fixture
def plain(problem: Problem, student: list[Tensor]) -> list[Tensor]:
    """Gradients of the plain pass."""
    with chosen():
        return list(torch.autograd.grad(problem.loss(TRITON, student), student))


@pytest.mark.parametrize("factors", [(2.0, 0.5, 1.0), (0.0, 1.0, 3.0)])
def test_a_graph_that_is_kept(problem: Problem, student: list[Tensor], plain: list[Tensor], factors: tuple[float, ...]) -> None:
    """Every pass starts from the gradients as they were; results of earlier ones stay as they are."""
    with chosen(with_loss=True):
        loss = problem.loss(TRITON, student)
        found = [torch.autograd.grad(loss, student, torch.full_like(loss, f), retain_graph=f != factors[-1]) for f in factors]
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    for factor, grads in zip(factors, found, strict=True):
        for g, e in zip(grads, plain, strict=True):
            close(g, factor * e, 3e-7)


def test_accumulation(problem: Problem, student: list[Tensor], plain: list[Tensor]) -> None:
    with chosen(with_loss=True):
        losses = [problem.loss(TRITON, student) for _ in range(2)]  # both wait for one backward pass
        (losses[0] + 3 * losses[1]).backward()
        (problem.loss(TRITON, student) / 4).backward()
    for s, e in zip(student, plain, strict=True):
        close(s.grad, 4.25 * e, 1e-6)


@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: x.div_(4), lambda x: x.detach().zero_()])
def test_a_loss_that_is_written_to(
    problem: Problem, student: list[Tensor], plain: list[Tensor], write: Callable[[Tensor], object]
) -> None:
    """As in ``loss += other``."""
    with chosen(with_loss=True):
        loss = problem.loss(TRITON, student)
        write(loss)
        grads = torch.autograd.grad(loss, student)
    factor = grads[0].abs().max() / plain[0].abs().max()
    assert factor.item() in (1.0, 0.25)
    for g, e in zip(grads, plain, strict=True):
        close(g, factor * e, 1e-7)


def test_a_weight_on_the_cpu(problem: Problem, student: list[Tensor], plain: list[Tensor]) -> None:
    with chosen(with_loss=True):
        grads = torch.autograd.grad(problem.loss(TRITON, student, loss_weight=torch.tensor(2.0, dtype=torch.float64)), student)
    for g, e in zip(grads, plain, strict=True):
        close(g, 2 * e, 1e-6)


def test_torch_vmap_of_backward(problem: Problem, student: list[Tensor], plain: list[Tensor]) -> None:
    with chosen(with_loss=True):
        loss = problem.loss(TRITON, student)
        grads = torch.vmap(lambda f: torch.autograd.grad(loss, student, f, retain_graph=True))(
            torch.tensor([1.0, 3.0]).to(loss)
        )
    for g, e in zip(grads, plain, strict=True):
        close(g[0], e, 0)
        close(g[1], 3 * e, 1e-6)


def test_nothing_is_searched_for_in_a_backward_pass(
    problem: Problem, student: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither parts nor the last multiplication have keys of their own."""
    asked: list[str] = []
    found = tuning.choose

    def choose(key: tuning.Key, gpu: str) -> tuning.Config:
        asked.append(f"{key.kernel} {key.tokens} {key.log2_pixels}")
        return replace(found(key, gpu), with_loss=True)

    tuning.forget()
    monkeypatch.setattr(tuning, "choose", choose)
    torch.autograd.grad(problem.loss(TRITON, student), student)
    assert sorted(asked) == ["backward_kernel 8 7", "forward_kernel 8 7"]  # 93 pixels
    tuning.forget()


def test_no_copy_for_a_leaf(problem: Problem, student: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients that the forward pass wrote are those that the student gets."""
    written: list[int] = []
    run = distill._run_backward

    def noting(*args: Any) -> None:
        run(*args)
        written[:] = [g.data_ptr() for g in args[-1]]

    monkeypatch.setattr(distill, "_run_backward", noting)
    with chosen(with_loss=True):
        problem.loss(TRITON, student).backward()
    assert [s.grad.data_ptr() for s in student] == written


def test_features_are_not_kept(problem: Problem, student: list[Tensor]) -> None:
    kept: list[int] = []
    teacher = [t.to(TRITON[1]) for t in problem.teacher]
    with (
        chosen(with_loss=True),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x),
    ):
        problem.loss(TRITON, student, teacher).backward()
    assert kept
    assert not {x.data_ptr() for x in [*student, *teacher]} & set(kept)


def test_nothing_is_written_where_nothing_is_wanted(problem: Problem, student: list[Tensor], launches: list[str]) -> None:
    with chosen(with_loss=True):
        with torch.no_grad():
            problem.loss(TRITON, student)
        problem.loss(TRITON, [s.detach() for s in student])
    assert launches == ["forward_kernel", "finish_kernel"] * 2


def test_float16_waits_for_its_loss_scale(launches: list[str]) -> None:
    """A gradient of 1e-9 is 0 in float16; times a loss scale of 2**16 it is not."""
    problem = Problem(LEVELS, 3, dtype=torch.float16)
    student = [s.to(TRITON[1]).requires_grad_() for s in problem.student]
    with chosen(with_loss=True):
        loss = problem.loss(TRITON, student)
        grads = torch.autograd.grad(1e-5 * loss * 2**16, student)
    assert launches == ["forward_kernel", "finish_kernel", "backward_kernel"]
    assert all((g != 0).any() for g in grads)


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_upstream_gradients_that_are_not_finite(problem: Problem, student: list[Tensor], number: float) -> None:
    """A loss scale that was too large reaches the student; a pixel that does not count keeps its 0."""
    valid = (problem.masks[0][:, 0] > 0.3).to(TRITON[1])
    with chosen(with_loss=True):
        loss = problem.loss(TRITON, student, valid=valid)
        plain, found = (torch.autograd.grad(loss, student, torch.full_like(loss, x), retain_graph=True) for x in (1.0, number))
    for e, g in zip(plain, found, strict=True):
        assert (e == 0).any()
        assert torch.equal(g == 0, e == 0)
        assert not g[e != 0].isfinite().any()


def test_an_upstream_gradient_that_is_infinite_reaches_zeros() -> None:
    """A loss of 0 has gradients of 0, and a loss scale that was too large must show all the same."""
    x = torch.ones(1, 4, 2, 2, device=TRITON[1])
    for changes in ({}, {"with_loss": True}):
        s = x.clone().requires_grad_()
        with chosen(**changes):
            loss = F.masked_distill_loss(s, x, None, None, masks=x[:, :2], impl="triton")
            (g,) = torch.autograd.grad(loss, s, torch.full_like(loss, float("inf")))
        assert g.isnan().all()


def test_maps_that_no_kernel_reads_in_place(problem: Problem, launches: list[str]) -> None:
    student = [in_layout(s, "batch_last").to(TRITON[1]).requires_grad_() for s in problem.student]
    with chosen(with_loss=True):
        got = torch.autograd.grad(problem.loss(TRITON, student), student)
    assert launches == ["forward_kernel", "finish_kernel", "backward_kernel"]
    _, want = problem.literal(custom_mask=False)
    for g, e in zip(got, want, strict=True):
        close(g, e, 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(problem: Problem, student: list[Tensor], plain: list[Tensor], reentrant: bool) -> None:
    with chosen(with_loss=True):
        (2 * checkpoint(lambda *levels: problem.loss(TRITON, list(levels)), *student, use_reentrant=reentrant)).backward()
    for s, e in zip(student, plain, strict=True):
        close(s.grad, 2 * e, 0)


@pytest.mark.slow
def test_compile(problem: Problem, student: list[Tensor], plain: list[Tensor]) -> None:
    """There the gradient waits for the backward pass."""
    with chosen(with_loss=True):
        compiled = torch.compile(lambda levels: problem.loss(TRITON, levels), backend="aot_eager")
        grads = torch.autograd.grad(compiled(student), student)
    for g, e in zip(grads, plain, strict=True):
        close(g, e, 0)


def test_a_second_derivative_is_refused(problem: Problem, student: list[Tensor]) -> None:
    with chosen(with_loss=True):
        grads = torch.autograd.grad(problem.loss(TRITON, student), student, create_graph=True)
        with pytest.raises(RuntimeError, match="once only"):
            torch.autograd.grad(sum(g.sum() for g in grads), student)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_graph(problem: Problem, student: list[Tensor], plain: list[Tensor]) -> None:
    teacher = [t.cuda() for t in problem.teacher]
    with chosen(with_loss=True):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.autograd.grad(problem.loss(TRITON, student, teacher), student)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            grads = torch.autograd.grad(2 * problem.loss(TRITON, student, teacher), student)
        graph.replay()
        graph.replay()
    for g, e in zip(grads, plain, strict=True):
        close(g, 2 * e.cpu(), 0)
