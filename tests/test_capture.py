"""Features of named modules: in order, of the latest call, and never kept."""

import copy
import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskd_triton import MaskedDistillLoss, MaskLearner, capture
from maskd_triton.capture import FeatureCapture

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Output:
    feature_maps: Any = None
    hidden_states: Any = None


class Body(nn.Module):
    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind, self.fine, self.coarse = kind, nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 1, stride=2)

    def forward(self, x: Tensor) -> Any:
        fine = self.fine(x)
        coarse = self.coarse(fine)
        return {
            "tensor": fine,
            "list": [fine, coarse],
            "tuple": (fine, coarse),
            "dict": {"p3": fine, "p4": coarse},
            "output": Output((fine, coarse), x),
            "hidden": Output(x, (fine, coarse)),
            "entry": {"maps": [fine, coarse], "size": 8},
        }[self.kind]


class Model(nn.Module):
    def __init__(self, kind: str = "list", width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"net": Body(kind, width)})

    def forward(self, x: Tensor) -> Any:
        return self.body["net"](x)


FIELDS = {"hidden": "hidden_states", "entry": "maps"}


@pytest.mark.parametrize("explicit", [False, True], ids=["block", "call"])
@pytest.mark.parametrize("kind", ["tensor", "list", "tuple", "dict", "output", "hidden", "entry"])
def test_outputs(kind: str, explicit: bool) -> None:
    model, field = Model(kind), FIELDS.get(kind)
    body = model.body["net"]
    expected = [body.fine(IMAGES), body.coarse(body.fine(IMAGES))][: 1 if kind == "tensor" else 2]
    if explicit:
        result, levels = capture.call(model, "body.net", IMAGES, output=field)
        assert type(result) is type(model(IMAGES))
    else:
        teacher = copy.deepcopy(model)
        with FeatureCapture(model, teacher, "body.net", output=field) as features:
            model(IMAGES)
            teacher(IMAGES)
            levels, teachers = features.take()
            assert all(torch.equal(a, b) for a, b in zip(levels, teachers, strict=True))
    assert len(levels) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(levels, expected, strict=True))
    assert all(not m._forward_hooks for m in model.modules())


def test_a_training_step_that_keeps_nothing() -> None:
    student, teacher = Model(width=4), Model(width=6)
    criterion = MaskedDistillLoss(6, 3, student_channels=4, pretrained=MaskLearner(6, 3))
    names = {"body.net.coarse": "body.net.coarse"}
    alive: list[weakref.ref[Tensor]] = []
    with FeatureCapture(student, teacher, names) as features:
        for _ in range(3):
            student(IMAGES)
            with torch.no_grad():
                teacher(IMAGES)
            students, teachers = features.take()
            alive += [weakref.ref(x) for x in (*students, *teachers)]
            criterion(students, teachers).backward()
            del students, teachers
    gc.collect()
    assert [ref() for ref in alive] == [None] * 6
    assert student.body["net"].coarse.weight.grad.abs().max() > 0
    assert teacher.body["net"].coarse.weight.grad is None


def test_the_latest_call_counts() -> None:
    model, teacher = Model("tensor"), Model("tensor")
    with FeatureCapture(model, teacher, "body.net") as features:
        teacher(IMAGES)
        model(IMAGES)
        model(2 * IMAGES)
        ((level,), _) = features.take()
        assert torch.equal(level, model.body["net"].fine(2 * IMAGES))
    model(IMAGES)  # no longer seen
    with pytest.raises(RuntimeError, match=r"capture: the student's 'body\.net' has not run since the latest take\(\)"):
        features.take()


def test_hooks_go_when_the_block_raises() -> None:
    model = Model()
    with pytest.raises(KeyError), FeatureCapture(model, model, "body.net"):
        raise KeyError
    with pytest.raises(RuntimeError, match=r"expected input.*to have 3 channels"):
        capture.call(model, "body.net", IMAGES[:, :2])
    assert all(not m._forward_hooks for m in model.modules())


def test_order_of_names() -> None:
    model = Model()
    _, levels = capture.call(model, ["body.net.coarse", "body.net.fine"], IMAGES)
    assert [x.shape[2] for x in levels] == [4, 8]


def test_call_inside_a_compiled_function() -> None:
    model = Model("tensor")

    def step(x: Tensor) -> Tensor:
        result, (level,) = capture.call(model, "body.net.fine", x)
        return result.mean() + level.square().mean()

    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(IMAGES), step(IMAGES))


@pytest.mark.parametrize(
    ("act", "error", "sentence"),
    [
        (
            lambda: FeatureCapture(Model(), Model(), "body.nat"),
            AttributeError,
            "capture: the student Model has no module 'body.nat'; did you mean 'body.net'",
        ),
        (
            lambda: FeatureCapture(Model(), Model(), {"body.net": "head"}),
            AttributeError,
            "the teacher Model has no module 'head'",
        ),
        (lambda: FeatureCapture(Model(), Model(), []), TypeError, "names: expected dotted names of modules, got []"),
        (
            lambda: FeatureCapture(torch.compile(Model()), Model(), "body"),
            ValueError,
            "capture: the student is compiled already",
        ),
        (
            lambda: capture.call(Model("entry"), "body.net", IMAGES, output="map"),
            ValueError,
            "expected levels in the field 'map'",
        ),
        (
            lambda: capture.call(Model("entry"), "body.net", IMAGES),
            TypeError,
            "output of the model's 'body.net'['maps']: expected a tensor, got list",
        ),
        (lambda: capture.call(Model(), "body", IMAGES), RuntimeError, "capture: the model's 'body' has not run in this call"),
    ],
)
def test_errors(act: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        act()
    assert sentence in str(caught.value)


def test_unequal_numbers_of_levels() -> None:
    student, teacher = Model("tensor"), Model("list")
    with FeatureCapture(student, teacher, "body.net") as features:
        with pytest.raises(RuntimeError, match="entered already"):
            features.__enter__()
        student(IMAGES)
        teacher(IMAGES)
        with pytest.raises(ValueError, match="capture: expected as many levels of both models, got 1 and 2"):
            features.take()
