"""The study's runs: each job appends a line to the results file, and a study that was stopped goes on behind its last line."""

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import environment
from bench.measure import peak_bytes
from maskd_triton import MaskLearner
from maskd_triton.diagnostics import LevelDiagnostics, collapsed

from ..digits_data import SPLITS, Scenes, make_scenes
from ..digits_models import PyramidNet, make_student, make_teacher
from ..digits_tasks import Task
from ..digits_training import batches, distil, learn_tokens, on_device_of, teacher_features, train_teacher
from .losses import make_criterion, truth_masks
from .plan import ALONE, KINDS, TASKS, VARIANTS, Job, Settings, jobs, tokens_of

PACKAGES = ("torch", "triton", "numpy", "scikit-learn")
Line = dict[str, Any]


class Results:
    """A JSON-lines file: settings first, then a line per finished run, and one for each time that the study went on."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        wanted = json.loads(json.dumps(asdict(settings)))
        if path.exists():
            self.lines = read(path)
            found = self.lines[0].get("settings") if self.lines else None
            if found != wanted:
                raise ValueError(f"{path}: expected results of {wanted}, got those of {found}; give another --out")
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # without a line that was cut short
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.lines = []
            self.append({"what": "settings", "settings": wanted})
        self.done = {key(line): line for line in self.lines if is_run(line)}

    def append(self, line: Line) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)

    def add(self, job: Job, found: Line) -> None:
        line = job.as_dict() | found
        self.append(line)
        self.done[job.key] = line
        assert key(line) == job.key, "a result has the name of one of the job's fields"


def read(path: Path) -> list[Line]:
    """The lines of a results file; a last one that was cut short does not count.

    Raises:
        ValueError: another line is no JSON object.
    """
    text = path.read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}") from error
    return found


def is_run(line: Line) -> bool:
    return line["what"] not in ("settings", "session")


def key(line: Line) -> str:
    return Job(**{name: line[name] for name in Job.__dataclass_fields__ if name in line}).key


@dataclass(frozen=True)
class Cell:
    """A task and its scenes."""

    task: Task
    scenes: dict[str, Scenes]


class Study:
    """Runs jobs. Teachers and tokens are kept in ``folder``; those that are missing there are trained anew, alike."""

    def __init__(self, settings: Settings, results: Results, folder: Path) -> None:
        self.settings, self.results, self.folder = settings, results, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.cell = cache(self._cell)
        self.teacher = cache(self._teacher)
        self.learner = cache(self._learner)
        self.levels = cache(self._levels)

    def run(self, budget: float, say: Callable[[str], object] = print) -> bool:
        """Runs what is left of the plan until ``budget`` seconds are over; whether nothing is left."""
        start = time.perf_counter()
        plan = list(jobs(self.settings))
        left = [job for job in plan if job.key not in self.results.done]
        if left:
            self.results.append({"what": "session", **environment.describe(torch.device("cpu"), PACKAGES)})
        clock = Clock(plan, self.results.done)
        for i, job in enumerate(left):
            if time.perf_counter() - start > budget:
                say(f"stopped after {budget / 60:.0f} minutes with {len(left) - i} of {len(plan)} runs left")
                return False
            began = time.perf_counter()
            found = getattr(self, f"_run_{job.what}")(job)
            wall = time.perf_counter() - began
            self.results.add(job, found | {"wall_seconds": round(wall, 2)})
            clock.took(job, wall)
            number = len(plan) - len(left) + i + 1
            score = found.get("test", found.get("validation"))
            shown = "" if score is None else f" {score:.3f}"
            say(f"[{number}/{len(plan)}] {job}:{shown} ({wall:.1f} s; {clock.left(left[i + 1 :]) / 60:.0f} minutes left)")
        return True

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

    def _run_student(self, job: Job) -> Line:
        cell = self.cell(job.cell)
        weight = self.loss_weight(job.cell, job.variant)
        curve: list[tuple[int, float]] = []
        points = self.settings.points

        def watch(step: int, student: PyramidNet) -> None:
            if points * step // job.steps > points * (step - 1) // job.steps:
                curve.append((step, cell.task.metric(student, cell.scenes["validation"])))

        student, seconds = self._distil(job, weight, watch)
        extra = self._peak(job, weight)
        return {
            "loss_weight": weight,
            "test": cell.task.metric(student, cell.scenes["test"]),
            "curve": curve,
            "step_ms": round(1000 * seconds / job.steps, 2),
            "peak_extra_bytes": extra,
        }

    def loss_weight(self, cell: str, variant: str) -> float:
        """The one with the best mean over the tuning seeds on validation; the smallest of equals."""
        if variant == ALONE:
            return 0.0
        found: dict[float, list[float]] = {}
        for line in self.results.done.values():
            if line["what"] == "tuning" and (line["cell"], line["variant"]) == (cell, variant):
                found.setdefault(line["weight"], []).append(line["validation"])
        return max(sorted(found), key=lambda weight: statistics.mean(found[weight]))

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
        """Peak bytes of the distillation loss, forward and backward, of one batch; the same for every run of a variant."""
        criterion, levels = self.criterion(job, weight)
        if criterion is None or any(key_of_variant(line) == (job.cell, job.variant) for line in self.results.done.values()):
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


class Clock:
    """Guesses the time left from the runs so far: a step of each kind of run, or of any, if there is none yet."""

    def __init__(self, plan: Iterable[Job], done: dict[str, Line]) -> None:
        self.seconds: dict[str, list[float]] = {}
        for job in plan:
            if job.key in done:
                self.took(job, done[job.key]["wall_seconds"])

    def took(self, job: Job, seconds: float) -> None:
        self.seconds.setdefault(job.what, []).append(seconds / job.steps)

    def left(self, jobs: Iterable[Job]) -> float:
        means = {what: statistics.mean(values) for what, values in self.seconds.items()}
        return sum(job.steps * means.get(job.what, statistics.mean(means.values())) for job in jobs)


def key_of_variant(line: Line) -> tuple[str, str] | None:
    return (line["cell"], line["variant"]) if line["what"] == "student" else None


def _numbers(level: LevelDiagnostics) -> Line:
    shown = {name: value.tolist() for name, value in vars(level).items() if value is not None}
    return shown | {"collapsed": collapsed(level)}


def _save(module: nn.Module, path: Path) -> None:
    """A file is whole or not there."""
    part = path.with_suffix(".part")
    torch.save(module.state_dict(), part)
    part.replace(path)
