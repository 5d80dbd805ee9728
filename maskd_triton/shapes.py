"""Features of other shapes as views ``[N, C, H, W]``, valid pixels of a padded batch, and masks made of boxes."""

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from ._checks import listed, positive_int

__all__ = ["boxes_to_masks", "from_nhwc", "from_packed", "from_tokens", "valid_pixels"]


def from_tokens(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A ViT's tokens as features: ``[N, L, C]`` to ``[N, C, H, W]``, a view.

    Drop class and register tokens first: ``from_tokens(x[:, 1:], size)`` for one class token.

    Args:
        x: tokens ``[N, H W, C]``, row by row, of any dtype.
        size: rows and columns ``(H, W)`` of the grid.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        TypeError: a ``size`` that is no pair of ints.
        ValueError: another number of dimensions or tokens.

    Examples:
        >>> import torch
        >>> from maskd_triton import shapes
        >>> tokens = torch.randn(2, 1 + 14 * 14, 384)
        >>> shapes.from_tokens(tokens[:, 1:], (14, 14)).shape
        torch.Size([2, 384, 14, 14])
    """
    height, width = pair(size, "size")
    if x.dim() != 3 or x.shape[1] != height * width:
        raise ValueError(
            f"x: expected tokens [N, {height * width}, C] for a grid of {height}x{width}, got shape {list(x.shape)} "
            "(class and register tokens must be dropped before)"
        )
    return x.transpose(1, 2).unflatten(2, (height, width))


def from_nhwc(x: Tensor) -> Tensor:
    """Channels-last features, such as Swin's, as ``[N, C, H, W]``, a view.

    Args:
        x: features ``[N, H, W, C]`` of any dtype.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: another number of dimensions.

    Examples:
        >>> import torch
        >>> from maskd_triton import shapes
        >>> shapes.from_nhwc(torch.randn(2, 7, 9, 96)).shape
        torch.Size([2, 96, 7, 9])
    """
    if x.dim() != 4:
        raise ValueError(f"x: expected features [N, H, W, C], got shape {list(x.shape)}")
    return x.permute(0, 3, 1, 2)


def from_packed(x: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Tokens of several scales in one tensor, as in deformable DETR's encoder, as a list of levels; views.

    Args:
        x: ``[N, sum H_i W_i, C]``, one scale after the other, of any dtype.
        sizes: ``(H_i, W_i)`` of each level, also as an array or tensor ``[levels, 2]``; reading a tensor waits for its device.

    Returns:
        Levels ``[N, C, H_i, W_i]``.

    Raises:
        TypeError: sizes that are no pairs of ints.
        ValueError: another number of dimensions or tokens.

    Examples:
        >>> import torch
        >>> from maskd_triton import shapes
        >>> [level.shape for level in shapes.from_packed(torch.randn(2, 8 * 8 + 4 * 4, 256), [(8, 8), (4, 4)])]
        [torch.Size([2, 256, 8, 8]), torch.Size([2, 256, 4, 4])]
    """
    pairs = [pair(size, f"sizes[{i}]") for i, size in enumerate(listed(sizes))]
    lengths = [height * width for height, width in pairs]
    if x.dim() != 3 or x.shape[1] != sum(lengths):
        raise ValueError(f"x: expected tokens [N, {sum(lengths)}, C] for levels {pairs}, got shape {list(x.shape)}")
    return [from_tokens(level, size) for level, size in zip(x.split(lengths, 1), pairs, strict=True)]


def pair(size: Any, name: str) -> tuple[int, int]:
    """``size`` as ``(H, W)``; TypeError or ValueError unless it is a pair of positive ints, of Python, numpy or torch."""
    try:
        height, width = map(index, size)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected a pair (H, W) of ints, got {size!r}") from error
    if min(height, width) < 1:
        raise ValueError(f"{name}: expected a pair (H, W) of positive ints, got {size!r}")
    return height, width


def valid_pixels(
    image_sizes: Sequence[tuple[int, int]], size: tuple[int, int], device: torch.device | str | None = None
) -> Tensor:
    """A mask of the pixels that belong to images, for ``valid=``, in a batch padded at the bottom and on the right.

    Args:
        image_sizes: ``(h, w)`` of every image before padding, also as an array or tensor ``[N, 2]``.
        size: height and width ``(H0, W0)`` of the padded batch.
        device: of the result; None: the default device.

    Returns:
        bool ``[N, H0, W0]``, True on images.

    Raises:
        TypeError: sizes that are no pairs of ints.
        ValueError: an image larger than ``size``.

    Examples:
        >>> from maskd_triton import shapes
        >>> shapes.valid_pixels([(2, 3), (1, 2)], (2, 3))
        tensor([[[ True,  True,  True],
                 [ True,  True,  True]],
        <BLANKLINE>
                [[ True,  True, False],
                 [False, False, False]]])
    """
    height, width = pair(size, "size")
    sizes = [pair(image, f"image_sizes[{i}]") for i, image in enumerate(listed(image_sizes))]
    for i, (h, w) in enumerate(sizes):
        if h > height or w > width:
            raise ValueError(f"image_sizes[{i}]: expected at most {(height, width)}, got {(h, w)}")
    ends = torch.tensor(sizes, dtype=torch.int64).view(-1, 2).to(device, non_blocking=True)
    rows, columns = torch.arange(height, device=ends.device), torch.arange(width, device=ends.device)
    return (rows < ends[:, :1])[:, :, None] & (columns < ends[:, 1:])[:, None, :]


def boxes_to_masks(
    boxes: Sequence[Tensor],
    image_size: tuple[int, int],
    level_sizes: Sequence[tuple[int, int]],
    classes: Sequence[Tensor] | None = None,
    num_classes: int | None = None,
) -> list[Tensor]:
    r"""Masks of the pixels that lie in boxes, for ``masks=``: one mask an image, or one for every class.

    $$
    m_{ntyx} = 1 \text{ if a box of image n (and class t) has }
    x_0 \le (x + 0.5) W_0 / W_i < x_1 \text{ and } y_0 \le (y + 0.5) H_0 / H_i < y_1, \quad 0 \text{ otherwise}
    $$

    A pixel of a level counts if its centre lies in a box. A box between the centres of a coarse level leaves its mask empty. So
    does a box whose ``x1`` is below ``x0``, without an error: convert COCO's ``(x, y, w, h)``, and boxes from 0 to 1, before.

    Args:
        boxes: ``[k, 4]`` of every image: ``(x0, y0, x1, y1)`` in pixels of the batch, of any real dtype; ``k`` may be 0.
        image_size: height and width ``(H0, W0)`` of the batch that the models are called with, padding included.
        level_sizes: ``(H_i, W_i)`` of each level, also as an array or tensor ``[levels, 2]``.
        classes: ints ``[k]`` of every image, from 0 to ``num_classes - 1``; None: one mask for all boxes.
        num_classes: T, how many masks an image gets with ``classes``; give it, so that every batch gets equally many. None: as
            many as the largest class of this batch needs, which waits for the device.

    Returns:
        For each level float32 ``[N, T, H_i, W_i]`` of 0 and 1 on the boxes' device; T = 1 without ``classes``.

    Raises:
        TypeError: boxes or classes that are no tensors; sizes that are no pairs of ints; a ``num_classes`` that is no int.
        ValueError: other shapes; classes that are no ints; ``num_classes`` without ``classes``; a class that is out of range,
            which is checked on the CPU only.

    Examples:
        >>> import torch
        >>> from maskd_triton import shapes
        >>> boxes = [torch.tensor([[0, 0, 16, 8], [8, 8, 32, 32]]), torch.zeros(0, 4)]
        >>> classes = [torch.tensor([0, 1]), torch.zeros(0, dtype=torch.int64)]
        >>> shapes.boxes_to_masks(boxes, (32, 32), [(4, 4)])[0][0]
        tensor([[[1., 1., 0., 0.],
                 [0., 1., 1., 1.],
                 [0., 1., 1., 1.],
                 [0., 1., 1., 1.]]])
        >>> [m.shape for m in shapes.boxes_to_masks(boxes, (32, 32), [(4, 4), (2, 2)], classes, num_classes=3)]
        [torch.Size([2, 3, 4, 4]), torch.Size([2, 3, 2, 2])]
    """
    height, width = pair(image_size, "image_size")
    sizes = [pair(size, f"level_sizes[{i}]") for i, size in enumerate(listed(level_sizes))]
    if classes is None and num_classes is not None:
        raise ValueError("num_classes: expected None without classes, which say what class each box has")
    for i, found in enumerate(boxes):
        if not isinstance(found, Tensor):
            raise TypeError(f"boxes[{i}]: expected a tensor [k, 4], got {type(found).__name__}")
        if found.dim() != 2 or found.shape[1] != 4:
            raise ValueError(f"boxes[{i}]: expected [k, 4] (x0, y0, x1, y1), got shape {list(found.shape)}")
    if classes is None:
        owners = [torch.ones(len(found), 1, device=found.device) for found in boxes]
    else:
        owners = _owners(boxes, classes, num_classes)
    levels = []
    for h, w in sizes:
        cells = [_within(found, (height / h, width / w), (h, w)) for found in boxes]
        masks = [(owner.T @ inside).clamp(max=1).unflatten(1, (h, w)) for owner, inside in zip(owners, cells, strict=True)]
        levels.append(torch.stack(masks) if masks else torch.zeros(0, num_classes or 1, h, w))
    return levels


def _owners(boxes: Sequence[Tensor], classes: Sequence[Tensor], num_classes: int | None) -> list[Tensor]:
    """``[k, T]`` of every image: 1 for the class of each box."""
    if len(classes) != len(boxes):
        raise ValueError(f"classes: expected a tensor for each of the {len(boxes)} images, got {len(classes)}")
    for i, (found, own) in enumerate(zip(boxes, classes, strict=True)):
        if not isinstance(own, Tensor):
            raise TypeError(f"classes[{i}]: expected an int tensor [{len(found)}], got {type(own).__name__}")
        if own.shape != found.shape[:1] or own.is_floating_point() or own.is_complex() or own.dtype == torch.bool:
            raise ValueError(f"classes[{i}]: expected ints [{len(found)}], got {own.dtype} of shape {list(own.shape)}")
    if num_classes is None:
        num_classes = 1 + max([0, *(int(own.max()) for own in classes if len(own))])
    else:
        num_classes = positive_int(num_classes, "num_classes")
    owners = []
    for i, own in enumerate(classes):
        if own.device.type == "cpu" and len(own) and not 0 <= own.min() <= own.max() < num_classes:
            raise ValueError(f"classes[{i}]: expected classes from 0 to {num_classes - 1}, got {own.unique().tolist()}")
        owners.append((own[:, None] == torch.arange(num_classes, device=own.device)).float())
    return owners


def _within(boxes: Tensor, stride: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """float ``[k, H W]``: which pixels of a level have their centre in each box."""
    y, x = ((torch.arange(n, device=boxes.device) + 0.5) * s for n, s in zip(size, stride, strict=True))
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    return (((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]).flatten(1).float()
