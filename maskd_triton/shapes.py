"""Features of other shapes as views ``[N, C, H, W]``, and which pixels of a padded batch are valid."""

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

__all__ = ["from_nhwc", "from_packed", "from_tokens", "valid_pixels"]


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
    pairs = [pair(size, f"sizes[{i}]") for i, size in enumerate(_listed(sizes))]
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


def _listed(sizes: Any) -> Any:
    """A tensor as lists, with one wait for its device."""
    return sizes.tolist() if isinstance(sizes, Tensor) else sizes


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
    sizes = [pair(image, f"image_sizes[{i}]") for i, image in enumerate(_listed(image_sizes))]
    for i, (h, w) in enumerate(sizes):
        if h > height or w > width:
            raise ValueError(f"image_sizes[{i}]: expected at most {(height, width)}, got {(h, w)}")
    ends = torch.tensor(sizes, dtype=torch.int64).view(-1, 2).to(device, non_blocking=True)
    rows, columns = torch.arange(height, device=ends.device), torch.arange(width, device=ends.device)
    return (rows < ends[:, :1])[:, :, None] & (columns < ends[:, 1:])[:, None, :]
