"""The rows of docs/integrations.md on models of detectron2, mmdet, timm, torchvision and ultralytics, where they are installed.

`tests/test_integrations.py` has the same rows on small models that return what these return, for machines without them.
"""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maskd_triton import MaskLearner, capture

PAGE = (Path(__file__).parents[1] / "docs/integrations.md").read_text()
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def torchvision_model(kind: str, name: str) -> nn.Module:
    models = pytest.importorskip(f"torchvision.models.{kind}", reason="torchvision is not installed")
    sizes = {"min_size": 64, "max_size": 64} if kind == "detection" else {}
    return getattr(models, name)(weights=None, weights_backbone=None, **sizes)


def timm_model(name: str, **options: Any) -> nn.Module:
    return pytest.importorskip("timm", reason="timm is not installed").create_model(name, pretrained=False, **options)


def features_only() -> nn.Module:
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm_model("resnet18", features_only=True, out_indices=(2, 3))

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return self.backbone(images)

    return Segmenter()


def yolo() -> nn.Module:
    tasks = pytest.importorskip("ultralytics.nn.tasks", reason="ultralytics is not installed")
    return tasks.DetectionModel("yolov8n.yaml", verbose=False)


def mmdet_retinanet() -> nn.Module:
    pytest.importorskip("mmcv.ops", reason="mmcv is not installed, or mmcv-lite")
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    from mmengine.hub import get_model

    return get_model("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", pretrained=False)


def faster_rcnn_of_detectron2() -> nn.Module:
    zoo = pytest.importorskip("detectron2.model_zoo", reason="detectron2 is not installed")
    from detectron2.modeling import build_model

    config = zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", trained=False)
    config.MODEL.DEVICE, config.MODEL.RPN.POST_NMS_TOPK_TEST = "cpu", 10
    return build_model(config)


# library, class, how to build it, and the channels of its levels
MODELS: list[tuple[str, str, Callable[[], nn.Module], list[int]]] = [
    ("torchvision", "FasterRCNN", lambda: torchvision_model("detection", "fasterrcnn_resnet50_fpn"), [256] * 5),
    ("torchvision", "RetinaNet", lambda: torchvision_model("detection", "retinanet_resnet50_fpn"), [256] * 5),
    ("torchvision", "DeepLabV3", lambda: torchvision_model("segmentation", "deeplabv3_resnet50"), [2048]),
    ("timm", "FeatureListNet", features_only, [128, 256]),
    ("timm", "VisionTransformer", lambda: timm_model("vit_tiny_patch16_224", img_size=64), [192]),
    ("timm", "SwinTransformer", lambda: timm_model("swin_tiny_patch4_window7_224", img_size=64), [96, 192]),
    ("ultralytics", "DetectionModel", yolo, [64, 128, 256]),
    ("mmdet", "RetinaNet", mmdet_retinanet, [256] * 5),
    ("mmdet", "RetinaHead", mmdet_retinanet, [256] * 5),
    ("detectron2", "GeneralizedRCNN", faster_rcnn_of_detectron2, [256] * 5),
]


def row(library: str, name: str) -> tuple[Any, dict[str, Any]]:
    """The arguments that the page gives to ``attach`` for a model."""
    (line,) = re.findall(rf"^\| {library} .*`{name}`.*?\| `attach\(teacher, (.*?)\)` \|$", PAGE, re.M)
    call = ast.parse(f"attach({line})", mode="eval").body
    assert isinstance(call, ast.Call)
    return ast.literal_eval(call.args[0]), {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize(("library", "name", "build", "channels"), MODELS, ids=lambda x: x if isinstance(x, str) else "")
def test_row(library: str, name: str, build: Callable[[], nn.Module], channels: list[int]) -> None:
    torch.manual_seed(0)
    teacher, (names, options) = build().eval(), row(library, name)
    images = [{"image": 255 * image} for image in IMAGES] if library == "detectron2" else IMAGES
    with torch.no_grad():
        _, levels = capture.call(teacher, names, images, **options)
    levels = list(levels.values()) if isinstance(levels, dict) else levels
    assert [level.shape[1] for level in levels] == channels
    learner = MaskLearner(channels, num_tokens=2)
    with learner.attach(teacher, names, **options):
        teacher(images)
        learner.dice_loss().backward()
    assert [len(level.coverage) for level in learner.diagnostics().values()] == [2] * len(channels)
    assert all(module.mask_token.grad is not None for module in learner.mask_modules)
