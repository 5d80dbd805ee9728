"""Pictures of learned masks; needs matplotlib (extra ``viz``). pyplot is not used: no window opens, no backend is chosen."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._eager import acc_dtype
from .diagnostics import describe

try:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    if error.name != "matplotlib":
        raise
    raise ModuleNotFoundError(
        "maskd_triton.viz needs matplotlib, which is not installed: pip install 'maskd-triton[viz]'", name="matplotlib"
    ) from error

__all__ = ["plot_masks"]

_PER_LINE = 8  # masks beside each other; further ones go on the next line
_FONT = 9.0  # points: 11 pixels where a figure of 14 inches is shown 1200 pixels wide
_SMALLEST_FONT = 4.5  # numbers that would have to be smaller are left out
# Inches. The layout is computed, not left to matplotlib's solvers: rows stay evenly spaced beside the taller Dice matrices.
_PICTURE = 1.4  # wide enough for a title in _FONT
_GAP = 0.08
_TITLE = 0.36  # two lines above a mask
_LEFT, _TOP, _BOTTOM = 0.3, 0.5, 0.1  # the levels' names, the legend
_TICKS = 0.3  # beside and below a Dice matrix
_BAR, _BAR_LABELS = 0.15, 0.55


@torch.no_grad()
def plot_masks(
    images: Tensor,
    masks: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
) -> Figure:
    r"""Every mask of every level over its image, with its weight and coverage, and each level's pairwise Dice coefficients.

    Coverage is a mask's mean value over the image's pixels; Dice coefficients are means over the images given,
    ``2 G_ij / (G_ii + G_jj + 2e-12)`` with ``G_ij = sum_p m_i m_j``. A level takes a row per image (more for more than 8
    tokens) and the Dice matrix at the right, whose numbers are left out where they would be too small to read.

    Args:
        images: ``[N, 3, H, W]``, in ``[0, 1]``, or normalised and given with ``mean`` and ``std``.
        masks: ``[N, T, h, w]`` of each level, as `MaskModule.masks` gives them.
        weights: ``[N, T]`` of each level, as `MaskModule.weights` gives them; None: masks without weights.
        mean: three numbers that the images were normalised with, ``(image - mean) / std``.
        std: see ``mean``.
        names: a name for each level; None: ``level 0`` and so on.

    Returns:
        A figure to ``savefig``, about 14 inches wide for 6 tokens. Its ``axes`` are, level by level, each image followed by its
        masks, then the level's Dice matrix; the colour bar comes last.

    Tensors may have any float dtype and device.

    Raises:
        ValueError: no image or level, shapes or lengths that do not fit, ``mean`` without ``std``, values outside ``[0, 1]``.
        ModuleNotFoundError: on import, if matplotlib is not installed.

    Examples:
        >>> import torch
        >>> from maskd_triton import MaskModule
        >>> from maskd_triton.viz import plot_masks
        >>> module, x = MaskModule(16, num_tokens=4), torch.randn(2, 16, 8, 8)
        >>> figure = plot_masks(torch.rand(2, 3, 32, 32), [module.masks(x)], [module.weights(x)])
        >>> len(figure.axes)  # 2 images with 4 masks each, a Dice matrix, a colour bar
        12
    """
    pictures = _pictures(images, mean, std)
    _check_levels(images, masks, weights, names)
    n, height, width = pictures.shape[:3]
    columns = min(max(m.shape[1] for m in masks), _PER_LINE)
    picture_height = _PICTURE * min(max(height / width, 0.4), 2.0)
    pitch = _TITLE + picture_height + _GAP
    lines = [-(-m.shape[1] // columns) for m in masks]  # of masks for one image, rounded up
    rows = [n * k * pitch for k in lines]
    matrices = [min(max(0.34 * m.shape[1], 1.2), 3.2, max(h - _TITLE - _TICKS, 1.2)) for m, h in zip(masks, rows, strict=True)]
    blocks = [max(h, _TITLE + matrix + _TICKS) + _GAP for h, matrix in zip(rows, matrices, strict=True)]
    dice_left = _LEFT + (1 + columns) * (_PICTURE + _GAP) + _TICKS
    bar_left = dice_left + max(matrices) + 2 * _GAP
    figure = Figure(figsize=(bar_left + _BAR + _BAR_LABELS, _TOP + sum(blocks) + _BOTTOM))

    def place(left: float, top: float, wide: float, high: float) -> Axes:
        w, h = figure.get_size_inches()
        return figure.add_axes((left / w, 1 - (top + high) / h, wide / w, high / h))

    legend = ("" if weights is None else "w: weight (bold: the image's largest), ") + "c: coverage (mean mask value)"
    figure.text(
        _LEFT / figure.get_figwidth(),
        1 - 0.1 / figure.get_figheight(),
        f"Receptive tokens\n{legend}",
        va="top",
        fontsize=_FONT + 1,
    )
    top = _TOP
    for level, m in enumerate(masks):
        m = m.detach().cpu().to(acc_dtype(m.dtype))
        w = None if weights is None else weights[level].detach().cpu()
        for image in range(n):
            line = top + image * lines[level] * pitch + _TITLE
            axis = place(_LEFT, line, _PICTURE, picture_height)
            axis.imshow(pictures[image].numpy())
            axis.set_title(f"image {image}", fontsize=_FONT)
            axis.set_ylabel(f"{names[level] if names else f'level {level}'}: {m.shape[2]}x{m.shape[3]}", fontsize=_FONT)
            axis.set(xticks=[], yticks=[])
            for token in range(m.shape[1]):
                row, column = divmod(token, columns)
                left = _LEFT + (1 + column) * (_PICTURE + _GAP)
                axis = place(left, line + row * pitch, _PICTURE, picture_height)
                _draw_mask(axis, pictures[image], m[image, token])
                weight = "" if w is None else f"w {w[image, token]:.2f}   "
                largest = w is not None and token == w[image].argmax()
                axis.set_title(
                    f"token {token}\n{weight}c {m[image, token].mean():.2f}",
                    fontsize=_FONT,
                    fontweight="bold" if largest else "normal",
                )
        _draw_dice(place(dice_left, top + _TITLE, matrices[level], matrices[level]), describe(m).dice, matrices[level])
        top += blocks[level]
    bar = place(bar_left, _TOP + _TITLE, _BAR, min(blocks[0] - _TITLE - _GAP, 3.0))
    figure.colorbar(ScalarMappable(Normalize(0, 1), "inferno"), cax=bar).set_label("mask value", fontsize=_FONT)
    bar.tick_params(labelsize=_FONT - 1)
    return figure


def _draw_mask(axis: Axes, picture: Tensor, mask: Tensor) -> None:
    extent = (0, picture.shape[1], picture.shape[0], 0)
    axis.imshow(picture.mean(2).numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
    axis.imshow(mask.numpy(), cmap="inferno", vmin=0, vmax=1, alpha=0.7, extent=extent, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def _draw_dice(axis: Axes, dice: Tensor, inches: float) -> None:
    tokens = len(dice)
    axis.imshow(dice.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set_title("pairwise Dice", fontsize=_FONT)
    ticks = range(0, tokens, -(-tokens // 20))
    axis.set_xticks(ticks)
    axis.set_yticks(ticks)
    axis.tick_params(labelsize=_FONT - 2, length=0, pad=2)
    font = min(_FONT - 1, 0.45 * 72 * inches / tokens)  # a number is 1.7 times as wide as its font is high
    if font < _SMALLEST_FONT:
        return
    for i, row in enumerate(dice.tolist()):
        for j, value in enumerate(row):
            number = f"{value:.2f}".removeprefix("0").replace("1.00", "1")
            axis.text(j, i, number, ha="center", va="center", fontsize=font, color="white" if value > 0.6 else "black")


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
