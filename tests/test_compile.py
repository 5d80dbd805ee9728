"""Student, criterion and backward under torch.compile: one graph, whatever the image size and on both sides of the warm-up."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.recipes.plain import Distillation
from examples.recipes.tiny import Segmenter
from maskd_triton import MaskedDistillLoss, MaskLearner, capture
from maskd_triton import functional as F

Target = tuple[str, str]
SIZES = [(64 + 8 * i, 96 + 16 * ((7 * i) % 11)) for i in range(20)]


def build(impl: str, device: str, **options: Any) -> Distillation:
    torch.manual_seed(0)
    student, teacher = Segmenter(6), Segmenter(10)
    criterion = MaskedDistillLoss(
        teacher.channels, 3, student_channels=student.channels, custom_mask_warmup=10, impl=impl,
        pretrained=MaskLearner(teacher.channels, 3), **options,
    )  # fmt: skip
    return Distillation(student, teacher, criterion).to(device)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_one_graph_for_twenty_sizes(padded: bool, target: Target) -> None:
    impl, device = target
    eager, compiled = (build(i, device).eval() for i in ("eager", impl))  # no running statistics: both see the same
    for model in (eager, compiled):
        model.criterion.train()

    def loss(model: Distillation, images: Tensor, valid: Tensor | None) -> Tensor:
        scores, levels = model.student(images)
        _, targets = model.teacher(images)
        return scores.square().mean() + model.criterion(levels, targets, valid=valid)

    function = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    sizes = SIZES if impl == "eager" or device == "cuda" else [(16 + 2 * (i % 7), 24 + 2 * i) for i in range(20)]
    for h, w in sizes:
        images = torch.randn(2, 3, h, w, device=device)
        valid = torch.rand(2, h, w, device=device) > 0.3 if padded else None
        found, expected = (gradients(m, f(m, images, valid)) for m, f in ((compiled, function), (eager, loss)))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert graphs() == 1  # the warm-up ended at the eleventh call
    assert int(compiled.criterion.warmup_step) == 20


def two_layers(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.Conv2d(width, 2 * width, 1))


@pytest.mark.slow
def test_features_captured_under_inductor() -> None:
    """The default backend; features taken from modules by ``capture.call`` inside of what is compiled. No more layers than
    features: most of the time goes into compiling what is not ours."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    teacher, learner = two_layers(5).requires_grad_(False).to(device), MaskLearner([5, 10], 3)
    criterion = MaskedDistillLoss([5, 10], 3, student_channels=[3, 6], custom_mask_warmup=10, pretrained=learner)
    eager = nn.ModuleList([two_layers(3), criterion]).to(device)
    compiled = copy.deepcopy(eager)

    def loss(modules: nn.ModuleList, images: Tensor) -> Tensor:
        student, criterion = modules
        scores, features = capture.call(student, ["0", "1"], images)
        targets = capture.call(teacher, ["0", "1"], images)[1]
        return scores.square().mean() + criterion(features, targets)

    function = torch.compile(loss)
    for h, w in ((16, 24), (24, 40)):
        images = torch.randn(2, 3, h, w, device=device)
        found, expected = gradients(compiled, function(compiled, images)), gradients(eager, loss(eager, images))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_weight_schedule_is_outside_of_the_operator() -> None:
    """Twelve weights, two graphs: torch makes a float that changes an input of the graph."""
    student, teacher, tokens = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4), [torch.randn(6, 8)]

    def loss(weight: float) -> Tensor:
        return F.masked_distill_loss(student, teacher, tokens, loss_weight=weight)

    function, one = torch.compile(loss, fullgraph=True, backend="aot_eager"), loss(1.0)
    for step in range(12):
        torch.testing.assert_close(function(1.0 - step / 20), one * (1.0 - step / 20))
    assert graphs() <= 2
