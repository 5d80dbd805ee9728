"""The distillation losses that the study compares. All see the teacher's standardised features and align the same way."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cosine_similarity, log_softmax, mse_loss

from maskd_triton import MaskedDistillLoss, MaskLearner

from ..digits_training import CUSTOM_MASKS_AFTER, PlainFeatureLoss
from .plan import Variant

CWD_TEMPERATURE = 4.0  # as published for feature maps and scores alike


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    return (1 - cosine_similarity(student, teacher, dim=1)).mean()


def channel_wise_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """CWD (Shu et al., ICCV 2021): KL divergence of the softmax over pixels, per channel, times the squared temperature."""
    s, t = (log_softmax(x.flatten(2) / CWD_TEMPERATURE, dim=2) for x in (student, teacher))
    return CWD_TEMPERATURE**2 * (t.exp() * (t - s)).sum(2).mean()


PLAIN = {"mse": mse_loss, "cosine": cosine_distance, "cwd": channel_wise_divergence}


class TruthMasks(PlainFeatureLoss):
    """Squares under one mask per level, that of the digits' pixels: the levels are features, then masks."""

    def __init__(self, learner: MaskLearner, student_channels: Sequence[int], loss_weight: float) -> None:
        super().__init__(learner, student_channels, loss_weight)
        self.masked = MaskedDistillLoss(learner.channels, None, loss_weight=loss_weight)

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        features, masks = teacher[: len(student)], teacher[len(student) :]
        aligned = [conv(s) for conv, s in zip(self.align, student, strict=True)]
        targets = [(t - mean) / std for t, (mean, std) in zip(features, self.statistics, strict=True)]
        return self.masked(aligned, targets, masks=masks)


def truth_masks(labels: Tensor, levels: Sequence[Tensor]) -> list[Tensor]:
    """``[N, 1, H, W]`` of each level: the share of a cell's pixels that belong to digits."""
    digits = (labels > 0).float()[:, None]
    return [avg_pool2d(digits, labels.shape[-1] // level.shape[-1]) for level in levels]


def with_random_tokens(learner: MaskLearner, seed: int) -> MaskLearner:
    """Tokens of the learned norms in random directions."""
    random = copy.deepcopy(learner)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in random.mask_modules:
            drawn = torch.randn(module.mask_token.shape, generator=generator)
            module.mask_token.copy_(drawn * (module.mask_token.norm(dim=1) / drawn.norm(dim=1))[:, None])
    return random


def make_criterion(
    variant: Variant, learner: MaskLearner, student_channels: list[int], loss_weight: float, seed: int, steps: int
) -> nn.Module | None:
    """None for a student alone."""
    if variant.loss == "none":
        return None
    if variant.loss in PLAIN:
        return PlainFeatureLoss(learner, student_channels, loss_weight, PLAIN[variant.loss])
    if variant.loss == "truth":
        return TruthMasks(learner, student_channels, loss_weight)
    if variant.loss == "random":
        learner = with_random_tokens(learner, seed)
    return MaskedDistillLoss(
        learner.channels,
        variant.tokens.count,
        student_channels=student_channels,
        weight_mask=variant.tokens.weighted,
        standardize=variant.tokens.standardize,
        custom_mask=variant.custom,
        custom_mask_warmup=round(CUSTOM_MASKS_AFTER * steps),
        distance=variant.distance,
        loss_weight=loss_weight,
        pretrained=learner,
    )
