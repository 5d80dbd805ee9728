"""Mask weights of valid pixels: the operator ``pool`` and its derivative."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _eager
from .library import Function, call, differentiable, kernels, once_differentiable, operator


def _new(features: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty((x.shape[0], 9, x.shape[1] + 1), dtype=_eager.acc_dtype(x.dtype)) for x in features]


@operator(
    "(Tensor[] features, Tensor[] valid, SymInt[] heights, str impl) -> Tensor[]", fake=lambda features, *_: _new(features)
)
def pool(features: list[Tensor], valid: list[Tensor], heights: list[int], impl: str) -> list[Tensor]:
    """Strip sums ``[N, 9, C_i + 1]`` over the valid pixels of ``features [N, C_i, P_i]``; the last column counts pixels.

    What a 3x3 window over the valid pixels misses at their border, as ``_eager.STRIPS`` says of a whole image.
    ``valid``: ``[N, P_i]`` bytes.
    """
    sums = _new(features)
    forward = kernels("pool").forward if impl == "triton" else _eager.pool_forward
    forward(features, valid, heights, sums)
    return sums


class _Pool(Function):
    @staticmethod
    def forward(valid: list[Tensor], heights: list[int], impl: str, *features: Tensor) -> tuple[Tensor, ...]:
        return tuple(call(pool, features, list(features), valid, heights, impl))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        valid, ctx.heights, _, *features = inputs
        ctx.dtypes = [x.dtype for x in features]
        ctx.save_for_backward(*valid)

    @staticmethod
    @once_differentiable("pool")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            torch.bmm(g[:, :, :-1].transpose(1, 2), _eager.strips_of(v, height).to(g.dtype)).to(dtype)
            for g, v, height, dtype in zip(grads, ctx.saved_tensors, ctx.heights, ctx.dtypes, strict=True)
        ]
        return None, None, None, *gradients


def strip_sums(features: Sequence[Tensor], valid: Sequence[Tensor], heights: Sequence[int], impl: str) -> list[Tensor]:
    """What `pool` gives, differentiable in ``features``."""
    return list(_Pool.call(features, list(valid), list(heights), impl, *features))


def valid_weights(
    features: Sequence[Tensor],
    weighting: Sequence[tuple[Tensor, Tensor]],
    valid: Sequence[Tensor],
    heights: Sequence[int],
    impl: str,
) -> list[Tensor]:
    """Mask weights ``[N, T]`` of every level's valid pixels, differentiable in features and weighting."""
    sums = strip_sums(features, valid, heights, impl)
    return [_eager.weights_of_valid(each, rows, bias) for each, (rows, bias) in zip(sums, weighting, strict=True)]


differentiable(pool, strip_sums)
