"""Padded batches: the valid pixels alone give the loss, its gradient and the mask weights, as if every image were cropped."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, default_dtype, in_layout
from problems import Problem, Target, literal_learn, literal_losses
from torch import Tensor, nn
from torch.nn.functional import conv2d

from maskd_triton import MaskedDistillLoss, MaskLearner, _eager, shapes
from maskd_triton import functional as F
from maskd_triton._ops.pool import pool, strip_sums, valid_weights

STRIDES, CHANNELS = (2, 4), (5, 3)
IMAGES = [(8, 12), (4, 8), (8, 4), (0, 0)]  # the last has no valid pixel
SIZE = (8, 16)


def valid_of(images: list[tuple[int, int]], device: str) -> Tensor:
    rows = [[[y < h and x < w for x in range(SIZE[1])] for y in range(SIZE[0])] for h, w in images]
    return torch.tensor(rows, device=device)


def crop(xs: list[Tensor], n: int) -> list[Tensor]:
    return [x[n : n + 1, :, : IMAGES[n][0] // s, : IMAGES[n][1] // s] for x, s in zip(xs, STRIDES, strict=True)]


def problem_of(weight_mask: bool, standardize: bool = False, dtype: torch.dtype = torch.float64) -> Problem:
    shapes = [(len(IMAGES), c, SIZE[0] // s, SIZE[1] // s) for c, s in zip(CHANNELS, STRIDES, strict=True)]
    return Problem(shapes, 3, weight_mask, dtype, standardize)


def placed(levels: list[Tensor], device: str) -> list[Tensor]:
    return [x.detach().to(device).requires_grad_() for x in levels]


OPTIONS = pytest.mark.parametrize(("weight_mask", "standardize"), [(True, False), (False, False), (True, True), (False, True)])


@OPTIONS
@pytest.mark.parametrize("eps", [1e-12, 0.0])
def test_loss_equals_crops(weight_mask: bool, standardize: bool, eps: float, target: Target) -> None:
    impl, device = target
    problem = problem_of(weight_mask, standardize)
    with default_dtype(torch.float64):
        criterion = problem.criterion(custom_mask_warmup=0, eps=eps, impl=impl).to(device).eval()
    student, teacher = placed(problem.student, device), [x.to(device) for x in problem.teacher]
    loss = criterion(student, teacher, valid=valid_of(IMAGES, device))
    grads = torch.autograd.grad(loss, student)
    crops = (literal_losses(problem.learner, crop(student, n), crop(teacher, n), custom_mask=True, eps=eps) for n in range(3))
    expected = sum(losses.sum() for losses in crops) / len(IMAGES)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-12, atol=0)
    for g, e in zip(grads, torch.autograd.grad(expected, student), strict=True):  # zero outside the crops
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-15)


@OPTIONS
def test_stage_1_equals_crops(weight_mask: bool, standardize: bool, target: Target) -> None:
    impl, device = target
    problem = problem_of(weight_mask, standardize)
    learner = problem.learner.to(device, torch.float64)
    learner.impl = impl
    features, ups = placed(problem.teacher, device), [x.to(device) for x in problem.student]
    leaves = [*learner.parameters(), *features]
    masked = learner(features, valid_of(IMAGES, device))
    dice = learner.dice_loss()
    loss = sum((y * u).sum() for y, u in zip(masked, ups, strict=True)) + 3 * dice
    grads = torch.autograd.grad(loss, leaves)
    expected = expected_dice = 0.0
    for n in range(3):
        crops = zip(learner.mask_modules, crop(features, n), masked, crop(ups, n), STRIDES, strict=True)
        for module, x, whole, u, s in crops:
            y, d = literal_learn(module, x)
            h, w = (side // s for side in IMAGES[n])
            torch.testing.assert_close(whole[n : n + 1, :, :h, :w], y, rtol=1e-12, atol=1e-14)
            assert not whole[n, :, h:].any()
            assert not whole[n, :, :, w:].any()
            expected = expected + (y * u).sum()
            expected_dice = expected_dice + d / len(IMAGES)
    torch.testing.assert_close(dice, expected_dice, rtol=1e-12, atol=0)
    expected = expected + 3 * expected_dice
    for g, e in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-13)


def literal_weights(x: Tensor, v: Tensor, convs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Padding and holes are zeros for the 3x3 convolution, and the mean is over valid pixels."""
    w3, b3, w1, b1 = convs
    seen = conv2d(x * v[:, None], w3, b3, padding=1) * v[:, None]
    pooled = seen.sum((2, 3)) / v.sum((1, 2)).clamp(min=1)[:, None]
    return torch.softmax(pooled @ w1.flatten(1).T + b1, 1)


@pytest.mark.parametrize("standardize", [False, True])
def test_mask_weights_of_any_shape(standardize: bool, target: Target) -> None:
    torch.manual_seed(0)
    impl, device = target
    c, t = 4, 3
    convs = tuple(torch.randn(*shape, dtype=torch.float64) for shape in ((c, c, 3, 3), (c,), (t, c, 1, 1), (t,)))
    x, v = torch.randn(5, c, 7, 6, dtype=torch.float64), torch.rand(5, 7, 6) > 0.4
    v[3], v[4] = False, True
    mean, std = torch.randn(c).double(), torch.rand(c).double() + 0.5
    weighting, seen = F.compose_weighting(*convs), x
    if standardize:
        _, weighting = F.compose_standardization(torch.zeros(t, c).double(), mean, std, weighting)
        seen = (x - mean[:, None, None]) / std[:, None, None]
    (found,) = valid_weights(
        [x.flatten(2).to(device)], [tuple(p.to(device) for p in weighting)], [v.flatten(1).byte().to(device)], [7], impl
    )
    # an image without valid pixels has weights of the bias alone, which count nothing
    torch.testing.assert_close(found[[0, 1, 2, 4]].cpu(), literal_weights(seen, v, convs)[[0, 1, 2, 4]], rtol=1e-11, atol=0)
    assert found.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_strip_sums(dtype: torch.dtype, layout: str, target: Target) -> None:
    """Levels of many runs, channels that no block divides, and values whose half-precision sums would overflow."""
    torch.manual_seed(0)
    impl, device = target
    double = dtype == torch.float64  # smaller tiles, of which the interpreter would take a minute for as many pixels
    sizes = [(40, 13) if double else (70, 31), (3, 3), (1, 1)]
    channels = (20 if double else 70, 5, 1)
    xs = [torch.rand(2, c, h, w) * (6e4 if dtype == torch.float16 else 1) for c, (h, w) in zip(channels, sizes, strict=True)]
    xs = [in_layout(x.to(device, dtype), layout).flatten(2) for x in xs]
    valid = [(torch.rand(2, h * w) > 0.3).byte().to(device) for h, w in sizes]
    sums = pool(xs, valid, [h for h, _ in sizes], impl)
    for s, x, v, (h, _) in zip(sums, xs, valid, sizes, strict=True):
        strips = _eager.strips_of(v, h).double()
        torch.testing.assert_close(s[:, :, -1].double(), strips.sum(2), rtol=0, atol=0)
        exact = torch.bmm(strips, x.double().transpose(1, 2))
        scale = torch.bmm(strips.abs(), x.double().abs().transpose(1, 2)).clamp(min=1e-30)
        assert ((s[:, :, :-1].double() - exact).abs() / scale).max() <= torch.finfo(s.dtype).eps * 64


def test_pool_operator(target: Target) -> None:
    torch.manual_seed(0)
    impl, device = target
    xs = [
        torch.randn(2, 3, 12, device=device, dtype=torch.float64).requires_grad_(),
        torch.randn(2, 2, 4, device=device).double(),
    ]
    valid = [(torch.rand(2, p, device=device) > 0.4).byte() for p in (12, 4)]
    torch.library.opcheck(pool, ([x.detach() for x in xs], valid, [3, 2], impl))
    assert torch.autograd.gradcheck(lambda x: strip_sums([x, xs[1]], valid, [3, 2], impl)[0], xs[:1], fast_mode=True)


def test_forms_of_valid() -> None:
    problem = problem_of(True, dtype=torch.float32)
    criterion, student, teacher = problem.criterion().eval(), problem.student, problem.teacher
    images = [(8, 12), (4, 8), (8, 4), (2, 2)]
    expected = criterion(student, teacher, valid=valid_of(images, "cpu"))
    image_list = SimpleNamespace(tensors=torch.zeros(4, 3, *SIZE), image_sizes=images)  # torchvision's ImageList
    for valid in (valid_of(images, "cpu").long(), image_list, shapes.valid_pixels(images, SIZE)):
        assert torch.equal(criterion(student, teacher, valid=valid), expected)
    everything = torch.ones(4, *SIZE, dtype=torch.bool)
    torch.testing.assert_close(criterion(student, teacher, valid=everything), criterion(student, teacher), rtol=1e-6, atol=0)
    assert not torch.isclose(expected, criterion(student, teacher))


def test_levels_see_the_nearest_pixel() -> None:
    valid = shapes.valid_pixels([(5, 7), (8, 8)], (8, 8))
    from maskd_triton._levels import valid_of_levels

    levels = [torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 3, 2)]
    found = [v.view(2, *x.shape[2:]) for v, x in zip(valid_of_levels(valid, levels), levels, strict=True)]
    assert found[0][0].tolist() == [[1, 1, 1, 1]] * 3 + [[0, 0, 0, 0]]  # rows 0 2 4 | 6, columns 0 2 4 6
    assert found[1][0].tolist() == [[1, 1], [1, 1], [0, 0]]  # rows 0 2 | 5, columns 0 4
    assert all(v[1].all() for v in found)


@pytest.mark.parametrize("impl", ["eager"])
def test_attached_learner(impl: str) -> None:
    """``valid=`` reads the teacher's arguments at every call and reaches masks, statistics and diagnostics."""

    class Padded(nn.Sequential):
        def forward(self, images: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
            return super().forward(images)

    torch.manual_seed(0)
    teacher = Padded(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 1)).double()
    learner = MaskLearner(5, 3, standardize=True, impl=impl).double()
    images, valid = torch.randn(4, 3, *SIZE, dtype=torch.float64), valid_of(IMAGES, "cpu")
    with learner.calibrate(teacher, "0", valid=lambda images, pixel_mask: pixel_mask):
        teacher(images, valid)
        teacher(images[:, :, :, :8], pixel_mask=~valid[:, :, :8])
    x = teacher[0](images).detach()
    pixels = torch.cat([x.transpose(0, 1)[:, valid], x[..., :8].transpose(0, 1)[:, ~valid[:, :, :8]]], 1)
    module = learner.mask_modules[0]
    assert module.pixels_seen == pixels.shape[1]
    torch.testing.assert_close(module.channel_mean, pixels.mean(1), rtol=1e-12, atol=1e-14)
    with learner.attach(teacher, "0", valid="pixel_mask"):
        teacher(images, valid)
        found = learner.dice_loss()
    m = module.masks(x) * valid[:, None]
    torch.testing.assert_close(found, F.dice_loss(m), rtol=1e-12, atol=0)
    level = learner.diagnostics()[0]
    torch.testing.assert_close(level.coverage, m.sum((0, 2, 3)) / valid.sum(), rtol=1e-12, atol=0)
    with learner.attach(teacher, "0", valid="pixel_mask"):
        teacher(images)
        torch.testing.assert_close(learner.dice_loss(), F.dice_loss(module.masks(x)), rtol=1e-12, atol=0)


X = torch.zeros(2, 4, 2, 2)
ERRORS = [
    (
        torch.ones(2, 4, 4),
        TypeError,
        "valid: expected a bool or integer tensor, non-zero where pixels are valid, got torch.float32",
    ),
    (torch.ones(3, 4, 4).bool(), ValueError, "valid: expected shape [2, H0, W0], that of the padded images, got [3, 4, 4]"),
    (
        torch.ones(2, 1, 4, 4).bool(),
        ValueError,
        "valid: expected shape [2, H0, W0], that of the padded images, got [2, 1, 4, 4]",
    ),
    ([(4, 4), (4, 4)], TypeError, "valid: expected a bool tensor [N, H0, W0], or images with .tensors and .image_sizes"),
    (torch.ones(2, 4, 4, device="meta").bool(), ValueError, "valid: expected the device of the features, cpu, got meta"),
]


@pytest.mark.parametrize(("valid", "error", "sentence"), ERRORS)
def test_errors(valid: Any, error: type[Exception], sentence: str) -> None:
    learner = MaskLearner(4, 3)
    with pytest.raises(error) as caught:
        F.masked_distill_loss(X, X, [torch.zeros(3, 4)], valid=valid)
    assert str(caught.value).startswith(sentence)
    with pytest.raises(error) as caught:
        learner(X, valid)
    assert str(caught.value).startswith(sentence)


def test_errors_of_sizes() -> None:
    with pytest.raises(ValueError, match=r"image_sizes\[1\]: expected at most \(4, 4\), got \(5, 4\)"):
        shapes.valid_pixels([(4, 4), (5, 4)], (4, 4))
    with pytest.raises(TypeError, match=r"image_sizes\[0\]: expected a pair"):
        shapes.valid_pixels([4], (4, 4))  # type: ignore[list-item]


NAN = float("nan")


def poisoned(x: Tensor, valid: Tensor, stride: int) -> Tensor:
    """``x`` with NaN and infinities where pixels do not count."""
    padding = ~valid[:, ::stride, ::stride]
    x = x.detach().clone()
    x[:, 0].masked_fill_(padding, float("inf"))
    x[:, 1:].masked_fill_(padding[:, None], NAN)
    return x


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "weight_mask", "standardize"),
    [(torch.float32, True, True), (torch.float32, False, False), (torch.float16, True, False), (torch.bfloat16, False, True)],
)
def test_padding_may_hold_anything(
    dtype: torch.dtype, weight_mask: bool, standardize: bool, layout: str, target: Target
) -> None:
    """Both stages give the same bits, whatever the padding of features and of upstream gradients holds, and 0 as gradient."""
    impl, device = target
    valid = valid_of(IMAGES, device)
    problem = problem_of(weight_mask, standardize, dtype)
    learner, criterion = problem.learner.to(device), problem.criterion(custom_mask_warmup=0, impl=impl).to(device).eval()
    learner.impl = impl
    upstream = [torch.randn(t.shape).to(dtype) for t in problem.teacher]
    clean = [[in_layout(x.to(device), layout) for x in xs] for xs in (problem.student, problem.teacher, upstream)]
    dirty = [[in_layout(poisoned(x, valid, s), layout) for x, s in zip(xs, STRIDES, strict=True)] for xs in clean]

    def distilled(maps: list[list[Tensor]]) -> list[Tensor]:
        student = [x.detach().requires_grad_() for x in maps[0]]
        loss = criterion(student, maps[1], valid=valid)
        return [loss, *torch.autograd.grad(loss, student)]

    def learned(maps: list[list[Tensor]]) -> list[Tensor]:
        features = [x.detach().requires_grad_() for x in maps[0]]
        masked = learner(features, valid)
        leaves = [*learner.parameters(), *features]
        return [
            *masked,
            *torch.autograd.grad([learner.dice_loss(), *masked], leaves, [torch.ones((), device=device), *maps[2]]),
        ]

    for run, last in ((distilled, 2), (learned, 2)):
        expected, found = run(clean), run(dirty)
        for e, f in zip(expected, found, strict=True):
            assert e.isfinite().all()
            assert torch.equal(e, f)
        for gradient, s in zip(found[-last:], STRIDES, strict=True):
            assert not gradient[~valid[:, None, ::s, ::s].expand_as(gradient)].any()


def test_nan_in_valid_pixels_propagates(target: Target) -> None:
    torch.manual_seed(0)
    impl, device = target
    criterion = MaskedDistillLoss(4, 3, pretrained=MaskLearner(4, 3), impl=impl).to(device)
    student = torch.randn(2, 4, 3, 4, device=device)
    student[1, 2, 0, 0] = NAN
    student.requires_grad_()
    valid = torch.ones(2, 3, 4, dtype=torch.bool, device=device)
    loss = criterion(student, torch.randn(2, 4, 3, 4, device=device), valid=valid)
    loss.backward()
    assert loss.isnan()
    assert student.grad[1, 2, 0, 0].isnan()


@pytest.mark.parametrize("resize", [None, "student", "teacher"])
def test_padding_before_align_and_resize(resize: str | None, target: Target) -> None:
    """Neither the align convolution's gradient nor an interpolated neighbour sees what the padding holds."""
    torch.manual_seed(0)
    impl, device = target
    criterion = MaskedDistillLoss(4, 3, student_channels=2, pretrained=MaskLearner(4, 3), resize=resize, impl=impl).to(device)
    valid = valid_of(IMAGES, device)
    student, teacher = torch.randn(4, 2, 8, 16, device=device), torch.randn(4, 4, 8, 16, device=device)
    stride = 1 if resize is None else 2
    if resize == "teacher":
        teacher = torch.randn(4, 4, 4, 8, device=device)
    elif resize == "student":
        student = torch.randn(4, 2, 4, 8, device=device)
    student = poisoned(student, valid, stride if resize == "student" else 1).requires_grad_()
    loss = criterion(student, poisoned(teacher, valid, stride if resize == "teacher" else 1), valid=valid)
    loss.backward()
    for value in (loss, student.grad, *(p.grad for p in criterion.align.parameters())):
        assert value.isfinite().all()
