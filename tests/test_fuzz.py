"""Random cases of both stages: right within the error of eager torch, the same in every run, no input written.

Here a fixed choice, the same in every run; ``python -m tests.fuzz --cases N --seed S`` tries others.
"""

from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="needs the test extra")

from tests.fuzz import run

pytestmark = pytest.mark.slow

BLOCKS = 12
IMPLS = {"eager": 0.94, "triton": 0.06}  # shares of the cases


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("impl", IMPLS)
def test_random_cases(impl: str, block: int, record_property: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every second block the kernels take 64-bit offsets, as for images of 2**31 elements."""
    if impl == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        wide_offsets(block % 2 == 1, monkeypatch)
    number = -(-round(run.CASES * IMPLS[impl]) // BLOCKS)
    record_property("cases", number)
    record_property("share", run.tried(impl, number, list(IMPLS).index(impl) * BLOCKS + block))


def wide_offsets(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from maskd_triton.kernels import launch, tuning

    tuning.forget()
    if wide:
        monkeypatch.setattr(launch.Map, "is_wide", True)
