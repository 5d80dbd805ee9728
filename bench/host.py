"""What a criterion call and its backward cost the host: ``python -m bench.host``.

Microseconds of Python and dispatcher for five small levels: the criterion with ``impl="triton"``, also for sizes that it has
not seen before, and, as a scale, two bare ``torch.library.custom_op`` calls (a forward and a backward) that take the same
tensors and compute nothing. Without a GPU kernels are not launched, so Triton's own cost is left out; the last line adds what
Triton does of a launch before it calls the driver. With a GPU all of a launch is in.
"""

import argparse
import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # there, nothing would be compiled

import torch
from torch import Tensor

from maskd_triton import MaskedDistillLoss, MaskLearner, functional
from maskd_triton.kernels import distill, launch
from tests.ptx import driver
from tests.ptx.driver import virtual_gpu

from . import environment

SIZES = ((25, 42), (13, 21), (7, 11), (4, 6), (2, 3))


@torch.library.custom_op("maskd_triton_bench::forward", mutates_args=())
def scale_forward(
    student: list[Tensor], teacher: list[Tensor], tokens: list[Tensor], rows: list[Tensor], bias: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    first = student[0]
    return first.new_empty(()), first.new_empty(1), first.new_empty(1)


@torch.library.custom_op("maskd_triton_bench::backward", mutates_args=())
def scale_backward(
    grad: Tensor, student: list[Tensor], teacher: list[Tensor], masks: Tensor, coefficients: Tensor
) -> list[Tensor]:
    return [torch.empty_like(s) for s in student]


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *inputs[0], *inputs[1])


def _backward(ctx, grad, _masks, _coefficients):  # type: ignore[no-untyped-def]
    masks, coefficients, *levels = ctx.saved_tensors
    half = len(levels) // 2
    nothing = [None] * half
    return scale_backward(grad, levels[:half], levels[half:], masks, coefficients), nothing, nothing, nothing, nothing


scale_forward.register_autograd(_backward, setup_context=_save)


def calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """The calls to be compared, by name."""
    student = [torch.randn(2, 16, h, w, device=device, requires_grad=True) for h, w in SIZES]
    teacher = [torch.randn(2, 16, h, w, device=device) for h, w in SIZES]
    channels = [16] * len(SIZES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        criterion = MaskedDistillLoss(channels, pretrained=MaskLearner(channels), impl="triton").to(device)
    tokens = [torch.randn(6, 16, device=device) for _ in SIZES]

    def unseen() -> object:
        launch.PLANS.clear()
        functional._FITTING.clear()
        return torch.autograd.grad(criterion(student, teacher), student)

    return {
        "criterion": lambda: torch.autograd.grad(criterion(student, teacher), student),
        "criterion, unseen sizes": unseen,
        "two custom_op calls": lambda: torch.autograd.grad(scale_forward(student, teacher, tokens, tokens, tokens)[0], student),
    }


def microseconds(functions: Sequence[Callable[[], object]], rounds: int = 15, repeats: int = 100) -> list[float]:
    """The least time of each over ``rounds``, which take turns: the host is disturbed more often than it is fast by chance."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, found in zip(functions, times, strict=True):
            function()
            begun = time.perf_counter()
            for _ in range(repeats):
                function()
            found.append((time.perf_counter() - begun) / repeats * 1e6)
    return [min(found) for found in times]


def _nothing(*_: object, **__: object) -> None:
    """In place of a launch."""


@contextlib.contextmanager
def no_launches() -> Iterator[None]:
    """Inside, kernels take CPU tensors and do nothing."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch, "check_device", _nothing))
        for name, kernel in vars(distill).items():
            if name.endswith("_kernel"):
                stack.enter_context(mock.patch.object(kernel, "run", _nothing))
        yield


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    found = calls(device)
    with no_launches() if device.type == "cpu" else contextlib.nullcontext():
        results = dict(zip(found, microseconds(list(found.values())), strict=True))
    if device.type == "cpu":
        no_driver = mock.patch.object(driver._Launcher, "__call__", _nothing)
        with virtual_gpu(90), no_driver, mock.patch.object(launch, "check_device", _nothing):
            (results["criterion, Triton's part"],) = microseconds([found["criterion"]])
    for name, value in results.items():
        print(f"{name:24s} {value:6.0f} us")
    if args.out:
        facts = environment.describe(device) | {"launches": device.type == "cuda", "microseconds": results}
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
