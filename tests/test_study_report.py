"""The study's page: known answers on made-up results, and the committed page is that of the committed results."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn", reason="needs the demo extra")  # and scipy, which it needs
pytest.importorskip("matplotlib", reason="needs the demo extra")

from examples.study import report
from examples.study.__main__ import PAGE, RESULTS
from examples.study.plan import ALONE, MSE, Settings, jobs
from examples.study.results import Line, Results, read

CELL = "segmentation, sparse"
SETTINGS = Settings(seeds=3, teachers=1, schedules=(10, 20), cells=(CELL,), full=())
SCORES = {  # of seeds 0, 1 and 2
    ALONE: [0.10, 0.20, 0.30],
    MSE: [0.40, 0.50, 0.60],
    "MasKD, weighted": [0.51, 0.60, 0.69],  # .11, .10, .09: ahead
    "MasKD, customised": [0.39, 0.51, 0.60],  # -.01, .01, 0: open
    "ground-truth masks": [0.30, 0.40, 0.49],  # -.10, -.10, -.11: behind
}
SESSION = {
    "what": "session",
    "command": "python -m examples.study",
    "device": "a CPU",
    "cpu_cores": 2,
    "threads": 1,
    "workers": 2,
    "packages": {"torch": "2.13.0"},
    "date": "2026-11-29T12:00:00+00:00",
}


def made_up(path: Path, seeds: int = 3) -> list[Line]:
    results = Results(path, SETTINGS)
    results.append(SESSION)
    for job in jobs(SETTINGS):
        found: Line = {"wall_seconds": 6.0}
        if job.what == "teacher":
            found |= {"validation": 0.8, "test": 0.75}
        elif job.what == "tokens":
            level = {"coverage": [0.0, 0.99], "collapsed": ["token 1 is on everywhere: coverage 0.99", "token 0 is empty"]}
            found |= {"task_loss": 0.5, "unmasked_task_loss": 0.25, "levels": [level, {"collapsed": []}]}
        elif job.what == "tuning":
            found |= {"validation": 0.5}
        elif job.what == "timing":
            found |= {"step_ms": 12.5}
        elif job.steps == 20 or job.seed is None or job.seed >= seeds:
            continue
        else:
            variant = str(job.variant)
            found |= {
                "loss_weight": 0.0 if variant == ALONE else 3.0,
                "test": SCORES[variant][job.seed],
                "curve": [[5, 0.1], [10, 0.2]],
                "step_ms": 10.0 + job.seed,
                "peak_extra_bytes": 3 * 2**20 if variant == MSE and job.seed == 0 else None,
            }
        results.add(job, found)
    return read(path)


@pytest.fixture
def page(tmp_path: Path) -> str:
    return report.page(made_up(tmp_path / "made-up.jsonl"), "made-up.jsonl")


def test_differences_have_known_intervals() -> None:
    each = report.difference([1.0, 2.0, 3.0])
    assert (each.mean, each.pairs, each.ahead) == (2, 3, 3)
    assert each.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # Student's t of 2 degrees of freedom, two-sided
    assert each.verdict == "open"
    assert report.difference([1.0, 1.1, 1.2]).verdict == "ahead"
    assert report.difference([-1.0, -1.1, -1.2]).verdict == "behind"
    one = report.difference([0.5])
    assert (one.half, one.verdict, str(one)) == (math.inf, "open", "+0.500 (1 pair)")
    with pytest.raises(ValueError, match="values: expected at least one difference, got none"):
        report.difference([])


def test_scores(page: str) -> None:
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert f"{half:.3f}" == "0.025"
    assert "| student alone | 0.200 ± 0.100 | 3 |  | -0.300 ± 0.000 | 0 of 3 |" in page
    assert "| feature MSE | 0.500 ± 0.100 | 3 | +0.300 ± 0.000 |  |  |" in page
    assert "| MasKD, weighted | 0.600 ± 0.090 | 3 | +0.400 ± 0.025 | +0.100 ± 0.025 | 3 of 3 |" in page
    assert "| MasKD, customised | 0.500 ± 0.105 | 3 | +0.300 ± 0.025 | +0.000 ± 0.025 | 1 of 3 |" in page
    assert "teachers: 0.750." in page


def test_words(page: str) -> None:
    words = page[page.index("## In plain words") : page.index("## Test metric")]
    against_mse, against_alone = words.split("Against the **student alone**")
    assert "| | better | no difference shown | worse | 10 steps |" in against_mse
    assert "| MasKD, weighted | 1 | 0 | 0 | +0.100 (1) |" in against_mse
    assert "| MasKD, customised | 0 | 1 | 0 | +0.000 (1) |" in against_mse
    assert "| ground-truth masks | 0 | 0 | 1 | -0.103 (1) |" in against_mse
    where = f"- **MasKD, weighted**: better: {CELL} (10 steps +0.100 ± 0.025). no difference shown: nowhere. worse: nowhere."
    assert where in against_mse
    assert "| MasKD, weighted | 1 | 0 | 0 | +0.400 (1) |" in against_alone
    assert "**Where it helps**: MasKD, weighted was better than the feature MSE in 1 of 1 comparisons, and worse in 0." in words
    assert "Its mean lead is +0.100 after 10 steps." in words
    assert (
        "no gain on the feature MSE was shown for MasKD, customised; worse more often than better were ground-truth masks."
        in words
    )
    assert "Against the student alone, MasKD, weighted was better in 1 of 1, and worse in 0." in words
    assert "**What to choose here**: MasKD, weighted." in words
    assert "| feature MSE | 1 | 0 | 0 | +0.300 (1) |" in against_alone


def test_nothing_better_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORES, "MasKD, weighted", SCORES[MSE])
    page = report.page(made_up(tmp_path / "made-up.jsonl"), "made-up.jsonl")
    assert "| MasKD, weighted | 0 | 1 | 0 | +0.000 (1) |" in page
    assert "**What to choose here**: the feature MSE; no other loss was more often better than worse." in page
    assert "was shown for MasKD, weighted and MasKD, customised; worse" in page


def test_a_student_that_is_better_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORES, ALONE, [0.81, 0.90, 0.99])
    page = report.page(made_up(tmp_path / "made-up.jsonl"), "made-up.jsonl")
    assert "Against the student alone, MasKD, weighted was better in 0 of 1, and worse in 1." in page
    choice = f"MasKD, weighted; but nothing to distil in {CELL} after 10 steps, where the student alone was better."
    assert f"**What to choose here**: {choice}" in page


def test_costs_and_collapse(page: str) -> None:
    assert "| student alone | 12.5 | - | - |" in page
    assert "| feature MSE | 12.5 | 3.0 | 3 |" in page
    assert "| 6 tokens, weighted, channel | 1 | 2 | 1 | 1 | 0 | 0 | 0.500 | 0.250 |" in page


def test_a_partial_page_says_so(tmp_path: Path, page: str) -> None:
    plan = len(list(jobs(SETTINGS)))
    assert f"**Partial**: {plan - 15} of {plan} runs are done." in page  # three seeds of five variants are left
    lines = made_up(tmp_path / "one.jsonl", seeds=1)
    one = report.page(lines, "one.jsonl")
    assert "No two pairs with the feature MSE yet." in one
    assert "| feature MSE | 0.400 | 1 | +0.300 (1 pair) |  |  |" in one
    assert "What to choose" not in one
    none = report.page(made_up(tmp_path / "none.jsonl", seeds=0), "none.jsonl")
    assert "No student is trained yet." in none
    assert not report.plot_curves(tmp_path / "none.png", read(tmp_path / "none.jsonl"))
    assert report.plot_curves(tmp_path / "curves.png", lines)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_published_figures_stand_apart(page: str) -> None:
    ours, published = page.split("## As published, not measured here")
    assert "COCO" not in ours
    assert published.count("| 38.4 |") == 2
    assert "segmentation" not in published


def test_readme_says_what_the_page_says() -> None:
    readme, page = (path.read_text() for path in (PAGE.parents[1] / "README.md", PAGE))
    told = readme.split("## Does it help?")[1].split("The MSE took")[0]
    intervals = re.findall(r"[+-]\d\.\d{3} ± \d\.\d{3}", told)
    scores = re.findall(r"(?:alone|feature MSE|MasKD) (\d\.\d{3})", told)
    assert len(intervals) >= 8
    assert len(scores) == 6
    assert all(f"| {score} ± " in page for score in scores)
    assert all(interval in page for interval in intervals)


def test_the_page_is_that_of_the_results() -> None:
    lines: list[dict[str, Any]] = read(RESULTS)
    pictures = [name for name in report.CAPTIONS if (RESULTS.parent / f"study-{name}.png").exists()]
    assert PAGE.read_text() == report.page(lines, RESULTS.name, pictures)
