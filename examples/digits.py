"""MasKD from start to end on real images, without a GPU or a download: `python -m examples.digits`.

Trains a small teacher to segment handwritten digits on photographs, learns receptive tokens on it (stage 1),
distils a student with a sixteenth of its parameters (stage 2), and compares it with a student alone and with
plain feature MSE.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from bench import environment

from . import digits_report as report
from .digits_data import SPLITS, Scenes, make_scenes
from .digits_models import PyramidNet, make_student, make_teacher
from .digits_tasks import mean_iou, task_loss
from .digits_training import (
    VARIANTS,
    StudentRun,
    Study,
    learn_tokens,
    teacher_features,
    train_student,
    train_teacher,
)

# Best of TRIES on the validation split, the same tries for both losses: python -m examples.digits --tune
LOSS_WEIGHTS = {"student alone": 0.0, "plain feature MSE": 1.0, "MasKD": 1.0}
TRIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TUNING_SEEDS = (100, 101)  # none of the seeds that are reported


@dataclass(frozen=True)
class Settings:
    scenes: tuple[int, int, int] = (3000, 400, 600)  # train, validation, test
    teacher_steps: int = 300
    token_steps: int = 100
    student_steps: int = 250
    seeds: int = 3


QUICK = Settings(scenes=(1500, 200, 300), teacher_steps=250, token_steps=80, seeds=1)
STUDENT_STEP = 0.3  # of the time of a step of the teacher; one of stage 1 takes as long


def main(argv: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    args = parse_arguments(argv)
    settings = QUICK if args.quick else Settings()
    asked = {"student_steps": args.steps, "seeds": args.seeds}
    settings = replace(settings, **{name: value for name, value in asked.items() if value is not None})
    if not args.quick:
        print("A full run; --quick takes half the time, with one seed (make demo ARGS=--quick)")
    device = torch.device(args.device)
    scenes, teacher = teach(settings, device)
    study, stage1 = prepare(scenes, teacher, settings)
    if args.tune:
        tune(study, settings.student_steps)
        return

    section("4/4 Stage 2: students")
    runs = train_students(study, settings)
    splits = {"validation": study.validation, "test": study.test}
    teacher_miou = {split: mean_iou(study.teacher, scenes) for split, scenes in splits.items()}

    section("Result" + (" of a quick run: one seed shows no spread" if args.quick else ""))
    print(report.results_table(runs, teacher_miou["test"], settings.student_steps))
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        unmasked = task_loss(study.teacher(study.train.images[:400]), study.train.labels[:400]).item()
    report.plot_masks(args.out / "masks.png", study.learner, study.teacher, study.test)
    report.plot_students(args.out / "students.png", study.teacher, study.test, runs)
    report.plot_curves(args.out / "curves.png", stage1, unmasked, runs, teacher_miou["validation"])
    wall_time = time.perf_counter() - start
    results = {
        "wall_seconds": round(wall_time, 1),
        "settings": asdict(settings),
        "loss_weights": LOSS_WEIGHTS,
        "teacher_miou": teacher_miou,
        "stage1": stage1,
        **environment.describe(torch.device(args.device), report.PACKAGES),
    }
    report.write_results(args.out / "results.json", results, runs, study.learner.diagnostics())
    print(f"  {wall_time:.0f} s in all. Written to {args.out.resolve()}: students.png, masks.png, curves.png, results.json")


def teach(settings: Settings, device: torch.device) -> tuple[dict[str, Scenes], PyramidNet]:
    """Scenes of every split, and a trained teacher."""
    section("1/4 Scenes: scikit-learn's handwritten digits on its two photographs")
    scenes = {split: make_scenes(split, count).to(device) for split, count in zip(SPLITS, settings.scenes, strict=True)}
    sizes = ", ".join(f"{count} {split}" for split, count in zip(SPLITS, settings.scenes, strict=True))
    print(f"  {sizes}; no two of them share a digit or a column of a photograph")

    if device.type == "cpu":
        take_faster_threads(scenes["train"], settings)

    teacher_size, student_size = parameters(make_teacher()), parameters(make_student())
    section(f"2/4 Teacher: {teacher_size} parameters (the student has {student_size})")
    with progress(settings.teacher_steps, "teacher") as bar:
        teacher = train_teacher(scenes["train"], settings.teacher_steps, bar.update)
    print(f"  validation mIoU {mean_iou(teacher, scenes['validation']):.3f}")
    return scenes, teacher


def take_faster_threads(train: Scenes, settings: Settings) -> None:
    """One thread is the faster where other programs keep the cores busy: threads wait for each other."""
    seconds = {}
    for threads in {torch.get_num_threads(), 1}:
        torch.set_num_threads(threads)
        times: list[float] = []
        train_teacher(train, 4, lambda times=times: times.append(time.perf_counter()))
        seconds[threads] = (times[-1] - times[0]) / 3  # without the first step
    threads = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(threads)
    student_steps = settings.student_steps * settings.seeds * len(VARIANTS)
    steps = settings.teacher_steps + settings.token_steps + STUDENT_STEP * student_steps
    print(f"  {threads} of {max(seconds)} threads: about {steps * seconds[threads] / 60:.0f} minutes in all")


def prepare(scenes: dict[str, Scenes], teacher: PyramidNet, settings: Settings) -> tuple[Study, dict[str, list[float]]]:
    """The teacher's receptive tokens; the losses of stage 1."""
    train = scenes["train"]
    section("3/4 Stage 1: receptive tokens on the frozen teacher")
    with progress(settings.token_steps, "tokens") as bar:
        learner, stage1 = learn_tokens(teacher, train, settings.token_steps, bar.update)
    levels = teacher_features(teacher, train)
    with torch.no_grad():
        learner([level[:400] for level in levels])
    print(report.masks_table(learner.diagnostics()))  # warns of masks that are a plain MSE
    return Study(**scenes, teacher=teacher, levels=levels, learner=learner), stage1


def train_students(study: Study, settings: Settings) -> list[StudentRun]:
    runs = []
    with progress(settings.student_steps * settings.seeds * len(VARIANTS), "") as bar:
        for seed in range(settings.seeds):
            for variant in VARIANTS:
                bar.set_description(f"  {variant}, seed {seed}")
                weight = LOSS_WEIGHTS[variant]
                runs.append(train_student(study, variant, weight, seed, settings.student_steps, bar.update))
    return runs


def tune(study: Study, steps: int) -> None:
    """Validation mIoU of both distillation losses at every weight in TRIES."""
    section(f"Tuning: mean validation mIoU of seeds {TUNING_SEEDS}, {steps} steps")
    variants = VARIANTS[1:]
    found = {}
    with progress(steps * len(variants) * len(TRIES) * len(TUNING_SEEDS), "") as bar:
        for variant in variants:
            for weight in TRIES:
                bar.set_description(f"  {variant}, weight {weight:g}")
                tried = [train_student(study, variant, weight, s, steps, bar.update) for s in TUNING_SEEDS]
                found[variant, weight] = statistics.mean(run.curve[-1][1] for run in tried)
    for (variant, weight), miou in found.items():
        print(f"  {variant:20} weight {weight:5g}  {miou:.3f}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the results")
    parser.add_argument("--seeds", type=int, help="students per variant (default 3)")
    parser.add_argument("--steps", type=int, help="training steps per student (default 250)")
    parser.add_argument("--quick", action="store_true", help="one seed and a shorter stage 1: 2 minutes")
    parser.add_argument("--tune", action="store_true", help="only compare loss weights, on validation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def section(title: str) -> None:
    print(f"\n{title}", flush=True)


def progress(total: int, description: str) -> tqdm:
    """A bar with the time left; in a log file it moves every ten seconds only."""
    seconds = 0.2 if sys.stderr.isatty() else 10
    return tqdm(total=total, desc=f"  {description}", mininterval=seconds, leave=False)


def parameters(net: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in net.parameters()) / 1000:.0f}k"


if __name__ == "__main__":
    main()
