"""Tables of a study from its JSON lines. `python -m examples.real.report` writes those of bench/results into docs/real.md."""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..intervals import interval
from .losses import ALONE, LOSSES, MSE, PUBLISHED, RANDOM, RECOMMENDED
from .study import Line, best_weight, read_lines, tried_weights
from .training import SHARES

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "bench" / "results", ROOT / "docs" / "real.md"


def tables(path: Path) -> str:
    """Scores on test, then the search for weights on val, then the tokens; of what has been run so far."""
    lines = read_lines(path)
    teacher = next(line for line in lines if line["run"] == "teacher")
    students = [line for line in lines if line["run"] == "student"]
    names = list(teacher["test"])
    reported = [line for line in students if "test" in line]
    parts = [scores(reported, name, teacher["test"][name]) for name in names]
    tried = tried_weights(lines, names[0])
    parts.append(weights(tried, names[0]))
    spread = {loss: statistics.stdev(own.values()) for loss, own in by_seed(reported, "val", names[0]).items() if len(own) > 1}
    parts.append(suggestions([line for line in lines if line["run"] == "suggested weights"], tried, spread))
    used = {tokens.name for tokens in (RECOMMENDED, *PUBLISHED.values(), RANDOM)}
    parts.append(masks([line for line in lines if line["run"] == "tokens" and line["tokens"] in used]))
    return "\n\n".join("\n".join(part) for part in parts if part)


def scores(lines: Sequence[Line], metric: str, teacher: float) -> list[str]:
    """Mean and deviation over seeds, and paired differences with 95 % t intervals."""
    by_loss = by_seed(lines, "test", metric)
    rows = [f"| test {metric} | mean ± std | seeds | minus {ALONE} | minus {MSE} |", "|---|---|---|---|---|"]
    rows.append(f"| teacher | {teacher:.3f} | 1 | | |")
    for loss, own in by_loss.items():
        if own:
            values = list(own.values())
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            differences = [difference(own, by_loss[base]) if base != loss else "" for base in (ALONE, MSE)]
            rows.append(f"| {loss} | {statistics.mean(values):.3f}{spread} | {len(values)} | {' | '.join(differences)} |")
    return rows


def by_seed(lines: Sequence[Line], split: str, metric: str) -> dict[str, dict[int, float]]:
    """A score of each seed, for every loss."""
    return {loss: {line["seed"]: line[split][metric] for line in lines if line["loss"] == loss} for loss in LOSSES}


def difference(own: dict[int, float], base: dict[int, float]) -> str:
    """Over the seeds that both have."""
    return interval([own[seed] - base[seed] for seed in own if seed in base])


def weights(tried: dict[str, dict[float, float]], metric: str) -> list[str]:
    """The search: a column for every weight that any loss was tried with, the best of each loss in bold."""
    columns = sorted({weight for own in tried.values() for weight in own})
    rows = [f"| val {metric} at weight | {' | '.join(f'{w:g}' for w in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for loss, own in tried.items():
        best = best_weight(own)
        cells = (f"**{own[w]:.3f}**" if w == best else f"{own[w]:.3f}" if w in own else "" for w in columns)
        rows.append(f"| {loss} | {' | '.join(cells)} |")
    return rows if columns else []


def suggestions(lines: Sequence[Line], tried: dict[str, dict[float, float]], spread: dict[str, float]) -> list[str]:
    """What `suggest_loss_weight` names, beside the best weight on val and those within two of the seeds' deviations of it."""
    named = (f"by {name}, share {share:g}" for name, share in zip(("losses", "gradients"), SHARES.values(), strict=True))
    rows = [f"| loss weight | best on val | as good | {' | '.join(named)} |", "|---|---|---|---|---|"]
    for line in lines:
        own = tried[line["loss"]]
        best = best_weight(own)
        good = [weight for weight in own if own[weight] >= own[best] - 2 * spread[line["loss"]]]
        cells = " | ".join(f"{float(f'{line[by]:.2g}'):g}" for by in ("by_loss", "by_gradient"))
        rows.append(f"| {line['loss']} | {best:g} | {min(good):g} to {max(good):g} | {cells} |")
    return rows if lines else []


def masks(lines: Sequence[Line]) -> list[str]:
    """What the tokens take away from the teacher's task, and how their masks look, all on val."""
    rows = [
        "| tokens | task loss on val | unmasked | focus | emphasis | coverage | largest Dice | entropy of the weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in {line["tokens"]: line for line in lines}.values():  # the latest of tokens that were learned again
        looks = f"{line['focus']:.2f} | {line['emphasis']:.2f}"
        coverage = f"{min(line['coverage']):.2f} to {max(line['coverage']):.2f}"
        dice = f"{line['dice']:.2f}" if len(line["coverage"]) > 1 else ""
        entropy = "" if line["entropy"] is None else f"{line['entropy']:.2f}"
        losses = f"{line['task_loss']:.3f} | {line['unmasked']:.3f}"
        rows.append(f"| {line['tokens']} | {losses} | {looks} | {coverage} | {dice} | {entropy} |")
    return rows if lines else []


def with_tables(page: str) -> str:
    """``page`` with the tables of each file in bench/results that a comment names, up to the comment `end`."""
    return re.sub(
        r"(?<=<!-- )(real-\w+\.jsonl) -->.*?(?=<!-- end -->)",
        lambda found: f"{found[1]} -->\n\n{tables(RESULTS / found[1])}\n\n",
        page,
        flags=re.S,
    )


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
