"""Every kernel compiles for four GPUs without spills and with full-width loads: a choice of what ``python -m bench.inspect``
compiles, which covers every kind of code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from bench import inspect

ROOT = Path(__file__).parents[1]


def compiling(*arguments: str) -> str:
    """The output of a Python process that compiles kernels, which this one, with its interpreter, would not."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", inspect.TARGETS)
def test_compiles_without_spills(target: str) -> None:
    shown = compiling("-m", "bench.inspect", "--choice", "--jobs", "1", "--target", target)
    for kernel in map(inspect.kernel_name, inspect.KERNELS):
        assert f" {kernel} " in shown
    assert shown.count("forward_kernel") == [chosen for chosen, _ in inspect.choice()].count(target) >= 6


def test_choice() -> None:
    """Small, and yet it holds every dtype, layout and number of tokens on every target, and everything any case has."""
    chosen, cases = inspect.choice(), inspect.cases()
    assert len(set(chosen)) == len(chosen) < len(cases) * len(inspect.TARGETS) / 6
    for name in vars(cases[0]):
        values = {getattr(case, name) for case in cases}
        assert {getattr(case, name) for _, case in chosen} == values
        for target in inspect.TARGETS if name in ("dtype", "layout", "tokens", "weighted", "valid") else ():
            assert {getattr(case, name) for t, case in chosen if t == target} == values
    pairs = [{(case.dtype, case.layout, case.valid) for case in each} for each in (cases, (case for _, case in chosen))]
    assert {pair[:2] for pair in pairs[0]} == {pair[:2] for pair in pairs[1]}
    assert {pair[1:] for pair in pairs[0]} == {pair[1:] for pair in pairs[1]}


def test_occupancy() -> None:
    """By hand: 128 registers of 128 threads fit four times into 65536; 3 programs' memory into 164 KiB; 8 waves a SIMD."""
    occupancy, targets = inspect.occupancy, inspect.TARGETS
    assert occupancy(targets["sm_90"], 125, 23040, 4) == 4 * 4 / 64
    assert occupancy(targets["sm_80"], 32, 50 * 1024, 8) == 3 * 8 / 64
    assert occupancy(targets["sm_100"], 16, 0, 1) == 32 / 64
    assert occupancy(targets["gfx942"], 64, 0, 4) == 1
    assert occupancy(targets["gfx942"], 186, 4096, 2) == 4 * 2 / 32


@pytest.mark.slow
@pytest.mark.parametrize(("target", "cases"), [("sm_90", "bf16-nchw fp32-nhwc"), ("gfx942", "bf16-nhwc fp32-nchw")])
def test_narrow_loads_are_noticed(target: str, cases: str) -> None:
    """Were alignment not known at compile time, the inspector would say so for every kernel that moves feature maps."""
    compiling("tests/programs/narrow_loads.py", target, *cases.split())
