"""Which launch configurations the counts favour, and where today's defaults stand: ``python -m bench.defaults``.

Every candidate of `autotune.candidates` is compiled, and run in the emulator of ``tests/ptx``, where nothing is timed. Four
times are modelled, in units of the time in which the memory moves the feature maps once (`bench.counts`):

* *memory*: all bytes that a launch touches, each once. What it asks for again is taken to come from L2.
* *instructions* and *shared*: as `bench.counts` has them.
* *occupancy*: the memory's time, times the bytes of loads that a multiprocessor must have in flight to keep the memory busy
  (Little's law), by those that its resident programs have: each loads one feature tile, or as many as its pipeline holds
  beside the one that is computed on.

The modelled time of a candidate is the largest of the four. Among those within 2% of the best, that with the smallest sum of
the other three is chosen. A candidate that spills registers, loads features fewer than 16 bytes at a time, or needs more
shared memory than there is, is out. What is not modelled: the latency of instructions, how well the four overlap (a program
that computes on its only tile loads nothing meanwhile), the bandwidth of L2, the last wave of a grid.

The workload is that of `bench.counts`: one level of 64x128, 256 channels, mask weights, customised masks. Maps of 4 and 8 rows
are run. Both have the same programs on their borders, so what the four rows cost in between gives the other 56. Kernels
without such programs run on 8 rows. What cannot be chosen is not run: candidates whose occupancy makes them worse than the
default and the best so far, and deeper pipelines where loads in flight do not decide.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.errors import OutOfResources

from maskd_triton.kernels import autotune, launch, tuning
from maskd_triton.kernels.tuning import Config, Key
from tests.ptx.counts import BYTES, WARP_INSTRUCTIONS, WAVEFRONTS
from tests.ptx.driver import assembled

from . import counts, environment, inspect

READS = {"forward_kernel": 2, "backward_kernel": 2, "mask_kernel": 1, "gate_kernel": 1, "token_gradient_kernel": 2}
"""Feature tiles that a program loads at once."""
MOVES = {name.partition(".")[2]: maps for name, maps in counts.MAPS.items()}
BANDWIDTH = {80: 2.04e12, 90: 3.35e12}  # bytes a second: data sheets of A100 80GB SXM and H100 SXM
MULTIPROCESSORS = {80: 108, 90: 132}  # the same data sheets
LATENCY = 0.65e-6  # seconds that a load takes while the memory is busy: an assumption, for both
TIE = 1.02  # modelled times this close are equal
MARGIN = 1.05  # a default is kept where no candidate is modelled faster than this
CHANNELS, HEIGHT, WIDTH = 256, 64, 128
ROWS = {**dict.fromkeys(READS, (0, 8)), "forward_kernel": (4, 8), "mask_kernel": (4, 8)}
"""Heights that are run; no border, no cost of a map without rows."""


@dataclass(frozen=True)
class Figures:
    """Modelled times of one candidate."""

    memory: float
    instructions: float
    shared: float
    occupancy: float

    @property
    def time(self) -> float:
        """The largest of the four."""
        return max(asdict(self).values())

    @property
    def others(self) -> float:
        """The sum of the other three."""
        return sum(asdict(self).values()) - self.time


@dataclass(frozen=True)
class Candidate:
    """A configuration with its figures, or with the reasons why it is out or was not run."""

    config: Config
    figures: Figures | None
    registers: int = 0
    in_flight: int = 0  # bytes of loads on a multiprocessor
    asked: float = 0.0  # bytes asked by byte of the feature maps
    reasons: tuple[str, ...] = ()


def ranked(candidates: Sequence[Candidate]) -> list[tuple[Candidate, Figures]]:
    """Those that are not out, the chosen one first: ties of the best by the sum of the others, then all others by time."""
    left = [(candidate, candidate.figures) for candidate in candidates if candidate.figures]
    best = min((figures.time for _, figures in left), default=0.0)

    def order(entry: tuple[Candidate, Figures]) -> tuple[bool, float]:
        figures = entry[1]
        return (False, figures.others) if figures.time <= TIE * best else (True, figures.time)

    return sorted(left, key=order)


def needed(kernel: str, arch: int) -> float:
    """Bytes of loads that a multiprocessor needs in flight, by Little's law; what a kernel writes waits for nothing."""
    loads = READS[kernel] / MOVES[kernel]
    return LATENCY * BANDWIDTH[arch] / MULTIPROCESSORS[arch] * loads


def in_flight(kernel: str, config: Config, itemsize: int, programs: int) -> int:
    """Bytes of features that ``programs`` resident programs load at once; of its stages a pipeline computes on one."""
    return programs * READS[kernel] * config.block_c * config.block_p * itemsize * max(1, config.num_stages - 1)


TOO_FEW = ("too few loads in flight",)
ENOUGH = ("loads in flight do not decide with fewer stages",)


class _Out(Exception):
    """A candidate that need not be run."""


def judge(key: Key, arch: int, dtype: str, config: Config, hopeless: float = float("inf")) -> Candidate:
    """Compile one candidate and, unless it is out or its occupancy alone takes longer than ``hopeless``, run it."""
    itemsize = counts.DTYPES[dtype].itemsize
    case = inspect.Case(dtype, key.layout, channels=CHANNELS, tokens=_tokens(key), sizes=((HEIGHT, WIDTH),))
    fact, wanted = None, needed(key.kernel, arch)
    loading = 0

    def run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        nonlocal fact, loading
        if inspect.kernel_name(kernel) != key.kernel:
            return
        binary = kernel.run(*arguments, grid=(programs,), warmup=True, enable_fp_fusion=True, **constants)
        if fact is None:
            fact = _facts(key.kernel, binary, arch, config)
            if problems := inspect.problems(case, fact):
                raise _Out(*problems)
            resident = round(fact.occupancy * 64 / binary.metadata.num_warps)
            loading = in_flight(key.kernel, config, itemsize, resident)
            if not loading or wanted / loading > hopeless:
                raise _Out(*TOO_FEW)
        launch_all(kernel, programs, *arguments, **constants)

    launch_all = launch.run
    try:
        with tuning.forced(key.kernel, config), mock.patch.object(launch, "run", run):
            low, high = ROWS[key.kernel]
            small, large = (_count(key, arch, dtype, height) for height in (low, high))
    except (_Out, OutOfResources) as error:
        reasons = error.args if isinstance(error, _Out) else (str(error),)
        return Candidate(config, None, fact.registers if fact else 0, loading, reasons=tuple(map(str, reasons)))
    assert fact is not None
    moved = MOVES[key.kernel] * CHANNELS * HEIGHT * WIDTH * itemsize
    whole = small + (large - small) * (HEIGHT - low) / (high - low)
    touched, asked, instructions, wavefronts = (whole / moved).tolist()
    figures = Figures(
        touched, instructions * BYTES / WARP_INSTRUCTIONS, wavefronts * BYTES / WAVEFRONTS, touched * wanted / loading
    )
    return Candidate(config, figures, fact.registers, loading, asked)


def _tokens(key: Key) -> int:
    """As many as `bench.counts` takes where they are padded to the same rows."""
    return 6 if key.tokens == 8 else key.tokens


def _count(key: Key, arch: int, dtype: str, height: int) -> np.ndarray:
    """Bytes touched and asked, instructions, wavefronts of the key's kernel on a map of ``height`` rows."""
    if not height:
        return np.zeros(4)
    case = counts.Case(f"sm_{arch}", dtype, key.layout, channels=CHANNELS, tokens=_tokens(key), size=(height, WIDTH))
    (found,) = counts.launches(case)
    return np.array([found.footprint, found.asked.total(), found.instructions, found.shared.total()], float)


def _facts(name: str, binary: Any, arch: int, config: Config) -> inspect.Facts:
    """Of a kernel that was compiled for the emulator, whose binary is its PTX."""
    ptx = binary.asm["ptx"]
    options = CUDABackend(binary.metadata.target).parse_options(binary.metadata._asdict())
    real = SimpleNamespace(metadata=binary.metadata, asm={"ptx": ptx, "cubin": assembled(ptx, arch, options)})
    return inspect.facts(name, inspect.Compiled(real, config.block_c * config.block_p / config.threads))


@dataclass(frozen=True)
class Result:
    """All candidates of a key."""

    arch: int
    dtype: str
    key: Key
    candidates: list[Candidate]

    @property
    def default(self) -> Candidate:
        return self.candidates[0]

    @property
    def order(self) -> list[tuple[Candidate, Figures]]:
        return ranked(self.candidates)

    @property
    def rank(self) -> int | None:
        """The default's place among those that are not out."""
        places = [i for i, (candidate, _) in enumerate(self.order, 1) if candidate is self.default]
        return places[0] if places else None

    @property
    def gain(self) -> float | None:
        """The default's modelled time by that of the chosen one; None if the default is out."""
        return self.default.figures.time / self.order[0][1].time if self.default.figures else None

    def __str__(self) -> str:
        best, figures = self.order[0]
        verdict = "the default is out" if not self.gain else "keep" if self.gain <= MARGIN else f"{self.gain:.2f} x"
        lines = [f"sm_{self.arch} {self.dtype} {self.key.layout} {self.key.tokens} {self.key.kernel}: {verdict}"]
        lines.append(f"  chosen  {_words(best.config, figures)}")
        rank = f"rank {self.rank} of {len(self.order)}"
        today = self.default
        lines.append(
            f"  default {_words(today.config, today.figures)} {rank}" if today.figures else f"  default {today.reasons}"
        )
        return "\n".join(lines)

    def row(self) -> dict[str, Any]:
        """As JSON takes it, in digits that a count is worth."""
        best = self.order[0][0]
        return {
            **{"arch": f"sm_{self.arch}", "dtype": self.dtype, **self.key._asdict()},
            **{"chosen": self.candidates.index(best), "rank": self.rank, "gain": self.gain and round(self.gain, 3)},
            "candidates": [_row(candidate) for candidate in self.candidates],
        }


def _words(config: Config, figures: Figures) -> str:
    numbers = " ".join(f"{name} {value:.2f}" for name, value in asdict(figures).items())
    return f"{shown(config):32s} {numbers}"


def shown(config: Config) -> str:
    """A configuration in a table."""
    stages = f", {config.num_stages} stages" if config.num_stages > 1 else ""
    return f"{config.block_c}x{config.block_p}, {config.threads} threads{stages}"


def _row(candidate: Candidate) -> dict[str, Any]:
    figures = {name: round(value, 3) for name, value in asdict(candidate.figures).items()} if candidate.figures else {}
    facts = {"registers": candidate.registers, "in_flight": candidate.in_flight, "asked": round(candidate.asked, 3)}
    return {"config": asdict(candidate.config), **figures, **facts, "reasons": list(candidate.reasons)}


def search(arch: int, dtype: str, key: Key, configs: Sequence[Config]) -> Result:
    """Judge the candidates of a key, of which the first is the default."""
    found: dict[Config, Candidate] = {}
    for config in configs:
        shallower = found.get(replace(config, num_stages=config.num_stages - 1))
        if shallower and not _pipelined(shallower, key.bits):
            found[config] = Candidate(config, None, reasons=ENOUGH)
            continue
        today = next(iter(found.values())).figures if found else None
        best = min((candidate.figures.time for candidate in found.values() if candidate.figures), default=0.0)
        found[config] = judge(key, arch, dtype, config, max(today.time, MARGIN * best) if today else float("inf"))
    return Result(arch, dtype, key, list(found.values()))


def _pipelined(candidate: Candidate, bits: int) -> bool:
    """Whether one stage more may help: this is out, loads in flight decide, or the features are float32, whose products read
    shared memory in any case, and not pipelined yet."""
    if candidate.figures is None:
        return candidate.reasons != ENOUGH
    decides = candidate.figures.occupancy == candidate.figures.time
    return decides or (bits == 32 and candidate.config.num_stages == 1)


def keys(args: argparse.Namespace) -> Iterator[tuple[int, str, Key]]:
    """What the command is asked for."""
    for dtype, arch, layout, tokens, kernel in itertools.product(args.dtype, args.arch, args.layout, args.tokens, args.kernel):
        bits = 8 * counts.DTYPES[dtype].itemsize
        yield arch, dtype, Key(kernel, bits, layout, CHANNELS, tokens, (HEIGHT * WIDTH - 1).bit_length())


def about() -> dict[str, Any]:
    """Where and with what the results were made, and what the model takes for granted."""
    bytes_in_flight = {f"sm_{arch}": round(LATENCY * BANDWIDTH[arch] / MULTIPROCESSORS[arch]) for arch in BANDWIDTH}
    constants = {"latency_s": LATENCY, "bytes_in_flight": bytes_in_flight, "tie": TIE, "margin": MARGIN}
    return environment.describe(torch.device("cpu")) | {"model": constants}


def write(path: Path, head: dict[str, Any], results: Sequence[Result]) -> None:
    """A key a line."""
    rows = ",\n".join(json.dumps(result.row()) for result in results)
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{rows}\n]}}\n')


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", type=int, choices=BANDWIDTH, default=(90, 80))
    parser.add_argument("--dtype", nargs="+", choices=counts.DTYPES, default=("bf16", "fp16", "fp32"))
    parser.add_argument("--layout", nargs="+", choices=counts.LAYOUTS, default=("nchw", "nhwc"))
    parser.add_argument("--kernel", nargs="+", choices=READS, default=tuple(READS))
    parser.add_argument(
        "--tokens", nargs="+", type=int, choices=(8, 16, 32, 64), default=(8,), help="rows that they are padded to"
    )
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every key")
    args = parser.parse_args(arguments)
    head = about()
    results: list[Result] = []
    for arch, dtype, key in keys(args):
        results.append(search(arch, dtype, key, autotune.candidates(key)))
        print(results[-1], flush=True)
        if args.out:
            write(args.out, head, results)


if __name__ == "__main__":
    main()
