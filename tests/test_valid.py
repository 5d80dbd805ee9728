"""The forms of ``valid=``, and padded batches of an attached teacher. ``test_numbers.py`` compares with images that are cut."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from maskd_triton import MaskLearner, shapes
from maskd_triton import functional as F
from tests.answers import criterion_of
from tests.cases import case_of
from tests.given import given_by

SIZE = (8, 12)
IMAGES = [(8, 12), (4, 8), (8, 4), (0, 0)]  # the last has no valid pixel


def valid_of(images: list[tuple[int, int]]) -> Tensor:
    return torch.tensor([[[y < h and x < w for x in range(SIZE[1])] for y in range(SIZE[0])] for h, w in images])


def test_forms() -> None:
    given = given_by(case_of(images=4, levels=((5, 4, 6), (3, 2, 3)), dtypes="fp32"))
    criterion = criterion_of(given, "eager").eval()
    images = [(8, 12), (4, 8), (8, 4), (2, 2)]
    want = criterion(given.student, given.teacher, valid=valid_of(images))
    image_list = SimpleNamespace(tensors=torch.zeros(4, 3, *SIZE), image_sizes=images)  # torchvision's ImageList
    for valid in (valid_of(images).long(), image_list, shapes.valid_pixels(images, SIZE)):
        assert torch.equal(criterion(given.student, given.teacher, valid=valid), want)
    whole = criterion(given.student, given.teacher)
    assert not torch.isclose(want, whole)
    every = criterion(given.student, given.teacher, valid=torch.ones(4, *SIZE, dtype=torch.bool))
    torch.testing.assert_close(every, whole, rtol=1e-6, atol=0)


def test_levels_see_the_nearest_pixel() -> None:
    """What lies in the others may be anything."""
    valid = shapes.valid_pixels([(5, 7), (8, 8)], (8, 8))
    seen = torch.tensor([[1, 1], [1, 1], [0, 0]])  # rows 0 2 | 5, columns 0 4
    masks = torch.rand(2, 1, 3, 2)
    s, t = (torch.rand(2, 4, 3, 2).masked_fill(torch.stack([seen == 0, seen < 0])[:, None], torch.nan) for _ in "st")
    loss = F.masked_distill_loss(s, t, masks=masks, valid=valid)
    cut = [
        F.masked_distill_loss(s[n : n + 1, :, :h], t[n : n + 1, :, :h], masks=masks[n : n + 1, :, :h])
        for n, h in enumerate((2, 3))
    ]
    torch.testing.assert_close(loss, sum(cut) / 2)


def test_attached_learner() -> None:
    """``valid=`` reads the teacher's arguments at every call and reaches masks, statistics and diagnostics."""

    class Padded(nn.Sequential):
        def forward(self, images: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
            return super().forward(images)

    torch.manual_seed(0)
    teacher = Padded(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 1)).double()
    learner = MaskLearner(5, 3, standardize=True, impl="eager").double()
    images, valid = torch.randn(4, 3, *SIZE, dtype=torch.float64), valid_of(IMAGES)
    with learner.calibrate(teacher, "0", valid=lambda images, pixel_mask: pixel_mask):
        teacher(images, valid)
        teacher(images[:, :, :, :8], pixel_mask=~valid[:, :, :8])
    x = teacher[0](images).detach()
    pixels = torch.cat([x.transpose(0, 1)[:, valid], x[..., :8].transpose(0, 1)[:, ~valid[:, :, :8]]], 1)
    module = learner.mask_modules[0]
    assert module.pixels_seen == pixels.shape[1]
    torch.testing.assert_close(module.channel_mean, pixels.mean(1), rtol=1e-12, atol=1e-14)
    with learner.attach(teacher, "0", valid=lambda images, pixel_mask=None: pixel_mask):
        teacher(images, valid)
        found = learner.dice_loss()
        m = module.masks(x) * valid[:, None]
        torch.testing.assert_close(found, F.dice_loss(m), rtol=1e-12, atol=0)
        torch.testing.assert_close(learner.diagnostics()[0].coverage, m.sum((0, 2, 3)) / valid.sum(), rtol=1e-12, atol=0)
        teacher(images)
        torch.testing.assert_close(learner.dice_loss(), F.dice_loss(module.masks(x)), rtol=1e-12, atol=0)
