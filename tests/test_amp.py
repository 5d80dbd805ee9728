"""Autocast and GradScaler: no dtype crash, a float32 loss."""

import pytest
import torch
from torch import nn

from maskd_triton import MaskedDistillLoss, MaskLearner
from tests.helpers import SEED
from tests.problems import Target


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_align_under_autocast(dtype: torch.dtype, target: Target) -> None:
    """Convolutions of the student give half features, the criterion's float32 align convolution takes them."""
    impl, device = target
    torch.manual_seed(SEED)
    backbone = nn.Conv2d(3, 5, 3, padding=1).to(device)
    learner = MaskLearner(8, 3)
    criterion = MaskedDistillLoss(8, 3, student_channels=5, custom_mask_warmup=0, pretrained=learner, impl=impl).to(device)
    images, teacher = torch.randn(2, 3, 6, 7, device=device), torch.randn(2, 8, 6, 7, device=device)
    with torch.autocast(device, dtype):
        features = backbone(images)
        inside = criterion(features, teacher.to(dtype))
    assert features.dtype == dtype
    outside = criterion(features, teacher.to(dtype))
    assert inside.dtype == outside.dtype == torch.float32
    assert torch.equal(inside, outside)
    inside.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in backbone.parameters())
    assert criterion.align is not None
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in criterion.align.parameters())
    conv = criterion.align[0]
    aligned = nn.functional.conv2d(features.detach().double(), conv.weight.double(), conv.bias.double())  # type: ignore
    twin = MaskedDistillLoss(8, 3, custom_mask_warmup=0, pretrained=learner).to(device).double()
    expected = twin(aligned, teacher.to(dtype).double())
    assert (outside.double() - expected).abs() <= expected * torch.finfo(dtype).eps * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_steps_equal_unscaled(dtype: torch.dtype, target: Target) -> None:
    """GradScaler: a scale of 65536 on the loss and back, overflow found in the student's gradient and the step skipped."""
    impl, device = target
    torch.manual_seed(SEED)
    learner = MaskLearner(4, 3)
    results = []
    for scale in (1.0, 2.0**16):
        torch.manual_seed(SEED + 1)
        student = nn.Conv2d(3, 4, 1).to(device)
        criterion = MaskedDistillLoss(4, 3, custom_mask_warmup=1, pretrained=learner, impl=impl).to(device)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device, init_scale=scale, growth_interval=1000)
        for _ in range(3):
            images, teacher = torch.randn(2, 3, 5, 5, device=device), torch.randn(2, 4, 5, 5, device=device)
            with torch.autocast(device, dtype):
                loss = criterion(student(images), teacher)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(student.weight.detach().clone())
        assert scaler.get_scale() == scale
    torch.testing.assert_close(results[1], results[0], rtol=0.02, atol=0.002)  # half gradients: 3 steps of lr 0.1
