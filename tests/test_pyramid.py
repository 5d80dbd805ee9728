"""A pyramid is one job: one launch per pass for all levels, right for every mixture of sizes, few compiled variants."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import in_layout
from test_distill import Problem, close

from maskd_triton import functional as F
from maskd_triton import reference

ROOT = Path(__file__).parents[1]
Target = tuple[str, str]
# From a level whose rows are aligned to levels whose rows are not; channels differ
LEVELS = [(2, 16, 4, 8), (2, 16, 3, 5), (2, 8, 1, 1), (2, 24, 2, 4), (2, 7, 3, 3), (2, 8, 1, 16), (2, 1, 5, 2)]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched."""
    pytest.importorskip("triton", reason="triton is not installed")
    from maskd_triton.kernels import distill, learn

    names: list[str] = []
    for module in (distill, learn):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(kernel, "run", counted(kernel.run, name, names))
    return names


def counted(run: Any, name: str, names: list[str]) -> Any:
    def counting(*args: Any, **kwargs: Any) -> Any:
        names.append(name)
        return run(*args, **kwargs)

    return counting


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("levels", range(1, 8))
def test_stage_2(levels: int, layout: str, target: Target, launches: list[str]) -> None:
    problem = Problem(LEVELS[:levels], 3)
    losses, grads = problem.expected(custom_mask=True)
    launches.clear()
    got, got_grads = problem.measured(target, layout, custom_mask=True)
    assert launches == (["forward_kernel", "finish_kernel", "backward_kernel"] if target[0] == "triton" else [])
    close(got, losses, 1e-12)
    for g, e in zip(got_grads, grads, strict=True):
        close(g, e, 1e-12)


@pytest.mark.parametrize("need_x", [False, True], ids=["", "x"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("levels", range(1, 8))
def test_stage_1(levels: int, weighted: bool, need_x: bool, target: Target, launches: list[str]) -> None:
    impl, device = target
    problem = Problem(LEVELS[:levels], 3, weighted)
    layout = ["nchw", "channels_last"][levels % 2]

    def leaves(device: str) -> tuple[list[torch.Tensor], list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]] | None]:
        features = [in_layout(x, layout).to(device).requires_grad_(need_x) for x in problem.teacher]
        tokens = [e.requires_grad_() for e in problem.placed_tokens(device)]
        composed = problem.composed(device)
        weighting = (
            None if composed is None else [(a.detach().requires_grad_(), b.detach().requires_grad_()) for a, b in composed]
        )
        return features, tokens, weighting

    features, tokens, weighting = leaves(device)
    launches.clear()
    masked, dice = F.masked_features_and_dice(features, tokens, weighting, impl=impl)
    upstream = [torch.randn(y.shape, generator=torch.Generator().manual_seed(i)).double() for i, y in enumerate(masked)]
    torch.autograd.backward([*masked, dice], [*(g.to(device) for g in upstream), torch.arange(1.0, 1 + levels).to(dice)])
    if impl == "triton":
        forward = ["mask_kernel", "finish_kernel"] + ["gate_kernel"] * weighted
        assert launches == [*forward, "token_gradient_kernel", "add_shares_kernel", *["feature_gradient_kernel"] * need_x]
    else:
        assert not launches

    want_features, want_tokens, want_weighting = leaves("cpu")
    for i, x in enumerate(want_features):
        level = None if want_weighting is None else want_weighting[i]
        y, d = reference_level(x, want_tokens[i], level)
        close(masked[i].detach(), y.detach(), 1e-12)
        close(dice[i].detach(), d.detach(), 1e-12)
        torch.autograd.backward([y, d], [upstream[i], torch.tensor(1.0 + i).to(d)])
    pairs = list(zip(tokens, want_tokens, strict=True)) + (list(zip(features, want_features, strict=True)) if need_x else [])
    for got, want in zip(weighting or (), want_weighting or (), strict=True):
        pairs += list(zip(got, want, strict=True))
    for got_leaf, want_leaf in pairs:
        assert got_leaf.grad is not None
        assert want_leaf.grad is not None
        scale = max(1.0, want_leaf.grad.abs().max().item())  # gradients that cancel to nothing
        close(got_leaf.grad / scale, want_leaf.grad / scale, 2e-12 * scale / max(want_leaf.grad.abs().max().item(), 1e-3))


def reference_level(
    x: torch.Tensor, tokens: torch.Tensor, weighting: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked features and Dice loss of one level by plain autograd: the composed weighting on zero-padded sums."""
    y, dice = reference.masked_features_and_dice(x, tokens, None)
    if weighting is None:
        return y, dice
    m = torch.sigmoid(torch.einsum("tc,nchw->nthw", tokens, x))
    rows, bias = weighting
    corners = [x[:, :, i, j] for i in (0, -1) for j in (0, -1)]
    borders = [x[:, :, 0].sum(2), x[:, :, -1].sum(2), x[:, :, :, 0].sum(2), x[:, :, :, -1].sum(2)]
    strips = torch.stack([x.sum((2, 3)), *borders, *corners], 1)
    w = torch.softmax(torch.einsum("nsc,stc->nt", strips, rows) / (x.shape[2] * x.shape[3]) + bias, 1)
    return x * torch.einsum("nt,nthw->nhw", w, m)[:, None], dice


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "layout"), [("bfloat16", "nchw"), ("bfloat16", "nhwc"), ("float32", "nchw")])
def test_500_image_sizes_compile_few_variants(dtype: str, layout: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/programs/variants.py", dtype, layout]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
