"""FrozenTeacher: what users do to the module that holds it, and to the raw model, leaves the teacher as it was."""

import copy
import io
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from maskd_triton import FrozenTeacher, MaskLearner, capture
from maskd_triton.capture import FeatureCapture

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 2, 1))
    net.register_buffer("scale", torch.arange(3))  # not all buffers are floats
    return net


def holder(teacher: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"student": nn.Conv2d(3, 4, 1), "teacher": FrozenTeacher(teacher)})


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")  # type: ignore[return-value]


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda net: net, "compiled": compiled, "in place": compiled_in_place, "frozen twice": FrozenTeacher,
}  # fmt: skip
SLOW = {"compiled", "in place"}
EVERY_KIND = pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS])


@EVERY_KIND
@pytest.mark.parametrize("assigned", [False, True])
def test_nothing_of_it_is_registered(kind: str, assigned: bool) -> None:
    net = network()
    model = holder(net if assigned else KINDS[kind](net))
    if assigned:
        model["teacher"].model = KINDS[kind](model["teacher"].model)
    model.train()
    assert {name.split(".")[0] for name in model.state_dict()} == {"student"}
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"student"}
    assert len(list(model.modules())) == 3
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    keys = model.load_state_dict(model.state_dict(), strict=True)
    assert not keys.missing_keys
    assert not model["teacher"](IMAGES).requires_grad


@EVERY_KIND
def test_train_of_the_raw_model(kind: str) -> None:
    """A trainer that walks over all models: neither dropout nor batch statistics."""
    net = network()
    teacher = FrozenTeacher(KINDS[kind](net))
    want, before = teacher(IMAGES), copy.deepcopy(net.state_dict())
    for _ in range(2):
        net.train()
        assert torch.equal(teacher(IMAGES), want)
    net.requires_grad_(True)
    assert not teacher(IMAGES).requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.slow
def test_inside_a_full_graph() -> None:
    torch._dynamo.reset()
    net = network()
    model = holder(net)
    function = torch.compile(lambda x: model["student"](x).mean() + model["teacher"](x).mean(), fullgraph=True, backend="eager")
    want = model["teacher"](IMAGES).mean() + model["student"](IMAGES).mean()
    torch.testing.assert_close(function(IMAGES), want)
    net.train()
    torch.testing.assert_close(function(IMAGES), want)


def test_to_empty_and_meta_built_holders() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    with torch.device("meta"):
        model = holder(nn.Identity())
    model["teacher"].model = net
    model.to_empty(device="cpu")
    model.to("meta")
    model.to_empty(device="cpu")
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model["student"].weight.device.type == "cpu"


def test_follows_dtype_layout_and_sharing() -> None:
    net = network()
    model, before = holder(net), copy.deepcopy(net.state_dict())
    model.half().to(memory_format=torch.channels_last).share_memory()
    assert net[0].weight.dtype == net[1].running_mean.dtype == torch.float16
    assert net.scale.dtype == torch.int64
    assert torch.equal(net[0].weight, before["0.weight"].half())
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert net[0].weight.is_shared()
    assert not net[0].weight.requires_grad


def test_left_where_its_owner_put_it() -> None:
    """Offloaded (on meta, as accelerate does) or over several devices: moving or casting it would break hooks of the owner."""
    net = network()
    net[3].to("meta")
    model = holder(net)
    model.half()
    model.to_empty(device="cpu")
    assert net[0].weight.dtype == torch.float32
    assert net[3].weight.is_meta


@pytest.mark.parametrize("kind", ["plain", "frozen twice"])
def test_copies_share_it(kind: str) -> None:
    net = network()
    model = holder(KINDS[kind](net))
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn())
    averaged.update_parameters(model)
    for twin in (copy.deepcopy(model), copy.copy(model), averaged.module):
        assert twin["teacher"].model is model["teacher"].model
        assert torch.equal(twin["teacher"](IMAGES), model["teacher"](IMAGES))
    twin = copy.deepcopy(model)
    assert twin["student"].weight is not model["student"].weight
    assert twin["teacher"] is not model["teacher"]


def test_pickle_holds_it() -> None:
    model, file = holder(network()), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded["teacher"](IMAGES), model["teacher"](IMAGES))
    assert {name.split(".")[0] for name in loaded.state_dict()} == {"student"}


def test_subclass_with_state_of_its_own() -> None:
    class Named(FrozenTeacher):
        def __init__(self, model: nn.Module, name: str) -> None:
            super().__init__(model)
            self.name, self.head = name, nn.Conv2d(2, 2, 1)

    teacher = Named(network(), "r101")
    twin = copy.deepcopy(teacher)
    assert (twin.name, twin.model is teacher.model) == ("r101", True)
    assert twin.head.weight is not teacher.head.weight
    assert list(twin.double().state_dict()) == ["head.weight", "head.bias"]
    assert twin.head.weight.dtype == torch.float64


def test_made_under_inference_mode() -> None:
    with torch.inference_mode():
        net = network()
    teacher = FrozenTeacher(net)
    assert not teacher(IMAGES).is_inference()
    with torch.inference_mode():
        assert teacher(IMAGES).is_inference()
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher(IMAGES).dtype == torch.bfloat16
    assert holder(net).double()["teacher"](IMAGES.double()).dtype == torch.float64


def test_capture_of_one_call() -> None:
    net = network()
    scores, (level,) = capture.call(FrozenTeacher(net), "1", IMAGES)
    assert torch.equal(level, net[1](net[0](IMAGES)))
    assert not scores.requires_grad


@pytest.mark.parametrize("depth", [1, 2])
def test_captured_by_the_names_of_the_model_itself(depth: int) -> None:
    net, student = network(), network()
    teacher: nn.Module = net
    for _ in range(depth):
        teacher = FrozenTeacher(teacher)
    with FeatureCapture(student, teacher, "1") as features:
        student(IMAGES)
        teacher(IMAGES)
        _, (found,) = features.take()
    assert torch.equal(found, net[1](net[0](IMAGES)))
    with MaskLearner(8, 4).attach(teacher, "1"):
        twin = copy.deepcopy(teacher)
        assert teacher(IMAGES).requires_grad
        assert not twin(IMAGES).requires_grad


def test_half_precision_images() -> None:
    """FSDP's mixed precision casts the inputs of the module that holds the teacher, but not the teacher."""
    teacher = FrozenTeacher(network())
    sentence = "the teacher's parameters are torch.float32, but it was called with torch.bfloat16 outside of autocast"
    with pytest.raises(RuntimeError, match=f"should be the same\nFrozenTeacher: {sentence}") as caught:
        teacher(IMAGES.bfloat16())
    assert str(caught.value).startswith(str(caught.value.__cause__))
    with torch.autocast("cpu", torch.bfloat16):
        teacher(IMAGES.bfloat16())
        with pytest.raises(RuntimeError, match="to have 3 channels") as caught:
            teacher(IMAGES[:, :2].bfloat16())
    assert "FrozenTeacher" not in str(caught.value)
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        teacher(IMAGES[:, :2])
    casting = network()
    casting.register_forward_pre_hook(lambda module, inputs: inputs[0].to(module[0].weight.dtype))  # as transformers' models do
    assert FrozenTeacher(casting)(IMAGES.bfloat16()).dtype == torch.float32
    assert FrozenTeacher(network().bfloat16())(IMAGES.bfloat16()).dtype == torch.bfloat16


def test_an_error_of_the_teacher_itself_is_read_first() -> None:
    """Nobody can tell why a model raised: its own words come first, and what may be the reason is said as such."""

    class Failing(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such file")

    teacher = FrozenTeacher(Failing(3, 8, 1))
    with pytest.raises(RuntimeError, match=r"^no such file$"):
        teacher(IMAGES)
    with pytest.raises(RuntimeError, match=r"(?s)^no such file\nFrozenTeacher: .* with torch\.float16 .* If that is why, call"):
        teacher(IMAGES.half())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_torchscript() -> None:
    net = network().eval()
    for script in (torch.jit.script(net), torch.jit.freeze(torch.jit.script(net))):
        model = holder(script)
        torch.testing.assert_close(model.train()["teacher"](IMAGES), net(IMAGES).detach())
        assert not model["teacher"](IMAGES).requires_grad
        assert not any(p.requires_grad for p in model["teacher"].model.parameters())


@pytest.mark.slow
def test_compiled_models_wherever_a_model_is_taken() -> None:
    torch._dynamo.reset()
    run = runpy.run_path(str(Path(__file__).parent / "programs" / "compiled.py"))["main"]
    assert run(IMAGES).shape == (8, 4, 6, 6)


def test_wrong_model() -> None:
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        FrozenTeacher("resnet")  # type: ignore[arg-type]
    teacher = FrozenTeacher(network())
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got function"):
        teacher.model = lambda x: x


def test_a_part_of_the_model_is_asked_for_by_its_way() -> None:
    teacher = FrozenTeacher(nn.ModuleDict({"neck": nn.Conv2d(3, 4, 1)}))
    with pytest.raises(
        AttributeError, match=r"'FrozenTeacher' object has no attribute 'neck'; its model has, as \.model\.neck"
    ):
        teacher.neck  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        teacher.nothing  # noqa: B018
    assert not hasattr(teacher, "neck")
