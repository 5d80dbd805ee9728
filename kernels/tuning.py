"""Launch configurations: a pure function of dtype, tokens and layout, so that nothing is timed or compiled twice."""

from dataclasses import dataclass

import torch

MIN_ROWS = 8  # tokens are padded to at least this many rows of a matrix product


@dataclass(frozen=True)
class Config:
    block_c: int
    block_p: int
    num_warps: int
    num_stages: int = 1


def forward_config(dtype: torch.dtype, num_tokens: int, fast: int) -> Config:
    """Blocks of the forward and border kernels."""
    if dtype == torch.float64:  # no matrix instruction: the product is a [T, C, P] block
        return Config(8, 16 if num_tokens > 16 else 32, 4)
    if num_tokens <= 8:
        return Config(32, 128, 4, 3)
    return Config(32, 64, 4, 2) if num_tokens <= 32 else Config(32, 32, 4, 2)


def backward_config(dtype: torch.dtype, num_tokens: int, fast: int) -> Config:
    """Blocks of the backward kernel."""
    return Config(32, 64 if num_tokens > 16 else 128, 4)


def finish_block(rows: int) -> int:
    """Rows of partial sums that the finishing kernel adds at a time."""
    return max(16, 1024 // rows)
