"""Random cases of both stages: right within what rounding allows, the same in every run, no input written.

Here a fixed choice, the same in every run; ``python -m tests.fuzz --cases N --seed S`` tries others.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="needs the test extra")

import hypothesis

from tests.cases import Case
from tests.fuzz import run
from tests.fuzz.cases import ARGUMENTS, BY_HAND, DRAWN, cases

BLOCKS = 12
OF_THE_MODULE = ("advance", "align", "cast", "container", "own_align", "pretrained", "resize", "sizes")
IMPLS = {"eager": 0.94, "triton": 0.06}  # shares of the cases


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("impl", IMPLS)
def test_random_cases(impl: str, block: int, record_property: Any) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    number = -(-round(run.CASES * IMPLS[impl]) // BLOCKS)
    record_property("cases", number)
    record_property("share", run.tried(impl, number, list(IMPLS).index(impl) * BLOCKS + block))


@pytest.mark.parametrize("function", ARGUMENTS, ids=lambda function: function.__qualname__)
def test_every_argument_is_drawn(function: Callable[..., Any]) -> None:
    """A new option must be drawn, too: name in ``ARGUMENTS`` the field of a case that draws it."""
    assert inspect.signature(function).parameters.keys() - {"self"} == ARGUMENTS[function].keys()
    assert set(ARGUMENTS[function].values()) <= {*DRAWN, *BY_HAND, "tester"}


@pytest.mark.slow
def test_every_field_is_drawn_in_every_pair() -> None:
    """A field that ``sound`` puts back to its usual value is not tried; and so is a pair of options that it lets not meet."""
    assert {f.name for f in fields(Case)} == {*DRAWN, *BY_HAND}
    met: dict[str, set[str]] = defaultdict(set)

    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=2000, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(cases())
    def draw(case: Case) -> None:
        if case.stage == 2:
            drawn = [f.name for f in fields(Case) if getattr(case, f.name) != f.default]
            for name in drawn:
                met[name].update(drawn)

    draw()
    of_stage_2 = [f.name for f in fields(Case) if f.name not in ("stage", "inputs", "dice_scale")]
    apart = {tuple(sorted((a, b))) for a in of_stage_2 for b in of_stage_2 if b not in met[a]}
    assert apart == {("standardize", "tokenless"), ("through", "tokenless"), *((name, "through") for name in OF_THE_MODULE)}
