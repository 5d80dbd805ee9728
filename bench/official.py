"""The authors' own loss beside ours, in CPU time: ``python -m bench.official FOLDER``, a clone of github.com/hunto/MasKD.

Their module is read from the clone and runs unchanged. Stand-ins take the place of what it imports: mmcv's loader of
checkpoints and mmrazor's registry. The time is CPU time of one thread, the least of several rounds in which contenders take
turns, so other programs on the machine disturb it little.
"""

import argparse
import importlib.util
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import contenders, environment
from .workloads import WORKLOADS, Inputs, make_inputs

FILE = "mmrazor/mmrazor/models/losses/maskd.py"


class _Registry:
    def register_module(self) -> Callable[[type], type]:
        return lambda cls: cls


def their_module(folder: Path) -> types.ModuleType:
    """Their file, imported."""
    if not (folder / FILE).is_file():
        sys.exit(f"{folder} holds no {FILE}: give a clone of github.com/hunto/MasKD")
    for name, known in (("mmcv.runner.checkpoint", {"_load_checkpoint": None}), ("official.builder", {"LOSSES": _Registry()})):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(known)
    spec = importlib.util.spec_from_file_location("official.losses.maskd", folder / FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def their_loss(folder: Path, x: Inputs) -> nn.Module:
    """Their loss with our tokens and mask weighting, its warm-up over."""
    loss = their_module(folder).MasKDLoss([t.shape[1] for t in x.teacher], len(x.tokens[0]), custom_mask_warmup=-1)
    with torch.no_grad():
        for level, tokens, weighting in zip(loss.mask_modules, x.tokens, x.weighting, strict=True):
            for parameter, value in zip(level.parameters(), (tokens, *weighting), strict=True):
                parameter.copy_(value)
    return loss


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a clone of github.com/hunto/MasKD")
    parser.add_argument("--workload", default="fpn", choices=[name for name, w in WORKLOADS.items() if w.stage == 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    inputs = make_inputs(WORKLOADS[args.workload], torch.device("cpu"))
    theirs = their_loss(args.folder, inputs)

    def official(frozen: bool) -> Tensor:
        theirs.requires_grad_(not frozen)
        return theirs(inputs.student, inputs.teacher)

    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: contenders.ours(inputs)[0],
        "official": lambda: official(frozen=False),
        "official, tokens frozen": lambda: official(frozen=True),
        "literal": lambda: contenders.literal(inputs)[0],
    }
    results: dict[str, list[Tensor]] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            inputs.forget()
            theirs.zero_grad()
            start = time.process_time()
            loss = call()
            loss.backward()
            times[name].append(1000 * (time.process_time() - start))
            results[name] = [loss.detach(), *(s.grad for s in inputs.student if s.grad is not None)]
    if args.out:
        milliseconds = {name: min(each) for name, each in times.items()}
        facts = {"workload": args.workload, "rounds": args.rounds, "milliseconds": milliseconds}
        args.out.write_text(json.dumps(facts | environment.describe(torch.device("cpu")), indent=1) + "\n")
    for name, each in times.items():
        pairs = zip(results[name], results["literal"], strict=True)
        error = max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)
        print(f"{name:24} {min(each):8.0f} ms {min(each) / min(times['ours']):6.1f} x ours, off from literal by {error:.0e}")


if __name__ == "__main__":
    main()
