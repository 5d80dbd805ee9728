"""A ViT teacher without a task head (DINOv3's architecture), a convolutional student at another image size and stride.

Stage 1 needs a task loss, so a linear segmentation head is trained on the frozen tokens first. Extra: ``recipes``.

python -m examples.recipes.vit_teacher [masks.png]
"""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from examples.recipes import EXTRA, missing
from maskd_triton import FrozenTeacher, MaskedDistillLoss, MaskLearner, shapes

try:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel, ResNetBackbone, ResNetConfig
except ModuleNotFoundError as error:
    raise missing(error, EXTRA) from None

CLASSES = 4  # background and three kinds of boxes
PREFIX = 5  # a class token and four registers in front of the patches
WHERE = {"layout": "tokens", "prefix_tokens": PREFIX}  # of the norm behind the last block


class ViT(nn.Module):
    """Patch tokens ``[N, L, C]`` of images in [0, 1]: the teacher normalises for itself, whatever the student is given."""

    def __init__(self, width: int = 64, patch: int = 8) -> None:
        super().__init__()
        config = DINOv3ViTConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4, patch_size=patch,
            num_register_tokens=PREFIX - 1,
        )  # fmt: skip
        self.channels = width
        self.model = DINOv3ViTModel(config)  # random weights; in practice ``from_pretrained``
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """The patches as a map ``[N, C, h, w]``, a view."""
        size = images.shape[2] // self.model.config.patch_size, images.shape[3] // self.model.config.patch_size
        tokens = self.model((images - self.mean) / self.std).last_hidden_state
        return shapes.from_tokens(tokens[:, PREFIX:], size)


class Student(nn.Module):
    """Scores of every pixel, and the features at stride 8."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        config = ResNetConfig(
            embedding_size=width, hidden_sizes=[width, 2 * width], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        )
        self.channels = 2 * width
        self.backbone, self.head = ResNetBackbone(config), nn.Conv2d(2 * width, CLASSES, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        (features,) = self.backbone(images).feature_maps
        return self.head(features), features


def batches(count: int, images: int = 8, side: int = 96, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise with a box of every kind, in [0, 1], and the class of every pixel."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.eye(CLASSES, 3).roll(1, 0)[:, :, None, None] * 0.5
    for _ in range(count):
        x, y = torch.rand(images, 3, side, side, generator=generator) / 2, torch.zeros(images, side, side, dtype=torch.int64)
        for n in range(images):
            for kind in range(1, CLASSES):
                top, left = torch.randint(side * 2 // 3, (2,), generator=generator).tolist()
                box = (slice(top, top + side // 3), slice(left, left + side // 3))
                x[n, :, box[0], box[1]] += colours[kind]
                y[n, box[0], box[1]] = kind
        yield x.clamp(0, 1), y


def task_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at the size of the labels."""
    return cross_entropy(interpolate(scores, labels.shape[1:], mode="bilinear"), labels)


def train_head(teacher: nn.Module, head: nn.Module, steps: int) -> list[float]:
    """A linear probe: the teacher is frozen, the head learns the task. Once per teacher and task."""
    optimizer, frozen, losses = torch.optim.Adam(head.parameters(), lr=0.01), FrozenTeacher(teacher), []
    for images, labels in batches(steps, seed=1):
        loss = task_loss(head(frozen(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def learn_tokens(teacher: ViT, head: nn.Module, steps: int) -> tuple[MaskLearner, list[float]]:
    """Stage 1: the head, outside of what is attached and not in the optimiser, sees masked tokens."""
    learner = MaskLearner(teacher.channels, num_tokens=4, standardize=True)
    with learner.calibrate(teacher.model, "norm", **WHERE):
        for images, _ in batches(4, seed=1):
            teacher(images)
    optimizer, losses = torch.optim.Adam(learner.parameters(), lr=0.01), []
    with learner.attach(teacher.model, "norm", **WHERE):
        for images, labels in batches(steps, seed=2):
            loss = task_loss(head(teacher(images)), labels) + learner.dice_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return learner, losses


def draw(criterion: MaskedDistillLoss, teacher: nn.Module, path: str) -> str:
    """The masks over three images, where matplotlib is installed; what happened."""
    try:
        from maskd_triton.viz import plot_masks
    except ModuleNotFoundError as error:
        return str(error)
    ((images, _),) = batches(1, images=3, seed=4)
    plot_masks(images, [criterion.masks(teacher(images))]).savefig(path)
    return f"masks: {path}"


def main(steps: int = 60, picture: str | None = None) -> list[float]:
    """All three trainings, each for so many steps; the losses of the student's."""
    torch.manual_seed(0)
    vit, student = ViT(), Student()
    head = nn.Conv2d(vit.channels, CLASSES, 1)
    report("head", train_head(vit, head, steps))
    learner, losses = learn_tokens(vit, head, steps)
    report("tokens and Dice", losses)
    teacher = FrozenTeacher(vit)
    criterion = MaskedDistillLoss(
        vit.channels, 4, student_channels=student.channels, distance="cosine", resize="student", standardize=True,
        pretrained=learner,
    )  # fmt: skip
    optimizer = torch.optim.AdamW([*student.parameters(), *criterion.parameters()], lr=3e-3)
    tasks, distances = [], []
    for images, labels in batches(steps, seed=3):
        scores, features = student(interpolate(images, (64, 64), mode="area"))  # 8x8 features; the teacher's are 12x12
        task, distance = task_loss(scores, labels), criterion(features, teacher(images))
        optimizer.zero_grad()
        (task + distance).backward()
        optimizer.step()
        tasks.append(float(task.detach()))
        distances.append(float(distance.detach()))
    report("student's task", tasks)
    report("student's masked cosine", distances)
    if picture is not None:
        print(draw(criterion, teacher, picture))
    return [task + distance for task, distance in zip(tasks, distances, strict=True)]


def report(what: str, losses: list[float]) -> None:
    """A line: every tenth loss, and the last."""
    print(f"{what}:", *(f"{loss:.3f}" for loss in [*losses[:-1:10], losses[-1]]))


if __name__ == "__main__":
    main(picture=sys.argv[1] if len(sys.argv) > 1 else None)
