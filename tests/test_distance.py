"""``distance=``: smooth L1 and cosine under the same masks, against torch's own functions in float64."""

import itertools
from math import inf, nan
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, NLC, default_dtype, in_layout
from problems import Problem, Target, close, literal_losses, normal
from torch import Tensor
from torch.nn.functional import cosine_similarity, smooth_l1_loss

from maskd_triton import MaskedDistillLoss, MaskLearner, reference
from maskd_triton import functional as F

DISTANCES: list[dict[str, Any]] = [*({"distance": name} for name in F.DISTANCES), {"distance": "smooth_l1", "beta": 0.3}]
OTHERS = [options for options in DISTANCES if options["distance"] != "squared"]
SHAPES = [(2, 5, 4, 6), (2, 70, 3, 5), (2, 3, 1, 1)]


def name(options: dict[str, Any]) -> str:
    return " ".join(map(str, options.values()))


@pytest.mark.parametrize("options", OTHERS, ids=name)
@pytest.mark.parametrize(("custom", "weighted", "power"), [(False, True, 2), (True, False, 2), (False, False, 1)])
def test_float64_matches_the_formulas(
    options: dict[str, Any], custom: bool, weighted: bool, power: int, target: Target
) -> None:
    problem = Problem(SHAPES, 4, weighted)
    options = options | {"custom_mask": custom, "mask_power": power, "loss_weight": 0.7, "eps": 1e-3}
    losses, grads = problem.literal(**options)
    for layout in (*LAYOUTS, NLC) if target[0] == "eager" else [LAYOUTS[(custom + 2 * weighted + power) % len(LAYOUTS)]]:
        got, got_grads = problem.ours(target, layout, **options)
        close(got, losses, 1e-12)
        for g, e in zip(got_grads, grads, strict=True):
            close(g, e, 1e-12)


@pytest.mark.parametrize("options", OTHERS, ids=name)
def test_standardised(options: dict[str, Any], target: Target) -> None:
    problem = Problem(SHAPES, 4, standardize=True)
    with default_dtype(torch.float64):
        criterion = problem.criterion(custom_mask_warmup=0, impl=target[0], **options).to(target[1])
    student = [s.to(target[1]).requires_grad_() for s in problem.student]
    losses = criterion(student, [t.to(target[1]) for t in problem.teacher], reduction="none")
    losses.sum().backward()
    want, grads = problem.literal(custom_mask=True, **options)
    close(losses, want, 1e-11)
    for s, e in zip(student, grads, strict=True):
        close(s.grad, e, 1e-11)


@pytest.mark.parametrize("options", OTHERS, ids=name)
@pytest.mark.parametrize("pair", [("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("fp32", "bf16")], ids="-".join)
def test_error_is_that_of_the_dtype(options: dict[str, Any], pair: tuple[str, str], target: Target) -> None:
    """No more than twice the error of the literal formulas in the coarser of the two dtypes."""
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    s_dtype, t_dtype = (dtypes[x] for x in pair)
    problem = Problem([(2, 33, 9, 7)], 6, dtype=t_dtype)
    problem.student = [s.to(s_dtype) for s in problem.student]
    losses, grads = problem.literal(custom_mask=True, **options)
    plain, plain_grads = problem.literal(t_dtype, custom_mask=True, **options)
    got, got_grads = problem.ours(target, "channels_last", custom_mask=True, **options)
    largest = grads[0].abs().max()
    error, plain_error = ((g[0] - grads[0]).abs().max() for g in (got_grads, plain_grads))
    assert error <= 2 * (plain_error + torch.finfo(s_dtype).eps * largest)
    assert (got - losses).abs().max() <= 2 * ((plain - losses).abs().max() + torch.finfo(torch.float32).eps * losses.max())


def cropped(options: dict[str, Any], student: Tensor, teacher: Tensor, tokens: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    """Every image by itself, cut to its size."""
    losses = [
        reference.distill_loss([s[None, :, :h, :w]], [t[None, :, :h, :w]], [tokens], **options)
        for s, t, (h, w) in zip(student, teacher, sizes, strict=True)
    ]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("options", DISTANCES, ids=name)
@pytest.mark.parametrize("rubbish", [0.0, float("nan"), float("inf")])
def test_padding(options: dict[str, Any], rubbish: float, target: Target) -> None:
    impl, device = target
    problem = Problem([(2, 7, 6, 8)], 3, weighted=False)
    student, teacher, tokens = problem.student[0], problem.teacher[0], problem.tokens[0].double()
    valid = torch.zeros(2, 6, 8, dtype=torch.bool)
    for image, (h, w) in enumerate(sizes := [(6, 5), (3, 8)]):
        valid[image, :h, :w] = True
    own = student.clone().requires_grad_()
    want = cropped(options, own, teacher, tokens, sizes)
    want.backward()
    s, t = (torch.where(valid[:, None], x, rubbish).to(device) for x in (student, teacher))
    s.requires_grad_()
    got = F.masked_distill_loss(s, t, [tokens.to(device)], valid=valid.to(device), impl=impl, **options)
    got.backward()
    close(got, want, 1e-12)
    close(s.grad, own.grad, 1e-12)


@pytest.mark.parametrize("options", DISTANCES, ids=name)
@pytest.mark.parametrize("layouts", [("nchw", "channels_last"), ("channels_last", NLC)], ids="-".join)
@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.float32, torch.bfloat16)], ids=["float64", "float32-bfloat16"])
def test_all_options_at_once(
    options: dict[str, Any], layouts: tuple[str, str], dtypes: tuple[torch.dtype, torch.dtype], target: Target
) -> None:
    """Standardised features, mask weights, customised masks, padding, mask_power, two layouts and two dtypes: what the images
    cut to their size give by the formulas."""
    impl, device = target
    problem = Problem([(2, 70, 6, 5)], 4, dtype=dtypes[1], standardize=True)
    (student,), (teacher,) = problem.student, problem.teacher
    student, options = student.to(dtypes[0]), options | {"mask_power": 1, "loss_weight": 0.7, "eps": 1e-3}
    own, images, valid = student.to(torch.float64, copy=True).requires_grad_(), [], torch.zeros(2, 6, 5, dtype=torch.bool)
    for n, (h, w) in enumerate([(4, 5), (6, 2)]):
        valid[n, :h, :w] = True
        image = [own[n : n + 1, :, :h, :w]], [teacher[n : n + 1, :, :h, :w]]
        images.append(literal_losses(problem.learner, *image, custom_mask=True, **options))
    want = torch.stack(images).mean()
    want.backward()
    with default_dtype(dtypes[0]):
        criterion = problem.criterion(custom_mask_warmup=0, impl=impl, **options).to(device)
    padded = (torch.where(valid[:, None], x, torch.nan) for x in (student, teacher))
    s, t = (in_layout(x, layout).to(device) for x, layout in zip(padded, layouts, strict=True))
    got = criterion(s.requires_grad_(), t, valid=valid.to(device))
    got.backward()
    bound = 1e-11 if dtypes[0] == torch.float64 else 2e-4  # a kernel's bfloat16 tokens keep 16 bits
    close(got, want, bound)
    close(s.grad, own.grad, bound)


@pytest.mark.parametrize("options", DISTANCES, ids=name)
def test_given_masks(options: dict[str, Any], target: Target) -> None:
    impl, device = target
    problem = Problem([(2, 7, 6, 8)], 3)
    student = problem.student[0].clone().requires_grad_()
    want = reference.masked_distance(student, problem.teacher[0], problem.masks[0], problem.mask_weights[0], **options)
    want.backward()
    s = problem.student[0].to(device).requires_grad_()
    given = {"masks": problem.masks[0].to(device), "mask_weights": problem.mask_weights[0].to(device)}
    got = F.masked_distill_loss(s, problem.teacher[0].to(device), impl=impl, **given, **options)
    got.backward()
    close(got, want, 1e-12)
    close(s.grad, student.grad, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_vectors_of_zeros(dtype: torch.dtype, target: Target) -> None:
    """Distance 1, as torch's cosine, whose gradient there is large but finite."""
    impl, device = target
    teacher = Problem([(2, 5, 3, 4)], 2).teacher[0].to(dtype)
    teacher[0, :, 0, 0] = 0
    student = (teacher + 0.1).detach()
    student[:, :, 1, 1] = 0
    student[0, :, 0, 0] = 0  # both
    masks = torch.ones(2, 1, 3, 4)
    s = student.to(device, copy=True).requires_grad_()
    got = F.masked_distill_loss(s, teacher.to(device), masks=masks.to(device, dtype), distance="cosine", impl=impl)
    got.backward()
    x = student.double().requires_grad_()
    want = (1 - cosine_similarity(x, teacher.double(), dim=1)).mean((1, 2)).mean()
    want.backward()
    assert s.grad.isfinite().all()
    torch.testing.assert_close(got.double().cpu(), want, rtol=2e-6 if dtype != torch.float64 else 1e-12, atol=0)
    most = torch.finfo(dtype).max
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(s.grad.cpu().double(), x.grad.clamp(-most, most), rtol=tolerance, atol=tolerance)


def test_vectors_shorter_than_the_least_length(target: Target) -> None:
    """The distance is torch's. The gradient is that of this value, whose length is clamped; torch's cosine gives another."""
    impl, device = target
    short = 1e-9 * normal(2, 5, 3, 4).double()
    teacher, masks = normal(2, 5, 3, 4, seed=1).double(), torch.ones(2, 1, 3, 4, dtype=torch.float64)
    s, x, y = short.to(device, copy=True).requires_grad_(), short.clone().requires_grad_(), short.clone().requires_grad_()
    got = F.masked_distill_loss(s, teacher.to(device), masks=masks.to(device), distance="cosine", impl=impl)
    want = (1 - cosine_similarity(x, teacher, dim=1)).mean((1, 2)).mean()
    clamped = (1 - (y * teacher).sum(1) / y.norm(dim=1).clamp(min=1e-8) / teacher.norm(dim=1)).mean()
    for loss in (got, want, clamped):
        loss.backward()
    close(got, want, 1e-12)
    close(s.grad, y.grad, 1e-12)
    assert (s.grad.cpu() - x.grad).abs().max() > 0.01 * x.grad.abs().max()


@pytest.mark.parametrize("options", OTHERS, ids=name)
def test_one_pixel_everywhere_is_the_plain_distance(options: dict[str, Any], target: Target) -> None:
    """Masks of 1: the mean of torch's own function over pixels."""
    impl, device = target
    problem = Problem([(3, 6, 5, 4)], 2)
    s, t = problem.student[0], problem.teacher[0]
    plain = (
        1 - cosine_similarity(s, t, dim=1)
        if options["distance"] == "cosine"
        else smooth_l1_loss(s, t, reduction="none", beta=options.get("beta", 1.0)).mean(1)
    )
    masks = torch.ones(3, 1, 5, 4, device=device)
    got = F.masked_distill_loss(s.to(device), t.to(device), masks=masks, impl=impl, **options)
    close(got, plain.mean(), 1e-12)


def test_scale_of_the_student_does_not_change_the_cosine(target: Target) -> None:
    problem = Problem([(2, 6, 5, 4)], 2, dtype=torch.float32)
    one = problem.loss(target, distance="cosine")
    for scale in (1e-3, 1e6):
        torch.testing.assert_close(problem.loss(target, [scale * s for s in problem.student], distance="cosine"), one)


@pytest.mark.slow
@pytest.mark.parametrize("options", OTHERS, ids=name)
def test_criterion_is_compiled_once_and_says_so(options: dict[str, Any], target: Target) -> None:
    impl, device = target
    torch._dynamo.reset()
    learner = MaskLearner([6, 4], 3)
    criterion = MaskedDistillLoss([6, 4], 3, pretrained=learner, impl=impl, **options).to(device)
    assert f"distance={options['distance']!r}" in repr(criterion)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True, dynamic=True)
    for h, w in ((5, 7), (4, 9)):
        levels = [torch.randn(2, c, h, w, device=device) for c in (6, 4)]
        student = [(x + 0.5).requires_grad_() for x in levels]
        grads = [torch.autograd.grad(call(student, levels), student) for call in (criterion, compiled)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_wrong_distances() -> None:
    x = torch.zeros(1, 2, 3, 3)
    for options, sentence in (
        ({"distance": "l2"}, r"distance: expected one of 'squared', 'smooth_l1', 'cosine', got 'l2'"),
        *(
            ({"beta": b}, "beta: expected a number above 0, from 1e-30 ")
            for b in (0, -1, 1e-40, 1e39, inf, nan, "1", None, True)
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=sentence):
            F.masked_distill_loss(x, x, [torch.zeros(1, 2)], **options)
        with pytest.raises((ValueError, TypeError), match=sentence):
            MaskedDistillLoss(2, 1, pretrained=MaskLearner(2, 1), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("beta", [1e-30, 1e-3, 0.3, 0.5, 1.0, 1e3, 1e30])
def test_any_beta(beta: float, dtype: torch.dtype, target: Target) -> None:
    """Also where it is extreme, at differences of beta itself and at none: torch's own function."""
    impl, device = target
    teacher = Problem([(2, 4, 3, 5)], 1).teacher[0].to(dtype)
    teacher[:, :2] = 0
    student = (teacher + 0.5 * Problem([(2, 4, 3, 5)], 1).student[0]).to(dtype)
    student[:, 0, 0], student[:, 0, 1], student[:, 1, 0] = (x * min(beta, 6e4) for x in (1, -1, 0))
    s = student.to(device, copy=True).requires_grad_()
    masks = torch.ones(2, 1, 3, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    got = F.masked_distill_loss(s, teacher.to(device), masks=masks, distance="smooth_l1", beta=beta, impl=impl)
    got.backward()
    x = student.double().requires_grad_()
    want = smooth_l1_loss(x, teacher.double(), beta=beta)
    want.backward()
    units = 1e-11 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(got.cpu().double(), want, rtol=units, atol=0)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # that float16 holds
    torch.testing.assert_close(s.grad.cpu().double(), x.grad, rtol=units + torch.finfo(dtype).eps, atol=smallest)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "standardize"), list(itertools.product(OTHERS, [False, True])), ids=str)
def test_gradcheck(options: dict[str, Any], standardize: bool, target: Target) -> None:
    problem = Problem([(2, 3, 2, 3)], 2, standardize=standardize)
    with default_dtype(torch.float64):
        criterion = problem.criterion(impl=target[0], **options).to(target[1]).eval()
    teacher = [t.to(target[1]) for t in problem.teacher]
    student = problem.student[0].to(target[1]).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: criterion([s], teacher), (student,), fast_mode=target[0] == "triton")
