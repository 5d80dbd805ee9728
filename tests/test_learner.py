"""Stage 1 against the literal formulas, and what attaching to a teacher may and may not change."""

import copy
import io
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from helpers import LAYOUTS, in_layout
from problems import close, literal_learn
from torch import Tensor, nn

from maskd_triton import MaskLearner, MaskModule, reference

HALF = (torch.float16, torch.bfloat16)
SHAPES = {  # N, C, H, W, T
    "one_pixel": (2, 3, 1, 1, 3),
    "one_row": (1, 4, 1, 7, 4),
    "one_column": (2, 5, 6, 1, 2),
    "odd": (2, 3, 5, 7, 6),
    "one_token": (3, 4, 4, 6, 1),
    "many_tokens": (1, 8, 4, 5, 64),
    "one_channel": (2, 1, 3, 3, 5),
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filled(module: nn.Module) -> Any:
    """``module`` with parameters of everyday size: masks away from 0.5, weights away from 1 / T, biases that matter."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(normal(*p.shape, seed=100 + i) * max(p[0].numel(), 1) ** -0.5)
    return module


def reference_of(module: MaskModule, x: Tensor) -> tuple[Tensor, MaskModule, tuple[Tensor, Tensor]]:
    """Leaf copies in float64 of ``x`` and of the module, and the literal forward of them."""
    x, module = x.detach().double().contiguous().requires_grad_(), copy.deepcopy(module).double()
    return x, module, literal_learn(module, x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_mask", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize(("n", "c", "h", "w", "t"), SHAPES.values(), ids=SHAPES)
def test_module(n: int, c: int, h: int, w: int, t: int, weight_mask: bool, layout: str) -> None:
    module = filled(MaskModule(c, t, weight_mask).double())
    x = in_layout(normal(n, c, h, w), layout).requires_grad_()
    x_ref, expected, (y_ref, dice_ref) = reference_of(module, x)

    close(module.masks(x), reference.masks(x_ref, expected.mask_token), 1e-12)
    if weight_mask:
        close(module.weights(x), reference.mask_weights(x_ref, *expected.weighting()), 1e-12)
    y, dice = module(x)
    assert y.dtype == dice.dtype == torch.float64
    close(y, y_ref, 1e-12)
    close(dice, dice_ref, 1e-12)
    if t == 1:
        assert dice.item() == 0

    upstream = normal(n, c, h, w, seed=1)
    ((y * upstream).sum() + 3 * dice).backward()
    ((y_ref * upstream).sum() + 3 * dice_ref).backward()
    close(x.grad, x_ref.grad, 1e-12)
    assert len(list(module.parameters())) == (5 if weight_mask else 1)
    for parameter, want in zip(module.parameters(), expected.parameters(), strict=True):
        close(parameter.grad, want.grad, 1e-12)


@pytest.mark.parametrize("weight_mask", [True, False], ids=["weighted", "unweighted"])
def test_gradcheck(weight_mask: bool) -> None:
    module = filled(MaskModule(2, 3, weight_mask).double())
    names = [name for name, _ in module.named_parameters()]
    inputs = [normal(2, 2, 2, 3).requires_grad_(), *(p.detach().clone().requires_grad_() for p in module.parameters())]

    def forward(x: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, inputs)


@pytest.mark.parametrize("half_parameters", [False, True], ids=["params32", "params16"])
@pytest.mark.parametrize("dtype", HALF, ids=["fp16", "bf16"])
def test_half_features(dtype: torch.dtype, half_parameters: bool) -> None:
    module = filled(MaskModule(8, 5))
    module = module.to(dtype) if half_parameters else module
    x = normal(2, 8, 9, 7).to(dtype).requires_grad_()
    x_ref, expected, (y_ref, dice_ref) = reference_of(module, x)
    masks, weights, (y, dice) = module.masks(x), module.weights(x), module(x)
    assert y.dtype == dtype
    assert masks.dtype == weights.dtype == dice.dtype == torch.float32
    close(masks, reference.masks(x_ref, expected.mask_token), 1e-6)
    close(weights, reference.mask_weights(x_ref, *expected.weighting()), 1e-6)
    close(dice, dice_ref, 1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), y_ref, rtol=0.51 * eps, atol=1e-6)

    upstream = normal(2, 8, 9, 7, seed=1, dtype=dtype)
    ((y * upstream).sum(dtype=torch.float32) + 3 * dice).backward()
    ((y_ref * upstream).sum() + 3 * dice_ref).backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    close(x.grad, x_ref.grad, 2 * eps)
    for parameter, want in zip(module.parameters(), expected.parameters(), strict=True):
        close(parameter.grad, want.grad, 2 * eps if half_parameters else 1e-5)


def test_autocast_changes_nothing() -> None:
    module, x, upstream = filled(MaskModule(8, 5)), normal(2, 8, 9, 7).float(), normal(2, 8, 9, 7, seed=1).float()

    def run() -> list[Tensor]:
        y, dice = module(x)
        return [module.masks(x), module.weights(x), y, dice]

    def gradients(y: Tensor, dice: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((y * upstream).sum() + dice, list(module.parameters()))

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert module.prob(x).dtype == torch.bfloat16
        cast = run()
    for got, expected in zip([*cast, *gradients(*cast[2:])], [*plain, *gradients(*plain[2:])], strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


@pytest.mark.parametrize("weight_mask", [True, False], ids=["weighted", "unweighted"])
def test_empty_batch(weight_mask: bool) -> None:
    y, dice = MaskModule(4, 3, weight_mask)(torch.zeros(0, 4, 5, 6))
    assert y.shape == (0, 4, 5, 6)
    assert dice.item() == 0


def test_initialisation() -> None:
    torch.manual_seed(0)
    c, t = 256, 128
    module = MaskModule(c, t)
    shapes = {"mask_token": (t, c), "prob.0.weight": (c, c, 3, 3), "prob.0.bias": (c,), "prob.2.weight": (t, c, 1, 1)}
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == shapes | {"prob.2.bias": (t,)}
    assert all(p.requires_grad for p in module.parameters())
    deviations = {"mask_token": 0.01, "prob.0.weight": (2 / (9 * c)) ** 0.5, "prob.2.weight": (2 / t) ** 0.5}
    for name, deviation in deviations.items():
        values = module.get_parameter(name).detach()
        assert values.std().item() == pytest.approx(deviation, rel=0.02)
        assert abs(values.mean().item()) < 4 * deviation * values.numel() ** -0.5
    assert not module.prob[0].bias.any()
    assert not module.prob[2].bias.any()


def test_weights_without_weight_mask() -> None:
    with pytest.raises(ValueError, match="weight_mask=False"):
        MaskModule(4, 3, weight_mask=False).weights(torch.ones(1, 4, 2, 2))


BAD = [0, -1, True, 2.5, [], "8", None]


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((kind, name, value) for kind in (MaskModule, MaskLearner) for name in ("channels", "num_tokens") for value in BAD),
        *((MaskLearner, "channels", [4, value]) for value in BAD),
        *((kind, "num_tokens", [3]) for kind in (MaskModule, MaskLearner)),
        (MaskModule, "channels", [4]),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_constructor_arguments(kind: type[nn.Module], name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected a positive int"):
        kind(**{"channels": 4, "num_tokens": 3, name: value})


class Pair(NamedTuple):
    fine: Tensor
    coarse: Tensor


CONTAINERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "tensor": lambda levels: levels[0],
    "list": list,
    "tuple": tuple,
    "dict": lambda levels: dict(zip(("p4", "p3"), levels, strict=True)),
    "ordered_dict": lambda levels: OrderedDict(zip(("p4", 3), levels, strict=True)),
    "namedtuple": Pair._make,
}


def levels_of(features: Any) -> list[Tensor]:
    if isinstance(features, Tensor):
        return [features]
    return list(features.values() if isinstance(features, Mapping) else features)


class Fpn(nn.Module):
    def __init__(self, container: Callable[[list[Tensor]], Any]) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)])
        self.container = container

    def forward(self, x: Tensor) -> Any:
        return self.container([conv(x) for conv in self.convs])


class Teacher(nn.Module):
    """Stem, a nested pyramid of 4 and 6 channels, heads; keeps what the heads have seen."""

    def __init__(self, container: str = "list", norm: type[nn.Module] = nn.BatchNorm2d, dropout: type[nn.Module] = nn.Dropout):
        super().__init__()
        tracked = {"track_running_stats": True}
        stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm(4, **tracked), dropout(0.5))
        self.body = nn.ModuleDict({"stem": stem, "fpn": Fpn(CONTAINERS[container])})
        self.heads = nn.ModuleList(nn.Sequential(norm(c, **tracked), dropout(0.5), nn.Conv2d(c, 2, 1)) for c in (4, 6))
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.body["fpn"](self.body["stem"](x))
        outputs = [head(level) for head, level in zip(self.heads, levels_of(self.seen), strict=False)]
        return torch.stack([y.square().mean() for y in outputs]).sum()


def teacher_of(*args: Any) -> Teacher:
    torch.manual_seed(0)
    return Teacher(*args)


def learner_of(channels: Any = (4, 6), weight_mask: bool = True) -> MaskLearner:
    return filled(MaskLearner(channels, 3, weight_mask))


IMAGES = normal(2, 3, 8, 6, dtype=torch.float32)


@pytest.mark.parametrize("container", CONTAINERS)
def test_attach_masks_in_the_given_container(container: str) -> None:
    teacher = teacher_of(container).eval()
    learner = learner_of(4 if container == "tensor" else (4, 6))
    plain_loss = teacher(IMAGES)
    plain = teacher.seen
    with learner.attach(teacher, "body.fpn") as entered:
        assert entered is learner
        loss = teacher(IMAGES)
        masked, dice = teacher.seen, learner.dice_loss()
    assert type(masked) is type(plain)
    if isinstance(plain, Mapping):
        assert list(masked) == list(plain)
    assert len(levels_of(masked)) == len(levels_of(plain))
    total = torch.zeros(())
    for module, x, y in zip(learner.mask_modules, levels_of(plain), levels_of(masked), strict=True):
        y_expected, dice_expected = module(x)
        close(y, reference_of(module, x)[2][0], 1e-5)
        assert torch.equal(y, y_expected)
        total = total + dice_expected
    assert torch.equal(dice, total)
    assert loss.item() != plain_loss.item()
    assert torch.equal(teacher(IMAGES), plain_loss)
    assert torch.equal(levels_of(teacher.seen)[0], levels_of(plain)[0])


@pytest.mark.parametrize("weight_mask", [True, False], ids=["weighted", "unweighted"])
def test_dice_loss_is_the_sum_over_levels_of_the_latest_call(weight_mask: bool) -> None:
    learner = learner_of((4, 6), weight_mask).double()
    for seed in (0, 1):
        features = [normal(2, 4, 5, 3, seed=seed), normal(2, 6, 1, 2, seed=seed)]
        learner(features)
        levels = zip(learner.mask_modules, features, strict=True)
        expected = sum(reference.dice(reference.masks(x, module.mask_token)) for module, x in levels)
        assert learner.dice_loss().item() == pytest.approx(expected.item(), rel=1e-12)


def snapshot(teacher: nn.Module) -> dict[str, Any]:
    """All that a block must leave as it was; tensors as bytes, so that equal means bitwise."""
    tensors = [*teacher.named_parameters(), *teacher.named_buffers()]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "values": {k: v.detach().numpy().tobytes() for k, v in tensors},
        "grad": {k: None if p.grad is None else p.grad.numpy().tobytes() for k, p in teacher.named_parameters()},
        "requires_grad": {k: p.requires_grad for k, p in teacher.named_parameters()},
        "training": {k: m.training for k, m in teacher.named_modules()},
        "hooks": {k: [list(getattr(m, name)) for name in hooks] for k, m in teacher.named_modules()},
    }


def mixed_teacher(*args: Any) -> Teacher:
    """Some parameters frozen, some modules in eval mode, a hook of its own, a gradient left from before."""
    teacher = teacher_of(*args).train()
    teacher.body["stem"].eval()
    teacher.body["stem"][2].train()
    teacher.heads[1][0].eval()
    teacher.body["stem"][0].weight.requires_grad_(False)
    teacher.heads[0].requires_grad_(False)
    teacher.heads[1][2].weight.grad = torch.ones_like(teacher.heads[1][2].weight)
    teacher.body["fpn"].register_forward_hook(lambda *_: None)
    return teacher


class Interruption(Exception):
    pass


@pytest.mark.parametrize("trained", [False, True], ids=["as_is", "train_mode"])
@pytest.mark.parametrize("end", ["normal", "raises", "level_error"])
def test_teacher_is_left_as_it_was(end: str, trained: bool) -> None:
    teacher = mixed_teacher()
    learner = learner_of((4, 5) if end == "level_error" else (4, 6))
    before = snapshot(teacher)
    assert len(set(before["requires_grad"].values())) == len(set(before["training"].values())) == 2

    def block() -> None:
        with learner.attach(teacher, "body.fpn"):
            assert not any(p.requires_grad for p in teacher.parameters())
            if trained:
                teacher.train()
            for _ in range(2):
                (teacher(IMAGES) + learner.dice_loss()).backward()
            inside = snapshot(teacher)
            assert inside["values"] == before["values"]
            assert inside["grad"] == before["grad"]
            if end == "raises":
                raise Interruption

    if end == "normal":
        block()
    elif end == "raises":
        with pytest.raises(Interruption):
            block()
    else:
        with pytest.raises(ValueError, match=r"'body.fpn'\[1\]: expected 5 channels, got 6"):
            block()
    assert snapshot(teacher) == before
    if end != "level_error":
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.parameters())


@pytest.mark.parametrize("dropout", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d])
def test_norm_and_dropout_stay_in_eval_mode(norm: type[nn.Module], dropout: type[nn.Module]) -> None:
    teacher, learner = teacher_of("list", norm, dropout), learner_of()
    statistics = {k: v.clone() for k, v in teacher.named_buffers()}
    assert any("running_var" in k for k in statistics)
    with learner.attach(teacher.train(), "body.fpn"):
        assert not any(m.training for m in teacher.modules() if isinstance(m, norm | dropout))
        expected = teacher(IMAGES)
        for _ in range(3):
            teacher.train()
            assert teacher.training
            assert teacher.body["fpn"].training
            assert torch.equal(teacher(IMAGES), expected)
    assert all(torch.equal(v, statistics[k]) for k, v in teacher.named_buffers())


class DropPath(nn.Module):
    """Random in train mode, by the name that timm, transformers and others give it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[0], 1, 1) > 0.5) * 2 if self.training else x


class AttentionTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        self.drop = DropPath()
        self.neck = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.drop(self.attention(x, x, x)[0])
        return self.neck(tokens.transpose(1, 2).unflatten(2, (4, 4)))


def test_attention_and_drop_path_stay_in_eval_mode() -> None:
    torch.manual_seed(0)
    teacher, learner, x = AttentionTeacher().train(), MaskLearner(4), torch.randn(3, 16, 4)
    with learner.attach(teacher, "neck"):
        expected = teacher(x)
        assert expected.abs().amax((1, 2, 3)).min() > 0  # no image is dropped
        for _ in range(3):
            teacher.train()
            assert torch.equal(teacher(x), expected)
    assert all(m.training for m in teacher.modules())


def test_a_defaultdict_of_levels() -> None:
    features = defaultdict(list, {"a": normal(2, 4, 3, 3), "b": normal(2, 6, 2, 2)})
    masked = learner_of()(features)
    assert type(masked) is defaultdict
    assert masked.default_factory is list
    assert list(masked) == ["a", "b"]


@pytest.mark.parametrize(("name", "missing"), [("nope", "nope"), ("body.nope", "nope"), ("body.fpn.container", "container")])
def test_unknown_module(name: str, missing: str) -> None:
    teacher, learner = mixed_teacher(), learner_of()
    before = snapshot(teacher)
    with pytest.raises(AttributeError, match=missing), learner.attach(teacher, name):
        pass
    assert snapshot(teacher) == before
    with learner.attach(teacher, "body.fpn"):
        teacher(IMAGES)


def test_attached_twice() -> None:
    teacher, other, learner = mixed_teacher(), teacher_of(), learner_of()
    before, others = snapshot(teacher), snapshot(other)
    with learner.attach(teacher, "body.fpn"):
        for again in (teacher, other):
            with pytest.raises(RuntimeError, match="attached already"), learner.attach(again, "body.fpn"):
                pass
        assert snapshot(other) == others
        (teacher(IMAGES) + learner.dice_loss()).backward()
    assert snapshot(teacher) == before


def test_attach_again_and_elsewhere() -> None:
    teacher, other, learner = teacher_of(), mixed_teacher("tuple"), learner_of()
    results = []
    for model in (teacher, other, teacher):
        before = snapshot(model)
        with learner.attach(model, "body.fpn"):
            results.append(model(IMAGES) + learner.dice_loss())
        assert snapshot(model) == before
    assert torch.equal(results[0], results[2])


def test_two_learners_on_one_teacher() -> None:
    teacher = mixed_teacher()
    before = snapshot(teacher)
    first, second = learner_of(), learner_of(4)
    with first.attach(teacher, "body.fpn"), second.attach(teacher, "body.stem"):
        (teacher(IMAGES) + first.dice_loss() + second.dice_loss()).backward()
    assert snapshot(teacher) == before
    assert all(p.grad is not None for learner in (first, second) for p in learner.parameters())


def test_dice_loss_needs_a_forward() -> None:
    teacher, learner = teacher_of(), learner_of()
    with pytest.raises(RuntimeError, match="dice_loss: no features seen yet"):
        learner.dice_loss()
    learner([torch.ones(1, 4, 2, 2), torch.ones(1, 6, 2, 2)])
    learner.dice_loss()
    with learner.attach(teacher, "body.fpn"):
        with pytest.raises(RuntimeError, match="dice_loss: no features seen yet"):
            learner.dice_loss()
        teacher(IMAGES)
        learner.dice_loss()
    with pytest.raises(RuntimeError, match="dice_loss: no features seen yet"):
        learner.dice_loss()


FINE, COARSE = torch.ones(1, 4, 2, 2), torch.ones(1, 6, 2, 2)


@pytest.mark.parametrize(
    ("features", "error", "sentence"),
    [
        (FINE, ValueError, "features: expected 2 levels, got 1"),
        ([FINE, COARSE, COARSE], ValueError, "features: expected 2 levels, got 3"),
        ([], ValueError, "features: expected 2 levels, got 0"),
        ({"p3": FINE}, ValueError, "features: expected 2 levels, got 1"),
        ([COARSE, COARSE], ValueError, r"features\[0\]: expected 4 channels, got 6"),
        ((FINE, FINE), ValueError, r"features\[1\]: expected 6 channels, got 4"),
        ({"p3": FINE, "p4": FINE}, ValueError, r"features\['?p4'?\]: expected 6 channels, got 4"),
        ([FINE, COARSE[0]], ValueError, r"features\[1\]: expected features \[N, C, H, W\]"),
        ([FINE, COARSE[..., :0]], ValueError, r"features\[1\]: expected at least one"),
        ([FINE, COARSE.long()], TypeError, r"features\[1\]: expected float16"),
        ([FINE, None], TypeError, r"features\[1\]: expected a tensor, got NoneType"),
        (None, TypeError, "features: expected a tensor, or a sequence or mapping"),
    ],
)
def test_levels_that_do_not_fit(features: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        learner_of()(features)


@pytest.mark.parametrize("channels", [4, (4, 6, 6)])
def test_attached_with_the_wrong_number_of_levels(channels: Any) -> None:
    learner, teacher = learner_of(channels), teacher_of()
    with (
        learner.attach(teacher, "body.fpn"),
        pytest.raises(ValueError, match=r"output of the teacher's 'body.fpn': expected \d levels, got 2"),
    ):
        teacher(IMAGES)


def test_teacher_under_autocast() -> None:
    teacher, learner = teacher_of(), learner_of()
    with learner.attach(teacher, "body.fpn"), torch.autocast("cpu", torch.bfloat16):
        loss = teacher(IMAGES) + learner.dice_loss()
        assert {y.dtype for y in teacher.seen} == {torch.bfloat16}
        assert learner.dice_loss().dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in learner.parameters())


@pytest.mark.parametrize("weight_mask", [True, False], ids=["weighted", "unweighted"])
def test_short_stage_1_learns(weight_mask: bool) -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1))
    learner = MaskLearner(8, 4, weight_mask)
    with torch.no_grad():
        classes = teacher.eval()(IMAGES).argmax(1)
    before = snapshot(teacher.train())
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.1)
    losses = []
    with learner.attach(teacher, "2"):
        for _ in range(20):
            loss = nn.functional.cross_entropy(teacher(IMAGES), classes) + learner.dice_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
    assert snapshot(teacher) == before


def saved_and_loaded(learner: MaskLearner) -> MaskLearner:
    buffer = io.BytesIO()
    torch.save(learner, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda learner: pickle.loads(pickle.dumps(learner)), "save": saved_and_loaded}


@pytest.mark.parametrize("when", ["fresh", "after_forward", "attached"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies(copied: Callable[[MaskLearner], MaskLearner], when: str) -> None:
    teacher, learner = teacher_of(), learner_of()
    features = [normal(2, 4, 5, 3, dtype=torch.float32), normal(2, 6, 2, 2, dtype=torch.float32)]
    if when == "after_forward":
        learner(features)
    if when == "attached":
        with learner.attach(teacher, "body.fpn"):
            teacher(IMAGES)
            other = copied(learner)
    else:
        other = copied(learner)
    assert all(torch.equal(a, b) for a, b in zip(other(features), learner(features), strict=True))
    assert torch.equal(other.dice_loss(), learner.dice_loss())
    with torch.no_grad():
        other.mask_modules[0].mask_token.add_(1)
    assert not torch.equal(other(features)[0], learner(features)[0])
    with other.attach(teacher, "body.fpn"):
        teacher(IMAGES)
