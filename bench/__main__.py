"""Time and memory of the loss against what a user would pick instead: ``python -m bench``.

Every contender gets the same inputs and must give the results and gradients of the literal formulas in float64 before it is
timed. GB/s counts the bytes an ideal implementation moves; "% copy" is their share of what a plain copy moves, measured in the
same run. Stage 2: student and teacher read once, and for the backward pass the gradient written once. Stage 1: features read
and masked ones written, and for the backward pass features and upstream gradient read; the teacher is frozen, so tokens and
mask weighting get gradients, its features do not. GPU: the L2 cache is flushed before every run. CPU: it is not; levels of the
larger workloads do not fit into it.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import contenders, environment, measure
from .contenders import CONTENDERS, SAME_RESULT, Contender
from .workloads import DTYPES, GROWTH, LAYOUTS, WORKLOADS, Inputs, Workload, make_inputs, variant

# Largest accepted distance from the literal formulas in float64, relative to the largest element of a tensor.
AGREEMENT = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
PASSES = {1: (2, 4), 2: (2, 3)}  # feature maps that forward, and forward and backward, must move


@dataclass(frozen=True)
class Row:
    """One measurement; ``ideal_bytes`` must be moved by any implementation. ``curve`` and ``size``: what grows, and how far."""

    workload: str
    curve: str | None
    size: int | None
    mode: str
    contender: str
    median_ms: float
    lower_ms: float
    upper_ms: float
    runs: int
    peak_extra_bytes: int
    ideal_bytes: int
    result_error: float | None
    gradient_error: float | None


def step(contender: Contender, inputs: Inputs, backward: bool, share: float = 1.0) -> list[Tensor]:
    """Outputs of one call; its backward pass takes the loss, or the sum of the Dice losses, ``share`` times."""
    inputs.forget()
    outputs = contender(inputs)
    if backward:
        upstream = inputs.student if inputs.stage == 1 else []
        torch.autograd.backward(outputs, [*upstream, torch.full_like(outputs[-1], share)])
    return [x.detach() for x in outputs]


def errors(contender: Contender, inputs: Inputs, expected: list[list[Tensor]]) -> tuple[float, float]:
    """Distance of outputs and gradients from ``expected``, relative to the largest element of each tensor."""
    pairs = (zip(g, e, strict=True) for g, e in zip(result(contender, inputs), expected, strict=True))
    outputs, grads = ([(g.double() - e).abs().max() / e.abs().max() for g, e in pair] for pair in pairs)
    return torch.stack(outputs).max().item(), torch.stack(grads).max().item()


def result(contender: Contender, inputs: Inputs, share: float = 1.0) -> list[list[Tensor]]:
    """Outputs, and gradients of the leaves."""
    outputs = step(contender, inputs, True, share)
    return [outputs, [leaf.grad.clone() for leaf in inputs.leaves if leaf.grad is not None]]


def truth(inputs: Inputs) -> list[list[Tensor]]:
    """What `result` should be: the literal formulas in float64, an image at a time, for they need much memory."""
    images = len(inputs.teacher[0])
    singles = [result(contenders.literal, inputs.image(i), 1 / images) for i in range(images)]
    *features, losses = zip(*(outputs for outputs, _ in singles), strict=True)
    grads = zip(*(grads for _, grads in singles), strict=True)
    gathered = [torch.cat(g) if inputs.stage == 2 else torch.stack(g).sum(0) for g in grads]
    return [[*(torch.cat(x) for x in features), torch.stack(losses).mean()], gathered]


def chosen(stage: int, device: torch.device, compiled: bool) -> tuple[dict[str, Contender], dict[str, str]]:
    """Contenders that run here, and why others do not."""
    runs, left_out = dict(CONTENDERS[stage]), {}
    if device.type == "cpu":
        del runs["ours, impl=eager"]
        left_out["ours, impl=eager"] = 'is "ours" on the CPU: Triton needs a GPU'
    if compiled:
        torch.compiler.reset()  # else the limit on recompilation would make later workloads eager without a word
        for name in ("literal", "plain"):
            for label, mode in COMPILED.items():
                runs[f"{name}, {label}"] = torch.compile(SAME_RESULT[name], mode=mode, dynamic=False)
    else:
        left_out["literal and plain under torch.compile"] = "without --compile"
    return runs, left_out


COMPILED = {"compiled": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def bench(
    workload: Workload, device: torch.device, seconds: float, compiled: bool, curve: str | None = None, size: int | None = None
) -> list[Row]:
    """A row for every contender that agrees with the literal formulas, and mode."""
    inputs = make_inputs(workload, device)
    expected = truth(inputs)
    runs, _ = chosen(workload.stage, device, compiled)
    rows = []
    for name, contender in runs.items():
        distance: tuple[float | None, float | None] = (None, None)
        if name.partition(",")[0] in SAME_RESULT:
            distance = errors(contender, inputs, expected)
            if not max(distance) <= AGREEMENT[workload.dtype] and contender is not contenders.literal:  # type: ignore[type-var]
                print(f"  {name}: results and gradients are off by {distance}; not timed")
                continue
        for backward in (False, True):

            def call(contender: Contender = contender, backward: bool = backward) -> list[Tensor]:
                return step(contender, inputs, backward)

            time = measure.time(call, device, seconds)
            rows.append(
                Row(
                    str(workload), curve, size, "forward+backward" if backward else "forward", name,
                    **asdict(time), peak_extra_bytes=measure.peak_bytes(call, device, inputs.forget),
                    ideal_bytes=workload.feature_bytes * PASSES[workload.stage][backward],
                    result_error=distance[0], gradient_error=distance[1],
                )
            )  # fmt: skip
    return rows


def table(rows: list[Row], copy_gb_per_s: float) -> str:
    """Rows with their time and memory relative to ours, workload by workload."""
    ours = {(r.workload, r.mode): r for r in rows if r.contender == "ours"}
    lines = []
    for (workload, mode), base in ours.items():
        lines.append(f"\n{workload}, {mode}")
        lines.append(
            f"  {'':24}{'ms':>10} {'quartiles':>21} {'x ours':>8} {'extra MiB':>10} {'x ours':>8}"
            f" {'GB/s':>7} {'% copy':>7} {'grad err':>9}"
        )
        for r in (r for r in rows if (r.workload, r.mode) == (workload, mode)):
            error = "-" if r.gradient_error is None else f"{r.gradient_error:.1e}"
            quartiles = f"{r.lower_ms:.3f} .. {r.upper_ms:.3f}"
            speed = r.ideal_bytes / r.median_ms / 1e6
            lines.append(
                f"  {r.contender:24}{r.median_ms:10.3f} {quartiles:>21} {r.median_ms / base.median_ms:8.1f}"
                f" {r.peak_extra_bytes / 2**20:10.1f} {r.peak_extra_bytes / max(base.peak_extra_bytes, 1):8.1f}"
                f" {speed:7.1f} {100 * speed / copy_gb_per_s:7.1f} {error:>9}"
            )
    return "\n".join(lines)


def selected(args: argparse.Namespace) -> Iterator[tuple[Workload, str | None, int | None]]:
    """Workloads to run, and for growth curves what grows and how far."""
    names = args.workloads or ([] if args.growth else ["fpn"])
    for stage in args.stage:
        for name, dtype, layout in itertools.product(names, args.dtype, args.layout):
            yield variant(WORKLOADS[name], batch=args.batch, dtype=dtype, layout=layout, stage=stage), None, None
        for curve, workloads in GROWTH.items() if args.growth else ():
            for size, workload in workloads.items():
                yield variant(workload, stage=stage, dtype=args.dtype[0]), curve, size


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; default fpn")
    parser.add_argument(
        "--stage", nargs="+", type=int, choices=PASSES, default=[2], help="1: tokens, 2: distillation (default)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="images, instead of the workload's")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=[None], help="instead of the workload's")
    parser.add_argument("--compile", action="store_true", help="also literal and plain under torch.compile")
    parser.add_argument("--growth", action="store_true", help="time and memory against pixels, channels, tokens and images")
    parser.add_argument("--seconds", type=float, default=3.0, help="timed per contender and mode")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--results", type=Path, help="take these results instead of measuring")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="PNG files: bandwidth bars, growth curves (extra viz)")
    args = parser.parse_args()
    if unknown := set(args.workloads) - WORKLOADS.keys():
        parser.error(f"workloads: expected some of {', '.join(WORKLOADS)}, got {', '.join(sorted(unknown))}")
    results = json.loads(args.results.read_text()) if args.results else run(args)
    if args.out:
        write(args.out, results)
    if args.plots:
        from . import plots

        for path in plots.draw(results, args.plots):
            print(f"drawn to {path}")
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what ``args`` select, and print it."""
    device = torch.device(args.device)
    copied = measure.copy_gb_per_s(device)
    print(f"copy: {copied:.1f} GB/s")
    rows: list[Row] = []
    for workload, curve, size in selected(args):
        found = bench(workload, device, args.seconds, args.compile, curve, size)
        print(table(found, copied), flush=True)
        rows += found
    left_out = {name: why for stage in args.stage for name, why in chosen(stage, device, args.compile)[1].items()}
    for contender, reason in left_out.items():
        print(f"\nleft out: {contender} ({reason})")
    about = environment.describe(device)
    return {**about, "copy_gb_per_s": copied, "left_out": left_out, "rows": [asdict(r) for r in rows]}


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    sys.exit(main())
