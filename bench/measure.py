"""Time and memory of one call on this device."""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would print into the table

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

Call = Callable[[], object]


@dataclass(frozen=True)
class Time:
    """Median and quartiles in milliseconds over ``runs`` timings."""

    median_ms: float
    lower_ms: float
    upper_ms: float
    runs: int


def time(call: Call, device: torch.device, seconds: float) -> Time:
    """CUDA: L2 flushed before every run (triton.testing). CPU: torch.utils.benchmark with this process's threads."""
    call()
    if device.type == "cuda":
        import triton.testing

        call()
        runs = triton.testing.do_bench(call, rep=int(1000 * seconds), return_mode="all")
    else:
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        runs = [1000 * t for t in timer.blocked_autorange(min_run_time=seconds).times]
        while len(runs) < 5:  # a call slower than `seconds` is run one at a time
            runs.append(1000 * timer.timeit(1).median)
    lower, median, upper = torch.tensor(runs, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    return Time(median, lower, upper, len(runs))


def copy_gb_per_s(device: torch.device, seconds: float = 0.5) -> float:
    """Bytes read and written a second by a copy too large for any cache: what no kernel that streams memory can exceed."""
    elements = 2**28 if device.type == "cuda" else 2**26
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / time(lambda: target.copy_(source), device, seconds).median_ms / 1e6


def peak_bytes(call: Call, device: torch.device, forget: Call = lambda: None) -> int:
    """The most that was allocated at a time during the call, beyond what was there before; the result counts.

    ``forget`` drops what a call leaves behind (gradients of leaves): to free that within the next call would count against it.
    """
    call()
    forget()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(accumulate(changes, initial=0))
