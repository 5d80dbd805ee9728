"""Standardised features: the folded form equals the formulas on features that were standardised before, in both stages."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import LAYOUTS, NLC, default_dtype, in_layout, rounding
from torch import Tensor, nn

from maskd_triton import MaskedDistillLoss, MaskLearner, MaskModule, reference
from maskd_triton.checkpoints import mask_state

Target = tuple[str, str]
SHAPES = [((2, 6, 5, 7), 3), ((3, 5, 1, 7), 2), ((2, 33, 4, 1), 6), ((1, 4, 1, 1), 1), ((1, 16, 3, 3), 19)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def raw_features(*shape: int, seed: int = 0) -> Tensor:
    """Channels of very different size and offset, as raw features have."""
    c = shape[1]
    scale = torch.logspace(-1, 1, c)[:, None, None]
    return normal(*shape, seed=seed) * scale + 3 * normal(c, 1, 1, seed=99) * scale


def learner_with_statistics(channels: list[int], num_tokens: int, weighted: bool, impl: str = "eager") -> MaskLearner:
    """Parameters of the size trained ones have; statistics near those of :func:`raw_features`."""
    torch.manual_seed(sum(channels) + num_tokens)
    learner = MaskLearner(channels, num_tokens, weighted, standardize=True, impl=impl)
    with torch.no_grad():
        for module, c in zip(learner.mask_modules, channels, strict=True):
            module.mask_token.mul_(100 * c**-0.5)
            x = raw_features(8, c, 6, 6, seed=5)
            module.channel_mean.copy_(x.mean((0, 2, 3)))
            module.channel_std.copy_(x.std((0, 2, 3)))
            module.pixels_seen.fill_(288)
            if weighted:
                module.prob[0].weight.mul_(0.3)
                module.prob[0].bias.normal_()
                module.prob[2].bias.normal_()
    return learner


def standardised(module: MaskModule, x: Tensor) -> Tensor:
    mean, std = (v.to(x.device, x.dtype)[:, None, None] for v in (module.channel_mean, module.channel_std))
    return (x - mean) / std


def close(got: Tensor, want: Tensor, bound: float, name: str = "") -> None:
    error, largest = (got.detach().cpu().double() - want.double()).abs().max().item(), want.abs().max().item()
    assert error <= bound * largest, (name, error / max(largest, 1e-300))


def stage2(learner: MaskLearner, s: Tensor, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the literal formulas on standardised teacher features, in ``dtype``."""
    module = copy.deepcopy(learner).cpu().to(dtype).mask_modules[0].requires_grad_(False)
    s = s.detach().cpu().to(dtype).requires_grad_()
    weighting = [module.weighting()] if module.weight_mask else None
    target = standardised(module, t.cpu().to(dtype))
    loss = reference.distill_loss([s], [target], [module.mask_token], weighting, custom_mask=True)
    loss.backward()
    return loss.detach().double(), s.grad.double()


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize(("shape", "num_tokens"), SHAPES, ids=str)
def test_stage_2_in_float64(shape: tuple[int, ...], num_tokens: int, weighted: bool, target: Target) -> None:
    impl, device = target
    learner = learner_with_statistics([shape[1]], num_tokens, weighted)
    with default_dtype(torch.float64):
        criterion = MaskedDistillLoss(
            shape[1], num_tokens, weight_mask=weighted, standardize=True, custom_mask_warmup=0, pretrained=learner, impl=impl
        ).to(device)
    t, s = raw_features(*shape).double(), normal(*shape, seed=1).double()
    loss, grad = stage2(learner, s, t, torch.float64)
    for layout in (*LAYOUTS, NLC) if impl == "eager" else [(*LAYOUTS, NLC)[num_tokens % 3]]:
        student = in_layout(s, layout).to(device).detach().requires_grad_()
        got = criterion(student, in_layout(t, layout).to(device))
        got.backward()
        close(got, loss, 1e-12)
        close(student.grad, grad, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_stage_2_error_is_that_of_the_dtype(dtype: torch.dtype, target: Target) -> None:
    """Features are exact in ``dtype``; only the gradient's last rounding depends on it."""
    impl, device = target
    learner = learner_with_statistics([32], 6, True)
    criterion = MaskedDistillLoss(32, standardize=True, custom_mask_warmup=0, pretrained=learner, impl=impl).to(device)
    t, s = raw_features(2, 32, 6, 9).to(dtype), normal(2, 32, 6, 9, seed=1).to(dtype)
    loss, grad = stage2(learner, s, t, torch.float64)
    plain, plain_grad = stage2(learner, s, t, torch.float32)
    student = s.to(device).requires_grad_()
    got = criterion(student, t.to(device))
    got.backward()
    # A kernel's bfloat16 tokens keep 16 bits; all others are float32 or exact
    sums = 1e-4 if (impl, dtype) == ("triton", torch.bfloat16) else 2e-6
    close(got, loss, sums)
    close(student.grad, grad, sums + (0 if dtype == torch.float32 else rounding(dtype, target)))
    if dtype == torch.float32:  # and no more than the formulas' own
        eps = torch.finfo(dtype).eps
        assert (got.detach().cpu().double() - loss).abs() <= 2 * ((plain - loss).abs() + eps * loss)
        bound = 2 * ((plain_grad - grad).abs().max() + eps * grad.abs().max())
        assert (student.grad.cpu().double() - grad).abs().max() <= bound


def stage1(learner: MaskLearner, x: Tensor, g: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Masked raw features, Dice loss and all gradients: masks and weights by the formulas on standardised features."""
    module = copy.deepcopy(learner).cpu().to(dtype).mask_modules[0]
    x = x.detach().cpu().to(dtype).requires_grad_()
    seen = standardised(module, x)
    m = reference.masks(seen, module.mask_token)
    w = reference.mask_weights(seen, *module.weighting()) if module.weight_mask else torch.ones_like(m[:, :, 0, 0])
    y = x * torch.einsum("nt,nthw->nhw", w, m)[:, None]
    return results(module, x, y, reference.dice(m), g.cpu().to(dtype))


def results(module: MaskModule, x: Tensor, y: Tensor, dice: Tensor, g: Tensor) -> dict[str, Tensor]:
    torch.autograd.backward([y, dice], [g, torch.full_like(dice, 3.0)])
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {k: v.detach().cpu().double() for k, v in {"y": y, "dice": dice, "x": x.grad, **grads}.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize(("shape", "num_tokens"), SHAPES, ids=str)
def test_stage_1(shape: tuple[int, ...], num_tokens: int, weighted: bool, dtype: torch.dtype, target: Target) -> None:
    """No more than twice the error of the formulas in the same dtype, beside a few units of the dtype."""
    impl, device = target
    learner = learner_with_statistics([shape[1]], num_tokens, weighted, impl).to(device, dtype)
    x, g = raw_features(*shape).to(dtype), normal(*shape, seed=1).to(dtype)
    want, plain = stage1(learner, x, g, torch.float64), stage1(learner, x, g, dtype)
    units = 2e-12 if dtype == torch.float64 else 13 * torch.finfo(dtype).eps  # measured: 5e-14, 10 units (one thread)
    for layout in (*LAYOUTS, NLC) if impl == "eager" else [(*LAYOUTS, NLC)[num_tokens % 3]]:
        learner.zero_grad()
        placed = in_layout(x, layout).to(device).detach().requires_grad_()
        got = results(learner.mask_modules[0], placed, learner(placed), learner.dice_loss(), g.to(device))
        assert got.keys() == want.keys()
        for name, value in want.items():
            error, allowed = (got[name] - value).abs().max(), 2 * (plain[name] - value).abs().max()
            assert error <= allowed + units * value.abs().max(), (name, error / value.abs().max())


def test_masks_and_weights(target: Target) -> None:
    _, device = target
    module = learner_with_statistics([6], 3, True).double().mask_modules[0]
    x = raw_features(2, 6, 5, 7).double()
    seen = standardised(module, x)
    masks, weights = reference.masks(seen, module.mask_token), reference.mask_weights(seen, *module.weighting())
    module.to(device)
    close(module.masks(x.to(device)), masks.detach(), 1e-12)
    close(module.weights(x.to(device)), weights.detach(), 1e-12)


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.neck = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(x))


def test_calibrate_gathers_the_statistics_of_all_batches() -> None:
    torch.manual_seed(0)
    teacher, learner = Teacher().train(), MaskLearner(4, standardize=True)
    teacher.neck[0].weight.data[2] = 0  # a channel that never moves
    kept = copy.deepcopy(teacher.state_dict())
    batches = [torch.randn(n, 3, 4, 5) * (n + 1) for n in (1, 5, 2)]
    with learner.calibrate(teacher, "neck"):
        for images in batches:
            scores = teacher(images)
    assert not scores.requires_grad
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, kept[k]) for k, v in teacher.state_dict().items())
    seen = torch.cat([teacher.eval().neck(images) for images in batches]).double()
    variance, mean = torch.var_mean(seen, (0, 2, 3), correction=0)
    module = learner.mask_modules[0]
    close(module.channel_mean, mean.detach(), 1e-6)
    close(module.channel_std, (variance + 1e-5 * variance.mean()).sqrt().detach(), 1e-6)
    assert module.pixels_seen.item() == 8 * 20


def test_means_far_from_zero_keep_their_deviation() -> None:
    teacher, learner = nn.Sequential(nn.Identity()), MaskLearner(4, standardize=True)
    x = normal(64, 4, 4, 4) * 1e-2 + 100
    with learner.calibrate(teacher, "0"):
        for part in x.split(7):
            teacher(part)
    # sums of squares would leave nothing of a variance of 1e-4 beside 1e4 in float32
    close(learner.mask_modules[0].channel_std, x.double().std((0, 2, 3), correction=0), 1e-4)


def test_calibrate_errors_name_what_is_wrong() -> None:
    teacher, plain = nn.Sequential(nn.Identity()), MaskLearner(2)
    with pytest.raises(RuntimeError, match="standardize=False"), plain.calibrate(teacher, "0"):
        pass
    learner = MaskLearner(2, standardize=True)
    for images, wrong in (
        (None, "calibrate: level 0: no features seen"),
        (torch.zeros(0, 2, 3, 3), "calibrate: level 0: no features seen"),
        (torch.ones(2, 2, 3, 3), "calibrate: level 0: features that are the same in every pixel"),
        (torch.full((2, 2, 3, 3), torch.nan), "calibrate: level 0: features that are not finite"),
    ):
        with pytest.raises(RuntimeError, match=wrong), learner.calibrate(teacher, "0"):
            images is None or teacher(images)
    named = pytest.raises(AttributeError, match="calibrate: the teacher Sequential has no module 'neck'")
    with named, learner.calibrate(teacher, "neck"):
        pass
    with pytest.raises(ValueError, match="expected 2 channels, got 3"), learner.calibrate(teacher, "0"):
        teacher(torch.ones(2, 3, 3, 3))
    with pytest.raises(RuntimeError, match="attach: standardize=True, but no statistics yet"), learner.attach(teacher, "0"):
        pass
    with learner.calibrate(teacher, "0"):
        teacher(normal(2, 2, 3, 3))
    kept = copy.deepcopy(learner.state_dict())
    with pytest.raises(ZeroDivisionError), learner.calibrate(teacher, "0"):
        teacher(normal(2, 2, 3, 3) * 5) / (1 / 0)
    assert all(torch.equal(v, kept[k]) for k, v in learner.state_dict().items())
    with learner.attach(teacher, "0"):
        teacher(normal(2, 2, 3, 3))


def test_statistics_travel_with_the_tokens(tmp_path: Path) -> None:
    learner = learner_with_statistics([4, 6], 3, True)
    learner.save(tmp_path / "tokens.pt")
    want = {k: v.clone() for k, v in learner.state_dict().items()}
    assert sorted(k for k in want if "mask_modules.0" in k and "prob" not in k) == [
        f"mask_modules.0.{name}" for name in ("channel_mean", "channel_std", "mask_token", "pixels_seen")
    ]
    loaded = mask_state(MaskLearner([4, 6], 3, standardize=True, pretrained=tmp_path / "tokens.pt"))
    assert loaded.keys() == want.keys()
    assert all(torch.equal(loaded[k], v) for k, v in want.items())
    criteria = [MaskedDistillLoss([4, 6], 3, standardize=True, pretrained=p) for p in (tmp_path / "tokens.pt", learner)]
    criteria.append(MaskedDistillLoss([4, 6], 3, standardize=True, pretrained=criteria[0]))
    x = [raw_features(2, c, 5, 5) for c in (4, 6)]
    for criterion in criteria:
        for got, module, features in zip(criterion.masks(x), learner.mask_modules, x, strict=True):
            close(got, module.masks(features).detach(), 1e-6)


def test_tokens_of_the_other_kind_are_refused() -> None:
    learner, plain = learner_with_statistics([4], 3, True), MaskLearner(4, 3)
    with pytest.raises(ValueError, match=r"unexpected: mask_modules.0.channel_mean(.|\n)*standardize=True"):
        MaskedDistillLoss(4, 3, pretrained=learner)
    with pytest.raises(ValueError, match=r"missing: mask_modules.0.channel_mean(.|\n)*standardize=False"):
        MaskedDistillLoss(4, 3, standardize=True, pretrained=plain)
    with pytest.raises(ValueError, match=r"no statistics: mask_modules.0.pixels_seen is 0"):
        MaskedDistillLoss(4, 3, standardize=True, pretrained=MaskLearner(4, 3, standardize=True))
    state = learner.state_dict()
    state["mask_modules.0.channel_std"] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"not above 0: mask_modules.0.channel_std"):
        MaskedDistillLoss(4, 3, standardize=True, pretrained=state)


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_compile_fullgraph(weighted: bool, target: Target) -> None:
    impl, device = target
    torch._dynamo.reset()
    learner = learner_with_statistics([4], 3, weighted, impl).to(device)
    criterion = MaskedDistillLoss(4, 3, weight_mask=weighted, standardize=True, pretrained=learner, impl=impl).to(device)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return criterion(s, t) + learner(t).square().mean() + learner.dice_loss()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for h, w in ((5, 7), (6, 9)):
        s, t = normal(2, 4, h, w).to(device), raw_features(2, 4, h, w).to(device)
        got = []
        for function in (loss, compiled):
            learner.zero_grad()
            student = s.clone().requires_grad_()
            function(student, t).backward()
            got.append([student.grad, *(p.grad.clone() for p in learner.parameters())])
        for want, value in zip(*got, strict=True):
            assert torch.allclose(value, want, rtol=1e-5, atol=1e-7)
