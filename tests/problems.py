"""Problems with a known answer: features, parameters of the size trained ones have, and the literal formulas of both."""

import copy

import torch
from tests.helpers import in_layout, strides
from torch import Tensor

from maskd_triton import MaskedDistillLoss, MaskLearner, MaskModule, reference
from maskd_triton import functional as F

Target = tuple[str, str]
Shape = tuple[int, ...]


def close(got: Tensor, want: Tensor, bound: float, name: str = "") -> None:
    """``|got - want| <= bound * max |want|``, of the same shape, no NaN."""
    assert got.shape == want.shape, name
    if want.numel():
        error = (got.detach().cpu().double() - want.detach().double()).abs().max().item()
        largest = want.detach().abs().max().item()
        assert error <= bound * largest, (name, error, largest)


def standardised(module: MaskModule, x: Tensor) -> Tensor:
    """What masks and weights are taken of."""
    if not module.standardize:
        return x
    mean, std = (v.to(x.device, x.dtype)[:, None, None] for v in (module.channel_mean, module.channel_std))
    return (x - mean) / std


def literal_losses(
    learner: MaskLearner, student: list[Tensor], teacher: list[Tensor], dtype: torch.dtype = torch.float64, **options: object
) -> Tensor:
    """Stage 2 of every level with the tokens, weighting and statistics of ``learner``, on the CPU in ``dtype``."""
    modules = copy.deepcopy(learner).to("cpu", dtype).requires_grad_(False).mask_modules
    weighting = [module.weighting() for module in modules] if learner.weight_mask else None
    teacher = [standardised(module, t.to("cpu", dtype)) for module, t in zip(modules, teacher, strict=True)]
    return reference.distill_loss_levels(
        [s.to("cpu", dtype) for s in student], teacher, [m.mask_token for m in modules], weighting, **options
    )  # type: ignore[arg-type]


def literal_learn(module: MaskModule, x: Tensor) -> tuple[Tensor, Tensor]:
    """Stage 1 of one level: masked features and Dice loss, in the dtype of ``x`` and with the graph of both."""
    weighting = module.weighting() if module.weight_mask else None
    statistics = (module.channel_mean, module.channel_std) if module.standardize else None
    return reference.masked_features_and_dice(x, module.mask_token, weighting, statistics)


DICE_SCALE = 3.0


def results(module: MaskModule, x: Tensor, y: Tensor, dice: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Masked features, Dice loss and the gradients of ``(y * g).sum() + DICE_SCALE * dice``, in float64 on the CPU."""
    torch.autograd.backward([y, dice], [g, torch.full_like(dice, DICE_SCALE)])
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {k: v.detach().cpu().double() for k, v in {"y": y, "dice": dice, "x": x.grad, **grads}.items()}


def literal_results(module: MaskModule, x: Tensor, g: Tensor, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The same by the literal formulas in ``dtype``."""
    module = copy.deepcopy(module).to("cpu", dtype)
    x = x.detach().to("cpu", dtype).requires_grad_()
    return results(module, x, *literal_learn(module, x), g.to("cpu", dtype))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_parameters(learner: MaskLearner, generator: torch.Generator) -> None:
    """Tokens, then weighting, level by level: masks away from 0.5 and from each other, weights away from 1 / T."""
    modules = list(learner.mask_modules)
    scaled = [(module.mask_token, module.channels**-0.5) for module in modules]
    for module in modules if learner.weight_mask else ():
        fan_in = module.channels**-0.5
        scaled += zip(module.weighting(), (0.3 * fan_in, 1, fan_in, 1), strict=True)
    for p, scale in scaled:
        p.detach().copy_(scale * torch.randn(p.shape, generator=generator))


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
    """Both stages' inputs and learned parameters; features are exact in ``dtype``, parameters in float32. With
    ``standardize``, the teacher's channels are of very different size and offset, and the learner knows both.

    Attributes:
        student, teacher: of every level, on the CPU, contiguous; a test may put others in their place.
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
        generator = torch.Generator().manual_seed(sum(map(sum, shapes)) + num_tokens)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.dtype = dtype
        self.learner = MaskLearner([shape[1] for shape in shapes], num_tokens, weighted, standardize=standardize)
        modules = self.learner.mask_modules
        self.teacher = [normal(*shape) for shape in shapes]
        for i, module in enumerate(modules if standardize else ()):
            scale = torch.logspace(-1, 1, module.channels)
            module.channel_std.copy_(scale)
            module.channel_mean.copy_(3 * scale * normal(module.channels))
            module.pixels_seen.fill_(1)
            self.teacher[i] = self.teacher[i] * scale[:, None, None] + module.channel_mean[:, None, None]
        self.teacher = [t.to(dtype) for t in self.teacher]
        seen = [standardised(*level) for level in zip(modules, self.teacher, strict=True)]
        self.student = [(t.float() + normal(*t.shape)).to(dtype) for t in seen]
        draw_parameters(self.learner, generator)
        self.masks = [torch.rand(n, num_tokens, h, w, generator=generator).to(dtype) for n, _, h, w in shapes]
        self.mask_weights = [torch.rand(n, num_tokens, generator=generator).to(dtype) for n, *_ in shapes]

    @property
    def tokens(self) -> list[Tensor]:
        """``[T, C]`` of every level, the learner's own: to be written in place."""
        return [module.mask_token.detach() for module in self.learner.mask_modules]

    def literal(self, dtype: torch.dtype = torch.float64, **options: object) -> tuple[Tensor, list[Tensor]]:
        """Losses of every level and the gradients of their sum, by the literal formulas in ``dtype``."""
        student = [s.detach().to(dtype).requires_grad_() for s in self.student]
        losses = literal_losses(self.learner, student, self.teacher, dtype, **options)
        losses.sum().backward()
        return losses.detach().double(), [s.grad.double() for s in student]  # type: ignore[union-attr]

    def ours(self, target: Target, layout: str = "nchw", **options: object) -> tuple[Tensor, list[Tensor]]:
        """The same from the library, with features in a layout of ``helpers.in_layout``."""
        student = [in_layout(s, layout).detach().to(target[1]).requires_grad_() for s in self.student]
        losses = self.loss(target, student, [in_layout(t, layout) for t in self.teacher], reduction="none", **options)
        losses.sum().backward()
        for s in student:
            assert s.grad is not None
            assert s.grad.dtype == s.dtype
            assert strides(s.grad) == strides(s)
        assert losses.dtype == self.precise
        return losses.detach().cpu().double(), [s.grad.cpu().double() for s in student]  # type: ignore[union-attr]

    def loss(
        self, target: Target, student: list[Tensor] | None = None, teacher: list[Tensor] | None = None, **options: object
    ) -> Tensor:
        """``functional.masked_distill_loss`` of these levels, or of the problem's own, and the learner's parameters."""
        impl, device = target
        student, teacher = ([x.to(device) for x in given] for given in (student or self.student, teacher or self.teacher))
        tokens, weighting = self.parameters(device)
        return F.masked_distill_loss(student, teacher, tokens, weighting, impl=impl, **options)  # type: ignore[arg-type]

    def criterion(self, **options: object) -> MaskedDistillLoss:
        """With the learner's tokens."""
        learner, num_tokens = self.learner, len(self.tokens[0])
        options = {"weight_mask": learner.weight_mask, "standardize": learner.standardize} | options
        return MaskedDistillLoss(learner.channels, num_tokens, pretrained=learner, **options)  # type: ignore[arg-type]

    def parameters(self, device: str = "cpu") -> tuple[list[Tensor], list[tuple[Tensor, Tensor]] | None]:
        """Tokens and composed weighting of every level, as precise as sums over the features are."""
        modules = copy.deepcopy(self.learner).to(device, self.precise).requires_grad_(False).mask_modules
        weighting = [F.compose_weighting(*m.weighting()) for m in modules] if self.learner.weight_mask else None
        return [module.mask_token for module in modules], weighting

    @property
    def precise(self) -> torch.dtype:
        """Of the losses."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32
