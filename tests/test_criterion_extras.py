"""``resize=`` and ``criterion.diagnostics()``."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from problems import trained
from torch import Tensor
from torch.nn.functional import interpolate

from maskd_triton import MaskedDistillLoss, MaskLearner
from maskd_triton import functional as F
from maskd_triton.diagnostics import describe

Target = tuple[str, str]


@pytest.mark.parametrize("resize", ["student", "teacher"])
def test_resize(resize: str, target: Target) -> None:
    """Bilinear, only where sizes differ; the gradient goes through it."""
    impl, device = target
    options = {"custom_mask_warmup": 0, "pretrained": trained([4, 3], 3), "impl": impl}
    criterion, plain = (MaskedDistillLoss([4, 3], 3, **o).to(device).double() for o in (options | {"resize": resize}, options))
    sizes = [((5, 8), (9, 6)), ((4, 4), (4, 4))]
    student, teacher = (
        [torch.randn(2, c, *s[i], device=device).double() for c, s in zip((4, 3), sizes, strict=True)] for i in (0, 1)
    )
    student = [s.requires_grad_() for s in student]
    big = student[0] if resize == "teacher" else interpolate(student[0], (9, 6), mode="bilinear")
    small = teacher[0] if resize == "student" else interpolate(teacher[0], (5, 8), mode="bilinear")
    expected = plain([big, student[1]], [small, teacher[1]])
    found = criterion(student, teacher)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for g, e in zip(torch.autograd.grad(found, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-18)
    sentence = r"student\[0\]: expected the shape of teacher\[0\].*different sizes: give resize='student' or 'teacher'"
    with pytest.raises(ValueError, match=sentence):
        plain(student, teacher)


def test_wrong_resize() -> None:
    with pytest.raises(ValueError, match="resize: expected one of 'student', 'teacher', got 'both'"):
        MaskedDistillLoss(4, resize="both", pretrained=MaskLearner(4))


@pytest.mark.parametrize("weight_mask", [True, False])
@pytest.mark.parametrize("customised", [True, False])
def test_diagnostics(customised: bool, weight_mask: bool, target: Target) -> None:
    """What the masks and weights of the latest call were, and each level's share of the loss."""
    impl, device = target
    learner = trained([4, 3], 3, weight_mask).to(device)
    criterion = MaskedDistillLoss(
        [4, 3],
        3,
        weight_mask=weight_mask,
        custom_mask=customised,
        custom_mask_warmup=0,
        loss_weight=0.3,
        pretrained=learner,
        impl=impl,
    ).to(device)
    with pytest.raises(RuntimeError, match="diagnostics: no call to look at"):
        criterion.diagnostics()
    student, teacher = ({k: torch.randn(2, c, 5, 6, device=device) for k, c in (("p3", 4), ("p4", 3))} for _ in range(2))
    criterion({k: s * 2 for k, s in student.items()}, teacher)
    each = criterion(student, teacher, reduction="none")
    levels = criterion.diagnostics()
    assert list(levels) == ["p3", "p4"]
    for i, (name, level) in enumerate(levels.items()):
        module = learner.mask_modules[i]
        m = module.masks(teacher[name])
        if customised:
            m = m * F.receptive_masks(student[name], module.mask_token)
        expected = describe(m.detach(), module.weights(teacher[name]).detach() if weight_mask else None)
        torch.testing.assert_close(level.loss, each[i], rtol=1e-5, atol=0)
        for field in ("coverage", "dice", "weight", "entropy"):
            a, b = getattr(level, field), getattr(expected, field)
            assert (a is None) == (b is None) == (not weight_mask and field in ("weight", "entropy"))
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not level.loss.requires_grad


def test_diagnostics_keep_no_features() -> None:
    criterion = MaskedDistillLoss(4, 3, pretrained=MaskLearner(4, 3))

    def step() -> list[weakref.ref[Tensor]]:
        student, teacher = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8)
        criterion(student, teacher).backward()
        return [weakref.ref(student), weakref.ref(teacher)]

    seen = step()
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
    assert criterion.diagnostics()[0].loss > 0


def test_copies_have_seen_nothing() -> None:
    criterion = MaskedDistillLoss(4, 3, pretrained=MaskLearner(4, 3))
    criterion(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        with pytest.raises(RuntimeError, match="diagnostics: no call to look at"):
            twin.diagnostics()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    compiled(torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))
    with pytest.raises(RuntimeError, match="diagnostics: no call to look at"):  # not those of the call before
        criterion.diagnostics()


def test_diagnostics_of_an_empty_batch(target: Target) -> None:
    """NaN, as of every mean of nothing."""
    impl, device = target
    criterion = MaskedDistillLoss(4, 3, pretrained=MaskLearner(4, 3), impl=impl).to(device)
    empty = torch.zeros(0, 4, 8, 8, device=device)
    assert criterion(empty, empty) == 0
    assert criterion.diagnostics()[0].coverage.isnan().all()


@pytest.mark.parametrize("weighting", ["learned", "uniform", "given"])
def test_diagnostics_of_an_image_without_valid_pixels(weighting: str, target: Target) -> None:
    """With eps=0, as in detection: weights are those that the loss used, not 0 / 0."""
    impl, device = target
    learner = trained([4], 3, weighting == "learned").to(device)
    criterion = MaskedDistillLoss(4, 3, weight_mask=weighting == "learned", eps=0.0, pretrained=learner, impl=impl)
    criterion = criterion.to(device).eval()
    student, teacher = torch.randn(2, 4, 6, 6, device=device, requires_grad=True), torch.randn(2, 4, 6, 6, device=device)
    valid = torch.ones(2, 6, 6, dtype=torch.bool, device=device)
    valid[1] = False
    given = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.0, 0.9]], device=device)
    criterion(student, teacher, valid=valid, mask_weights=given if weighting == "given" else None)
    level = criterion.diagnostics()[0]
    if weighting == "uniform":
        assert level.weight is None
        assert level.entropy is None
        return
    assert level.weight.isfinite().all()
    assert level.entropy.isfinite()
    if weighting == "given":
        torch.testing.assert_close(level.weight, given.mean(0))
