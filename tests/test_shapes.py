"""Tokens, NHWC and packed scales: views with the right values, and losses and gradients that equal those of [N, C, H, W]."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from problems import trained
from torch import Tensor

from maskd_triton import MaskedDistillLoss, shapes
from maskd_triton._levels import valid_of_levels

SIZES = [(4, 6), (2, 3)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2).contiguous()


def criterion_of(impl: str, device: str, levels: int) -> MaskedDistillLoss:
    learner = trained([8] * levels, 3)
    return MaskedDistillLoss([8] * levels, 3, custom_mask_warmup=0, pretrained=learner, impl=impl).to(device).double()


@pytest.mark.parametrize("kind", ["tokens", "prefix", "nhwc", "packed"])
def test_views_with_equal_losses_and_gradients(kind: str, target: tuple[str, str]) -> None:
    impl, device = target
    plain = {
        side: [normal(2, 8, *size, seed=i + 5 * j).to(device) for i, size in enumerate(SIZES)] for j, side in enumerate("st")
    }
    if kind != "packed":
        plain = {side: levels[:1] for side, levels in plain.items()}

    def given(levels: list[Tensor]) -> Tensor:
        if kind == "nhwc":
            return levels[0].permute(0, 2, 3, 1).contiguous()
        tokens = [as_tokens(x) for x in levels]
        if kind == "prefix":
            tokens.insert(0, torch.full((2, 1, 8), torch.nan, dtype=torch.float64, device=device))
        return torch.cat(tokens, 1)

    def levels(x: Tensor) -> list[Tensor]:
        if kind == "packed":
            return shapes.from_packed(x, SIZES)
        if kind == "nhwc":
            return [shapes.from_nhwc(x)]
        return [shapes.from_tokens(x[:, 1:] if kind == "prefix" else x, SIZES[0])]

    criterion = criterion_of(impl, device, len(plain["s"]))
    expected_leaves = [x.clone().requires_grad_() for x in plain["s"]]
    expected = criterion(expected_leaves, plain["t"])
    expected.backward()
    student, teacher = given(plain["s"]).requires_grad_(), given(plain["t"])
    views = levels(teacher)
    assert all(v.untyped_storage().data_ptr() == teacher.untyped_storage().data_ptr() for v in views)
    assert all(torch.equal(v, x) for v, x in zip(views, plain["t"], strict=True))
    loss = criterion(levels(student), views)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradient = given([x.grad for x in expected_leaves]).nan_to_num()  # nothing for the prefix
    torch.testing.assert_close(student.grad, gradient, rtol=1e-12, atol=1e-15)


TOKENS = torch.zeros(2, 24, 8)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: shapes.from_tokens(TOKENS, (5, 5)),
            ValueError,
            "x: expected tokens [N, 25, C] for a grid of 5x5, got shape [2, 24, 8]",
        ),
        (lambda: shapes.from_tokens(TOKENS[0], (4, 6)), ValueError, "got shape [24, 8]"),
        (lambda: shapes.from_tokens(TOKENS, (4, 6.0)), TypeError, "size: expected a pair (H, W) of ints, got (4, 6.0)"),
        (
            lambda: shapes.from_tokens(TOKENS, (-4, -6)),
            ValueError,
            "size: expected a pair (H, W) of positive ints, got (-4, -6)",
        ),
        (lambda: shapes.from_nhwc(TOKENS), ValueError, "x: expected features [N, H, W, C], got shape [2, 24, 8]"),
        (
            lambda: shapes.from_packed(TOKENS, [(4, 4), (2, 3)]),
            ValueError,
            "x: expected tokens [N, 22, C] for levels [(4, 4), (2, 3)]",
        ),
        (
            lambda: shapes.from_packed(TOKENS, torch.tensor(4)),
            TypeError,
            "sizes: expected pairs (H, W) of ints, one per level, got Tensor",
        ),
        (
            lambda: shapes.valid_pixels([(2, True)], (4, 4)),
            TypeError,
            "image_sizes[0]: expected a pair (H, W) of ints, got (2, True)",
        ),
        (lambda: shapes.valid_pixels([2, 3], (4, 4)), TypeError, "image_sizes[0]: expected a pair (H, W) of ints, got 2"),
        (
            lambda: shapes.valid_pixels(np.array([[2.0, 3.0]]), (4, 4)),
            TypeError,
            "image_sizes[0]: expected a pair (H, W) of ints",
        ),
        (lambda: shapes.from_packed(TOKENS, [(4, 6, 1)]), TypeError, "sizes[0]: expected a pair (H, W) of ints, got (4, 6, 1)"),
    ],
)
def test_errors(call: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert sentence in str(caught.value)


SIZE_FORMS: list[Callable[[list[tuple[int, int]]], Any]] = [
    lambda sizes: [tuple(np.array(size)) for size in sizes],
    lambda sizes: [list(size) for size in sizes],
    lambda sizes: [torch.Size(size) for size in sizes],
    lambda sizes: [torch.tensor(size) for size in sizes],
    np.array,
    torch.tensor,
]


@pytest.mark.parametrize("form", SIZE_FORMS)
def test_sizes_of_other_kinds(form: Callable[[list[tuple[int, int]]], Any]) -> None:
    images = [(2, 3), (4, 1)]
    want = shapes.valid_pixels(images, (4, 4))
    assert torch.equal(shapes.valid_pixels(form(images), (4, 4)), want)
    assert torch.equal(shapes.valid_pixels(images, form([(4, 4)])[0]), want)
    image_list = SimpleNamespace(tensors=torch.zeros(2, 3, 4, 4), image_sizes=form(images))
    (found,) = valid_of_levels(image_list, [torch.zeros(2, 1, 4, 4)])
    assert torch.equal(found.view(2, 4, 4) != 0, want)
    levels = shapes.from_packed(TOKENS, form([(4, 5), (2, 2)]))
    assert [x.shape[2:] for x in levels] == [(4, 5), (2, 2)]
    assert shapes.from_tokens(TOKENS, form([(4, 6)])[0]).shape == (2, 8, 4, 6)
