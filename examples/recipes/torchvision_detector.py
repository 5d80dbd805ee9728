"""torchvision: a Faster R-CNN student with an FPN, padded images of several sizes. Needs torchvision.

python -m examples.recipes.torchvision_detector
"""

import torch
from torch import Tensor, nn

from examples.recipes import missing
from maskd_triton import FrozenTeacher, MaskedDistillLoss, MaskLearner

try:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
except ModuleNotFoundError as error:
    raise missing(error, "pip install torchvision") from None

Targets = list[dict[str, Tensor]]


def detector(depth: int) -> FasterRCNN:
    """Randomly initialised; in practice ``fasterrcnn_resnet50_fpn(weights=...)``."""
    backbone = resnet_fpn_backbone(backbone_name=f"resnet{depth}", weights=None, trainable_layers=5)
    return FasterRCNN(backbone, num_classes=3, min_size=96, max_size=128)


class Distilled(nn.Module):
    """Both models see the same transformed images: in train mode torchvision picks a size at random."""

    def __init__(self, student: FasterRCNN, teacher: FasterRCNN, criterion: MaskedDistillLoss) -> None:
        super().__init__()
        self.student, self.teacher, self.criterion = student, FrozenTeacher(teacher.backbone), criterion

    def forward(self, images: list[Tensor], targets: Targets) -> Tensor:
        padded, targets = self.student.transform(images, targets)
        levels = self.student.backbone(padded.tensors)  # an OrderedDict: '0', '1', '2', '3', 'pool'
        proposals, of_rpn = self.student.rpn(padded, levels, targets)
        _, of_boxes = self.student.roi_heads(levels, proposals, padded.image_sizes, targets)
        # valid=: the padding counts neither in the masks nor in their weights
        distillation = self.criterion(levels, self.teacher(padded.tensors), valid=padded)
        return sum(of_rpn.values()) + sum(of_boxes.values()) + distillation


def examples(count: int) -> tuple[list[Tensor], Targets]:
    """Random images of several sizes, one box each."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 96, 96 + 16 * (i % 2), generator=generator) for i in range(count)]
    box = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 60.0]]), "labels": torch.tensor([1])}
    return images, [dict(box) for _ in images]


def main(steps: int = 4) -> list[float]:
    """Both stages; the losses of stage 2."""
    torch.manual_seed(0)
    student, teacher = detector(18), detector(34)
    learner, (images, targets) = MaskLearner([256] * 5, standardize=True), examples(2)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    teacher.train()  # R-CNN returns losses only so; attach keeps its normalisation in eval mode
    padded = {}  # the detector pads by itself: the ImageList that its transform returns says which pixels are valid
    teacher.transform.register_forward_hook(lambda module, arguments, result: padded.update(latest=result[0]))
    where = {"names": "backbone", "valid": lambda *arguments: padded["latest"]}
    with learner.calibrate(teacher, **where):  # mean and deviation of its channels; a few hundred images
        teacher(images, [dict(t) for t in targets])
    with learner.attach(teacher, **where):
        for _ in range(steps):
            loss = sum(teacher(images, [dict(t) for t in targets]).values()) + learner.dice_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    criterion = MaskedDistillLoss([256] * 5, standardize=True, custom_mask_warmup=2, pretrained=learner)
    model = Distilled(student, teacher, criterion)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(images, [dict(t) for t in targets])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    print(main())
