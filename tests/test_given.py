"""Masks and weights from outside: boxes, score maps, attention, through the same kernels."""

from typing import Any

import pytest
import torch
from helpers import LAYOUTS, in_layout
from problems import Problem, Target
from torch import Tensor

from maskd_triton import MaskedDistillLoss, MaskLearner, reference
from maskd_triton import functional as F

SHAPES = [(2, 5, 6, 7), (2, 3, 3, 3)]


def problem(tokens: int, device: str) -> tuple[list[Tensor], ...]:
    drawn = Problem(SHAPES, tokens)
    return tuple([x.to(device) for x in xs] for xs in (drawn.student, drawn.teacher, drawn.masks, drawn.mask_weights))


def literal(*levels: list[Any], **options: Any) -> Tensor:
    """The sum over levels of student, teacher, masks and weights."""
    return sum(reference.masked_distance(*level, **options) for level in zip(*levels, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("tokens", "weighed"), [(1, False), (3, True), (9, True), (9, False)])
def test_literal(tokens: int, weighed: bool, power: int, layout: str, target: Target) -> None:
    impl, device = target
    students, teachers, masks, weights = problem(tokens, device)
    xs = [in_layout(s, layout).requires_grad_() for s in students]
    options = {"mask_power": power, "eps": 1e-3}
    loss = F.masked_distill_loss(
        xs, [in_layout(t, layout) for t in teachers], masks=masks, mask_weights=weights if weighed else None,
        loss_weight=2.5, impl=impl, **options,
    )  # fmt: skip
    leaves = [s.detach().clone().requires_grad_() for s in students]
    expected = 2.5 * literal(leaves, teachers, masks, weights if weighed else [None] * len(SHAPES), **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for g, e in zip(torch.autograd.grad(loss, xs), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_box_of_one_mask_is_a_mean(dtype: torch.dtype, target: Target) -> None:
    """One binary mask: the mean squared error inside the box, for any power; and nothing where the box is empty."""
    impl, device = target
    torch.manual_seed(0)
    s, t = (torch.randn(3, 8, 6, 9).to(dtype) for _ in range(2))
    box = torch.zeros(3, 1, 6, 9)
    box[0, :, 1:4, 2:8] = box[1, :, :, :5] = 1  # the third image has no box
    expected = sum((s[n].double() - t[n].double()).square()[:, box[n, 0] > 0].mean() for n in range(2)) / 3
    for power, eps, given in ((1, 0.0, box), (2, 0.0, box.to(dtype)), (1, 1e-12, box.double())):
        x = s.to(device).requires_grad_()
        loss = F.masked_distill_loss(x, t.to(device), masks=given.to(device), mask_power=power, eps=eps, impl=impl)
        loss.backward()
        torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-6, atol=0)
        assert x.grad is not None
        assert not x.grad.cpu()[(box == 0).expand_as(s)].any()
        assert x.grad.isfinite().all()


def test_tokens_with_given_weights_and_valid(target: Target) -> None:
    """Weights from outside on the tokens' masks, and given masks on valid pixels."""
    impl, device = target
    students, teachers, masks, weights = problem(3, device)
    valid = torch.rand(2, 12, 14, device=device) > 0.4
    seen = [valid[:, ::2, ::2], valid[:, ::4, [0, 4, 9]]]
    tokens = [torch.randn(3, c, dtype=torch.float64, device=device) for _, c, _, _ in SHAPES]
    found = F.masked_distill_loss(students, teachers, tokens, mask_weights=weights, valid=valid, mask_power=1, impl=impl)
    own = [F.receptive_masks(t, e) * v[:, None] for t, e, v in zip(teachers, tokens, seen, strict=True)]
    expected = literal(students, teachers, own, weights, mask_power=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found = F.masked_distill_loss(students, teachers, masks=masks, valid=valid, impl=impl)
    expected = literal(students, teachers, [m * v[:, None] for m, v in zip(masks, seen, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_standardised_difference(target: Target) -> None:
    impl, device = target
    students, teachers, masks, weights = problem(3, device)
    levels, targets = [], []
    for t in teachers:
        mean, std = torch.randn_like(t[0, :, 0, 0]), torch.rand_like(t[0, :, 0, 0]) + 0.5
        levels.append(F.compose_standardization(torch.zeros_like(t[0, :, 0, :3].T), mean, std)[0])
        targets.append((t - mean[:, None, None]) / std[:, None, None])
    loss = F.masked_distill_loss(students, teachers, masks=masks, mask_weights=weights, standardize=levels, impl=impl)
    torch.testing.assert_close(loss, literal(students, targets, masks, weights), rtol=1e-12, atol=0)


def test_criterion(target: Target) -> None:
    """By key, in any order; without tokens of its own, and instead of its own, which the warm-up does not touch."""
    impl, device = target
    students, teachers, masks, weights = problem(4, device)
    expected = literal(students, teachers, masks, weights, mask_power=1)
    s, t, m, w = (dict(zip("ab", xs, strict=True)) for xs in (students, teachers, masks, weights))
    m, w = dict(reversed(m.items())), dict(reversed(w.items()))
    options: dict[str, Any] = {"mask_power": 1, "impl": impl}
    without = MaskedDistillLoss([5, 3], None, **options).to(device)
    assert not list(without.parameters())
    own = MaskedDistillLoss([5, 3], 3, custom_mask_warmup=0, pretrained=MaskLearner([5, 3], 3), **options).to(device)
    for criterion in (without, own):
        loss = criterion(s, t, masks=m, mask_weights=w)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        level = criterion.diagnostics()["b"]
        torch.testing.assert_close(level.coverage, masks[1].mean((0, 2, 3)), rtol=1e-12, atol=0)
        share = weights[1] / weights[1].sum(1, keepdim=True)
        torch.testing.assert_close(level.weight, share.mean(0), rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="masks: expected masks with every call, because num_tokens=None"):
        without(s, t)


def test_one_mask_for_all_images() -> None:
    """Expanded over the batch."""
    students, teachers, masks, _ = problem(2, "cpu")
    one = [m[:1].expand_as(m) for m in masks]
    loss = F.masked_distill_loss(students, teachers, masks=one)
    assert torch.equal(loss, F.masked_distill_loss(students, teachers, masks=[m.contiguous() for m in one]))


W = [(torch.zeros(9, 3, 4), torch.zeros(3))]
X, M, E = torch.zeros(2, 4, 3, 3), torch.zeros(2, 3, 3, 3), [torch.zeros(3, 4)]
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, "tokens and masks: expected one of them, got none"),
    ({"tokens": E, "masks": M}, ValueError, "tokens and masks: expected one of them, got both"),
    ({"masks": M, "custom_mask": True}, ValueError, "masks: given masks are not customised"),
    ({"tokens": E, "weighting": W, "mask_weights": torch.zeros(2, 3)}, ValueError, "mask_weights and weighting: expected"),
    ({"masks": torch.zeros(2, 3, 4, 3)}, ValueError, "masks[0]: expected masks [2, T, 3, 3], got shape [2, 3, 4, 3]"),
    ({"masks": torch.zeros(2, 3, 3, 3).bool()}, TypeError, "masks[0]: expected float16, bfloat16, float32 or float64"),
    ({"masks": [M, M]}, ValueError, "masks: expected one entry for each of the 1 levels, got 2"),
    ({"masks": {"p3": M}}, TypeError, "masks and teacher: expected both or neither to be a mapping"),
    ({"masks": M.clone().requires_grad_()}, ValueError, "masks[0]: requires grad, but is frozen in stage 2"),
    ({"masks": M, "mask_weights": torch.zeros(2, 4)}, ValueError, "mask_weights[0]: expected shape [2, 3], got [2, 4]"),
    ({"masks": M, "mask_weights": torch.zeros(2, 3).requires_grad_()}, ValueError, "mask_weights[0]: requires grad"),
    ({"masks": M, "mask_power": 3}, ValueError, "mask_power: expected 1 or 2, got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "sentence"), ERRORS)
def test_errors(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        F.masked_distill_loss(X, X, **options)
    assert str(caught.value).startswith(sentence)


def test_errors_of_the_criterion() -> None:
    for options in ({"standardize": True}, {"pretrained": MaskLearner(4)}):
        with pytest.raises(ValueError, match="num_tokens: None means masks given with every call"):
            MaskedDistillLoss(4, None, **options)
    with pytest.raises(ValueError, match="mask_power: expected 1 or 2, got 0"):
        MaskedDistillLoss(4, None, mask_power=0)
    levels = torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 4, 4)
    with pytest.raises(ValueError, match=r"masks\[1\]: expected as many masks as on the first level, 3, got 2"):
        F.masked_distill_loss([torch.zeros(2, 4, 4, 4)] * 2, [torch.zeros(2, 4, 4, 4)] * 2, masks=levels)
