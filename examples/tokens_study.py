"""A teacher, the tokens learned on it in many ways, and what their masks are worth."""

import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from bench import environment
from maskd_triton import MaskedDistillLoss, MaskLearner, MaskModule
from maskd_triton.diagnostics import LevelDiagnostics, describe, verdict

from .digits_data import Scenes, make_scenes
from .digits_training import batches
from .optimising import adamw, take_step
from .tokens_report import read
from .tokens_teachers import Net, objects_of, student_of, teacher_of
from .tokens_ways import WAYS, Tokens

LR = {"segmenter": 3e-3, "detector": 3e-3, "vit": 1.5e-3}  # of the teachers
TOKEN_LR, STUDENT_LR = 1e-2, 2e-2
WEIGHT_DECAY = 0.01  # of teachers and students
TOKEN_BATCH = 16
LOSS_WEIGHT = 10.0


@dataclass(frozen=True)
class Settings:
    scenes: tuple[int, int, int] = (2000, 200, 400)  # train, validation, test
    teacher_scenes: int = 3000
    teacher_steps: tuple[int, int, int] = (500, 500, 1200)  # of each kind
    token_scenes: int = 800
    token_steps: int = 200
    student_steps: int = 200
    seeds: int = 4
    images: int | None = None  # of each split of the real tasks; None: all


QUICK = Settings((64, 16, 16), 64, (4, 4, 4), 32, 4, 2, 2, images=8)


class Journal:
    """A file of results, a line each, that is added to."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, read(path) if path.exists() else []
        self.described = False

    def once(self, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        if any(key.items() <= line.items() for line in self.lines):
            return
        if not self.described:
            self.described = True
            self._write({"run": "call", **environment.describe(torch.device("cpu"))})
        start = time.process_time()
        line = key | work()
        line["cpu_seconds"] = round(time.process_time() - start, 1)
        self._write(line)
        print(*key.values(), f"{line['cpu_seconds']} s", flush=True)

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Seen:
    """What a teacher makes of a split, and what is true there.

    Attributes:
        images: ``[n, 3, H, W]`` in [0, 1], some of them, for pictures.
        levels: the teacher's features of all images.
        targets: what its loss compares with.
        objects: ``[N, H, W]``, 1 inside of an object.
        classes: ``[N, h, w]`` by name, as shares of a cell, where there is more to tell than objects.
    """

    images: Tensor
    levels: list[Tensor]
    targets: Tensor
    objects: Tensor
    classes: dict[str, Tensor]


class Study:
    """A trained teacher, and the tokens that are learned from it."""

    def __init__(self, kind: str, teacher: Net, train: Seen, unseen: Seen, settings: Settings, out: Path) -> None:
        self.kind, self.teacher, self.train, self.unseen = kind, teacher, train, unseen
        self.settings, self.out, self.tokens = settings, out, dict[str, MaskLearner]()
        self.statistics = [mean_and_std(x) for x in train.levels]

    def learner(self, name: str) -> MaskLearner:
        """With tokens learned in the way of this name."""
        if name not in self.tokens:
            path = self.out / f"{self.kind}, {name.replace(':', ',')}.pt"
            way = WAYS[name]
            torch.manual_seed(way.seed)
            learner = MaskLearner(self.teacher.channels, way.num_tokens, way.weighted, standardize=way.standardize)
            if path.exists():
                learner.load_state_dict(torch.load(path, weights_only=True))
            else:
                self._learn(learner, way)
                torch.save(learner.state_dict(), path)
            self.tokens[name] = learner
        return self.tokens[name]

    @torch.enable_grad()
    def _learn(self, learner: MaskLearner, way: Tokens) -> None:
        levels = [x[: self.settings.token_scenes] for x in self.train.levels]
        if way.standardize:
            neck = nn.Identity()
            with learner.calibrate(neck, ""):
                neck([x.float() for x in levels])
        modules: list[MaskModule] = list(learner.mask_modules)  # type: ignore[arg-type]
        steps = self.settings.token_steps if way.steps is None else way.steps
        optimizer = optimizer_of(modules, way)
        schedule = schedule_of(optimizer, way, max(steps, 1))
        for batch in batches(len(levels[0]), steps, way.seed):
            part = batch[:TOKEN_BATCH]
            seen = [x[part].float() for x in levels]
            loss = self.teacher.loss(learner(seen), self.train.targets[part]) + learner.dice_loss()
            if way.balance:
                means = [m.weights(x).mean(0) for m, x in zip(modules, seen, strict=True)]
                loss = loss + way.balance * sum(way.num_tokens * mean.square().sum() - 1 for mean in means)
            take_step(loss, optimizer, schedule)

    @torch.no_grad()
    def judge(self, name: str) -> dict[str, Any]:
        """The tokens on scenes that no training saw."""
        learner, levels = self.learner(name), [x.float() for x in self.unseen.levels]
        masked: Any = learner(levels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of useless tokens: they are what is looked for
            found = learner.diagnostics(objects=self.unseen.objects)
        masks: Any = [m.masks(x) for m, x in zip(learner.mask_modules, levels, strict=True)]
        standardized = bool(learner.standardize)
        return {
            "unmasked": float(self.teacher.loss(levels, self.unseen.targets)),
            "masked": float(self.teacher.loss(masked, self.unseen.targets)),
            "levels": [
                figures(level)
                | {"verdict": verdict(level, standardized=standardized)}
                | truth(m, self.unseen.objects, self.unseen.classes)
                for level, m in zip(found.values(), masks, strict=True)
            ],
        }

    @torch.no_grad()
    def describe(self, name: str) -> dict[str, Any]:
        """Masks without tokens on the same scenes."""
        masks, weights = self.masks(name, self.unseen)
        pairs = zip(masks, weights or [None] * len(masks), strict=True)
        return {"levels": [figures(describe(m, w, objects=self.unseen.objects)) for m, w in pairs]}

    @torch.no_grad()
    def masks(self, name: str, seen: Seen) -> tuple[list[Tensor], list[Tensor] | None]:
        """Masks ``[N, T, h, w]`` and mask weights ``[N, T]``, level by level."""
        if name == "feature MSE":
            return [torch.ones_like(x[:, :1]) for x in seen.levels], None
        if name == "true boxes":
            return [adaptive_avg_pool2d(seen.objects.float()[:, None], x.shape[2:]) for x in seen.levels], None
        if name == "random masks":
            random = torch.Generator().manual_seed(0)
            directions = [2 * torch.randn(6, x.shape[1], generator=random) / x.shape[1] ** 0.5 for x in seen.levels]
            pairs = zip(directions, self.standardized(seen), strict=True)
            return [torch.einsum("tc,nchw->nthw", e, x).sigmoid() for e, x in pairs], None
        learner = self.learner(name)
        pairs: Any = [(m, x.float()) for m, x in zip(learner.mask_modules, seen.levels, strict=True)]
        return [m.masks(x) for m, x in pairs], [m.weights(x) for m, x in pairs] if learner.weight_mask else None

    def standardized(self, seen: Seen) -> list[Tensor]:
        return [(x.float() - mean) / std for x, (mean, std) in zip(seen.levels, self.statistics, strict=True)]


class Students(Study):
    """A study on the demo's scenes, where students are trained, too."""

    def __init__(self, kind: str, settings: Settings, out: Path, journal: Journal) -> None:
        self.scenes, self.validation, self.test = (
            make_scenes(split, count) for split, count in zip(("train", "validation", "test"), settings.scenes, strict=True)
        )
        teacher, path = teacher_of(kind), out / f"{kind}.pt"
        journal.once({"run": "teacher", "teacher": kind}, lambda: self._teach(teacher, kind, settings, path))
        teacher.load_state_dict(torch.load(path, weights_only=True))
        teacher.eval().requires_grad_(False)
        seen = (seen_by(teacher, scenes) for scenes in (self.scenes, self.validation))
        super().__init__(kind, teacher, *seen, settings, out)
        self.target = self.standardized(self.train)

    def _teach(self, teacher: Net, kind: str, settings: Settings, path: Path) -> dict[str, Any]:
        torch.manual_seed(0)
        net = teacher_of(kind).to(memory_format=torch.channels_last)
        if path.exists():
            net.load_state_dict(torch.load(path, weights_only=True))
        else:
            steps = dict(zip(LR, settings.teacher_steps, strict=True))[kind]
            fit(net, make_scenes("train", settings.teacher_scenes), LR[kind], steps, seed=0)
        torch.save(net.state_dict(), path)
        return {"metric": teacher.metric, "test": net.score(self.test)}

    def score(self, name: str, seed: int) -> dict[str, Any]:
        """Of a student that reconstructs standardised features under these masks."""
        name, _, times = name.partition(" x ")
        torch.manual_seed(seed)
        student = student_of(self.kind).to(memory_format=torch.channels_last)
        extra = None
        if name != "alone":
            torch.manual_seed(seed)
            criterion = MaskedDistillLoss(
                self.teacher.channels,
                num_tokens=None,
                student_channels=student.channels,
                loss_weight=LOSS_WEIGHT * float(times or 1),
            )
            masks, weights = self.masks(name, self.train)

            def distill(levels: list[Tensor], batch: Tensor) -> Tensor:
                target, m = ([x[batch] for x in xs] for xs in (self.target, masks))
                return criterion(levels, target, masks=m, mask_weights=weights and [w[batch] for w in weights])

            extra = criterion, distill
        fit(student, self.scenes, STUDENT_LR, self.settings.student_steps, seed, extra)
        scores = {split: student.score(scenes) for split, scenes in (("validation", self.validation), ("test", self.test))}
        return {"metric": student.metric, **scores}


Extra = tuple[nn.Module, Callable[[list[Tensor], Tensor], Tensor]]


def fit(net: Net, scenes: Scenes, lr: float, steps: int, seed: int, extra: Extra | None = None) -> None:
    """Trains a net, beside its task with a loss of its levels."""
    parameters = [*net.parameters(), *(extra[0].parameters() if extra else ())]
    optimizer, schedule = adamw(parameters, lr, WEIGHT_DECAY, steps)
    for batch in batches(len(scenes), steps, seed):
        some = scenes[batch]
        levels = net.features(some.images)
        loss = net.loss(levels, some.labels)
        if extra:
            loss = loss + extra[1](levels, batch)
        take_step(loss, optimizer, schedule)


@torch.no_grad()
def seen_by(teacher: Net, scenes: Scenes) -> Seen:
    parts = [teacher.features(images) for images in scenes.images.split(200)]
    levels = [torch.cat(level) for level in zip(*parts, strict=True)]
    return Seen(scenes.images[:4] / 2 + 0.5, levels, scenes.labels, objects_of(scenes.labels), {})


def mean_and_std(level: Tensor) -> tuple[Tensor, Tensor]:
    return level.float().mean((0, 2, 3), keepdim=True), level.float().std((0, 2, 3), keepdim=True)


def optimizer_of(modules: Sequence[MaskModule], way: Tokens) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": [m.mask_token for m in modules]}]
    if not way.decay_tokens:
        groups[0]["weight_decay"] = 0.0
    for module in modules if way.weighted else ():
        w3, b3, w1, b1 = module.weighting()
        with torch.no_grad():
            w1 *= way.scale
        for p, inputs in ((w3, 9 * module.channels), (b3, 1), (w1, module.channels), (b1, 1)):
            groups.append({"params": [p]} | ({"lr": TOKEN_LR / inputs} if way.slow else {}))
    if way.sgd:
        return torch.optim.SGD(groups, 0.1, momentum=0.9, weight_decay=way.weight_decay)
    return torch.optim.Adam(groups, TOKEN_LR, weight_decay=way.weight_decay)


def schedule_of(optimizer: torch.optim.Optimizer, way: Tokens, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    if way.poly:
        return torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)


def figures(level: LevelDiagnostics) -> dict[str, Any]:
    return {name: value.tolist() for name, value in vars(level).items() if value is not None}


def truth(masks: Tensor, objects: Tensor, classes: dict[str, Tensor]) -> dict[str, Any]:
    """How well the best of the masks ``[N, T, h, w]`` fits what is there."""
    on = masks > 0.5
    inside = adaptive_avg_pool2d(objects.float()[:, None], masks.shape[2:])[:, 0] > 0.5
    found: dict[str, Any] = {"iou_boxes": best_iou(on, inside), "iou_background": best_iou(on, ~inside)}
    if classes:
        found["iou_classes"] = {name: best_iou(on, share > 0.5) for name, share in classes.items()}
    return found


def best_iou(masks: Tensor, region: Tensor) -> float:
    """Over all scenes, of the token that fits best; masks ``[N, T, h, w]`` and a region ``[N, h, w]``, both bool."""
    both, either = (x.sum((0, 2, 3)) for x in (masks & region[:, None], masks | region[:, None]))
    return float((both / either.clamp(min=1)).max())
