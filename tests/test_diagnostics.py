"""Figures of masks against loops in float64; gradients' ratios that are right or not finite; which masks count as collapsed."""

import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import Target, trained
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from maskd_triton import MaskedDistillLoss, MaskLearner, reference
from maskd_triton.diagnostics import (
    LevelDiagnostics,
    LevelReports,
    collapsed,
    describe,
    gradient_ratio,
    suggest_loss_weight,
    verdict,
)

SHAPES = {  # N, T, H, W
    "everyday": (3, 6, 9, 7),
    "one_token": (2, 1, 4, 5),
    "one_pixel": (3, 4, 1, 1),
    "one_row": (1, 2, 1, 8),
    "many_tokens": (2, 20, 3, 4),
}


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    masks = torch.sigmoid(2 * torch.randn(shape, generator=generator, dtype=torch.float64) - 0.5)
    weights = torch.softmax(torch.randn(shape[:2], generator=generator, dtype=torch.float64), 1)
    return masks.to(dtype), weights.to(dtype)


def expected(masks: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Coverage, Dice, weight and entropy, word for word."""
    m, w = masks.double(), weights.double()
    n, t = m.shape[:2]
    coverage = torch.stack([m[:, i].mean() for i in range(t)])
    dice = torch.zeros(t, t, dtype=torch.float64)
    for k in range(n):
        for i in range(t):
            for j in range(t):
                shared, own, other = ((m[k, a] * m[k, b]).sum() for a, b in ((i, j), (i, i), (j, j)))
                dice[i, j] += 2 * shared / (own + other + 2e-12) / n
    entropies = [-sum(p * math.log(p) for p in image) / math.log(t) if t > 1 else 1.0 for image in w.tolist()]
    return coverage, dice, torch.stack([w[:, i].mean() for i in range(t)]), sum(entropies) / n


def pixels(masks: Tensor, weights: Tensor | None, objects: Tensor) -> tuple[float, float]:
    """Focus and emphasis, word for word."""
    m = masks.double()
    n, t, h, w = m.shape
    focus, emphasis = 0.0, 0.0
    for k in range(n):
        s = torch.zeros(h, w, dtype=torch.float64)
        for i in range(t):
            s += (1 / t if weights is None else weights[k, i].double()) * m[k, i] ** 2 / m[k, i].sum()
        focus += (1 - s.sum() ** 2 / (h * w * (s**2).sum())).item() / n
        emphasis += (s[objects[k] > 0].mean() / s.mean()).item() / n
    return focus, emphasis


def assert_describes(level: LevelDiagnostics, masks: Tensor, weights: Tensor, bound: float) -> None:
    coverage, dice, weight, entropy = expected(masks, weights)
    assert level.weight is not None
    assert level.entropy is not None
    assert level.entropy.shape == ()
    for got, want in ((level.coverage, coverage), (level.dice, dice), (level.weight, weight)):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)
    assert abs(level.entropy.item() - entropy) <= bound


DTYPES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), DTYPES.items(), ids=lambda x: str(x)[6:] if isinstance(x, torch.dtype) else "")
def test_against_loops(dtype: torch.dtype, bound: float, shape: tuple[int, ...]) -> None:
    """Halves are summed in float32, also under autocast."""
    masks, weights = drawn(shape, dtype)
    objects = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(1)) > 0.5
    objects[:, 0, 0] = True
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            level = describe(masks, weights, objects=objects)
        assert {v.dtype for v in vars(level).values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
        assert_describes(level, masks, weights, bound)
        assert [level.focus.item(), level.emphasis.item()] == pytest.approx(pixels(masks, weights, objects), abs=3 * bound)
    plain = describe(masks)
    assert plain.emphasis is None
    assert plain.focus.item() == pytest.approx(pixels(masks, None, objects)[0], abs=3 * bound)
    assert plain.weight is None
    assert plain.entropy is None
    assert torch.equal(plain.dice, level.dice)
    t = shape[1]
    others = plain.dice.masked_fill(torch.eye(t, dtype=torch.bool), 0).sum() / max(t * (t - 1), 1)
    assert abs(others.item() - reference.dice(masks.double()).item()) < 2 * bound  # of the Dice loss


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_masks_of_large_maps(dtype: torch.dtype) -> None:
    """Areas of 2**18 do not fit into float16, and bfloat16 cannot count to 2**18."""
    masks = torch.cat([torch.full((1, 1, 512, 512), 0.75), torch.ones(1, 1, 512, 512)], 1).to(dtype)
    valid = torch.ones(1, 512, 512, dtype=torch.bool)
    valid[:, 256:] = False
    for level in (describe(masks), describe(masks, valid=valid)):
        torch.testing.assert_close(level.coverage, torch.tensor([0.75, 1.0]))
        torch.testing.assert_close(level.dice[0, 1], torch.tensor(2 * 0.75 / (0.75**2 + 1)))


def test_padding_counts_nowhere() -> None:
    """Whatever it holds: as if every image were cropped."""
    masks, _ = drawn((2, 3, 6, 8))
    valid = torch.ones(2, 6, 8, dtype=torch.int64)
    valid[:, 4:], valid[:, :, 5:] = 0, 0
    objects = torch.rand(2, 6, 8) > 0.5
    padded = masks.masked_fill((valid == 0)[:, None], math.nan)
    want = describe(masks[:, :, :4, :5], objects=objects[:, :4, :5])
    for name, got in vars(describe(padded, valid=valid, objects=objects)).items():
        if got is not None:
            torch.testing.assert_close(got, getattr(want, name), rtol=1e-6 if name == "emphasis" else 1e-12, atol=0)


def test_empty_batch() -> None:
    level = describe(torch.zeros(0, 3, 4, 4), torch.zeros(0, 3), objects=torch.zeros(0, 4, 4))
    assert [tuple(v.shape) for v in vars(level).values()] == [(3,), (3, 3), (3,), (), (), ()]
    assert all(v.isnan().all() for v in vars(level).values())
    assert collapsed(level) == []
    assert verdict(level) == "selective: focus nan"


def test_images_that_say_nothing() -> None:
    """No mask there, or no object: they count neither in focus nor in emphasis."""
    masks, objects = torch.zeros(3, 2, 2, 4), torch.zeros(3, 4, 8)
    masks[:2, 0, :, 0] = 1
    masks[2, 0, 0, 0] = 1e-44  # its sum's reciprocal is infinite in float32
    objects[0, :, :4] = 1
    level = describe(masks, torch.full((3, 2), 0.5), objects=objects)
    assert level.focus.item() == 0.75
    assert level.emphasis.item() == 2
    with pytest.raises(ValueError, match=r"objects: expected \[N, H, W\] of 3 images, got shape \[2, 4, 8\]"):
        describe(masks, objects=objects[:2])


def test_nothing_is_read_and_no_gradient_is_kept() -> None:
    """A meta tensor has no values: whatever waited for one would raise."""
    level = describe(*(torch.ones(2, 3, *s, device="meta") for s in ((4, 4), ())), objects=torch.ones(2, 4, 4, device="meta"))
    assert {v.device.type for v in vars(level).values()} == {"meta"}
    masks, weights = (x.requires_grad_() for x in drawn((2, 3, 4, 4)))
    assert not any(v.requires_grad for v in vars(describe(masks, weights, objects=masks[:, 0])).values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        level.coverage = level.dice  # type: ignore[misc]


@pytest.mark.parametrize(
    ("masks", "weights", "sentence"),
    [
        ((3, 4, 4), None, r"masks: expected \[N, T, H, W\] .* got shape \[3, 4, 4\]"),
        ((2, 0, 4, 4), None, "at least one token and one pixel"),
        ((2, 3, 0, 4), None, "at least one token and one pixel"),
        ((2, 3, 4, 4), (3, 2), r"weights: expected shape \[2, 3\], as the masks, got \[3, 2\]"),
    ],
)
def test_wrong_shapes(masks: tuple[int, ...], weights: tuple[int, ...] | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        describe(torch.zeros(masks), None if weights is None else torch.zeros(weights))


ON, OFF = 6.0, -6.0  # logits: masks of .9975 and .0025


def masks_of(*rows: list[float]) -> Tensor:
    """Masks ``[2, T, 1, W]`` from each token's logits."""
    return torch.sigmoid(torch.tensor([[[row] for row in rows]] * 2))


def weights_of(*row: float) -> Tensor:
    return torch.tensor([row] * 2)


QUARTERS = [[ON if p // 2 == t else OFF for p in range(8)] for t in range(4)]
CASES: dict[str, tuple[Tensor, Tensor | None, list[str]]] = {
    "quarters": (masks_of(*QUARTERS), weights_of(0.7, 0.1, 0.1, 0.1), []),
    "background_and_objects": (
        masks_of([ON] * 7 + [OFF], [OFF] * 7 + [ON], [0.0] * 8),
        weights_of(0.9, 0.05, 0.05),
        [],
    ),
    "as_in_the_study": (
        masks_of([OFF] * 8, [OFF] * 8, [OFF] * 8, [ON] * 8, [OFF] * 8),
        weights_of(0.002, 0.002, 0.003, 0.99, 0.003),
        [
            "token 3 is on everywhere: coverage 1.00",
            "tokens 0, 1, 2, 4 are empty: coverage below 0.02",
            "token 3 has all the weight",
        ],
    ),
    "unweighted": (
        masks_of([ON] * 8, [OFF] * 8),
        None,
        ["token 0 is on everywhere: coverage 1.00", "token 1 is empty: coverage below 0.02"],
    ),
    "one_empty": (masks_of(*QUARTERS[:3], [OFF] * 8), None, ["token 3 is empty: coverage below 0.02"]),
    "twins": (masks_of(QUARTERS[0], QUARTERS[1], QUARTERS[0]), None, ["tokens 0 and 2 are copies: Dice 1.00"]),
    "two_pairs_of_twins": (
        masks_of(QUARTERS[0], QUARTERS[1], QUARTERS[0], QUARTERS[1]),
        None,
        ["tokens 0 and 2 are copies: Dice 1.00", "tokens 1 and 3 are copies: Dice 1.00"],
    ),
    "untrained": (masks_of(*[[0.01, -0.01] * 4] * 3), None, ["tokens 0, 1, 2 are copies: Dice 1.00"]),
    "all_weight_on_a_good_mask": (
        masks_of(*QUARTERS[:2]),
        weights_of(0.04, 0.96),
        ["token 1 has all the weight"],
    ),
    "one_good_token": (masks_of(QUARTERS[0]), weights_of(1.0), []),
}


@pytest.mark.parametrize(("masks", "weights", "sentences"), CASES.values(), ids=CASES)
def test_collapsed(masks: Tensor, weights: Tensor | None, sentences: list[str]) -> None:
    assert collapsed(describe(masks, weights)) == sentences


def test_another_token_in_each_image() -> None:
    """Weights that pick one token in each image, but not the same: entropy 0, and all tokens used."""
    level = describe(masks_of(*QUARTERS[:2]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert level.entropy is not None
    assert level.entropy.item() == 0
    assert collapsed(level) == ["in each image one token has all the weight, not always the same"]


def pillars(*heights: float) -> Tensor:
    """Masks ``[2, T, 1, 8]``, 1 in a quarter of the pixels, another for each token, and of this height elsewhere."""
    rows = [[1.0 if p // 2 == t else height for p in range(8)] for t, height in enumerate(heights)]
    return torch.tensor([[[row] for row in rows]] * 2)


LONGER, STANDARDIZE, ONE = (f". Learn {how}" for how in (
    "longer, with no more weight decay than 1e-3", "with standardize=True", "with one token"
))  # fmt: skip
DECAY = ", and no more weight decay than 1e-3"
EVERYWHERE = "plain MSE: focus 0.00; token 0 is on everywhere: coverage 1.00"
UNTRAINED = "plain MSE: focus 0.00; tokens 0 and 1 are copies: Dice 1.00"
VERDICTS: dict[str, tuple[Tensor, Tensor | None, bool, str]] = {
    "a_quarter": (pillars(0), None, False, "selective: focus 0.75"),
    "untrained": (masks_of(*[[0.01, -0.01] * 4] * 2), None, True, UNTRAINED + LONGER),
    "everywhere": (pillars(1), None, False, EVERYWHERE + STANDARDIZE),
    "everywhere_although_standardised": (pillars(1), None, True, EVERYWHERE + LONGER),
    "different_and_flat_in_sum": (pillars(*[0] * 4), None, True, "plain MSE: focus 0.00" + ONE + DECAY),
    "one_rules": (pillars(*[0] * 4), weights_of(1, 0, 0, 0), True, "selective: focus 0.75; token 0 has all the weight"),
    "copies": (pillars(0, 0)[:, [0, 1, 0]], None, True, "selective: focus 0.55; tokens 0 and 2 are copies: Dice 1.00"),
}


@pytest.mark.parametrize(("masks", "weights", "standardized", "line"), VERDICTS.values(), ids=VERDICTS)
def test_verdict(masks: Tensor, weights: Tensor | None, standardized: bool, line: str) -> None:
    level = describe(masks, weights)
    assert verdict(level, standardized=standardized) == line
    assert str(LevelReports({"p3": level, 4: level}, standardized=standardized)) == f"level 'p3': {line}\nlevel 4: {line}"


def test_verdict_where_objects_are_known() -> None:
    masks, compare = pillars(0), ". Learn longer, and compare with a plain feature MSE"
    both = pillars(0, 0)
    both[:, 1] = 0
    for given, objects, line in (
        (masks, masks[:, 0], "selective: focus 0.75, emphasis 4.00"),
        (masks, 1 - masks[:, 0], "background: focus 0.75, emphasis 0.00" + compare),  # it has one token already
        (both, 1 - masks[:, 0], "background: focus 0.75, emphasis 0.00; token 1 is empty: coverage below 0.02" + ONE),
    ):
        assert verdict(describe(given, objects=objects)) == line


# --- MaskLearner.diagnostics ------------------------------------------------------------------------------------------


def learner_and_features(device: str, impl: str, weighted: bool = True) -> tuple[MaskLearner, dict[str, Tensor]]:
    """Two levels with tokens that have learned something."""
    torch.manual_seed(0)
    learner = trained([8, 5], 3, weighted, impl=impl).to(device)
    return learner, {"p3": torch.randn(2, 8, 6, 5, device=device), "p4": torch.randn(2, 5, 3, 3, device=device)}


@pytest.mark.parametrize("weighted", [True, False])
def test_learner_describes_its_latest_forward(weighted: bool, target: tuple[str, str]) -> None:
    impl, device = target
    learner, features = learner_and_features(device, impl, weighted)
    with pytest.raises(RuntimeError, match="diagnostics: no features seen yet"):
        learner.diagnostics()
    learner({name: -x for name, x in features.items()})
    learner(features)
    found = learner.diagnostics()
    assert list(found) == ["p3", "p4"]
    for module, (name, x) in zip(learner.mask_modules, features.items(), strict=True):
        masks = reference.masks(x.cpu().double(), module.mask_token.cpu().double()).detach()
        level = found[name]
        assert not level.coverage.requires_grad
        coverage, dice, _, _ = expected(masks, masks[:, :, 0, 0])
        torch.testing.assert_close(level.coverage.cpu().double(), coverage, rtol=0, atol=1e-6)
        torch.testing.assert_close(level.dice.cpu().double(), dice, rtol=0, atol=1e-6)
        if weighted:
            weights = reference.mask_weights(x.cpu().double(), *(p.cpu().double() for p in module.weighting()))
            torch.testing.assert_close(level.weight.cpu().double(), weights.mean(0).detach(), rtol=0, atol=1e-6)
        else:
            assert level.weight is None
            assert level.entropy is None
    learner(list(features.values()))
    assert list(learner.diagnostics()) == [0, 1]


def test_learner_warns_once_per_level(tmp_path: Path) -> None:
    def collapsed_learner() -> MaskLearner:
        learner, features = learner_and_features("cpu", "eager")
        with torch.no_grad():
            learner.mask_modules[1].mask_token.copy_(torch.tensor([100.0, -100.0, -100.0])[:, None].expand(3, 5))
        learner({name: x.abs() for name, x in features.items()})
        return learner

    sentence = (
        r"MaskLearner, level 'p4': plain MSE: focus .*; token 0 is on everywhere.*; tokens 1 and 2 are empty.* standardize=True"
    )
    learner = collapsed_learner()
    with pytest.warns(UserWarning, match=sentence) as caught:
        learner.diagnostics()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.diagnostics()
        learner.save(tmp_path / "tokens.pt")
    with pytest.warns(UserWarning, match=sentence):
        collapsed_learner().save(tmp_path / "tokens.pt")


def test_untrained_tokens(tmp_path: Path) -> None:
    """In the middle of training they are as they should be; in a file they are of no use, and one warning says so."""
    torch.manual_seed(0)
    learner = MaskLearner(256)
    learner(torch.randn(2, 256, 9, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        levels = learner.diagnostics()
    line = "plain MSE: focus 0.01; tokens 0, 1, 2, 3, 4, 5 are copies: Dice 0.99.* Learn longer"
    assert re.match(f"level 0: {line}", str(levels))
    with pytest.warns(UserWarning, match="save: the tokens of level 0 are no larger than as initialised") as caught:
        learner.save(tmp_path / "tokens.pt")
    assert len(caught) == 1
    assert caught[0].filename == __file__


# --- gradients ---------------------------------------------------------------------------------------------------------


def test_gradient_ratio() -> None:
    """Over all levels; no ``.grad`` is left behind, and the step's own backward pass still runs."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3).double(), nn.Conv2d(4, 5, 3).double()
    levels = [first(torch.randn(2, 3, 8, 8).double())]
    levels.append(second(levels[0]))
    task, distill = levels[1].square().mean(), 0.1 * (levels[0].abs().mean() + levels[1].mean())
    norms = []
    for loss in (task, distill):
        grads = torch.autograd.grad(loss, levels, retain_graph=True)
        norms.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt())
    ratio = gradient_ratio(task, distill, dict(enumerate(levels)))
    torch.testing.assert_close(ratio, norms[1] / norms[0], rtol=1e-14, atol=0)
    assert ratio.shape == ()
    assert not ratio.requires_grad
    assert first.weight.grad is None
    assert gradient_ratio(task, 0 * distill, levels) == 0
    weight = suggest_loss_weight([task], [0.5 * distill], [levels], loss_weight=0.5, by="gradient", share=0.1)
    share = float(gradient_ratio(task, weight * distill, levels))
    assert share / (1 + share) == pytest.approx(0.1, rel=1e-6)
    (task + distill).backward()


def head(depth: int, seed: int, gain: float = 1.5) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()]
        layers[-2].weight.data.mul_(gain)
    return nn.Sequential(*layers)


def in_half(network: nn.Module, x: Tensor, half: torch.dtype, where: str) -> Tensor:
    """The output in ``half``: of a half network on half features or on float32 ones, or under autocast."""
    if where == "autocast":
        with torch.autocast("cpu", half):
            return network(x)
    return copy.deepcopy(network).to(half)(x.to(half))


def right_or_not_finite(got: Callable[[], Tensor], want: float) -> bool:
    """Whether it is finite; then it is right, otherwise a warning has said so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ratio = got().item()
    if math.isfinite(ratio):
        assert abs(ratio - want) < 0.01 * want, (ratio, want)
    else:
        assert "overflows in half precision" in str(caught[-1].message)
        assert caught[-1].filename == __file__
    return math.isfinite(ratio)


@pytest.mark.parametrize("where", ["half", "float32 features", "autocast"])
@pytest.mark.parametrize("depth", [1, 6])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_gradient_ratio_in_half_precision(half: torch.dtype, depth: int, where: str) -> None:
    """Of losses from 1e-8 to 1e8, against float64: right, or not finite."""
    networks, x = (head(depth, 0), head(1, 1)), torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(2))
    exact = x.to(half).double().requires_grad_()
    task, distill = (copy.deepcopy(network).to(half).double()(exact) for network in networks)
    norms = [torch.autograd.grad(loss, exact)[0].norm().item() for loss in (task.square().mean(), distill.abs().mean())]
    s = (x.to(half) if where == "half" else x.to(half).float()).requires_grad_()
    outputs = [in_half(network, s, half, where) for network in networks]
    found = []
    for scale in (1e-8, 1e-4, 1.0, 1e4, 1e8):
        for other in (1e-8, 1.0, 1e8):
            losses = scale * outputs[0].float().square().mean(), other * outputs[1].float().abs().mean()
            want = other / scale * norms[1] / norms[0]
            found.append(right_or_not_finite(lambda losses=losses: gradient_ratio(*losses, s), want))
    assert sum(found) >= 12  # of 15


@pytest.mark.parametrize("factor", [1e-7, 1e-3, 1.0, 1e3, 1e5])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_gradients_that_are_lost_on_the_way(half: torch.dtype, factor: float) -> None:
    """Half in the middle of a float32 graph, where the gradient is smaller or larger by a factor that is taken back below."""
    s = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = (s / factor).to(half).float() * factor
    task, distill = y.square().mean(), s.sin().mean()
    want = s.detach().cos().norm() / (2 * (s / factor).to(half).float().mul(factor).detach().norm())
    right_or_not_finite(lambda: gradient_ratio(task, distill, s), want.item())


@pytest.mark.parametrize("distance", ["squared", "smooth_l1", "cosine"])
@pytest.mark.parametrize("weight", [1e-8, 1.0, 1e8])
def test_gradient_ratio_of_a_criterion(weight: float, distance: str, target: Target) -> None:
    """Stage 2's own gradient of float16 features, which saturates, through an align in half precision."""
    impl, device = target
    torch.manual_seed(0)
    options: dict[str, Any] = {"student_channels": 4, "distance": distance, "loss_weight": weight, "impl": impl}
    criterion = MaskedDistillLoss(6, 3, pretrained=trained([6], 3), custom_mask=False, **options).to(device)
    s, t = torch.randn(2, 4, 6, 5).half().to(device), torch.randn(2, 6, 6, 5).to(device)
    exact = s.double().requires_grad_()
    norm = torch.autograd.grad(copy.deepcopy(criterion).double()(exact, t.double()), exact)[0].norm().item()
    s.requires_grad_()
    right_or_not_finite(lambda: gradient_ratio(s.float().sum(), criterion(s, t), s), norm / s.numel() ** 0.5)


def test_gradient_ratio_in_a_step(target: Target) -> None:
    """Under autocast, beside a GradScaler: no ``.grad`` is left behind, and the optimiser takes the same step as without."""
    impl, device = target
    steps = []
    for asked in (False, True):
        torch.manual_seed(0)
        body, head = (nn.Conv2d(i, o, 3, padding=1).to(device) for i, o in ((3, 6), (6, 5)))
        criterion = MaskedDistillLoss(6, 3, pretrained=trained([6], 3), loss_weight=1e-5, impl=impl).to(device)
        parameters = [*body.parameters(), *head.parameters()]
        optimizer, scaler = torch.optim.SGD(parameters, lr=0.1), torch.amp.GradScaler(device, init_scale=2.0**10)
        images, labels = torch.randn(2, 3, 6, 7).to(device), torch.randint(5, (2, 6, 7)).to(device)
        with torch.autocast(device, torch.float16):
            features = body(images)
            task, distill = (
                1e-5 * cross_entropy(head(features), labels),
                criterion(features, torch.randn(2, 6, 6, 7).to(device)),
            )
        if asked:
            assert gradient_ratio(task, distill, features).isfinite()
            assert all(p.grad is None for p in parameters)
            assert int(criterion.warmup_step) == 1
        scaler.scale(task + distill).backward()
        scaler.step(optimizer)
        steps.append([p.detach().clone() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


@pytest.mark.slow
def test_gradient_ratio_of_compiled_parts() -> None:
    torch._dynamo.reset()
    criterion, head = MaskedDistillLoss(3, 2, pretrained=trained([3], 2), distance="smooth_l1"), nn.Conv2d(3, 2, 1)
    x, t = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)

    def losses(s: Tensor) -> tuple[Tensor, Tensor]:
        return head(s).square().mean(), criterion(s, t)

    want = gradient_ratio(*losses(x), x)
    task, distill = torch.compile(losses, backend="aot_eager")(x)
    torch.testing.assert_close(gradient_ratio(task, distill, x), want)
    (task + distill).backward()
    task, distill, s = torch.compile(lambda x: (*losses(2 * x), 2 * x), backend="aot_eager")(x)
    with pytest.raises(ValueError, match=r"task_loss: depends on none of the features; .* in one compiled function"):
        gradient_ratio(task, distill, s)


def test_losses_in_other_forms() -> None:
    """A stacked tensor, an array, tensors, numbers of numpy, or one number: the same weight."""
    for make in (list, torch.tensor, np.array, lambda x: list(torch.tensor(x)), lambda x: list(np.array(x)), lambda x: x[0]):
        assert suggest_loss_weight(make([1.0, 2.0]), make([0.5, 1.0])) == 2
        assert suggest_loss_weight(make([1.0, 2.0]), make([0.5, 1.0]), share=0.9) == pytest.approx(18)  # 9 parts of 10
    s = torch.ones(1, 2, 3, 3, requires_grad=True)
    losses = torch.stack([s.sum(), 2 * s.sum()])
    assert suggest_loss_weight(losses, 4 * losses, [s, s], by="gradient", share=0.2) == 0.0625
    torch.set_warn_always(True)
    try:  # losses that still have their graphs: torch's warning would be an error here
        assert suggest_loss_weight(list(losses), 4 * losses) == 0.25
    finally:
        torch.set_warn_always(False)


def test_wrong_arguments() -> None:
    x = torch.zeros(1, 1, 1, 1)
    s = torch.ones(1, 2, 3, 3, requires_grad=True)
    task, distill = s.sum(), (2 * s).sum()

    def weigh(task: Tensor, distill: Tensor, features: Any) -> float:
        return suggest_loss_weight([task], [distill], features, by="gradient")

    for call, sentence in (
        (lambda: gradient_ratio(task, distill, [x]), r"features\[0\]: expected the student's features with gradient"),
        (lambda: gradient_ratio(task, distill, {"p3": x}), r"features\['p3'\]: expected the student's features with gradient"),
        (lambda: gradient_ratio(task.detach(), distill, s), "task_loss: expected a scalar with gradient"),
        (lambda: gradient_ratio(task, 2 * s, s), "distill_loss: expected a scalar with gradient"),
        (lambda: gradient_ratio(task, distill, x.requires_grad_()), "task_loss: depends on none of the features"),
        (lambda: suggest_loss_weight([1.0], [1.0], by="norm"), "by: expected 'loss' or 'gradient', got 'norm'"),
        (lambda: weigh(task, distill, None), "features: expected the student's of every batch"),
        (lambda: suggest_loss_weight([task], [distill], [s]), "features: expected the student's of every batch"),
        (lambda: weigh(task, distill, []), "features: expected a list with .* 1 batches, got 0"),
        (lambda: weigh(task, distill, s), "features: .* of the 1 batches, got a tensor"),
        (lambda: weigh(task, 0 * distill, [s]), r"gradients' ratios: .* got 0.0 of \[0.0\]"),
        (lambda: weigh(0 * task, distill, [s]), r"gradients' ratios: .* got inf of \[inf\]"),
        (lambda: suggest_loss_weight([math.nan, 1, 2], [1, 1, 1]), r"task_losses: .* of \[nan, 1.0, 2.0\]"),
        (lambda: suggest_loss_weight({"a": 1.0}, [1.0]), r"task_losses: .* got dict; add them up: sum\(losses.values\(\)\)"),
        (lambda: suggest_loss_weight([1.0], [{"a": task}]), r"distill_losses: .* got dict; add them up"),
        (lambda: suggest_loss_weight([1.0], torch.ones(1, 2)), r"distill_losses: .* got Tensor of shape \[2\]"),
        (lambda: suggest_loss_weight(None, [1.0]), "task_losses: .* got NoneType"),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            call()


def test_a_loss_that_is_not_finite() -> None:
    s = torch.ones(1, 2, 3, 3, requires_grad=True)
    with pytest.warns(UserWarning, match="distill_loss: expected a finite loss, got nan; if it overflows in half"):
        assert not gradient_ratio(s.sum(), math.nan * s.sum(), s).isfinite()
