"""A week of training: nothing leaks, nothing is kept, errors pass through, threads and forks do no harm."""

import gc
import multiprocessing
import os
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Target, trained
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from maskd_triton import MaskedDistillLoss

SIZES = [(3, 4), (1, 1), (5, 2), (7, 7)]


def criterion_of(impl: str = "auto", **options: Any) -> MaskedDistillLoss:
    return MaskedDistillLoss([4, 6], 3, pretrained=trained([4, 6], 3), impl=impl, **options)


def maps(size: tuple[int, int] = (3, 4), device: str = "cpu", seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, c, *size, generator=generator).to(device) for c in (4, 6)]


def step(criterion: MaskedDistillLoss, size: tuple[int, int] = (3, 4), device: str = "cpu") -> list[Tensor]:
    """The loss and the student's gradients."""
    student = [x.requires_grad_() for x in maps(size, device, 1)]
    loss = criterion(student, maps(size, device, 2))
    return [loss.detach(), *torch.autograd.grad(loss, student)]


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
    criterion, learner = criterion_of(), trained([4, 6], 3)

    def steps(number: int) -> None:
        for i in range(number):
            size = SIZES[i % len(SIZES)]
            if stage == 2:
                step(criterion, size)
            else:
                (sum(y.sum() for y in learner(maps(size))) + learner.dice_loss()).backward()

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


@pytest.mark.parametrize("full", [False, True])
def test_no_feature_is_alive_after_backward(full: bool, target: Target) -> None:
    """As published; and with what keeps the most."""
    impl, device = target
    options = {"distance": "cosine", "align": [nn.Conv2d(c, c, 1) for c in (4, 6)], "resize": "student"} if full else {}
    criterion = criterion_of(impl, **options).to(device)
    gc.collect()
    gc.disable()  # only what nothing refers to is freed
    try:
        student, teacher = [x.requires_grad_() for x in maps(device=device)], maps(device=device, seed=2)
        seen = [weakref.ref(y) for x in (*student, *teacher) for y in (x, x.untyped_storage())]
        loss = criterion(student, teacher)
        loss.backward()
        criterion.diagnostics()
        del student, teacher, loss
        if target == ("triton", "cpu"):  # objects of Triton's interpreter refer to each other
            gc.collect()
        assert not [x for x in seen if x() is not None]
    finally:
        gc.enable()


# --- errors pass through ----------------------------------------------------------------------------------------------

ERRORS: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    lambda: torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    lambda: RuntimeError("Input type and weight type should be the same: CUBLAS_STATUS_EXECUTION_FAILED"),
]


class Failing(TorchDispatchMode):
    """Raises in place of an operation, the one of this number."""

    def __init__(self, number: int, error: Exception) -> None:
        super().__init__()
        self.left, self.error = number, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == -1:
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_an_error_of_the_device_anywhere(target: Target) -> None:
    """Whichever operation of a step fails, the error arrives as it is; a failed call is no step of the warm-up, and the next is
    as if nothing had happened."""
    impl, device = target
    criterion = criterion_of(impl, student_channels=[4, 6], custom_mask_warmup=1).to(device)
    teacher = maps(device=device, seed=2)
    want = step(criterion, device=device)
    with Failing(10**6, RuntimeError()) as whole:
        step(criterion, device=device)
    operations, tries = 10**6 - whole.left, 30 if impl == "eager" else 6  # Triton's interpreter takes its time
    for i in range(tries):
        criterion.warmup_step.zero_()
        student, error, loss = [x.requires_grad_() for x in maps(device=device, seed=1)], ERRORS[i % len(ERRORS)](), None
        with pytest.raises(type(error)) as caught, Failing(i * operations // tries, error):  # noqa: PT012
            loss = criterion(student, teacher)
            loss.backward()
        assert caught.value is error
        assert int(criterion.warmup_step) == (loss is not None)
    criterion.warmup_step.zero_()
    assert all(map(torch.equal, step(criterion, device=device), want))


# --- threads and processes --------------------------------------------------------------------------------------------


def test_threads_that_call_one_criterion(target: Target) -> None:
    """Each gets its own results, to the bit, while sizes come and go."""
    impl, device = target
    if target == ("triton", "cpu"):
        pytest.skip("Triton's interpreter runs one kernel at a time")
    criterion = criterion_of(impl, custom_mask_warmup=0).to(device)
    sizes = [(1 + i // 3, 1 + i % 3) for i in range(9)]
    want = [step(criterion, size, device) for size in sizes]

    def work(i: int) -> bool:
        own = [(i + 5 * k) % len(sizes) for k in range(20)]
        return all(all(map(torch.equal, step(criterion, sizes[j], device), want[j])) for j in own)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # Python changes threads as often as it can
    try:
        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(work, range(4)))
    finally:
        sys.setswitchinterval(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_after_use() -> None:
    """As a data loader's worker that distils: the same results there."""
    criterion = criterion_of(custom_mask_warmup=0)
    want = step(criterion)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def child() -> None:
        results.put(all(map(torch.equal, step(criterion), want)))
        os._exit(0)

    process = context.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert results.get()
