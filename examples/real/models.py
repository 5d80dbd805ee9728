"""Teacher and student: an EfficientNet-Lite, a feature pyramid of one level at stride 8, and a head."""

from torch import Tensor, nn
from torch.nn.functional import interpolate

from .backbone import EfficientNetLite

STRIDE = 8  # of the level that is distilled
TEACHER_WIDTH, STUDENT_WIDTH = 128, 64  # its channels


class Net(nn.Module):
    """``head(neck(backbone(images)))``; the output of ``neck``, ``[N, width, H / 8, W / 8]``, is what is distilled."""

    def __init__(self, backbone: EfficientNetLite, width: int, outputs: int) -> None:
        super().__init__()
        self.width = width
        self.backbone = backbone
        self.neck = Pyramid(backbone.channels, width)
        self.head = nn.Sequential(*conv_bn_relu(width), nn.Conv2d(width, outputs, 1))

    def features(self, images: Tensor) -> Tensor:
        return self.neck(self.backbone(images))

    def late_features(self, early: Tensor) -> Tensor:
        return self.neck(self.backbone.late(early))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Pyramid(nn.Module):
    """Adds the levels up from the top, and returns the one at stride 8."""

    def __init__(self, channels: list[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.smooth = nn.Sequential(*conv_bn_relu(width), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, levels: list[Tensor]) -> Tensor:
        *below, x = [conv(level) for conv, level in zip(self.lateral, levels, strict=True)]
        for level in reversed(below):
            x = level + interpolate(x, level.shape[2:], mode="bilinear")
        return self.smooth(x)


def make_teacher(outputs: int) -> Net:
    """Lite2 with all stages: strides 8, 16 and 32; 128 channels."""
    return Net(EfficientNetLite("lite2", stages=7), TEACHER_WIDTH, outputs)


def make_student(outputs: int) -> Net:
    """The first 11 blocks of Lite0: strides 8 and 16; 64 channels."""
    return Net(EfficientNetLite("lite0", stages=5), STUDENT_WIDTH, outputs)


def conv_bn_relu(width: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
