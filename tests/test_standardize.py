"""Statistics of standardised features: gathered, saved, told apart. ``test_numbers.py`` has what they are used for."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import default_dtype
from problems import Problem, Shape, Target, close, normal
from torch import Tensor, nn

from maskd_triton import MaskedDistillLoss, MaskLearner


def standard(shapes: list[Shape], num_tokens: int) -> Problem:
    return Problem(shapes, num_tokens, dtype=torch.float32, standardize=True)


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.neck = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(x))


def test_calibrate_gathers_the_statistics_of_all_batches() -> None:
    torch.manual_seed(0)
    teacher, learner = Teacher().train(), MaskLearner(4, standardize=True)
    teacher.neck[0].weight.data[2] = 0  # a channel that never moves
    kept = copy.deepcopy(teacher.state_dict())
    batches = [torch.randn(n, 3, 4, 5) * (n + 1) for n in (1, 5, 2)]
    with learner.calibrate(teacher, "neck"):
        for images in batches:
            scores = teacher(images)
    assert not scores.requires_grad
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, kept[k]) for k, v in teacher.state_dict().items())
    seen = torch.cat([teacher.eval().neck(images) for images in batches]).double()
    variance, mean = torch.var_mean(seen, (0, 2, 3), correction=0)
    module = learner.mask_modules[0]
    close(module.channel_mean, mean.detach(), 1e-6)
    close(module.channel_std, (variance + 1e-5 * variance.mean()).sqrt().detach(), 1e-6)
    assert module.pixels_seen.item() == 8 * 20


def test_means_far_from_zero_keep_their_deviation() -> None:
    teacher, learner = nn.Sequential(nn.Identity()), MaskLearner(4, standardize=True)
    x = normal(64, 4, 4, 4) * 1e-2 + 100
    with learner.calibrate(teacher, "0"):
        for part in x.split(7):
            teacher(part)
    # sums of squares would leave nothing of a variance of 1e-4 beside 1e4 in float32
    close(learner.mask_modules[0].channel_std, x.double().std((0, 2, 3), correction=0), 1e-4)


def test_calibrate_errors_name_what_is_wrong() -> None:
    teacher, plain = nn.Sequential(nn.Identity()), MaskLearner(2)
    with pytest.raises(RuntimeError, match="standardize=False"), plain.calibrate(teacher, "0"):
        pass
    learner = MaskLearner(2, standardize=True)
    for images, wrong in (
        (None, "calibrate: level 0: no features seen"),
        (torch.zeros(0, 2, 3, 3), "calibrate: level 0: no features seen"),
        (torch.ones(2, 2, 3, 3), "calibrate: level 0: features that are the same in every pixel"),
        (torch.full((2, 2, 3, 3), torch.nan), "calibrate: level 0: features that are not finite"),
    ):
        with pytest.raises(RuntimeError, match=wrong), learner.calibrate(teacher, "0"):
            images is None or teacher(images)
    named = pytest.raises(AttributeError, match="calibrate: the teacher Sequential has no module 'neck'")
    with named, learner.calibrate(teacher, "neck"):
        pass
    with pytest.raises(ValueError, match="expected 2 channels, got 3"), learner.calibrate(teacher, "0"):
        teacher(torch.ones(2, 3, 3, 3))
    with pytest.raises(RuntimeError, match="attach: standardize=True, but no statistics yet"), learner.attach(teacher, "0"):
        pass
    with learner.calibrate(teacher, "0"):
        teacher(normal(2, 2, 3, 3))
    kept = copy.deepcopy(learner.state_dict())
    with pytest.raises(ZeroDivisionError), learner.calibrate(teacher, "0"):
        teacher(normal(2, 2, 3, 3) * 5) / (1 / 0)
    assert all(torch.equal(v, kept[k]) for k, v in learner.state_dict().items())
    with learner.attach(teacher, "0"):
        teacher(normal(2, 2, 3, 3))


# --- one scale for all channels ---------------------------------------------------------------------------------------


def gathered(kind: str, x: Tensor, tmp_path: Path | None = None, rotation: Tensor | None = None) -> MaskLearner:
    """Calibrated on ``x``; tokens and mask weights are those of seed 0, in rotated channels if a rotation is given."""
    torch.manual_seed(0)
    learner = MaskLearner(x.shape[1], 3, standardize=kind).double()
    teacher = nn.Identity()
    with learner.calibrate(teacher, ""):
        teacher(x)
    with torch.no_grad():
        (module,) = learner.mask_modules
        module.mask_token.normal_()
        if rotation is not None:  # tokens and the convolution's inputs of R x instead of x
            module.mask_token.copy_(module.mask_token @ rotation.T)
            module.prob[0].weight.copy_(torch.einsum("dc,ochw->odhw", rotation, module.prob[0].weight))
    return learner


def test_isotropic_statistics() -> None:
    x = Problem([(3, 5, 6, 7)], 3, standardize=True).teacher[0]
    (module,) = gathered("isotropic", x).mask_modules
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    torch.testing.assert_close(module.channel_mean, mean)
    torch.testing.assert_close(module.channel_std, variance.mean().sqrt().expand(5))
    assert gathered("isotropic", x).standardize == "isotropic"
    assert gathered("channel", x).standardize == MaskLearner(1, standardize=True).standardize == "channel"


@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_isotropic_is_phi_s(distance: str, target: Target) -> None:
    """A rotation of the teacher's channels, absorbed by tokens and a linear align, changes neither the loss nor gradients below
    the align."""
    impl, device = target
    x = Problem([(2, 6, 5, 4)], 3, standardize=True).teacher[0].to(device)
    rotation = torch.linalg.qr(normal(6, 6, seed=3).double())[0].to(device)
    narrow = normal(2, 4, 5, 4, seed=2).double().to(device)
    found = []
    for turn in (None, rotation):
        teacher = x if turn is None else torch.einsum("dc,nchw->ndhw", turn, x)
        with default_dtype(torch.float64):
            criterion = MaskedDistillLoss(
                6, 3, student_channels=4, standardize="isotropic", distance=distance, impl=impl, custom_mask=False,
                pretrained=gathered("isotropic", teacher.cpu(), rotation=None if turn is None else turn.cpu()),
            ).to(device)  # fmt: skip
        align = criterion.align[0]
        with torch.no_grad():
            align.weight.copy_(normal(6, 4, 1, 1, seed=4))
            align.bias.copy_(normal(6, seed=5))
            if turn is not None:
                align.weight.copy_(torch.einsum("dc,cihw->dihw", turn, align.weight))
                align.bias.copy_(turn @ align.bias)
        student = narrow.clone().requires_grad_()
        loss = criterion(student, teacher)
        loss.backward()
        found.append((loss.detach(), student.grad))
    (loss, grad), (turned, turned_grad) = found
    torch.testing.assert_close(turned, loss, rtol=1e-11, atol=0)
    torch.testing.assert_close(turned_grad, grad, rtol=1e-9, atol=1e-13)
