"""FrozenTeacher: what users do to the module that holds it, and to the raw model, leaves the teacher as it was."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assigned", [False, True])
def test_nothing_of_it_is_registered(kind: str, assigned: bool) -> None:
    torch._dynamo.reset()
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


@pytest.mark.parametrize("kind", KINDS)
def test_train_of_the_raw_model(kind: str) -> None:
    """A trainer that walks over all models: neither dropout nor batch statistics."""
    torch._dynamo.reset()
    net = network()
    teacher = FrozenTeacher(KINDS[kind](net))
    want, before = teacher(IMAGES), copy.deepcopy(net.state_dict())
    for _ in range(2):
        net.train()
        assert torch.equal(teacher(IMAGES), want)
    net.requires_grad_(True)
    assert not teacher(IMAGES).requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


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


def test_sharded_teacher_is_left_alone(tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        net = fully_shard(nn.Sequential(nn.Conv2d(3, 8, 1)), mesh=mesh)
        model = holder(net)
        model.half()
        assert net[0].weight.dtype == torch.float32
        assert model["teacher"](IMAGES).shape == (4, 8, 6, 6)
        first = FullyShardedDataParallel(nn.Sequential(nn.Conv2d(3, 8, 1)), device_id=torch.device("cpu"))
        model = holder(first)
        want = model["teacher"](IMAGES)
        model.half().to_empty(device="cpu")
        assert torch.equal(model["teacher"](IMAGES), want)
        inner = network()
        fully_shard(nn.Sequential(nn.Conv2d(3, 3, 1), FrozenTeacher(inner)), mesh=mesh)
        assert type(inner[0].weight) is nn.Parameter
    finally:
        torch.distributed.destroy_process_group()


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


@pytest.mark.parametrize("depth", ["itself", "twice", "held"])
def test_looked_through(depth: str) -> None:
    """Modules go by the names that the teacher itself has for them."""
    net = network()
    model = {"itself": FrozenTeacher, "twice": lambda m: FrozenTeacher(FrozenTeacher(m)), "held": holder}[depth](net)
    name, run = ("teacher.1", model["teacher"]) if depth == "held" else ("1", model)
    want: Tensor = net[1](net[0](IMAGES))
    student = network()
    with FeatureCapture(student, model, {"1": name}) as features:
        student(IMAGES)
        run(IMAGES)
        (_, (found,)) = features.take()
    assert torch.equal(found, want)

    learner, plain = MaskLearner(8, 4, standardize=True), net(IMAGES)
    with learner.calibrate(model, name):
        run(IMAGES)
    torch.testing.assert_close(learner.mask_modules[0].channel_mean, want.mean((0, 2, 3)))
    with learner.attach(model, name):
        scores = run(IMAGES)
        assert scores.requires_grad
        with torch.no_grad():
            assert not run(IMAGES).requires_grad
        assert not torch.allclose(scores, plain)
    scores.mean().backward()
    assert learner.mask_modules[0].mask_token.grad.abs().max() > 0
    assert all(p.grad is None for p in net.parameters())
    assert not run(IMAGES).requires_grad
    with learner.attach(model, name):
        twin = copy.deepcopy(model)
    assert not (twin["teacher"] if depth == "held" else twin).with_gradient


def test_capture_of_one_call() -> None:
    net = network()
    scores, (level,) = capture.call(FrozenTeacher(net), "1", IMAGES)
    assert torch.equal(level, net[1](net[0](IMAGES)))
    assert not scores.requires_grad


def test_wrong_model() -> None:
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        FrozenTeacher("resnet")  # type: ignore[arg-type]
    teacher = FrozenTeacher(network())
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got function"):
        teacher.model = lambda x: x  # type: ignore[assignment]
