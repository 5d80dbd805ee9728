"""DDP and FSDP2 give the losses, gradients and parameters of one process on the joined batch."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from problems import trained

from maskd_triton import MaskedDistillLoss

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def run(processes: int, folder: Path, *program: str) -> str:
    """What the ``program`` prints in that many processes; AssertionError with the words of the first that fails, as the others
    then wait for it. They meet in a file: a free port may be taken by another test before they listen."""
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "STORE": str(folder / "store"), "WORLD_SIZE": str(processes)}
    ranks, outputs = [], [folder / f"{rank}.txt" for rank in range(processes)]
    for rank, output in enumerate(outputs):
        with output.open("w") as file:  # not a pipe, which a process may fill while nobody reads it
            environment = os.environ | shared | {"RANK": str(rank)}
            command = [sys.executable, *program]
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT))
    end = time.monotonic() + 300
    try:
        while any(process.poll() is None for process in ranks) and not any(process.poll() for process in ranks):
            assert time.monotonic() < end, [output.read_text()[-4000:] for output in outputs]
            time.sleep(0.1)
        failed = [output.read_text()[-4000:] for process, output in zip(ranks, outputs, strict=True) if process.poll()]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert not failed
    return "".join(output.read_text() for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp", "learn", "calibrate"])
def test_two_processes(mode: str, tmp_path: Path) -> None:
    assert f"{mode} equal" in run(2, tmp_path, "tests/programs/two_processes.py", mode)


@pytest.mark.slow
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
