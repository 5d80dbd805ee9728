"""Both implementations against the published formulas in float64: every case of one table, forward and backward.

``cases.py`` is the table, ``bounds.py`` says how far off a result may be. ``MASKD_TEST_SEED=k`` gives all of it other numbers.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, smooth_l1_loss

from maskd_triton import MaskModule
from maskd_triton import functional as F
from tests.answers import Comparison, check, criterion_of, ours
from tests.cases import SPECIAL, STAGE_1, STAGE_2, Case, case_of, covering, pairs_of, possible
from tests.given import given_by
from tests.helpers import INTERPRETED, TARGETS, far_apart
from tests.problems import Target, close, normal

STAGES = {2: STAGE_2, 1: STAGE_1}
PAIRS = {f"{stage}: pairs {i}": case for stage in STAGES for i, case in enumerate(covering(stage, STAGES[stage]))}
CASES = {**SPECIAL, **PAIRS}
HALF = (torch.float16, torch.bfloat16)


def quick_and_slow() -> list[Any]:
    """Every case for every target; in the interpreter only every fourth is quick."""
    return [
        pytest.param(
            name, target, id=f"{name}-{'-'.join(target)}", marks=[pytest.mark.slow] if target == INTERPRETED and i % 4 else []
        )
        for target in TARGETS
        for i, name in enumerate(CASES)
    ]


@pytest.mark.parametrize(("name", "target"), quick_and_slow(), indirect=["target"])
def test_case(name: str, target: Target) -> None:
    check(given_by(CASES[name]), *target)


# --- what the table is worth ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_every_pair_of_options_has_a_case(stage: int) -> None:
    met = set().union(*(pairs_of(case, STAGES[stage]) for case in CASES.values() if case.stage == stage))
    assert {pair for pair, _ in possible(stage, STAGES[stage])} <= met


# The largest bounds, relative to the largest value: of sums, and of what is rounded to half precision
TIGHT = {torch.float64: 3e-12, torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
PLAIN = [
    name
    for name, case in CASES.items()
    if {case.learned, case.teacher.values, case.student.values} <= {"trained", "normal"}
    and not (case.cast or case.align or case.resize)
]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_an_error_of_three_times_the_bound_is_found(name: str) -> None:
    """In an element of any result; and a bound is a small part of the result."""
    given = given_by(CASES[name])
    got, comparison = ours(given, "eager"), Comparison(given, "eager")
    assert max(comparison.shares(got).values(), default=0) <= 1
    for key, value in got.items():
        by_image = key.startswith(("student", "features", "masked"))
        for n, allowed in enumerate(comparison.allowed(key, value.dtype)):
            largest, info = comparison.largest(key, n), torch.finfo(value.dtype)
            if largest >= info.max:  # a gradient in half precision that saturates
                continue
            off = value.clone(memory_format=torch.contiguous_format)
            part = off[n] if by_image else off
            cancels = key.startswith("prob")  # the slopes of a softmax add up to zero
            assert cancels or not largest or allowed <= TIGHT[value.dtype] * largest + info.tiny * info.eps, (key, n)
            part.view(-1)[part.numel() // 2] += 3 * allowed
            assert max(comparison.shares({**got, key: off}).values()) > 1, (key, n)


# --- what a table cannot say ------------------------------------------------------------------------------------------


def level(target: Target, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).to(target[1], dtype)


def module_of(target: Target, channels: int = 5, num_tokens: int = 3, weighted: bool = True) -> MaskModule:
    """With parameters of the size of trained ones."""
    given = given_by(Case(stage=1, levels=((channels, 1, 1),), tokens=num_tokens, weighted=weighted))
    module = given.learner.mask_modules[0].float().to(target[1])
    module.impl = target[0]
    return module


def test_gradients_where_they_are_wanted_alone(target: Target) -> None:
    """The loss does not depend on who wants a gradient; a level that wants none gets none, and the others theirs."""
    given = given_by(case_of(dtypes="fp32", through="module")).on(target[1])
    criterion = criterion_of(given, target[0]).eval()
    both = [s.detach().requires_grad_() for s in given.student]
    loss = criterion(both, given.teacher)
    want = torch.autograd.grad(loss, both)
    with torch.no_grad():
        without = criterion(given.student, given.teacher)
    assert not without.requires_grad
    second = given.student[1].detach().requires_grad_()
    alone = criterion([given.student[0], second], given.teacher)
    assert torch.equal(torch.autograd.grad(alone, second)[0], want[1])
    assert torch.equal(without, loss.detach())
    assert torch.equal(without, alone.detach())


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("standard", [False, True], ids=["", "standardised"])
def test_token_biases_without_standardised_weights(standard: bool, biased: bool, target: Target) -> None:
    """And the other way round: nothing but a sum binds one to the other."""
    x, tokens = level(target, 2, 5, 4, 3), level(target, 3, 5, seed=1)
    rows, bias = level(target, 9, 3, 5, seed=2), level(target, *([5, 3] if standard else [3]), seed=3)
    b = level(target, 3, seed=4) if biased else None
    (y,), _ = F.masked_features_and_dice([x], [tokens], [(rows, bias)], token_bias=[b] if biased else None, impl=target[0])
    gate = (F.receptive_masks(x, tokens, b) * F.mask_weights(x, rows, bias)[:, :, None, None]).sum(1, keepdim=True)
    close(y.cpu(), (x * gate).cpu(), 1e-5)


def test_frozen_features_change_no_gradient_of_parameters(target: Target) -> None:
    module = module_of(target)
    found = []
    for wanted in (True, False):
        x = level(target, 2, 5, 4, 3).requires_grad_(wanted)
        y, dice = module(x)
        found.append(torch.autograd.grad([y, dice], list(module.parameters()), [level(target, 2, 5, 4, 3, seed=1), dice * 3]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("used", [0, 1], ids=["masked features", "Dice loss"])
def test_an_output_without_use_has_no_gradient(used: int, weighted: bool, target: Target) -> None:
    module = module_of(target, weighted=weighted)
    x, g = level(target, 2, 5, 3, 4, seed=1), level(target, 2, 5, 3, 4, seed=2)
    outputs, upstream = module(x), (g, torch.ones((), device=target[1]))
    other = (torch.zeros_like(g), torch.zeros_like(upstream[1]))
    both = [upstream[i] if i == used else other[i] for i in range(2)]
    want = torch.autograd.grad(outputs, list(module.parameters()), both)
    got = torch.autograd.grad(module(x)[used], list(module.parameters()), upstream[used], materialize_grads=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_features_made_in_inference_mode(target: Target) -> None:
    """Nothing is kept of them where nothing learns; else an error says what to do."""
    given = given_by(case_of(dtypes="fp32")).on(target[1])
    criterion, module = criterion_of(given, target[0]).eval(), module_of(target)
    student = [s.detach().requires_grad_() for s in given.student]
    with torch.inference_mode():
        x, teacher = level(target, 2, 5, 4, 6), [t * 1 for t in given.teacher]
    with pytest.raises(ValueError, match=r"features\[0\]: an inference tensor cannot be kept"):
        module(x)
    with pytest.raises(ValueError, match=r"teacher\[0\](.|\n)*no_grad"):
        criterion(student, teacher)
    module.requires_grad_(False)
    assert torch.equal(module(x)[0], module(x.clone())[0])
    with torch.no_grad():
        assert torch.equal(criterion(given.student, teacher), criterion(given.student, given.teacher))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype, target: Target) -> None:
    """Sums stay in float32 where the criterion is called inside an autocast region."""
    module = module_of(target)
    given = given_by(case_of(dtypes="fp32")).on(target[1])
    criterion = criterion_of(given, target[0]).eval()

    def results() -> list[Tensor]:
        masks = module.masks(given.teacher[0])
        return [criterion(given.student, given.teacher), *module(given.teacher[0]), masks, F.dice_loss(masks)]

    want = results()
    with torch.autocast(target[1], dtype):
        got = results()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_wide_offsets(layout: str, target: Target) -> None:
    """Images of 2**31 elements and more, and such gradients from above, take 64-bit offsets."""
    for stage in STAGES:
        given = given_by(case_of(stage=stage, levels=((9, 5, 7),), tokens=6, dtypes="fp16"))
        want = ours(given, *target)
        for levels in (given.student, given.teacher, given.upstream[: 2 - stage]):
            levels[:] = [far_apart(x, layout, "cpu") for x in levels]
        got = ours(given, *target)
        shares = Comparison(given_by(given.case), target[0]).shares(got)
        assert max(shares.values()) <= 1
        assert got.keys() == want.keys()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_sums_of_large_maps(dtype: torch.dtype, target: Target) -> None:
    """67200 pixels under a mask of ones: a float16 sum would be infinite; of features of 60000 so would every square."""
    tokens, value = torch.full((2, 4), 40.0, device=target[1]), 6e4 if dtype == torch.float16 else 1e4
    h, w = (200, 336) if target != INTERPRETED else (20, 168)
    teacher = torch.full((1, 4, h, w), value, device=target[1], dtype=dtype)
    student, valid = (-teacher).requires_grad_(), torch.ones(1, h, w, dtype=torch.bool, device=target[1])
    for pixels in (None, valid):
        loss = F.masked_distill_loss(student, teacher, [tokens], valid=pixels, impl=target[0])
        torch.testing.assert_close(loss.double(), 4 * teacher[0, 0, 0, 0].double() ** 2, rtol=1e-5, atol=0)
        (grad,) = torch.autograd.grad(loss * 1e-3, student)
        assert grad.isfinite().all()
        assert grad.any()
    assert F.dice_loss(torch.ones(1, 2, h, w, dtype=dtype, device=target[1])).item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_small_gradients_are_not_lost(dtype: torch.dtype, target: Target) -> None:
    """A mean over a large head's output gives gradients below what float16 can hold: tokens must not stand still."""
    module = module_of(target, 8, 4, False)
    x, g = level(target, 1, 8, 5, 6, dtype=dtype), level(target, 1, 8, 5, 6, dtype=dtype, seed=1)
    small = 2.0**-10 if dtype == torch.float16 else 2.0**-40
    full, tiny = (torch.autograd.grad(module(x)[0], module.mask_token, g * scale)[0].double() / scale for scale in (1, small))
    # float16 rounds the gradient from above itself, below 2^-14 to multiples of 2^-24, that is of 2^-14 times g
    close(tiny.cpu(), full.cpu(), 1e-5 if dtype != torch.float16 else 2**-14 * 8)


def test_vectors_shorter_than_the_least_length(target: Target) -> None:
    """The distance is torch's. The gradient is that of this value, whose length is clamped; torch's cosine gives another."""
    short, teacher = 1e-9 * level(target, 2, 5, 3, 4).double(), level(target, 2, 5, 3, 4, seed=1).double()
    masks = torch.ones(2, 1, 3, 4, dtype=torch.float64, device=target[1])
    s, y = short.clone().requires_grad_(), short.clone().requires_grad_()
    got = F.masked_distill_loss(s, teacher, masks=masks, distance="cosine", impl=target[0])
    clamped = (1 - (y * teacher).sum(1) / y.norm(dim=1).clamp(min=1e-8) / teacher.norm(dim=1)).mean()
    close(got.cpu(), (1 - cosine_similarity(short, teacher, dim=1)).mean().cpu(), 1e-12)
    close(torch.autograd.grad(got, s)[0].cpu(), torch.autograd.grad(clamped, y)[0].cpu(), 1e-12)


@pytest.mark.parametrize("beta", [1e-30, 0.3, 0.5, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_differences_of_beta_itself_and_of_none(dtype: torch.dtype, beta: float, target: Target) -> None:
    teacher = level(target, 2, 4, 3, 5, dtype=dtype)
    teacher[:, :2] = 0
    student = (teacher + 0.5 * level(target, 2, 4, 3, 5, seed=1)).to(dtype)
    student[:, 0, 0], student[:, 0, 1], student[:, 1, 0] = (x * min(beta, 6e4) for x in (1, -1, 0))
    s, x = student.clone().requires_grad_(), student.double().requires_grad_()
    masks = torch.ones(2, 1, 3, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=target[1])
    got = F.masked_distill_loss(s, teacher, masks=masks, distance="smooth_l1", beta=beta, impl=target[0])
    want = smooth_l1_loss(x, teacher.double(), beta=beta)
    for value, exact in ((got, want), (torch.autograd.grad(got, s)[0], torch.autograd.grad(want, x)[0])):
        rtol = 2e-12 + 32 * torch.finfo(value.dtype).eps if value is got else 2e-12 + 1.1 * torch.finfo(value.dtype).eps
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(value.double(), exact, rtol=rtol, atol=smallest)


def test_mean_inside_of_a_box(target: Target) -> None:
    """One binary mask: the mean squared error inside the box, for any power; and nothing where the box is empty."""
    s, t = level(target, 3, 8, 6, 9), level(target, 3, 8, 6, 9, seed=1)
    box = torch.zeros(3, 1, 6, 9, device=target[1])
    box[0, :, 1:4, 2:8] = box[1, :, :, :5] = 1  # the third image has no box
    want = sum((s[n].double() - t[n].double()).square()[:, box[n, 0] > 0].mean() for n in range(2)) / 3
    for power, eps in ((1, 0.0), (2, 1e-12)):
        x = s.clone().requires_grad_()
        loss = F.masked_distill_loss(x, t, masks=box, mask_power=power, eps=eps, impl=target[0])
        torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
        assert not torch.autograd.grad(loss, x)[0][(box == 0).expand_as(s)].any()


def test_a_distance_without_a_branch_is_an_error(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "DISTANCES", (*F.DISTANCES, "another"))
    s, t = level(target, 1, 4, 3, 3).requires_grad_(), level(target, 1, 4, 3, 3, seed=1)
    with pytest.raises(Exception, match=r"another|without a branch"):
        F.masked_distill_loss(s, t, [level(target, 2, 4)], distance="another", impl=target[0])
