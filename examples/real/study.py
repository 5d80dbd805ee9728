"""Runs the study of one task and writes a JSON line for every run. What is in the file already is not run again."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import environment
from maskd_triton import MaskLearner

from .losses import ALONE, LOSSES, Aligned, Masked, Tokens, make_criterion, tokens_of
from .models import STUDENT_WIDTH, Net
from .tasks import Task, objects_in
from .training import (
    SHARES,
    Tick,
    early_features,
    evaluate,
    features_of,
    learn_tokens,
    load_teacher,
    suggest,
    train_student,
    train_teacher,
)

PACKAGES = ("torch", "numpy", "pillow", "pycocotools")
TUNING_SEED = 100  # none of the seeds that are reported
WEIGHTS = [float(f"{m}e{e}") for e in range(-3, 6) for m in (1, 3)]  # candidates
FIRST = slice(WEIGHTS.index(10), WEIGHTS.index(300) + 1)  # these are tried; more follow while the best is at an end


@dataclass(frozen=True)
class Settings:
    teacher_steps: int = 700
    token_steps: int = 300
    student_steps: int = 300
    suggestion_steps: int = 50
    seeds: int = 4
    images: int | None = None  # of each split; None: all


QUICK = Settings(teacher_steps=4, token_steps=4, student_steps=2, suggestion_steps=2, seeds=2, images=16)

Line = dict[str, Any]


class Study:
    """The runs of a task; ``out`` gets teacher, tokens, the students of seed 0, and ``runs.jsonl``."""

    def __init__(self, task: Task, out: Path, settings: Settings, pretrained: bool = True) -> None:
        self.task, self.out, self.settings, self.pretrained = task, out, settings, pretrained
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / "runs.jsonl"
        self.lines = read_lines(self.file) if self.file.exists() else []
        self.described = False
        self.teacher = self._teacher()
        self.features = features_of(self.teacher.features, task.train.images)
        self.early = early_features(task, pretrained)
        self.learners: dict[Tokens, MaskLearner] = {}

    def run(self, losses: Sequence[str] = LOSSES) -> None:
        for loss in losses:
            weight = 0.0 if loss == ALONE else self.tune(loss)
            for seed in range(self.settings.seeds):
                self.student(loss, weight, seed, ("val", "test"))
            if loss != ALONE:
                self.suggestion(loss)

    def tune(self, loss: str) -> float:
        """The weight with the best score on val: of `FIRST`, and of further ones while the best is at an end."""
        tried = {w: self._tried(loss, w) for w in WEIGHTS[FIRST]}
        while True:
            best = best_weight(tried)
            beside = [w for w in WEIGHTS if w < min(tried)][-1:] if best == min(tried) else []
            beside += [w for w in WEIGHTS if w > max(tried)][:1] if best == max(tried) else []
            if not beside:
                return best
            tried |= {w: self._tried(loss, w) for w in beside}

    def _tried(self, loss: str, weight: float) -> float:
        return self.student(loss, weight, TUNING_SEED, ("val",))["val"][self.task.metric]

    def student(self, loss: str, weight: float, seed: int, splits: tuple[str, ...]) -> Line:
        key = {"run": "student", "loss": loss, "weight": weight, "seed": seed, "steps": self.settings.student_steps}
        found = self._found(key)
        return found or self._student(key, splits)

    def suggestion(self, loss: str) -> Line:
        """The weights that `suggest_loss_weight` names after a few steps with a weight of 1."""
        steps, seed = self.settings.suggestion_steps, TUNING_SEED
        key = {"run": "suggested weights", "loss": loss, "steps": steps, "shares": SHARES}
        found = self._found(key)
        if found:
            return found
        criterion = self._criterion(loss, 1.0, steps, seed)
        with progress(steps, f"{loss}, suggestion of a weight") as tick:
            student = train_student(self.task, self.early, self.features, criterion, steps, tick, seed, self.pretrained)
        suggested = suggest(self.task, self.early, self.features, criterion, student)
        return self._add(key | {name: float(f"{value:.3g}") for name, value in suggested.items()})

    def _criterion(self, loss: str, weight: float, steps: int, seed: int) -> Aligned | Masked:
        tokens = tokens_of(loss, self.task.name)
        return make_criterion(loss, self.learner(tokens), tokens, STUDENT_WIDTH, weight, steps, seed)

    def _student(self, key: Line, splits: tuple[str, ...]) -> Line:
        loss, seed, steps = key["loss"], key["seed"], key["steps"]
        criterion = None if loss == ALONE else self._criterion(loss, key["weight"], steps, seed)
        start = time.process_time()
        with progress(steps, f"{loss}, weight {key['weight']:g}, seed {seed}") as tick:
            student = train_student(self.task, self.early, self.features, criterion, steps, tick, seed, self.pretrained)
        seconds = time.process_time() - start
        if seed == 0:  # for pictures
            torch.save(student.state_dict(), student_file(self.out, loss))
        return self._add(key | {"cpu_seconds": round(seconds)} | self._scores(student, splits))

    def _teacher(self) -> Net:
        steps, path = self.settings.teacher_steps, self.out / "teacher.pt"
        key = {"run": "teacher", "steps": steps}
        if self._found(key) and path.exists():
            return load_teacher(self.task, path)
        start = time.process_time()
        with progress(steps, "teacher") as tick:
            teacher = train_teacher(self.task, steps, tick, self.pretrained)
        seconds = time.process_time() - start
        torch.save(teacher.state_dict(), path)
        self._add(key | {"cpu_seconds": round(seconds)} | self._scores(teacher, ("val", "test")))
        return teacher

    def learner(self, tokens: Tokens) -> MaskLearner:
        """From its file, or learned now."""
        if tokens not in self.learners:
            path, steps = self.out / f"tokens-{tokens.name.replace(' ', '-')}.pt", self.settings.token_steps
            key = {"run": "tokens", "tokens": tokens.name, "steps": steps}
            if self._found(key) and path.exists():
                self.learners[tokens] = MaskLearner(
                    self.teacher.width,
                    tokens.num_tokens,
                    tokens.weight_mask,
                    standardize=tokens.standardize,
                    pretrained=path,
                )
            else:
                self.learners[tokens] = self._learn(tokens, path, key)
        return self.learners[tokens]

    def _learn(self, tokens: Tokens, path: Path, key: Line) -> MaskLearner:
        start = time.process_time()
        with progress(key["steps"], f"tokens, {tokens.name}") as tick:
            learner = learn_tokens(self.task, self.teacher, self.features, tokens, key["steps"], tick)
        seconds = time.process_time() - start
        learner.save(path)
        val = features_of(self.teacher.features, self.task.val.images).float()
        with torch.no_grad():
            masked = self.task.loss(self.teacher.head(learner(val)), self.task.val.targets)
            plain = self.task.loss(self.teacher.head(val), self.task.val.targets)
        level = learner.diagnostics(objects=objects_in(self.task, self.task.val))[0]
        self._add(
            key
            | {"cpu_seconds": round(seconds), "task_loss": round(masked.item(), 4), "unmasked": round(plain.item(), 4)}
            | {"coverage": rounded(level.coverage), "dice": rounded((level.dice - level.dice.diag().diag()).max())}
            | {"weight": rounded(level.weight), "entropy": rounded(level.entropy)}
            | {"focus": rounded(level.focus), "emphasis": rounded(level.emphasis)}
        )
        return learner

    def _scores(self, net: Net, splits: tuple[str, ...]) -> dict[str, dict[str, float]]:
        scores = {split: evaluate(net, self.task, getattr(self.task, split)) for split in splits}
        return {split: {name: round(value, 4) for name, value in own.items()} for split, own in scores.items()}

    def _found(self, key: Line) -> Line | None:
        return next((line for line in self.lines if key.items() <= line.items()), None)

    def _add(self, line: Line) -> Line:
        """Also to the file, behind a line that says where this call runs."""
        new = [line] if self.described else [{"run": "call", **environment.describe(torch.device("cpu"), PACKAGES)}, line]
        self.described = True
        self.lines += new
        with self.file.open("a") as file:
            file.writelines(json.dumps(each) + "\n" for each in new)
        return line


def student_file(out: Path, loss: str) -> Path:
    return out / f"{loss.replace(' ', '-')}.pt"


def tried_weights(lines: Sequence[Line], metric: str) -> dict[str, dict[float, float]]:
    """Score on val at each weight that a loss was tried with, for every loss that has been."""
    tried: dict[str, dict[float, float]] = {}
    for line in lines:
        if line["run"] == "student" and line["seed"] == TUNING_SEED:
            tried.setdefault(line["loss"], {})[line["weight"]] = line["val"][metric]
    return tried


def best_weight(tried: dict[float, float]) -> float:
    return max(tried, key=lambda weight: tried[weight])


def read_lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rounded(values: Tensor | None) -> Any:
    return None if values is None else torch.round(values.double(), decimals=3).tolist()


@contextmanager
def progress(total: int, what: str) -> Iterator[Tick]:
    """A bar with the time left; in a log file it moves once a minute."""
    seconds = 0.2 if sys.stderr.isatty() else 60
    with tqdm(total=total, desc=f"  {what}", mininterval=seconds, leave=False) as bar:
        yield bar.update
