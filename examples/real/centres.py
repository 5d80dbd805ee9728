"""Detection without anchors: heatmaps of centres, and distances to the sides of boxes (as TTFNet, arXiv 1909.00700)."""

import io
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, max_pool2d

from . import EXTRA
from .data import CELLS, Objects
from .models import STRIDE

CLASSES = len(CELLS)
SPREAD = 0.54 / 6  # deviation of a centre's Gaussian, in sides of its box
BOX_WEIGHT = 5.0
DETECTIONS = 100  # an image, as on COCO


def encode(objects: Objects, level: tuple[int, int]) -> Tensor:
    """``[3 + 4 + 1, h, w]``: heatmaps of the classes, the box that a cell belongs to, and how much the cell counts for it."""
    target = torch.zeros(CLASSES + 5, *level)
    heat, box, weight = target.split((CLASSES, 4, 1))
    cells = grid(level)
    areas = (objects.boxes[:, 2:] - objects.boxes[:, :2]).prod(1)
    for i in areas.argsort(descending=True).tolist():  # where objects overlap, the smaller one has the cell
        corners = objects.boxes[i]
        middle, sides = (corners[:2] + corners[2:]) / 2, corners[2:] - corners[:2]
        nearest = ((cells - middle[:, None, None]) / STRIDE).square().sum(0).argmin()
        deviation = (SPREAD * sides)[:, None, None].clamp(min=STRIDE / 6)
        gaussian = (-((cells - cells.flatten(1)[:, nearest, None, None]) / deviation).square().sum(0) / 2).exp()
        heat[objects.classes[i]] = heat[objects.classes[i]].maximum(gaussian)
        own = gaussian > 0.05
        box[:, own] = corners[:, None]
        weight[0, own] = gaussian[own]
    return target


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Focal loss of the heatmaps for each object, and the GIoU loss of the boxes."""
    scores = outputs[:, :CLASSES]
    heat, boxes, weight = targets.split((CLASSES, 4, 1), 1)
    found, centre = scores.sigmoid(), heat == 1
    at_centres = (1 - found).square() * logsigmoid(scores) * centre
    around = found.square() * logsigmoid(-scores) * (1 - heat) ** 4
    focal = -(at_centres + around).sum() / centre.sum().clamp(min=1)
    return focal + BOX_WEIGHT * (giou_loss(decode(outputs), boxes) * weight[:, 0]).sum() / weight.sum().clamp(min=1)


def decode(outputs: Tensor) -> Tensor:
    """Boxes ``[N, 4, h, w]`` in pixels: each cell gives the logarithms of its distances to the four sides."""
    distances = STRIDE * outputs[:, CLASSES:].clamp(max=4).exp()
    cells = grid(outputs.shape[2:])
    return torch.cat([cells - distances[:, :2], cells + distances[:, 2:]], 1)


def grid(level: tuple[int, int]) -> Tensor:
    """``[2, h, w]``: x and y of the middle of each cell in pixels."""
    y, x = torch.meshgrid(*(STRIDE * (torch.arange(n) + 0.5) for n in level), indexing="ij")
    return torch.stack([x, y])


def giou_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - generalised IoU (arXiv 1902.09630) of boxes along dimension 1."""
    both = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    union = sum((x[:, 2:] - x[:, :2]).prod(1) for x in (a, b)) - both
    return 2 - both / union.clamp(min=1e-6) - union / hull.clamp(min=1e-6)


def detections(outputs: Tensor) -> Tensor:
    """``[N, k, 6]``: box, score and class of the highest peaks of the heatmaps."""
    scores = outputs[:, :CLASSES].sigmoid()
    peaks = scores * (scores == max_pool2d(scores, 3, 1, 1))
    best, where = peaks.flatten(1).topk(min(DETECTIONS, peaks[0].numel()))
    cells = where % scores[0, 0].numel()
    boxes = decode(outputs).flatten(2).gather(2, cells[:, None].expand(-1, 4, -1)).transpose(1, 2)
    return torch.cat([boxes, best[..., None], (where // scores[0, 0].numel())[..., None]], 2)


def average_precision(rows: Iterable[Tensor], objects: Sequence[Objects], classes: int = CLASSES) -> dict[str, float]:
    """COCO's mAP at IoU .5:.95 and at .5, by pycocotools. ``rows [k, 6]`` of an image are as `detections` gives them."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ModuleNotFoundError as error:
        raise SystemExit(f"mAP needs the package pycocotools: {EXTRA}") from error
    truth, found = COCO(), COCO()
    images, categories = [{"id": i} for i in range(len(objects))], [{"id": i} for i in range(classes)]
    truth.dataset = {
        "images": images,
        "categories": categories,
        "annotations": annotations([(x.boxes, x.classes) for x in objects]),
    }
    found.dataset = {
        "images": images,
        "categories": categories,
        "annotations": annotations([(x[:, :4], x[:, 5].long(), x[:, 4]) for x in rows]),
    }
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        judge = COCOeval(truth, found, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {"mAP": float(judge.stats[0]), "mAP50": float(judge.stats[1])}


def annotations(images: list[tuple[Tensor, ...]]) -> list[dict[str, object]]:
    """COCO's records of (boxes, classes, scores) of every image."""
    records: list[dict[str, object]] = []
    for image, (boxes, classes, *scores) in enumerate(images):
        sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
        for k, (box, label) in enumerate(zip(sides.tolist(), classes.tolist(), strict=True)):
            record = {"id": len(records) + 1, "image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3]}
            records.append(record | {"iscrowd": 0} | ({"score": float(scores[0][k])} if scores else {}))
    return records
