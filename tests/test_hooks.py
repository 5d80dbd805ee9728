"""Reaching into models: what `attach` and capture share, by the chapters of docs/reaching-into-models.md."""

import copy
import dataclasses
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import avg_pool2d
from torch.utils.checkpoint import checkpoint

from maskd_triton import MaskedDistillLoss, MaskLearner, capture
from maskd_triton.capture import FeatureCapture
from tests.teachers import IMAGES, Blocks, Checkpointed, NestedTensor, Yolo, gradients, learner_of, no_hooks, seeded


class Holder(nn.Module):
    """Its body returns levels as ``wrap`` has them."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), Wrapper(wrap))

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Wrapper(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x)


# Which modules, which part


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("p3", r"has no module 'p3'; did you mean 'module\.net\.p3'\?"),  # as DDP or an adapter wraps it
        ("module.nett", r"did you mean 'module\.net'"),
        ("module.net[0]", r"did you mean 'module\.net'"),
        ("zzz", r"the model ModuleDict has no module 'zzz'; it has \['module'\]"),
    ],
)
def test_near_names(name: str, sentence: str) -> None:
    model = nn.ModuleDict({"module": nn.ModuleDict({"net": Yolo()})})
    with pytest.raises(AttributeError, match=sentence):
        capture.call(model, name, IMAGES)


Pair = namedtuple("Pair", "other levels")


@dataclasses.dataclass
class Record:
    other: Any
    levels: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    levels: Any


@dataclasses.dataclass
class Output:
    """A model output as transformers has them: levels beside other things."""

    feature_maps: Any
    loss: Any = None


PARTS: dict[str, tuple[Callable[[Tensor], Any], Any, Callable[[Any], Any]]] = {
    "tuple": (lambda x: (x, None), 0, lambda r: r[0]),
    "from the end": (lambda x: (None, [x]), -1, lambda r: r[-1][0]),
    "list": (lambda x: ["a", x], 1, lambda r: r[1]),
    "named tuple": (lambda x: Pair(1, x), "levels", lambda r: r.levels),
    "named tuple by position": (lambda x: Pair(1, x), 1, lambda r: r.levels),
    "dataclass": (lambda x: Record(1, [x]), "levels", lambda r: r.levels[0]),
    "frozen dataclass": (lambda x: Frozen(x), "levels", lambda r: r.levels),
    "feature maps": (lambda x: Output((x,), 3), None, lambda r: r.feature_maps[0]),
    "key": (lambda x: OrderedDict(a=1, levels=x), "levels", lambda r: r["levels"]),
    "number as a key": (lambda x: {7: x, 8: 1}, 7, lambda r: r[7]),
    "object": (lambda x: SimpleNamespace(levels=x, other=2), "levels", lambda r: r.levels),
    "result of torch": (lambda x: x[..., None].max(-1), 0, lambda r: r.values),
    "NestedTensor": (lambda x: NestedTensor(x), None, lambda r: r.tensors),
    "mapping of NestedTensors": (lambda x: {"0": NestedTensor(x)}, None, lambda r: r["0"].tensors),
    "NestedTensors in a tuple": (lambda x: ([NestedTensor(x)], 1), 0, lambda r: r[0][0].tensors),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_of_an_output(kind: str) -> None:
    """Levels are found and replaced; all else is passed through, in a container of the same type."""
    wrap, output, read = PARTS[kind]
    model, learner = seeded(lambda: Holder(wrap)), learner_of(4)
    plain = model(IMAGES)
    _, levels = capture.call(model, "body", IMAGES, output=output)
    (level,) = levels.values() if isinstance(levels, dict) else levels
    assert torch.equal(level, read(plain))
    with learner.attach(model, "body", output=output):
        masked = model(IMAGES)
    assert type(masked) is type(plain)
    assert torch.equal(read(masked), learner(read(plain)))
    if isinstance(masked, tuple | list | dict):
        assert len(masked) == len(plain)


@pytest.mark.parametrize(
    ("wrap", "output", "sentence"),
    [
        (lambda x: (x, None), None, "[1]: expected a tensor, got NoneType (output= names the part that holds the levels)"),
        (lambda x: (x, None), 2, "expected levels in output=2 of tuple, which has 2 entries"),
        (lambda x: x, 0, "expected levels in output=0 of Tensor, which has no such parts"),
        (lambda x: {"a": x, "b": 3}, "c", "output='c' of dict, which has 'a' (Tensor), 'b' (int)"),
        (lambda x: Record(x, None), "levels", "output='levels' of Record, which has 'other' (Tensor), 'levels' (NoneType)"),
        (lambda x: Record(x, None), 0, "expected levels in output=0 of Record"),
        (lambda x: Output(None), None, "got NoneType (output= names the part"),
        (lambda x: 3, None, "expected a tensor, or a sequence or mapping of tensors, got int"),
    ],
)
def test_parts_that_are_not_there(wrap: Any, output: Any, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        capture.call(Holder(wrap), "body", IMAGES, output=output)
    assert str(caught.value).startswith("output of the model's 'body'")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"names": []}, TypeError, "names: expected dotted names of modules, as in model.named_modules(), got []"),
        ({"names": nn.ReLU()}, TypeError, "as in model.named_modules(), got a module, ReLU"),
        ({"output": 1.5}, TypeError, "output: expected one field, key or position, got 1.5"),
        ({"output": ("a", 0)}, TypeError, "output: expected one field, key or position, got ('a', 0); name a module further"),
        ({"layout": "hwc"}, ValueError, "layout: expected one of 'nchw', 'nhwc', 'tokens'"),
        ({"grid": (2, 2)}, ValueError, "grid, prefix_tokens: only layout='tokens' has them"),
        ({"layout": "tokens", "prefix_tokens": -1}, ValueError, "prefix_tokens: expected an int of at least 0"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    model, options = Yolo(), {"names": "p3"} | options
    with pytest.raises(error) as caught:
        FeatureCapture(model, model, **options)
    assert sentence in str(caught.value)
    with pytest.raises(error) as caught, learner_of(4).attach(model, **options):
        pass
    assert sentence in str(caught.value)


class Inlined(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        layers = nn.Conv2d(3, 4, 1), nn.ReLU()
        self.neck = kind(layers) if kind is nn.ModuleList else kind(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.neck[1](self.neck[0](x))


WITHOUT_PARENT: dict[str, Callable[[], nn.Module]] = {
    "torch.fx": lambda: torch.fx.symbolic_trace(Inlined(nn.Sequential)),
    "ModuleList": lambda: Inlined(nn.ModuleList),
}


@pytest.mark.parametrize("build", WITHOUT_PARENT.values(), ids=WITHOUT_PARENT)
def test_children_that_are_called_without_their_parent(build: Callable[[], nn.Module]) -> None:
    """A container is named, but never called: the error names a child."""
    student, teacher, learner = build(), build(), learner_of(4)
    sentence = r"if a part is not called, but its children are, as by torch\.fx, name one of them, like 'neck\.1'"
    with FeatureCapture(student, teacher, "neck") as features:
        student(IMAGES)
        teacher(IMAGES)
        with pytest.raises(RuntimeError, match=f"the student's 'neck' has not run since.*{sentence}"):
            features.take()
    with learner.attach(teacher, "neck"):
        teacher(IMAGES)
        with pytest.raises(RuntimeError, match=f"dice_loss: no features seen yet in this block; .*{sentence}"):
            learner.dice_loss()
    with (
        pytest.raises(RuntimeError, match=f"calibrate: level 0: no features seen; .*{sentence}"),
        learner_of(4, standardize=True).calibrate(teacher, "neck"),
    ):
        teacher(IMAGES)
    with learner.attach(teacher, "neck.1"):
        gradients(learner, teacher(IMAGES).mean() + learner.dice_loss())


# In what layout


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
    got.relu_()  # masked features are new tensors, to which a layer may write
    (got.square().sum() + dice).backward()
    assert learner.mask_modules[0].mask_token.grad.abs().max() > 0


class Given(nn.Module):
    """Gives what it is given, as its block's output."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Identity()

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return self.block(x)


TOKENS = {"layout": "tokens"}
WRONG_LAYOUTS: list[tuple[tuple[int, ...], dict[str, Any], str]] = [
    ((2, 4, 6, 8), {}, "expected [N, 8, H, W] (layout='nchw'), got shape [2, 4, 6, 8]; the shape fits layout='nhwc'"),
    ((2, 24, 8), {}, "expected [N, 8, H, W] (layout='nchw'), got shape [2, 24, 8]; the shape fits layout='tokens'"),
    ((2, 8, 4, 6), {"layout": "nhwc"}, "expected [N, H, W, 8] (layout='nhwc'), got shape [2, 8, 4, 6]; the shape fits layout='nchw'"),
    ((2, 8, 4, 6), TOKENS, "expected [N, L, 8] (layout='tokens'), got shape [2, 8, 4, 6]; the shape fits layout='nchw'"),
    ((2, 4, 6, 5), {}, "expected 8 channels, got 4"),
    ((2, 25, 8), TOKENS | {"grid": (4, 6)}, "expected 0 + 4 * 6 tokens (prefix_tokens, grid), got 25"),
    ((2, 20, 8), TOKENS | {"grid": (4, 6)}, "expected 0 + 4 * 6 tokens (prefix_tokens, grid), got 20"),
    ((2, 24, 8), TOKENS, "no images [N, C, H, W] among the arguments of the model's call; give grid=(h, w)"),
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
        ((16, 24), 25, "25 tokens are no grid of square patches of 16x24 images; give grid=(h, w), or prefix_tokens="),
        ((15, 24), 24, "24 tokens are no grid of square patches of 15x24 images; give grid=(h, w)"),
    ],
)
def test_grids_that_are_not_found(images: tuple[int, int], tokens: int, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        capture.call(Given(), "block", torch.zeros(1, tokens, 8), torch.zeros(1, 3, *images), layout="tokens")
    assert sentence in str(caught.value)


def test_rows_and_columns_of_a_grid_that_were_swapped() -> None:
    """Where the patches of the images would be square the other way round; other patches may have any shape."""
    where: dict[str, Any] = {"layout": "tokens", "grid": (6, 4)}
    x = torch.zeros(1, 24, 8)
    with pytest.raises(ValueError, match=r"grid=\(6, 4\) does not fit images of 32x48 pixels; .* give grid=\(4, 6\)"):
        capture.call(Given(), "block", x, torch.zeros(1, 3, 32, 48), **where)
    for images in ((48, 32), (48, 48), (24, 60)):
        _, (level,) = capture.call(Given(), "block", x, torch.zeros(1, 3, *images), **where)
        assert level.shape == (1, 8, 6, 4)


# What is no pass


@contextmanager
def both_stages(student: nn.Module, teacher: nn.Module, name: str) -> Iterator[tuple[FeatureCapture, MaskLearner]]:
    learner = learner_of(4)
    with FeatureCapture(student, teacher, name) as features, learner.attach(teacher, name):
        yield features, learner


def copies(model: nn.Module) -> Iterator[nn.Module]:
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    yield torch.optim.swa_utils.AveragedModel(model)
    shallow = copy.copy(model)  # as DataParallel makes them
    shallow._modules = {name: copy.copy(child) for name, child in model.named_children()}
    yield shallow


@pytest.mark.parametrize("kind", range(4))
def test_copies_carry_no_live_hook(kind: int) -> None:
    student, teacher = seeded(Yolo), seeded(Yolo)
    plain = [x.detach() for x in teacher(IMAGES + 1)]
    with both_stages(student, teacher, "p3") as (features, learner):
        student(IMAGES)
        twins = [[*copies(model)][kind] for model in (student, teacher)]
        teacher(IMAGES)
        dice = learner.dice_loss()
        for twin in twins:
            assert all(torch.equal(a, b) for a, b in zip(twin(IMAGES + 1), plain, strict=True))
        (s,), (t,) = features.take()
        assert torch.equal(s, student.p3(IMAGES))
        assert torch.equal(t, learner(teacher.p3.forward(IMAGES)))
        assert torch.equal(learner.dice_loss(), dice)
    assert no_hooks(student, teacher)


TRACES: dict[str, Callable[[nn.Module], Any]] = {
    "export": lambda model: torch.export.export(model, (IMAGES,), strict=False),
    "strict export": lambda model: torch.export.export(model, (IMAGES,), strict=True),
    "make_fx": lambda model: make_fx(model)(IMAGES),
    "fx": torch.fx.symbolic_trace,
    "jit": lambda model: torch.jit.trace(model, IMAGES),
}


def fake_tensors(model: nn.Module) -> None:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(IMAGES))


def fake_images(model: nn.Module) -> None:
    """Fake tensors outside of their mode."""
    model(torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True).from_tensor(IMAGES))


def meta_parameters(model: nn.Module) -> None:
    parameters = {name: p.to("meta") for name, p in model.named_parameters()}
    torch.func.functional_call(model, parameters, (IMAGES.to("meta"),))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "trace",
    [
        *(pytest.param(trace, id=kind, marks=[pytest.mark.slow] * ("export" in kind)) for kind, trace in TRACES.items()),
        *(fake_tensors, fake_images, meta_parameters),
    ],
)
def test_a_trace_is_no_pass(trace: Callable[[nn.Module], Any]) -> None:
    """What an export leaves behind is never handed out as features; those of the pass before it still are."""
    student, teacher = seeded(Yolo), seeded(Yolo)
    with both_stages(student, teacher, "p3") as (features, learner):
        student(IMAGES)
        teacher(IMAGES)
        want = learner.dice_loss()
        trace(student)
        trace(teacher)
        (s,), (t,) = features.take()
        assert torch.equal(s, student.p3(IMAGES))
        assert torch.equal(t, learner(teacher.p3.forward(IMAGES)))
        learner(teacher.p3.forward(IMAGES))
        assert torch.equal(learner.dice_loss(), want)
    with FeatureCapture(student, teacher, "p3") as features:
        trace(student)
        teacher(IMAGES)
        with pytest.raises(RuntimeError, match=r"the student's 'p3' has not run .* nor in a trace \(torch.export,"):
            features.take()
    learner = learner_of(4, standardize=True)
    with learner.calibrate(teacher, "p3"):
        teacher(IMAGES)
        trace(teacher)
    assert learner.mask_modules[0].pixels_seen == 2 * 8 * 12
    torch.testing.assert_close(learner.mask_modules[0].channel_mean, teacher.p3(IMAGES).mean((0, 2, 3)))


@pytest.mark.parametrize("trace", [TRACES["export"], fake_images])
def test_a_trace_of_a_container_calls_it(trace: Callable[[nn.Module], Any]) -> None:
    """It was called with its children, if only in a trace: to name a child helps nobody."""
    student, teacher = (nn.Sequential(OrderedDict(neck=nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))) for _ in range(2))
    learner = learner_of(4)
    sentence = "run the {} inside the `with` block, and neither in code that was compiled before it nor in a trace"
    with FeatureCapture(student, teacher, "neck") as features:
        trace(student)
        with pytest.raises(RuntimeError, match=sentence.format("student")):
            features.take()
    with learner.attach(teacher, "neck"):
        trace(teacher)
        with pytest.raises(RuntimeError, match="dice_loss: no features seen yet in this block; " + sentence.format("teacher")):
            learner.dice_loss()


def test_fake_images_where_features_of_them_are_asked_for() -> None:
    for device in ("meta", "fake"):
        mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
        images = IMAGES.to("meta") if device == "meta" else mode.from_tensor(IMAGES)
        model = Yolo().to("meta") if device == "meta" else Yolo()
        _, (p3, p4) = capture.call(model, ["p3", "p4"], images)
        assert (p3.shape, p4.shape) == ((2, 4, 8, 12), (2, 6, 4, 6))


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "vmap": lambda model: torch.vmap(lambda x: model(x[None]))(IMAGES),
    "grad": lambda model: torch.func.grad(lambda x: model(x)[1].sum())(IMAGES),
    "functionalize": lambda model: torch.func.functionalize(model)(IMAGES),
    "jvp": lambda model: torch.func.jvp(model, (IMAGES,), (IMAGES,)),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_a_transform_that_is_over(kind: str) -> None:
    """Its tensors live as long as it does: what is left of them is never handed out."""
    student, teacher = seeded(Yolo), seeded(Yolo)
    with both_stages(student, teacher, "p3") as (features, learner):
        for model in (student, teacher):
            model(IMAGES)
            TRANSFORMS[kind](model)
        with pytest.raises(RuntimeError, match=r"capture: the student ran inside of a transform of torch\.func"):
            features.take()
        for read in (learner.dice_loss, learner.diagnostics):
            with pytest.raises(
                RuntimeError, match=r": the teacher ran inside of a transform .* over, .* read them inside of it"
            ):
                read()
        for model in (student, teacher):
            model(IMAGES)
        assert features.take()[0][0].requires_grad
        learner.dice_loss().backward()
    with (
        pytest.raises(RuntimeError, match="calibrate: the teacher runs inside of a transform"),
        learner_of(4, standardize=True).calibrate(teacher, "p3"),
    ):
        TRANSFORMS[kind](teacher)


def test_inside_of_a_transform() -> None:
    student, teacher, parameters = seeded(Yolo), seeded(Yolo), dict(seeded(Yolo).named_parameters())
    with FeatureCapture(student, teacher, "p3") as features:
        with torch.no_grad():
            teacher(IMAGES + 1)

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            torch.func.functional_call(student, parameters, (IMAGES,))
            (s,), (t,) = features.take()
            return (s - t).square().mean()

        got = torch.func.grad(loss)(parameters)
    (student.p3(IMAGES) - teacher.p3(IMAGES + 1)).square().mean().backward()
    torch.testing.assert_close(got["p3.weight"], student.p3.weight.grad)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_recomputation_is_not_captured(kind: str) -> None:
    student, teacher = seeded(lambda: Checkpointed(kind)), seeded(lambda: Checkpointed(None)).eval()
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


def test_a_pass_that_raises_leaves_no_trace() -> None:
    """As one that runs out of memory in its middle, and is repeated with half the batch."""

    class Failing(Yolo):
        fails = True

        def forward(self, x: Tensor) -> Any:
            p3, fails = self.p3(x), self.fails
            self.fails = False
            if fails:
                raise torch.OutOfMemoryError
            return self.p4(p3)

    student, teacher, learner = seeded(Failing), seeded(Failing), learner_of(4, 6)
    with FeatureCapture(student, teacher, ["p3", "p4"]) as features, learner.attach(teacher, ["p3", "p4"]):
        for model in (student, teacher):
            with pytest.raises(torch.OutOfMemoryError):
                model(IMAGES)
            y = model(IMAGES[:1])
        assert [len(x) for levels in features.take() for x in levels] == [1] * 4
        gradients(learner, y.mean() + learner.dice_loss())
    assert no_hooks(student, teacher)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_hooks_go_when_the_block_raises(error: type[BaseException]) -> None:
    student, teacher = seeded(Yolo), seeded(Yolo)
    with pytest.raises(error), both_stages(student, teacher, "p3"):
        raise error
    with pytest.raises(RuntimeError, match=r"expected input.*to have 3 channels"):
        capture.call(student, "p3", IMAGES[:, :2])
    assert no_hooks(student, teacher)
    assert all(p.requires_grad for p in teacher.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_torchscript_inside_of_a_model() -> None:
    """Torch lets nobody hook it; what stands beside it can be named."""
    script = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()))
    teacher, learner = nn.ModuleDict({"neck": nn.Conv2d(3, 3, 1), "body": script}), learner_of(3)
    teacher.forward = lambda x: teacher["body"](teacher["neck"](x))
    sentence = (
        "attach: the teacher's 'body' is TorchScript, which takes no hooks; give the model that it was made of, or wrap it"
    )
    with pytest.raises(TypeError, match=sentence), learner_of(3, 4).attach(teacher, ["neck", "body"]):
        pass
    assert no_hooks(teacher["neck"])
    with learner.attach(teacher, "neck"):
        gradients(learner, teacher(IMAGES).mean() + learner.dice_loss())
    with (whole := learner_of(4)).attach(teacher, ""):
        gradients(whole, teacher(IMAGES).mean() + whole.dice_loss())
    for model, name, what in ((script, "", "student"), (script, "0", "student"), (teacher, "body.0", "student's 'body.0'")):
        with pytest.raises(TypeError, match=f"capture: the {what} is TorchScript"), FeatureCapture(model, teacher, name):
            pass
    with pytest.raises(TypeError, match=r"capture: model: expected an nn\.Module, got function"):
        capture.call(lambda x: x, "p3", IMAGES)


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


def compiled_blocks(in_place: bool) -> Any:
    net = seeded(Regional)
    if in_place:
        net.blocks[1].compile(backend="eager")
    else:
        net.blocks[1] = torch.compile(net.blocks[1], backend="eager")
    return net


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapped", "function"])
def test_code_that_was_compiled_before(how: str) -> None:
    """It does not see hooks: then no features come, and that is said."""
    torch._dynamo.reset()
    student, teacher, learner = seeded(Regional), seeded(Regional).eval().requires_grad_(False), learner_of(4)
    if how == "wrapped":
        teacher.blocks[1] = torch.compile(teacher.blocks[1], backend="eager")
    run = torch.compile(lambda x: teacher(x), backend="eager") if how == "function" else teacher
    plain = run(IMAGES)
    with FeatureCapture(student, teacher, "blocks.1.0") as features:
        student(IMAGES)
        run(IMAGES)
        with pytest.raises(RuntimeError, match=r"'blocks\.1\.0' has not run since .* code that was compiled before"):
            features.take()
    with learner.attach(teacher, "blocks.1.0"):
        assert torch.equal(run(IMAGES), plain)
        with pytest.raises(RuntimeError, match=r"no features seen yet in this block; .* code that was compiled before"):
            learner.dice_loss()


FULLGRAPH = pytest.mark.skipif(
    [int(part) for part in torch.__version__.split(".")[:2]] < [2, 13], reason="older versions of torch refuse hooks there"
)


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [False, pytest.param(True, marks=FULLGRAPH)])
def test_compiled_inside_the_block(fullgraph: bool) -> None:
    """Every call gives the features of that call, without compiling again; after the block nothing is masked."""
    torch._dynamo.reset()
    student, teacher, learner = seeded(Regional), seeded(Regional).eval(), learner_of(4)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
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
    plain, valid = teacher(IMAGES), torch.rand(2, 8, 12) > 0.3
    want = learner(teacher.neck(teacher.blocks(IMAGES)).detach())
    compiled = torch.compile(teacher, backend="aot_eager", fullgraph=fullgraph)
    with learner.attach(teacher, "neck"):
        torch.testing.assert_close(compiled(IMAGES), want)
        gradients(learner, learner.dice_loss())
    torch.testing.assert_close(compiled(IMAGES), plain)
    with learner.attach(teacher, "neck", valid=lambda _: valid):
        teacher.compile(backend="aot_eager", fullgraph=fullgraph)
        torch.testing.assert_close(teacher(IMAGES), learner(plain.detach(), valid))


def test_levels_of_a_pyramid_that_a_mapping_names() -> None:
    """Named levels: a mapping must have these names, in any order; state dicts are numbered."""
    teacher = seeded(lambda: Holder(lambda x: {"p4": avg_pool2d(x[:, :3], 2), "p3": x}))
    learner = MaskLearner({"p3": 4, "p4": 3}, num_tokens=3)
    assert {name.split(".")[1] for name in learner.state_dict()} == {"0", "1"}
    with learner.attach(teacher, "body"):
        masked = teacher(IMAGES)
        assert set(learner.diagnostics()) == {"p3", "p4"}
    assert list(masked) == ["p4", "p3"]
    plain = teacher(IMAGES)
    for i, name in enumerate(("p3", "p4")):
        assert torch.equal(masked[name], learner.mask_modules[i](plain[name])[0])
    criterion = MaskedDistillLoss({"p3": 4, "p4": 3}, 3, pretrained=learner)
    criterion({name: x.detach().requires_grad_() for name, x in masked.items()}, {n: x.detach() for n, x in plain.items()})
    other = Holder(lambda x: {"p3": x, "p5": x})
    with (
        learner.attach(other, "body"),
        pytest.raises(ValueError, match=r"expected the levels \['p3', 'p4'\], got \['p3', 'p5'\]"),
    ):
        other(IMAGES)
