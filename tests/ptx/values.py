"""Who is right where interpreted and compiled kernels differ: ``python -m tests.ptx.values``.

Runs the cases of ``test_kernels.py`` in Triton's interpreter and, compiled for sm_80 and sm_90, in the emulator. Printed are,
for every dtype (of two the coarser one) and output, the largest differences between the two and of each from eager float64,
relative to the largest value. Eager torch in the dtype itself is the scale.
"""

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from .driver import ARCHS, virtual_gpu
from .test_kernels import CASES, Case, error, stage_1, stage_2

INTERPRETER = "interpreter"
COARSEST_FIRST = ("bf16", "fp16", "fp32", "fp64")
Outputs = dict[str, list[Tensor]]


def jobs() -> list[tuple[int, Case]]:
    return [(stage, case) for stage in CASES for case in CASES[stage]]


def outputs(stage: int, case: Case, impl: str, dtype: torch.dtype | None = None) -> Outputs:
    torch.manual_seed(0)
    return (stage_1 if stage == 1 else stage_2)(case)(impl, dtype)


def run_on(engine: str) -> list[Outputs]:
    """What the kernels give in every case, in a process of its own: one interprets or compiles, not both."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "outputs.pt")
        environment = {**os.environ, "TRITON_INTERPRET": str(int(engine == INTERPRETER))}
        subprocess.run([sys.executable, "-m", __spec__.name, engine, str(file)], env=environment, check=True)
        return torch.load(file)


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:]:
        engine, file = sys.argv[1:]
        with nullcontext() if engine == INTERPRETER else virtual_gpu(int(engine)):
            torch.save([outputs(stage, case, "triton") for stage, case in jobs()], file)
        return
    interpreted, *compiled = (run_on(engine) for engine in (INTERPRETER, *map(str, ARCHS)))
    largest: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * 4)
    for i, (stage, case) in enumerate(jobs()):
        exact, eager = outputs(stage, case, "eager", torch.float64), outputs(stage, case, "eager")
        for name, values in exact.items():
            dtype = min(case.dtype, case.other_dtype or case.dtype, key=COARSEST_FIRST.index)
            row = largest[dtype, f"stage {stage} {name}"]
            for j, want in enumerate(values):
                guess = interpreted[i][name][j]
                for gpu in compiled:
                    got = gpu[i][name][j]
                    found = [error(got, guess.double()), error(guess, want), error(got, want), error(eager[name][j], want)]
                    row[:] = map(max, row, found)
    print("| dtype | output | interpreted - compiled | interpreted | compiled | eager |\n|---|---|---|---|---|---|")
    for (dtype, name), row in sorted(largest.items()):
        print(f"| {dtype} | {name} |", " | ".join(f"{x:.1e}" for x in row), "|")


if __name__ == "__main__":
    main()
