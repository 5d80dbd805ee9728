"""``align`` is called as the module that it is: adapters, hooks, pruning, projectors of one's own, in every dtype."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from problems import trained
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from maskd_triton import MaskedDistillLoss

LEARNER = trained([8, 6], 3)
NARROW, WIDE = [4, 5], [8, 6]
pytestmark = pytest.mark.filterwarnings("ignore:student")  # most tests look at the loss alone


def criterion_of(**options: Any) -> MaskedDistillLoss:
    torch.manual_seed(0)
    return MaskedDistillLoss(WIDE, 3, pretrained=LEARNER, **options)


def features(channels: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(channels))
    return [torch.randn(2, c, 5 - i, 6, generator=generator).to(dtype) for i, c in enumerate(channels)]


def mlp(c: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, out, 3, padding=1))


class LoRA(nn.Module):
    """An adapter that has the weights of what it wraps, as peft's."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.down, self.up = nn.Conv2d(base.in_channels, 2, 1), nn.Conv2d(2, base.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


BUILDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "mlp": mlp,
    "without_bias": lambda c, out: nn.Conv2d(c, out, 1, bias=False),
    "lora": lambda c, out: LoRA(nn.Conv2d(c, out, 1)),
    "weight_norm": lambda c, out: parametrizations.weight_norm(nn.Conv2d(c, out, 1)),
    "pruned": lambda c, out: prune.l1_unstructured(nn.Conv2d(c, out, 1), "weight", 0.5),
    "compiled": lambda c, out: torch.compile(nn.Conv2d(c, out, 1), backend="eager"),
}


@pytest.mark.parametrize("how", ["given", "replaced"])
@pytest.mark.parametrize(
    "build", [pytest.param(BUILDERS[kind], id=kind, marks=[pytest.mark.slow] * (kind == "compiled")) for kind in BUILDERS]
)
def test_modules_of_ones_own(build: Callable[[int, int], nn.Module], how: str) -> None:
    """The loss and the modules' gradients are those of features that went through them before."""
    torch.manual_seed(1)
    modules = nn.ModuleList(build(c, out) for c, out in zip(NARROW, WIDE, strict=True)).eval()
    if how == "given":
        criterion = criterion_of(align=list(modules))
    else:
        criterion = criterion_of(student_channels=NARROW)
        for i, module in enumerate(modules):
            criterion.align[i] = module
    student, teacher = features(NARROW), features(WIDE)
    want = criterion_of()([module(s) for module, s in zip(modules, student, strict=True)], teacher)
    parameters = [p for p in modules.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(want, parameters)
    loss = criterion(student, teacher)
    assert torch.equal(loss, want)
    assert all(map(torch.equal, torch.autograd.grad(loss, parameters), gradients))
    assert {id(p) for p in parameters} <= {id(p) for p in criterion.parameters()}


def test_hooks_run() -> None:
    criterion, calls = criterion_of(student_channels=NARROW), []
    criterion.align[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    criterion.align[1].register_forward_hook(lambda module, inputs, output: calls.append("after") or output * 0)
    loss = criterion(features(NARROW), features(WIDE))
    assert calls == ["before", "after"]
    assert not torch.equal(loss, criterion_of(student_channels=NARROW)(features(NARROW), features(WIDE)))


def test_shared_lazy_and_none() -> None:
    shared = nn.Conv2d(4, 8, 1)
    both = MaskedDistillLoss([8, 8], 3, align=[shared, shared], pretrained=trained([8, 8], 3))
    assert [name for name, _ in both.named_parameters()] == ["align.0.weight", "align.0.bias"]
    both(features([4, 4]), features([8, 8])).backward()
    lazy = criterion_of(align=[nn.LazyConv2d(c, 1) for c in WIDE])
    lazy(features(NARROW), features(WIDE)).backward()
    assert [module.in_channels for module in lazy.align] == NARROW
    lazy.align = None
    assert lazy(features(WIDE), features(WIDE)) == 0


@pytest.mark.parametrize("ambient", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype: torch.dtype, ambient: torch.dtype | None) -> None:
    """Half features are aligned in their dtype by float32 parameters, whether they left the autocast region or not; others as
    the caller's region has it."""
    criterion = criterion_of(student_channels=NARROW)
    if dtype == torch.float64:
        criterion.double()
    student, teacher = features(NARROW, dtype), features(WIDE, dtype)
    with nullcontext() if ambient is None or dtype.itemsize == 2 else torch.autocast("cpu", ambient):
        pairs = zip(student, criterion.align, strict=True)
        aligned = [nn.functional.conv2d(s, conv.weight.to(dtype), conv.bias.to(dtype)) for s, conv in pairs]
    want = criterion_of()(aligned, teacher)
    with nullcontext() if ambient is None else torch.autocast("cpu", ambient):
        loss = criterion(student, teacher)
    assert torch.equal(loss, want)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in criterion.align.parameters())


def test_a_cast_align() -> None:
    criterion = criterion_of(student_channels=NARROW).bfloat16()
    assert criterion(features(NARROW, torch.bfloat16), features(WIDE, torch.bfloat16)).isfinite()
    with pytest.raises(TypeError, match=r"align\[0\]: its parameters are torch.bfloat16, the student's features torch.float32"):
        criterion(features(NARROW), features(WIDE))
    with torch.autocast("cpu", torch.bfloat16):
        assert criterion(features(NARROW), features(WIDE)).isfinite()
