"""What a student is trained with beside its task: nothing, MasKD in three ways, and two losses without masks."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, mse_loss, softmax

from maskd_triton import MaskedDistillLoss, MaskLearner

TEMPERATURE = 4.0  # of CWD, as published for feature maps


@dataclass(frozen=True)
class Tokens:
    """How tokens are learned, or that they are random, and how a student uses them."""

    name: str
    num_tokens: int = 6
    weight_mask: bool = True
    standardize: bool = False
    weight_decay: float = 1e-3
    custom_mask: bool = True
    random: bool = False


RECOMMENDED = Tokens("one token", num_tokens=1, weight_mask=False, standardize=True)  # docs/tokens.md
PUBLISHED = {"camvid": Tokens("published", num_tokens=8, weight_mask=False, custom_mask=False), "bccd": Tokens("published")}
RANDOM = Tokens("random", num_tokens=6, weight_mask=False, standardize=True, random=True)
CUSTOM_MASKS_AFTER = 0.25  # share of the student's steps


class Aligned(nn.Module):
    """A 1x1 convolution to the teacher's channels, as in `MaskedDistillLoss`, and the learner's standardised teacher."""

    def __init__(self, learner: MaskLearner, student_channels: int, loss_weight: float) -> None:
        super().__init__()
        self.align = nn.ModuleList([nn.Conv2d(student_channels, learner.channels[0], 1)])
        self.mean, self.std = (
            x[:, None, None] for x in (learner.mask_modules[0].channel_mean, learner.mask_modules[0].channel_std)
        )
        self.loss_weight = loss_weight

    def forward(self, student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
        return self.loss_weight * self.distance(self.align[0](student), (teacher - self.mean) / self.std)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        raise NotImplementedError


class FeatureMSE(Aligned):
    """The mean of the squared differences."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return mse_loss(student, teacher)


class CWD(Aligned):
    """Channel-wise distillation (arXiv 2011.13256): the divergence of each channel's distribution over the pixels."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = (x.flatten(2) / TEMPERATURE for x in (student, teacher))
        divergence = softmax(t, 2) * (log_softmax(t, 2) - log_softmax(s, 2))
        return TEMPERATURE**2 * divergence.sum(2).mean()


class Masked(nn.Module):
    """`MaskedDistillLoss` with learned tokens, or with the true masks of the batch in their place."""

    def __init__(
        self, learner: MaskLearner, tokens: Tokens, student_channels: int, loss_weight: float, steps: int, true_masks: bool
    ) -> None:
        super().__init__()
        self.criterion = MaskedDistillLoss(
            learner.channels,
            tokens.num_tokens,
            student_channels=student_channels,
            weight_mask=tokens.weight_mask,
            standardize=tokens.standardize,
            custom_mask=tokens.custom_mask,
            custom_mask_warmup=round(CUSTOM_MASKS_AFTER * steps),
            loss_weight=loss_weight,
            pretrained=learner,
        )
        self.true_masks = true_masks

    @property
    def align(self) -> nn.ModuleList:
        return self.criterion.align

    def forward(self, student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
        return self.criterion(student, teacher, masks=masks if self.true_masks else None)


ALONE, MSE, MASKD = "student alone", "feature MSE", "MasKD"
LOSSES = (ALONE, MSE, MASKD, "true masks", "MasKD as published", "CWD", "random tokens")  # in the order in which they are run


def tokens_of(loss: str, task: str) -> Tokens:
    return {"MasKD as published": PUBLISHED[task], "random tokens": RANDOM}.get(loss, RECOMMENDED)


def make_criterion(
    loss: str, learner: MaskLearner, tokens: Tokens, student_channels: int, loss_weight: float, steps: int, seed: int
) -> Aligned | Masked:
    if loss in (MSE, "CWD"):
        criterion: Aligned | Masked = (FeatureMSE if loss == MSE else CWD)(learner, student_channels, loss_weight)
    else:
        criterion = Masked(learner, tokens, student_channels, loss_weight, steps, loss == "true masks")
    torch.manual_seed(seed)  # all losses start from the same align
    criterion.align[0].reset_parameters()
    return criterion
