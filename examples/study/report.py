"""The page docs/study.md, made of the results file alone: its figures are those of the file by construction."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from scipy import stats

from maskd_triton import viz

from .plan import ALONE, CORE, MSE, VARIANTS, Settings, Tokens, jobs
from .results import Line, Results, is_run
from .runs import Runner

matplotlib.use("Agg")  # before pyplot chooses a backend that needs a screen
import matplotlib.pyplot as plt

CHANCE = 0.95
COLOURS = ("#7f7f7f", "#1f77b4", "#d95f02", "#7570b3", "#1b9e77")
METRICS = {"segmentation": "mIoU", "centres": "mAP"}

# Read on 2026-11-29 in the README of github.com/hunto/MasKD: COCO val, AP; one run each, no spread stated.
PUBLISHED = (
    ("Faster RCNN-R50", 38.4, "Faster RCNN-R101", 39.8, 40.6),
    ("RetinaNet-R50", 37.4, "RetinaNet-R101", 38.9, 39.9),
    ("FCOS-R50", 38.5, "FCOS-R101", 40.8, 42.2),
    ("Faster RCNN-R50", 38.4, "Cascade Mask RCNN-X101", 45.6, 42.4),
    ("RetinaNet-R50", 37.4, "RetinaNet-X101", 41.0, 40.6),
    ("RepPoints-R50", 38.6, "RepPoints-R101", 44.2, 41.4),
)


@dataclass(frozen=True)
class Difference:
    """Of pairs, students of the same teacher and seed.

    Attributes:
        mean: of the differences.
        half: of the 95 % t interval; infinite for a single pair.
        pairs: their number.
        ahead: pairs with a difference above 0.
    """

    mean: float
    half: float
    pairs: int
    ahead: int

    @property
    def verdict(self) -> str:
        """Which way, if the interval leaves out 0."""
        if abs(self.mean) <= self.half:
            return "open"
        return "ahead" if self.mean > 0 else "behind"

    def __str__(self) -> str:
        if self.pairs == 1:
            return f"{self.mean:+.3f} (1 pair)"
        return f"{self.mean:+.3f} ± {self.half:.3f}"


def difference(values: Sequence[float]) -> Difference:
    """Mean and t interval of paired differences; ValueError for none."""
    if not values:
        raise ValueError("values: expected at least one difference, got none")
    count = len(values)
    half = math.inf
    if count > 1:
        half = float(stats.t.ppf((1 + CHANCE) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Difference(statistics.mean(values), half, count, sum(value > 0 for value in values))


class Found:
    """The lines of a results file, by what they are."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.settings = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in lines[0]["settings"].items()})
        self.sessions = [line for line in lines if line["what"] == "session"]
        self.runs = [line for line in lines if is_run(line)]
        self.planned = sum(1 for _ in jobs(self.settings))
        self.students = [line for line in self.runs if line["what"] == "student"]
        self.teachers = [line for line in self.runs if line["what"] == "teacher"]
        self.tokens = [line for line in self.runs if line["what"] == "tokens"]
        self.timed = [line for line in self.runs if line["what"] == "timing"]

    def scores(self, cell: str, steps: int, variant: str) -> dict[tuple[int, int], float]:
        """The test metric by teacher and seed."""
        own = (line for line in self.students if (line["cell"], line["steps"], line["variant"]) == (cell, steps, variant))
        return {(line["teacher"], line["seed"]): line["test"] for line in own}

    def against(self, cell: str, steps: int, variant: str, baseline: str) -> Difference | None:
        """The paired difference; None without a pair."""
        own, other = self.scores(cell, steps, variant), self.scores(cell, steps, baseline)
        both = sorted(own.keys() & other.keys())
        return difference([own[pair] - other[pair] for pair in both]) if both else None

    def groups(self) -> list[tuple[str, int]]:
        """Cells and schedules with at least one student, in the order of the settings."""
        there = {(line["cell"], line["steps"]) for line in self.students}
        return [(c, s) for c in self.settings.cells for s in self.settings.schedules if (c, s) in there]

    def weights(self, variant: str) -> set[float]:
        """The loss weights that its students had."""
        return {line["loss_weight"] for line in self.students if line["variant"] == variant} - {0.0}

    def variants(self, cell: str, steps: int) -> list[str]:
        return [variant for variant in VARIANTS if self.scores(cell, steps, variant)]


def page(lines: Sequence[Line], name: str, pictures: Sequence[str] = ()) -> str:
    """The page's Markdown.

    Args:
        lines: of the results file, as `read` gives them.
        name: of the results file, in bench/results.
        pictures: of {"curves", "masks"} those that stand beside it, as study-{name}.png.
    """
    found = Found(lines)
    parts = [_head(found, name), _words(found), _scores(found), _costs(found), _collapse(found)]
    parts += [f"![{picture}](../bench/results/study-{picture}.png)\n\n{CAPTIONS[picture]}" for picture in pictures]
    return "\n\n".join([*parts, _setup(found), _published()]) + "\n"


CAPTIONS = {
    "curves": "Learning curves on validation: mean over teachers and seeds, and their range.",
    "masks": "The masks of a teacher's six weighted tokens over two test scenes, level by level.",
}


def _head(found: Found, name: str) -> str:
    done, session = len(found.runs), found.sessions[-1]
    days = sorted({line["date"][:10] for line in found.sessions})
    dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    minutes = sum(line["wall_seconds"] for line in found.runs) / 60
    state = ""
    if done < found.planned:
        state = f"\n\n**Partial**: {done} of {found.planned} runs are done. Tables show what there is; the command goes on."
    workers, threads = session["workers"], session["threads"]
    workers = f"{workers} process{'es' * (workers > 1)} of {threads} thread{'s' * (threads > 1)}"
    return f"""# Does it help?

Masked distillation against what one would do anyway, on the scenes of [the demo](demo.md). This page is made of
[{name}](../bench/results/{name}) by `python -m examples.study --page`; `tests/test_study_report.py` checks that.

`{session["command"]}`, {session["device"]}, {session["cpu_cores"]} cores, {workers},
torch {session["packages"]["torch"]}, {dates}; {minutes:.0f} minutes of runs.{state}"""


VERDICTS = {"ahead": "better", "open": "no difference shown", "behind": "worse"}


def _words(found: Found) -> str:
    """Where masks help and where they do not, as the intervals say."""
    lines = ["## In plain words", "", *_summary(found)]
    for baseline in (MSE, ALONE):
        compared = {v: _compared(found, v, baseline) for v in VARIANTS if v not in (ALONE, baseline)}
        compared = {variant: each for variant, each in compared.items() if each}
        if not compared:
            lines += ["", f"No two pairs with the {baseline} yet."]
            continue
        schedules = [
            steps for steps in found.settings.schedules if any(s == steps for each in compared.values() for _, s in each)
        ]
        lines += [
            "",
            f"Against the **{baseline}**, comparisons by what their intervals say, and mean differences by schedule:",
            "",
        ]
        heads = [*VERDICTS.values(), *(f"{steps} steps" for steps in schedules)]
        lines += ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
        for variant, each in compared.items():
            verdicts = [str(sum(d.verdict == verdict for d in each.values())) for verdict in VERDICTS]
            by_steps = ([d.mean for (_, s), d in each.items() if s == steps] for steps in schedules)
            means = [f"{statistics.mean(values):+.3f} ({len(values)})" if values else "-" for values in by_steps]
            lines.append("| " + " | ".join([variant, *verdicts, *means]) + " |")
        lines += ["", "In parentheses: cells, of which the mean is."]
        lines += ["", *(f"- **{v}**: {_where(compared[v])}." for v in CORE if v in compared)]
    lines += [
        "",
        "One interval in 20 leaves out 0 by chance alone; pairs share teachers, so intervals are a little too narrow.",
    ]
    tries = found.settings.tries
    if edges := found.weights(MSE) & {tries[0], tries[-1]}:
        lines.append(
            f"The {MSE} took a loss weight of {_listed(edges)}, at the end of those tried: another may serve it better."
        )
    return "\n".join(lines)


def _compared(found: Found, variant: str, baseline: str) -> dict[tuple[str, int], Difference]:
    """By cell and schedule, where there are at least two pairs."""
    each = {group: found.against(*group, variant, baseline) for group in found.groups()}
    return {group: d for group, d in each.items() if d and d.pairs > 1}


def _where(compared: dict[tuple[str, int], Difference]) -> str:
    """The cells and schedules of every verdict."""
    parts = []
    for verdict, word in VERDICTS.items():
        own: dict[str, list[str]] = {}
        for (cell, steps), d in compared.items():
            if d.verdict == verdict:
                own.setdefault(cell, []).append(f"{steps} steps {d}")
        cells = "; ".join(f"{cell} ({', '.join(each)})" for cell, each in own.items())
        parts.append(f"{word}: {cells or 'nowhere'}")
    return ". ".join(parts)


def _summary(found: Found) -> list[str]:
    """Where masks help, where they do not, and what to choose: the masked loss that is most often better than the MSE."""
    counts: dict[str, dict[str, int]] = {}
    for variant in VARIANTS:
        each = _compared(found, variant, MSE).values() if variant not in (ALONE, MSE) else ()
        if each:
            verdicts = [d.verdict for d in each]
            counts[variant] = {verdict: verdicts.count(verdict) for verdict in VERDICTS}
    if not counts:
        return []
    without = [v for v, n in counts.items() if n["ahead"] == n["behind"] == 0]
    worse = [v for v, n in counts.items() if n["behind"] > n["ahead"]]
    no_help = f"no gain on the {MSE} was shown for {_and(without)}; worse more often than better were {_and(worse)}."
    lines = [f"**Where it does not help**: {no_help}"]
    ranks = sorted(counts, key=lambda v: (counts[v]["behind"] - counts[v]["ahead"], -sum(counts[v].values())))
    best = ranks[0]
    ahead, behind, total = counts[best]["ahead"], counts[best]["behind"], sum(counts[best].values())
    if ahead <= behind:
        return [*lines, "", f"**What to choose here**: the {MSE}; no other loss was more often better than worse."]
    by_steps: dict[int, list[float]] = {}
    for (_, steps), d in _compared(found, best, MSE).items():
        by_steps.setdefault(steps, []).append(d.mean)
    means = _and([f"{statistics.mean(values):+.3f} after {steps} steps" for steps, values in sorted(by_steps.items())])
    help_ = (
        f"**Where it helps**: {best} was better than the {MSE} in {ahead} of {total} comparisons, and worse in {behind}. "
        f"Its mean lead is {means}."
    )
    alone = _compared(found, best, ALONE)
    verdicts = [d.verdict for d in alone.values()]
    lines[0] += f" Against the {ALONE}, {best} was better in {verdicts.count('ahead')} of {len(alone)}, and worse in "
    lines[0] += f"{verdicts.count('behind')}."
    choice = best
    if VARIANTS[best].loss == "truth" and ranks[1:]:
        choice += f"; without labels, {ranks[1]}"
    if harmed := [f"{cell} after {steps} steps" for (cell, steps), d in alone.items() if d.verdict == "behind"]:
        choice += f"; but nothing to distil in {_and(harmed)}, where the {ALONE} was better"
    return [help_, "", *lines, "", f"**What to choose here**: {choice}."]


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]])) or "none"


def _scores(found: Found) -> str:
    lines = ["## Test metric"]
    for cell in dict.fromkeys(cell for cell, _ in found.groups()):
        metric = METRICS[cell.split(", ")[0]]
        teachers = ", ".join(f"{line['test']:.3f}" for line in found.teachers if line["cell"] == cell)
        lines += ["", f"### {cell.capitalize()}", ""]
        lines.append(f"Test {metric}, mean ± standard deviation over n pairs of teacher and seed; teachers: {teachers}.")
        lines.append(f"Differences are paired, with {CHANCE:.0%} t intervals.")
        for steps in [s for c, s in found.groups() if c == cell]:
            lines += ["", f"| {steps} steps | {metric} | n | minus {ALONE} | minus {MSE} | pairs ahead of it |"]
            lines.append("|---|---|---|---|---|---|")
            for variant in found.variants(cell, steps):
                scores = list(found.scores(cell, steps, variant).values())
                spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
                alone, plain = (found.against(cell, steps, variant, baseline) for baseline in (ALONE, MSE))
                row = [
                    variant,
                    f"{statistics.mean(scores):.3f}{spread}",
                    str(len(scores)),
                    "" if variant == ALONE or alone is None else str(alone),
                    "" if variant == MSE or plain is None else str(plain),
                    "" if variant == MSE or plain is None else f"{plain.ahead} of {plain.pairs}",
                ]
                lines.append("| " + " | ".join(row) + " |")
    if not found.groups():
        lines += ["", "No student is trained yet."]
    return "\n".join(lines)


def _listed(weights: Iterable[float]) -> str:
    return ", ".join(f"{w:g}" for w in sorted(weights))


def _costs(found: Found) -> str:
    lines = ["## Time and memory", ""]
    lines += [
        "A whole training step: the median of a run in the first cell, while nothing else ran, with one thread.",
        "Extra memory of the distillation loss alone (aligns, forward, backward) at its peak.",
    ]
    lines += ["", "| | ms per step | extra MiB at the peak | loss weights chosen |", "|---|---|---|---|"]
    for variant in VARIANTS:
        own = [line for line in found.students if line["variant"] == variant]
        if own:
            peaks = [line["peak_extra_bytes"] for line in own if line["peak_extra_bytes"] is not None]
            peak = f"{max(peaks) / 2**20:.1f}" if peaks else "-"
            weights = _listed(found.weights(variant)) or "-"
            times = [f"{line['step_ms']:.1f}" for line in found.timed if line["variant"] == variant]
            lines.append(f"| {variant} | {', '.join(times) or '-'} | {peak} | {weights} |")
    tries = found.settings.tries
    lines += ["", f"Tried: {_listed(tries)}. A variant whose weight is the first or last may want another."]
    return "\n".join(lines)


def failures(lines: Iterable[Line]) -> dict[str, int]:
    """Levels of runs of stage 1 in which a kind of failure was found."""
    kinds = {"on everywhere": 0, "empty": 0, "the same": 0, "all weight": 0}
    for line in lines:
        for level in line["levels"]:
            for kind in kinds:
                kinds[kind] += any(kind in sentence for sentence in level["collapsed"])
    return kinds


def _collapse(found: Found) -> str:
    lines = ["## Collapse in stage 1", ""]
    lines.append("Levels in which `MaskLearner.diagnostics()` finds useless masks, and the teacher's task loss, on validation.")
    lines += ["", "| tokens | runs | levels | on everywhere | empty | the same | all weight | task loss, masked | not masked |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for tokens in dict.fromkeys(line["tokens"] for line in found.tokens):
        own = [line for line in found.tokens if line["tokens"] == tokens]
        levels = sum(len(line["levels"]) for line in own)
        masked, whole = (statistics.mean(line[name] for line in own) for name in ("task_loss", "unmasked_task_loss"))
        counts = " | ".join(map(str, failures(own).values()))
        lines.append(f"| {tokens} | {len(own)} | {levels} | {counts} | {masked:.3f} | {whole:.3f} |")
    return "\n".join(lines)


def _setup(found: Found) -> str:
    s = found.settings
    train, validation, test = s.scenes
    schedules = ", ".join(map(str, s.schedules))
    return f"""## How it was done

- Scenes of real handwritten digits on crops of photographs: {train} for training, {validation} for validation, {test} for
  test, which share no digit and no column of a photograph. Dense: two or three digits; sparse: one. Digits have 15 to 20
  of a scene's 40 pixels.
- Segmentation: a class per pixel, mean IoU. Centres: a heat map per digit, as a detector's head has, with a focal loss;
  mean average precision of its peaks within 3 pixels.
- {s.teachers} teachers ({s.teacher_steps} steps), {s.seeds} student seeds, {schedules} steps; a student is a sixteenth of its
  teacher. A seed fixes the student's initialisation, that of the aligns, and the batches, for every variant.
- Loss weights: {len(s.tries)} tries for each variant and cell, {len(s.tuning_seeds)} seeds of their own, with
  {s.schedules[0]} steps of the first teacher, on validation. Longer schedules keep that weight, and may want a smaller one.
- All losses see the teacher's features standardised per channel (or isotropically, where it says so), through the same aligns.
- Cut to fit the time: all variants run only in "{'", "'.join(s.full) or "no cell"}", and there with {s.schedules[-1]} steps
  only those that run everywhere. 1, 2 and 12 tokens run with {s.schedules[0]} steps only."""


def _published() -> str:
    lines = ["## As published, not measured here", ""]
    lines.append("COCO AP, in the README of [the official code](https://github.com/hunto/MasKD) on 2026-11-29; without spread.")
    lines += ["", "| student | alone | teacher | its AP | with MasKD |", "|---|---|---|---|---|"]
    lines += [f"| {student} | {alone} | {teacher} | {own} | {masked} |" for student, alone, teacher, own, masked in PUBLISHED]
    return "\n".join(lines)


def plot_curves(path: Path, lines: Sequence[Line]) -> bool:
    """Validation curves of the longest schedule that a cell has; whether there was anything to draw."""
    found = Found(lines)
    longest = dict(found.groups())  # the last schedule of each cell
    if not longest:
        return False
    figure, axes = plt.subplots(1, len(longest), figsize=(4.2 * len(longest), 3.6), layout="constrained", squeeze=False)
    for axis, (cell, steps) in zip(axes[0], longest.items(), strict=True):
        for variant, colour in zip(found.variants(cell, steps), COLOURS, strict=False):  # those that run everywhere come first
            own = [x for x in found.students if (x["cell"], x["steps"], x["variant"]) == (cell, steps, variant)]
            at = [step for step, _ in own[0]["curve"]]
            values = [[value for _, value in line["curve"]] for line in own]
            columns = list(zip(*values, strict=True))
            axis.plot(at, [statistics.mean(c) for c in columns], color=colour, marker="o", markersize=3, label=variant)
            axis.fill_between(at, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15, linewidth=0)
        axis.set(title=cell, xlabel="step", ylabel=f"validation {METRICS[cell.split(', ')[0]]}", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


@torch.no_grad()
def plot_masks(path: Path, runner: Runner) -> None:
    """Of the first cell's first teacher, with the tokens of the weighted variant."""
    cell = runner.settings.cells[0]
    scenes = runner.cell(cell).scenes["test"][:2]
    modules = runner.learner(cell, 0, Tokens().name).mask_modules
    levels = runner.teacher(cell, 0).features(scenes.images)
    masks, weights = ([getattr(m, what)(x) for m, x in zip(modules, levels, strict=True)] for what in ("masks", "weights"))
    figure = viz.plot_masks(scenes.images, masks, weights, mean=(0.5,) * 3, std=(0.5,) * 3)  # scenes are in [-1, 1]
    figure.savefig(path, dpi=80)
    plt.close(figure)


def write(results: Results, runner: Runner, folder: Path, to: Path) -> None:
    """The page ``to``, and in ``folder`` the pictures for which there are results."""
    lines = results.lines
    plot_curves(folder / "study-curves.png", lines)
    if any(line["tokens"] == Tokens().name for line in Found(lines).tokens):
        plot_masks(folder / "study-masks.png", runner)
    pictures = [picture for picture in CAPTIONS if (folder / f"study-{picture}.png").exists()]
    to.write_text(page(lines, results.path.name, pictures))
