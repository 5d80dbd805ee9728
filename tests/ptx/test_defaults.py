"""The model that chooses launch configurations, by hand and on a kernel, and what it says of today's defaults."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import triton

from bench import counts, defaults
from bench.defaults import Candidate, Figures
from maskd_triton.kernels import tuning
from maskd_triton.kernels.tuning import Config, Key

BENCH = Path(__file__).parents[2] / "bench"
RESULTS = json.loads((BENCH / "results/defaults.json").read_text())
COUNTS = json.loads((BENCH / "results/counts.json").read_text())
KEY = Key("forward_kernel", 16, "nhwc", 256, 8, 13)
FIGURES = ("memory", "instructions", "shared", "occupancy")


def candidates(*figures: tuple[float, float, float, float] | None) -> list[Candidate]:
    """Made-up candidates, told apart by their channels; None is out."""
    return [Candidate(Config(i, 64, 128), Figures(*each) if each else None) for i, each in enumerate(figures)]


def order(*figures: tuple[float, float, float, float] | None) -> list[int]:
    """Their places in ``figures``, the chosen one first."""
    return [candidate.config.block_c for candidate, _ in defaults.ranked(candidates(*figures))]


def test_the_largest_of_four_decides() -> None:
    assert order((1.0, 1.3, 0.1, 0.1), (1.0, 0.1, 1.2, 0.1), (1.0, 0.1, 0.1, 1.1), (1.4, 0.1, 0.1, 0.1)) == [2, 1, 0, 3]


def test_ties_go_to_the_smaller_sum_of_the_others() -> None:
    assert order((1.00, 0.9, 0.9, 0.9), (1.019, 0.2, 0.2, 0.2), (1.021, 0.1, 0.1, 0.1)) == [1, 0, 2]
    assert order((1.00, 0.5, 0.3, 0.2), (1.00, 0.3, 0.3, 0.3)) == [1, 0]


def test_what_is_out_has_no_place() -> None:
    assert order(None, (2.0, 0.1, 0.1, 0.1), None, (1.0, 0.1, 0.1, 0.1)) == [3, 1]
    result = defaults.Result(90, "bf16", KEY, candidates(None, (1.0, 0.1, 0.1, 0.1)))
    assert (result.rank, result.gain) == (None, None)
    assert "the default is out" in str(result)


def test_the_defaults_place() -> None:
    result = defaults.Result(90, "bf16", KEY, candidates((1.3, 0.1, 0.1, 0.1), (1.0, 0.1, 0.1, 0.1), (1.2, 0.1, 0.1, 0.1)))
    assert (result.rank, result.gain) == (3, 1.3)
    assert "1.30 x" in str(result)
    assert result.row()["chosen"] == 1


def test_loads_in_flight() -> None:
    """By hand: 25.4 GB/s a multiprocessor and 0.65 us are 16.5 KB; two programs hold two tiles of 16x128 half features each."""
    assert defaults.needed("forward_kernel", 90) == pytest.approx(16496, abs=1)
    assert defaults.needed("gate_kernel", 90) == pytest.approx(8248, abs=1)  # half of what it moves is written
    assert defaults.needed("mask_kernel", 80) == pytest.approx(12278, abs=1)
    loads = [defaults.in_flight("forward_kernel", Config(16, 128, 128, stages), 2, 2) for stages in (1, 2, 3)]
    assert loads == [16384, 16384, 32768]


@pytest.mark.skipif(triton.__version__ != COUNTS["packages"]["triton"], reason="counted with another Triton")
def test_a_kernel_on_two_configurations() -> None:
    """A pipeline of a half kernel reads its buffers with conflicts of banks; the default's figures are the committed counts."""
    today = tuning.default(KEY)
    result = defaults.search(90, "bf16", KEY, [today, Config(64, 32, 128, 2, 255)])
    assert [candidate.config for candidate, _ in result.order] == [today, Config(64, 32, 128, 2, 255)]
    good, bad = (figures for _, figures in result.order)
    assert bad.time == bad.shared > defaults.MARGIN * good.time
    assert good.time == good.memory == pytest.approx(1.03, abs=0.01)  # masks, float32, beside two maps of 256 half channels
    wanted = json.loads(json.dumps(asdict(counts.Case("sm_90", "bf16", "nhwc")))) | {"kernel": KEY.kernel}
    (known,) = (row for row in COUNTS["rows"] if wanted.items() <= row.items())
    assert good.instructions == pytest.approx(known["instructions"], rel=0.03)
    assert good.shared == pytest.approx(known["shared"], rel=0.03)
    assert result.default.asked == pytest.approx(known["asked"], rel=0.01)


def test_a_spilling_candidate_is_out() -> None:
    candidate = defaults.judge(KEY, 90, "bf16", Config(64, 32, 128, 1, 64))
    assert candidate.figures is None
    assert "bytes spilled" in candidate.reasons[0]


def test_what_cannot_be_chosen_is_not_run() -> None:
    candidate = defaults.judge(KEY, 90, "bf16", Config(64, 32, 256, 1, 255), hopeless=1.0)
    assert candidate.in_flight < defaults.needed(KEY.kernel, 90)
    assert (candidate.figures, candidate.reasons) == (None, defaults.TOO_FEW)


def test_the_search_was_whole() -> None:
    """Every kernel and layout of bfloat16, on both architectures."""
    found = {(row["arch"], row["dtype"], row["layout"], row["kernel"]) for row in RESULTS["rows"]}
    assert found >= set(itertools.product(("sm_90", "sm_80"), ("bf16",), ("nchw", "nhwc"), defaults.READS))


@pytest.mark.skipif(triton.__version__ != RESULTS["packages"]["triton"], reason="counted with another Triton")
@pytest.mark.parametrize("row", RESULTS["rows"], ids=lambda r: f"{r['arch']}-{r['dtype']}-{r['layout']}-{r['kernel']}")
def test_defaults_are_near_the_best(row: dict[str, object]) -> None:
    key = Key(**{name: row[name] for name in Key._fields})
    found = [
        Candidate(Config(**each["config"]), Figures(*(each[name] for name in FIGURES)) if "memory" in each else None)
        for each in row["candidates"]
    ]
    assert found[0].config == tuning.default(key), "run `python -m bench.defaults --out bench/results/defaults.json` again"
    best, figures = defaults.ranked(found)[0]
    assert best.config == found[row["chosen"]].config
    assert found[0].figures is not None
    assert found[0].figures.time <= defaults.MARGIN * figures.time
