"""Both implementations against the published formulas in float64: every case of one table, forward and backward.

``cases.py`` is the table, ``bounds.py`` says how far off a result may be. ``MASKD_TEST_SEED=k`` gives all of it other numbers.
"""

from typing import Any

import pytest
import torch

from tests import cases
from tests.answers import Comparison, check, ours
from tests.cases import SPECIAL, STAGE_1, STAGE_2, Case, covering
from tests.given import given_by
from tests.problems import Target

PAIRS = {
    f"{stage}: pairs {i}": case
    for stage, options in ((2, STAGE_2), (1, STAGE_1))
    for i, case in enumerate(covering(stage, options))
}
CASES = {**SPECIAL, **PAIRS}
EVERY_FOURTH = dict(list(CASES.items())[::4])


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, target: Target) -> None:
    check(given_by(CASES[name]), *target)
