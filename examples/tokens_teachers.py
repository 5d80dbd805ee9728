"""Three teachers of different kinds on the demo's scenes: its segmenter, a detector on a pyramid, a vision transformer."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot, pixel_shuffle, softplus

from .digits_data import NUM_CLASSES, SIZE, Scenes
from .digits_models import Backbone, Pyramid, PyramidNet, conv_bn_relu, make_student, make_teacher
from .digits_tasks import mean_iou, task_loss
from .real.centres import average_precision
from .real.data import Objects

QUARTER = SIZE // 2  # every digit lies in one quarter of a scene
DETECTIONS = 50  # candidates in a scene


class Net(nn.Module):
    """A teacher or a student.

    Attributes:
        metric: what `score` gives; higher is better.
        channels: of every level.
    """

    metric: ClassVar[str] = "mIoU"
    channels: list[int]

    def features(self, images: Tensor) -> list[Tensor]:
        """The levels that are distilled."""
        raise NotImplementedError

    def loss(self, levels: list[Tensor], labels: Tensor) -> Tensor:
        """The task's, given the levels."""
        raise NotImplementedError

    def score(self, scenes: Scenes) -> float:
        return mean_iou(self, scenes)


class Segmenter(Net):
    """The demo's net: all levels give one map of classes."""

    def __init__(self, net: PyramidNet) -> None:
        super().__init__()
        self.net, self.channels = net, net.neck_channels

    def features(self, images: Tensor) -> list[Tensor]:
        return self.net.features(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def loss(self, levels: list[Tensor], labels: Tensor) -> Tensor:
        return task_loss(self.net.scores(levels), labels)


class Middle(Segmenter):
    """A segmenter whose level of stride 4 alone is distilled: that of the ViT's patches."""

    def __init__(self, net: PyramidNet) -> None:
        super().__init__(net)
        self.channels = net.neck_channels[1:2]

    def features(self, images: Tensor) -> list[Tensor]:
        self.levels = self.net.features(images)
        return self.levels[1:2]

    def loss(self, levels: list[Tensor], labels: Tensor) -> Tensor:
        return task_loss(self.net.scores([self.levels[0], *levels, self.levels[2]]), labels)


class ViT(Net):
    """Patches of 4 by 4 pixels, and a linear head behind the last norm."""

    def __init__(self, width: int = 96, patch: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.channels, self.patch = [width], patch
        self.embed = nn.Sequential(nn.Conv2d(3, 48, 3, 2, 1), nn.GELU(), nn.Conv2d(48, width, 3, 2, 1))
        self.pos = nn.Parameter(0.02 * torch.randn(1, (SIZE // patch) ** 2, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 4, 3 * width, dropout=0, activation="gelu", batch_first=True, norm_first=True)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Conv2d(width, NUM_CLASSES * patch**2, 1)

    def features(self, images: Tensor) -> list[Tensor]:
        x = self.embed(images)
        tokens = self.norm(self.blocks(x.flatten(2).transpose(1, 2) + self.pos))
        return [tokens.transpose(1, 2).reshape(x.shape)]

    def forward(self, images: Tensor) -> Tensor:
        return pixel_shuffle(self.head(self.features(images)[0]), self.patch)

    def loss(self, levels: list[Tensor], labels: Tensor) -> Tensor:
        return task_loss(pixel_shuffle(self.head(levels[0]), self.patch), labels)


class Detector(Net):
    """One head on every level of a pyramid gives classes (focal loss) and boxes (IoU loss), without anchors, as FCOS does.

    All levels learn all digits, which have about one size."""

    metric = "mAP"

    def __init__(self, widths: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.channels = [width] * len(widths)
        self.backbone, self.neck = Backbone(widths), Pyramid(widths, width)
        self.tower = nn.Sequential(conv_bn_relu(width, width), conv_bn_relu(width, width))
        self.cls, self.reg = nn.Conv2d(width, NUM_CLASSES - 1, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
        nn.init.constant_(self.cls.bias, -4.0)  # type: ignore[arg-type]

    def features(self, images: Tensor) -> list[Tensor]:
        return self.neck(self.backbone(images))

    def loss(self, levels: list[Tensor], labels: Tensor) -> Tensor:
        classes, boxes = boxes_of(labels)
        losses, found = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        for x in levels:
            tower = self.tower(x)
            kinds, sides, hit = targets(classes, boxes, x.shape[2])
            losses = losses + focal(self.cls(tower), kinds)
            losses = losses + (1 - iou(softplus(self.reg(tower)).movedim(1, 3)[hit], sides[hit])).sum()
            found = found + hit.sum()
        return losses / found.clamp(min=1)

    @torch.no_grad()
    def score(self, scenes: Scenes) -> float:
        training = self.training
        self.eval()
        rows = self.detections(scenes.images)
        self.train(training)
        return average_precision(rows, truth(scenes.labels), NUM_CLASSES - 1)["mAP"]

    def detections(self, images: Tensor) -> list[Tensor]:
        """Rows ``[k, 6]`` of every image: box (left, top, right, bottom), score and class. Where boxes of a class overlap by an
        IoU above .5, the best one stays."""
        boxes, scores = [], []
        for x in self.features(images):
            tower = self.tower(x)
            y, x = torch.meshgrid(*[centres_of(n) for n in tower.shape[2:]], indexing="ij")
            top, left, bottom, right = (8 * softplus(self.reg(tower))).unbind(1)
            boxes.append(torch.stack([x - left, y - top, x + right, y + bottom], -1).flatten(1, 2))
            scores.append(self.cls(tower).sigmoid().movedim(1, 3).flatten(1, 2))
        best, where = torch.cat(scores, 1).flatten(1).topk(DETECTIONS)
        kinds = where % (NUM_CLASSES - 1)
        places = (where // (NUM_CLASSES - 1))[..., None].expand(-1, -1, 4)
        rows = torch.cat([torch.cat(boxes, 1).gather(1, places), best[..., None], kinds[..., None]], 2)
        return [own[alone] for own, alone in zip(rows, without_copies(rows), strict=True)]


def boxes_of(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Class ``[N, 4]`` (0: none) and box ``[N, 4, 4]`` (top, left, bottom, right) of the digit in every quarter."""
    parts = [labels[:, r : r + QUARTER, c : c + QUARTER] for r in (0, QUARTER) for c in (0, QUARTER)]
    corners = torch.tensor([[r, c, r, c] for r in (0, QUARTER) for c in (0, QUARTER)])
    index = torch.arange(QUARTER)
    boxes = []
    for part in parts:
        lines = [(part > 0).any(2), (part > 0).any(1)]  # rows, columns
        first = [index.where(line, QUARTER).amin(1) for line in lines]
        last = [(index + 1).where(line, 0).amax(1) for line in lines]
        boxes.append(torch.stack([*first, *last], 1))
    return torch.stack([part.flatten(1).amax(1) for part in parts], 1), torch.stack(boxes, 1) + corners


def objects_of(labels: Tensor) -> Tensor:
    """``[N, H, W]``: whether a pixel lies in the box of a digit."""
    classes, boxes = boxes_of(labels)
    y, x = torch.arange(SIZE)[:, None], torch.arange(SIZE)[None]
    inside = torch.zeros_like(labels, dtype=torch.bool)
    for kind, (top, left, bottom, right) in zip(classes.T, boxes.permute(1, 2, 0)[..., None, None], strict=True):
        inside |= (kind > 0)[:, None, None] & (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return inside


def targets(classes: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a level of ``size`` by ``size`` places: classes ``[N, 10, h, w]``, distances to the box's sides ``[N, h, w, 4]`` in
    units of 8 pixels, and where there is a digit ``[N, h, w]``: near the middle of its box."""
    stride = SIZE / size
    centre = centres_of(size)
    y, x = centre[:, None].expand(size, size), centre.expand(size, size)
    kinds = torch.zeros(len(classes), NUM_CLASSES - 1, size, size)
    sides, hit = torch.zeros(len(classes), size, size, 4), torch.zeros(len(classes), size, size, dtype=torch.bool)
    for kind, (top, left, bottom, right) in zip(classes.T, boxes.permute(1, 2, 0)[..., None, None], strict=True):
        far = torch.maximum((y - (top + bottom) / 2).abs(), (x - (left + right) / 2).abs())
        to_sides = torch.stack([y - top, x - left, bottom - y, right - x], 3) / 8
        here = (kind > 0)[:, None, None] & (far < max(4.0, 0.75 * stride)) & (to_sides > 0).all(3)
        kinds = torch.where(here[:, None], one_hot((kind - 1).clamp(min=0), NUM_CLASSES - 1)[:, :, None, None].float(), kinds)
        sides, hit = torch.where(here[..., None], to_sides, sides), hit | here
    return kinds, sides, hit


def centres_of(size: int) -> Tensor:
    """Of a level's ``size`` places along a side, in pixels."""
    return (torch.arange(size) + 0.5) * (SIZE / size)


def truth(labels: Tensor) -> list[Objects]:
    """The digits of every scene."""
    classes, boxes = boxes_of(labels)
    pairs = zip(classes, boxes[..., [1, 0, 3, 2]].float(), strict=True)
    return [Objects(box[kind > 0], kind[kind > 0] - 1) for kind, box in pairs]


def without_copies(rows: Tensor) -> Tensor:
    """``[N, k]``: whether a row of `Detector.detections`, best first, overlaps with no better one of its class that stays."""
    boxes = rows[..., :4] + 10 * SIZE * rows[..., 5:]  # those of different classes lie apart
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    both, areas = (high - low).clamp(min=0).prod(3), (boxes[..., 2:] - boxes[..., :2]).prod(2)
    copies = both > 0.5 * (areas[:, :, None] + areas[:, None] - both)
    stays = torch.ones_like(areas, dtype=torch.bool)
    for i in range(rows.shape[1]):
        stays[:, i + 1 :] &= ~(stays[:, i, None] & copies[:, i, i + 1 :])
    return stays


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """Lin et al. 2017: alpha .25, gamma 2."""
    p = logits.sigmoid()
    wrong = p + target - 2 * p * target
    alpha = 0.75 - 0.5 * target
    return (alpha * wrong.square() * binary_cross_entropy_with_logits(logits, target, reduction="none")).sum()


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Of boxes ``[K, 4]`` around the same place, by their distances to it."""
    height, width = (torch.minimum(a[:, i], b[:, i]) + torch.minimum(a[:, i + 2], b[:, i + 2]) for i in (0, 1))
    areas = sum((x[:, 0] + x[:, 2]) * (x[:, 1] + x[:, 3]) for x in (a, b))
    return height * width / (areas - height * width + 1e-6)


def teacher_of(kind: str) -> Net:
    if kind == "segmenter":
        return Segmenter(make_teacher())
    return Detector((32, 64, 128), 64) if kind == "detector" else ViT()


def student_of(kind: str) -> Net:
    """A sixteenth of the segmenter or the detector."""
    if kind == "segmenter":
        return Segmenter(make_student())
    return Detector((8, 16, 32), 16) if kind == "detector" else Middle(make_student())
