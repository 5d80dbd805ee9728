"""Does it help? Masked distillation against what one would do anyway: `python -m examples.study`.

Two tasks on dense and sparse scenes, two teachers, four student seeds, three schedules. Every finished run is appended to the
results file at once; the same command goes on where a study was stopped. At most 150 minutes on 2 cores.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import report
from .plan import QUICK, Settings
from .results import Results
from .runs import Runner
from .schedule import Study

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "bench/results/cpu-study.jsonl", ROOT / "docs/study.md"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    settings = QUICK if args.quick else Settings()
    out = args.out or (RESULTS if args.page else Path("study_output") / ("quick.jsonl" if args.quick else "study.jsonl"))
    try:
        results = Results(out, settings)
    except ValueError as error:
        sys.exit(str(error))
    folder = out.with_suffix("")
    if args.page:
        report.write(results, Runner(settings, folder), RESULTS.parent, PAGE)
        return
    torch.set_num_threads(max(torch.get_num_threads() // args.workers, 1))
    study = Study(settings, results, folder, args.workers)
    complete = study.run(60 * args.budget, lambda line: print(line, flush=True))
    print(f"{'Complete' if complete else 'The same command goes on'}: {out.resolve()}")
    if args.quick:
        print("A smoke run: its figures mean nothing.")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.study", description=__doc__)
    parser.add_argument("--out", type=Path, help="results file (default study_output/study.jsonl)")
    parser.add_argument("--budget", type=float, default=150, metavar="MINUTES", help="starts no run after that (default 150)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes, which share the cores (default 2)")
    parser.add_argument("--page", action="store_true", help="only write docs/study.md, of the committed results or of --out")
    parser.add_argument("--quick", action="store_true", help="smoke run, under 4 minutes; its figures mean nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
