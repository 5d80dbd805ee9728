"""Both stages, end to end, on real architectures with random weights: nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskd_triton import MaskedDistillLoss, MaskLearner

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 5, (2, 64, 64), generator=torch.Generator().manual_seed(1))


class SegFormer(nn.Module):
    """Semantic segmentation; the levels are the encoder's four hidden states."""

    module, field = "model.segformer", "hidden_states"

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        config = transformers.SegformerConfig(
            hidden_sizes=widths, depths=[1] * 4, decoder_hidden_size=16, num_labels=5, num_attention_heads=[1, 1, 2, 2]
        )
        self.model = transformers.SegformerForSemanticSegmentation(config)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        result = self.model(images, output_hidden_states=True, return_dict=True)
        logits = nn.functional.interpolate(result.logits, images.shape[-2:], mode="bilinear")
        return nn.functional.cross_entropy(logits, LABELS), list(result.hidden_states)


class ResNetBackbone(nn.Module):
    """A detector's backbone, ``BackboneOutput.feature_maps``, under a small dense head."""

    module, field = "backbone", None

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        config = transformers.ResNetConfig(
            embedding_size=widths[0], hidden_sizes=widths, depths=[1] * 4, layer_type="basic",
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
        self.backbone = transformers.AutoBackbone.from_config(config)
        self.heads = nn.ModuleList(nn.Conv2d(w, 5, 1) for w in widths)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        levels = list(self.backbone(images).feature_maps)
        size = images.shape[-2:]
        maps = [nn.functional.interpolate(head(x), size, mode="bilinear") for head, x in zip(self.heads, levels, strict=True)]
        return nn.functional.cross_entropy(sum(maps), LABELS), levels


class TorchvisionDetector(nn.Module):
    """Faster R-CNN, which returns losses in train mode only; the levels are its FPN's OrderedDict."""

    module, field = "detector.backbone", None

    def __init__(self, _widths: list[int]) -> None:
        super().__init__()
        detection = pytest.importorskip("torchvision.models.detection", reason="torchvision is not installed")
        self.detector = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=64
        )

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.detector.train()
        torch.manual_seed(0)  # its samplers draw proposals at random
        targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 56.0]]), "labels": torch.tensor([1])} for _ in images]
        calls = []
        with self.detector.backbone.register_forward_hook(lambda _module, _inputs, levels: calls.append(levels)):
            losses = self.detector(list(images), targets)
        (levels,) = calls
        return sum(losses.values()), list(levels.values())


@pytest.mark.parametrize("architecture", [SegFormer, ResNetBackbone, TorchvisionDetector])
def test_both_stages(architecture: Callable[[list[int]], Any]) -> None:
    torch.manual_seed(0)
    teacher, student = architecture([16, 32, 48, 64]), architecture([8, 16, 24, 32])
    with torch.no_grad():
        channels, narrow = ([x.shape[1] for x in model(IMAGES)[1]] for model in (teacher, student))
    fit(teacher.parameters(), lambda: teacher(IMAGES)[0], 10)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    learner = MaskLearner(channels, num_tokens=4)
    with learner.attach(teacher, architecture.module, output=architecture.field):
        losses = fit(learner.parameters(), lambda: teacher(IMAGES)[0] + learner.dice_loss(), 12)
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())

    teacher.eval()
    with torch.no_grad():
        features = teacher(IMAGES)[1]
    criterion = MaskedDistillLoss(channels, 4, student_channels=narrow, custom_mask_warmup=6, pretrained=learner)

    def distillation() -> Tensor:
        task, levels = student(IMAGES)
        return task + criterion(levels, features)

    losses = fit([*student.parameters(), *criterion.parameters()], distillation, 12)
    assert losses[-1] < 0.9 * losses[0]
    assert int(criterion.warmup_step) == 12


def fit(parameters: Any, loss: Callable[[], Tensor], steps: int) -> list[float]:
    optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses
