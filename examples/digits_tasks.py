"""The two tasks on scenes of digits: a class per pixel, and a heat map of the digits' middles, as a detector's head has."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, max_pool2d

from .digits_data import NUM_CLASSES, SIZE, Scenes
from .digits_models import PyramidNet

BACKGROUND_WEIGHT = 0.4  # most pixels are background
HEAT_STRIDE = 2
HEAT_SIGMA = 1.0  # in pixels of the heat map
NEAR = 3.0  # pixels of the image between a digit's middle and where it was found
CANDIDATES = 10  # per scene


@dataclass(frozen=True)
class Task:
    """What nets are trained for.

    Attributes:
        outputs: channels of a net's scores.
        stride: pixels of an image per pixel of the scores.
        loss: of scores and their scenes.
        metric: judges a net on scenes, from 0 to 1.
        bias: of the last convolution before training.
    """

    outputs: int
    stride: int
    loss: Callable[[Tensor, Scenes], Tensor]
    metric: Callable[[PyramidNet, Scenes], float]
    bias: float = 0.0

    def prepare(self, net: PyramidNet) -> PyramidNet:
        """The net as training finds it."""
        if self.bias:
            nn.init.constant_(net.head.classify.bias, self.bias)
        return net


def task_loss(scores: Tensor, labels: Tensor) -> Tensor:
    weight = torch.ones(NUM_CLASSES, device=scores.device)
    weight[0] = BACKGROUND_WEIGHT
    return cross_entropy(scores, labels, weight)


@torch.no_grad()
def mean_iou(net: PyramidNet, scenes: Scenes) -> float:
    """Intersection over union over all pixels of all scenes, averaged over the classes that occur."""
    training = net.training
    net.eval()
    confusion = torch.zeros(NUM_CLASSES**2, device=scenes.labels.device)
    for images, labels in zip(scenes.images.split(200), scenes.labels.split(200), strict=True):
        pairs = labels * NUM_CLASSES + net(images).argmax(1)
        confusion += torch.bincount(pairs.flatten(), minlength=NUM_CLASSES**2)
    net.train(training)
    confusion = confusion.view(NUM_CLASSES, NUM_CLASSES)
    both = confusion.diag()
    return (both / (confusion.sum(0) + confusion.sum(1) - both)).nanmean().item()


def heat_maps(digits: Tensor) -> Tensor:
    """``[N, 10, 20, 20]``: Gaussians of height 1 around the middle of every digit of the class."""
    cells = torch.arange(SIZE // HEAT_STRIDE, device=digits.device)
    row, column, digit = digits.unbind(2)
    row, column = (torch.div(x, HEAT_STRIDE).floor()[..., None] for x in (row, column))
    down, right = (torch.exp(-((cells - x) ** 2) / (2 * HEAT_SIGMA**2)) for x in (row, column))
    is_class = digit[..., None] == torch.arange(NUM_CLASSES - 1, device=digits.device)
    return torch.einsum("nkh,nkw,nkc->nkchw", down, right, is_class.to(down.dtype)).amax(1)


def heat_loss(scores: Tensor, scenes: Scenes) -> Tensor:
    """The focal loss of centre heat maps (Zhou et al., arXiv 1904.07850, equation 1) per digit."""
    target = heat_maps(scenes.digits)
    p = scores.sigmoid()
    found = (1 - p) ** 2 * logsigmoid(scores)
    nothing = (1 - target) ** 4 * p**2 * logsigmoid(-scores)
    return -torch.where(target == 1, found, nothing).sum() / (scenes.digits[..., 2] >= 0).sum()


@torch.no_grad()
def mean_average_precision(net: PyramidNet, scenes: Scenes) -> float:
    """Mean over classes of the average precision of the heat maps' peaks, within ``NEAR`` pixels of a digit's middle."""
    training = net.training
    net.eval()
    scores = torch.cat([net(part.images) for part in scenes.split(200)])
    net.train(training)
    peaks = scores.masked_fill(scores < max_pool2d(scores, 3, 1, 1), -torch.inf)
    best, where = peaks.flatten(1).topk(CANDIDATES)
    cells = SIZE // HEAT_STRIDE
    rows, columns = (HEAT_STRIDE * (where % cells**2 // cells + 0.5), HEAT_STRIDE * (where % cells + 0.5))
    return average_precision(best, where // cells**2, torch.stack([rows, columns], 2), scenes.digits)


def average_precision(scores: Tensor, classes: Tensor, places: Tensor, digits: Tensor) -> float:
    """Mean over the classes that occur of the area under precision over recall.

    Args:
        scores: ``[N, K]`` of K candidates per scene.
        classes: ``[N, K]`` integers.
        places: ``[N, K, 2]``.
        digits: of `Scenes`. Each counts for the best candidate of its class within ``NEAR`` pixels; another one is false.
    """
    found = []
    near = torch.cdist(places, digits[..., :2].to(places.dtype)) <= NEAR
    near &= classes[..., None] == digits[:, None, :, 2]
    near &= scores.isfinite()[..., None]
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    classes, reachable = classes.flatten().tolist(), near.flatten(0, 1).tolist()
    per_scene = scores.shape[1]
    hits: list[list[bool]] = [[] for _ in range(NUM_CLASSES - 1)]
    taken = set()
    for i in order:
        free = [(i // per_scene, k) for k, is_near in enumerate(reachable[i]) if is_near and (i // per_scene, k) not in taken]
        taken.update(free[:1])
        hits[classes[i]].append(bool(free))
    for digit, true in enumerate(hits):
        count = int((digits[..., 2] == digit).sum())
        if count:
            hit = torch.tensor(true, dtype=torch.float64)
            precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
            best_from_here = precision.flip(0).cummax(0).values.flip(0) if len(hit) else precision
            found.append((best_from_here * hit).sum().item() / count)
    return sum(found) / len(found)


SEGMENTATION = Task(NUM_CLASSES, 1, lambda scores, scenes: task_loss(scores, scenes.labels), mean_iou)
CENTRES = Task(NUM_CLASSES - 1, HEAT_STRIDE, heat_loss, mean_average_precision, bias=-4.0)
