"""Tokens, NHWC and packed scales: views with the right values, losses and gradients that equal those of [N, C, H, W]."""

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
