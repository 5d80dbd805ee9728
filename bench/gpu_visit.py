"""A GPU visit in one command: ``python -m bench.gpu_visit``: the tests, the benchmarks, the search for launch configurations.

Each part runs within its own time limit. What is measured goes into ``bench/results/gpu-*.json``, the launch configurations
into ``kernels/configs``, where the package ships them; commit both as they are. Without a GPU it says so and exits with 2.
"""

import argparse
import subprocess
import sys
import time

import torch

from maskd_triton.kernels import tuning

from .environment import ROOT

BF16 = ("--dtype", "bf16", "--layout", "nchw", "channels_last", "--seconds", "0.3")
# In order of value: the most seconds that a part may take, and its command; what ends in .json is written by it
PARTS = {
    "tests": (480, "pytest", "-q", "-m", "not slow"),
    "fpn-n2": (100, "bench", "fpn", *BF16, "--compile"),
    "fpn-n16": (100, "bench", "fpn", "--batch", "16", *BF16),
    "fpn-stage1": (100, "bench", "fpn", "--stage", "1", *BF16),
    "autotune": (240, "maskd_triton.kernels.autotune", "--bits", "16"),
    "tuned": (100, "bench", "fpn", *BF16),
    "others": (240, "bench", "fpn_odd", "segmentation", "vit", "tiny", *BF16),
    "growth": (60, "bench", "--growth", "--dtype", "bf16", "--seconds", "0.05"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_visit", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu_visit: torch sees no GPU here, so there is nothing to measure; nothing was run")
        return 2
    gpu = tuning.shipped_file(torch.cuda.get_device_name()).stem
    failed = [name for name in args.only if run(name, gpu)]
    print(f"failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


def run(name: str, gpu: str) -> bool:
    """Whether the part failed."""
    seconds, *command = PARTS[name]
    configs = tuning.shipped_file(gpu)
    out = {"tests": None, "autotune": configs}.get(name, ROOT / f"bench/results/gpu-{gpu}-{name}.json")
    if out:
        out.parent.mkdir(exist_ok=True)
        command += ["--out", str(out)]
    print(f"{name}: python -m {' '.join(command)}, at most {seconds} s", flush=True)
    begun = time.monotonic()
    try:
        code: int | str = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        code = "timed out"
    print(f"{name}: {code}, {time.monotonic() - begun:.0f} s", flush=True)
    return code != 0


if __name__ == "__main__":
    sys.exit(main())
