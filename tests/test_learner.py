"""Stage 1: what a learner is made of, what it gives and what it refuses."""

import copy
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from maskd_triton import MaskLearner, MaskModule
from tests.problems import close, literal_learn


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filled(module: nn.Module) -> Any:
    """``module`` with parameters of everyday size: masks away from 0.5, weights away from 1 / T, biases that matter."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(normal(*p.shape, seed=100 + i) * max(p[0].numel(), 1) ** -0.5)
    return module


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_parameters(dtype: torch.dtype) -> None:
    """Those of a module that was cast: sums and results are those of float32."""
    module, x, upstream = filled(MaskModule(8, 5)).to(dtype), normal(2, 8, 9, 7).to(dtype), normal(2, 8, 9, 7, seed=1)
    expected = copy.deepcopy(module).double()
    y_ref, dice_ref = literal_learn(expected, x.double())
    y, dice = module(x)
    assert (y.dtype, dice.dtype, module.masks(x).dtype, module.weights(x).dtype) == (dtype, *[torch.float32] * 3)
    close(dice, dice_ref, 1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), y_ref, rtol=0.51 * eps, atol=1e-6)
    ((y * upstream).sum() + 3 * dice).backward()
    ((y_ref * upstream).sum() + 3 * dice_ref).backward()
    for parameter, want in zip(module.parameters(), expected.parameters(), strict=True):
        close(parameter.grad, want.grad, 2 * eps)


def test_initialisation() -> None:
    torch.manual_seed(0)
    c, t = 256, 32
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


BAD = [0, -1, True, 2.5, "8", None]


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((kind, name, value) for kind in (MaskModule, MaskLearner) for name in ("channels", "num_tokens") for value in BAD),
        *((MaskLearner, "channels", [4, value]) for value in BAD),
        (MaskModule, "channels", [4]),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_constructor_arguments(kind: type[nn.Module], name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{name}(\[1\])?: expected a positive int"):
        kind(**{"channels": 4, "num_tokens": 3, name: value})


def test_options_that_are_assigned_later() -> None:
    for learner in (MaskLearner(4), MaskModule(4)):
        learner.impl = "eager"
        with pytest.raises(ValueError, match="impl: expected one of 'auto', 'triton', 'eager', got 'cuda'"):
            learner.impl = "cuda"
        with pytest.raises(AttributeError, match="standardize: cannot be changed"):
            learner.standardize = True


class Pair(NamedTuple):
    fine: Tensor
    coarse: Tensor


FINE, COARSE = normal(2, 4, 5, 3, dtype=torch.float32), normal(2, 6, 2, 2, dtype=torch.float32)
CONTAINERS: list[Any] = [
    [FINE, COARSE],
    (FINE, COARSE),
    Pair(FINE, COARSE),
    {"p4": FINE, "p3": COARSE},
    OrderedDict({3: FINE, "p4": COARSE}),
    defaultdict(list, {"a": FINE, "b": COARSE}),
]


def learner_of(weight_mask: bool = True) -> MaskLearner:
    return filled(MaskLearner((4, 6), 3, weight_mask))


@pytest.mark.parametrize("features", CONTAINERS, ids=lambda features: type(features).__name__)
def test_levels_in_the_given_container(features: Any) -> None:
    learner = learner_of()
    want = [module(x) for module, x in zip(learner.mask_modules, (FINE, COARSE), strict=True)]
    masked = learner(features)
    assert type(masked) is type(features)
    if isinstance(features, dict):
        assert list(masked) == list(features) == list(learner.diagnostics())
    for y, (expected, _) in zip(masked.values() if isinstance(features, dict) else masked, want, strict=True):
        assert torch.equal(y, expected)
    torch.testing.assert_close(learner.dice_loss(), want[0][1] + want[1][1])
    single = filled(MaskLearner(4, 3))
    assert torch.equal(single(FINE), single([FINE])[0])


@pytest.mark.parametrize(
    ("features", "error", "sentence"),
    [
        (FINE, ValueError, "features: expected 2 levels, got 1"),
        ([FINE, COARSE, COARSE], ValueError, "features: expected 2 levels, got 3"),
        ([], ValueError, "features: expected 2 levels, got 0"),
        ([COARSE, COARSE], ValueError, r"features\[0\]: expected 4 channels, got 6"),
        ({"p3": FINE, "p4": FINE}, ValueError, r"features\['p4'\]: expected 6 channels, got 4"),
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


class Teacher(nn.Module):
    """A pyramid of 4 and 6 channels, and a head with a batch norm on each level."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.neck = nn.ModuleDict({"fine": nn.Conv2d(3, 4, 3, padding=1), "coarse": nn.Conv2d(4, 6, 3, 2, 1)})
        self.neck.forward = self._pyramid
        self.heads = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(c), nn.Conv2d(c, 2, 1)) for c in (4, 6))

    def _pyramid(self, x: Tensor) -> list[Tensor]:
        fine = self.neck["fine"](x)
        return [fine, self.neck["coarse"](fine)]

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.neck(x)
        return sum(head(level).square().mean() for head, level in zip(self.heads, self.seen, strict=True))


IMAGES = normal(2, 3, 8, 6, dtype=torch.float32)


def test_dice_loss_is_that_of_the_latest_pass() -> None:
    teacher, learner = Teacher(), learner_of()
    with pytest.raises(
        RuntimeError,
        match=r"dice_loss: no features seen yet in this block; run the teacher inside .*, and call dice_loss\(\) in there",
    ):
        learner.dice_loss()
    with pytest.raises(RuntimeError, match="diagnostics: no features seen yet"):
        learner.diagnostics()
    learner([FINE, COARSE])
    learner.dice_loss()
    with learner.attach(teacher, "neck") as entered:
        assert entered is learner
        with pytest.raises(RuntimeError, match="dice_loss: no features seen yet"):
            learner.dice_loss()
        for images in (IMAGES, 2 * IMAGES):
            teacher(images)
            dice = learner.dice_loss()
    with torch.no_grad():
        plain = teacher._pyramid(2 * IMAGES)
    torch.testing.assert_close(dice, sum(m(x)[1] for m, x in zip(learner.mask_modules, plain, strict=True)))
    with pytest.raises(RuntimeError, match="dice_loss: no features seen yet"):
        learner.dice_loss()
    assert list(learner.diagnostics()) == [0, 1]  # these stay


def test_teacher_under_autocast() -> None:
    teacher, learner = Teacher(), learner_of()
    with learner.attach(teacher, "neck"), torch.autocast("cpu", torch.bfloat16):
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
    before = copy.deepcopy(teacher.train().state_dict())
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
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda learner: pickle.loads(pickle.dumps(learner))}


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies(copied: Callable[[MaskLearner], MaskLearner], attached: bool) -> None:
    """Learners that no teacher is attached to, and that have seen nothing."""
    teacher, learner = Teacher(), learner_of()
    if attached:
        with learner.attach(teacher, "neck"):
            teacher(IMAGES)
            other = copied(learner)
    else:
        learner([FINE, COARSE])
        other = copied(learner)
    with pytest.raises(RuntimeError, match="no features seen yet"):
        other.dice_loss()
    assert all(torch.equal(a, b) for a, b in zip(other([FINE, COARSE]), learner([FINE, COARSE]), strict=True))
    assert torch.equal(other.dice_loss(), learner.dice_loss())
    with torch.no_grad():
        other.mask_modules[0].mask_token.add_(1)
    assert not torch.equal(other([FINE, COARSE])[0], learner([FINE, COARSE])[0])
    with other.attach(teacher, "neck"):
        teacher(IMAGES)
