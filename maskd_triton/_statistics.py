"""Mean and deviation of every channel over many batches."""

import torch
from torch import Tensor

from ._eager import acc_dtype

EPS = 1e-5  # share of the mean variance that every channel gets: a channel that never moves must not divide by 0


class ChannelStatistics:
    """Running mean and variance of ``[N, C, H, W]`` batches, merged by Chan's formula: no large sums are subtracted."""

    def __init__(self) -> None:
        self.pixels = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())  # sum of squared distances from the mean

    def add(self, x: Tensor, valid: Tensor | None = None) -> None:
        """Take in one batch, in float32 (float64 for float64); of ``valid [N, P]`` only the pixels that are not 0."""
        x = x.transpose(0, 1).flatten(1)
        if valid is not None:
            x = x[:, valid.flatten() != 0]
        pixels = x.shape[1]
        if pixels == 0:
            return
        variance, mean = torch.var_mean(x.to(acc_dtype(x.dtype)), 1, correction=0)
        self._merge(pixels, mean, variance * pixels)

    def _merge(self, pixels: int, mean: Tensor, squares: Tensor) -> None:
        if self.pixels == 0:
            self.mean, self.squares = torch.zeros_like(mean), torch.zeros_like(mean)
        total = self.pixels + pixels
        distance = mean - self.mean
        self.mean = self.mean + distance * (pixels / total)
        self.squares = self.squares + squares + distance.square() * (self.pixels * pixels / total)
        self.pixels = total

    def gather(self, channels: int, device: torch.device) -> None:
        """Add up the statistics of all ranks, in every rank."""
        own = torch.zeros(3, channels, dtype=torch.float64, device=device)
        if self.pixels:
            own[0], own[1], own[2] = self.pixels, self.mean, self.squares
        ranks = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(ranks, own)
        self.pixels = 0
        for pixels, mean, squares in ranks:
            if pixels[0] > 0:
                self._merge(int(pixels[0]), mean, squares)

    def scale(self) -> Tensor:
        """``sqrt(mean(var))``, ``[C]``, one number for all channels."""
        variance = self.squares / self.pixels
        return variance.mean().sqrt().expand_as(variance)

    def std(self) -> Tensor:
        """``sqrt(var + EPS mean(var))``, ``[C]``."""
        variance = self.squares / self.pixels
        return (variance + EPS * variance.mean()).sqrt()

    def check(self, name: str, why: str) -> None:
        """RuntimeError unless there is something to divide by; ``why`` there may be no features at all."""
        if self.pixels == 0:
            raise RuntimeError(f"{name}: no features seen; {why}")
        if not torch.isfinite(self.squares).all():
            raise RuntimeError(f"{name}: features that are not finite")
        if not (self.squares > 0).any():
            raise RuntimeError(f"{name}: features that are the same in every pixel of every channel cannot be standardised")
