"""The study's runs: what a job does, and what it finds."""

import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.measure import peak_bytes
from maskd_triton import MaskLearner
from maskd_triton.diagnostics import LevelDiagnostics, collapsed

from ..digits_data import SPLITS, Scenes, make_scenes
from ..digits_models import PyramidNet, make_student, make_teacher
from ..digits_tasks import Task
from ..digits_training import batches, distil, learn_tokens, on_device_of, teacher_features, train_teacher
from .losses import make_criterion, truth_masks
from .plan import KINDS, TASKS, VARIANTS, Job, Settings, tokens_of
from .results import Line


@dataclass(frozen=True)
class Cell:
    """A task and its scenes."""

    task: Task
    scenes: dict[str, Scenes]


class Runner:
    """Runs jobs. Teachers and tokens are kept in ``folder``; those that are missing there are trained anew, alike."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.cell = cache(self._cell)
        self.teacher = cache(self._teacher)
        self.learner = cache(self._learner)
        self.levels = cache(self._levels)

    def run(self, job: Job, loss_weight: float, measure: bool) -> Line:
        """What a job finds, and its seconds.

        Args:
            job: of the plan.
            loss_weight: of a student.
            measure: a student's peak memory, too.
        """
        start = time.perf_counter()
        if job.what == "student":
            found = self._run_student(job, loss_weight, measure)
        elif job.what == "timing":
            found = self._run_timing(job, loss_weight)
        else:
            found = {"teacher": self._run_teacher, "tokens": self._run_tokens, "tuning": self._run_tuning}[job.what](job)
        return found | {"wall_seconds": round(time.perf_counter() - start, 2)}

    def _run_teacher(self, job: Job) -> Line:
        teacher = self.teacher(job.cell, job.teacher)
        cell = self.cell(job.cell)
        return {split: cell.task.metric(teacher, cell.scenes[split]) for split in ("validation", "test")}

    def _run_tokens(self, job: Job) -> Line:
        """Judged on the validation scenes."""
        cell, teacher = self.cell(job.cell), self.teacher(job.cell, job.teacher)
        learner = self.learner(job.cell, job.teacher, job.tokens)
        scenes = cell.scenes["validation"]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of collapsed masks: they are what is looked for here
            features = teacher.features(scenes.images)
            losses = {
                "task_loss": float(cell.task.loss(teacher.scores(learner(features)), scenes)),
                "unmasked_task_loss": float(cell.task.loss(teacher.scores(features), scenes)),
            }
            levels = learner.diagnostics().values()
        return losses | {"levels": [_numbers(level) for level in levels]}

    def _run_tuning(self, job: Job) -> Line:
        student, _ = self._distil(job, job.weight)
        cell = self.cell(job.cell)
        return {"validation": cell.task.metric(student, cell.scenes["validation"])}

    def _run_student(self, job: Job, weight: float, measure: bool) -> Line:
        cell = self.cell(job.cell)
        curve: list[tuple[int, float]] = []
        points = self.settings.points

        def watch(step: int, student: PyramidNet) -> None:
            if points * step // job.steps > points * (step - 1) // job.steps:
                curve.append((step, cell.task.metric(student, cell.scenes["validation"])))

        student, seconds = self._distil(job, weight, watch)
        return {
            "loss_weight": weight,
            "test": cell.task.metric(student, cell.scenes["test"]),
            "curve": curve,
            "step_ms": round(1000 * seconds / job.steps, 2),
            "peak_extra_bytes": self._peak(job, weight) if measure else None,
        }

    def _run_timing(self, job: Job, weight: float) -> Line:
        ends: list[float] = []
        self._distil(job, weight, lambda step, student: ends.append(time.perf_counter()))
        steps = [after - before for before, after in itertools.pairwise(ends)]
        return {"loss_weight": weight, "step_ms": round(1000 * statistics.median(steps), 2)}

    def criterion(self, job: Job, weight: float) -> tuple[nn.Module | None, list[Tensor]]:
        """A student's distillation loss, and what it gets besides the student's features."""
        variant = VARIANTS[job.variant]
        levels = self.levels(job.cell, job.teacher)
        learner = self.learner(job.cell, job.teacher, variant.tokens.name)
        criterion = make_criterion(variant, learner, make_student().neck_channels, weight, job.seed, job.steps)
        if variant.loss == "truth":
            levels = [*levels, *truth_masks(self.cell(job.cell).scenes["train"].labels, levels)]
        return criterion, levels

    def _distil(
        self, job: Job, weight: float, watch: Callable[[int, PyramidNet], object] = lambda step, student: None
    ) -> tuple[PyramidNet, float]:
        cell = self.cell(job.cell)
        criterion, levels = self.criterion(job, weight)
        return distil(cell.task, cell.scenes["train"], levels, criterion, job.seed, job.steps, watch)

    def _peak(self, job: Job, weight: float) -> int | None:
        """Peak bytes of the distillation loss, forward and backward, of one batch; None for a student alone."""
        criterion, levels = self.criterion(job, weight)
        if criterion is None:
            return None
        batch = next(batches(len(self.cell(job.cell).scenes["train"]), 1, 0))
        teacher = [level[batch] for level in levels]
        narrow = make_student().neck_channels
        student = [torch.randn(len(t), c, *t.shape[2:], requires_grad=True) for c, t in zip(narrow, teacher, strict=False)]
        leaves = [*student, *criterion.align.parameters()]

        def forget() -> None:
            for leaf in leaves:
                leaf.grad = None

        return peak_bytes(lambda: criterion(student, teacher).backward(), torch.device("cpu"), forget)

    def _cell(self, name: str) -> Cell:
        task, kind = name.split(", ")
        counts = zip(SPLITS, self.settings.scenes, strict=True)
        return Cell(TASKS[task], {split: make_scenes(split, count, kind=KINDS[kind]) for split, count in counts})

    def _teacher(self, cell: str, seed: int) -> PyramidNet:
        task, train = self.cell(cell).task, self.cell(cell).scenes["train"]
        path = self._file(f"{cell}, teacher {seed}")
        if path.exists():
            teacher = on_device_of(train, make_teacher(task.outputs, task.stride))
            teacher.load_state_dict(torch.load(path))
            return teacher.eval()
        teacher = train_teacher(train, self.settings.teacher_steps, lambda: None, seed, task)
        _save(teacher, path)
        return teacher

    def _learner(self, cell: str, seed: int, name: str) -> MaskLearner:
        teacher, tokens = self.teacher(cell, seed), tokens_of(self.settings, cell)[name]
        path = self._file(f"{cell}, teacher {seed}, {name}")
        if path.exists():
            learner = MaskLearner(teacher.neck_channels, tokens.count, tokens.weighted, standardize=tokens.standardize)
            learner.load_state_dict(torch.load(path))
            return learner
        learner, _ = learn_tokens(
            teacher,
            self.cell(cell).scenes["train"],
            self.settings.token_steps,
            lambda: None,
            tokens.standardize,
            seed,
            task=self.cell(cell).task,
            num_tokens=tokens.count,
            weight_mask=tokens.weighted,
            with_dice=tokens.dice,
        )
        _save(learner, path)
        return learner

    def _levels(self, cell: str, seed: int) -> list[Tensor]:
        return teacher_features(self.teacher(cell, seed), self.cell(cell).scenes["train"])

    def _file(self, name: str) -> Path:
        return self.folder / f"{name.replace(', ', '-').replace(' ', '_')}.pt"


def _numbers(level: LevelDiagnostics) -> Line:
    shown = {name: value.tolist() for name, value in vars(level).items() if value is not None}
    return shown | {"collapsed": collapsed(level)}


def _save(module: nn.Module, path: Path) -> None:
    """A file is whole or not there."""
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save(module.state_dict(), part)
    part.replace(path)
