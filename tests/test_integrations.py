"""The table of docs/integrations.md: every line does what it says, on transformers' models and on faithful stand-ins."""

import ast
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from maskd_triton import MaskedDistillLoss, MaskLearner, capture

PAGE = (Path(__file__).parents[1] / "docs/integrations.md").read_text()
ROWS = re.findall(r"^\| \w+ (`\w+`.*?) \|.*?\| `attach\(teacher, (.*?)\)` \|$", PAGE, re.M)
LINES = [(name, call) for names, call in ROWS for name in re.findall(r"`(\w+)`", names) if name != "AutoBackbone"]
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 64, 64, dtype=torch.int64)
MASK[1, 24:] = 0

Built = tuple[nn.Module, list[int], dict[str, Any]]  # a model, channels of its levels, arguments of its call
MODELS: dict[str, Callable[[], Built]] = {}


def model(*names: str) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    def registered(build: Callable[[], Built]) -> Callable[[], Built]:
        MODELS.update(dict.fromkeys(names, build))
        return build

    return registered


# transformers


def hf() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed")


TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def resnet(**options: Any) -> Any:
    return hf().ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **options)


@model("ResNetBackbone")
def _backbone() -> Built:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = hf().AutoBackbone.from_config(resnet(out_features=["stage1", "stage2"]))

        def forward(self, images: Tensor) -> Any:
            return self.backbone(images).feature_maps

    return Detector(), [8, 16], {"images": IMAGES}


@model("SegformerForSemanticSegmentation")
def _segformer() -> Built:
    config = hf().SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=3
    )
    return (
        hf().SegformerForSemanticSegmentation(config),
        [8, 16, 24, 32],
        {"pixel_values": IMAGES},
    )


@model("ConvNextModel")
def _convnext() -> Built:
    return (
        hf().ConvNextModel(hf().ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)),
        [8, 16],
        {"pixel_values": IMAGES},
    )


@model("ViTModel")
def _vit() -> Built:
    return hf().ViTModel(hf().ViTConfig(image_size=64, patch_size=16, **TRANSFORMER)), [32], {"pixel_values": IMAGES}


@model("Dinov2WithRegistersModel")
def _registers() -> Built:
    config = hf().Dinov2WithRegistersConfig(image_size=64, patch_size=16, **TRANSFORMER)
    return hf().Dinov2WithRegistersModel(config), [32], {"pixel_values": IMAGES}


@model("DINOv3ViTModel")
def _dinov3() -> Built:
    config = hf().DINOv3ViTConfig(patch_size=16, num_register_tokens=4, **TRANSFORMER)
    return hf().DINOv3ViTModel(config), [32], {"pixel_values": IMAGES}


@model("SwinModel")
def _swin() -> Built:
    config = hf().SwinConfig(image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    return hf().SwinModel(config), [32, 32], {"pixel_values": IMAGES}


@model("DetrForObjectDetection")
def _detr() -> Built:
    config = hf().DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=resnet(out_features=["stage2"]), d_model=16, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        num_queries=4, num_labels=3,
    )  # fmt: skip
    return hf().DetrForObjectDetection(config), [16], {"pixel_values": IMAGES, "pixel_mask": MASK}


@model("RTDetrForObjectDetection")
def _rtdetr() -> Built:
    backbone = hf().RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = hf().RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[16, 24, 32], encoder_hidden_dim=32, d_model=32, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, decoder_layers=1, num_queries=5,
        decoder_in_channels=[32] * 3, num_labels=3,
    )  # fmt: skip
    return hf().RTDetrForObjectDetection(config), [32] * 3, {"pixel_values": IMAGES, "pixel_mask": MASK}


@model("Mask2FormerForUniversalSegmentation")
def _mask2former() -> Built:
    backbone = hf().SwinConfig(
        image_size=64, embed_dim=16, depths=[1] * 4, num_heads=[2] * 4, window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = hf().Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=4, num_labels=3,
    )  # fmt: skip
    return hf().Mask2FormerForUniversalSegmentation(config), [32] * 3, {"pixel_values": IMAGES}


# The others, by what their modules return


class Pyramid(nn.Module):
    """Two levels, handed over as the library does."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.fine, self.coarse, self.wrap = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2), wrap

    def forward(self, images: Tensor) -> Any:
        fine = self.fine(images)
        return self.wrap(fine, self.coarse(fine))


class Detector(nn.Module):
    def __init__(self, name: str, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.add_module(name, Pyramid(wrap))
        self.name = name

    def forward(self, images: Tensor) -> Any:
        return self.get_submodule(self.name)(images)


def levels_of_fpn(p3: Tensor, p4: Tensor) -> Any:
    return OrderedDict([("0", p3), ("pool", p4)])


@model("GeneralizedRCNN")
def _pyramid() -> Built:
    return Detector("backbone", levels_of_fpn), [8, 8], {"images": IMAGES}


@model("FasterRCNN", "RetinaNet")
def _torchvision() -> Built:
    class GeneralizedRCNNTransform(nn.Module):
        def forward(self, images: list[Tensor], targets: Any = None) -> tuple[Any, Any]:
            batch = torch.stack([pad(x, (0, 0, 0, 64 - x.shape[1])) for x in images])
            return SimpleNamespace(tensors=batch, image_sizes=[(x.shape[1], x.shape[2]) for x in images]), targets

    class GeneralizedRCNN(Detector):
        def __init__(self) -> None:
            super().__init__("backbone", levels_of_fpn)
            self.transform = GeneralizedRCNNTransform()

        def forward(self, images: list[Tensor], targets: Any = None) -> Any:
            batch, targets = self.transform(images, targets)
            return self.backbone(batch.tensors)

    return GeneralizedRCNN(), [8, 8], {"images": [IMAGES[0], IMAGES[1, :, :24]]}


@model("mmdet RetinaNet")
def _neck() -> Built:
    return Detector("neck", lambda p3, p4: (p3, p4)), [8, 8], {"images": IMAGES}


@model("FeatureListNet")
def _features_only() -> Built:
    return Detector("backbone", lambda p3, p4: [p3, p4]), [8, 8], {"images": IMAGES}


@model("DeepLabV3")
def _deeplab() -> Built:
    return Detector("backbone", lambda p3, p4: OrderedDict(aux=p3, out=p4)), [8], {"images": IMAGES}


@model("VisionTransformer")
def _timm_vit() -> Built:
    class VisionTransformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed, self.cls_token = nn.Conv2d(3, 8, 16, 16), nn.Parameter(torch.randn(1, 1, 8))
            self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3)))

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            return self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))

    return VisionTransformer(), [8], {"x": IMAGES}


@model("SwinTransformer")
def _timm_swin() -> Built:
    class Stage(nn.Module):
        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(*sizes)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    class SwinTransformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(Stage(3, 8, 4, 4), Stage(8, 16, 2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.permute(0, 2, 3, 1))

    return SwinTransformer(), [8, 16], {"x": IMAGES}


@model("DetectionModel")
def _yolo() -> Built:
    class DetectionModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(*(nn.Identity() for _ in range(23)))
            for i, sizes in {2: (3, 8, 4, 4), 15: (8, 8, 1), 18: (8, 16, 2, 2), 21: (16, 24, 2, 2)}.items():
                self.model[i] = nn.Conv2d(*sizes)

        def forward(self, x: Tensor) -> list[Tensor]:
            kept = []
            for i, layer in enumerate(self.model):
                x = layer(x)
                kept += [x] if i in (15, 18, 21) else []
            return kept

    return DetectionModel(), [8, 16, 24], {"x": IMAGES}


@model("RetinaHead")
def _shared_tower() -> Built:
    class RetinaHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)])

        def forward(self, levels: list[Tensor]) -> list[Tensor]:
            return [self.cls_convs[1](self.cls_convs[0](x)) for x in levels]

    class RetinaNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neck, self.bbox_head = nn.Conv2d(3, 8, 4, 4), RetinaHead()

        def forward(self, images: Tensor) -> list[Tensor]:
            x = self.neck(images)
            return self.bbox_head([x, avg_pool2d(x, 2)])

    return RetinaNet(), [8, 8], {"images": IMAGES}


@model("DETR")
def _original_detr() -> Built:
    class Joiner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 8, 8, 8)

        def forward(self, samples: Any) -> tuple[list[Any], list[Tensor]]:
            x = self.body(samples.tensors)
            return [SimpleNamespace(tensors=x, mask=samples.mask[:, ::8, ::8])], [torch.zeros_like(x)]

    class DETR(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.input_proj = Joiner(), nn.Conv2d(8, 4, 1)

        def forward(self, samples: Any) -> Tensor:
            features, _ = self.backbone(samples)
            return self.input_proj(features[-1].tensors)

    return DETR(), [8], {"samples": SimpleNamespace(tensors=IMAGES, mask=MASK == 0)}


def leaves(result: Any) -> list[Tensor]:
    """All tensors that carry gradients in what a model returned."""
    if isinstance(result, Tensor):
        return [result] if result.requires_grad else []
    values = result.values() if hasattr(result, "values") else result if isinstance(result, list | tuple) else []
    return [x for value in values for x in leaves(value)]


def test_every_line_is_tested() -> None:
    assert len(ROWS) == PAGE.count("| `attach(teacher, ")
    assert {name for name, _ in LINES} | {"mmdet RetinaNet"} == set(MODELS)


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize(("name", "line"), LINES)
def test_line(name: str, line: str) -> None:
    torch.manual_seed(0)
    build = MODELS["mmdet RetinaNet" if "neck" in line else name]
    teacher, channels, arguments = build()
    call = ast.parse(f"attach({line})", mode="eval").body
    assert isinstance(call, ast.Call)
    names, options = ast.literal_eval(call.args[0]), {k.arg: ast.literal_eval(k.value) for k in call.keywords}

    _, levels = capture.call(teacher.eval(), names, **arguments, **{k: v for k, v in options.items() if k != "valid"})
    levels = list(levels.values()) if isinstance(levels, dict) else levels
    assert [x.shape[1] for x in levels] == channels
    assert all(x.dim() == 4 for x in levels)

    learner = MaskLearner(channels, num_tokens=3, standardize=True)
    with learner.calibrate(teacher, names, **options):
        teacher(**arguments)
    whole = [len(x) * x.shape[2] * x.shape[3] for x in levels]
    for module, x, pixels in zip(learner.mask_modules, levels, whole, strict=True):
        assert (module.pixels_seen < pixels) == ("valid" in options)
        if "valid" not in options:
            torch.testing.assert_close(module.channel_mean, x.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    with learner.attach(teacher, names, **options):
        found = leaves(teacher(**arguments))
        (sum(x.float().square().mean() for x in found) + learner.dice_loss()).backward()
    assert found
    assert all(module.mask_token.grad.abs().max() > 0 for module in learner.mask_modules)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.filterwarnings("ignore")
def test_hidden_states_that_transformers_collects() -> None:
    """It does so by hooks of its own, which stay in the model from its first call on."""
    (teacher, _, arguments), learner = _vit(), MaskLearner(32, num_tokens=3)
    plain = teacher.eval()(**arguments, output_hidden_states=True).hidden_states[1]
    for _ in range(2):
        with learner.attach(teacher, "layers.0", layout="tokens", prefix_tokens=1):
            masked = teacher(**arguments, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(masked[:, 0], plain[:, 0])
        torch.testing.assert_close(masked[:, 1:], plain[:, 1:] / 2, rtol=0.2, atol=0.1)  # of untrained tokens


@pytest.mark.filterwarnings("ignore")
def test_outputs_of_a_backbone_are_levels() -> None:
    """Of criterion and learner, as of attach and capture."""
    backbone = hf().AutoBackbone.from_config(resnet(out_features=["stage1", "stage2"])).eval()
    learner = MaskLearner([8, 16], num_tokens=3)
    criterion = MaskedDistillLoss([8, 16], 3, pretrained=learner)
    with torch.no_grad():
        teacher = backbone(IMAGES)
    want = criterion([2 * x for x in teacher.feature_maps], teacher.feature_maps)
    student = type(teacher)(feature_maps=tuple(2 * x for x in teacher.feature_maps))
    torch.testing.assert_close(criterion(student, teacher), want)
    torch.testing.assert_close(criterion(list(student.feature_maps), teacher), want)
    masked = learner(teacher)
    assert type(masked) is type(teacher)
    for a, b in zip(masked.feature_maps, learner(teacher.feature_maps), strict=True):
        assert torch.equal(a, b)
