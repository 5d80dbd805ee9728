"""A pyramid is one job: a pass launches once for aligned levels and once for others, reads features once, and is compiled in
few variants."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.answers import criterion_of
from tests.cases import case_of
from tests.given import Given, given_by
from tests.helpers import require_private
from tests.problems import Target, trained

ROOT = Path(__file__).parents[1]
# From a level whose rows are aligned to levels whose rows are not; channels differ
LEVELS = ((16, 4, 8), (16, 3, 5), (8, 1, 1), (24, 2, 4), (7, 3, 3), (8, 1, 16), (1, 5, 2))

KINDS = pytest.mark.parametrize(("distance", "standardize"), [("squared", ""), ("smooth_l1", "channel"), ("cosine", "channel")])


def pyramid(levels: int, **options: Any) -> Given:
    return given_by(case_of(levels=LEVELS[:levels], dtypes="fp32", **options))


@KINDS
def test_launches_and_what_is_kept(distance: str, standardize: str, target: Target, launches: list[str]) -> None:
    """The same launches whatever the distance; the backward pass reads features, masks, coefficients and, for the cosine, two
    scalars per pixel. Beside them little more than the losses of all levels and images is kept."""
    given = pyramid(7, distance=distance, standardize=standardize).on(target[1])
    criterion = criterion_of(given, target[0])
    student = [x.requires_grad_() for x in given.student]
    kept: dict[int, int] = {}  # elements of every tensor, by address: the features are no copies

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    launches.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = criterion(student, given.teacher).sum()
    loss.backward()
    passes = [*["forward_kernel", "finish_kernel"] * 2, *["backward_kernel"] * 2]
    assert launches == (passes if target[0] == "triton" else [])
    pixels = sum(2 * h * w for _, h, w in LEVELS)
    features = {x.data_ptr(): x.numel() for x in student + given.teacher}
    tables = 2 * sum(c for c, *_ in LEVELS) if standardize else 0
    beside = sum(kept.values()) - sum(features.values()) - tables - (3 + 2 * (distance == "cosine")) * pixels
    assert features.items() <= kept.items()
    assert beside <= 2 * (3 + 2) * len(LEVELS)  # coefficients, weights and losses of images


@KINDS
def test_features_are_read_once_per_pass(distance: str, standardize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element of both, once forward and once backward, as the interpreter sees it; mask weights read the border again."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("what compiled kernels read is not seen")
    require_private(interpreter.InterpreterBuilder, "create_masked_load")
    given = pyramid(3, distance=distance, standardize=standardize, weighted=False, custom="no")
    criterion = criterion_of(given, "triton")
    student = [x.requires_grad_() for x in given.student]
    reads = {x.data_ptr(): np.zeros(x.numel(), int) for x in student + given.teacher}
    load = interpreter.InterpreterBuilder.create_masked_load

    def counting(builder: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        for start, count in reads.items():
            element = (pointers.data[mask.data].astype(np.int64) - start) // 4
            np.add.at(count, element[(element >= 0) & (element < len(count))], 1)
        return load(builder, pointers, mask, *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counting)
    loss = criterion(student, given.teacher).sum()
    assert all((count == 1).all() for count in reads.values())
    loss.backward()
    assert all((count == 2).all() for count in reads.values())


@pytest.mark.parametrize(("weighted", "inputs"), [(True, True), (False, False)])
def test_launches_of_stage_1(weighted: bool, inputs: bool, target: Target, launches: list[str]) -> None:
    learner = trained([c for c, *_ in LEVELS], 3, weighted, impl=target[0]).to(target[1])
    features = [x.to(target[1]).requires_grad_(inputs) for x in pyramid(7).teacher]
    launches.clear()
    masked = learner(features)
    torch.autograd.backward([*masked, learner.dice_loss()], [*(torch.ones_like(y) for y in masked), None])
    forward = ["mask_kernel", *["gate_kernel"] * weighted]
    backward = ["token_gradient_kernel", *["feature_gradient_kernel"] * inputs]
    assert launches == (forward * 2 + backward * 2 if target[0] == "triton" else [])


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "layout"), [("bf16", "nchw"), ("bf16", "nhwc"), ("fp32", "nchw")])
def test_500_image_sizes_compile_few_variants(dtype: str, layout: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/programs/sizes.py", dtype, layout]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
