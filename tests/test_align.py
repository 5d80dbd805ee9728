"""``align`` is called as the module that it is: adapters, hooks, pruning, projectors of one's own, in every dtype."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from maskd_triton import MaskedDistillLoss, MaskLearner

LEARNER = MaskLearner([8, 6], 3)
NARROW, WIDE = [4, 5], [8, 6]


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
    "padded": lambda c, out: nn.Conv2d(c, out, 3, padding=1),
    "norm": lambda c, out: nn.Sequential(nn.GroupNorm(1, c), nn.Conv2d(c, out, 1)),
    "lora": lambda c, out: LoRA(nn.Conv2d(c, out, 1)),
    "weight_norm": lambda c, out: parametrizations.weight_norm(nn.Conv2d(c, out, 1)),
    "spectral_norm": lambda c, out: parametrizations.spectral_norm(nn.Conv2d(c, out, 1)),
    "pruned": lambda c, out: prune.l1_unstructured(nn.Conv2d(c, out, 1), "weight", 0.5),
    "compiled": lambda c, out: torch.compile(nn.Conv2d(c, out, 1), backend="eager"),
}


@pytest.mark.parametrize("how", ["given", "replaced"])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_modules_of_ones_own(build: Callable[[int, int], nn.Module], how: str, target: tuple[str, str]) -> None:
    """The loss and the modules' gradients are those of features that went through them before."""
    impl, device = target
    torch.manual_seed(1)
    modules = nn.ModuleList(build(c, out) for c, out in zip(NARROW, WIDE, strict=True)).to(device).eval()
    if how == "given":
        criterion = criterion_of(align=list(modules), impl=impl).to(device)
    else:
        criterion = criterion_of(student_channels=NARROW, impl=impl).to(device)
        for i, module in enumerate(modules):
            criterion.align[i] = module
    plain = criterion_of(impl=impl).to(device)
    student, teacher = ([x.to(device) for x in features(channels)] for channels in (NARROW, WIDE))
    want = plain([module(s) for module, s in zip(modules, student, strict=True)], teacher)
    trained = [p for p in modules.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(want, trained)
    loss = criterion(student, teacher)
    assert torch.equal(loss, want)
    for got, gradient in zip(torch.autograd.grad(loss, trained), gradients, strict=True):
        assert torch.equal(got, gradient)
    assert {id(p) for p in trained} <= {id(p) for p in criterion.parameters()}


def test_hooks_run() -> None:
    criterion, calls = criterion_of(student_channels=NARROW), []
    criterion.align[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    criterion.align[1].register_forward_hook(lambda module, inputs, output: calls.append("after") or output * 0)
    loss = criterion(features(NARROW), features(WIDE))
    assert calls == ["before", "after"]
    assert not torch.equal(loss, criterion_of(student_channels=NARROW)(features(NARROW), features(WIDE)))


def test_one_module_for_one_level() -> None:
    learner = MaskLearner(8, 3)
    criterion = MaskedDistillLoss(8, 3, align=mlp(4, 8), pretrained=learner)
    assert criterion(features([4]), features([8])).requires_grad
    shared = nn.Conv2d(4, 8, 1)
    both = MaskedDistillLoss([8, 8], 3, align=[shared, shared], pretrained=MaskLearner([8, 8], 3))
    assert [name for name, _ in both.named_parameters()] == ["align.0.weight", "align.0.bias"]
    both(features([4, 4]), features([8, 8])).backward()


@pytest.mark.parametrize("ambient", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bits_of_the_default(dtype: torch.dtype, ambient: torch.dtype | None) -> None:
    """A convolution in the dtype of half features; float32 and float64 ones as the caller's region has it."""
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


def test_other_dtypes_get_a_sentence() -> None:
    criterion = criterion_of(student_channels=NARROW).bfloat16()
    assert criterion(features(NARROW, torch.bfloat16), features(WIDE, torch.bfloat16)).isfinite()
    sentence = r"align\[0\]: its parameters are torch.bfloat16, the student's features torch.float32; cast one of them"
    with pytest.raises(TypeError, match=sentence):
        criterion(features(NARROW), features(WIDE))
    with torch.autocast("cpu", torch.bfloat16):
        criterion(features(NARROW), features(WIDE))


def test_errors_of_a_module_are_its_own() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        criterion_of(align=[Broken(), Broken()])(features(NARROW), features(WIDE))


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: criterion_of(align=[nn.Identity()]), ValueError, "align: expected one module for each of the 2 levels, got 1"),
    (lambda: criterion_of(align=nn.Identity()), ValueError, "align: expected one module for each of the 2 levels, got 1"),
    (lambda: criterion_of(align=[nn.Identity(), torch.relu]), TypeError, "align[1]: expected an nn.Module, got"),
    (lambda: criterion_of(align=torch.relu), TypeError, "align: expected an nn.Module per level, got"),
    (lambda: criterion_of(align="conv"), TypeError, "align: expected an nn.Module per level, got str"),
    (lambda: criterion_of(align=[nn.Identity()] * 2, student_channels=4), ValueError, "align and student_channels: expected at most one"),
    (lambda: criterion_of(align=[nn.Conv2d(4, 8, 1), nn.Conv2d(5, 7, 1)])(features(NARROW), features(WIDE)), ValueError, "align[1]: expected an output [N, 6, H, W], got shape [2, 7, 4, 6]"),
    (lambda: criterion_of(align=[nn.Flatten()] * 2)(features(NARROW), features(WIDE)), ValueError, "align[0]: expected an output [N, 8, H, W], got shape [2, 120]"),
    (lambda: criterion_of(student_channels=NARROW)(features([4, 4]), features(WIDE)), ValueError, "student[1]: expected 5 channels, got 4"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "sentence"), WRONG, ids=[case[2] for case in WRONG])
def test_wrong_modules(call: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert sentence in str(caught.value)


def test_lazy_modules() -> None:
    criterion = criterion_of(align=[nn.LazyConv2d(c, 1) for c in WIDE])
    criterion(features(NARROW), features(WIDE)).backward()
    assert [module.in_channels for module in criterion.align] == NARROW


def test_modules_taken_out() -> None:
    criterion = criterion_of(student_channels=NARROW)
    del criterion.align[0]
    with pytest.raises(ValueError, match=r"align: expected one module for each of the 2 levels, got \['0'\]"):
        criterion(features(NARROW), features(WIDE))
    criterion.align = None
    assert criterion(features(WIDE), features(WIDE)) == 0


@pytest.mark.slow
def test_compiled_with_ones_own() -> None:
    torch._dynamo.reset()
    criterion = criterion_of(align=[mlp(4, 8), mlp(5, 6)]).eval()
    student, teacher = features(NARROW, torch.bfloat16), features(WIDE, torch.bfloat16)
    compiled = torch.compile(copy.deepcopy(criterion), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher), criterion(student, teacher), rtol=1e-2, atol=0)
