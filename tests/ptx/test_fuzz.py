"""Random cases of both stages on the emulated GPU.

A new kind of call compiles kernels of its own, half a minute each. So the tests draw sizes, strides, values and numbers for a
few kinds; ``python -m tests.fuzz --emulator sm_90`` draws all.
"""

import os
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="needs the test extra")

from maskd_triton.kernels import launch, tuning
from tests.fuzz import run
from tests.fuzz.cases import Variant, cases, cases_of
from tests.ptx.driver import Device

BLOCKS = 2
PIXELS_FIRST = ("nchw", "every second channel", "expanded images")
CHANNELS_FIRST = ("channels_last", "nlc")

_PLAIN: dict[str, Any] = {"tokens": 3, "weighted": True, "standardize": "", "valid": "", "through": "function"}
_LOSS: dict[str, Any] = {"masks": "", "mask_weights": False, "align": 0, "resize": "", "sizes": ()}
_LOSS |= {"custom": "from the start", "power": 2, "distance": "squared"}
VARIANTS = {
    "squares": Variant(2, ("fp32", "fp32"), PIXELS_FIRST, _PLAIN | _LOSS),
    "half": Variant(2, ("bf16", "bf16"), CHANNELS_FIRST, _PLAIN | _LOSS | {"valid": "rectangles", "rubbish": "nan"}),
    "cosine": Variant(2, ("fp16", "fp32"), PIXELS_FIRST, _PLAIN | _LOSS | {"distance": "cosine", "standardize": "channel"}),
    "tokens": Variant(1, ("fp32", ""), PIXELS_FIRST, _PLAIN | {"inputs": True}),
    "tokens, half": Variant(1, ("fp16", ""), CHANNELS_FIRST, _PLAIN | {"inputs": False, "valid": "pixels", "rubbish": "inf"}),
}


@pytest.mark.skipif("MASKD_FUZZ_CASES" in os.environ, reason="python -m tests.fuzz draws other cases")
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_random_cases_of_a_few_kernels(variant: Variant, emulated_gpu: Device) -> None:
    stream = 200 + list(VARIANTS.values()).index(variant)
    run.tried("triton", 12, stream, cases_of(variant), emulated_gpu.initcheck)


@pytest.mark.skipif("MASKD_FUZZ_CASES" not in os.environ, reason="python -m tests.fuzz --emulator sm_90 runs it")
@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_cases(block: int, emulated_gpu: Device, record_property: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every second block with 64-bit offsets."""
    if block % 2:
        monkeypatch.setattr(launch.Map, "is_wide", True)
    tuning.forget()
    number = -(-run.CASES // BLOCKS)
    record_property("cases", number)
    record_property("share", run.tried("triton", number, 100 + block, cases(300), emulated_gpu.initcheck))
