"""What the study runs, and in which order: an early stop leaves complete cells and pairs."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..digits_data import DENSE, SPARSE
from ..digits_tasks import CENTRES, SEGMENTATION

TASKS = {"segmentation": SEGMENTATION, "centres": CENTRES}
KINDS = {"sparse": SPARSE, "dense": DENSE}

ALONE, MSE = "student alone", "feature MSE"


@dataclass(frozen=True)
class Tokens:
    """How stage 1 learns the tokens of a variant."""

    count: int = 6
    weighted: bool = True
    standardize: str | bool = "channel"
    dice: bool = True

    @property
    def name(self) -> str:
        parts = [f"{self.count} token{'s' * (self.count > 1)}", "weighted" if self.weighted else "unweighted"]
        return ", ".join([*parts, self.standardize or "raw", *(() if self.dice else ("without Dice",))])


@dataclass(frozen=True)
class Variant:
    """A student's loss besides that of its task.

    Attributes:
        loss: "none"; over all pixels: "mse", "cosine", "cwd"; under masks: "learned", "random" (tokens of the learned
            norms), "truth" (the pixels of digits).
        tokens: of the masks, and whose statistics standardise the teacher's features.
        only_shortest: runs with one schedule only.
    """

    loss: str
    tokens: Tokens = field(default_factory=Tokens)
    distance: str = "squared"
    custom: bool = False
    only_shortest: bool = False


VARIANTS = {
    ALONE: Variant("none"),
    MSE: Variant("mse"),
    "MasKD, weighted": Variant("learned"),
    "MasKD, customised": Variant("learned", custom=True),
    "ground-truth masks": Variant("truth"),
    "random tokens": Variant("random", Tokens(weighted=False)),
    "MasKD, unweighted": Variant("learned", Tokens(weighted=False)),
    "cosine": Variant("cosine"),
    "masks with cosine": Variant("learned", distance="cosine"),
    "CWD": Variant("cwd"),
    "MasKD, isotropic": Variant("learned", Tokens(standardize="isotropic")),
    "MasKD, without Dice": Variant("learned", Tokens(dice=False)),
    "MasKD, 1 token": Variant("learned", Tokens(1), only_shortest=True),
    "MasKD, 2 tokens": Variant("learned", Tokens(2), only_shortest=True),
    "MasKD, 12 tokens": Variant("learned", Tokens(12), only_shortest=True),
}
CORE = (ALONE, MSE, "MasKD, weighted", "MasKD, customised", "ground-truth masks")
TIMED_STEPS = 60
RAW = Tokens(standardize=False)  # as published; learned to see whether it collapses, and given to no student


@dataclass(frozen=True)
class Settings:
    """The size of a study.

    Attributes:
        full: cells, task and scenes, in which every variant runs; CORE runs in all.
        longest_core: the longest schedule is for CORE only.
        tries: loss weights, of which validation chooses one for each variant and cell, with the shortest schedule.
        tuning_seeds: none of the seeds that are reported.
    """

    scenes: tuple[int, int, int] = (2000, 400, 1000)  # train, validation, test
    teachers: int = 2
    seeds: int = 4
    teacher_steps: int = 1000
    token_steps: int = 200
    schedules: tuple[int, ...] = (250, 500, 1200)
    cells: tuple[str, ...] = ("segmentation, sparse", "centres, sparse", "segmentation, dense", "centres, dense")
    full: tuple[str, ...] = ("segmentation, sparse",)
    longest_core: bool = True
    tries: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0)
    tuning_seeds: tuple[int, ...] = (100, 101)
    points: int = 5  # of a learning curve


QUICK = Settings(
    scenes=(300, 60, 60),
    teachers=1,
    seeds=2,
    teacher_steps=30,
    token_steps=10,
    schedules=(6, 12),
    tries=(3.0, 10.0),
    tuning_seeds=(100,),
    points=2,
)


@dataclass(frozen=True)
class Job:
    """A run: a line of the results file.

    Attributes:
        what: "teacher", "tokens", "tuning", "student" or "timing", which needs the machine for itself.
        cell: task and scenes.
        teacher: its seed.
        tokens: name of a `Tokens`.
        weight: of the loss, for a tuning run.
    """

    what: str
    cell: str
    teacher: int
    tokens: str | None = None
    variant: str | None = None
    weight: float | None = None
    seed: int | None = None
    steps: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def key(self) -> str:
        return json.dumps(self.as_dict(), sort_keys=True)

    def __str__(self) -> str:
        parts = [self.what, self.cell, f"teacher {self.teacher}", self.tokens, self.variant]
        if self.weight is not None:
            parts.append(f"weight {self.weight:g}")
        if self.seed is not None:
            parts.append(f"seed {self.seed}")
        if self.steps is not None:
            parts.append(f"{self.steps} steps")
        return ", ".join(part for part in parts if part)


def variants(settings: Settings, cell: str, steps: int) -> list[str]:
    """Those that run in a cell with a schedule."""
    if cell not in settings.full or (settings.longest_core and steps == settings.schedules[-1] and len(settings.schedules) > 1):
        return list(CORE)
    return [name for name, variant in VARIANTS.items() if not variant.only_shortest or steps == settings.schedules[0]]


def tokens_of(settings: Settings, cell: str) -> dict[str, Tokens]:
    """Every kind of tokens that a cell needs, by name."""
    needed = [VARIANTS[name].tokens for name in variants(settings, cell, settings.schedules[0])]
    return {tokens.name: tokens for tokens in [*needed, *([RAW] if cell in settings.full else [])]}


def jobs(settings: Settings) -> Iterator[Job]:
    """The shortest schedule first, cell by cell and seed by seed; what a cell needs comes before its runs. Times last."""
    for steps in settings.schedules:
        for cell in settings.cells:
            if steps == settings.schedules[0]:
                yield from _preparation(settings, cell)
            for seed in range(settings.seeds):
                for teacher in range(settings.teachers):
                    for variant in variants(settings, cell, steps):
                        yield Job("student", cell, teacher, variant=variant, seed=seed, steps=steps)
    for variant in variants(settings, settings.cells[0], settings.schedules[0]):
        steps = max(2, min(TIMED_STEPS, settings.schedules[0]))
        yield Job("timing", settings.cells[0], 0, variant=variant, seed=0, steps=steps)


def _preparation(settings: Settings, cell: str) -> Iterator[Job]:
    for teacher in range(settings.teachers):
        yield Job("teacher", cell, teacher, steps=settings.teacher_steps)
        for tokens in tokens_of(settings, cell):
            yield Job("tokens", cell, teacher, tokens, steps=settings.token_steps)
    yield from _tuning(settings, cell)


def _tuning(settings: Settings, cell: str) -> Iterator[Job]:
    steps = settings.schedules[0]
    for variant in variants(settings, cell, steps):
        if variant != ALONE:
            for weight in settings.tries:
                for seed in settings.tuning_seeds:
                    yield Job("tuning", cell, 0, variant=variant, weight=weight, seed=seed, steps=steps)
