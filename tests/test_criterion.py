"""The criterion: containers, orders, options, copies, state dicts, the loss weight, the warm-up, diagnostics and warnings."""

import copy
import pickle
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from problems import Problem, Target, trained
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from maskd_triton import MaskedDistillLoss, MaskLearner, reference
from maskd_triton import functional as F
from maskd_triton.diagnostics import describe

PROBLEM = Problem([(2, 5, 6, 4), (2, 5, 3, 2)], 3, dtype=torch.float32)
S, T = PROBLEM.student, PROBLEM.teacher
KEYS = ("p3", "p4")
TURNED = KEYS[::-1]
pytestmark = pytest.mark.filterwarnings("ignore:student")  # most tests look at the loss alone
Copied = Callable[[MaskedDistillLoss], MaskedDistillLoss]
COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])


def agree(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=2e-6, atol=0)


def literal_losses(learner: MaskLearner, student: list[Tensor], teacher: list[Tensor], **options: Any) -> Tensor:
    """Of every level, in float64."""
    modules = copy.deepcopy(learner).double().requires_grad_(False).mask_modules
    maps = [[x.double() for x in xs] for xs in (student, teacher)]
    return reference.distill_loss(*maps, [m.mask_token for m in modules], [m.weighting() for m in modules], **options)


def keyed(levels: list[Any], order: tuple[str, ...] = KEYS) -> dict[str, Any]:
    """A mapping in this order."""
    found = dict(zip(KEYS, levels, strict=True))
    return {key: found[key] for key in order}


def leaves() -> list[Tensor]:
    return [s.clone().requires_grad_() for s in S]


def with_gradients(criterion: Any, **options: Any) -> list[Tensor]:
    student = leaves()
    loss = criterion(student, T, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), student)]


def all_equal(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(map(torch.equal, got, want)) and len(got) == len(want)


# --- containers and orders --------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", KEYS)


@dataclass
class BackboneOutput:
    feature_maps: Any


CONTAINERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "tuple": tuple,
    "namedtuple": lambda levels: Pair(*levels),
    "ordered": lambda levels: OrderedDict(keyed(levels)),
    "backbone output": lambda levels: BackboneOutput(tuple(levels)),
    "nested tensors": lambda levels: [SimpleNamespace(tensors=x, mask=None) for x in levels],
}


@pytest.mark.parametrize("kind", CONTAINERS.values(), ids=CONTAINERS)
def test_containers(kind: Callable[[list[Tensor]], Any]) -> None:
    criterion, want = PROBLEM.criterion(), literal_losses(PROBLEM.learner, S, T)
    agree(criterion(S, T, reduction="none"), want)
    agree(criterion(kind(S), kind(T), reduction="none"), want)
    agree(criterion(kind(S), kind(T)), want.sum())
    masks = criterion.masks(kind(T))
    assert type(masks) is type(kind(T))
    held = getattr(masks, "feature_maps", masks)
    held = list(held.values() if isinstance(held, dict) else held)
    for m, x in zip(held, criterion.masks(T), strict=True):
        assert torch.equal(getattr(m, "tensors", m), x)


def test_one_level() -> None:
    learner = trained([5], 3)
    criterion = MaskedDistillLoss(5, 3, pretrained=learner)
    for wrap in (lambda x: x, lambda x: [x], lambda x: {"p3": x}, lambda x: SimpleNamespace(tensors=x)):
        agree(criterion(wrap(S[0]), wrap(T[0])), literal_losses(learner, S[:1], T[:1]).sum())


def test_levels_are_those_of_the_teachers_mapping() -> None:
    """In its order, the student's matched by key; no earlier call, and no look at masks, says otherwise."""
    first, looked = (PROBLEM.criterion().eval() for _ in range(2))
    want, turned = first(S, T, reduction="none"), first(S[::-1], T[::-1], reduction="none")
    assert not torch.allclose(want.flip(0), turned)
    looked.masks(keyed(T, TURNED))
    looked(keyed(S), keyed(T, TURNED))
    resumed = PROBLEM.criterion().eval()
    resumed.load_state_dict(looked.state_dict())
    for criterion in (first, looked, resumed, copy.deepcopy(looked)):
        for order in (KEYS, TURNED):
            assert torch.equal(criterion(keyed(S, order), keyed(T), reduction="none"), want)
            assert torch.equal(criterion(keyed(S, order), keyed(T, TURNED), reduction="none"), turned)
            assert list(criterion.diagnostics()) == list(TURNED)
    masks, weights = PROBLEM.masks, PROBLEM.mask_weights
    got = first(keyed(S), keyed(T), masks=keyed(masks, TURNED), mask_weights=keyed(weights, TURNED), reduction="none")
    assert torch.equal(got, first(S, T, masks=masks, mask_weights=weights, reduction="none"))


def test_channels_that_name_the_levels() -> None:
    """Every mapping has these keys, in any order; modules and state dicts are numbered."""
    named, options = {"p3": 5, "p4": 5}, {"pretrained": PROBLEM.learner}
    want = PROBLEM.criterion()(S, T, reduction="none")
    criterion = MaskedDistillLoss(named, 3, **options)
    for student, teacher in (
        (keyed(S), keyed(T, TURNED)), (keyed(S, TURNED), keyed(T)), (S, keyed(T, TURNED)), (keyed(S, TURNED), T)
    ):  # fmt: skip
        assert torch.equal(criterion(student, teacher, reduction="none"), want)
        assert list(criterion.diagnostics()) == list(KEYS)
    assert criterion.channels == [5, 5]
    assert criterion.state_dict().keys() == PROBLEM.criterion().state_dict().keys()
    for given in (keyed(S, ("p3",)), keyed(S) | {"p5": S[0]}):
        with pytest.raises(ValueError, match=r"student: expected the levels \['p3', 'p4'\], got"):
            criterion(given, T)
    modules, narrow = [nn.Conv2d(2, 5, 1) for _ in KEYS], [s[:, :2] for s in S]
    want = PROBLEM.criterion(align=modules)(narrow, T)
    for align in (keyed(modules, TURNED), nn.ModuleDict(keyed(modules, TURNED)), modules):
        aligned = MaskedDistillLoss(named, 3, align=align, **options)
        assert isinstance(aligned.align, nn.ModuleList)
        assert torch.equal(aligned(keyed(narrow, TURNED), keyed(T)), want)
    wide = MaskedDistillLoss(named, 3, student_channels={"p4": 2, "p3": 7}, **options)
    assert [conv.in_channels for conv in wide.align] == [7, 2]


def test_bool_masks() -> None:
    criterion, masks = MaskedDistillLoss([5, 5], None), [m > 0.5 for m in PROBLEM.masks]
    assert torch.equal(criterion(S, T, masks=masks), criterion(S, T, masks=[m.float() for m in masks]))


# --- options ----------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "custom_mask": False, "custom_mask_warmup": 0, "loss_weight": 2.5, "eps": 0.5, "mask_power": 1, "distance": "cosine",
    "beta": 0.25, "resize": "student", "impl": "eager",
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_assigned_later(name: str) -> None:
    """As options of the constructor; numbers may be numpy's."""
    value = OPTIONS[name]
    start = {"distance": "smooth_l1"} if name == "beta" else {"custom_mask_warmup": int(name != "custom_mask")}
    criterion, others = PROBLEM.criterion(**start), [PROBLEM.criterion(**start | {name: value})]
    if isinstance(value, int | float) and not isinstance(value, bool):
        others.append(PROBLEM.criterion(**start | {name: np.array(value)[()]}))
    before = with_gradients(copy.deepcopy(criterion))
    setattr(criterion, name, value)
    for other in others:
        assert all_equal(with_gradients(copy.deepcopy(criterion)), with_gradients(other))
        assert type(getattr(other, name)) is type(getattr(criterion, name)) is type(value)
    if name not in ("resize", "impl"):
        assert not all_equal(with_gradients(criterion), before)
    assert f"{name}={value!r}" in repr(criterion)


def test_only_align_is_trained() -> None:
    assert not list(PROBLEM.criterion().parameters())
    criterion = PROBLEM.criterion(student_channels=2)
    names = [f"align.{i}.{name}" for i in range(2) for name in ("weight", "bias")]
    assert [name for name, p in criterion.named_parameters() if p.requires_grad] == names


# --- copies and state dicts -------------------------------------------------------------------------------------------


@COPIES
def test_copies(copied: Copied) -> None:
    """Equal, independent, and having seen nothing; they do not grow with what was seen."""
    criterion = PROBLEM.criterion(student_channels=[5, 5])
    before = len(pickle.dumps(criterion))
    for k in (1, 2, 3):
        criterion([s[..., :k] for s in S], [t[..., :k] for t in T]) if k < 3 else criterion(S, T).backward()
    for p in criterion.parameters():
        p.grad = None
    assert len(pickle.dumps(criterion)) == before
    other = copied(criterion)
    assert int(other.warmup_step) == 3
    with pytest.raises(RuntimeError, match="diagnostics: no call to look at"):
        other.diagnostics()
    want = criterion(S, T)
    assert torch.equal(other(S, T), want)
    with torch.no_grad():
        other.mask_modules[1].pool_rows.mul_(-2)
        other.align[0].weight.mul_(2)
    other.eps = 3.0
    assert not torch.equal(other(S, T), want)
    assert torch.equal(criterion(S, T), want)


def test_state_dict() -> None:
    """It holds the calls so far, but no loss weight; a learner's state dict loads strictly, and leaves the calls."""
    criterion = PROBLEM.criterion(loss_weight=2.0)
    criterion(S, T)
    state = criterion.state_dict()
    assert "loss_weight" not in state
    assert int(state["warmup_step"]) == 1
    with pytest.warns(UserWarning, match="without pretrained="):
        others = [MaskedDistillLoss([5, 5], 3, loss_weight=4.0) for _ in range(2)]
    others[0].load_state_dict(state)
    others[1].warmup_step.fill_(7)
    others[1].load_state_dict(PROBLEM.learner.state_dict())
    assert [int(other.warmup_step) for other in others] == [1, 7]
    want = with_gradients(PROBLEM.criterion(loss_weight=4.0))
    assert all(all_equal(with_gradients(other), want) for other in others)


@pytest.mark.parametrize("assign", [False, True])
def test_made_on_the_meta_device(assign: bool) -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        late = MaskedDistillLoss([5, 5], 3)
    if not assign:
        late.to_empty(device="cpu")
    late.load_state_dict(PROBLEM.learner.state_dict(), assign=assign)
    assert torch.equal(late(S, T), PROBLEM.criterion()(S, T))
    assert int(late.warmup_step) == 1


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16], ids=str)
def test_a_cast_leaves_the_numbers(cast: torch.dtype) -> None:
    """Tables and weight stay in float32: a weight that is ramped by 0.00025 a step arrives."""
    problem = Problem([(2, 5, 6, 4), (2, 5, 3, 2)], 3, dtype=torch.float32, standardize=True)
    plain, criterion = (problem.criterion() for _ in range(2))
    criterion.to(cast)
    student, teacher = ([x.to(cast) for x in xs] for xs in (problem.student, problem.teacher))
    one = plain(student, teacher).item()
    for kind in (float, lambda w: torch.tensor(w)):
        for step in range(1, 40):
            criterion.loss_weight = kind(1 + 0.00025 * step)
            assert criterion(student, teacher).item() == pytest.approx(one * (1 + 0.00025 * step), rel=1e-6)


# --- the loss weight --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor, lambda w: torch.tensor(w).double()])
def test_loss_weight(kind: Callable[[float], Any]) -> None:
    """A loss has the weight of its own call, and so have its gradient and the diagnostics."""
    criterion, (one, *grads) = PROBLEM.criterion(), with_gradients(PROBLEM.criterion())
    criterion.loss_weight = weight = kind(2.5)
    assert criterion.loss_weight is weight or type(criterion.loss_weight) is float
    student = leaves()
    loss = criterion(student, T)
    if isinstance(weight, Tensor):
        weight.fill_(9)  # whoever schedules it need not wait for the backward pass
    else:
        criterion.loss_weight = kind(9)
    loss.backward()
    agree(loss, 2.5 * one)
    agree(sum(level.loss for level in criterion.diagnostics().values()), 2.5 * one)
    for s, grad in zip(student, grads, strict=True):
        torch.testing.assert_close(s.grad, 2.5 * grad)
    agree(criterion(S, T, reduction="none").sum(), 9 * one)


def test_gradient_of_a_loss_weight() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    loss = F.masked_distill_loss(S[0], T[0], [torch.zeros(4, 5)], loss_weight=weight)
    loss.backward()
    assert torch.equal(2 * weight.grad, loss)


# --- the warm-up ------------------------------------------------------------------------------------------------------


def fake(criterion: nn.Module, *features: Tensor) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    criterion(*map(mode.from_tensor, features))


def fake_in_their_mode(criterion: nn.Module, *features: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        criterion(*map(mode.from_tensor, features))


def fake_student(criterion: nn.Module, *features: Tensor) -> None:
    """A learner has no student: its features are all fake."""
    criterion(FakeTensorMode(allow_non_fake_inputs=True).from_tensor(features[0]), *features[1:])


TRACES: dict[str, Callable[..., Any]] = {
    "fake": fake,
    "fake student": fake_student,
    "fake in their mode": fake_in_their_mode,
    "make_fx": lambda criterion, *features: make_fx(criterion)(*features),
    "export": lambda criterion, *features: torch.export.export(criterion, features, strict=False),
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "export")) for kind in TRACES])
def test_a_trace_neither_counts_nor_is_kept(kind: str) -> None:
    criterion, learner = MaskedDistillLoss(8, 3, pretrained=trained([8], 3)), trained([8], 3)
    student, teacher = torch.randn(2, 8, 5, 6, requires_grad=True), torch.randn(2, 8, 5, 6)
    loss, _ = criterion(student, teacher), learner(teacher)
    dice = learner.dice_loss()
    TRACES[kind](criterion, student.detach(), teacher)
    TRACES[kind](learner, teacher)
    assert criterion.warmup_step == 1
    torch.testing.assert_close(criterion.diagnostics()[0].loss, loss.detach())
    torch.testing.assert_close(learner.dice_loss(), dice)
    assert learner.diagnostics()[0].coverage.isfinite().all()


def test_what_counts() -> None:
    """Training calls, but for those with ``advance=False``; also without gradient, and of a criterion made in such a mode."""
    with torch.inference_mode():
        made_inside = PROBLEM.criterion(custom_mask_warmup=2)
    for criterion in (PROBLEM.criterion(custom_mask_warmup=2), made_inside):
        start = criterion.eval()(S, T)
        assert torch.equal(criterion.train()(S, T, advance=False), start)
        with torch.inference_mode():
            assert torch.equal(criterion(S, T), start)
        assert torch.equal(criterion(S, T), start)
        assert int(criterion.warmup_step) == 2
        customised = criterion(S, T)
        agree(customised, literal_losses(PROBLEM.learner, S, T, custom_mask=True).sum())
        assert torch.equal(criterion.eval()(S, T), customised)
        assert int(criterion.warmup_step) == 3


def repeated(criterion: Any, reentrant: bool | None, compiler: Any = None, **options: Any) -> list[Tensor]:
    """Loss and gradients of one call inside a region that a backward pass repeats; None: without checkpointing."""
    student, gain = leaves(), torch.tensor(0.7, requires_grad=True)

    def region(*levels: Tensor) -> Tensor:
        return (criterion([x * gain for x in levels], T, **options) * gain).exp()

    def call(*levels: Tensor) -> Tensor:
        return region(*levels) if reentrant is None else checkpoint(region, *levels, use_reentrant=reentrant)

    loss = (compiler(call) if compiler else call)(*student)
    loss.backward()
    return [loss.detach(), gain.grad, *(s.grad for s in student)]


@pytest.mark.parametrize("mode", ["counted", "not advanced", "eval"])
@pytest.mark.parametrize("step", [0, 1, 2])  # masks are customised from the third call on
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_calls_count_once(reentrant: bool, step: int, mode: str) -> None:
    results = []
    for kind in (None, reentrant):
        criterion = PROBLEM.criterion(custom_mask_warmup=2).train(mode != "eval")
        criterion.warmup_step.fill_(step)
        results.append(repeated(criterion, kind, advance=mode == "counted"))
        assert int(criterion.warmup_step) == step + (mode == "counted")
        assert criterion.diagnostics()[0].coverage.isfinite().all()  # of the call, not of half a repetition
    assert all_equal(*results)


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_compiled_and_checkpointed_calls_count_once(reentrant: bool, step: int) -> None:
    """The checkpoint is inside of what is compiled."""
    torch._dynamo.reset()
    results = []
    for kind in (None, reentrant):
        criterion = PROBLEM.criterion(custom_mask_warmup=2)
        criterion.warmup_step.fill_(step)
        if kind is None:
            results.append(repeated(criterion, None))
        else:
            results.append(repeated(criterion, kind, compiler=torch.compile(backend="aot_eager", fullgraph=True)))
        assert int(criterion.warmup_step) == step + 1
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


# --- diagnostics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("customised", [True, False])
def test_diagnostics(customised: bool, weighted: bool, target: Target) -> None:
    """What the masks and weights of the latest call were, and each level's share of the loss."""
    impl, device = target
    learner = trained([5, 5], 3, weighted).to(device)
    options = {"weight_mask": weighted, "custom_mask": customised, "custom_mask_warmup": 0, "loss_weight": 0.3, "impl": impl}
    criterion = MaskedDistillLoss([5, 5], 3, pretrained=learner, **options).to(device)
    student, teacher = (keyed([x.to(device) for x in xs]) for xs in (leaves(), T))
    criterion({key: s * 2 for key, s in student.items()}, teacher)
    losses, levels = criterion(student, teacher, reduction="none"), criterion.diagnostics()
    assert list(levels) == list(KEYS)
    for module, key, loss in zip(learner.mask_modules, KEYS, losses, strict=True):
        masks = module.masks(teacher[key])
        if customised:
            masks = masks * F.receptive_masks(student[key], module.mask_token)
        want = describe(masks.detach(), module.weights(teacher[key]).detach() if weighted else None)
        torch.testing.assert_close(levels[key].loss, loss.detach(), rtol=1e-5, atol=0)
        for field in ("coverage", "dice", "weight", "entropy", "focus"):
            a, b = getattr(levels[key], field), getattr(want, field)
            assert (a is None) == (b is None) == (not weighted and field in ("weight", "entropy"))
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_diagnostics_of_nothing(target: Target) -> None:
    """Means of no image are NaN; an image without a valid pixel has the weights that the loss used, not 0 / 0 (with eps=0)."""
    impl, device = target
    criterion = MaskedDistillLoss(5, 3, pretrained=trained([5], 3), eps=0.0, impl=impl).to(device)
    empty = torch.zeros(0, 5, 4, 4, device=device)
    assert criterion(empty, empty) == 0
    assert criterion.diagnostics()[0].coverage.isnan().all()
    valid = torch.ones(2, 6, 4, dtype=torch.bool, device=device)
    valid[1] = False
    student, teacher = leaves()[0].to(device), T[0].to(device)
    assert criterion(student, teacher, valid=valid).isfinite()
    level = criterion.diagnostics()[0]
    assert level.weight.isfinite().all()
    assert level.entropy.isfinite()


# --- warnings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardize", [False, True])
def test_no_tokens_warn(standardize: bool) -> None:
    """The loss is what the warning says."""
    with pytest.warns(UserWarning, match=r"without pretrained=.*MaskLearner") as caught:
        criterion = MaskedDistillLoss(5, standardize=standardize, custom_mask=False)
    assert [warning.filename for warning in caught] == [__file__]
    agree(criterion(S[0], T[0]), 0.5 * (S[0] - T[0]).square().mean())


def test_a_student_without_gradient_warns() -> None:
    """Once for all levels and calls, at the caller's line; not where nobody trains."""
    criterion = PROBLEM.criterion()
    with torch.no_grad():
        criterion(S, T)
    criterion.eval()(S, T)
    criterion.train()(leaves(), T)
    with pytest.warns(UserWarning, match=r"student\[0\], student\[1\]: no gradient, so the student does not learn") as caught:
        [criterion(S, T) for _ in range(3)]
    assert [warning.filename for warning in caught] == [__file__]


def steps(
    criterion: MaskedDistillLoss, optimizer: torch.optim.Optimizer | None, backward: bool = True, zero: bool = False
) -> list[str]:
    """Sentences of 120 training calls; ``zero``: gradients are None in every call, as transformers' Trainer leaves them."""
    student = [s[:, :2] for s in leaves()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(120):
            loss = criterion(student, T)
            if backward:
                loss.backward(retain_graph=True)
            if optimizer is not None:
                optimizer.step()
            if zero:
                criterion.zero_grad()
    assert {warning.filename for warning in caught} <= {__file__}
    return [str(warning.message) for warning in caught]


class WritesData(torch.optim.Optimizer):
    """As apex's and DeepSpeed's, whose writes autograd does not see."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.data.sub_(0.01 * p.grad)


@pytest.mark.parametrize("train", [torch.optim.SGD, lambda params: torch.optim.AdamW(params, fused=True), WritesData])
def test_an_align_that_learns(train: Callable[[Any], torch.optim.Optimizer]) -> None:
    criterion = PROBLEM.criterion(student_channels=2)
    assert steps(criterion, train(criterion.parameters())) == []


def test_an_align_that_no_optimizer_has_warns() -> None:
    criterion = PROBLEM.criterion(student_channels=2)
    (sentence,) = steps(criterion, torch.optim.SGD(nn.Linear(2, 2).parameters()))
    assert sentence.startswith("align: the parameters of level 0, 1 get gradients, but have not changed in 100 training calls")
    assert steps(PROBLEM.criterion(student_channels=2), None, zero=True) == [sentence]
    forgotten = PROBLEM.criterion(student_channels=2)
    (of_one,) = steps(forgotten, torch.optim.SGD(forgotten.align[0].parameters()))
    assert "the parameters of level 1 get gradients" in of_one
    frozen = PROBLEM.criterion(student_channels=2)
    frozen.align[1].requires_grad_(False)
    assert "the parameters of level 0 get gradients" in steps(frozen, None)[0]
    assert steps(PROBLEM.criterion(student_channels=2), None, backward=False) == []
    assert steps(PROBLEM.criterion(student_channels=2).requires_grad_(False), None) == []
    assert steps(PROBLEM.criterion(student_channels=2).eval(), None) == []


# --- options that are assigned later -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [lambda x: nn.Parameter(x, requires_grad=False), nn.Buffer])
def test_a_parameter_as_loss_weight_follows_no_cast(kind: Callable[[Tensor], Tensor]) -> None:
    """It is taken as a plain tensor, which whoever schedules it may still write to."""
    weight = kind(torch.tensor(1.0))
    criterion, other = PROBLEM.criterion(loss_weight=weight), PROBLEM.criterion()
    other.loss_weight = weight
    for each in (criterion, other):
        assert "loss_weight" not in each.state_dict()
        each.bfloat16()
        assert each.loss_weight.dtype == torch.float32
    before = criterion(S, T)
    with torch.no_grad():
        weight += 0.00025
    assert criterion(S, T).item() == pytest.approx(1.00025 * before.item(), rel=1e-6)
    criterion.loss_weight = 0.5
    assert criterion(S, T).item() == pytest.approx(0.5 * before.item(), rel=1e-6)


def test_an_align_assigned_later() -> None:
    criterion, narrow = PROBLEM.criterion(), [s[:, :2] for s in leaves()]
    convs = [nn.Conv2d(2, t.shape[1], 1) for t in T]
    want = PROBLEM.criterion(align=convs)(narrow, T)
    for given in (convs, tuple(convs), nn.ModuleList(convs)):
        criterion.align = given
        assert torch.equal(criterion(narrow, T), want)
        assert [name for name, _ in criterion.align.named_children()] == ["0", "1"]
    for given, sentence in (
        (convs[0], r"align: expected one entry for each of the 2 levels, got 1"),
        (nn.ModuleList(convs[:1]), r"align: expected one entry for each of the 2 levels, got 1"),
        (5, r"align: expected a sequence with one entry per level, got int"),
        ([5, 6], r"align\[0\]: expected an nn.Module, got int"),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            criterion.align = given
    assert torch.equal(criterion(narrow, T), want)


@pytest.mark.parametrize(
    ("module", "name", "value", "sentence"),
    [
        (PROBLEM.criterion(), "student_channels", 4, "student_channels: cannot be changed"),
        (PROBLEM.criterion(), "pretrained", "tokens.pt", "pretrained: cannot be changed"),
        (
            PROBLEM.criterion(),
            "warmup_step",
            torch.tensor(3.0),
            "warmup_step: expected an int64 scalar tensor, got torch.float32",
        ),
        (PROBLEM.criterion(), "warmup_step", 3, "warmup_step: expected an int64 scalar tensor, got 3"),
        (PROBLEM.learner, "num_tokens", 8, "num_tokens: cannot be changed"),
        (PROBLEM.learner, "pretrained", "tokens.pt", "pretrained: cannot be changed"),
    ],
)
def test_what_cannot_be_assigned(module: nn.Module, name: str, value: Any, sentence: str) -> None:
    with pytest.raises((AttributeError, TypeError, ValueError), match=sentence):
        setattr(module, name, value)
