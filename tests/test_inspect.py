"""Every kernel compiles for four GPUs without spills and with full-width loads: a sixth of what ``python -m bench.inspect``
compiles."""

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
    shown = compiling("-m", "bench.inspect", "--every", "6", "--target", target)
    for kernel in inspect.KERNELS:
        assert f" {kernel.fn.__name__} " in shown
