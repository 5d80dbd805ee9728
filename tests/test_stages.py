"""Checkpoints in the middle of the warm-up, accumulated gradients, a teacher that is in nobody's state dict."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.recipes.plain import Distillation, build
from examples.recipes.tiny import Segmenter, batches
from maskd_triton import FrozenTeacher, MaskedDistillLoss, MaskLearner
from tests.helpers import SEED


def trainer(seed: int) -> tuple[Distillation, torch.optim.Optimizer]:
    model = build(seed)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def step(model: Distillation, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
    ((images, labels),) = batches(1, seed=number)
    loss = model(images, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("at", [2, 3, 4])  # masks follow the student from the fourth call on
def test_resumed_run_is_bitwise_the_same(at: int, tmp_path: Path) -> None:
    model, optimizer = trainer(0)
    for i in range(at):
        step(model, optimizer, i)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    resumed, other = trainer(1)
    resumed.teacher = FrozenTeacher(copy.deepcopy(model.teacher.model))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    assert int(resumed.criterion.warmup_step) == at
    for i in range(at, at + 3):
        assert torch.equal(step(model, optimizer, i), step(resumed, other, i))
    for (name, a), b in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_accumulated_gradients_advance_once() -> None:
    """Two halves of a batch with one step of the warm-up give the loss and gradient of the whole, before and after it."""
    torch.manual_seed(SEED)
    learner = MaskLearner([6], 3)
    whole, halves = (MaskedDistillLoss(6, 3, custom_mask_warmup=2, pretrained=learner).double() for _ in range(2))
    for i in range(4):
        teacher, student = torch.randn(4, 6, 5, 5).double(), torch.randn(4, 6, 5, 5).double().requires_grad_()
        (expected,) = torch.autograd.grad(whole(student, teacher), student)
        found = torch.zeros_like(student)
        for part, last in ((slice(0, 2), False), (slice(2, 4), True)):
            loss = halves(student[part], teacher[part], advance=last) / 2
            found += torch.autograd.grad(loss, student)[0]
        assert int(halves.warmup_step) == i + 1
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-18)


def test_student_alone(tmp_path: Path) -> None:
    """Export in one line, loaded by the plain architecture."""
    model, optimizer = trainer(0)
    step(model, optimizer, 0)
    torch.save(model.student.state_dict(), tmp_path / "student.pt")
    student = Segmenter(8)
    student.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))
    ((images, _),) = batches(1)
    assert torch.equal(student.eval()(images)[0], model.student.eval()(images)[0])
