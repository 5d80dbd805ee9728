"""The trainings: teacher, tokens (stage 1), student (stage 2)."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from maskd_triton import MaskLearner
from maskd_triton.diagnostics import suggest_loss_weight

from ..optimising import adamw, take_step
from .losses import Aligned, Masked, Tokens
from .models import Net, make_student, make_teacher
from .tasks import Split, Task

BATCH = 8
LR = 1e-3
WEIGHT_DECAY = 0.01
TOKEN_LR = 1e-2
SHARES = {"loss": 0.9, "gradient": 0.75}  # of the suggested weights; docs/real.md says why

Tick = Callable[[], object]  # called once per training step


def train_teacher(task: Task, steps: int, tick: Tick, pretrained: bool = True, seed: int = 0) -> Net:
    """From ImageNet weights, or from random ones."""
    torch.manual_seed(seed)
    teacher = prepared(make_teacher(task.outputs), pretrained)
    optimizer, schedule = adamw(teacher.parameters(), LR, WEIGHT_DECAY, steps)
    for batch in batches(len(task.train), steps, seed):
        take_step(task.loss(teacher(task.train.images[batch]), task.train.targets[batch]), optimizer, schedule)
        tick()
    return teacher.eval()


def load_teacher(task: Task, path: Path) -> Net:
    teacher = make_teacher(task.outputs)
    teacher.load_state_dict(torch.load(path, weights_only=True))
    return teacher.to(memory_format=torch.channels_last).eval()


@torch.no_grad()
def features_of(part: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What a part of a network in eval mode makes of all images, in half precision."""
    return torch.cat([part(some).half() for some in images.split(50)])


def early_features(task: Task, pretrained: bool = True) -> Tensor:
    """Of the train split, by the student's frozen stages."""
    return features_of(prepared(make_student(task.outputs), pretrained).eval().backbone.early, task.train.images)


def learn_tokens(
    task: Task, teacher: Net, features: Tensor, tokens: Tokens, steps: int, tick: Tick, seed: int = 0
) -> MaskLearner:
    """Stage 1 on cached features of the train split, so that only the teacher's head runs. Random tokens stay as they are."""
    torch.manual_seed(seed)
    learner = MaskLearner(teacher.width, tokens.num_tokens, tokens.weight_mask, standardize=tokens.standardize)
    if tokens.standardize:
        level = nn.Identity()
        with learner.calibrate(level, ""):
            for some in features.split(50):
                level(some.float())
    if tokens.random:
        torch.nn.init.normal_(
            learner.mask_modules[0].mask_token, std=2 / teacher.width**0.5
        )  # masks are neither 0.5 nor 0 or 1
        return learner
    optimizer = torch.optim.Adam(learner.parameters(), TOKEN_LR, weight_decay=tokens.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)
    teacher.requires_grad_(False)
    for batch in batches(len(features), steps, seed):
        task_loss = task.loss(teacher.head(learner(features[batch].float())), task.train.targets[batch])
        take_step(task_loss + learner.dice_loss(), optimizer, schedule)
        tick()
    return learner


def train_student(
    task: Task,
    early: Tensor,
    features: Tensor,
    criterion: Aligned | Masked | None,
    steps: int,
    tick: Tick,
    seed: int,
    pretrained: bool = True,
) -> Net:
    """Stage 2: the task's loss plus distillation. A seed fixes initialisation and batches, the same for every criterion.

    The student's stages up to stride 4 stay as they are: their features ``early`` are computed once, as the teacher's are.
    """
    torch.manual_seed(seed)
    student = prepared(make_student(task.outputs), pretrained)
    trained = [*student.parameters(), *(criterion.parameters() if criterion is not None else ())]
    optimizer, schedule = adamw(trained, LR, WEIGHT_DECAY, steps)
    for batch in batches(len(features), steps, seed):
        level = student.late_features(early[batch].float())
        loss = task.loss(student.head(level), task.train.targets[batch])
        if criterion is not None:
            loss = loss + criterion(level, features[batch].float(), task.train.masks[batch])
        take_step(loss, optimizer, schedule)
        tick()
    return student


def suggest(
    task: Task, early: Tensor, features: Tensor, criterion: Aligned | Masked, student: Net, count: int = 5
) -> dict[str, float]:
    """What `suggest_loss_weight` names from a few batches, by losses and by gradients."""
    losses, distillations, levels = [], [], []
    for batch in batches(len(features), count, seed=0):
        levels.append(student.late_features(early[batch].float()))
        losses.append(task.loss(student.head(levels[-1]), task.train.targets[batch]))
        distillations.append(criterion(levels[-1], features[batch].float(), task.train.masks[batch]))
    by_loss = suggest_loss_weight(losses, distillations, share=SHARES["loss"])
    by_gradient = suggest_loss_weight(losses, distillations, levels, by="gradient", share=SHARES["gradient"])
    return {"by_loss": by_loss, "by_gradient": by_gradient}


@torch.no_grad()
def evaluate(net: Net, task: Task, split: Split) -> dict[str, float]:
    training = net.training
    net.eval()
    outputs = torch.cat([net(images) for images in split.images.split(50)])
    net.train(training)
    return task.scores(outputs, split.truth)


def prepared(net: Net, pretrained: bool) -> Net:
    if pretrained:
        net.backbone.load_imagenet()
    return net.to(memory_format=torch.channels_last)  # convolutions are then faster on CPUs


def batches(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of ``steps`` batches: every image once an epoch, plain or mirrored."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    half = count // 2
    for _ in range(steps):
        if len(left) < min(BATCH, half):
            left = torch.randperm(half, generator=generator)
            left = left + half * torch.randint(2, (half,), generator=generator)
        batch, left = left[:BATCH], left[BATCH:]
        yield batch
