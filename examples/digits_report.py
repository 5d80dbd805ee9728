"""What the demo shows in the end: the table, the check of stage 1, three pictures and results.json."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

from maskd_triton import MaskLearner, viz
from maskd_triton.diagnostics import LevelDiagnostics, collapsed

from .digits_data import NUM_CLASSES, Scenes
from .digits_models import PyramidNet
from .digits_tasks import found
from .digits_training import SHOWN, VARIANTS, StudentRun

matplotlib.use("Agg")  # before pyplot chooses a backend that needs a screen
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "pillow", "matplotlib", "tqdm")
COLOURS = dict(zip(VARIANTS, ("#7f7f7f", "#1f77b4", "#d95f02"), strict=True))


def masks_table(levels: Mapping[int, LevelDiagnostics]) -> str:
    lines = []
    for i, level in levels.items():
        coverage, weight = (" ".join(f"{v:.2f}" for v in values) for values in (level.coverage, level.weight))
        overlap = (level.dice - level.dice.diag().diag()).max()
        lines.append(f"  level {i}: focus {level.focus:.2f} | coverage {coverage} | weight {weight} | Dice up to {overlap:.2f}")
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
        spread = f" +- {_std(values):.3f}" if seeds > 1 else ""
        lines.append(f"  {name:22}{statistics.mean(values):>{sign}7.3f}{spread:9}    {each}")
    ahead = sum(difference > 0 for difference in table["MasKD - MSE, paired"])
    lines.append(f"  MasKD is ahead of plain feature MSE in {ahead} of {seeds} seeds.")
    return "\n".join(lines)


def plot_students(path: Path, teacher: PyramidNet, scenes: Scenes, runs: Sequence[StudentRun]) -> None:
    """Test scenes, their classes, and what the teacher and the students of the first seed find."""
    images = scenes.images[:SHOWN]
    columns = {"truth": scenes.labels[:SHOWN], "teacher": found(teacher, images)}
    columns |= {f"{run.variant}\nmIoU {run.test_miou:.2f}": run.found for run in runs if run.seed == runs[0].seed}
    figure, axes = plt.subplots(SHOWN, 1 + len(columns), figsize=(9.5, 1.6 * SHOWN), layout="constrained")
    colours = ListedColormap(["#202020", *plt.get_cmap("tab10").colors])  # background, digits 0 to 9
    for row, image, *classes in zip(axes, images, *columns.values(), strict=True):
        row[0].imshow(((image + 1) / 2).permute(1, 2, 0).numpy(force=True))
        for axis, scene in zip(row[1:], classes, strict=True):
            axis.imshow(scene.numpy(force=True), cmap=colours, vmin=0, vmax=NUM_CLASSES - 1, interpolation="nearest")
    for axis, name in zip(axes[0], ("image", *columns), strict=True):
        axis.set_title(name, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def plot_masks(path: Path, learner: MaskLearner, teacher: PyramidNet, scenes: Scenes) -> None:
    """Every token's mask on every level over the first two scenes."""
    images = scenes.images[:2]
    levels = teacher.features(images)
    masks = [m.masks(x) for m, x in zip(learner.mask_modules, levels, strict=True)]
    weights = [m.weights(x) for m, x in zip(learner.mask_modules, levels, strict=True)]
    figure = viz.plot_masks(images, masks, weights, mean=(0.5,) * 3, std=(0.5,) * 3)  # scenes are in [-1, 1]
    figure.savefig(path, dpi=110)


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


def write_results(
    path: Path, results: dict[str, Any], runs: Sequence[StudentRun], masks: Mapping[int, LevelDiagnostics]
) -> None:
    summary = {
        name: {"mean": statistics.mean(values), "std": _std(values), "per_seed": values}
        for name, values in scores(runs).items()
    }
    everything = {
        **results,
        "test_miou": summary,
        "runs": [{name: value for name, value in vars(run).items() if name != "found"} for run in runs],
        "masks": [
            {name: value.tolist() for name, value in vars(level).items() if value is not None} | {"collapsed": collapsed(level)}
            for level in masks.values()
        ],
    }
    path.write_text(json.dumps(everything, indent=1) + "\n")


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
