"""Tokens, NHWC and packed scales: views with the right values, losses and gradients that equal those of [N, C, H, W]; masks of boxes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from problems import normal, trained
from torch import Tensor

from maskd_triton import MaskedDistillLoss, shapes

SIZES = [(4, 6), (2, 3)]
TOKENS = torch.zeros(2, 24, 8)
BOX, CLASS = torch.tensor([[0, 0, 4, 4]]), torch.tensor([2])


def masks_of(boxes: Any, *classes: Any) -> list[Tensor]:
    return shapes.boxes_to_masks([boxes], (8, 8), [(2, 2)], *classes)


def tokens_of(*levels: Tensor) -> Tensor:
    return torch.cat([x.flatten(2).transpose(1, 2) for x in levels], 1)


FORMS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], list[Tensor]]]] = {
    "tokens": (lambda x, _: tokens_of(x), lambda x: [shapes.from_tokens(x, SIZES[0])]),
    "class_token": (
        lambda x, _: torch.cat([torch.full((2, 1, 8), torch.nan), tokens_of(x)], 1),
        lambda x: [shapes.from_tokens(x[:, 1:], SIZES[0])],
    ),
    "nhwc": (lambda x, _: x.permute(0, 2, 3, 1).contiguous(), lambda x: [shapes.from_nhwc(x)]),
    "packed": (tokens_of, lambda x: shapes.from_packed(x, SIZES)),
}


@pytest.mark.parametrize(("pack", "unpack"), FORMS.values(), ids=FORMS)
def test_views_with_equal_losses_and_gradients(
    pack: Callable[..., Tensor], unpack: Callable[[Tensor], list[Tensor]], target: tuple[str, str]
) -> None:
    impl, device = target
    student, teacher = ([normal(2, 8, *size, seed=i + 5 * side) for i, size in enumerate(SIZES)] for side in (0, 1))
    packed_s, packed_t = pack(*student).to(device).requires_grad_(), pack(*teacher).to(device)
    views = unpack(packed_t)
    levels = len(views)
    assert all(view.untyped_storage().data_ptr() == packed_t.untyped_storage().data_ptr() for view in views)
    assert all(torch.equal(view.cpu(), x) for view, x in zip(views, teacher, strict=False))
    criterion = MaskedDistillLoss([8] * levels, 3, custom_mask_warmup=0, pretrained=trained([8] * levels, 3), impl=impl)
    criterion.to(device)(unpack(packed_s), views).backward()
    plain = [x.to(device).requires_grad_() for x in student]
    criterion(plain[:levels], [x.to(device) for x in teacher[:levels]]).backward()
    for got, want in zip(unpack(packed_s.grad), plain, strict=False):
        torch.testing.assert_close(got, want.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: shapes.from_tokens(TOKENS, (5, 5)), ValueError, "x: expected tokens [N, 25, C] for a grid of 5x5, got shape"),
        (lambda: shapes.from_tokens(TOKENS[0], (4, 6)), ValueError, "got shape [24, 8]"),
        (lambda: shapes.from_tokens(TOKENS, (4, 6.0)), TypeError, "size: expected a pair (H, W) of ints, got (4, 6.0)"),
        (lambda: shapes.from_tokens(TOKENS, (-4, -6)), ValueError, "expected a pair (H, W) of positive ints, got (-4, -6)"),
        (lambda: shapes.from_nhwc(TOKENS), ValueError, "x: expected features [N, H, W, C], got shape [2, 24, 8]"),
        (lambda: shapes.from_packed(TOKENS, [(4, 4), (2, 3)]), ValueError, "x: expected tokens [N, 22, C] for levels [(4, 4)"),
        (lambda: shapes.from_packed(TOKENS, [(4, 6, 1)]), TypeError, "sizes[0]: expected a pair (H, W) of ints, got (4, 6, 1)"),
        (lambda: shapes.valid_pixels([2, 3], (4, 4)), TypeError, "image_sizes[0]: expected a pair (H, W) of ints, got 2"),
        (lambda: shapes.valid_pixels(np.array([[2.0, 3.0]]), (4, 4)), TypeError, "image_sizes[0]: expected a pair (H, W) of"),
        (lambda: shapes.valid_pixels([(5, 3)], (4, 4)), ValueError, "image_sizes[0]: expected at most (4, 4), got (5, 3)"),
        (lambda: masks_of([[0, 0, 1, 1]]), TypeError, "boxes[0]: expected a tensor [k, 4], got list"),
        (lambda: masks_of(torch.zeros(4)), ValueError, "boxes[0]: expected [k, 4] (x0, y0, x1, y1), got shape [4]"),
        (lambda: masks_of(torch.zeros(0)), ValueError, "boxes[0]: expected [k, 4] (x0, y0, x1, y1), got shape [0]"),
        (lambda: shapes.boxes_to_masks([BOX], 8, [(2, 2)]), TypeError, "image_size: expected a pair (H, W) of ints, got 8"),
        (
            lambda: shapes.boxes_to_masks([BOX], (8, 8), (2, 2)),
            TypeError,
            "level_sizes[0]: expected a pair (H, W) of ints, got 2",
        ),
        (lambda: masks_of(BOX, [CLASS - 9]), ValueError, "classes[0]: expected classes from 0"),
        (lambda: masks_of(BOX, None, 3), ValueError, "num_classes: expected None without classes"),
        (lambda: masks_of(BOX, [CLASS], 3.0), TypeError, "num_classes: expected a positive int, got 3.0"),
        (lambda: masks_of(BOX, [CLASS] * 2, 3), ValueError, "classes: expected a tensor for each of the 1 images, got 2"),
        (lambda: masks_of(BOX, [[2]], 3), TypeError, "classes[0]: expected an int tensor [1], got list"),
        (
            lambda: masks_of(BOX, [CLASS.float()], 3),
            ValueError,
            "classes[0]: expected ints [1], got torch.float32 of shape [1]",
        ),
        (
            lambda: masks_of(BOX, [CLASS[:, None]], 3),
            ValueError,
            "classes[0]: expected ints [1], got torch.int64 of shape [1, 1]",
        ),
        (lambda: masks_of(BOX, [CLASS], 2), ValueError, "classes[0]: expected classes from 0 to 1, got [2]"),
        (lambda: masks_of(BOX, [-CLASS], 3), ValueError, "classes[0]: expected classes from 0 to 2, got [-2]"),
    ],
)
def test_errors(call: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert sentence in str(caught.value)


SIZE_FORMS: list[Callable[[list[tuple[int, int]]], Any]] = [
    lambda sizes: [tuple(np.array(size)) for size in sizes],
    lambda sizes: [list(size) for size in sizes],
    lambda sizes: [torch.tensor(size) for size in sizes],
    np.array,
    torch.tensor,
]


@pytest.mark.parametrize("form", SIZE_FORMS)
def test_sizes_of_other_kinds(form: Callable[[list[tuple[int, int]]], Any]) -> None:
    images = [(2, 3), (4, 1)]
    want = torch.zeros(2, 4, 4, dtype=torch.bool)
    want[0, :2, :3], want[1, :4, :1] = True, True
    assert torch.equal(shapes.valid_pixels(form(images), form([(4, 4)])[0]), want)
    assert [x.shape[2:] for x in shapes.from_packed(TOKENS, form([(4, 5), (2, 2)]))] == [(4, 5), (2, 2)]
    assert shapes.from_tokens(TOKENS, form([(4, 6)])[0]).shape == (2, 8, 4, 6)
    criterion, x = MaskedDistillLoss(8, 3, pretrained=trained([8], 3)).eval(), torch.zeros(2, 8, 4, 4)
    image_list = SimpleNamespace(tensors=torch.zeros(2, 3, 4, 4), image_sizes=form(images))
    student = normal(2, 8, 4, 4).requires_grad_()
    assert torch.equal(criterion(student, x, valid=image_list), criterion(student, x, valid=want))


def slow_masks(boxes: list[Tensor], classes: list[Tensor], num_classes: int, image_size: Any, size: Any) -> Tensor:
    """Box by box and pixel by pixel, in float64."""
    masks = torch.zeros(len(boxes), num_classes, *size)
    for n, (found, own) in enumerate(zip(boxes, classes, strict=True)):
        for (x0, y0, x1, y1), label in zip(found.tolist(), own.tolist(), strict=True):
            for row, column in np.ndindex(*size):
                y, x = (row + 0.5) * image_size[0] / size[0], (column + 0.5) * image_size[1] / size[1]
                if x0 <= x < x1 and y0 <= y < y1:
                    masks[n, label, row, column] = 1
    return masks


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
def test_boxes_to_masks(dtype: torch.dtype, target: tuple[str, str]) -> None:
    """Three images, the second without boxes, sizes of levels that do not divide the image's."""
    device, image_size, sizes = target[1], (37, 50), [(10, 13), (5, 7), (1, 1)]
    generator = torch.Generator().manual_seed(0)
    corners = [60 * torch.rand(k, 4, generator=generator) - 5 for k in (5, 0, 9)]
    boxes = [x.to(dtype) for x in corners]  # also outside of the image, and with x1 < x0
    classes = [torch.randint(4, (len(x),), generator=generator) for x in boxes]
    on_device = [x.to(device) for x in boxes], image_size, sizes
    together = shapes.boxes_to_masks(*on_device)
    apart = shapes.boxes_to_masks(*on_device, [x.to(device) for x in classes], num_classes=4)
    for size, one, each in zip(sizes, together, apart, strict=True):
        want = slow_masks(boxes, classes, 4, image_size, size)
        assert each.dtype == one.dtype == torch.float32
        assert each.device.type == one.device.type == torch.device(device).type
        assert torch.equal(each.cpu(), want)
        assert torch.equal(one.cpu(), want.amax(1, keepdim=True))
    assert apart[0].any()
    assert not apart[0][1].any()
    known = shapes.boxes_to_masks(*on_device, [x.to(device) for x in classes])  # the batch has all four classes
    assert all(map(torch.equal, known, apart))
    none = shapes.boxes_to_masks([boxes[1]], image_size, sizes, [classes[1]])
    assert none[0].shape == (1, 1, *sizes[0])


def test_boxes_to_masks_edges() -> None:
    """Neighbouring boxes share no pixel; an empty batch has its shape; forms of sizes; what the criterion takes."""
    left, right = torch.tensor([[0.0, 0, 4, 8]]), torch.tensor([[4.0, 0, 8, 8]])
    (one,), (other,) = (shapes.boxes_to_masks([x], (8, 8), [(8, 8)]) for x in (left, right))
    assert torch.equal(one + other, torch.ones(1, 1, 8, 8))
    assert [x.shape for x in shapes.boxes_to_masks([], (8, 8), [(2, 3)], [], 5)] == [(0, 5, 2, 3)]
    for form in SIZE_FORMS:
        (image_size,), sizes = form([(8, 8)]), form([(4, 4), (2, 2)])
        assert [x.shape for x in shapes.boxes_to_masks([left] * 2, image_size, sizes)] == [(2, 1, 4, 4), (2, 1, 2, 2)]
    student, teacher = normal(2, 8, 4, 4, seed=0).requires_grad_(), normal(2, 8, 4, 4, seed=1)
    masks = shapes.boxes_to_masks([left] * 2, (8, 8), [(4, 4)])
    loss = MaskedDistillLoss(8, None, mask_power=1, eps=0)(student, teacher, masks=masks)
    torch.testing.assert_close(loss, (student - teacher)[..., :2].square().mean())
