"""Student, criterion and backward under torch.compile: one graph, whatever the image size and on both sides of the warm-up."""

import copy
from typing import Any

import pytest
import torch
from problems import Target, trained
from torch import Tensor, nn

from examples.recipes.plain import Distillation
from examples.recipes.tiny import Segmenter
from maskd_triton import MaskedDistillLoss, capture

pytestmark = pytest.mark.filterwarnings("ignore:student")  # some tests look at the loss alone
SIZES = [(64 + 8 * i, 96 + 16 * ((7 * i) % 11)) for i in range(20)]


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def pair(**options: Any) -> tuple[MaskedDistillLoss, list[Tensor], list[Tensor]]:
    """A criterion, and levels for it whose sizes differ from channels: torch gives equal numbers one symbol."""
    criterion = MaskedDistillLoss([7, 5], 3, pretrained=trained([7, 5], 3), **options)
    shapes = [(2, 7, 8, 12), (2, 5, 4, 6)]
    return criterion, [torch.randn(shape) for shape in shapes], [torch.randn(shape) for shape in shapes]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


@pytest.mark.slow
def test_one_graph_for_twenty_sizes(target: Target) -> None:
    impl, device = target
    padded = impl == "triton"
    torch.manual_seed(0)
    student, teacher = Segmenter(6), Segmenter(10)
    criterion = MaskedDistillLoss(
        teacher.channels, 3, student_channels=student.channels, custom_mask_warmup=10, pretrained=trained(teacher.channels, 3)
    )
    eager = Distillation(student, teacher, criterion).to(device).eval()  # no running statistics: both see the same
    compiled = copy.deepcopy(eager)
    compiled.criterion.impl = impl
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


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"distance": "cosine", "resize": "teacher"}], ids=["", "cosine resized"])
def test_one_graph_with_static_sizes(options: dict[str, Any], target: Target) -> None:
    """Mappings, too, and across the warm-up; another state dict is seen."""
    impl, device = target
    criterion, student, teacher = pair(custom_mask_warmup=2, impl=impl, **options)
    criterion.to(device)
    twin, results = copy.deepcopy(criterion), []
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for module, function in ((criterion, criterion), (twin, compiled)):
        found = []
        for step in range(4):
            levels = {i: x.to(device).requires_grad_() for i, x in reversed(list(enumerate(student)))}
            loss = function(levels, dict(enumerate(x.to(device) for x in teacher)), reduction="none")
            found += [loss.detach(), *torch.autograd.grad(loss.sum(), list(levels.values()))]
            if step == 2:
                other = MaskedDistillLoss([7, 5], 3, pretrained=trained([7, 5], 3, seed=1))
                module.mask_modules.load_state_dict(other.mask_modules.state_dict())
        results.append(found)
        assert int(module.warmup_step) == 4
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    assert graphs() == 1


def two_layers(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.Conv2d(width, 2 * width, 1))


@pytest.mark.slow
def test_features_captured_under_inductor() -> None:
    """The default backend; features taken from modules by ``capture.call`` inside of what is compiled. No more layers than
    features: most of the time goes into compiling what is not ours."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    teacher = two_layers(5).requires_grad_(False).to(device)
    criterion = MaskedDistillLoss([5, 10], 3, student_channels=[3, 6], custom_mask_warmup=10, pretrained=trained([5, 10], 3))
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


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_schedule_of_the_loss_weight(kind: Any) -> None:
    """Twelve values, the loss of each: a graph for the first float and one for any other, a single one for tensors."""
    criterion, student, teacher = pair()
    compiled, one = torch.compile(criterion, backend="aot_eager", fullgraph=True), criterion(student, teacher)
    for step in range(12):
        criterion.loss_weight = kind(1.0 - step / 20)
        torch.testing.assert_close(compiled(student, teacher), one * (1.0 - step / 20))
    assert graphs() <= (2 if kind is float else 1)


def test_nothing_is_kept_of_a_compiled_call() -> None:
    """Diagnostics are not those of an earlier call."""
    criterion, student, teacher = pair()
    criterion(student, teacher)
    torch.compile(criterion, fullgraph=True, backend="aot_eager")(student, teacher)
    with pytest.raises(RuntimeError, match="diagnostics: no call to look at"):
        criterion.diagnostics()
