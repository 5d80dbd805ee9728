"""Statistics of learned masks, which of them add nothing, and a loss weight to start from.

The losses of stage 1 do not show whether masks are of any use. Masks of which one is on everywhere and the others are empty
have a Dice loss near 0 and a low task loss, too; stage 2 is then a plain feature MSE. `LevelDiagnostics.focus` shows it.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ._eager import DICE_EPS, acc_dtype, gram
from ._levels import Levels, labels, unpack
from ._warn import warn

__all__ = [
    "DistillDiagnostics",
    "LevelDiagnostics",
    "LevelReports",
    "collapsed",
    "describe",
    "gradient_ratio",
    "suggest_loss_weight",
    "verdict",
]

PLAIN = 0.05  # focus below this: the student learns the same as from a plain MSE (docs/tokens.md)
EVERYWHERE = 0.98  # such a mask leaves hardly a pixel out
EMPTY = 0.02  # what the sigmoid's tails add up to; a mask of rare small objects alone may come this low, too
COPIES = 0.9  # two masks above this Dice show the student hardly more than one of them
ALL_WEIGHT = 0.95  # what is left for all others is too little to move the loss


@dataclass(frozen=True, eq=False)
class LevelDiagnostics:
    """Statistics of one level's T masks, on the masks' device. Nothing waits for it until you read a value.

    Attributes:
        coverage: ``[T]``, each mask's mean value over images and pixels: 0 empty, 1 on everywhere.
        dice: ``[T, T]``, pairwise Dice coefficients, mean over images: 0 disjoint, 1 equal. The diagonal is 1, and 0 for
            masks that are empty in every image.
        weight: ``[T]``, each mask's mean weight; None without mask weighting.
        entropy: scalar, entropy of an image's mask weights over log T, mean over images: 1 all weights equal (and for
            T = 1), 0 one token has all of it; None without mask weighting. `verdict` says why it matters little.
        focus: scalar, how unequal the pixels are to stage 2, mean over images: 0 if all weigh the same, as in a plain feature
            MSE; .75 if a quarter of them has all the weight.
        emphasis: scalar, the mean weight of a pixel on an object to stage 2 over that of any pixel, mean over images with
            objects: 1 in a plain feature MSE; None where no objects were given.
    """

    coverage: Tensor
    dice: Tensor
    weight: Tensor | None
    entropy: Tensor | None
    focus: Tensor
    emphasis: Tensor | None


@dataclass(frozen=True, eq=False)
class DistillDiagnostics(LevelDiagnostics):
    """`LevelDiagnostics` of a level in stage 2, and its loss.

    Attributes:
        loss: scalar without gradient, the level's share of the criterion's value.
    """

    loss: Tensor


@torch.no_grad()
def describe(
    masks: Tensor, weights: Tensor | None = None, valid: Tensor | None = None, objects: Tensor | None = None
) -> LevelDiagnostics:
    r"""Coverage, overlap, weights and focus of one level's masks.

    $$
    \mathrm{coverage}_t = \operatorname{mean}_{n,p} m_{ntp}, \quad
    \mathrm{dice}_{ij} = \operatorname{mean}_n \frac{2 G_{nij}}{G_{nii} + G_{njj} + 2 \cdot 10^{-12}}, \quad
    G_{nij} = \sum_p m_{nip} m_{njp}, \quad
    \mathrm{entropy} = \operatorname{mean}_n \frac{-\sum_t w_{nt} \log w_{nt}}{\log T}
    $$

    $$
    \mathrm{focus} = \operatorname{mean}_n \Big( 1 - \frac{(\sum_p s_{np})^2}{P \sum_p s_{np}^2} \Big), \quad
    \mathrm{emphasis} = \operatorname{mean}_n \frac{\sum_p o_{np} s_{np} / \sum_p o_{np}}{\sum_p s_{np} / P}, \quad
    s_{np} = \sum_t w_{nt} \frac{m_{ntp}^2}{\sum_q m_{ntq}}
    $$

    ``s`` is the weight that stage 2 gives a pixel's distance (with ``mask_power=2``; without mask weights, ``w = 1 / T``). The
    fraction in the focus is Kish's effective sample size (*Survey Sampling*, 1965) as a share of the P pixels. ``o`` are the
    objects.

    Args:
        masks: ``[N, T, H, W]`` of any float dtype, as `functional.receptive_masks` gives them.
        weights: ``[N, T]`` of any float dtype, as `functional.mask_weights` gives them; None: masks without weights.
        valid: the pixels that count, bool or integer ``[N, H, W]``; None: all.
        objects: bool, integer or float ``[N, H0, W0]``, of any size, 1 where the task's objects are; they are averaged to the
            size of the masks. None: not known.

    Returns:
        Tensors without gradients on the device of the arguments, float32 (float64 for float64), also under autocast. An empty
        batch gives NaN.

    Raises:
        ValueError: shapes that do not fit.

    Examples:
        >>> import torch
        >>> from maskd_triton.diagnostics import describe
        >>> left, both = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
        >>> level = describe(torch.stack([left, both]).view(1, 2, 1, 2), torch.tensor([[0.5, 0.5]]))
        >>> level.coverage, level.dice[0, 1], level.entropy, level.focus
        (tensor([0.5000, 1.0000]), tensor(0.6667), tensor(1.), tensor(0.2000))
    """
    if masks.dim() != 4 or 0 in masks.shape[1:]:
        raise ValueError(f"masks: expected [N, T, H, W] with at least one token and one pixel, got shape {list(masks.shape)}")
    if weights is not None and weights.shape != masks.shape[:2]:
        raise ValueError(f"weights: expected shape {list(masks.shape[:2])}, as the masks, got {list(weights.shape)}")
    if valid is None:
        coverage = masks.mean((0, 2, 3), dtype=acc_dtype(masks.dtype))
    else:
        if valid.shape != (masks.shape[0], *masks.shape[2:]):
            raise ValueError(
                f"valid: expected shape {[masks.shape[0], *masks.shape[2:]]}, as the masks, got {list(valid.shape)}"
            )
        masks = masks.masked_fill((valid == 0)[:, None], 0)  # whatever lies in the padding
        coverage = masks.sum((0, 2, 3), dtype=acc_dtype(masks.dtype)) / (valid != 0).sum()
    dice = _pairwise_dice(masks).mean(0)
    if weights is None:
        return LevelDiagnostics(coverage, dice, None, None, *_pixels(masks, None, valid, objects))
    w = weights.to(acc_dtype(weights.dtype))
    # log 1 = 0: a single token has all the weight and shares it equally
    entropy = torch.special.entr(w).sum(1) / math.log(w.shape[1]) if w.shape[1] > 1 else torch.ones_like(w[:, 0])
    return LevelDiagnostics(coverage, dice, w.mean(0), entropy.mean(), *_pixels(masks, w, valid, objects))


def collapsed(level: LevelDiagnostics) -> list[str]:
    """Sentences that say which tokens of a level add nothing.

    It names masks that are on everywhere, empty masks, masks that are copies of one another, and a token that has all the
    weight, the same in every image or another in each. The thresholds are this module's constants. The other tokens may still
    be useful; `verdict` says whether it matters. Values are copied to the host, which waits for the device.

    Args:
        level: what `describe` or ``diagnostics()`` gave. NaN, from an empty batch, reports nothing.

    Returns:
        A sentence for each kind; an empty list where there is nothing to say.

    Examples:
        >>> import torch
        >>> from maskd_triton.diagnostics import collapsed, describe
        >>> masks = torch.zeros(1, 3, 8, 8)
        >>> masks[:, 1] = 1
        >>> collapsed(describe(masks))
        ['token 1 is on everywhere: coverage 1.00', 'tokens 0 and 2 are empty: coverage below 0.02']
    """
    coverage = level.coverage.tolist()
    everywhere = [t for t, c in enumerate(coverage) if c > EVERYWHERE]
    empty = [t for t, c in enumerate(coverage) if c < EMPTY]
    sentences = [f"token {t} is on everywhere: coverage {coverage[t]:.2f}" for t in everywhere]
    if empty:
        sentences.append(f"{_named(empty)} empty: coverage below {EMPTY}")
    dice = level.dice.tolist()
    left = [t for t in range(len(coverage)) if t not in everywhere and t not in empty]
    while left:
        same = [t for t in left if t == left[0] or dice[left[0]][t] > COPIES]
        left = [t for t in left if t not in same]
        if len(same) > 1:
            least = min(dice[i][j] for i in same for j in same)
            sentences.append(f"{_named(same)} copies: Dice {least:.2f}")
    if level.weight is not None and level.entropy is not None and len(coverage) > 1:
        rulers = [f"token {t} has all the weight" for t, weight in enumerate(level.weight.tolist()) if weight > ALL_WEIGHT]
        if not rulers and level.entropy.item() < 1 - ALL_WEIGHT:
            rulers = ["in each image one token has all the weight, not always the same"]
        sentences += rulers
    return sentences


def verdict(level: LevelDiagnostics, *, standardized: bool = False) -> str:
    """One line: what the masks of a level are to the student, why, and what helps.

    What counts is `LevelDiagnostics.focus`. Below `PLAIN` all pixels weigh the same to stage 2, and it is a plain feature MSE.
    Copies, empty masks and a single token with all the weight do not hurt the student while the focus is above. docs/tokens.md
    has the measurements. Values are copied to the host, which waits for the device.

    Args:
        level: what `describe` or ``diagnostics()`` gave.
        standardized: whether the tokens were learned with ``standardize=``.

    Returns:
        A line that starts with ``"selective"``, ``"plain MSE"``, or, where objects are known and weigh less than other pixels,
        ``"background"``.

    Examples:
        >>> import torch
        >>> from maskd_triton.diagnostics import describe, verdict
        >>> masks = torch.zeros(1, 2, 8, 8)
        >>> masks[:, 1, :, :4] = 1
        >>> verdict(describe(masks))
        'selective: focus 0.50; token 0 is empty: coverage below 0.02'
        >>> verdict(describe(masks, objects=masks[:, 1] == 0))
        'background: focus 0.50, emphasis 0.00; token 0 is empty: coverage below 0.02. Learn with one token'
        >>> masks[:, 1] = 1
        >>> verdict(describe(masks[:, 1:]))
        'plain MSE: focus 0.00; token 0 is on everywhere: coverage 1.00. Learn with standardize=True'
    """
    focus, found = level.focus.item(), collapsed(level)
    kind, figures, remedy = "selective", f"focus {focus:.2f}", ""
    single = len(level.coverage) == 1
    emphasis = math.nan if level.emphasis is None else level.emphasis.item()
    if not math.isnan(emphasis):
        figures += f", emphasis {emphasis:.2f}"
    if focus < PLAIN:  # not NaN, of no image
        kind = "plain MSE"
        if _untrained(level) or (standardized and single):
            remedy = ". Learn longer, with no more weight decay than 1e-3"
        elif standardized:
            remedy = ". Learn with one token, and no more weight decay than 1e-3"
        else:
            remedy = ". Learn with standardize=True"
    elif emphasis < 1:
        longer = ". Learn longer, and compare with a plain feature MSE"
        kind, remedy = "background", longer if single else ". Learn with one token"
    return "; ".join([f"{kind}: {figures}", *found]) + remedy


def _untrained(level: LevelDiagnostics) -> bool:
    """All masks are near 0.5 everywhere: nothing has trained the tokens yet, or weight decay holds them at 0."""
    return bool((level.dice > COPIES).all() and ((level.coverage - 0.5).abs() < 0.1).all())


def is_plain(level: LevelDiagnostics, *, untrained: bool) -> bool:
    """Whether stage 2 would be a plain MSE; of masks that nothing has trained yet only if ``untrained``."""
    return level.focus.item() < PLAIN and (untrained or not _untrained(level))


class LevelReports(dict[Any, LevelDiagnostics]):
    """`LevelDiagnostics` of every level. Printed, a line with the `verdict` of each.

    Args:
        levels: by their keys, or by their indices in a sequence.
        standardized: as in `verdict`.

    Examples:
        >>> import torch
        >>> from maskd_triton.diagnostics import LevelReports, describe
        >>> print(LevelReports({"p3": describe(torch.eye(4).view(1, 1, 4, 4))}))
        level 'p3': selective: focus 0.75
    """

    def __init__(self, levels: Mapping[Any, LevelDiagnostics], *, standardized: bool = False) -> None:
        super().__init__(levels)
        self.standardized = standardized

    def __str__(self) -> str:
        lines = (f"level {name!r}: {verdict(level, standardized=self.standardized)}" for name, level in self.items())
        return "\n".join(lines)


def _pixels(
    masks: Tensor, weights: Tensor | None, valid: Tensor | None, objects: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Focus and emphasis of masks that are 0 where ``valid`` is. Images without a mask, or without objects, do not count."""
    m = masks.flatten(2).to(acc_dtype(masks.dtype))
    w = torch.full_like(m[:, :, 0], 1 / m.shape[1]) if weights is None else weights.to(m.dtype)
    area = m.sum(2)
    share = m / area.where(area > 0, 1)[:, :, None]  # not 1 / area, which overflows where a mask is nearly empty
    s = (w[:, :, None] * m * share).sum(1)  # no einsum: autocast would round it
    counts = torch.ones_like(s) if valid is None else (valid != 0).flatten(1).to(s.dtype)
    mean = s.sum(1) / counts.sum(1)
    focus = (1 - mean * s.sum(1) / s.square().sum(1)).nanmean()
    if objects is None:
        return focus, None
    if objects.dim() != 3 or len(objects) != len(masks):
        raise ValueError(f"objects: expected [N, H, W] of {len(masks)} images, got shape {list(objects.shape)}")
    o = adaptive_avg_pool2d(objects.to(s.dtype)[:, None], (masks.shape[2], masks.shape[3])).flatten(1) * counts
    return focus, ((o * s).sum(1) / o.sum(1) / mean).nanmean()


def _pairwise_dice(masks: Tensor) -> Tensor:
    """``[N, T, H, W]`` -> ``[N, T, T]``."""
    shared = gram(masks.flatten(2))
    area = torch.diagonal(shared, dim1=1, dim2=2)
    return 2 * shared / (area[:, :, None] + area[:, None, :] + DICE_EPS)


def _named(tokens: list[int]) -> str:
    if len(tokens) == 1:
        return f"token {tokens[0]} is"
    joint = " and " if len(tokens) == 2 else ", "
    return f"tokens {joint.join(map(str, tokens))} are"


def gradient_ratio(task_loss: Tensor, distill_loss: Tensor, features: Levels) -> Tensor:
    r"""How hard the distillation pulls at the student's features, compared with the task.

    $$
    \frac{\lVert \partial\, \mathrm{distillation} / \partial s \rVert}{\lVert \partial\, \mathrm{task} / \partial s \rVert}
    $$

    with norms over all levels of the student's features ``s``. The sizes of the losses say little about this: a large loss may
    have a small gradient.

    Half precision loses small gradients and overflows with large ones, on the features or anywhere between them and the loss.
    So each loss is differentiated some six times, multiplied by factors from 1 to 2**30 and further where need be. Norms of
    different factors that agree are taken. Where none do, the ratio is NaN, and a warning says so. One error is not found: a
    part of the gradient that is lost at every factor beside a larger part that is not.

    This waits for the device: call it now and then, not in every step. Both graphs are kept for the step's own backward pass,
    and no ``.grad`` is written.

    Args:
        task_loss: scalar with gradient.
        distill_loss: scalar with gradient, of the same forward pass.
        features: the student's, from which both are computed: a tensor, sequence or mapping.

    Returns:
        float32 scalar on the features' device (float64 for float64).

    Raises:
        ValueError: features without gradient; a loss that depends on none of them, as when features and losses come out of one
            compiled function.

    Examples:
        >>> import torch
        >>> from maskd_triton.diagnostics import gradient_ratio
        >>> s = torch.ones(1, 2, 3, 3, requires_grad=True)
        >>> gradient_ratio(s.sum(), (3 * s).sum(), s)
        tensor(3.)
    """
    levels, keys, _ = unpack(features, "features")
    for x, label in zip(levels, labels(len(levels), keys), strict=True):
        if not x.requires_grad:
            raise ValueError(f"features{label}: expected the student's features with gradient, got a tensor without")
    norms = []
    for name, loss in (("task_loss", task_loss), ("distill_loss", distill_loss)):
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
            raise ValueError(f"{name}: expected a scalar with gradient, got {loss!r}")
        norm = _gradient_norm(loss, levels, name)
        if not loss.isfinite():
            warn(
                f"gradient_ratio: {name}: expected a finite loss, got {loss.item()}; if it overflows in half precision, "
                "compute it in float32, outside of autocast"
            )
        elif math.isnan(norm):
            warn(
                f"gradient_ratio: {name}: its gradient is lost or overflows in half precision, whatever the loss is multiplied "
                "by; compute this loss in float32, outside of autocast"
            )
        norms.append(torch.tensor(norm, dtype=acc_dtype(levels[0].dtype), device=levels[0].device))
    return norms[1] / norms[0]


def _gradient_norm(loss: Tensor, levels: list[Tensor], name: str) -> float:
    """The norm of the gradient of ``loss`` on all levels; NaN where half precision hides it."""
    norms: dict[int, float] = {}
    for exponent in range(0, 97, 6):
        norms[exponent] = _scaled_norm(loss, levels, exponent, name)
        if math.isnan(norms[exponent]) or (exponent >= 30 and _plateau(norms) is not None):
            break
    for exponent in range(-6, -61, -6):
        if _plateau(norms) is not None or not any(norms.values()):
            break
        norms[exponent] = _scaled_norm(loss, levels, exponent, name)
    found = _plateau(norms) if any(norms.values()) else 0.0
    return math.nan if found is None else found


def _scaled_norm(loss: Tensor, levels: list[Tensor], exponent: int, name: str) -> float:
    """The norm by a backward pass of the loss times about ``2**exponent``; NaN where that overflows."""
    factor = torch.full_like(
        loss, 2.0**exponent * (1 + exponent % 42 / 42)
    )  # other digits each time, so that roundings average out
    grads = torch.autograd.grad(loss, levels, factor, retain_graph=True, allow_unused=True)
    found = [g for g in grads if g is not None]
    if not found:
        raise ValueError(
            f"{name}: depends on none of the features; compute both losses from these very tensors, not beside them in one "
            "compiled function"
        )
    if any(g.abs().max() >= torch.finfo(g.dtype).max for g in found if g.numel()):  # also where stage 2 saturates
        return math.nan
    norm = math.hypot(*(torch.linalg.vector_norm(g, dtype=acc_dtype(g.dtype)).item() for g in found)) / factor.item()
    return norm if math.isfinite(norm) else math.nan


def _plateau(norms: dict[int, float]) -> float | None:
    """The mean of norms on which neighbouring factors agree within a percent; None if none do, NaN if they agree on several."""
    ordered = [norms[exponent] for exponent in sorted(norms)]
    agreed = [n for pair in pairwise(ordered) if pair[0] > 0 and math.isclose(*pair, rel_tol=0.01) for n in pair]
    if not agreed:
        return None
    mean = statistics.fmean(agreed)
    return mean if all(math.isclose(n, mean, rel_tol=0.015) for n in agreed) else math.nan


def suggest_loss_weight(
    task_losses: Any,
    distill_losses: Any,
    features: Sequence[Levels] | None = None,
    *,
    loss_weight: float | Tensor = 1.0,
    share: float = 0.5,
    by: str = "loss",
) -> float:
    r"""A ``loss_weight`` that gives distillation a certain share of the whole loss, or of the gradients' norms.

    $$
    \lambda' = \lambda \, \frac{\mathrm{share}}{1 - \mathrm{share}}
    \, \frac{\operatorname{median}(\mathrm{task})}{\operatorname{median}(\mathrm{distillation})}
    $$

    or, with ``by="gradient"``, ``1 / median(gradient_ratio)`` in place of the last factor (`gradient_ratio`).

    It is a start for a search, not a result. By default task and distillation have equal shares. We recommend
    ``by="gradient", share=0.75``: distillation then pulls three times as hard as the task. That is fitted, not derived. On
    street scenes and blood cells, with standardised features and AdamW, it names weights within a factor of 2 of the best, for
    the feature MSE and for MasKD (docs/real.md). No share of the losses does that for all four. Published weights are
    1 (two-stage detectors), 7 (RetinaNet) and 10 (FCOS, RepPoints), all on raw features. This reads the values, so it waits for
    the device.

    Args:
        task_losses: the task's losses of a few batches, from a student that has trained for a fifth of its steps or so: before
            that, distillation pulls less hard, and the weight comes out some 4 times larger. Numbers or scalar tensors in a
            list, one stacked tensor or array, or a single number.
        distill_losses: the distillation losses of the same batches.
        features: with ``by="gradient"``, the student's features in each of these batches. The losses then need their graphs.
        loss_weight: the criterion's when ``distill_losses`` were taken.
        share: between 0 and 1, of the losses or of the gradients' norms.
        by: ``"loss"`` or ``"gradient"``.

    Returns:
        A number for ``criterion.loss_weight``.

    Raises:
        TypeError: a batch's loss that is no number and no scalar tensor.
        ValueError: lists that are empty or of different lengths; a share outside of 0 to 1; losses or ratios that hold a NaN or
            whose median is not positive and finite; and as `gradient_ratio` does.

    Examples:
        >>> import torch
        >>> from maskd_triton.diagnostics import suggest_loss_weight
        >>> suggest_loss_weight([2.0, 1.0, 3.0], [0.25, 0.5, 0.125])
        8.0
        >>> s = torch.ones(1, 2, 3, 3, requires_grad=True)
        >>> suggest_loss_weight([s.sum()], [(4 * s).sum()], [s], by="gradient", share=0.2)
        0.0625
    """
    if by not in ("loss", "gradient"):
        raise ValueError(f"by: expected 'loss' or 'gradient', got {by!r}")
    if (features is None) == (by == "gradient"):
        raise ValueError("features: expected the student's of every batch with by='gradient', and None with by='loss'")
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share!r}")
    tasks, distills = _batches(task_losses, "task_losses"), _batches(distill_losses, "distill_losses")
    if len(tasks) != len(distills) or not tasks:
        raise ValueError(
            f"task_losses and distill_losses: expected one of each for every batch, got {len(tasks)} and {len(distills)}"
        )
    odds = float(loss_weight) * share / (1 - share)
    if features is None:
        return odds * _median(tasks, "task_losses") / _median(distills, "distill_losses")
    if isinstance(features, Tensor) or len(features) != len(tasks):
        got = "a tensor" if isinstance(features, Tensor) else len(features)
        raise ValueError(f"features: expected a list with levels for each of the {len(tasks)} batches, got {got}")
    ratios = [gradient_ratio(*batch) for batch in zip(tasks, distills, features, strict=True)]
    return odds / _median(ratios, "task_losses and distill_losses: gradients' ratios")


def _batches(losses: Any, name: str) -> list[Any]:
    """A sequence, a stacked tensor or an array as a list; a number is the loss of a single batch."""
    several = hasattr(losses, "__len__") and getattr(losses, "ndim", 1) > 0 and not isinstance(losses, Mapping)
    batches = list(losses) if several else [losses]
    for loss in batches:
        if not isinstance(loss, int | float) and getattr(loss, "ndim", None) != 0:
            shape = f" of shape {list(loss.shape)}" if hasattr(loss, "shape") else ""
            hint = "; add them up: sum(losses.values())" if isinstance(loss, Mapping) else ""
            raise TypeError(
                f"{name}: expected a number or a scalar tensor for each batch, got {type(loss).__name__}{shape}{hint}"
            )
    return batches


def _median(values: Sequence[float | Tensor], name: str) -> float:
    """ValueError where it is not positive and finite, or a value is NaN, which has no place in any order."""
    numbers = [float(value.detach() if isinstance(value, Tensor) else value) for value in values]  # torch warns of gradients
    median = statistics.median(numbers)
    if not 0 < median < math.inf or any(map(math.isnan, numbers)):
        raise ValueError(f"{name}: expected a positive, finite median, got {median} of {[float(f'{x:.3g}') for x in numbers]}")
    return median
