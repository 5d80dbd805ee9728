"""Tensors in the layouts that users bring, criteria in the precision that a test needs, the programs of the guides."""

import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskd_triton import MaskLearner

SEED = int(os.environ.get("MASKD_TEST_SEED", "0"))  # shifts every seed of the tests of numbers
INTERPRETED = ("triton", "cpu")
TARGETS = [("eager", "cpu"), *([("eager", "cuda"), ("triton", "cuda")] if torch.cuda.is_available() else [INTERPRETED])]
DOCS = Path(__file__).parents[1] / "docs"
NLC = "nlc"  # strides of "channels_last", but for an axis of one image
BATCH_LAST = "batch_last"  # dense, but neither pixels nor channels lie next to each other


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same values with pixels ("nchw") or channels ("channels_last", permuted "nlc") next to each other."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == NLC:
        return x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, x.shape[2:])
    if layout == BATCH_LAST:
        return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    return x.contiguous()


def draw_parameters(learner: MaskLearner, generator: torch.Generator) -> None:
    """Tokens, then weighting, level by level: masks away from 0.5 and from each other, weights away from 1 / T."""
    modules = list(learner.mask_modules)
    scaled = [(module.mask_token, module.channels**-0.5) for module in modules]
    for module in modules if learner.weight_mask else ():
        fan_in = module.channels**-0.5
        scaled += zip(module.weighting(), (0.3 * fan_in, 1, fan_in, 1), strict=True)
    for p, scale in scaled:
        p.detach().copy_(scale * torch.randn(p.shape, generator=generator))


def strides(x: Tensor) -> list[int]:
    """Those that say where an element lies: an axis of one element has any."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def moved(x: Tensor, device: str) -> Tensor:
    """``x`` on ``device`` with its strides and storage offset, which ``Tensor.to`` would not keep."""
    storage = x.new_empty(0).set_(x.untyped_storage())
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def far_apart(x: Tensor, layout: str, device: str) -> Tensor:
    """``x [2, 9, 5, 7]`` in float16 with an image of 2**31 elements or more, in memory that nobody else touches."""
    strides = {"nchw": (64, 2**28, 7, 1), "channels_last": (16, 1, 7 * 2**26, 2**26)}[layout]
    size = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    if device == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        memory = torch.frombuffer(mmap.mmap(-1, 2 * size, flags), dtype=torch.float16)
    else:
        memory = torch.zeros(size, dtype=torch.float16, device=device)
    return memory.as_strided(x.shape, strides).copy_(x)


def rounding(dtype: torch.dtype, target: tuple[str, str]) -> float:
    """Relative error of rounding float32 to ``dtype``: half a unit, but Triton's interpreter truncates to bfloat16."""
    truncates = dtype == torch.bfloat16 and target == ("triton", "cpu")
    return torch.finfo(dtype).eps / (1 if truncates else 2)


def require_private(owner: Any, *names: str) -> None:
    """RuntimeError where ``owner``, a module or class of Triton, no longer has what the tests patch in it."""
    for name in names:
        if name not in vars(owner):
            import triton

            raise RuntimeError(f"the tests patch {owner.__name__}.{name}, which Triton {triton.__version__} does not have")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A criterion made inside keeps its tables in ``dtype``; a later ``.double()`` brings back no digit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def program(page: str) -> dict[str, Any]:
    """The names that the blocks of a page leave behind: they are one program."""
    code = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)
    names: dict[str, Any] = {"__name__": "guide"}
    before = torch.random.get_rng_state()
    exec("\n".join(code), names)
    torch.random.set_rng_state(before)
    return names
