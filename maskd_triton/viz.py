"""Pictures of learned masks; needs matplotlib (extra ``viz``). pyplot is not used: no window opens, no backend is chosen."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._eager import acc_dtype
from .diagnostics import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_masks"]

_FONT = 9.0  # points
_MOST_NUMBERED = 12  # tokens; the numbers of a larger Dice matrix would be too small to read


@torch.no_grad()
def plot_masks(
    images: Tensor,
    masks: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
) -> "Figure":
    r"""Every mask of every level over its image, with its weight and coverage, and each level's pairwise Dice coefficients.

    Coverage is a mask's mean value over the image's pixels. Dice coefficients are means over the images given:
    ``2 G_ij / (G_ii + G_jj + 2e-12)`` with ``G_ij = sum_p m_i m_j``. A level takes a row per image and the Dice matrix at the
    right, whose numbers are left out for more than 12 tokens; a single token has no matrix.

    Args:
        images: ``[N, 3, H, W]``, in ``[0, 1]``, or normalised and given with ``mean`` and ``std``.
        masks: ``[N, T, h, w]`` of each level, as `MaskModule.masks` gives them.
        weights: ``[N, T]`` of each level, as `MaskModule.weights` gives them; None: masks without weights.
        mean: three numbers that the images were normalised with, ``(image - mean) / std``.
        std: see ``mean``.
        names: a name for each level; None: ``level 0`` and so on.

    Returns:
        A figure to ``savefig``, about 14 inches wide for 6 tokens. Its ``axes`` are, level by level, each image followed by its
        masks, then the Dice matrix of a level with several tokens; the colour bar comes last.

    Tensors may have any float dtype and device.

    Raises:
        ValueError: no image or level, shapes or lengths that do not fit, ``mean`` without ``std``, values outside ``[0, 1]``.
        ModuleNotFoundError: matplotlib is not installed.

    Examples:
        >>> import torch
        >>> from maskd_triton import MaskModule
        >>> from maskd_triton.viz import plot_masks
        >>> module, x = MaskModule(16, num_tokens=4), torch.randn(2, 16, 8, 8)
        >>> figure = plot_masks(torch.rand(2, 3, 32, 32), [module.masks(x)], [module.weights(x)])
        >>> len(figure.axes)  # 2 images with 4 masks each, a Dice matrix, a colour bar
        12
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot_masks needs matplotlib, which is not installed: pip install matplotlib", name="matplotlib"
        ) from error
    pictures = _pictures(images, mean, std)
    _check_levels(images, masks, weights, names)
    n, most = len(pictures), max(m.shape[1] for m in masks)
    columns = 1 + most
    matrix = [min(max(columns / 3, 2), 3)] if most > 1 else []  # its width, in pictures
    height = 0.8 + 1.5 * min(max(pictures.shape[1] / pictures.shape[2], 0.4), 3)  # of a row, in inches, with its titles
    figure = Figure(figsize=(1.5 * (columns + sum(matrix)) + 1, height * n * len(masks) + 0.6), layout="constrained")
    legend = [] if weights is None else ["w: weight (bold: the image's largest)"]
    lines = ["Receptive tokens", *legend, "c: coverage (mean mask value)"]
    figure.suptitle((", " if most > 1 else "\n").join(lines), fontsize=_FONT + 1)
    grid = figure.add_gridspec(n * len(masks), columns + len(matrix), width_ratios=[1] * columns + matrix)
    for level, m in enumerate(masks):
        m = m.detach().cpu().to(acc_dtype(m.dtype))
        w = None if weights is None else weights[level].detach().cpu()
        name = f"{names[level] if names else f'level {level}'}: {m.shape[2]}x{m.shape[3]}"
        for image in range(n):
            row = level * n + image
            axis = figure.add_subplot(grid[row, 0], xticks=[], yticks=[])
            axis.imshow(pictures[image].numpy())
            axis.set_title(f"image {image}", fontsize=_FONT)
            axis.set_ylabel(name, fontsize=_FONT)
            for token, mask in enumerate(m[image]):
                axis = figure.add_subplot(grid[row, 1 + token], xticks=[], yticks=[])
                _draw_mask(axis, pictures[image], mask)
                weight = "" if w is None else f"w {w[image, token]:.2f}   "
                bold = w is not None and token == w[image].argmax()
                title = f"token {token}\n{weight}c {mask.mean():.2f}"
                axis.set_title(title, fontsize=_FONT, fontweight="bold" if bold else "normal")
        if m.shape[1] > 1:
            _draw_dice(figure.add_subplot(grid[level * n : (level + 1) * n, -1]), describe(m).dice)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), "inferno"), ax=figure.axes, shrink=0.6, pad=0.01, aspect=30)
    bar.set_label("mask value", fontsize=_FONT)
    bar.ax.tick_params(labelsize=_FONT - 1)
    return figure


def _draw_mask(axis: "Axes", picture: Tensor, mask: Tensor) -> None:
    extent = (0, picture.shape[1], picture.shape[0], 0)
    axis.imshow(picture.mean(2).numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
    axis.imshow(mask.numpy(), cmap="inferno", vmin=0, vmax=1, alpha=0.7, extent=extent, interpolation="nearest")


def _draw_dice(axis: "Axes", dice: Tensor) -> None:
    axis.imshow(dice.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set_title("pairwise Dice", fontsize=_FONT)
    ticks = range(0, len(dice), -(-len(dice) // 12))
    axis.set_xticks(ticks)
    axis.set_yticks(ticks)
    axis.tick_params(labelsize=_FONT - 2, length=0, pad=2)
    for i, row in enumerate(dice.tolist() if len(dice) <= _MOST_NUMBERED else ()):
        for j, value in enumerate(row):
            number = f"{value:.2f}".removeprefix("0").replace("1.00", "1")
            colour = "white" if value > 0.6 else "black"
            axis.text(j, i, number, ha="center", va="center", fontsize=_FONT - 1 - len(dice) / 4, color=colour)


def _pictures(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """``[N, H, W, 3]`` in ``[0, 1]`` on the CPU."""
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images: expected [N, 3, H, W] with at least one image and pixel, got shape {list(images.shape)}")
    pictures = images.detach().cpu().to(torch.float32).permute(0, 2, 3, 1)
    if (mean is None) != (std is None):
        raise ValueError("mean and std: expected both, or neither for images in [0, 1]")
    if mean is not None and std is not None:
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"mean and std: expected three numbers each, got {mean!r} and {std!r}")
        pictures = pictures * torch.tensor(std) + torch.tensor(mean)
    low, high = pictures.min().item(), pictures.max().item()
    if low < -0.1 or high > 1.1:  # an interpolation may overshoot a little
        raise ValueError(
            f"images: expected values in [0, 1]{'' if mean is None else ' after mean= and std='}, got {low:.2f} to {high:.2f}; "
            "give the mean= and std= they were normalised with"
        )
    return pictures.clamp(0, 1)


def _check_levels(
    images: Tensor, masks: Sequence[Tensor], weights: Sequence[Tensor] | None, names: Sequence[str] | None
) -> None:
    if len(masks) == 0:
        raise ValueError("masks: expected at least one level, got none")
    for name, given in (("weights", weights), ("names", names)):
        if given is not None and len(given) != len(masks):
            raise ValueError(f"{name}: expected one for each of the {len(masks)} levels, got {len(given)}")
    for i, m in enumerate(masks):
        if m.dim() != 4 or m.shape[0] != len(images) or 0 in m.shape:
            raise ValueError(f"masks[{i}]: expected [N, T, h, w] for {len(images)} images, got shape {list(m.shape)}")
        if weights is not None and weights[i].shape != m.shape[:2]:
            raise ValueError(f"weights[{i}]: expected shape {list(m.shape[:2])}, as masks[{i}], got {list(weights[i].shape)}")
