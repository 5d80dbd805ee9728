"""Scenes of real handwritten digits on real photographs, with a class per pixel. Nothing is downloaded."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

SIZE = 40  # pixels per side of a scene
NUM_CLASSES = 11  # 0 is background, 1 + d is the digit d
SIZES = range(15, 21)  # of a digit in pixels: at most a quarter of a scene

# Shares of the digits (in the data set's order) and of the photographs' columns: splits share nothing.
SPLITS = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}


@dataclass(frozen=True)
class Scenes:
    """``images [N, 3, 40, 40]`` in [-1, 1], and ``labels [N, 40, 40]`` with values below NUM_CLASSES."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice) -> "Scenes":
        return Scenes(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "Scenes":
        return Scenes(self.images.to(device), self.labels.to(device))


def make_scenes(split: str, count: int, seed: int = 0) -> Scenes:
    """``count`` scenes of two or three digits, each in its own quarter so that none hides another."""
    rng = np.random.default_rng([seed, list(SPLITS).index(split)])
    digits, classes = _digits(split)
    photos = _photos(split)
    images = np.empty((count, 3, SIZE, SIZE), dtype=np.float32)
    labels = np.zeros((count, SIZE, SIZE), dtype=np.int64)
    for image, label in zip(images, labels, strict=True):
        photo = photos[rng.integers(len(photos))]
        top, left = (rng.integers(side - SIZE + 1) for side in photo.shape[1:])
        image[:] = photo[:, top : top + SIZE, left : left + SIZE]
        for quarter in rng.permutation(4)[: rng.integers(2, 4)]:
            index, size = rng.integers(len(classes)), int(rng.choice(SIZES))
            ink = digits[size][index]
            corner = np.array(divmod(quarter, 2)) * (SIZE // 2)
            row, column = corner + rng.integers(SIZE // 2 - size + 1, size=2)
            rows, columns = slice(row, row + size), slice(column, column + size)
            colour = rng.uniform(size=(3, 1, 1))
            image[:, rows, columns] = ink * colour + (1 - ink) * image[:, rows, columns]
            label[rows, columns][ink > 0.4] = 1 + classes[index]
    return Scenes(torch.from_numpy(images) * 2 - 1, torch.from_numpy(labels))


def _digits(split: str) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """The split's digits as opacities in [0, 1], enlarged to every size, and their classes."""
    data = load_digits()
    part = _share(split, len(data.target))
    ink = torch.from_numpy(data.images[part]).float()[:, None] / 16
    enlarged = {s: interpolate(ink, (s, s), mode="bilinear")[:, 0].numpy() for s in SIZES}
    return enlarged, data.target[part]


def _photos(split: str) -> list[np.ndarray]:
    """The split's columns of both photographs at half size, as ``[3, H, W]`` in [0, 1]."""
    photos = [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]
    halves = [avg_pool2d(photo, 2).numpy() for photo in photos]
    return [half[:, :, _share(split, half.shape[2])] for half in halves]


def _share(split: str, length: int) -> slice:
    start, stop = SPLITS[split]
    return slice(round(start * length), round(stop * length))
