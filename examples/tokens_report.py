"""Tables and the picture of `examples.tokens`. `python -m examples.tokens_report` writes the tables into docs/tokens.md."""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .intervals import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from .tokens_study import Study

Line = dict[str, Any]
ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "cpu-tokens.jsonl", ROOT / "docs" / "tokens.md"
KINDS = ["raw", "channel", "isotropic"]
MSE, ONE, SIX, RAW, RANDOM, TRUE = (
    "feature MSE",
    "channel: one token",
    "channel: as published",
    "raw: as published",
    "random masks",
    "true boxes",
)
PICTURED = {RAW: "raw, six", SIX: "standardised, six", ONE: "standardised, one", RANDOM: "random masks", TRUE: "true boxes"}
PAIRS = (
    (ONE, SIX),
    (ONE, RANDOM),
    (SIX, RANDOM),
    (TRUE, ONE),
    (RANDOM, MSE),
    ("channel: weighting slower", SIX),
    ("channel: weight decay 0.1", SIX),
    (ONE, "feature MSE x 3"),
    (SIX, "feature MSE x 3"),
    (f"{ONE}, seed 1", f"{SIX}, seed 1"),
    (f"{ONE}, seed 1", RANDOM),
    (f"{SIX}, seed 1", RANDOM),
)


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tables(lines: Sequence[Line]) -> list[str]:
    """All of them, as Markdown."""
    return [row for part in (teachers_table, students_table, pairs_table, tokens_tables) for row in (*part(lines), "")]


def with_tables(page: str, lines: Sequence[Line]) -> str:
    """``page`` with the table that each comment names, up to the comment `end`."""
    parts = {"teachers": teachers_table, "students": students_table, "pairs": pairs_table, "tokens": tokens_tables}
    return re.sub(
        rf"(?<=<!-- )({'|'.join(parts)}) -->.*?(?=<!-- end -->)",
        lambda found: "\n".join([f"{found[1]} -->", "", *parts[found[1]](lines), "", ""]),
        page,
        flags=re.S,
    )


def teachers_table(lines: Sequence[Line]) -> list[str]:
    """Focus and emphasis of what matters most, on every teacher."""
    rows = [
        "| teacher | raw, six: focus | standardised, six | standardised, one | raw, six: emphasis "
        "| standardised, six | standardised, one |",
        "|---" * 7 + "|",
    ]
    for teacher in teachers_of(lines, "tokens"):
        found = [about(lines, teacher, name, figure) for figure in ("focus", "emphasis") for name in (RAW, SIX, ONE)]
        rows.append(f"| {teacher} | {' | '.join(found)} |")
    return rows


def students_table(lines: Sequence[Line]) -> list[str]:
    """Scores of the MSE, and paired differences from it with 95 % intervals: a column for every teacher."""
    scores = scores_of(lines)
    names = list(dict.fromkeys(line["name"] for line in lines if line["run"] == "student"))
    metrics = {line["teacher"]: line["metric"] for line in lines if line["run"] == "student"}
    teachers = teachers_of(lines, "student")
    columns = [f"{teacher}: {metrics[teacher]}" for teacher in teachers]
    means = [f"{statistics.mean(scores[teacher, MSE].values()):.3f}" for teacher in teachers]
    rows = [f"| minus feature MSE | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    rows.append(f"| feature MSE itself | {' | '.join(means)} |")
    for name in names:
        if name != MSE:
            rows.append(f"| {label(name)} | {' | '.join(paired(scores, teacher, name, MSE) for teacher in teachers)} |")
    return rows


def pairs_table(lines: Sequence[Line]) -> list[str]:
    """Differences between two ways."""
    scores, teachers = scores_of(lines), teachers_of(lines, "student")
    rows = [f"| difference | {' | '.join(teachers)} |", "|---" * (len(teachers) + 1) + "|"]
    for name, base in PAIRS:
        cells = [paired(scores, teacher, name, base) for teacher in teachers]
        if any(cells):
            named = " minus ".join(label(x).removeprefix("standardised, ") for x in (name, base))
            rows.append(f"| {named} | {' | '.join(cells)} |")
    return rows


def tokens_tables(lines: Sequence[Line]) -> list[str]:
    return [row for t in teachers_of(lines, "tokens") for row in (f"### {t}", "", *tokens_table(lines, t), "")]


def tokens_table(lines: Sequence[Line], teacher: str) -> list[str]:
    own = [line for line in lines if line["run"] in ("tokens", "masks") and line["teacher"] == teacher]
    own.sort(key=lambda line: [*KINDS, ""].index(line["name"].partition(":")[0] if ":" in line["name"] else ""))
    unmasked = next(line["unmasked"] for line in own if line["run"] == "tokens")
    rows = [
        "| features: way | task loss | focus | emphasis | entropy | largest Dice | IoU: objects |",
        "|---" * 7 + "|",
        f"| not masked | {unmasked:.3f} | 0 | 1 | | | |",
    ]
    for line in own:
        levels = line["levels"]
        figures = [
            f"{line['masked']:.3f}" if "masked" in line else "",
            *(each(levels, lambda x, name=name: x.get(name)) for name in ("focus", "emphasis")),
            each(levels, lambda x: x.get("entropy") if len(x["coverage"]) > 1 else None),
            each(levels, largest_dice),
            each(levels, lambda x: x.get("iou_boxes")),
        ]
        rows.append(f"| {label(line['name'])} | {' | '.join(figures)} |")
    return rows


def teachers_of(lines: Sequence[Line], run: str) -> list[str]:
    """Those with runs of this kind, in the order of their tokens."""
    having = {line["teacher"] for line in lines if line["run"] == run}
    return [name for name in dict.fromkeys(line["teacher"] for line in lines if line["run"] == "tokens") if name in having]


def about(lines: Iterable[Line], teacher: str, name: str, figure: str) -> str:
    """A figure of every level of these tokens."""
    found = [x for x in lines if x["run"] == "tokens" and (x["teacher"], x["name"]) == (teacher, name)]
    return each(found[0]["levels"], lambda x: x[figure]) if found else ""


def scores_of(lines: Iterable[Line]) -> dict[tuple[str, str], dict[int, float]]:
    """Test scores by seed, of every teacher and name."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for line in lines:
        if line["run"] == "student":
            found.setdefault((line["teacher"], line["name"]), {})[line["seed"]] = line["test"]
    return found


def paired(scores: dict[tuple[str, str], dict[int, float]], teacher: str, name: str, base: str) -> str:
    """The difference over the seeds that both have."""
    own, other = scores.get((teacher, name), {}), scores.get((teacher, base), {})
    return interval([score - other[seed] for seed, score in own.items() if seed in other])


def label(name: str) -> str:
    """Of a way, as the page says it."""
    kind, _, way = name.rpartition(": ")
    way = way.replace("as published", "six tokens") if "segmentation" not in way else way
    way = way.replace(" x 3", ", weight 30").replace("alone", "no distillation")
    return ", ".join([*filter(None, [{"channel": "standardised"}.get(kind, kind)]), way])


def each(levels: Iterable[Line], figure: Any) -> str:
    """A figure of every level, two digits each."""
    values = [figure(level) for level in levels]
    return "" if None in values else " ".join(f"{value:.2f}" for value in values)


def largest_dice(level: Line) -> float | None:
    pairs = [d for i, row in enumerate(level["dice"]) for j, d in enumerate(row) if i != j]
    return max(pairs) if pairs else None


def draw(studies: Sequence["Study"], names: Sequence[str], path: Path) -> None:
    """A row for each teacher: an image that no training saw, the weight of every pixel of its finest level in stage 2, and the
    masks of the six standardised tokens."""
    if path.exists():
        return
    from matplotlib.figure import Figure

    masks_of = SIX if SIX in names else None
    columns = 1 + len(names) + (6 if masks_of else 0)
    figure = Figure(figsize=(1.3 * columns, 1.2 * len(studies) + 0.4), layout="constrained")
    axes = figure.subplots(len(studies), columns, squeeze=False)
    for study, row in zip(studies, axes, strict=True):
        show(row[0], study.unseen.images[0].movedim(0, 2), study.kind)
        for axis, name in zip(row[1:], names, strict=False):
            weight = pixel_weight(*study.masks(name, study.unseen))
            show(axis, weight, PICTURED[name] if study is studies[0] else "", most=3)
        if masks_of:
            masks, weights = study.masks(masks_of, study.unseen)
            for axis, mask, w in zip(row[1 + len(names) :], masks[0][0], weights[0][0], strict=True):  # type: ignore[index]
                show(axis, mask, f"w {w:.2f}", most=1)
    figure.savefig(path, dpi=80)


def pixel_weight(masks: list["Tensor"], weights: list["Tensor"] | None) -> "Tensor":
    """Of the first image's finest level, over its mean."""
    m = masks[0][0]
    w = m.new_full((len(m),), 1 / len(m)) if weights is None else weights[0][0]
    s = (m.square() * (w / m.sum((1, 2)).clamp(min=1e-12))[:, None, None]).sum(0)
    return s / s.mean().clamp(min=1e-12)


def show(axis: "Axes", pixels: "Tensor", title: str, most: float | None = None) -> None:
    axis.imshow(pixels.detach().numpy(), vmin=0, vmax=most)
    axis.set_axis_off()
    axis.set_title(title, fontsize=7)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(), read(RESULTS)))
