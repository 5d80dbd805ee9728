"""Variants of stage 2's backward pass against the plain one, on a GPU: ``python -m bench.variants``.

Forward and backward pass of ``fpn`` with 2 and 16 images, both layouts, with the tile that is configured and every choice of
`autotune.variants`. Each is timed eagerly, with L2 flushed before the forward pass, and replayed as a CUDA graph, which leaves
the host out. `maskd_triton.kernels.autotune` makes the same choice for its own keys.
Without a GPU it says so and exits with 2.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from maskd_triton._records import DistillOptions, DistillTables
from maskd_triton.kernels import autotune, tuning
from maskd_triton.kernels.launch import addressable

from . import environment, measure
from .workloads import DTYPES, LAYOUTS, WORKLOADS, Workload, make_inputs, variant

BACKWARD = "backward_kernel"


def rows(workload: Workload, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of every variant, eager and as a graph."""
    inputs = make_inputs(workload, device)
    tables = DistillTables(inputs.tokens, *zip(*inputs.composed, strict=True))
    tables = DistillTables(*([x.detach() for x in field] for field in tables))
    options = DistillOptions(tables, custom_mask=workload.custom_mask)
    student, teacher = ([x.detach() for x in each] for each in (inputs.student, inputs.teacher))
    fast = 1 if workload.layout == "channels_last" else 0
    bits = 8 * student[0].dtype.itemsize
    plain = tuning.config(BACKWARD, [addressable(x) for x in student], bits, fast, workload.tokens)
    found = []
    for config in autotune.variants(replace(plain, reverse=False, hints=False, keep=False, with_loss=False)):
        with tuning.forced(BACKWARD, config):
            eager = measure.time(lambda: autotune.step(student, teacher, options), device, seconds)
            graph = measure.time(captured(lambda: autotune.step(student, teacher, options)), device, seconds)
        row = {"workload": str(workload), "config": asdict(config), "ms": eager.median_ms, "graph_ms": graph.median_ms}
        found.append(row)
        on = [name for name in ("reverse", "hints", "keep", "with_loss") if row["config"][name]]
        print(f"{workload}: {' '.join(on) or 'plain':24s} {eager.median_ms:.4f} ms, graph {graph.median_ms:.4f} ms", flush=True)
    return found


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Replays ``call`` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.variants", description=__doc__)
    parser.add_argument("--batch", nargs="+", type=int, default=[2, 16])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--seconds", type=float, default=0.1, help="of timing, for each figure")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.variants: torch sees no GPU here, so there is nothing to measure; nothing was run")
        return 2
    device = torch.device("cuda")
    found = []
    for batch, dtype, layout in itertools.product(args.batch, args.dtype, args.layout):
        found += rows(variant(WORKLOADS["fpn"], batch=batch, dtype=dtype, layout=layout), device, args.seconds)
    if args.out:
        args.out.write_text(json.dumps(environment.describe(device) | {"rows": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
