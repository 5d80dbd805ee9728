"""The two tasks: their data, loss, score and true masks. `load_task` gives one of them."""

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, interpolate, one_hot

from maskd_triton.shapes import boxes_to_masks

from . import centres
from .data import CELLS, SIZE, SPLITS, Objects, bccd, camvid
from .models import STRIDE

LEVEL = (ceil(SIZE[0] / STRIDE), ceil(SIZE[1] / STRIDE))
VOID = 11  # CamVid's pixels without a class


@dataclass(frozen=True)
class Split:
    """
    Attributes:
        images: uint8 ``[N, 3, H, W]``.
        truth: what `score` compares with, an entry for each image.
        targets: what `loss` compares with, ``[N, ...]``.
        masks: the true masks, ``[N, T, ceil(H / 8), ceil(W / 8)]``: one token for every class.
    """

    images: Tensor
    truth: Any
    targets: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.images)


class CamVid:
    """Segmentation of street scenes: 11 classes, mIoU over all pixels of a split that have a class."""

    name, outputs, metric = "camvid", 11, "mIoU"
    objects = (2, 6, 7, 8, 9, 10)  # masks of what stands in the street: poles, signs, fences, cars, pedestrians, bicyclists

    def __init__(self, folder: Path, most: int | None) -> None:
        self.train, self.val, self.test = (self._split(*camvid(folder, split, most), split == "train") for split in SPLITS)

    def _split(self, images: Tensor, labels: Tensor, mirrored: bool) -> Split:
        if mirrored:
            images, labels = (torch.cat([x, x.flip(-1)]) for x in (images, labels))
        classes = one_hot(labels.long(), VOID + 1)[..., :VOID].permute(0, 3, 1, 2)
        masks = [adaptive_avg_pool2d(part.float(), LEVEL) for part in classes.split(50)]  # shares of cells
        return Split(images, labels, labels, torch.cat(masks))

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        scores = interpolate(outputs, labels.shape[1:], mode="bilinear")
        return cross_entropy(scores, labels.long(), ignore_index=VOID)

    def scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        confusion = torch.zeros(11, 12)
        for some, truth in zip(outputs.split(50), labels.split(50), strict=True):
            found = interpolate(some, truth.shape[1:], mode="bilinear").argmax(1)
            confusion += torch.bincount((found * 12 + truth).flatten(), minlength=11 * 12).view(11, 12)
        confusion = confusion[:, :VOID]
        both = confusion.diag()
        return {"mIoU": (both / (confusion.sum(0) + confusion.sum(1) - both)).nanmean().item()}


class BCCD:
    """Detection of blood cells: three classes, mAP as on COCO."""

    name, outputs, metric = "bccd", len(CELLS) + 4, "mAP"
    objects = (0, 1, 2)  # masks of objects: all

    def __init__(self, folder: Path, most: int | None) -> None:
        self.train, self.val, self.test = (self._split(*bccd(folder, split, most), split == "train") for split in SPLITS)

    def _split(self, images: Tensor, objects: list[Objects], mirrored: bool) -> Split:
        if mirrored:
            images = torch.cat([images, images.flip(-1)])
            objects = objects + [x.mirrored() for x in objects]
        boxes, classes = [x.boxes for x in objects], [x.classes for x in objects]
        (masks,) = boxes_to_masks(boxes, SIZE, [LEVEL], classes, num_classes=len(CELLS))
        return Split(images, objects, torch.stack([centres.encode(x, LEVEL) for x in objects]), masks)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return centres.loss(outputs, targets)

    def scores(self, outputs: Tensor, objects: list[Objects]) -> dict[str, float]:
        return centres.average_precision(centres.detections(outputs), objects)


Task = CamVid | BCCD
TASKS: dict[str, type[Task]] = {"camvid": CamVid, "bccd": BCCD}


def load_task(name: str, folder: Path, most: int | None = None) -> Task:
    """``"camvid"`` or ``"bccd"`` with its data: ``train`` (all images, then all mirrored), ``val`` and ``test``.

    Args:
        name: of the task.
        folder: of the data, in its own layout.
        most: images of each split; None: all.
    """
    return TASKS[name](folder, most)


def objects_in(task: Task, split: Split) -> Tensor:
    """``[N, h, w]``: how much of every cell of a split's level lies on objects."""
    return split.masks[:, list(task.objects)].amax(1)
