"""One small net for dense predictions in two sizes: a teacher, and a student a sixteenth of it."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import interpolate

from .digits_data import NUM_CLASSES, SIZE


class PyramidNet(nn.Module):
    """Backbone (strides 2, 4, 8), feature pyramid ``neck`` with three levels, head that sums the levels."""

    def __init__(self, widths: Sequence[int], neck_width: int) -> None:
        super().__init__()
        self.neck_channels = [neck_width] * len(widths)
        self.backbone = Backbone(widths)
        self.neck = Pyramid(widths, neck_width)
        self.head = Head(neck_width, len(widths))

    def features(self, images: Tensor) -> list[Tensor]:
        """The levels that are distilled."""
        return self.neck(self.backbone(images))

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``[N, NUM_CLASSES, H, W]`` at the size of the images."""
        return self.scores(self.features(images))

    def scores(self, levels: list[Tensor]) -> Tensor:
        return interpolate(self.head(levels), (SIZE, SIZE), mode="bilinear")


def make_teacher() -> PyramidNet:
    return PyramidNet((32, 64, 128), 64)


def make_student() -> PyramidNet:
    return PyramidNet((8, 16, 32), 16)


class Backbone(nn.Module):
    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(conv_bn_relu(before, width, stride=2), Residual(width))
            for before, width in zip((3, *widths), widths, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(conv_bn_relu(width, width), conv_bn_relu(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x)


class Pyramid(nn.Module):
    """A top-down feature pyramid."""

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in widths)

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        levels = [conv(x) for conv, x in zip(self.lateral, stages, strict=True)]
        for i in reversed(range(len(levels) - 1)):
            levels[i] = levels[i] + interpolate(levels[i + 1], levels[i].shape[-2:], mode="nearest")
        return [conv(x) for conv, x in zip(self.smooth, levels, strict=True)]


class Head(nn.Module):
    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv_bn_relu(width, width) for _ in range(levels))
        self.classify = nn.Conv2d(width, NUM_CLASSES, 1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        first, *others = [conv(x) for conv, x in zip(self.convs, levels, strict=True)]
        for x in others:
            first = first + interpolate(x, first.shape[-2:], mode="bilinear")
        return self.classify(first)


def conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
