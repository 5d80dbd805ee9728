"""Small models whose modules give levels in the ways that users' models do."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.utils.checkpoint import checkpoint

from maskd_triton import MaskLearner

IMAGES = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))


def learner_of(*channels: int, **options: Any) -> MaskLearner:
    torch.manual_seed(1)
    learner = MaskLearner(list(channels), num_tokens=3, **options)
    with torch.no_grad():
        for module in learner.mask_modules:
            module.mask_token.mul_(100)
    return learner


def seeded(module: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return module()


def gradients(learner: MaskLearner, loss: Tensor) -> list[Tensor]:
    learner.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in learner.parameters()]


def no_hooks(*models: nn.Module) -> bool:
    return all(not m._forward_hooks and not m._forward_pre_hooks for model in models for m in model.modules())


class Yolo(nn.Module):
    """Levels of separate modules, the second made of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.p3, self.p4 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p3 = self.p3(x)
        return p3, self.p4(p3)


class SharedHead(nn.Module):
    """One tower for all levels, called once for each."""

    def __init__(self, reentrant: bool | None = None, pool: int = 2) -> None:
        super().__init__()
        self.body, self.tower = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.reentrant, self.pool = reentrant, pool

    def extract_feat(self, x: Tensor) -> list[Tensor]:
        run = (lambda y: self.tower(y).relu()) if self.reentrant is not None else self.tower
        x = self.body(x)
        parts = [x, avg_pool2d(x, self.pool)]
        return [run(y) if self.reentrant is None else checkpoint(run, y, use_reentrant=self.reentrant) for y in parts]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.extract_feat(x)


class Blocks(nn.Module):
    """A backbone whose block gives maps, NHWC maps or tokens; and a head that takes either."""

    def __init__(self, layout: str, prefix: int = 0) -> None:
        super().__init__()
        self.patch, self.block, self.layout, self.prefix = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 6), layout, prefix

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).permute(0, 2, 3, 1)
        if self.layout == "tokens":
            x = x.flatten(1, 2)
            x = torch.cat([x[:, : self.prefix] + 7, x], 1)
        return self.block(x)

    def maps(self, x: Tensor) -> Tensor:
        if self.layout == "tokens":
            return x[:, self.prefix :].transpose(1, 2).unflatten(2, (4, 6))
        return x.permute(0, 3, 1, 2)


class NestedTensor:
    """DETR's; with ``image_sizes`` torchvision's ImageList."""

    def __init__(self, tensors: Tensor, mask: Tensor | None = None) -> None:
        self.tensors, self.mask = tensors, mask


class Checkpointed(nn.Module):
    """The block in a checkpointed segment with a batch norm behind it; the head in one of its own."""

    def __init__(self, kind: str | None, head: bool = False) -> None:
        super().__init__()
        self.stem, self.block, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 2, 1)
        self.kind, self.last, self.runs = kind, head, 0

    def _segment(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.norm(self.block(x)).relu()

    def _run(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return part(x) if self.kind is None else checkpoint(part, x, use_reentrant=self.kind == "reentrant")

    def forward(self, x: Tensor) -> Tensor:
        x = self._segment(self.stem(x)) if self.last else self._run(self._segment, self.stem(x))
        return self._run(lambda y: self.head(y).square(), x) if self.last else self.head(x)
