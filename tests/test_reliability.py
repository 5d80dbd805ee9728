"""A week of training: nothing leaks, nothing is kept, errors pass through, threads and forks do no harm, runs repeat."""

import gc
import multiprocessing
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskd_triton import MaskedDistillLoss, MaskLearner, _eager, _memo
from maskd_triton import functional as F
from tests.answers import ours
from tests.cases import case_of
from tests.given import given_by
from tests.problems import Target, trained

SIZES = [(3, 4), (1, 1), (5, 2), (7, 7)]


def criterion_of(impl: str = "auto", **options: Any) -> MaskedDistillLoss:
    return MaskedDistillLoss([4, 6], 3, pretrained=trained([4, 6], 3), impl=impl, **options)


def maps(size: tuple[int, int] = (3, 4), device: str = "cpu", seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, c, *size, generator=generator).to(device) for c in (4, 6)]


def stage_2(criterion: MaskedDistillLoss, size: tuple[int, int] = (3, 4), device: str = "cpu") -> list[Tensor]:
    """The loss and the student's gradients."""
    student = [x.requires_grad_() for x in maps(size, device, 1)]
    loss = criterion(student, maps(size, device, 2))
    return [loss.detach(), *torch.autograd.grad(loss, student)]


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.neck = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(x))


def stage_1(learner: MaskLearner, teacher: Teacher, size: tuple[int, int] = (3, 4)) -> Tensor:
    """A step of the tokens."""
    learner.zero_grad()
    loss = teacher(torch.ones(1, 3, *size)).square().mean() + learner.dice_loss()
    loss.backward()
    return loss.detach()


# --- memory -----------------------------------------------------------------------------------------------------------


def in_use() -> tuple[int, int, int]:
    """Tensors, blocks of Python's memory, and bytes of the process."""
    gc.collect()
    tensors = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if sys.platform == "linux" else 0
    return tensors, sys.getallocatedblocks(), pages * os.sysconf("SC_PAGE_SIZE")


def growth(stage: int) -> tuple[int, int, int]:
    """The least that a quarter of 1,000 steps leaves of each: a leak shows in every quarter, what an allocator takes once does
    not."""
    criterion, learner, teacher = criterion_of(), trained([4], 3), Teacher()

    def steps(number: int) -> None:
        for i in range(number):
            size = SIZES[i % len(SIZES)]
            if stage == 2:
                stage_2(criterion, size)
            else:
                stage_1(learner, teacher, size)

    with learner.attach(teacher, "neck"):
        steps(300)
        seen = [in_use()]
        for _ in range(4):
            steps(250)
            seen.append(in_use())
    tensors, blocks, size = (min(b - a for a, b in pairwise(values)) for values in zip(*seen, strict=True))
    return tensors, blocks, size


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_1000_steps_leak_nothing(stage: int) -> None:
    """In a process of their own: what other tests left behind may go at any time."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        tensors, blocks, size = process.submit(growth, stage).result()
    assert tensors == 0
    assert blocks < 125  # less than one in two steps
    assert size < 2**18  # 1 KiB a step


@contextmanager
def without_collector() -> Iterator[None]:
    """Inside, only what nothing refers to is freed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"distance": "cosine"}, {"align": True}, {"resize": "student"}], ids=str)
def test_no_feature_is_alive_after_backward(options: dict[str, Any], target: Target) -> None:
    impl, device = target
    if "align" in options:
        options = {"align": [nn.Conv2d(c, c, 1) for c in (4, 6)]}
    criterion = criterion_of(impl, **options).to(device)
    with without_collector():
        student, teacher = [x.requires_grad_() for x in maps(device=device)], maps(device=device, seed=2)
        storages = [weakref.ref(x.untyped_storage()) for x in (*student, *teacher)]
        views = [weakref.ref(x) for x in (*student, *teacher)]
        loss = criterion(student, teacher)
        loss.backward()
        criterion.diagnostics()
        del student, teacher, loss
        if target == ("triton", "cpu"):  # objects of Triton's interpreter refer to each other
            gc.collect()
        assert not [x for x in (*views, *storages) if x() is not None]


@pytest.mark.slow
def test_no_feature_is_alive_after_backward_in_stage_1(target: Target) -> None:
    impl, device = target
    learner = trained([4], 3, impl=impl).to(device)
    with without_collector():
        x = torch.randn(2, 4, 3, 4, device=device)
        (y,), storage = learner([x]), weakref.ref(x.untyped_storage())
        views = [weakref.ref(x), weakref.ref(y)]
        (y.sum() + learner.dice_loss()).backward()
        learner.diagnostics()
        del x, y
        if target == ("triton", "cpu"):
            gc.collect()
        assert not [x for x in (*views, storage) if x() is not None]


def test_the_pickle_of_a_learner_does_not_grow() -> None:
    learner, teacher = trained([4], 3), Teacher()
    learner.zero_grad(set_to_none=True)
    before = len(pickle.dumps(learner))
    with learner.attach(teacher, "neck"):
        for width in range(1, 40):
            stage_1(learner, teacher, (3, width))
    learner.zero_grad(set_to_none=True)
    assert len(pickle.dumps(learner)) == before


# --- errors pass through ----------------------------------------------------------------------------------------------

DEVICE_ERRORS: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    lambda: torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx(..., computeType, algo)"),
    lambda: RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
]


class Failing:
    """Raises in the call that is told, before it runs what it stands for."""

    def __init__(self, error: Exception, function: Callable[..., Any], fails: bool = True) -> None:
        self.error, self.function, self.fails = error, function, fails

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fails:
            raise self.error
        return self.function(*args, **kwargs)


def broken_device(impl: str, name: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Every launch fails; ``name`` of the eager twin."""
    if impl == "triton":
        from maskd_triton.kernels import launch

        failing = Failing(error, launch.run)
        monkeypatch.setattr(launch, "run", failing)
    else:
        failing = Failing(error, getattr(_eager, name))
        monkeypatch.setattr(_eager, name, failing)
    return failing


@pytest.mark.parametrize("make", DEVICE_ERRORS)
@pytest.mark.parametrize("during", ["forward", "backward"])
@pytest.mark.parametrize("stage", [1, 2])
def test_an_error_of_the_device(
    stage: int, during: str, make: Callable[[], Exception], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives as it is, from either pass, is no step of the warm-up, and the next call is as if nothing had happened."""
    (impl, device), error = target, make()
    learner, criterion = trained([4, 6], 3, impl=impl).to(device), criterion_of(impl).to(device)
    student = [x.requires_grad_() for x in maps(device=device)]

    def forward() -> Tensor:
        if stage == 2:
            return criterion(student, maps(device=device, seed=2))
        return sum(y.sum() for y in learner(maps(device=device))) + learner.dice_loss()  # type: ignore[return-value, misc]

    want = forward().detach()
    loss = forward() if during == "backward" else None
    steps = int(criterion.warmup_step)
    failing = broken_device(impl, f"{'distill' if stage == 2 else 'learn'}_{during}", error, monkeypatch)
    with pytest.raises(type(error)) as caught:
        forward() if loss is None else loss.backward()
    assert caught.value is error
    assert int(criterion.warmup_step) == steps
    failing.fails = False
    assert torch.equal(forward(), want)


class Broken(nn.Conv2d):
    """An align whose device fails."""

    error: Exception

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize("make", DEVICE_ERRORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_error_of_the_device_in_an_align(make: Callable[[], Exception], dtype: torch.dtype) -> None:
    """Parameters in float32 under half features are not taken for its cause."""
    align = [Broken(c, c, 1) for c in (4, 6)]
    align[0].error = make()
    student, teacher = ([x.to(dtype) for x in maps(seed=seed)] for seed in (1, 2))
    with pytest.raises(type(align[0].error)) as caught:
        criterion_of(align=align)([x.requires_grad_() for x in student], teacher)
    assert caught.value is align[0].error


@pytest.mark.parametrize("error", [*(make() for make in DEVICE_ERRORS), MemoryError(), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("where", ["neck", "head"])
def test_an_error_inside_the_teacher(where: str, error: BaseException) -> None:
    """The error arrives as it is; teacher and learner are what they were, and stage 1 goes on in a new block."""
    torch.manual_seed(0)
    teacher, learner = Teacher().train(), trained([4], 3)
    with learner.attach(teacher, "neck"):
        want = stage_1(learner, teacher)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in teacher.modules()]
    module = getattr(teacher, where)
    failing = Failing(error, module.forward)  # type: ignore[arg-type]
    module.forward = failing
    with pytest.raises(type(error)) as caught, learner.attach(teacher, "neck"):
        stage_1(learner, teacher)
    assert caught.value is error
    del module.forward
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in teacher.modules()] == hooks
    assert all(m.training for m in teacher.modules())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    with learner.attach(teacher, "neck"):
        assert torch.equal(stage_1(learner, teacher), want)
    if not isinstance(error, Exception):
        return
    with learner.attach(teacher, "neck"):  # an error that the loop catches, in the middle of a block
        module.forward = failing
        with pytest.raises(type(error)):
            stage_1(learner, teacher)
        del module.forward
        assert torch.equal(stage_1(learner, teacher), want)


# --- threads and processes --------------------------------------------------------------------------------------------


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], None], threads: int = 4) -> None:
    """``work(i)`` in each of them; raises what one of them does."""
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("hasty_threads")
def test_a_memo_of_several_threads() -> None:
    found: dict[Any, int] = {}

    def work(i: int) -> None:
        for k in range(5000):
            assert _memo.remember(found, (i, k), k, most=10) == k

    in_threads(work)
    assert len(found) <= 10


@pytest.mark.usefixtures("hasty_threads")
def test_threads_that_call_one_criterion(target: Target) -> None:
    """Each gets its own results, to the bit, while what is remembered of sizes comes and goes under it."""
    impl, device = target
    if impl == "triton":
        if device == "cpu":
            pytest.skip("Triton's interpreter runs one kernel at a time")
    criterion = criterion_of(impl, custom_mask_warmup=0).to(device)
    sizes = [(1 + i // 3, 1 + i % 3) for i in range(9)]
    want = {size: stage_2(criterion, size, device) for size in sizes}
    steps = int(criterion.warmup_step)

    def work(i: int) -> None:
        for k in range(40):
            size = sizes[(i + 5 * k) % len(sizes)]
            for x, y in zip(stage_2(criterion, size, device), want[size], strict=True):
                assert torch.equal(x, y)

    in_threads(work)
    assert int(criterion.warmup_step) == steps + 4 * 40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_after_use() -> None:
    """As a data loader's worker that teaches or distils: the same results there."""
    criterion, learner, teacher = criterion_of(custom_mask_warmup=0), trained([4], 3), Teacher()
    want = stage_2(criterion)
    with learner.attach(teacher, "neck"):
        wanted = stage_1(learner, teacher)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def child() -> None:
        with learner.attach(teacher, "neck"):
            found = stage_1(learner, teacher)
        results.put((all(map(torch.equal, stage_2(criterion), want)), torch.equal(found, wanted)))
        os._exit(0)

    process = context.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert results.get() == (True, True)


# --- determinism ------------------------------------------------------------------------------------------------------


def with_threads(run: Callable[[], list[Tensor]], *threads: int) -> list[list[Tensor]]:
    """What it gives with so many threads of torch."""
    before, found = torch.get_num_threads(), []
    try:
        for number in threads:
            torch.set_num_threads(number)
            found.append([x.clone() for x in run()])
    finally:
        torch.set_num_threads(before)
    return found


def all_equal(found: list[list[Tensor]]) -> bool:
    return all(torch.equal(x, y) for others in found[1:] for x, y in zip(found[0], others, strict=True))


@pytest.mark.parametrize(("stage", "distance"), [(1, ""), *((2, distance) for distance in F.DISTANCES)])
def test_bitwise_equal_from_run_to_run_and_across_thread_counts(stage: int, distance: str) -> None:
    """Across thread counts where torch's sums and batched products are; its other products, of which gradients of the mask
    weighting module are made, are not."""
    given = given_by(case_of(levels=((64, 40, 50),), tokens=6, dtypes="fp32", distance=distance or "squared"))
    x, learner = given.teacher[0], given.learner
    token = learner.mask_modules[0].mask_token.detach().expand(2, -1, -1)

    def run() -> list[Tensor]:
        if stage == 2:
            return list(ours(given, "eager").values())
        learner.zero_grad()
        (y,) = learner([x])
        (y.square().sum() + learner.dice_loss()).backward()
        (gradient,) = (module.mask_token.grad for module in learner.mask_modules)
        return [y.detach(), learner.dice_loss().detach(), gradient]

    def torchs_own() -> list[Tensor]:
        flat = x.flatten(2)
        masks = torch.bmm(token, flat)
        return [masks, torch.bmm(masks, masks.mT), torch.bmm(masks, flat.mT), flat.sum(2), flat.square().sum(1)]

    assert all_equal(with_threads(run, 1, 1))
    assert all_equal(with_threads(run, 2, 2))
    if not all_equal(with_threads(torchs_own, 1, 2, 3)):
        pytest.skip("torch's own sums depend on the number of threads here")
    assert all_equal(with_threads(run, 1, 2, 3))
