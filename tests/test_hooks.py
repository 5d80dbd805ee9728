"""Reaching into models, by the chapters of docs/reaching-into-models.md."""

import contextlib
import copy
import dataclasses
import functools
import gc
import io
import pickle
import warnings
import weakref
from collections import OrderedDict, UserList, namedtuple
from collections.abc import Callable, Iterator
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import avg_pool2d, pad
from torch.utils.checkpoint import checkpoint

from maskd_triton import FrozenTeacher, MaskedDistillLoss, MaskLearner, capture
from maskd_triton.capture import FeatureCapture

IMAGES = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 8, 12, dtype=torch.bool)
MASK[1, :, 5:] = False


def learner_of(*channels: int, **options: Any) -> MaskLearner:
    torch.manual_seed(1)
    learner = MaskLearner(list(channels), num_tokens=3, **options)
    with torch.no_grad():
        for module in learner.mask_modules:
            module.mask_token.mul_(100)
    return learner


def seeded(module: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return module()


def gradients(learner: MaskLearner, loss: Tensor) -> list[Tensor]:
    learner.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in learner.parameters()]


# Which modules, which part


class Yolo(nn.Module):
    """Levels of separate modules, the second made of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.p3, self.p4 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p3 = self.p3(x)
        return p3, self.p4(p3)


class SharedHead(nn.Module):
    """One tower for all levels, called once for each; ``extra`` calls more."""

    def __init__(self, extra: int = 0) -> None:
        super().__init__()
        self.body, self.tower, self.extra = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), extra

    def extract_feat(self, x: Tensor) -> list[Tensor]:
        x = self.body(x)
        return [self.tower(y) for y in (x, avg_pool2d(x, 2), *[x] * self.extra)]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.extract_feat(x)


@pytest.mark.parametrize("names", [["p3", "p4"], ["p4", "p3"]])
def test_several_modules(names: list[str]) -> None:
    teacher = seeded(Yolo)
    channels = {"p3": 4, "p4": 6}
    learner = learner_of(*(channels[name] for name in names))
    modules = dict(zip(names, learner.mask_modules, strict=True))
    p3, dice3 = modules["p3"](teacher.p3(IMAGES))
    p4, dice4 = modules["p4"](teacher.p4(p3))
    with learner.attach(teacher, names):
        found = teacher(IMAGES)
        dice = learner.dice_loss()
        levels = learner.diagnostics()
    assert torch.equal(found[0], p3)
    assert torch.equal(found[1], p4)
    torch.testing.assert_close(dice, dice3 + dice4)
    assert sorted(levels) == [0, 1]
    want = torch.autograd.grad(p3.mean() + p4.mean() + dice3 + dice4, list(learner.parameters()))
    got = torch.autograd.grad(found[0].mean() + found[1].mean() + dice, list(learner.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    _, captured = capture.call(teacher, names, IMAGES)
    assert [x.shape[1] for x in captured] == [channels[name] for name in names]

    standard = learner_of(*(channels[name] for name in names), standardize=True)
    with standard.calibrate(teacher, names):
        teacher(IMAGES)
    plain = dict(zip(("p3", "p4"), teacher(IMAGES), strict=True))
    for name, module in zip(names, standard.mask_modules, strict=True):
        torch.testing.assert_close(module.channel_mean, plain[name].mean((0, 2, 3)))
        assert module.pixels_seen == plain[name][:, 0].numel()


def test_modules_whose_levels_have_equal_keys() -> None:
    teacher = seeded(lambda: nn.Sequential(Holder(lambda x: {"0": x}), nn.Identity(), Holder(lambda x: {"0": x[:, :3]})))
    teacher.forward = lambda x: teacher[2](teacher[0](x)["0"][:, :3])
    learner = learner_of(4, 3)
    with learner.attach(teacher, ["0", "2"]):
        teacher(IMAGES)
        assert sorted(learner.diagnostics()) == [0, 1]


def test_calls_of_a_shared_head() -> None:
    teacher, learner = seeded(SharedHead), learner_of(4, 4)
    plain = teacher(IMAGES)
    with learner.attach(teacher, "tower"):
        for _ in range(2):
            found = teacher(IMAGES)
            assert len(learner.diagnostics()) == 2
            for module, x, y in zip(learner.mask_modules, plain, found, strict=True):
                assert torch.equal(module(x)[0], y)
            torch.testing.assert_close(
                learner.dice_loss(), sum(m(x)[1] for m, x in zip(learner.mask_modules, plain, strict=True))
            )
        direct = teacher.extract_feat(IMAGES)  # not a call of the teacher: complete levels begin anew
        assert all(torch.equal(a, b) for a, b in zip(direct, found, strict=True))
    student = copy.deepcopy(teacher)
    with FeatureCapture(student, teacher, "tower") as features:
        for images in (0 * IMAGES, IMAGES):
            student(images)
            with torch.no_grad():
                teacher(images)
        for levels in features.take():
            assert all(torch.equal(a, b) for a, b in zip(levels, plain, strict=True))


def test_the_name_before_something_was_wrapped_is_near() -> None:
    """As by DDP or an adapter."""
    with pytest.raises(AttributeError, match=r"has no module 'p3'; did you mean 'module\.net\.p3'\?"):
        capture.call(nn.ModuleDict({"module": nn.ModuleDict({"net": Yolo()})}), "p3", IMAGES)


@pytest.mark.parametrize("number", [0, 1])
def test_one_call_of_a_shared_head(number: int) -> None:
    teacher, learner = seeded(SharedHead), learner_of(4)
    plain = teacher(IMAGES)
    with learner.attach(teacher, "tower", call=number):
        found = teacher(IMAGES)
        learner.dice_loss()
    assert torch.equal(found[number], learner(plain[number]))
    assert torch.equal(found[1 - number], plain[1 - number])
    _, (level,) = capture.call(teacher, "tower", IMAGES, call=number)
    assert torch.equal(level, plain[number])


def attached(teacher: nn.Module, learner: MaskLearner, *args: Any, run: Any = None, **options: Any) -> Any:
    with learner.attach(teacher, *args, **options):
        (run or teacher)(IMAGES)
        learner.dice_loss()


WRONG_CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: attached(SharedHead(), learner_of(4), "tower"), ValueError, "expected 1 levels, got 2 in 2 calls of one pass; call= picks"),
    (lambda: attached(SharedHead(), learner_of(4, 4, 4), "tower"), ValueError, "expected 3 levels, got 2 in 2 calls of one pass"),
    (lambda: attached(SharedHead(), learner_of(4), "tower", call=5), ValueError, "2 calls in one pass of the teacher, there is no call 5"),
    (lambda: attached(SharedHead(), learner_of(4), "tower", call=-1), ValueError, "call: expected"),
    (lambda: attached(SharedHead(), learner_of(4, 4, 4), ["tower", "body"]), ValueError, "3 levels cannot be divided among 2 modules"),
    (lambda: attached(SharedHead(), learner_of(4, 4), ["tower", "tower"]), ValueError, "names: expected every module once"),
    (lambda: attached(SharedHead(), learner_of(4, 4), []), TypeError, "names: expected dotted names of modules, got []"),
    (lambda: attached(t := SharedHead(), learner_of(4), "tower", call=0, run=t.extract_feat), RuntimeError,
     "call=0 counts within a call of the teacher, but 'tower' ran outside of one; call the teacher itself"),
    (lambda: attached(t := SharedHead(), learner_of(4, 4), "tower", run=t.tower.__class__(3, 4, 1)), RuntimeError, "no features seen yet"),
    (lambda: attached(t := Yolo(), learner_of(4, 6), ["p3", "p4"], run=t.p3), RuntimeError, "expected 2 levels of the teacher, 1 have been seen"),
    (lambda: capture.call(SharedHead(), "tower", IMAGES, call=2), RuntimeError, "the model's 'tower' ran 2 times, it has no call 2"),
    (lambda: capture.call(SharedHead(), "tower", IMAGES, output=1.5), TypeError, "output: expected a field, a key, a position"),
    (lambda: capture.call(SharedHead(), "tower", IMAGES, output=[]), TypeError, "output: expected a field, a key, a position"),
    (lambda: capture.call(SharedHead(), "tower", IMAGES, output=(0, [1, ...])), TypeError, "output: expected a field, a key, a position"),
    (lambda: capture.call(SharedHead(), "tower", IMAGES, layout="hwc"), ValueError, "layout: expected one of 'nchw', 'nhwc', 'tokens'"),
    (lambda: capture.call(SharedHead(), "tower", IMAGES, grid=(2, 2)), ValueError, "grid, prefix_tokens: only layout='tokens' has them"),
    (lambda: FeatureCapture(Yolo(), Yolo(), "p3", layout={"pupil": "nchw"}), ValueError,
     "layout: expected a mapping with the keys 'student' and 'teacher', got ['pupil']"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "error", "sentence"), WRONG_CALLS)
def test_calls_that_do_not_fit(act: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        act()
    assert sentence in str(caught.value)


def test_passes_that_are_no_call_of_the_model() -> None:
    """A pass of the part that holds the module counts; calls of the module itself are not guessed to belong together."""
    student = seeded(lambda: nn.ModuleDict({"backbone": SharedHead(), "neck": nn.Conv2d(4, 4, 1)}))
    teacher = copy.deepcopy(student)
    with FeatureCapture(student, teacher, ["backbone.tower", "neck"]) as features:
        for images in (0 * IMAGES, IMAGES):
            for model in (student, teacher):
                want = model["backbone"](images)
                model["neck"](want[0])
            if images is not IMAGES:
                features.take()
        students, _ = features.take()
        assert [x.shape for x in students] == [want[0].shape, want[1].shape, want[0].shape]
        assert torch.equal(students[1], want[1])
        for model in (student, teacher):
            model["backbone"].extract_feat(IMAGES)
            model["neck"](want[0])
        sentence = "the student's 'backbone.tower' ran 2 times outside of a call of the student since the latest take"
        with pytest.raises(RuntimeError, match=sentence):
            features.take()
        for model in (student, teacher):  # and nothing is left of them
            model["neck"](model["backbone"](IMAGES)[0])
        assert len(features.take()[0]) == 3


def test_a_pass_that_raises_leaves_no_trace() -> None:
    student, teacher = seeded(SharedHead), seeded(SharedHead)
    with FeatureCapture(student, teacher, "tower") as features:
        with pytest.raises(RuntimeError):
            student(IMAGES[:, :2])
        student(IMAGES)
        teacher(IMAGES)
        assert [len(levels) for levels in features.take()] == [2, 2]


def test_an_interrupted_pass_leaves_no_trace() -> None:
    """Hooks that end a pass are not called then."""
    student, teacher = seeded(SharedHead), seeded(SharedHead)
    block = FeatureCapture(student, teacher, "tower")
    handle = student.tower.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), block:
        student(IMAGES)
    handle.remove()
    with block as features:
        for _ in range(2):
            student(IMAGES)
            teacher(IMAGES)
        assert [len(levels) for levels in features.take()] == [2, 2]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_other_hooks_see_masked_features() -> None:
    """As those by which transformers collects hidden states: they were set before, and stay."""
    teacher, learner = seeded(Yolo), learner_of(4)
    seen: list[Tensor] = []
    teacher.p3.register_forward_hook(lambda _module, _inputs, x: seen.append(x))
    with FeatureCapture(seeded(Yolo), teacher, "p3") as features, learner.attach(teacher, "p3"):
        masked, _ = teacher(IMAGES)
        features._sides[0].model(IMAGES)
        assert features.take()[1][0] is masked
    assert seen[0] is masked


def test_a_hook_that_raises_leaves_no_trace() -> None:
    """Before the pass has begun, or in the function that reads valid pixels."""
    teacher, learner = seeded(SharedHead), learner_of(4, 4)
    raises = [True]

    def refuse(*_: Any) -> None:
        if raises.pop():
            raise KeyError

    teacher.register_forward_pre_hook(refuse)
    for options in ({}, {"valid": refuse}):
        raises[:] = [False, False, *([True] if not options else [True, False])]
        with learner.attach(teacher, "tower", **options):
            with pytest.raises(KeyError):
                teacher(IMAGES)
            raises[:] = [False, False]
            gradients(learner, sum(x.mean() for x in teacher(IMAGES)) + learner.dice_loss())


Pair = namedtuple("Pair", "other levels")


@dataclasses.dataclass
class Record:
    other: Any
    levels: Any


class Wrapper(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.wrap = nn.Conv2d(3, 4, 1), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.net(x))


class Holder(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body = Wrapper(wrap)

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


@dataclasses.dataclass(frozen=True)
class Counted:
    """One that counts how often it was made."""

    levels: Any
    made: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.made.append(1)


class Slotted:
    __slots__ = ("levels",)

    def __init__(self, levels: Any) -> None:
        self.levels = levels


class Strided(list):  # type: ignore[type-arg]
    """A list whose constructor takes something else."""

    def __init__(self, *levels: Any) -> None:
        super().__init__(levels)
        self.strides = (4, 8)


class Couple(tuple):  # type: ignore[type-arg]
    def __new__(cls, first: Any, second: Any) -> "Couple":
        return super().__new__(cls, (first, second))


PARTS: dict[str, tuple[Callable[[Tensor], Any], Any, Callable[[Any], Any]]] = {
    "tuple": (lambda x: (x, None), 0, lambda r: r[0]),
    "from the end": (lambda x: (None, [x]), -1, lambda r: r[-1][0]),
    "list": (lambda x: ["a", x], 1, lambda r: r[1]),
    "named tuple": (lambda x: Pair(1, x), "levels", lambda r: r.levels),
    "named tuple by position": (lambda x: Pair(1, x), 1, lambda r: r.levels),
    "record by position": (lambda x: Record(None, x), 0, lambda r: r.levels),
    "number as a key": (lambda x: {7: x, 8: 1}, 7, lambda r: r[7]),
    "mapping by position": (lambda x: {"a": 1, "levels": x}, 1, lambda r: r["levels"]),
    "object": (lambda x: SimpleNamespace(levels=x, other=2), "levels", lambda r: r.levels),
    "path": (lambda x: ({"p": Record(2, (x, 5))}, None), (0, "p", "levels", 0), lambda r: r[0]["p"].levels[0]),
    "frozen": (lambda x: Counted(x), "levels", lambda r: r.levels),
    "slots": (lambda x: Slotted(x), "levels", lambda r: r.levels),
    "list of its own": (lambda x: Strided(None, x), 1, lambda r: r[1]),
    "tuple of its own": (lambda x: Couple(None, x), 1, lambda r: r[1]),
    "result of torch": (lambda x: x[..., None].max(-1), 0, lambda r: r.values),
    "sequence": (lambda x: UserList([x, 1]), 0, lambda r: r[0]),
    "read-only mapping": (lambda x: MappingProxyType({"a": x, "b": 1}), "a", lambda r: r["a"]),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_of_an_output(kind: str) -> None:
    wrap, output, read = PARTS[kind]
    model, learner = seeded(lambda: Holder(wrap)), learner_of(4)
    plain = model(IMAGES)
    _, (level,) = capture.call(model, "body", IMAGES, output=output)
    assert torch.equal(level, read(plain))
    with learner.attach(model, "body", output=output):
        masked = model(IMAGES)
    assert type(masked) is type(plain)
    assert torch.equal(read(masked), learner(read(plain)))
    if isinstance(masked, tuple | list):
        assert len(masked) == len(plain)
    for name in ("strides", "made"):
        assert getattr(masked, name, None) == getattr(plain, name, None)


SEVERAL: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any, Callable[[Any], list[Tensor]]]] = {
    "pairs": (lambda x, y: [(x, 1), (y, 2)], (..., 0), lambda r: [r[0][0], r[1][0]]),  # as DETR backbones give them
    "from the end": (lambda x, y: [(1, x), (2, y)], (..., -1), lambda r: [r[0][1], r[1][1]]),
    "records": (lambda x, y: ({"p": [Record(1, x), Record(2, y)]}, 3), (0, "p", ..., "levels"), lambda r: [s.levels for s in r[0]["p"]]),
    "mapping": (lambda x, y: {"a": {"m": x}, "b": {"m": y}}, (..., "m"), lambda r: [r["a"]["m"], r["b"]["m"]]),
    "some": (lambda x, y: OrderedDict(p3=x, pool=None, p4=y), ["p3", "p4"], lambda r: [r["p3"], r["p4"]]),
    "another order": (lambda x, y: (y, None, x), [2, 0], lambda r: [r[2], r[0]]),
    "some of a field": (lambda x, y: Record(None, (0, x, y)), ("levels", [1, 2]), lambda r: list(r.levels[1:])),
    "wrapped": (lambda x, y: [(NestedTensor(x, None), 1), (NestedTensor(y, None), 2)], (..., 0), lambda r: [s[0].tensors for s in r]),
}  # fmt: skip


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_parts_of_an_output(kind: str) -> None:
    wrap, output, read = SEVERAL[kind]
    model, learner = seeded(lambda: Holder(lambda x: wrap(x, avg_pool2d(x, 2)))), learner_of(4, 4, standardize=True)
    plain = model(IMAGES)
    _, levels = capture.call(model, "body", IMAGES, output=output)
    assert all(torch.equal(a, b) for a, b in zip(levels, read(plain), strict=True))
    with learner.calibrate(model, "body", output=output):
        model(IMAGES)
    with learner.attach(model, "body", output=output):
        masked = model(IMAGES)
    assert type(masked) is type(plain)
    for got, want in zip(read(masked), learner(read(plain)), strict=True):
        assert torch.equal(got, want)


def test_numbers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    model = Holder(lambda x: (None, x.flatten(2).transpose(1, 2)))
    options = {"layout": "tokens", "grid": numpy.array([8, 12]), "prefix_tokens": numpy.int64(0), "call": numpy.int32(0)}
    _, (level,) = capture.call(model, "body", IMAGES, output=numpy.int64(1), **options)
    assert torch.equal(level, model.body.net(IMAGES))


@pytest.mark.parametrize(
    ("wrap", "output", "sentence"),
    [
        (lambda x: (x, None), None, "[1]: expected a tensor, got NoneType (output= names the part that holds the levels)"),
        (lambda x: (x, None), 2, "expected a part at position 2 (output=), got 2 of them"),
        (lambda x: x, 0, "expected a sequence 0, got Tensor"),
        (lambda x: x, (..., 0), "expected a sequence or a mapping of parts (output= has ...), got Tensor"),
        (lambda x: [x, None], (..., 0), "expected a sequence 0, got Tensor"),
        (lambda x: {"a": x, "b": [x]}, ["a", "b"], "[1]: expected a tensor, got list"),
        (
            lambda x: SimpleNamespace(a=x),
            "levels",
            "expected levels in the field 'levels' (output=) of SimpleNamespace, got 'a' (Tensor)",
        ),
    ],
)
def test_parts_that_are_not_there(wrap: Any, output: Any, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        capture.call(Holder(wrap), "body", IMAGES, output=output)
    assert sentence in str(caught.value)


# In what layout


class Blocks(nn.Module):
    """A backbone whose block gives maps, NHWC maps or tokens; and a head that takes either."""

    def __init__(self, layout: str, prefix: int = 0) -> None:
        super().__init__()
        self.patch, self.block, self.layout, self.prefix = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 6), layout, prefix

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).permute(0, 2, 3, 1)
        if self.layout == "tokens":
            x = x.flatten(1, 2)
            x = torch.cat([x[:, : self.prefix] + 7, x], 1)
        return self.block(x)

    def maps(self, x: Tensor) -> Tensor:
        if self.layout == "tokens":
            return x[:, self.prefix :].transpose(1, 2).unflatten(2, (4, 6))
        return x.permute(0, 3, 1, 2)


LAYOUTS = [("nhwc", 0, {}), ("tokens", 0, {}), ("tokens", 0, {"grid": (4, 6)}), ("tokens", 3, {"prefix_tokens": 3})]


@pytest.mark.parametrize(("layout", "prefix", "options"), LAYOUTS)
def test_layouts(layout: str, prefix: int, options: dict[str, Any]) -> None:
    teacher, options = seeded(lambda: Blocks(layout, prefix)), options | {"layout": layout}
    plain = teacher(IMAGES)
    want = teacher.maps(plain)

    _, (level,) = capture.call(teacher, "block", IMAGES, **options)
    assert torch.equal(level, want)
    pupil, of_teacher = seeded(Yolo), {name: {"teacher": value} for name, value in options.items()}
    with FeatureCapture(pupil, teacher, {"p3": "block"}, **of_teacher) as features:
        pupil(IMAGES)
        teacher(IMAGES)
        (student,), (level,) = features.take()
    assert student.shape == (2, 4, 8, 12)
    assert torch.equal(level, want)

    learner = learner_of(6, standardize=True)
    with learner.calibrate(teacher, "block", **options):
        teacher(IMAGES)
    torch.testing.assert_close(learner.mask_modules[0].channel_mean, want.mean((0, 2, 3)))
    with learner.attach(teacher, "block", **options):
        got = teacher(IMAGES)
        dice = learner.dice_loss()
    assert got.shape == plain.shape
    assert torch.equal(got[:, :prefix], plain[:, :prefix])
    torch.testing.assert_close(teacher.maps(got), learner(want))
    torch.testing.assert_close(dice, learner.dice_loss())
    (got.square().sum() + dice).backward()
    assert learner.mask_modules[0].mask_token.grad.abs().max() > 0


class Given(nn.Module):
    """Gives what it is given, as its block's output."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Identity()

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return self.block(x)


WRONG_LAYOUTS: list[tuple[tuple[int, ...], dict[str, Any], str]] = [
    ((2, 4, 6, 8), {}, "expected [N, 8, H, W] (layout='nchw'), got shape [2, 4, 6, 8]; the shape fits layout='nhwc'"),
    ((2, 24, 8), {}, "expected [N, 8, H, W] (layout='nchw'), got shape [2, 24, 8]; the shape fits layout='tokens'"),
    ((2, 8, 4, 6), {"layout": "nhwc"}, "expected [N, H, W, 8] (layout='nhwc'), got shape [2, 8, 4, 6]; the shape fits layout='nchw'"),
    ((2, 8, 4, 6), {"layout": "tokens"}, "expected [N, L, 8] (layout='tokens'), got shape [2, 8, 4, 6]; the shape fits layout='nchw'"),
    ((2, 24, 8), {"layout": "nhwc"}, "the shape fits layout='tokens'"),
    ((2, 4, 6, 5), {}, "expected 8 channels, got 4"),
    ((2, 25, 8), {"layout": "tokens", "grid": (4, 6)}, "expected 0 + 4 * 6 tokens (prefix_tokens, grid), got 25; prefix_tokens=1 would fit"),
    ((2, 20, 8), {"layout": "tokens", "grid": (4, 6)}, "expected 0 + 4 * 6 tokens (prefix_tokens, grid), got 20"),
    ((2, 24, 8), {"layout": "tokens"}, "no images [N, C, H, W] among the arguments of the model's call; give grid=(h, w)"),
]  # fmt: skip


@pytest.mark.parametrize("use", ["attach", "calibrate"])
@pytest.mark.parametrize(("shape", "options", "sentence"), WRONG_LAYOUTS)
def test_a_layout_that_fits_is_named(shape: tuple[int, ...], options: dict[str, Any], sentence: str, use: str) -> None:
    learner = learner_of(8, standardize=use == "calibrate")
    with pytest.raises(ValueError) as caught, getattr(learner, use)(model := Given(), "block", **options):  # noqa: PT011
        model(torch.zeros(shape))
    assert str(caught.value).startswith("output of the teacher's 'block'")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("images", "tokens", "sentence"),
    [
        ((16, 24), 25, "25 tokens are no grid of square patches of 16x24 images; give grid=(h, w); prefix_tokens=1 would fit"),
        ((15, 24), 24, "24 tokens are no grid of square patches of 15x24 images; give grid=(h, w)"),
    ],
)
def test_grids_that_are_not_found(images: tuple[int, int], tokens: int, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        capture.call(Given(), "block", torch.zeros(1, tokens, 8), torch.zeros(1, 3, *images), layout="tokens")
    assert sentence in str(caught.value)


def test_tokens_before_an_in_place_layer() -> None:
    """Masked tokens are views of an operator's output; a layer may still write to them."""
    teacher, learner = seeded(lambda: nn.Sequential(Blocks("tokens"), nn.ReLU(inplace=True))), learner_of(6)
    with learner.attach(teacher, "0", layout="tokens"):
        (teacher(IMAGES).sum() + learner.dice_loss()).backward()
    assert learner.mask_modules[0].mask_token.grad is not None


# The teacher as it was


def state_of(model: nn.Module) -> list[Any]:
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    return [*flags, *(b.tolist() for b in model.buffers())]


@pytest.mark.parametrize("first", [0, 1])
def test_two_learners_leave_in_any_order(first: int) -> None:
    """As hooks of a trainer do: who came first leaves first."""
    teacher = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))).train()
    teacher[0].bias.requires_grad_(False)
    before = state_of(teacher)
    learners, blocks = [learner_of(4), learner_of(4)], [contextlib.ExitStack(), contextlib.ExitStack()]
    for learner, block, name in zip(learners, blocks, "12", strict=True):
        block.enter_context(learner.attach(teacher, name))
    blocks[first].close()
    assert not any(p.requires_grad for p in teacher.parameters())
    gradients(learners[1 - first], teacher(IMAGES).mean() + learners[1 - first].dice_loss())
    blocks[1 - first].close()
    assert state_of(teacher) == before
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in teacher.modules())


def test_parameters_of_inference_mode() -> None:
    """They need no gradient to be switched off, and it cannot be switched on again."""
    with torch.inference_mode():
        norm = nn.BatchNorm2d(3)
    teacher, learner = nn.Sequential(norm, nn.Conv2d(3, 4, 1)), learner_of(4)
    before = state_of(teacher)
    with learner.attach(teacher, "1"):
        gradients(learner, teacher(IMAGES).mean() + learner.dice_loss())
    assert state_of(teacher) == before


# Copies, and one model in both roles


def copies(model: nn.Module) -> Iterator[nn.Module]:
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)
    yield torch.optim.swa_utils.AveragedModel(model)
    yield nn.ModuleDict({name: copy.deepcopy(child) for name, child in model.named_children()}).p3


@pytest.mark.parametrize("kind", range(5))
def test_copies_carry_no_live_hook(kind: int) -> None:
    student, teacher = seeded(Yolo), seeded(Yolo)
    with FeatureCapture(student, teacher, "p3") as features:
        student(IMAGES)
        twin, twin_of_teacher = ([*copies(model)][kind] for model in (student, teacher))
        with torch.no_grad():
            teacher(IMAGES)
            twin(IMAGES + 1)
            twin_of_teacher(IMAGES + 1)
        (s,), (t,) = features.take()
        assert s.requires_grad
        assert torch.equal(s, t)
        twin(IMAGES)
        with pytest.raises(RuntimeError, match="the student's 'p3' has not run"):
            features.take()
    learner = learner_of(4)
    with learner.attach(teacher, "p3"):
        plain = [*copies(seeded(Yolo))][kind](IMAGES)
        found = [*copies(teacher)][kind](IMAGES)
        for a, b in zip(found, plain, strict=True):
            assert torch.equal(a, b)
        with pytest.raises(RuntimeError, match="no features seen yet"):
            learner.dice_loss()
        with learner_of(4).attach(next(copies(teacher)), "p3"):  # nor does a copy count as attached
            pass


def test_a_copy_of_a_shallow_kind() -> None:
    student, teacher = seeded(Yolo), seeded(Yolo)
    with FeatureCapture(student, teacher, "p3") as features:
        replica = copy.copy(student)
        replica._modules = {"p3": copy.copy(student.p3), "p4": student.p4}  # as DataParallel makes them
        student(IMAGES)
        teacher(IMAGES)
        replica(IMAGES + 1)
        (s,), _ = features.take()
        assert torch.equal(s, student.p3(IMAGES))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda holder: pickle.loads(pickle.dumps(holder))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("teacher", [lambda: seeded(Yolo), lambda: FrozenTeacher(seeded(Yolo))], ids=["plain", "frozen"])
def test_a_copy_of_what_holds_the_capture(teacher: Callable[[], nn.Module], copied: Callable[[nn.Module], Any]) -> None:
    """Models and capture in one module, copied in the middle of a step: a capture of the copies that is not entered."""
    holder = nn.ModuleDict({"student": seeded(Yolo), "teacher": teacher()})
    holder.capture = FeatureCapture(holder["student"], holder["teacher"], "p3")
    with holder.capture as features:
        holder["student"](IMAGES)
        twin = copied(holder)
        with twin.capture as others:
            twin["student"](IMAGES + 1)
            twin["teacher"](IMAGES + 1)
            (other,), _ = others.take()
        holder["teacher"](IMAGES)
        (s,), (t,) = features.take()
    assert torch.equal(s, t)
    assert torch.equal(other, twin["student"].p3(IMAGES + 1))
    assert all(not m._forward_hooks for m in holder.modules())


def test_models_that_have_changed_since() -> None:
    """Names mean what they mean at the entry of a block."""
    student, teacher = seeded(Yolo), FrozenTeacher(seeded(Yolo))
    block = FeatureCapture(student, teacher, "p3")
    student.p3 = nn.Sequential(OrderedDict(base_layer=student.p3, adapter=nn.Conv2d(4, 4, 1)))
    teacher.model = Yolo()
    with block as features:
        student(IMAGES)
        teacher(IMAGES)
        (s,), (t,) = features.take()
    assert torch.equal(s, student.p3(IMAGES))
    assert torch.equal(t, teacher.model.p3(IMAGES))
    teacher.model = torch.compile(Yolo(), backend="eager")
    with pytest.raises(ValueError, match="the teacher's 'p3' lies inside of a Yolo that is compiled already"):
        block.__enter__()
    student.p3 = None
    with pytest.raises(AttributeError, match="the student Yolo has no module 'p3'"), block:
        pass


@pytest.mark.parametrize("first", ["student", "teacher"])
@pytest.mark.parametrize("teacher", ["no_grad", "frozen", "checkpointed"])
def test_self_distillation(first: str, teacher: str) -> None:
    """One model, two passes: with gradients the student's, without the teacher's, in any order."""
    model = seeded(lambda: Checkpointed("reentrant") if teacher == "checkpointed" else Yolo())
    name = "block" if teacher == "checkpointed" else "p3"
    module = model.get_submodule(name)
    other: nn.Module = FrozenTeacher(model) if teacher == "frozen" else model
    model.requires_grad_(True)

    def run(side: str) -> None:
        if side == "student":
            model(IMAGES)
        else:
            with contextlib.nullcontext() if teacher == "frozen" else torch.no_grad():
                other(IMAGES + 1)

    with FeatureCapture(model, other, name) as features:
        for _ in range(2):
            run(first)
            run("teacher" if first == "student" else "student")
            (s,), (t,) = features.take()
            assert s.requires_grad == (teacher != "checkpointed")
            assert not t.requires_grad
            if name == "p3":
                assert torch.equal(s, module(IMAGES))
                assert torch.equal(t, module(IMAGES + 1))
        run("student")
        run("student")
        with pytest.raises(
            RuntimeError, match=r"the teacher's '\w+' has not run without gradients .* one model: run the teacher's"
        ):
            features.take()


def test_levels_of_one_pass_of_one_model() -> None:
    """The deep levels teach the shallow ones."""
    model = seeded(Yolo)
    with FeatureCapture(model, model, {"p3": "p4"}) as features:
        found = model(IMAGES)
        (s,), (t,) = features.take()
        assert torch.equal(s, found[0])
        assert torch.equal(t, found[1])
        model(IMAGES)
        with torch.no_grad():
            model(IMAGES)
        with pytest.raises(RuntimeError, match="one model, which ran both with and without gradients"):
            features.take()


def test_a_shared_backbone() -> None:
    backbone = seeded(Yolo)
    student, teacher = nn.Sequential(backbone), nn.Sequential(backbone, nn.Identity())
    with FeatureCapture(student, teacher, "0.p3") as features:
        student(IMAGES)
        with torch.no_grad():
            teacher(IMAGES + 1)
        (s,), (t,) = features.take()
    assert torch.equal(s, backbone.p3(IMAGES))
    assert torch.equal(t, backbone.p3(IMAGES + 1))


def test_a_teacher_inside_of_the_student() -> None:
    student = seeded(lambda: nn.ModuleDict({"net": Yolo(), "teacher": FrozenTeacher(Yolo())}))
    student.forward = lambda x: (student["net"](x), student["teacher"](x + 1))
    with FeatureCapture(student, student, {"net.p3": "teacher.p3"}) as features:
        student(IMAGES)
        (s,), (t,) = features.take()
    assert s.requires_grad
    assert torch.equal(s, student["net"].p3(IMAGES))
    assert torch.equal(t, student["teacher"].model.p3(IMAGES + 1))


# Which pass


class Checkpointed(nn.Module):
    """The block in a checkpointed segment with a batch norm behind it; the head in one of its own."""

    def __init__(self, kind: str | None, head: bool = False) -> None:
        super().__init__()
        self.stem, self.block, self.norm, self.head = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 6, 1),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 2, 1),
        )
        self.kind, self.last, self.runs = kind, head, 0

    def _segment(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.norm(self.block(x)).relu()

    def _run(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return part(x) if self.kind is None else checkpoint(part, x, use_reentrant=self.kind == "reentrant")

    def forward(self, x: Tensor) -> Tensor:
        x = self._segment(self.stem(x)) if self.last else self._run(self._segment, self.stem(x))
        return self._run(lambda y: self.head(y).square(), x) if self.last else self.head(x)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_recomputation_is_not_captured(kind: str) -> None:
    student, teacher = seeded(lambda: Checkpointed(kind)), seeded(lambda: Checkpointed(None))
    with FeatureCapture(student, teacher, "block") as features:
        scores = student(IMAGES)
        with torch.no_grad():
            teacher(IMAGES)
        students, teachers = features.take()
        want = students[0].detach().clone()
        loss = scores.square().mean()
        if kind == "non-reentrant":
            loss = loss + (students[0] - teachers[0]).square().mean()
        loss.backward()
        assert student.runs == 2
        with pytest.raises(RuntimeError, match="the student's 'block' has not run since"):
            features.take()
    assert torch.equal(students[0].detach(), want)
    assert student.block.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_call_inside_of_what_is_recomputed(kind: str) -> None:
    """Hooks that are set in the recomputation act in it."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        scores, (level,) = capture.call(model, "block", x)
        return scores.square().mean() + level.square().mean()

    found = []
    for checkpointed in (False, True):
        model, x = seeded(lambda: Checkpointed(None)).eval(), IMAGES.clone().requires_grad_()
        value = checkpoint(loss, model, x, use_reentrant=kind == "reentrant") if checkpointed else loss(model, x)
        value.backward()
        found.append((x.grad, model.block.weight.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_attached_to_a_checkpointed_teacher(kind: str, head: bool) -> None:
    """Inside the block: the gradients of the teacher without checkpoints, whichever part is checkpointed."""
    results = []
    for how in (None, kind):
        teacher, learner = seeded(lambda how=how: Checkpointed(how, head)), learner_of(6)
        x = IMAGES.clone().requires_grad_()
        with learner.attach(teacher, "block"):
            loss = teacher(x).square().mean()
            if kind == "non-reentrant" or how is None or head:
                dice = learner.dice_loss()
            else:
                with pytest.raises(
                    RuntimeError, match=r"dice_loss: the teacher ran without gradients .* \(use_reentrant=False\)"
                ):
                    learner.dice_loss()
                with torch.no_grad():
                    dice = learner.dice_loss()
            if kind == "non-reentrant" or head:
                loss = loss + dice
            results.append([*gradients(learner, loss), x.grad])
            assert torch.equal(
                learner.dice_loss() if dice.requires_grad else dice, dice
            )  # the recomputation has not replaced it
            levels = learner.diagnostics()
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in teacher.modules())
        assert list(levels) == [0]
        assert all(p.grad is None for p in teacher.parameters())
        assert not teacher.norm.running_mean.any()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_backward_after_the_block(kind: str, head: bool) -> None:
    teacher, learner = seeded(lambda: Checkpointed(kind, head)), learner_of(6)
    before = copy.deepcopy(teacher.state_dict())
    with learner.attach(teacher, "block"):
        loss = teacher(IMAGES.clone().requires_grad_()).square().mean()
    sentence = (
        r"attach: backward\(\) recomputes the checkpointed teacher, but the block .* has been left; call backward\(\) inside"
    )
    with pytest.raises(RuntimeError, match=sentence):
        loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    teacher(IMAGES).mean().backward()  # nothing of it stays
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in teacher.modules())
    assert teacher.block.weight.grad is not None
    with learner.attach(teacher, "block"):  # a block of its own again
        gradients(learner, teacher(IMAGES.clone().requires_grad_()).square().mean())


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_one_of_two_backward_passes_after_the_block(kind: str) -> None:
    """One that has been recomputed in the block does not vouch for the other."""
    teacher, learner = seeded(lambda: Checkpointed(kind)), learner_of(6)
    with learner.attach(teacher, "block"):
        losses = [teacher(IMAGES.clone().requires_grad_()).square().mean() for _ in range(2)]
        losses[0].backward()
    with pytest.raises(RuntimeError, match=r"backward\(\) recomputes the checkpointed teacher, but the block"):
        losses[1].backward()
    assert all(p.grad is None for p in teacher.parameters())
    with learner.attach(teacher, "block"):
        losses = [teacher(IMAGES.clone().requires_grad_()).square().mean() for _ in range(2)]
        for loss in losses:
            loss.backward()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in teacher.modules())


def test_a_graph_that_nobody_holds_is_not_waited_for() -> None:
    teacher, learner = seeded(lambda: Checkpointed("non-reentrant")), learner_of(6)
    with learner.attach(teacher, "block"):
        teacher(IMAGES)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in teacher.modules())


def test_recomputed_levels_of_a_shared_head() -> None:
    """Segments are recomputed from the last to the first; levels go by their shapes."""

    class Head(SharedHead):
        def __init__(self, mode: bool | None) -> None:
            super().__init__()
            self.mode = mode

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            run = lambda y: self.tower(y).relu()  # noqa: E731
            parts = [
                run(y) if self.mode is None else checkpoint(run, y, use_reentrant=False) for y in (x, avg_pool2d(x, self.pool))
            ]
            return sum(part.square().mean() for part in parts)

        pool = 2

    results = []
    for mode in (None, False):
        teacher, learner = seeded(lambda mode=mode: Head(mode)), learner_of(4, 4)
        with learner.attach(teacher, "tower"):
            loss = teacher(IMAGES) + learner.dice_loss()
            results.append(gradients(learner, loss))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    teacher.pool = 1
    with (
        learner.attach(teacher, "tower"),
        pytest.raises(RuntimeError, match=r"recomputes 'tower', which ran 2 times .* do not tell"),
    ):
        (teacher(IMAGES) + learner.dice_loss()).backward()


def test_nothing_stays_alive_without_the_garbage_collector() -> None:
    """Not even what no backward pass has freed."""
    alive: list[weakref.ref[Tensor]] = []
    teacher, learner = seeded(Yolo), learner_of(4)
    teacher.p3.register_forward_hook(lambda _module, _inputs, x: alive.append(weakref.ref(x)))
    gc.collect()
    gc.disable()
    try:
        with learner.attach(teacher, "p3"):
            teacher(IMAGES)
        with pytest.raises(RuntimeError, match="3 channels"):
            capture.call(nn.Sequential(teacher.p3, teacher.p3), "0", IMAGES)
        assert [ref() for ref in alive] == [None] * 2
    finally:
        gc.enable()


def test_models_are_freed_without_the_garbage_collector() -> None:
    """No block leaves a cycle that holds them."""
    student, teacher, learner = seeded(Yolo), seeded(Yolo), learner_of(4)
    alive = [weakref.ref(model) for model in (student, teacher)]
    gc.collect()
    gc.disable()
    try:
        with learner.attach(teacher, "p3"):
            gradients(learner, teacher(IMAGES)[1].mean() + learner.dice_loss())
        with FeatureCapture(student, teacher, "p3") as features:
            student(IMAGES)
            teacher(IMAGES)
            features.take()
        capture.call(teacher, "p3", IMAGES)
        del student, teacher, features
        assert [ref() for ref in alive] == [None] * 2
    finally:
        gc.enable()


def test_nothing_stays_alive() -> None:
    student, teacher, learner = seeded(Yolo), seeded(Yolo), learner_of(4)
    alive: list[weakref.ref[Tensor]] = []
    with FeatureCapture(student, teacher, "p3") as features:
        for _ in range(2):
            student(IMAGES)
            with torch.no_grad():
                teacher(IMAGES)
            alive += [weakref.ref(x) for side in features.take() for x in side]
    with learner.attach(teacher, "p3"):
        for _ in range(2):
            images = IMAGES.clone()
            found = teacher(images)
            gradients(learner, found[1].mean() + learner.dice_loss())
            alive += [weakref.ref(x) for x in (images, *found)]
            del images, found
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "inside"])
def test_stage_1_without_gradients(how: str) -> None:
    class Inner(Yolo):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)

    teacher, learner = seeded(Inner if how == "inside" else Yolo), learner_of(4)
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "inside": contextlib.nullcontext}
    with learner.attach(teacher, "p3"):
        with modes[how]():
            teacher(IMAGES)
        with pytest.raises(RuntimeError, match=r"dice_loss: the teacher ran without gradients .* torch\.no_grad\(\)"):
            learner.dice_loss()
        with torch.no_grad():
            assert learner.dice_loss().isfinite()
        learner.eval()
        learner.dice_loss()


def test_a_level_without_gradients() -> None:
    """The others learn, so the sum of the losses does not tell."""

    class Partly(Yolo):
        def forward(self, x: Tensor) -> Any:
            p3 = self.p3(x)
            return p3, checkpoint(self.p4, p3, use_reentrant=True)

    teacher, learner = seeded(Partly), learner_of(4, 6)
    with learner.attach(teacher, ["p3", "p4"]):
        teacher(IMAGES)
        with pytest.raises(RuntimeError, match=r"so the tokens of levels \[1\] get none.*use_reentrant=False"):
            learner.dice_loss()
        learner.mask_modules[1].requires_grad_(False)
        assert learner.dice_loss().requires_grad


def test_hooks_on_saved_tensors_of_ones_own() -> None:
    teacher, learner = seeded(Yolo), learner_of(4)
    keep = functools.partial(lambda x: x)
    with learner.attach(teacher, "p3"), torch.autograd.graph.saved_tensors_hooks(keep, keep):
        gradients(learner, teacher(IMAGES)[1].mean() + learner.dice_loss())


def test_a_block_without_gradients_warns() -> None:
    teacher, learner = seeded(Yolo), learner_of(4)

    def block(*modes: Any) -> None:
        with learner.attach(teacher, "p3"):
            for mode in modes:
                with mode:
                    teacher(IMAGES)

    with pytest.warns(
        UserWarning, match=r"attach: the teacher ran only without gradients in this block.*learner\.eval\(\)"
    ) as seen:
        block(torch.no_grad(), torch.inference_mode())
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block()
        block(torch.no_grad(), contextlib.nullcontext())
        with torch.no_grad():
            block(contextlib.nullcontext())
        learner.eval()
        block(torch.no_grad())
        with pytest.raises(RuntimeError, match="channels"), learner.train().attach(teacher, "p3"), torch.no_grad():
            teacher(teacher(IMAGES)[0])


def test_students_without_gradient_warn_once() -> None:
    criterion = MaskedDistillLoss([4, 4], 3, student_channels=[4, 4], pretrained=learner_of(4, 4))
    teachers = [torch.randn(2, 4, 3, 3) for _ in range(2)]
    students = [torch.randn(2, 4, 3, 3).requires_grad_(), torch.randn(2, 4, 3, 3)]
    with pytest.warns(UserWarning, match=r"student\[1\]: carries no gradient.*detach.*no_grad.*use_reentrant=False") as seen:
        criterion(students, teachers)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(students, teachers)
        fresh = MaskedDistillLoss([4, 4], 3, pretrained=learner_of(4, 4))
        fresh.eval()(students, teachers)
        with torch.no_grad():
            fresh.train()(students, teachers)


# Layers that work in place


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_features_that_are_overwritten(side: str) -> None:
    def net(inplace: bool) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=inplace))

    models = {name: net(name == side).eval() for name in ("student", "teacher")}
    with FeatureCapture(models["student"], models["teacher"], "1") as features:
        models["student"](IMAGES)
        with torch.no_grad():
            models["teacher"](IMAGES)
        with pytest.raises(RuntimeError, match=f"a later layer has overwritten the features of the {side}'s '1' in place"):
            features.take()
    with pytest.raises(RuntimeError, match="overwritten the features of the model's '1'"):
        capture.call(models[side], "1", IMAGES)
    _, (level,) = capture.call(models[side], "2", IMAGES)
    assert (level >= 0).all()


@pytest.mark.parametrize("names", [["1"], ["0", "1", "2"]], ids=["one", "several"])
def test_features_that_are_overwritten_under_inference_mode(names: list[str]) -> None:
    """Tensors do not count their writes there."""
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))).eval()
    normal = net[1](net[0](IMAGES)).detach()
    want = {"0": net[0](IMAGES).detach(), "1": normal, "2": normal.relu()}
    student = seeded(lambda: nn.Sequential(*copy.deepcopy(net)))
    with torch.inference_mode():
        _, levels = capture.call(net, names, IMAGES)
        with FeatureCapture(student, net, names) as features:
            student(IMAGES)
            net(IMAGES)
            both = features.take()
    for found in (levels, *both):
        for name, level in zip(names, found, strict=True):
            torch.testing.assert_close(level.clone(), want[name])


def test_masked_features_before_an_in_place_layer() -> None:
    results = []
    for inplace in (False, True):
        teacher = seeded(lambda inplace=inplace: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace)))
        learner = learner_of(4, standardize=True)
        with learner.calibrate(teacher, "1"):
            teacher(IMAGES)
        with learner.attach(teacher, "1"):
            results.append(
                [learner.mask_modules[0].channel_mean, *gradients(learner, teacher(IMAGES).mean() + learner.dice_loss())]
            )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_captured_in_compiled_code_before_an_in_place_layer() -> None:
    torch._dynamo.reset()
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))).eval()
    want = net[1](net[0](IMAGES))
    _, (level,) = torch.compile(lambda x: capture.call(net, "1", x), backend="aot_eager")(IMAGES)
    torch.testing.assert_close(level, want)


# Compiled models


class Regional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1)
        )
        self.neck = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(self.blocks(x))


def compiled_blocks(in_place: bool) -> nn.Module:
    net = seeded(Regional)
    if in_place:
        net.blocks[1].compile(backend="eager")
    else:
        net.blocks[1] = torch.compile(net.blocks[1], backend="eager")
    return net


@pytest.mark.parametrize("in_place", [True, False])
def test_other_blocks_may_be_compiled(in_place: bool) -> None:
    torch._dynamo.reset()
    teacher, student, learner = compiled_blocks(in_place), compiled_blocks(in_place), learner_of(4)
    teacher(IMAGES)
    norm = teacher.blocks[1]._orig_mod[1] if not in_place else teacher.blocks[1][1]
    before = norm.running_mean.clone()
    for name in ("neck", "blocks.0", "blocks", "blocks.2"):
        with FeatureCapture(student, teacher, name) as features:
            student(IMAGES)
            teacher.eval()(IMAGES)
            assert features.take()[0][0].requires_grad
        teacher.train()
        with learner.attach(teacher, name):
            teacher.train()  # the compiled norm stays in eval mode
            gradients(learner, teacher(IMAGES).mean() + learner.dice_loss())
        assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", ["blocks.1", "blocks.1.0"])
def test_what_cannot_fire_is_refused(name: str, in_place: bool) -> None:
    sentence = f"the \\w+'s '{name}' lies inside of a Sequential that is compiled already"
    with pytest.raises(ValueError, match=f"attach: {sentence}"), learner_of(4).attach(compiled_blocks(in_place), name):
        pass
    with pytest.raises(ValueError, match=f"capture: {sentence}"):
        FeatureCapture(compiled_blocks(in_place), seeded(Regional), name)
    with pytest.raises(ValueError, match=f"capture: {sentence}"):
        capture.call(compiled_blocks(in_place), name, IMAGES)
    frozen = FrozenTeacher(torch.compile(seeded(Regional), backend="eager"))
    with pytest.raises(ValueError, match="lies inside of a Regional that is compiled already"):
        FeatureCapture(seeded(Regional), frozen, "neck")


class Decorated(nn.Module):
    """Its own hooks are called, those inside are not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    @torch.compile(backend="eager")
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def assigned() -> nn.Module:
    body = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1)})
    body.forward = torch.compile(lambda x: body["conv"](x), backend="eager")
    return body


def holding(body: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(body=body, neck=nn.Conv2d(4, 4, 1)))


@pytest.mark.parametrize("body", [Decorated, assigned])
def test_a_compiled_forward(body: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    student, teacher, learner = holding(body()), holding(body()), learner_of(4)
    for model in (student, teacher):
        model(IMAGES)
    sentence = rf"the \w+'s 'body\.conv' lies inside of a {type(teacher.body).__name__} that is compiled already"
    with pytest.raises(ValueError, match=f"attach: {sentence}"), learner.attach(teacher, "body.conv"):
        pass
    with pytest.raises(ValueError, match=f"capture: {sentence}"):
        FeatureCapture(student, teacher, "body.conv")
    for name in ("body", "neck"):
        with FeatureCapture(student, teacher, name) as features:
            student(IMAGES)
            teacher(IMAGES)
            assert features.take()[0][0].requires_grad
        with learner.attach(teacher, name):
            gradients(learner, teacher(IMAGES).mean() + learner.dice_loss())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("frozen", [True, False])
def test_torchscript(frozen: bool) -> None:
    script = torch.jit.script(nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4))).eval())
    teacher, learner = holding(torch.jit.freeze(script) if frozen else script), learner_of(4)
    for name in ("body", *([] if frozen else ["body.conv"])):
        sentence = f"'{name}' lies inside of a Sequential that is scripted already"
        with pytest.raises(ValueError, match=f"attach: the teacher's {sentence}"), learner.attach(teacher, name):
            pass
        with pytest.raises(ValueError, match=f"capture: the model's {sentence}"):
            capture.call(teacher, name, IMAGES)
    with learner.attach(teacher, "neck"):
        gradients(learner, teacher(IMAGES).mean() + learner.dice_loss())
    assert capture.call(teacher, "neck", IMAGES)[1]


FULLGRAPH = pytest.mark.skipif(
    [int(part) for part in torch.__version__.split(".")[:2]] < [2, 13], reason="older versions of torch refuse hooks there"
)


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [False, pytest.param(True, marks=FULLGRAPH)])
def test_compiled_inside_the_block(fullgraph: bool) -> None:
    """Every call gives the features of that call, without compiling again."""
    torch._dynamo.reset()
    student, teacher, learner = seeded(Regional), seeded(Regional).eval(), learner_of(4)
    counter = CompileCounterWithBackend("aot_eager")
    with FeatureCapture(student, teacher, "neck") as features:
        models = [torch.compile(model, backend=counter, fullgraph=fullgraph) for model in (student, teacher)]
        frames = []
        for scale in range(4):
            scores = models[0](scale * IMAGES)
            with torch.no_grad():
                models[1](scale * IMAGES)
            (s,), (t,) = features.take()
            torch.testing.assert_close(s, scores)
            torch.testing.assert_close(t, teacher.neck.forward(teacher.blocks(scale * IMAGES)).detach())
            s.mean().backward()
            frames.append(counter.frame_count)
    assert frames[1] == frames[-1]
    want = learner(teacher.neck(teacher.blocks(IMAGES)).detach())
    with learner.attach(teacher, "neck"):
        compiled = torch.compile(teacher, backend="aot_eager", fullgraph=fullgraph)
        torch.testing.assert_close(compiled(IMAGES), want)
        gradients(learner, learner.dice_loss())


def test_code_that_was_compiled_before() -> None:
    torch._dynamo.reset()
    teacher, learner = seeded(Regional).eval().requires_grad_(False), learner_of(4)
    step = torch.compile(lambda x: teacher(x), backend="eager")
    step(IMAGES)
    with learner.attach(teacher, "neck"):
        step(IMAGES)
        with pytest.raises(RuntimeError, match="not in code that was compiled before"):
            learner.dice_loss()
    student = seeded(Regional)
    with FeatureCapture(student, teacher, "neck") as features:
        student(IMAGES)
        step(IMAGES)
        with pytest.raises(RuntimeError, match=r"'neck' has not run since .*compiled before does not say what runs"):
            features.take()


# Containers


class NestedTensor:
    """DETR's."""

    def __init__(self, tensors: Tensor, mask: Tensor | None) -> None:
        self.tensors, self.mask = tensors, mask


class ImageList:
    """torchvision's (``tensors``) or detectron2's (``tensor``)."""

    def __init__(self, image_sizes: list[tuple[int, int]], **tensors: Tensor) -> None:
        self.image_sizes = image_sizes
        self.__dict__.update(tensors)


WRAPPED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "nested": (lambda x: NestedTensor(x, None), "tensors"),
    "torchvision": (lambda x: ImageList([], tensors=x), "tensors"),
    "detectron2": (lambda x: ImageList([], tensor=x), "tensor"),
}


@pytest.mark.parametrize(
    "container", [lambda x: x, lambda x: [x], lambda x: (x,), lambda x: {"0": x}, lambda x: Record(None, {"0": x})]
)
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_levels(kind: str, container: Callable[[Any], Any]) -> None:
    wrap, field = WRAPPED[kind]
    model, learner = seeded(lambda: Holder(lambda x: container(wrap(x)))), learner_of(4)
    output = "levels" if isinstance(model(IMAGES), Record) else None

    def level_of(result: Any) -> Any:
        result = result.levels if isinstance(result, Record) else result
        return result["0"] if isinstance(result, dict) else result[0] if isinstance(result, list | tuple) else result

    plain = model(IMAGES)
    x = getattr(level_of(plain), field)
    _, (level,) = capture.call(model, "body", IMAGES, output=output)
    assert torch.equal(level, x)
    with learner.attach(model, "body", output=output):
        masked = model(IMAGES)
    assert type(masked) is type(plain)
    assert type(level_of(masked)) is type(level_of(plain))
    assert torch.equal(getattr(level_of(masked), field), learner(x))
    assert torch.equal(getattr(level_of(learner(container(wrap(x)) if output is None else [wrap(x)])), field), learner(x))
    criterion = MaskedDistillLoss(4, 3, pretrained=learner)
    if output is None:
        student = torch.randn_like(x).requires_grad_()
        torch.testing.assert_close(
            criterion(container(wrap(student)), container(wrap(x.detach()))), criterion(student, x.detach())
        )


@pytest.mark.parametrize("kind", ["nested", "nested without", "torchvision", "detectron2"])
def test_forms_of_valid(kind: str) -> None:
    mask = torch.ones(2, 8, 12, dtype=torch.bool)
    mask[1, :, 6:] = False
    sizes = [(8, 12), (8, 6)]
    form = {
        "nested": lambda: NestedTensor(IMAGES, ~mask),
        "nested without": lambda: NestedTensor(IMAGES, None),
        "torchvision": lambda: ImageList(sizes, tensors=IMAGES),
        "detectron2": lambda: ImageList(sizes, tensor=IMAGES),
    }[kind]()
    x, learner = torch.randn(2, 4, 4, 6), learner_of(4)
    want = learner(x, None if kind == "nested without" else mask)
    assert torch.equal(learner(x, form), want)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Identity()

        def forward(self, samples: Any, **_: Any) -> Tensor:
            return self.body(x)

    for valid in ("samples", lambda samples: samples):
        with learner.attach(model := Model(), "body", valid=valid):
            assert torch.equal(model(samples=form), want)


# Valid pixels


class Masked(nn.Module):
    def __init__(self, kind: str | None = None) -> None:
        super().__init__()
        self.body, self.kind = nn.Conv2d(3, 4, 1), kind

    def forward(self, images: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        return self.body(images) if self.kind is None else checkpoint(self.body, images, use_reentrant=self.kind == "reentrant")


def test_valid_pixels_of_recomputations() -> None:
    masks = [torch.rand(2, 8, 12, generator=torch.Generator().manual_seed(i)) > 0.4 for i in range(2)]
    results = []
    for kind in (None, "non-reentrant"):
        teacher, learner = seeded(lambda kind=kind: Masked(kind)), learner_of(4)
        with learner.attach(teacher, "body", valid="pixel_mask"):
            for mask in masks:
                results.append(gradients(learner, teacher(IMAGES, mask).square().mean() + learner.dice_loss()))
    for a, b in zip(results[0] + results[1], results[2] + results[3], strict=True):
        torch.testing.assert_close(a, b)
    with learner.attach(teacher, "body", valid="pixel_mask"):
        losses = [teacher(IMAGES, mask).square().mean() for mask in masks]
        with pytest.raises(
            RuntimeError, match="recomputes one of 2 passes, and it is not known which valid pixels are its own"
        ):
            sum(losses).backward()


@pytest.mark.parametrize(
    ("valid", "error", "sentence"),
    [
        (
            "mask",
            ValueError,
            r"valid: Masked\.forward has no argument 'mask', nor has the model such a module; it has \['images', 'pixel_mask'\]",
        ),
        (torch.ones(2, 8, 12), TypeError, "valid: expected the name of an argument of forward or of a module .*, got Tensor"),
    ],
)
def test_wrong_valid(valid: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence), learner_of(4).attach(Masked(), "body", valid=valid):
        pass


class Wrapped(nn.Module):
    """As DDP: it does not say which arguments it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Masked()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(*args, **kwargs)


class Open(Masked):
    """As transformers' models: it takes any keyword."""

    def forward(self, images: Tensor, pixel_mask: Any = MASK, **_: Any) -> Tensor:
        return self.body(images)


def test_valid_of_any_arguments() -> None:
    """What is not found by its name does not count as all valid."""
    learner, unnamed = learner_of(4), Wrapped()
    with learner.attach(unnamed, "module.body", valid="pixel_mask"):
        with pytest.raises(
            ValueError, match="valid: the Wrapped was called without 'pixel_mask'; give it by keyword, None where"
        ):
            unnamed(IMAGES, MASK)
        want = unnamed(IMAGES, pixel_mask=MASK)
        assert not torch.equal(want, unnamed(IMAGES, pixel_mask=None))
    model = Open()
    model.body.load_state_dict(unnamed.module.body.state_dict())
    with learner.attach(model, "body", valid="pixel_mask"):
        assert torch.equal(model(IMAGES), want)  # its default
    with (
        learner.attach(model, "body", valid="pixel_mosk"),
        pytest.raises(ValueError, match="the Open was called without 'pixel_mosk'"),
    ):
        model(IMAGES, pixel_mask=MASK)


class Transform(nn.Module):
    """As torchvision's: images of any size in, a padded batch and the targets out."""

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[Any, Any]:
        sizes = [(x.shape[1], x.shape[2]) for x in images]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        batch = torch.stack([pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images])
        return ImageList(sizes, tensors=batch), targets


class Detector(nn.Module):
    def __init__(self, kind: str | None = None, late: bool = False) -> None:
        super().__init__()
        self.transform, self.backbone, self.late = Transform(), nn.Conv2d(3, 4, 1), late
        self.run = (lambda x: self.backbone(x).relu()) if kind is None else self._checkpointed

    def _checkpointed(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: self.backbone(y).relu(), x, use_reentrant=False)

    def forward(self, images: list[Tensor], targets: Any = None) -> Tensor:
        if self.late:
            self.backbone(images[0][None])
        batch, targets = self.transform(images, targets)
        return self.run(batch.tensors)


def test_valid_of_a_module_that_pads() -> None:
    results, images = [], [IMAGES[0], IMAGES[1, :, :4]]
    for kind in (None, "checkpointed"):
        teacher, learner = seeded(lambda kind=kind: Detector(kind)), learner_of(4, standardize=True)
        with learner.calibrate(teacher, "backbone", valid="transform"):
            teacher(images)
        assert learner.mask_modules[0].pixels_seen == 8 * 12 + 4 * 12
        with learner.attach(teacher, "backbone", valid="transform"):
            for batch in (images, images[::-1]):
                results.append(gradients(learner, teacher(batch).square().mean() + learner.dice_loss()))
            with pytest.raises(
                RuntimeError, match="valid= is read in a call of the teacher, but 'backbone' ran outside of one"
            ):
                teacher.backbone(IMAGES)
    for i, batch in enumerate((images, images[::-1])):
        padded = teacher.transform(batch)[0]
        masked = learner(teacher.backbone(padded.tensors).detach(), padded)
        want = gradients(learner, masked.relu().square().mean() + learner.dice_loss())
        for a, b, c in zip(want, results[i], results[2 + i], strict=True):
            torch.testing.assert_close(b, a)
            torch.testing.assert_close(c, a)
    plain = padded.tensors.amax(1) > 0  # any mask
    for given in (plain, (padded.tensors, plain), [padded.tensors, plain.int()]):
        teacher.transform.forward = lambda images, targets, given=given: given
        teacher.forward = lambda images: (teacher.transform(images, None), teacher.backbone(padded.tensors))[1]
        with learner.attach(teacher, "backbone", valid="transform"):
            assert torch.equal(teacher(images), learner(teacher.backbone.forward(padded.tensors), plain))
    late = Detector(late=True)
    with (
        learner.attach(late, "backbone", valid="transform"),
        pytest.raises(RuntimeError, match="the module of valid= has not run before 'backbone' in this pass"),
    ):
        late(images)
    teacher.transform.forward = lambda *_: (SimpleNamespace(tensors=IMAGES), None)
    with (
        learner.attach(teacher, "backbone", valid="transform"),
        pytest.raises(TypeError, match="valid: expected a bool tensor"),
    ):
        teacher(images)


def test_valid_needs_a_call_of_the_model() -> None:
    teacher, learner = Masked(), learner_of(4)
    with learner.attach(teacher, "body", valid="pixel_mask"):
        with pytest.raises(RuntimeError, match="valid= is read in a call of the teacher, but 'body' ran outside of"):
            teacher.body(IMAGES)
        with pytest.raises(ValueError, match="valid: expected shape"):
            teacher(IMAGES, torch.ones(2, 3, 8, 12, dtype=torch.bool))
