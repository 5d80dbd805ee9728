"""A pyramid is one job: one launch per pass for all levels, right for every mixture of sizes, few compiled variants."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import in_layout, require_private
from problems import Problem, close, literal_learn

from maskd_triton import functional as F

ROOT = Path(__file__).parents[1]
Target = tuple[str, str]
# From a level whose rows are aligned to levels whose rows are not; channels differ
LEVELS = [(2, 16, 4, 8), (2, 16, 3, 5), (2, 8, 1, 1), (2, 24, 2, 4), (2, 7, 3, 3), (2, 8, 1, 16), (2, 1, 5, 2)]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("levels", range(1, 8))
def test_stage_2(levels: int, layout: str, target: Target, launches: list[str]) -> None:
    problem = Problem(LEVELS[:levels], 3)
    losses, grads = problem.literal(custom_mask=True)
    launches.clear()
    got, got_grads = problem.ours(target, layout, custom_mask=True)
    assert launches == (["forward_kernel", "finish_kernel", "backward_kernel"] if target[0] == "triton" else [])
    close(got, losses, 1e-12)
    for g, e in zip(got_grads, grads, strict=True):
        close(g, e, 1e-12)


@pytest.mark.parametrize("standardize", [False, True], ids=["", "standardize"])
@pytest.mark.parametrize("distance", F.DISTANCES)
def test_launches_and_what_is_kept(distance: str, standardize: bool, target: Target, launches: list[str]) -> None:
    """One launch per pass whatever the distance; the backward pass reads features, masks, coefficients and, for the cosine, two
    scalars per pixel. Beside them the losses of all levels and images and their weight are kept, for the weight's gradient."""
    impl, device = target
    problem = Problem(LEVELS[:3], 3, dtype=torch.float32, standardize=standardize)
    criterion = problem.criterion(custom_mask_warmup=0, distance=distance, impl=impl).to(device)
    student, teacher = ([x.to(device) for x in maps] for maps in (problem.student, problem.teacher))
    student = [x.requires_grad_() for x in student]
    kept: dict[int, int] = {}  # elements of every tensor, by address: the features are no copies

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    launches.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = criterion(student, teacher)
    loss.backward()
    assert launches == (["forward_kernel", "finish_kernel", "backward_kernel"] if impl == "triton" else [])
    pixels = sum(n * h * w for n, _, h, w in LEVELS[:3])
    features = {x.data_ptr(): x.numel() for x in student + teacher}
    statistics = 2 * sum(c for _, c, _, _ in LEVELS[:3]) if standardize else 0
    beside = sum(kept.values()) - sum(features.values()) - statistics - 2 * 3 * 3 - 3 * pixels
    assert features.items() <= kept.items()
    assert beside == (2 * pixels if distance == "cosine" else 0) + 2 * 3 + 1


@pytest.mark.parametrize("standardize", [False, True], ids=["", "standardize"])
@pytest.mark.parametrize("distance", F.DISTANCES)
def test_features_are_read_once_per_pass(distance: str, standardize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element of both, once forward and once backward, as the interpreter sees it; mask weights read the border again."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("what compiled kernels read is not seen")
    require_private(interpreter.InterpreterBuilder, "create_masked_load")
    problem = Problem(LEVELS[:3], 3, weighted=False, dtype=torch.float32, standardize=standardize)
    criterion = problem.criterion(custom_mask_warmup=0, distance=distance, impl="triton")
    student, teacher = [x.requires_grad_() for x in problem.student], problem.teacher
    reads = {x.data_ptr(): np.zeros(x.numel(), int) for x in student + teacher}
    load = interpreter.InterpreterBuilder.create_masked_load

    def counting(builder: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        for start, count in reads.items():
            element = (pointers.data[mask.data].astype(np.int64) - start) // 4
            np.add.at(count, element[(element >= 0) & (element < len(count))], 1)
        return load(builder, pointers, mask, *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counting)
    loss = criterion(student, teacher)
    assert all((count == 1).all() for count in reads.values())
    loss.backward()
    assert all((count == 2).all() for count in reads.values())


@pytest.mark.parametrize("need_x", [False, True], ids=["", "x"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("levels", range(1, 8))
def test_stage_1(levels: int, weighted: bool, need_x: bool, target: Target, launches: list[str]) -> None:
    impl, device = target
    problem = Problem(LEVELS[:levels], 3, weighted)
    layout = ["nchw", "channels_last"][levels % 2]
    modules = copy.deepcopy(problem.learner).to(device, torch.float64).mask_modules
    features = [in_layout(x, layout).to(device).requires_grad_(need_x) for x in problem.teacher]
    weighting = [F.compose_weighting(*module.weighting()) for module in modules] if weighted else None
    launches.clear()
    masked, dice = F.masked_features_and_dice(features, [module.mask_token for module in modules], weighting, impl=impl)
    upstream = [torch.randn(y.shape, generator=torch.Generator().manual_seed(i)).double() for i, y in enumerate(masked)]
    torch.autograd.backward([*masked, dice], [*(g.to(device) for g in upstream), torch.arange(1.0, 1 + levels).to(dice)])
    if impl == "triton":
        forward = ["mask_kernel", "finish_kernel"] + ["gate_kernel"] * weighted
        assert launches == [*forward, "token_gradient_kernel", "add_shares_kernel", *["feature_gradient_kernel"] * need_x]
    else:
        assert not launches

    literal = copy.deepcopy(problem.learner).double().mask_modules
    for i, x in enumerate(problem.teacher):
        x.requires_grad_(need_x)
        y, d = literal_learn(literal[i], x)
        close(masked[i], y, 1e-12)
        close(dice[i], d, 1e-12)
        torch.autograd.backward([y, d], [upstream[i], torch.tensor(1.0 + i).to(d)])
        leaves = [*zip(modules[i].parameters(), literal[i].parameters(), strict=True), *([(features[i], x)] if need_x else [])]
        for got, want in leaves:
            close(got.grad, want.grad, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "layout"), [("bfloat16", "nchw"), ("bfloat16", "nhwc"), ("float32", "nchw")])
def test_500_image_sizes_compile_few_variants(dtype: str, layout: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/programs/sizes.py", dtype, layout]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
