"""What ``test_teacher.py`` runs, and mypy checks: where a model is taken, what torch.compile makes of it is taken, too."""

import torch
from torch import Tensor, nn

from maskd_triton import FrozenTeacher, MaskLearner
from maskd_triton.capture import FeatureCapture, call


def main(images: Tensor) -> Tensor:
    """A level of the student and one of the teacher, one after the other."""
    student, net = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()) for _ in range(2))
    teacher = FrozenTeacher(torch.compile(net, backend="eager"))
    teacher.model = torch.compile(net, backend="eager")
    with FeatureCapture(torch.compile(student, backend="eager"), teacher, "0") as features:
        student(images)
        teacher(images)
        students, teachers = features.take()
    _, levels = call(torch.compile(net, backend="eager"), "0", images)
    with MaskLearner(4).attach(torch.compile(net, backend="eager"), "0") as learner:
        net(images)
        learner.dice_loss().backward()
    assert torch.equal(levels[0], teachers[0])
    return torch.cat([students[0], teachers[0]])
