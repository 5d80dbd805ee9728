"""A whole GPU visit in one command: ``python -m bench.gpu_visit --out FOLDER``.

Runs the parts below in order of value, each within its own time limit, and leaves one small JSON file per part and the log of
the tests. A part whose file is already in the folder is skipped, so that a second visit goes on where the first one ended.
``python -m bench.publish FOLDER`` then puts all of it in its place. Without a GPU it says so and exits with 2.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import environment
from .workloads import DTYPES


@dataclass(frozen=True)
class Part:
    """A command, what it is for and the most seconds it may take; it writes ``{name}.json`` itself, or we write its end."""

    name: str
    seconds: int
    command: Callable[[Path], Sequence[str]]
    writes_json: bool = True


def module(name: str, *arguments: str) -> Callable[[Path], Sequence[str]]:
    return lambda out: [sys.executable, "-m", name, *arguments, "--out", str(out)]


def tests(*arguments: str) -> Callable[[Path], Sequence[str]]:
    return lambda _: [sys.executable, "-m", "pytest", "-q", *arguments]


def sanitizer(out: Path) -> Sequence[str]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    run = tests("-x", "tests/test_golden.py", "tests/test_pyramid.py", "-k", "not 500")(out)
    return [tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all", *run]


BF16 = ("--dtype", "bf16", "--layout", "nchw", "channels_last", "--seconds", "0.3")
EVERY = ("--dtype", *DTYPES, *BF16[2:])
# The first ten fit into 25 minutes; seconds are what each may take at most
PARTS = (
    Part("tests", 480, tests("-m", "not slow"), writes_json=False),
    Part("sanitizer", 240, sanitizer, writes_json=False),
    Part("fpn-n2", 100, module("bench", "fpn", *BF16)),
    Part("fpn-n2-compiled", 100, module("bench", "fpn", *BF16, "--compile")),
    Part("fpn-n16", 100, module("bench", "fpn", "--batch", "16", *BF16)),
    Part("fpn-n2-stage1", 100, module("bench", "fpn", "--stage", "1", *BF16)),
    Part("autotune", 200, lambda out: [sys.executable, "-m", "bench.autotune", "--bits", "16", "--out", str(out)]),
    Part("growth", 60, module("bench", "--growth", "--dtype", "bf16", "--seconds", "0.05")),
    Part("share", 60, module("bench.share", "--dtype", "bf16")),
    Part("host", 60, module("bench.host")),
    Part("others", 240, module("bench", "fpn_odd", "segmentation", "vit", "tiny", *BF16)),
    Part("dtypes", 300, module("bench", "fpn", *EVERY)),
    Part("slow-tests", 480, tests("-m", "slow", "-k", "not inspect"), writes_json=False),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_visit", description=__doc__)
    parser.add_argument("--out", type=Path, default=environment.ROOT / "gpu_visit")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="parts to run")
    parser.add_argument("--seconds", type=float, default=570, help="start no part that could end after this many seconds")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu_visit: torch sees no GPU here, so there is nothing to measure; nothing was run")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    start, failed = time.monotonic(), 0
    for part in PARTS:
        target = args.out / f"{part.name}.json"
        left = args.seconds - (time.monotonic() - start)
        if target.exists() or (args.only and part.name not in args.only):
            print(f"{part.name}: skipped", flush=True)
        elif left < min(part.seconds, 60):
            print(f"{part.name}: left out, {left:.0f} s left", flush=True)
        else:
            failed += execute(part, target, min(part.seconds, left))
    return min(failed, 1)


def execute(part: Part, target: Path, seconds: float) -> bool:
    """Whether the part failed; its output goes on to ours, the end of it into ``target`` if it writes none itself."""
    print(f"{part.name}: at most {seconds:.0f} s", flush=True)
    begun = time.monotonic()
    log = target.with_suffix(".log")
    with log.open("w") as out:
        try:
            command = part.command(target)
            run = subprocess.run(command, cwd=environment.ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=seconds)
            code: int | str = run.returncode
        except subprocess.TimeoutExpired:
            code = "timed out"
        except FileNotFoundError as error:
            code = f"not here: {error.filename}"
            out.write(f"{code}\n")
    lines = log.read_text(errors="replace").splitlines()
    print(*lines[-40:], f"{part.name}: {code}, {time.monotonic() - begun:.0f} s", sep="\n", flush=True)
    if part.writes_json:
        log.unlink()
    elif isinstance(code, int):
        facts = environment.describe(torch.device("cuda")) | {"exit": code, "end": lines[-20:]}
        target.write_text(json.dumps(facts, indent=1) + "\n")
    return code != 0


if __name__ == "__main__":
    sys.exit(main())
