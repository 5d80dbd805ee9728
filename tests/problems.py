"""Learners as training leaves them, and the features that other tests than those of numbers start from."""

import torch
from torch import Tensor

from maskd_triton import MaskedDistillLoss, MaskLearner, MaskModule, reference
from tests.cases import DTYPES, Case, Maps
from tests.given import given_by
from tests.helpers import SEED, draw_parameters

Target = tuple[str, str]
Shape = tuple[int, ...]


def close(got: Tensor, want: Tensor, bound: float, name: str = "") -> None:
    """``|got - want| <= bound * max |want|``, of the same shape, no NaN."""
    assert got.shape == want.shape, name
    if want.numel():
        error = (got.detach().cpu().double() - want.detach().double()).abs().max().item()
        largest = want.detach().abs().max().item()
        assert error <= bound * largest, (name, error, largest)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7919 * SEED))


def literal_learn(module: MaskModule, x: Tensor) -> tuple[Tensor, Tensor]:
    """Stage 1 of one level: masked features and Dice loss, in the dtype of ``x`` and with the graph of both."""
    weighting = module.weighting() if module.weight_mask else None
    statistics = (module.channel_mean, module.channel_std) if module.standardize else None
    return reference.masked_features_and_dice(x, module.mask_token, weighting, statistics)


def trained(
    channels: list[int],
    num_tokens: int,
    weighted: bool = True,
    standardize: bool = False,
    *,
    seed: int = 0,
    impl: str = "auto",
) -> MaskLearner:
    """A learner with parameters, and statistics of features near N(0, 1), as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    learner = MaskLearner(channels, num_tokens, weighted, standardize=standardize, impl=impl)
    draw_parameters(learner, generator)
    for module in learner.mask_modules if standardize else ():
        module.channel_mean.normal_(generator=generator)
        module.channel_std.uniform_(0.5, 2, generator=generator)
        module.pixels_seen.fill_(1)
    return learner


class Problem:
    """Both stages' inputs and learned parameters.

    Attributes:
        student, teacher: of every level, on the CPU, contiguous.
        learner: what stage 1 has learned.
        masks, mask_weights: ``[N, T, H, W]`` and ``[N, T]`` of every level, to be given in place of the learner's.
    """

    def __init__(
        self,
        shapes: list[Shape],
        num_tokens: int,
        weighted: bool = True,
        dtype: torch.dtype = torch.float64,
        standardize: bool = False,
    ):
        maps = Maps(next(name for name, own in DTYPES.items() if own == dtype))
        (images, *_), *_ = shapes
        levels = tuple((c, h, w) for _, c, h, w in shapes)
        options = {"standardize": "channel" if standardize else "", "masks": "scores", "mask_weights": True}
        case = Case(images=images, levels=levels, tokens=num_tokens, weighted=weighted, teacher=maps, student=maps, **options)  # type: ignore[arg-type]
        given = given_by(case)
        self.student, self.teacher, self.learner = given.student, given.teacher, given.learner.float()
        self.masks, self.mask_weights = given.masks, given.mask_weights

    def criterion(self, **options: object) -> MaskedDistillLoss:
        """With the learner's tokens."""
        learner, num_tokens = self.learner, self.learner.mask_modules[0].num_tokens
        options = {"weight_mask": learner.weight_mask, "standardize": learner.standardize} | options
        return MaskedDistillLoss(learner.channels, num_tokens, pretrained=learner, **options)  # type: ignore[arg-type]
