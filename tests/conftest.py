"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

_TARGETS = [("eager", "cpu"), *([("eager", "cuda"), ("triton", "cuda")] if HAS_GPU else [("triton", "cpu")])]


@pytest.fixture(params=_TARGETS, ids=lambda target: "-".join(target))
def target(request: pytest.FixtureRequest) -> tuple[str, str]:
    """An implementation and the device it runs on: with a GPU the same tests run on CUDA tensors."""
    if request.param[0] == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param
