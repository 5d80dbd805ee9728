"""What a launch costs is counted right, and the main kernels do not cost more than the committed counts say."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from bench import counts
from tests.ptx.counts import Counts
from tests.ptx.driver import virtual_gpu
from tests.ptx.parser import Instruction, Kernel

RESULTS = json.loads((Path(__file__).parents[2] / "bench/results/counts.json").read_text())


@triton.jit
def _sum_of_rows(x_ptr, y_ptr, N: tl.constexpr, P: tl.constexpr):
    p = tl.arange(0, P)
    total = tl.zeros((P,), tl.float32)
    for n in range(N):
        total += tl.load(x_ptr + n * P + p)
    tl.store(y_ptr + p, total)


def test_bytes_and_instructions() -> None:
    """Each number is asked for once; twice as many rows take twice as many additions."""
    additions = []
    for rows in (4, 8):
        x, y = torch.ones(rows, 128), torch.empty(128)
        with virtual_gpu(90) as gpu, gpu.counting() as found:
            _sum_of_rows[(1,)](x, y, rows, 128, num_warps=4)
        assert (y == rows).all()
        assert found[0].asked == {"x_ptr": rows * 512, "y_ptr": 512}
        assert found[0].warps == 4
        assert not found[0].shared
        additions.append(found[0].operations["add"])
    assert additions[1] - additions[0] >= 4 * 4  # one of every warp for each row
    with virtual_gpu(90) as gpu:
        _sum_of_rows[(1,)](x, y, rows, 128, num_warps=4)
        assert not gpu.counts


@pytest.mark.parametrize(
    ("size", "stride", "wavefronts", "ideal"),
    [
        (4, 4, 1, 1),
        (4, 8, 2, 1),  # 32 words in 16 banks
        (4, 128, 32, 1),
        (4, 0, 1, 1),  # one word for all
        (2, 2, 1, 1),
        (16, 16, 4, 4),  # 8 lanes at a time
        (16, 128, 32, 4),
    ],
)
def test_wavefronts_of_shared_memory(size: int, stride: int, wavefronts: int, ideal: int) -> None:
    """By hand, for one warp."""
    kernel = Kernel.__new__(Kernel)
    kernel.instructions = [Instruction(1, "ld", "file.py:1", None, ["ld", "shared"], [])]
    found = Counts("kernel", 1)
    lanes = np.arange(32)
    found.shared_access(kernel, 0, lanes * stride, size, lanes)
    assert found.shared == {"file.py:1 ld": wavefronts}
    assert found.ideal == {"file.py:1 ld": ideal}


@pytest.mark.skipif(triton.__version__ != RESULTS["packages"]["triton"], reason="counted with another Triton")
@pytest.mark.parametrize(
    ("layout", "distance"), [("nchw", "squared"), ("nhwc", "squared"), ("nhwc", "smooth_l1"), ("nchw", "cosine")]
)
def test_costs_do_not_grow(layout: str, distance: Any) -> None:
    case = counts.Case("sm_90", "bf16", layout, distance)
    about = json.loads(json.dumps(asdict(case)))
    known = {row["kernel"]: row for row in RESULTS["rows"] if about.items() <= row.items()}
    found = counts.rows(counts.count(case))
    main = {name.partition(".")[2] for name in counts.MAPS if distance == "squared" or name.startswith("distill")}
    assert {row["kernel"] for row in found} == set(known) == main
    for row in found:
        for figure in counts.FIGURES:
            assert row[figure] <= 1.02 * known[row["kernel"]][figure] + 0.005, (row, figure)
