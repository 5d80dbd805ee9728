"""The task: a class for every pixel of a scene."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .digits_data import NUM_CLASSES, Scenes
from .digits_models import PyramidNet

BACKGROUND_WEIGHT = 0.4  # most pixels are background


def task_loss(scores: Tensor, labels: Tensor) -> Tensor:
    weight = torch.ones(NUM_CLASSES, device=scores.device)
    weight[0] = BACKGROUND_WEIGHT
    return cross_entropy(scores, labels, weight)


@torch.no_grad()
def found(net: PyramidNet, images: Tensor) -> Tensor:
    """The class of every pixel, as a net in eval mode finds it."""
    training = net.training
    net.eval()
    classes = net(images).argmax(1)
    net.train(training)
    return classes


@torch.no_grad()
def mean_iou(net: PyramidNet, scenes: Scenes) -> float:
    """Intersection over union over all pixels of all scenes, averaged over the classes that occur."""
    confusion = torch.zeros(NUM_CLASSES**2, device=scenes.labels.device)
    for images, labels in zip(scenes.images.split(200), scenes.labels.split(200), strict=True):
        pairs = labels * NUM_CLASSES + found(net, images)
        confusion += torch.bincount(pairs.flatten(), minlength=NUM_CLASSES**2)
    confusion = confusion.view(NUM_CLASSES, NUM_CLASSES)
    both = confusion.diag()
    return (both / (confusion.sum(0) + confusion.sum(1) - both)).nanmean().item()
