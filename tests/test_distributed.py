"""DDP, FSDP2 and DTensor features give the losses, gradients and parameters of one process on the joined batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]


def run(processes: int, *program: str) -> str:
    """What the ``program`` prints under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *program]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "learn", "calibrate"])
def test_two_processes(mode: str) -> None:
    assert f"{mode} equal" in run(2, "tests/programs/two_processes.py", mode)


@pytest.mark.parametrize("processes", [1, 2])
def test_dtensor_features(processes: int) -> None:
    assert run(processes, "tests/programs/dtensors.py").count("equal") == processes
