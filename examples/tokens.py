"""What makes receptive tokens of use to a student? `python -m examples.tokens [--quick]`

Learns tokens on three teachers in many ways, looks at their masks, and trains students with them, all on the demo's scenes.
Every result is a line of runs.jsonl; a second call goes on where the first was stopped. docs/tokens.md has what came out.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from bench import environment
from maskd_triton import MaskedDistillLoss, MaskLearner, MaskModule
from maskd_triton.diagnostics import LevelDiagnostics, verdict

from . import tokens_report as report
from .digits_data import Scenes, make_scenes
from .digits_training import batches
from .tokens_teachers import Net, objects_of, student_of, teacher_of

LR = {"segmenter": 3e-3, "detector": 3e-3, "vit": 1.5e-3}  # of the teachers
TOKEN_LR, STUDENT_LR = 1e-2, 2e-2
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


QUICK = Settings((64, 16, 16), 64, (4, 4, 4), 32, 4, 2, 2)


@dataclass(frozen=True)
class Tokens:
    """One way to stage 1. The defaults are the published settings for detectors.

    Attributes:
        slow: a rate of the weighting module divided by each layer's number of inputs.
        scale: of the weighting's last layer at the start.
        balance: factor of ``T sum_t mean_n(w_nt)^2 - 1``, a balance of the mean weights as in routers of experts.
        decay_tokens: False: weight decay on the weighting alone.
        steps: None: those of the settings; 0: as initialised.
    """

    standardize: bool | str = False
    num_tokens: int = 6
    weighted: bool = True
    weight_decay: float = 1e-3
    decay_tokens: bool = True
    slow: bool = False
    scale: float = 1.0
    balance: float = 0.0
    sgd: bool = False
    steps: int | None = None


def ways(standardize: bool | str, every: bool = True) -> dict[str, Tokens]:
    """The ways for one kind of features; ``every=False`` leaves those out that change the weighting little."""
    found = {
        "untrained": Tokens(standardize, steps=0),
        "after one step": Tokens(standardize, steps=1),
        "as published": Tokens(standardize),
        "weight decay 0.1": Tokens(standardize, weight_decay=0.1),
        "weighting slower": Tokens(standardize, slow=True),
        "balanced weights": Tokens(standardize, balance=1.0),
        "unweighted": Tokens(standardize, weighted=False),
        "one token": Tokens(standardize, num_tokens=1),
    }
    if every:
        found |= {
            "weight decay 0.01": Tokens(standardize, weight_decay=1e-2),
            "weight decay 0.1, weighting only": Tokens(standardize, weight_decay=0.1, decay_tokens=False),
            "weighting smaller at the start": Tokens(standardize, scale=0.01),
            "SGD 0.1, weight decay 1e-4": Tokens(standardize, sgd=True, weight_decay=1e-4),
        }
    return found


WAYS = {
    **{f"raw: {name}": way for name, way in ways(False, every=False).items()},
    **{f"channel: {name}": way for name, way in ways("channel").items()},
    "isotropic: as published": Tokens("isotropic"),
    "isotropic: one token": Tokens("isotropic", num_tokens=1),
}
FEW = [  # for the detector, whose head takes long
    *(f"{kind}: {name}" for kind in ("raw", "channel") for name in ("untrained", "after one step")),
    *(f"{kind}: {name}" for kind in ("raw", "channel") for name in ("as published", "unweighted", "one token")),
    "channel: weighting slower",
    "channel: weight decay 0.1",
]
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
    "true boxes",
    "random masks",
    "channel: unweighted",
    "channel: weight decay 0.1",
    "feature MSE x 0.3",
    "channel: one token x 0.3",
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.tokens", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tokens_output"), help="folder for runs.jsonl, teachers and pictures")
    parser.add_argument("--quick", action="store_true", help="smoke run; its figures mean nothing")
    args = parser.parse_args(argv)
    run(QUICK if args.quick else Settings(), args.out)
    print("\n".join(report.tables(report.read(args.out / "runs.jsonl"))))


def run(settings: Settings, out: Path, ways: Mapping[str, Tokens] = WAYS, students: Sequence[str] = STUDENTS) -> None:
    """Whatever is not in ``out`` yet."""
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "runs.jsonl")
    journal.once({"run": "machine"}, lambda: environment.describe(torch.device("cpu")))
    studies = {kind: Study(kind, settings, out, journal) for kind in LR}
    for study in studies.values():
        for name in ways if study.kind != "detector" else filter(FEW.__contains__, ways):
            journal.once({"run": "tokens", "teacher": study.kind, "name": name}, lambda n=name, s=study: s.judge(n))
    for name in students:
        for seed in range(settings.seeds):
            for study in studies.values():
                key = {"run": "student", "teacher": study.kind, "name": name, "seed": seed}
                journal.once(key, lambda n=name, s=study, seed=seed: s.score(n, seed))
    for study in studies.values():
        report.draw(study, [name for name in students if name in ways], out / f"masks-{study.kind}.png")


class Journal:
    """A file of results, a line each, that is added to."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, report.read(path) if path.exists() else []

    def once(self, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        if any(key.items() <= line.items() for line in self.lines):
            return
        start = time.perf_counter()
        line = key | work()
        line["seconds"] = round(time.perf_counter() - start, 1)
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(*key.values(), f"{line['seconds']} s", flush=True)


class Study:
    """A trained teacher, and all that is learned from it."""

    def __init__(self, kind: str, settings: Settings, out: Path, journal: Journal) -> None:
        self.kind, self.settings, self.out, self.tokens = kind, settings, out, dict[str, MaskLearner]()
        self.train, self.validation, self.test = (
            make_scenes(split, count) for split, count in zip(("train", "validation", "test"), settings.scenes, strict=True)
        )
        self.teacher, path = teacher_of(kind), out / f"{kind}.pt"
        journal.once({"run": "teacher", "teacher": kind}, lambda: self._teach(path))
        self.teacher.load_state_dict(torch.load(path, weights_only=True))
        self.teacher.eval().requires_grad_(False)
        self.levels, self.unseen = self._features(self.train), self._features(self.validation)
        self.statistics = [(x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)) for x in self.levels]
        self.standardized = [(x - mean) / std for x, (mean, std) in zip(self.levels, self.statistics, strict=True)]

    def _teach(self, path: Path) -> dict[str, Any]:
        steps = dict(zip(LR, self.settings.teacher_steps, strict=True))[self.kind]
        torch.manual_seed(0)
        self.teacher = teacher_of(self.kind).to(memory_format=torch.channels_last)
        scenes = make_scenes("train", self.settings.teacher_scenes)
        if path.exists():
            self.teacher.load_state_dict(torch.load(path, weights_only=True))
        else:
            fit(self.teacher, scenes, LR[self.kind], steps, seed=0)
        torch.save(self.teacher.state_dict(), path)
        return {"metric": self.teacher.metric, "test": self.teacher.score(self.test)}

    @torch.no_grad()
    def _features(self, scenes: Scenes) -> list[Tensor]:
        parts = [self.teacher.features(images) for images in scenes.images.split(200)]
        return [torch.cat(level) for level in zip(*parts, strict=True)]

    def learner(self, name: str) -> MaskLearner:
        """With tokens learned in the way of this name."""
        if name not in self.tokens:
            path = self.out / f"{self.kind}, {name.replace(':', ',')}.pt"
            way = WAYS[name]
            torch.manual_seed(0)
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
        levels, labels = ([x[: self.settings.token_scenes] for x in xs] for xs in (self.levels, [self.train.labels]))
        if way.standardize:
            neck = nn.Identity()
            with learner.calibrate(neck, ""):
                neck(levels)
        modules: list[MaskModule] = list(learner.mask_modules)  # type: ignore[arg-type]
        steps = self.settings.token_steps if way.steps is None else way.steps
        optimizer = optimizer_of(modules, way)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1), eta_min=1e-6)
        for batch in batches(len(labels[0]), steps, seed=0):
            part = batch[:TOKEN_BATCH]
            seen = [x[part] for x in levels]
            loss = self.teacher.loss(learner(seen), labels[0][part]) + learner.dice_loss()  # type: ignore[arg-type]
            if way.balance:
                means = [m.weights(x).mean(0) for m, x in zip(modules, seen, strict=True)]
                loss = loss + way.balance * sum(way.num_tokens * mean.square().sum() - 1 for mean in means)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def judge(self, name: str) -> dict[str, Any]:
        """The tokens on the validation scenes."""
        learner, labels = self.learner(name), self.validation.labels
        masked: Any = learner(self.unseen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of useless tokens: they are what is looked for
            levels = learner.diagnostics(objects=objects_of(labels))
        return {
            "unmasked": float(self.teacher.loss(self.unseen, labels)),
            "masked": float(self.teacher.loss(masked, labels)),
            "levels": [self._level(learner, i, level) for i, level in enumerate(levels.values())],
        }

    def _level(self, learner: MaskLearner, i: int, level: LevelDiagnostics) -> dict[str, Any]:
        module, x = learner.mask_modules[i], self.unseen[i]
        masks: Tensor = module.masks(x) > 0.5  # type: ignore[operator]
        inside = adaptive_avg_pool2d(objects_of(self.validation.labels).float()[:, None], x.shape[2:]) > 0.5
        found = {name: value.tolist() for name, value in vars(level).items() if value is not None}
        return found | {
            "verdict": verdict(level, standardized=bool(learner.standardize)),
            "iou_boxes": best_iou(masks, inside[:, 0]),
            "iou_background": best_iou(masks, ~inside[:, 0]),
        }

    @torch.no_grad()
    def masks(self, name: str) -> tuple[list[Tensor], list[Tensor] | None]:
        """Masks ``[N, T, h, w]`` and mask weights ``[N, T]`` of all training scenes, level by level."""
        if name == "feature MSE":
            return [torch.ones_like(x[:, :1]) for x in self.levels], None
        if name == "true boxes":
            inside = objects_of(self.train.labels).float()[:, None]
            return [adaptive_avg_pool2d(inside, x.shape[2:]) for x in self.levels], None
        if name == "random masks":
            random = torch.Generator().manual_seed(0)
            directions = [2 * torch.randn(6, x.shape[1], generator=random) / x.shape[1] ** 0.5 for x in self.levels]
            pairs = zip(directions, self.standardized, strict=True)
            return [torch.einsum("tc,nchw->nthw", e, x).sigmoid() for e, x in pairs], None
        learner = self.learner(name)
        pairs: Any = list(zip(learner.mask_modules, self.levels, strict=True))
        return [m.masks(x) for m, x in pairs], [m.weights(x) for m, x in pairs] if learner.weight_mask else None

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
            masks, weights = self.masks(name)

            def distill(levels: list[Tensor], batch: Tensor) -> Tensor:
                target, m = ([x[batch] for x in xs] for xs in (self.standardized, masks))
                return criterion(levels, target, masks=m, mask_weights=weights and [w[batch] for w in weights])

            extra = criterion, distill
        fit(student, self.train, STUDENT_LR, self.settings.student_steps, seed, extra)
        scores = {split: student.score(scenes) for split, scenes in (("validation", self.validation), ("test", self.test))}
        return {"metric": student.metric, **scores}


Extra = tuple[nn.Module, Callable[[list[Tensor], Tensor], Tensor]]


def fit(net: Net, scenes: Scenes, lr: float, steps: int, seed: int, extra: Extra | None = None) -> None:
    """Trains a net, beside its task with a loss of its levels."""
    parameters = [*net.parameters(), *(extra[0].parameters() if extra else ())]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for batch in batches(len(scenes), steps, seed):
        some = scenes[batch]
        levels = net.features(some.images)
        loss = net.loss(levels, some.labels)
        if extra:
            loss = loss + extra[1](levels, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


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


def best_iou(masks: Tensor, region: Tensor) -> float:
    """Over all scenes, of the token that fits best; masks ``[N, T, h, w]`` and a region ``[N, h, w]``, both bool."""
    both, either = (x.sum((0, 2, 3)) for x in (masks & region[:, None], masks | region[:, None]))
    return float((both / either.clamp(min=1)).max())


if __name__ == "__main__":
    main()
