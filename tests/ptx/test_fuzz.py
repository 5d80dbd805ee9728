"""Random cases of both stages on the emulated GPU: ``python -m tests.fuzz --emulator sm_90``.

Most compile kernels of their own, half a minute each, so no other run holds them."""

import os
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="needs the test extra")

from maskd_triton.kernels import launch
from tests.fuzz import run
from tests.ptx.driver import Device

BLOCKS = 2

pytestmark = pytest.mark.skipif("MASKD_FUZZ_CASES" not in os.environ, reason="python -m tests.fuzz --emulator sm_90 runs it")


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_cases(block: int, emulated_gpu: Device, record_property: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every second block with 64-bit offsets."""
    monkeypatch.setattr(launch, "PLANS", {})
    if block % 2:
        monkeypatch.setattr(launch, "is_wide", lambda *_: True)
    number = -(-run.CASES // BLOCKS)
    record_property("cases", number)
    record_property("share", run.tried("triton", number, 100 + block, most=300, inside=emulated_gpu.initcheck))
