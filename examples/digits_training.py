"""The three trainings of the demo: the teacher, its receptive tokens (stage 1), and a student (stage 2)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from maskd_triton import MaskedDistillLoss, MaskLearner

from .digits_data import Scenes
from .digits_models import PyramidNet, make_student, make_teacher
from .digits_tasks import found, mean_iou, task_loss
from .optimising import adamw, take_step

BATCH = 32
NUM_TOKENS = 6
WEIGHT_DECAY = 0.01
TEACHER_LR = 3e-3
TOKEN_LR = 1e-2
STUDENT_LR = 2e-2  # of .004, .008, .016 and .03 the last two were best for every variant on validation
SHOWN = 3
CUSTOM_MASKS_AFTER = 0.25  # share of the student's steps

VARIANTS = ("student alone", "plain feature MSE", "MasKD")

Module = TypeVar("Module", bound=nn.Module)
Tick = Callable[[], object]  # called once per training step: the progress bar


@dataclass(frozen=True)
class Study:
    """What every student is trained and judged with."""

    train: Scenes
    validation: Scenes
    test: Scenes
    teacher: PyramidNet
    levels: list[Tensor]  # the teacher's features of the training scenes
    learner: MaskLearner


@dataclass(frozen=True)
class StudentRun:
    """What one student's training leaves behind."""

    variant: str
    seed: int
    test_miou: float
    curve: list[tuple[int, float]]  # step, validation mIoU
    found: Tensor  # the classes of the first SHOWN test scenes, [SHOWN, H, W]


class PlainFeatureLoss(nn.Module):
    """The baseline: the mean squared difference over all pixels, with MasKD's aligns and of the same standardised features."""

    def __init__(self, learner: MaskLearner, student_channels: Sequence[int], loss_weight: float) -> None:
        super().__init__()
        pairs = zip(student_channels, learner.channels, strict=True)
        self.align = nn.ModuleList(nn.Conv2d(s, c, 1) for s, c in pairs)
        self.statistics = [(m.channel_mean[:, None, None], m.channel_std[:, None, None]) for m in learner.mask_modules]
        self.loss_weight = loss_weight

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        levels = zip(self.align, student, teacher, self.statistics, strict=True)
        return self.loss_weight * sum(mse_loss(conv(s), (t - mean) / std) for conv, s, t, (mean, std) in levels)


def train_teacher(train: Scenes, steps: int, tick: Tick, seed: int = 0) -> PyramidNet:
    torch.manual_seed(seed)
    teacher = on_device_of(train, make_teacher())
    optimizer, schedule = adamw(teacher.parameters(), TEACHER_LR, WEIGHT_DECAY, steps)
    for batch in batches(len(train), steps, seed):
        scenes = train[batch]
        take_step(task_loss(teacher(scenes.images), scenes.labels), optimizer, schedule)
        tick()
    return teacher.eval()


def learn_tokens(
    teacher: PyramidNet, train: Scenes, steps: int, tick: Tick, seed: int = 0
) -> tuple[MaskLearner, dict[str, list[float]]]:
    """Stage 1: the teacher must still solve its task on masked features, and the masks must differ (Dice)."""
    torch.manual_seed(seed)
    learner = MaskLearner(teacher.neck_channels, NUM_TOKENS, standardize=True).to(train.images.device)
    with learner.calibrate(teacher, "neck"):
        for images in train.images[:600].split(200):
            teacher(images)
    optimizer = torch.optim.Adam(learner.parameters(), TOKEN_LR, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)
    history: dict[str, list[float]] = {"task loss": [], "dice": []}
    with learner.attach(teacher, "neck"):
        for batch in batches(len(train), steps, seed):
            scenes = train[batch]
            loss = task_loss(teacher(scenes.images), scenes.labels)
            dice = learner.dice_loss()
            take_step(loss + dice, optimizer, schedule)
            history["task loss"].append(loss.item())
            history["dice"].append(dice.item())
            tick()
    return learner, history


@torch.no_grad()
def teacher_features(teacher: PyramidNet, scenes: Scenes) -> list[Tensor]:
    """The levels of all scenes, computed once: nothing augments them and every student needs them."""
    chunks = [teacher.features(images) for images in scenes.images.split(200)]
    return [torch.cat(level) for level in zip(*chunks, strict=True)]


def train_student(study: Study, variant: str, loss_weight: float, seed: int, steps: int, tick: Tick) -> StudentRun:
    """Stage 2: task loss plus distillation. A seed fixes initialisation, that of the aligns, and batches."""
    torch.manual_seed(seed)
    student = on_device_of(study.train, make_student())
    trained = list(student.parameters())
    criterion = None
    if variant != "student alone":
        criterion = make_criterion(study, variant, student.neck_channels, loss_weight, steps)
        on_device_of(study.train, criterion)
        torch.manual_seed(seed)  # whatever a criterion drew for its own initialisation
        for conv in criterion.align:
            conv.reset_parameters()
        trained += criterion.align.parameters()
    optimizer, schedule = adamw(trained, STUDENT_LR, WEIGHT_DECAY, steps)
    curve = []
    for step, batch in enumerate(batches(len(study.train), steps, seed), start=1):
        scenes = study.train[batch]
        features = student.features(scenes.images)
        loss = task_loss(student.scores(features), scenes.labels)
        if criterion is not None:
            loss = loss + criterion(features, [level[batch] for level in study.levels])
        take_step(loss, optimizer, schedule)
        if 5 * step // steps > 5 * (step - 1) // steps:  # after every fifth of the steps
            curve.append((step, mean_iou(student, study.validation)))
        tick()
    return StudentRun(variant, seed, mean_iou(student, study.test), curve, found(student, study.test.images[:SHOWN]))


def make_criterion(
    study: Study, variant: str, student_channels: list[int], loss_weight: float, steps: int
) -> PlainFeatureLoss | MaskedDistillLoss:
    if variant == "plain feature MSE":
        return PlainFeatureLoss(study.learner, student_channels, loss_weight)
    return MaskedDistillLoss(
        study.learner.channels,
        NUM_TOKENS,
        student_channels=student_channels,
        standardize=True,
        custom_mask_warmup=round(CUSTOM_MASKS_AFTER * steps),
        loss_weight=loss_weight,
        pretrained=study.learner,
    )


def on_device_of(scenes: Scenes, module: Module) -> Module:
    """On the scenes' device, channels last: convolutions are then faster on CPUs and GPUs alike."""
    return module.to(scenes.images.device, memory_format=torch.channels_last)


def batches(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of ``steps`` batches from fresh permutations, drawn on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(left) < BATCH:
            left = torch.randperm(count, generator=generator)
        batch, left = left[:BATCH], left[BATCH:]
        yield batch
