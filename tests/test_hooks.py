"""Reaching into models, by the chapters of docs/reaching-into-models.md."""

import copy
import dataclasses
from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from maskd_triton import MaskLearner, capture
from maskd_triton.capture import FeatureCapture

IMAGES = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))


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


# Where


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


@pytest.mark.parametrize(
    ("wrap", "output", "sentence"),
    [
        (lambda x: (x, None), None, "[1]: expected a tensor, got NoneType (output= names the part that holds the levels)"),
        (lambda x: (x, None), 2, "expected a part at position 2 (output=), got 2 of them"),
        (lambda x: x, 0, "expected a sequence 0, got Tensor"),
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
