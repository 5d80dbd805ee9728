"""Every kernel and configuration compiles for four GPUs without spills and with full-width loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_without_spills(target: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # it would not compile anything
    command = [sys.executable, "-m", "bench.inspect", "--target", target]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert result.stdout.count("forward_kernel") >= 25


def test_occupancy() -> None:
    """By hand: 128 registers of 128 threads fit four times into 65536; 3 programs' memory into 164 KiB; 8 waves a SIMD."""
    pytest.importorskip("triton", reason="triton is not installed")
    from bench.inspect import TARGETS, occupancy

    assert occupancy(TARGETS["sm_90"], 125, 23040, 4) == 4 * 4 / 64
    assert occupancy(TARGETS["sm_80"], 32, 50 * 1024, 8) == 3 * 8 / 64
    assert occupancy(TARGETS["sm_100"], 16, 0, 1) == 32 / 64
    assert occupancy(TARGETS["gfx942"], 64, 0, 4) == 1
    assert occupancy(TARGETS["gfx942"], 186, 4096, 2) == 4 * 2 / 32


NARROW = """
import sys
from unittest import mock
from bench import inspect
from maskd_triton.kernels import launch

silent = []
with mock.patch.object(launch, "_aligned", return_value=False):
    for case in (inspect.Case("bf16"), inspect.Case("bf16", "nhwc"), inspect.Case("fp32"), inspect.Case("fp32", "nhwc")):
        for name, compiled in inspect.compile_case(case, sys.argv[1]).items():
            if name in inspect.FEATURE_MAPS and not inspect.problems(case, inspect.facts(name, compiled)):
                silent.append(f"{case} {name}")
sys.exit("\\n".join(silent) or 0)
"""


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_narrow_loads_are_noticed(target: str) -> None:
    """Were alignment not known at compile time, the inspector would say so for every kernel that moves feature maps."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", NARROW, target]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
