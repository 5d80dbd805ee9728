"""Features of named modules: of the latest pass, as the modules made them, and never kept."""

import contextlib
import copy
import gc
import pickle
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from maskd_triton import FrozenTeacher, MaskedDistillLoss, MaskLearner, capture
from maskd_triton.capture import FeatureCapture
from tests.teachers import IMAGES, Blocks, Checkpointed, SharedHead, Yolo, no_hooks, seeded


def test_a_training_step_that_keeps_nothing() -> None:
    student, teacher = seeded(Yolo), seeded(lambda: Blocks("nhwc"))
    criterion = MaskedDistillLoss(6, 3, student_channels=4, resize="student", pretrained=MaskLearner(6, 3))
    alive: list[weakref.ref[Tensor]] = []
    gc.collect()
    gc.disable()
    try:
        with FeatureCapture(student, teacher, {"p3": "block"}, layout={"teacher": "nhwc"}) as features:
            for _ in range(3):
                student(IMAGES)
                with torch.no_grad():
                    teacher(IMAGES)
                students, teachers = features.take()
                alive += [weakref.ref(x) for x in (*students, *teachers)]
                criterion(students, teachers).backward()
                del students, teachers
        assert [ref() for ref in alive] == [None] * 6
    finally:
        gc.enable()
    assert student.p3.weight.grad.abs().max() > 0
    assert teacher.block.weight.grad is None


def test_the_latest_pass_counts() -> None:
    student, teacher = seeded(SharedHead), seeded(SharedHead)
    with FeatureCapture(student, teacher, ["tower", "body"]) as features:
        with pytest.raises(RuntimeError, match="entered already"):
            features.__enter__()
        teacher(IMAGES)
        student(IMAGES)
        student(2 * IMAGES)
        (fine, coarse, body), teachers = features.take()
    assert len(teachers) == 3  # calls from here on are not seen
    assert torch.equal(body, student.body(2 * IMAGES))
    assert torch.equal(fine, student.tower(body))
    assert torch.equal(coarse, student.tower(avg_pool2d(body, 2)))
    with pytest.raises(RuntimeError, match=r"the student's 'tower', 'body' has not run since the .* inside the `with` block"):
        features.take()


def test_calls_outside_of_a_pass() -> None:
    """The latest call of the module counts; several are not guessed to belong together."""
    student, teacher = seeded(SharedHead), seeded(SharedHead)
    with FeatureCapture(student, teacher, "body") as features:
        for model in (student, teacher):
            model(0 * IMAGES)
            model.extract_feat(IMAGES)
        (s,), _ = features.take()
        assert torch.equal(s, student.body(IMAGES))
    with FeatureCapture(student, teacher, "tower") as features:
        for model in (student, teacher):
            model.extract_feat(IMAGES)
        with pytest.raises(RuntimeError, match="the student's 'tower' ran 2 times outside of a call of the student since"):
            features.take()
        for model in (student, teacher):  # and nothing is left of them
            model(IMAGES)
        assert [len(levels) for levels in features.take()] == [2, 2]


def test_unequal_numbers_of_levels() -> None:
    student, teacher = seeded(Yolo), seeded(SharedHead)
    with FeatureCapture(student, teacher, {"p3": "tower"}) as features:
        student(IMAGES)
        teacher(IMAGES)
        with pytest.raises(ValueError, match="capture: expected as many levels of both models, got 1 and 2"):
            features.take()
    with pytest.raises(ValueError, match="layout: expected a mapping with the keys 'student' and 'teacher', got"):
        FeatureCapture(student, teacher, "p3", layout={"pupil": "nchw"})


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_features_that_are_overwritten(mode: Callable[[], Any]) -> None:
    """Torch counts writes, but not under inference mode: then features are copies."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)).eval()
    plain, student = net[1](net[0](IMAGES)).detach(), nn.Sequential(*copy.deepcopy(net)[:2], nn.ReLU())
    with FeatureCapture(student, net, "1") as features:
        student(IMAGES)
        with mode():
            net(IMAGES)
        if mode is torch.inference_mode:
            assert all(torch.equal(x, plain) for levels in features.take() for x in levels)
        else:
            with pytest.raises(RuntimeError, match="a later layer has overwritten the features of the teacher's '1' in place"):
                features.take()
    with pytest.raises(RuntimeError, match="overwritten the features of the model's '1'"):
        capture.call(net, "1", IMAGES)


@pytest.mark.slow
def test_compiled_features_that_are_overwritten() -> None:
    """As under inference mode: nobody counts, so features are copies."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Identity(), nn.ReLU(inplace=True))
    compiled = torch.compile(lambda x: capture.call(net, "1", x)[1][0], backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), net[0](IMAGES))


@pytest.mark.slow
def test_call_inside_a_compiled_function() -> None:
    model = seeded(SharedHead)

    def step(x: Tensor) -> Tensor:
        (fine, coarse), levels = capture.call(model, ["body", "tower"], x)
        return fine.mean() + coarse.mean() + sum(level.square().mean() for level in levels)

    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(IMAGES), step(IMAGES))


# Levels that a mapping names


class Neck(nn.Module):
    """Levels in a mapping, in any order, or in a list."""

    def __init__(self, *keys: str, listed: bool = False) -> None:
        super().__init__()
        self.conv, self.keys, self.listed = nn.Conv2d(3, 4, 1), keys, listed

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        levels = {"p3": x, "p4": 2 * x, "p5": 3 * x}
        return [levels[key] for key in self.keys] if self.listed else {key: levels[key] for key in self.keys}


class Pyramid(nn.Module):
    """Its neck runs once or twice; a second neck, or none, behind it."""

    def __init__(self, *necks: Neck, calls: int = 1) -> None:
        super().__init__()
        self.necks, self.calls = nn.ModuleList(necks), calls

    def forward(self, x: Tensor) -> None:
        for neck in self.necks:
            for i in range(self.calls):
                neck(x + i)


def taken(student: nn.Module, teacher: nn.Module, names: Any) -> tuple[Any, Any]:
    with FeatureCapture(student, teacher, names) as features:
        student(IMAGES)
        with torch.no_grad():
            teacher(IMAGES)
        return features.take()


NAMED = MaskedDistillLoss({"p3": 4, "p4": 4}, None)
UNNAMED = MaskedDistillLoss([4, 4], None)


def with_masks(criterion: MaskedDistillLoss, student: Any, teacher: Any) -> Tensor:
    """Another mask for either place: the loss tells the order."""
    masks = [torch.linspace(0, 1, 12).expand(2, 1, 8, 12), torch.linspace(3, 1, 12).expand(2, 1, 8, 12)]
    return criterion(student, teacher, masks=masks)


@pytest.mark.parametrize("criterion", [NAMED, UNNAMED], ids=["named", "unnamed"])
@pytest.mark.parametrize("orders", ["p4 p3, p3 p4", "p3 p4, p4 p3", "p4 p3, p4 p3"])
def test_keys_are_kept(orders: str, criterion: MaskedDistillLoss) -> None:
    """The criterion of what was taken is that of what the necks returned."""
    of_student, of_teacher = (order.split() for order in orders.split(", "))
    student, teacher = seeded(lambda: Pyramid(Neck(*of_student))), Pyramid(Neck(*of_teacher))
    students, teachers = taken(student, teacher, "necks.0")
    assert list(students) == list(teachers) == of_teacher
    want = with_masks(criterion, student.necks[0](IMAGES), {k: x.detach() for k, x in teacher.necks[0](IMAGES).items()})
    torch.testing.assert_close(with_masks(criterion, students, teachers), want)
    _, levels = capture.call(student, "necks.0", IMAGES)
    assert list(levels) == of_student
    assert torch.equal(levels["p4"], students["p4"])


def test_a_mapping_and_a_sequence() -> None:
    """As where they are given to the criterion directly: names give both an order; without them it is not known."""
    student, teacher = seeded(lambda: Pyramid(Neck("p3", "p4", listed=True))), Pyramid(Neck("p4", "p3"))
    students, teachers = taken(student, teacher, "necks.0")
    with pytest.raises(TypeError, match="both or neither to be a mapping of levels, got list and dict"):
        with_masks(UNNAMED, students, teachers)
    want = with_masks(NAMED, list(student.necks[0](IMAGES)), {k: x.detach() for k, x in teacher.necks[0](IMAGES).items()})
    torch.testing.assert_close(with_masks(NAMED, students, teachers), want)


def test_keys_of_several_modules_and_calls() -> None:
    students, teachers = taken(
        Pyramid(Neck("p4", "p3"), Neck("p5")), Pyramid(Neck("p3", "p4"), Neck("p5")), ["necks.0", "necks.1"]
    )
    assert list(students) == list(teachers) == ["p3", "p4", "p5"]
    student, teacher = Pyramid(Neck("p4", "p3"), calls=2), Pyramid(Neck("p3", "p4"), calls=2)
    for calls in (1, 2):
        student, teacher = (Pyramid(Neck(*keys), Neck(*keys), calls=calls) for keys in (("p4", "p3"), ("p3", "p4")))
        students, teachers = taken(student, teacher, ["necks.0", "necks.1"])  # a key stands for several levels: lists
        for model, levels in ((student, students), (teacher, teachers)):
            outputs = [neck(IMAGES + i) for neck in model.necks for i in range(calls)]
            want = [output[key] for output in outputs for key in ("p3", "p4")]
            assert all(torch.equal(a, b) for a, b in zip(levels, want, strict=True))


@pytest.mark.parametrize(
    ("student", "teacher", "sentence"),
    [
        ([Neck("p3", "p5")], [Neck("p3", "p4")], r"have the keys of the teacher's, \['p3', 'p4'\], got \['p3', 'p5'\]"),
        ([Neck("p3"), Neck("p4")], [Neck("p4"), Neck("p3")], r"teacher's, \['p4', 'p3'\], got \['p3', 'p4'\]"),
        ([Neck("p3"), Neck("p3")], [Neck("p3"), Neck("p3", listed=True)], r"\['p3', 'no key'\], got \['p3', 'p3'\]"),
        ([Neck("p3", "p4")], [Neck("p3")], r"teacher's, \['p3'\], got \['p3', 'p4'\]"),
        ([Neck("p3", "p4")], [Neck("p3", listed=True)], "as many levels of both models, got 2 and 1"),
    ],
)
def test_other_keys(student: list[Neck], teacher: list[Neck], sentence: str) -> None:
    with pytest.raises(ValueError, match="capture: expected .*" + sentence):
        taken(Pyramid(*student), Pyramid(*teacher), [f"necks.{i}" for i in range(len(student))])


# The teacher's mode


class Noisy(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.p3, self.layer = nn.Conv2d(3, 4, 1), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.p3(x))


class FrozenBatchNorm2d(nn.Identity):
    """By its name torchvision's, which is the same in both modes."""


QUIET = [nn.Dropout(0.0), nn.InstanceNorm2d(4), FrozenBatchNorm2d()]


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.Dropout(0.1), *QUIET])
def test_a_teacher_in_train_mode_warns_once(layer: nn.Module) -> None:
    student, teacher = seeded(Yolo), seeded(lambda: Noisy(layer)).train()

    def step(features: FeatureCapture, frozen: nn.Module) -> None:
        student(IMAGES)
        frozen(IMAGES)
        features.take()

    with FeatureCapture(student, teacher, "p3") as features:
        if layer not in QUIET:
            with pytest.warns(
                UserWarning, match=r"capture: the teacher ran with its 'layer' \(\w+\) in train mode: .* call teacher\.eval\(\)"
            ) as seen:
                step(features, teacher)
            assert seen[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(features, teacher)
    with warnings.catch_warnings(), FeatureCapture(student, frozen := FrozenTeacher(teacher), "p3") as features:
        warnings.simplefilter("error")
        teacher.train()
        step(features, frozen)


def test_the_mode_of_the_pass_counts() -> None:
    """Not that of take(): a batch norm has moved by then."""
    student, teacher = seeded(Yolo), seeded(lambda: Noisy(nn.BatchNorm2d(4))).eval()
    with FeatureCapture(student, teacher, "p3") as features, warnings.catch_warnings():
        warnings.simplefilter("error")
        student(IMAGES)
        teacher(IMAGES)
        teacher.train()
        features.take()
        student(IMAGES)
        teacher.p3(IMAGES)
        teacher.eval()
        with pytest.raises(UserWarning, match=r"the teacher ran with its 'layer' \(BatchNorm2d\) in train"):
            features.take()


def test_a_call_of_a_teacher_in_train_mode() -> None:
    """A model whose features have no gradient is none that trains."""
    model = seeded(lambda: Noisy(nn.BatchNorm2d(4))).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture.call(model, "p3", IMAGES)
        frozen = FrozenTeacher(model)
        model.train()
        capture.call(frozen, "p3", IMAGES)
    model.train()
    with torch.no_grad(), pytest.warns(UserWarning, match="capture: the model ran with its 'layer' .* call model.eval") as seen:
        capture.call(model, "p3", IMAGES)
    assert seen[0].filename == __file__


# One model in both roles


@pytest.mark.parametrize("first", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["no_grad", "frozen", "checkpointed"])
def test_self_distillation(first: str, kind: str) -> None:
    """One model, two passes: with gradients the student's, without the teacher's, in any order."""
    model = seeded(lambda: Checkpointed("reentrant") if kind == "checkpointed" else Yolo())
    name = "block" if kind == "checkpointed" else "p3"
    other: nn.Module = FrozenTeacher(model) if kind == "frozen" else model
    model.requires_grad_(True).train()

    def run(side: str) -> None:
        if side == "student":
            model(IMAGES)
        else:
            with contextlib.nullcontext() if kind == "frozen" else torch.no_grad():
                other(IMAGES + 1)

    with FeatureCapture(model, other, name) as features:
        for _ in range(2):
            run(first)
            run("teacher" if first == "student" else "student")
            (s,), (t,) = features.take()
            assert s.requires_grad == (kind != "checkpointed")
            assert not t.requires_grad
            if name == "p3":
                assert torch.equal(s, model.p3(IMAGES))
                assert torch.equal(t, model.p3(IMAGES + 1))
        run("student")
        with pytest.raises(RuntimeError, match=r"the teacher's '\w+' has not run without gradients .* one model: run the"):
            features.take()


def test_levels_of_one_pass_of_one_model() -> None:
    """The deep levels teach the shallow ones."""
    model = seeded(Yolo)
    with FeatureCapture(model, model, {"p3": "p4"}) as features:
        found = model(IMAGES)
        (s,), (t,) = features.take()
    assert s is found[0]
    assert t is found[1]


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


# Models that change, and copies


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
    student.p3 = None
    with pytest.raises(AttributeError, match="the student Yolo has no module 'p3'"), block:
        pass


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda holder: pickle.loads(pickle.dumps(holder))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_what_holds_the_capture(copied: Callable[[nn.Module], Any]) -> None:
    """Models and capture in one module, copied in the middle of a step: a capture of the copies that is not entered."""
    holder = nn.ModuleDict({"student": seeded(Yolo), "teacher": FrozenTeacher(seeded(Yolo))})
    holder.capture = FeatureCapture(holder["student"], holder["teacher"], "p3")
    with holder.capture as features:
        holder["student"](IMAGES)
        twin = copied(holder)
        with pytest.raises(RuntimeError, match="capture: this is a copy; enter it"):
            twin.capture.take()
        with twin.capture as others:
            twin["student"](IMAGES + 1)
            twin["teacher"](IMAGES + 1)
            (other,), _ = others.take()
        holder["teacher"](IMAGES)
        (s,), (t,) = features.take()
    assert torch.equal(s, t)
    assert torch.equal(other, twin["student"].p3(IMAGES + 1))
    assert no_hooks(holder)
