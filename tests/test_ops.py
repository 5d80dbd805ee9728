"""Registration: opcheck, gradcheck and torch.compile."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from maskd_triton import MaskedDistillLoss, MaskLearner
from maskd_triton._ops.distill import distill, distill_backward, masked_distill
from maskd_triton._records import Distilled, DistillOptions, DistillTables, flat
from maskd_triton.functional import DISTANCES

FULLEST = "weighted standard"
KINDS = ["plain", "weighted", "standard", FULLEST, "weighted valid", "given", "smooth_l1", "cosine standard valid"]


def problem(
    layout: str, kind: str, device: str, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor], DistillOptions]:
    """Student, teacher and options: two levels of different sizes and channels."""
    torch.manual_seed(0)

    def features(c: int, h: int, w: int, grad: bool) -> Tensor:
        x = {"nchw": (2, c, h, w), "nhwc": (2, h, w, c), "chwn": (c, h, w, 2), "ncwh": (2, c, w, h)}[layout]
        back = {"nchw": (0, 1, 2, 3), "nhwc": (0, 3, 1, 2), "chwn": (3, 0, 1, 2), "ncwh": (0, 1, 3, 2)}[layout]
        x = torch.randn(x).permute(back)
        return x.to(device, dtype).requires_grad_(grad)

    def frozen(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    student, teacher = ([features(5, 3, 4, grad), features(7, 2, 3, grad)] for grad in (True, False))
    options = DistillOptions(
        DistillTables([frozen(3, 5), frozen(3, 7)]),
        valid=[(frozen(2, p) > 0).byte() for p in (12, 6)] if "valid" in kind else [],
        customised=torch.tensor(True, device=device),
        custom_mask=True,
    )
    tables = options.tables
    if kind.split()[0] in DISTANCES:
        options = options._replace(distance=kind.split()[0], beta=0.7)
    if "weighted" in kind:
        bias = [frozen(5, 3) if "standard" in kind else frozen(3) for _ in range(2)]
        tables = tables._replace(pool_rows=[frozen(9, 3, 5), frozen(9, 3, 7)], pool_bias=bias)
    if "standard" in kind:
        tables = tables._replace(
            teacher_tokens=[frozen(3, 5), frozen(3, 7)],
            token_bias=[frozen(3), frozen(3)],
            statistics=[frozen(2, 5), frozen(2, 7)],
        )
    if "given" in kind:
        masks, weights = [frozen(2, 3, p).abs() for p in (12, 6)], frozen(2, 2, 3)
        options = options._replace(masks=masks, weights=weights, custom_mask=False, mask_power=1)
        tables = DistillTables()
    return student, teacher, options._replace(tables=tables)


# every kind in one layout and every layout of one kind: what the fakes say of one does not depend on the other
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "kind"), [*(("nchw", kind) for kind in KINDS), *((layout, FULLEST) for layout in ("nhwc", "chwn", "ncwh"))]
)
def test_opcheck(layout: str, kind: str, target: tuple[str, str]) -> None:
    impl, device = target
    student, teacher, options = problem(layout, kind, device)
    maps = {"student": [s.detach() for s in student], "teacher": teacher, "impl": impl}
    forward = maps | options._asdict() | {"tables": flat(options.tables)}
    torch.library.opcheck(distill, (), forward)
    outputs = Distilled(*distill(**forward))
    kept = outputs.kept(options)._asdict() | {"grad": torch.rand_like(outputs.per_image)}
    torch.library.opcheck(distill_backward, (), maps | kept)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, target: tuple[str, str]) -> None:
    impl, device = target
    student, teacher, options = problem("nchw", kind, device, torch.float64)

    def loss(*levels: Tensor) -> Tensor:
        # masks that follow the student are constants for the gradient, so only uncustomised ones can be checked
        return masked_distill(levels, teacher, options._replace(custom_mask=False), impl).per_image

    # every element of one kind in eager torch; a random projection, which is faster, misses no wrong gradient either
    assert torch.autograd.gradcheck(loss, student, fast_mode=impl == "triton" or kind != FULLEST)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_fullgraph(dynamic: bool, target: tuple[str, str]) -> None:
    impl, device = target
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    learner = MaskLearner([7, 5])
    criteria = [MaskedDistillLoss([7, 5], pretrained=learner, custom_mask_warmup=2, impl=impl).to(device) for _ in range(2)]

    def losses(criterion: MaskedDistillLoss, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        return criterion([x * 2 for x in student], teacher, reduction="none")

    # the operators are the same to the default backend, which takes longer, whoever computes in them and whatever the sizes
    backend = "inductor" if dynamic == (impl == "triton") else "aot_eager"
    compiled = torch.compile(losses, fullgraph=True, dynamic=dynamic, backend=backend)
    # sizes unlike the channels: torch gives equal numbers one symbol, which the channel check then fixes
    sizes = [(8, 12), (12, 14), (9, 18), (16, 22)] if dynamic else [(8, 12)] * 4
    for h, w in sizes:  # the masks are customised from the third call on
        shapes = [(2, 7, h, w), (2, 5, h // 2, w // 2)]
        teacher = [torch.randn(*shape, device=device) for shape in shapes]
        values = [torch.randn(*shape, device=device) for shape in shapes]
        results = []
        for criterion, function in zip(criteria, (losses, compiled), strict=True):
            student = [x.clone().requires_grad_() for x in values]
            loss = function(criterion, student, teacher)
            loss.sum().backward()
            results.append([loss.detach(), *(s.grad for s in student)])
        for expected, got in zip(*results, strict=True):
            assert torch.allclose(got, expected, rtol=1e-6, atol=1e-9)
    assert [int(c.warmup_step) for c in criteria] == [4, 4]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_compiled_criterion_sees_loaded_weights(target: tuple[str, str]) -> None:
    impl, device = target
    torch._dynamo.reset()
    torch.manual_seed(0)
    first, second = (MaskedDistillLoss(7, pretrained=MaskLearner(7), impl=impl).to(device) for _ in range(2))
    student, teacher = torch.randn(2, 7, 8, 9, device=device), torch.randn(2, 7, 8, 9, device=device)
    for criterion in (first, second):
        for tables in criterion.eval().mask_modules:
            tables.mask_token.mul_(100)
    compiled = torch.compile(first, fullgraph=True)
    assert torch.allclose(compiled(student, teacher), first(student, teacher), rtol=1e-6)
    first.load_state_dict(second.state_dict())
    loaded = compiled(student, teacher)
    expected = second(student, teacher)
    assert torch.allclose(loaded, expected, rtol=1e-6)


class Recorder(TorchDispatchMode):
    """Names of the library's operators that a mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "maskd_triton":
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_modes_see_the_operators(target: tuple[str, str]) -> None:
    """Without a mode their functions are called directly; the results are the same bits."""
    impl, device = target
    criterion = MaskedDistillLoss([5, 7], 3, pretrained=MaskLearner([5, 7], 3), impl=impl).to(device)
    student, teacher, _ = problem("nchw", "plain", device)
    direct = criterion(student, teacher)
    direct_grads = torch.autograd.grad(direct, student)
    with Recorder() as mode:
        loss = criterion(student, teacher)
        grads = torch.autograd.grad(loss, student)
    assert mode.seen == ["maskd_triton::distill", "maskd_triton::distill_backward"]
    assert torch.equal(loss, direct)
    assert all(torch.equal(a, b) for a, b in zip(grads, direct_grads, strict=True))


def test_fake_tensors(target: tuple[str, str]) -> None:
    criterion = MaskedDistillLoss([5, 7], 3, pretrained=MaskLearner([5, 7], 3), impl=target[0]).to(target[1]).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        student, teacher, _ = problem("nhwc", "plain", target[1])
        loss = criterion(student, teacher)
        grads = torch.autograd.grad(loss, student)
    assert all(isinstance(x, FakeTensor) for x in (loss, *grads))
    assert [g.stride() for g in grads] == [s.stride() for s in student]
