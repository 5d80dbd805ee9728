"""The contenders under pytest-benchmark: ``pytest bench/`` (its --benchmark-json and --benchmark-compare work)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .__main__ import AGREEMENT, chosen, errors, step, truth
from .contenders import SAME_RESULT
from .workloads import WORKLOADS, make_inputs, variant

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [(stage, name) for stage in (1, 2) for name in chosen(stage, DEVICE, compiled=False)[0]]
NAMES = WORKLOADS if DEVICE.type == "cuda" else ["tiny", "segmentation"]  # the others take minutes on a CPU


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("stage", "contender"), CASES)
def test_speed(stage: int, contender: str, name: str, backward: bool, benchmark: Callable[..., Any]) -> None:
    workload = variant(WORKLOADS[name], stage=stage)
    inputs = make_inputs(workload, DEVICE)
    function = chosen(stage, DEVICE, compiled=False)[0][contender]
    if contender in SAME_RESULT:
        assert max(errors(function, inputs, truth(inputs))) <= AGREEMENT[workload.dtype]

    def call() -> None:
        step(function, inputs, backward)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{workload}, {'forward+backward' if backward else 'forward'}"  # type: ignore[attr-defined]
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)  # type: ignore[attr-defined]
