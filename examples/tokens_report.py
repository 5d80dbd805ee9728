"""Tables and pictures of `examples.tokens`, made from its results alone."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tokens import Study

Line = dict[str, Any]
KINDS = ["raw", "channel", "isotropic"]
# of a 95 % interval by Student's t, by the number of pairs less one
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tables(lines: Sequence[Line]) -> list[str]:
    """Markdown: the tokens of every teacher, then the students."""
    teachers = list(dict.fromkeys(line["teacher"] for line in lines if line["run"] == "tokens"))
    return [row for t in teachers for row in (f"### {t}", "", *tokens_table(lines, t), "")] + students_table(lines)


def tokens_table(lines: Sequence[Line], teacher: str) -> list[str]:
    own = [line for line in lines if line["run"] == "tokens" and line["teacher"] == teacher]
    own.sort(key=lambda line: KINDS.index(line["name"].partition(":")[0]))
    rows = [
        "| features: way | task loss | focus | emphasis | entropy in an image | over the set | largest Dice | coverage "
        "| IoU: boxes | background |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| not masked | {own[0]['unmasked']:.3f} | 0 | 1 | | | | | | |",
    ]
    for line in own:
        levels = line["levels"]
        figures = [
            each(levels, lambda x: x["focus"]),
            each(levels, lambda x: x["emphasis"]),
            each(levels, lambda x: x.get("entropy")),
            each(levels, lambda x: entropy(x["weight"]) if "weight" in x else None),
            each(levels, largest_dice),
            ", ".join(f"{min(x['coverage']):.2f} to {max(x['coverage']):.2f}" for x in levels),
            *(each(levels, lambda x, name=name: x[name]) for name in ("iou_boxes", "iou_background")),
        ]
        rows.append(f"| {line['name']} | {line['masked']:.3f} | {' | '.join(figures)} |")
    return rows


def students_table(lines: Sequence[Line]) -> list[str]:
    """Scores, and paired differences from the feature MSE with 95 % intervals."""
    runs = [line for line in lines if line["run"] == "student"]
    rows = []
    for teacher in dict.fromkeys(run["teacher"] for run in runs):
        own = [run for run in runs if run["teacher"] == teacher]
        found = {
            name: {run["seed"]: run["test"] for run in own if run["name"] == name}
            for name in dict.fromkeys(r["name"] for r in own)
        }
        rows += [
            f"| {teacher}: {own[0]['metric']} | test | minus feature MSE | seeds ahead | focus | emphasis |",
            "|---|---|---|---|---|---|",
        ]
        for name, scores in found.items():
            pairs = [
                score - found["feature MSE"][seed] for seed, score in scores.items() if seed in found.get("feature MSE", {})
            ]
            ahead = f"{sum(p > 0 for p in pairs)} of {len(pairs)}" if name != "feature MSE" else ""
            difference = interval(pairs) if name != "feature MSE" else ""
            tokens = [line for line in lines if line["run"] == "tokens" and (line["teacher"], line["name"]) == (teacher, name)]
            about = [each(tokens[0]["levels"], lambda x, k=key: x[k]) if tokens else "" for key in ("focus", "emphasis")]
            rows.append(f"| {name} | {statistics.mean(scores.values()):.3f} | {difference} | {ahead} | {' | '.join(about)} |")
        rows.append("")
    return rows


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % t interval; a mean alone of a single value."""
    if len(values) < 2:
        return f"{statistics.fmean(values):+.3f}" if values else ""
    half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+.3f} ± {half:.3f}"


def each(levels: Iterable[Line], figure: Any) -> str:
    """A figure of every level, two digits each."""
    values = [figure(level) for level in levels]
    return "" if None in values else " ".join(f"{value:.2f}" for value in values)


def entropy(weight: Sequence[float]) -> float:
    """Of the mean weights, over log T."""
    return sum(-w * math.log(w) for w in weight if w > 0) / math.log(len(weight)) if len(weight) > 1 else 1.0


def largest_dice(level: Line) -> float | None:
    pairs = [d for i, row in enumerate(level["dice"]) for j, d in enumerate(row) if i != j]
    return max(pairs) if pairs else None


def draw(study: "Study", names: Sequence[str], path: Path) -> None:
    """The first test scenes, and over them the weight that stage 2 gives every pixel: a column for each way, a row a level."""
    if path.exists():
        return
    import matplotlib
    import torch
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    count = 2
    images = study.train.images[:count].movedim(1, 3) / 2 + 0.5
    figure = Figure(figsize=(1.6 * (len(names) + 1), 1.7 * count * len(study.levels)), layout="constrained")
    axes = figure.subplots(count * len(study.levels), len(names) + 1, squeeze=False)
    for column, name in enumerate(["", *names]):
        for level in range(len(study.levels)):
            for n in range(count):
                axis = axes[level * count + n, column]
                axis.set_axis_off()
                if not name:
                    axis.imshow(images[n].numpy())
                    continue
                masks, weights = study.masks(name)
                m = masks[level][n]
                w = torch.full((len(m),), 1 / len(m)) if weights is None else weights[level][n]
                s = (m.square() * (w / m.sum((1, 2)))[:, None, None]).sum(0)
                axis.imshow((s / s.mean()).numpy(), vmin=0, vmax=3)
                axis.set_title(name.replace(": ", ":\n") if level == n == 0 else "", fontsize=7)
    figure.savefig(path, dpi=80)
