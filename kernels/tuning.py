"""Launch configurations: a pure function of dtype, tokens and layout, so that nothing is timed or compiled twice.

Chosen by compiling (``python -m bench.inspect``): no spill and 16-byte loads on sm_80, sm_90, sm_100 and gfx942, at least two
programs per multiprocessor, and runs of at least 128 contiguous bytes. Not yet timed on a GPU.
"""

from dataclasses import dataclass

import torch
import triton

from .tiles import CHANNELS


@dataclass(frozen=True)
class Config:
    """Channels and pixels of a tile, threads of a program, stages of the load pipeline."""

    block_c: int
    block_p: int
    threads: int
    num_stages: int = 1

    @property
    def num_warps(self) -> int:
        return self.threads // warp_size()


def token_rows(num_tokens: int) -> int:
    """Rows that tokens are padded to in a matrix product: a power of 2, at least 8."""
    return max(8, triton.next_power_of_2(num_tokens))


def warp_size() -> int:
    """Threads in a warp: 64 on AMD's CDNA GPUs."""
    return 64 if torch.version.hip else 32


def forward_config(itemsize: int, num_tokens: int, fast: int) -> Config:
    """Tile of the forward and border kernels; ``itemsize`` is that of the wider of the two feature dtypes."""
    if itemsize == 8:  # no matrix instruction: the product is a [T, C, P] block
        return Config(2, 16, 256) if num_tokens > 16 else Config(8, 32, 128)
    if num_tokens > 8:
        return Config(16 if itemsize == 4 else 32, 64, 256, 3)
    if fast == CHANNELS:
        return Config(32, 64, 256, 3) if itemsize == 4 else Config(64, 64, 256, 3)
    return Config(16, 64, 128, 3) if itemsize == 4 else Config(16, 128, 128, 3)


def backward_config(itemsize: int, num_tokens: int, fast: int) -> Config:
    """Tile of the kernels that write a feature map; ``itemsize`` is that of the widest feature dtype."""
    if itemsize == 8:
        return Config(64, 16, 256) if fast == CHANNELS else Config(16, 64, 256)
    if fast == CHANNELS:
        return Config(128, 32, 128)
    return Config(32, 64 if num_tokens > 16 else 128, 128)


def finish_block(rows: int) -> int:
    """Rows of partial sums that the finishing kernel of stage 2 adds at a time."""
    return max(16, 1024 // rows)


def add_blocks(rows: int) -> dict[str, int]:
    """Blocks in which the finishing kernel of stage 1's forward pass adds sums of channels and of pairs of ``rows`` tokens."""
    return {"ROWS": 64, "PAIR_ROWS": max(1, 4096 // rows**2), "BLOCK_C": _parameter_block(rows)}


def share_blocks(rows: int) -> dict[str, int]:
    """Blocks in which the finishing kernel of stage 1's backward pass adds shares of gradients."""
    return {"ROWS": 64, "SHARE_ROWS": max(16, 2048 // rows), "BLOCK_C": _parameter_block(rows)}


def _parameter_block(rows: int) -> int:
    """Channels of a block that holds pool rows of all strips and tokens in registers."""
    return max(8, min(64, 512 // rows))
