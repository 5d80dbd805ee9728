"""The contenders under pytest-benchmark: ``pytest bench/`` (its --benchmark-json and --benchmark-compare work)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .__main__ import AGREEMENT, chosen, errors, result, step
from .contenders import SAME_LOSS, literal
from .workloads import WORKLOADS, make_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTENDERS, _ = chosen(DEVICE, compiled=False)
NAMES = WORKLOADS if DEVICE.type == "cuda" else ["tiny", "segmentation"]  # the others take minutes on a CPU


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_speed(contender: str, name: str, backward: bool, benchmark: Callable[..., Any]) -> None:
    workload = WORKLOADS[name]
    inputs = make_inputs(workload, DEVICE)
    if contender in SAME_LOSS:
        assert max(errors(CONTENDERS[contender], inputs, result(literal, inputs))) <= AGREEMENT[workload.dtype]

    def call() -> None:
        step(CONTENDERS[contender], inputs, backward)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{workload}, {'forward+backward' if backward else 'forward'}"  # type: ignore[attr-defined]
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)  # type: ignore[attr-defined]
