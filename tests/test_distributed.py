"""DDP and FSDP2 give the losses, gradients and parameters of one process on the joined batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from problems import trained

from maskd_triton import MaskedDistillLoss

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp", "calibrate"])
def test_two_processes(mode: str) -> None:
    assert f"{mode} equal" in run(2, "tests/programs/two_processes.py", mode)


def test_dtensor_features() -> None:
    """They are told what to pass instead; their local parts are taken."""
    from torch.distributed.tensor import Shard, distribute_tensor

    criterion, (student, teacher) = MaskedDistillLoss(4, 3, pretrained=trained([4], 3)), torch.randn(2, 2, 4, 3, 5)
    student.requires_grad_()
    want = criterion(student, teacher)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        s, t = (distribute_tensor(x, mesh, [Shard(0)]) for x in (student, teacher))
        for levels, name in (((s, t), "teacher"), ((s, teacher), "student"), ((student, t), "teacher")):
            with pytest.raises(
                TypeError, match=rf"{name}\[0\]: expected a plain tensor, got a DTensor; pass {name}.to_local\(\)"
            ):
                criterion(*levels)
        assert torch.equal(criterion(s.to_local(), t.to_local()), want)
    finally:
        dist.destroy_process_group()
