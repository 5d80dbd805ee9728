"""Test images, their truth and what teacher and students find there; the masks of the tokens; scores against weights."""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor
from torch.nn.functional import interpolate

from maskd_triton import viz

from .centres import detections
from .data import CELLS, SIZE
from .losses import ALONE, MASKD, RECOMMENDED
from .models import Net, make_student
from .study import Study, best_weight, student_file, tried_weights
from .training import prepared

STREETS = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist", "no class")
STREET_COLOURS = (
    *("#87beeb", "#964b3c", "#d7d7be", "#7d4687", "#e196c3", "#4b8732", "#fac828", "#5a508c", "#2846c8", "#e13c32", "#00beb4"),
    "#000000",
)
CELL_COLOURS = ("#e0483e", "#2b6cd4", "#1f9d55")
SURE = 0.3  # score of the detections that are drawn


@torch.no_grad()
def compare(study: Study, images: list[int]) -> Figure:
    """A row for each image of the test split: image, truth, teacher, student alone, student with MasKD."""
    task = study.task
    pictures = task.test.images[images]
    students = {name: student(study, name) for name in (ALONE, MASKD)}
    found = {name: net(pictures) for name, net in {"teacher": study.teacher, **students}.items()}
    names, colours, draw = STYLES[task.name]
    columns = ["image", "truth", *found]
    figure = Figure(figsize=(2.4 * len(columns), 1.85 * len(images) + 0.5), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for row, (index, picture) in enumerate(zip(images, pictures, strict=True)):
        answers = [None, task.test.truth[index], *(outputs[row : row + 1] for outputs in found.values())]
        for axis, answer in zip(axes[row], answers, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy())
            axis.set_axis_off()
            if answer is not None:
                draw(axis, answer)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=10)
    patches = [Patch(color=colour, label=name) for name, colour in zip(names, colours, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    return figure


@torch.no_grad()
def masks(study: Study, images: list[int]) -> Figure:
    """The masks of the recommended tokens over test images."""
    pictures = study.task.test.images[images]
    module, level = study.learner(RECOMMENDED).mask_modules[0], study.teacher.features(pictures)
    weights = [module.weights(level)] if module.weight_mask else None
    return viz.plot_masks(pictures / 255, [module.masks(level)], weights, names=["stride 8"])


def weights(study: Study) -> Figure:
    """Scores on val against the weights that were tried; a dot is the weight that is reported."""
    metric = study.task.metric
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for loss, tried in tried_weights(study.lines, metric).items():
        (line,) = axis.semilogx(sorted(tried), [tried[weight] for weight in sorted(tried)], label=loss)
        best = best_weight(tried)
        axis.plot(best, tried[best], "o", color=line.get_color())
    axis.set(xlabel="loss weight", ylabel=f"val {metric}, one seed")
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def student(study: Study, loss: str) -> Net:
    net = prepared(make_student(study.task.outputs), pretrained=False)
    net.load_state_dict(torch.load(student_file(study.out, loss), weights_only=True))
    return net.eval()


def draw_streets(axis: Axes, answer: Tensor) -> None:
    """Labels, or a net's outputs."""
    labels = answer if answer.dim() == 2 else interpolate(answer, SIZE, mode="bilinear").argmax(1)[0]
    axis.imshow(torch.tensor([to_rgb(colour) for colour in STREET_COLOURS])[labels.long()].numpy())


def draw_cells(axis: Axes, answer: Any) -> None:
    """Objects, or a net's outputs."""
    if isinstance(answer, Tensor):
        rows = detections(answer)[0]
        rows = rows[rows[:, 4] > SURE]
        boxes, classes = rows[:, :4], rows[:, 5].long()
    else:
        boxes, classes = answer.boxes, answer.classes
    for (x0, y0, x1, y1), label in zip(boxes.tolist(), classes.tolist(), strict=True):
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=CELL_COLOURS[label], linewidth=1.2))


STYLES = {"camvid": (STREETS, STREET_COLOURS, draw_streets), "bccd": (CELLS, CELL_COLOURS, draw_cells)}
