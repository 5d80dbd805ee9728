"""What every recipe needs: a model with two feature levels, random batches, and tokens learned in a few steps."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from maskd_triton import MaskLearner

CLASSES = 5


class Backbone(nn.Module):
    """Features at strides 4 and 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.level1 = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.level2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        first = self.level1(self.stem(images))
        return first, self.level2(first)


class Segmenter(nn.Module):
    """A backbone and a head that scores every pixel of its first level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channels = [width, 2 * width]
        self.backbone = Backbone(width)
        self.head = nn.Conv2d(width + 2 * width, CLASSES, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Scores ``[N, CLASSES, H / 4, W / 4]`` and the features: a loss takes them without a hook."""
        levels = self.backbone(images)
        return self.head(torch.cat([levels[0], interpolate(levels[1], levels[0].shape[2:])], 1)), levels


def task_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy against labels at the size of the scores."""
    return cross_entropy(scores.float(), labels)


def batches(count: int, images: int = 4, size: tuple[int, int] = (32, 48), seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Random images, and labels that follow from their colours."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(images, 3, *size, generator=generator)
        coarse = torch.nn.functional.avg_pool2d(x, 4)
        yield x, (coarse.sum(1) * 2 + CLASSES / 2).long().clamp(0, CLASSES - 1)


def learn_tokens(teacher: Segmenter, steps: int = 5) -> MaskLearner:
    """Stage 1 in short: receptive tokens of the teacher's two levels."""
    learner = MaskLearner(teacher.channels, num_tokens=4, standardize=True)
    with learner.calibrate(teacher, "backbone"):
        for images, _ in batches(steps):
            teacher(images)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    with learner.attach(teacher, "backbone"):
        for images, labels in batches(steps):
            scores, _ = teacher(images)
            loss = task_loss(scores, labels) + learner.dice_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return learner
