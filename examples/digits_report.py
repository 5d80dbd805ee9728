"""What the demo shows in the end: the table, the check of stage 1, two pictures and results.json."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from maskd_triton import MaskLearner

from .digits_data import SIZE, Scenes
from .digits_models import SegmentationNet
from .digits_training import VARIANTS, StudentRun

matplotlib.use("Agg")  # before pyplot chooses a backend that needs a screen
import matplotlib.pyplot as plt

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "pillow", "matplotlib", "tqdm")
COLOURS = dict(zip(VARIANTS, ("#7f7f7f", "#1f77b4", "#d95f02"), strict=True))


@dataclass(frozen=True)
class LevelMasks:
    """Each token's mean mask value and mean weight; the weights' entropy (1: all equal, 0: only one)."""

    coverage: list[float]
    weight: list[float]
    entropy: float

    def collapse(self) -> str | None:
        """Why this level's tokens are of no use, or None. The losses of stage 1 do not show it."""
        if max(self.coverage) > 0.98:
            return "a mask that is on everywhere"
        if max(self.coverage) < 0.02:
            return "only empty masks"
        if self.entropy < 0.05:
            return "nearly all weight on one token"
        return None


@torch.no_grad()
def describe_masks(learner: MaskLearner, levels: Sequence[Tensor]) -> list[LevelMasks]:
    described = []
    for module, x in zip(learner.mask_modules, levels, strict=True):
        weight = module.weights(x).mean(0)
        entropy = torch.distributions.Categorical(weight).entropy() / torch.tensor(float(len(weight))).log()
        described.append(LevelMasks(module.masks(x).mean((0, 2, 3)).tolist(), weight.tolist(), entropy.item()))
    return described


def masks_table(described: Sequence[LevelMasks], levels: Sequence[Tensor]) -> str:
    lines = []
    for i, (masks, x) in enumerate(zip(described, levels, strict=True)):
        coverage, weight = (" ".join(f"{v:.2f}" for v in values) for values in (masks.coverage, masks.weight))
        lines.append(f"  level {i}, {_grid(x)}: coverage {coverage} | weight {weight} | entropy {masks.entropy:.2f}")
        if reason := masks.collapse():
            lines.append(f"  WARNING: level {i} collapsed: {reason}. Stage 2 will be little else than plain MSE.")
    return "\n".join(lines)


def scores(runs: Sequence[StudentRun]) -> dict[str, list[float]]:
    """Test mIoU per variant in the order of the seeds, and the paired difference of the last two variants."""
    by_variant = {variant: [run.test_miou for run in runs if run.variant == variant] for variant in VARIANTS}
    plain, masked = by_variant["plain feature MSE"], by_variant["MasKD"]
    return by_variant | {"MasKD - MSE, paired": [m - p for m, p in zip(masked, plain, strict=True)]}


def results_table(runs: Sequence[StudentRun], teacher_miou: float, steps: int) -> str:
    table = scores(runs)
    seeds = len(table["MasKD"])
    lines = [f"  Test mIoU after {steps} steps, {seeds} seeds", f"  {'':22}{'mean +- std':>16}    per seed"]
    lines.append(f"  {'teacher':22}{teacher_miou:>7.3f}")
    for name, values in table.items():
        sign = "+" if "paired" in name else ""
        each = "  ".join(f"{v:{sign}.3f}" for v in values)
        lines.append(f"  {name:22}{statistics.mean(values):>{sign}7.3f} +- {_std(values):.3f}    {each}")
    ahead = sum(difference > 0 for difference in table["MasKD - MSE, paired"])
    lines.append(f"  MasKD is ahead of plain feature MSE in {ahead} of {seeds} seeds.")
    return "\n".join(lines)


def plot_masks(
    path: Path, learner: MaskLearner, teacher: SegmentationNet, scenes: Scenes, shown: Sequence[int] = (0, 1)
) -> None:
    """Every token's mask on every level over a few scenes, with its weight in that scene above it."""
    chosen = Scenes(scenes.images[list(shown)], scenes.labels[list(shown)])
    with torch.no_grad():
        levels = teacher.features(chosen.images)
        predicted = teacher.scores(levels).argmax(1).cpu()
        masks = [m.masks(x).cpu() for m, x in zip(learner.mask_modules, levels, strict=True)]
        weights = [m.weights(x).cpu() for m, x in zip(learner.mask_modules, levels, strict=True)]
    pictures = chosen.images.cpu().permute(0, 2, 3, 1) / 2 + 0.5
    rows, tokens = len(shown) * len(levels), masks[0].shape[1]
    figure, axes = plt.subplots(rows, 1 + tokens, figsize=(1.45 * (1 + tokens) + 0.6, 1.62 * rows + 0.7), layout="constrained")
    figure.suptitle("Receptive tokens: masks on test scenes, with each mask's weight (bold: the largest)")
    for n in range(len(shown)):
        left = {
            "scene": pictures[n],
            "true classes": chosen.labels[n].cpu(),
            "teacher's classes": predicted[n],
        }
        for level, (title, picture) in enumerate(left.items()):
            row = axes[n * len(levels) + level]
            row[0].imshow(picture, cmap="tab20", vmin=0, vmax=19)
            row[0].set_title(title, fontsize=9)
            row[0].set_ylabel(f"level {level}: {_grid(levels[level])}", fontsize=9)
            for token, axis in enumerate(row[1:]):
                axis.imshow(pictures[n].mean(-1), cmap="gray", vmin=0, vmax=1)
                image = axis.imshow(
                    masks[level][n, token],
                    cmap="inferno",
                    vmin=0,
                    vmax=1,
                    alpha=0.7,
                    extent=(0, SIZE, SIZE, 0),
                )
                weight = weights[level][n]
                largest = "bold" if token == weight.argmax() else "normal"
                axis.set_title(f"token {token + 1}: {weight[token]:.2f}", fontsize=9, fontweight=largest)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01, aspect=50, label="mask value")
    bar.solids.set_alpha(1)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_curves(
    path: Path,
    stage1: dict[str, list[float]],
    unmasked: float,
    runs: Sequence[StudentRun],
    teacher_miou: float,
) -> None:
    """Stage 1: task loss and Dice. Stage 2: validation mIoU of the variants, mean and range of the seeds."""
    figure, (task, dice, miou) = plt.subplots(1, 3, figsize=(12.5, 3.9), layout="constrained", width_ratios=(1, 1, 1.3))
    task.plot(stage1["task loss"], color="#1b9e77", linewidth=1)
    task.axhline(unmasked, color="black", linestyle="--", linewidth=1, label="features not masked")
    task.set(title="Stage 1: task loss on masked features", xlabel="step", ylabel="cross-entropy", ylim=(0, None))
    task.legend(frameon=False)
    dice.plot(stage1["dice"], color="#7570b3", linewidth=1)
    dice.set(title="Stage 1: overlap of the masks", xlabel="step", ylabel="Dice, sum over levels", ylim=(0, None))
    for variant in VARIANTS:
        curves = [run.curve for run in runs if run.variant == variant]
        steps = [step for step, _ in curves[0]]
        values = torch.tensor([[value for _, value in curve] for curve in curves])
        miou.plot(steps, values.mean(0), color=COLOURS[variant], marker="o", markersize=3, label=variant)
        miou.fill_between(steps, values.amin(0), values.amax(0), color=COLOURS[variant], alpha=0.2, linewidth=0)
    miou.axhline(teacher_miou, color="black", linestyle="--", linewidth=1, label="teacher")
    miou.set(
        title="Stage 2: students on validation",
        xlabel="step",
        ylabel="mIoU (band: all seeds)",
        ylim=(0, 1.4 * teacher_miou),  # the legend stands above the curves
    )
    miou.legend(frameon=False, loc="upper left")
    for axis in (task, dice, miou):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_results(path: Path, results: dict[str, Any], runs: Sequence[StudentRun], masks: Sequence[LevelMasks]) -> None:
    summary = {
        name: {"mean": statistics.mean(values), "std": _std(values), "per_seed": values}
        for name, values in scores(runs).items()
    }
    everything = {
        **results,
        "test_miou": summary,
        "runs": [asdict(run) for run in runs],
        "masks": [asdict(level) | {"collapsed": level.collapse()} for level in masks],
    }
    path.write_text(json.dumps(everything, indent=1) + "\n")


def _grid(x: Tensor) -> str:
    return f"{x.shape[-2]}x{x.shape[-1]}"


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
