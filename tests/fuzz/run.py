"""Many cases, one after the other, drawn by hypothesis from a seed and shrunk where one fails."""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import hypothesis
from hypothesis.strategies import SearchStrategy

from tests.answers import check
from tests.cases import MOST, MOST_INTERPRETED, Case
from tests.fuzz.cases import cases
from tests.given import given_by
from tests.helpers import SEED as SHIFT

CASES = int(os.environ.get("MASKD_FUZZ_CASES", "800"))  # as ``python -m tests.fuzz`` sets them
SEED = int(os.environ.get("MASKD_FUZZ_SEED", "0")) + SHIFT


def tried(
    impl: str,
    number: int,
    stream: int,
    drawn: SearchStrategy[Case] | None = None,
    inside: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> float:
    """``number`` cases of ``impl``, each ``inside`` of a context; the largest error as a share of what is allowed.

    ``stream``: those that run beside each other draw other cases. ``drawn``: the cases; None: any."""
    if drawn is None:
        drawn = cases(MOST if impl == "eager" else MOST_INTERPRETED)
    shares = [0.0]

    @hypothesis.seed(1000 * SEED + stream)
    @hypothesis.settings(
        max_examples=number, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), print_blob=False
    )
    @hypothesis.given(drawn)
    def run(case: Case) -> None:
        with inside():
            shares.append(once(case, impl))

    run()
    return max(shares)


def once(case: Case, impl: str) -> float:
    """The largest error of one case as a share of what is allowed; AssertionError where it is more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of what is infinite
        return check(given_by(case), impl)
