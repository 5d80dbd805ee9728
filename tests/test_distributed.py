"""DDP, FSDP2 and DTensor features give the losses, gradients and parameters of one process on the joined batch."""

import os
import socket
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
    """What the ``program`` prints in that many processes. Without torchrun, which was seen to hang once they had ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(processes):
        environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        command, pipe = [sys.executable, *program], subprocess.PIPE
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True))
    try:
        printed = [process.communicate(timeout=300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, (_, errors) in zip(ranks, printed, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return "".join(out for out, _ in printed)


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "learn", "calibrate"])
def test_two_processes(mode: str) -> None:
    assert f"{mode} equal" in run(2, "tests/programs/two_processes.py", mode)


@pytest.mark.parametrize("processes", [1, 2])
def test_dtensor_features(processes: int) -> None:
    assert run(processes, "tests/programs/dtensors.py").count("equal") == processes
