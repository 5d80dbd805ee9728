"""Levels with names: features by key in any order, files by name; without names the first order counts."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskd_triton import MaskedDistillLoss, MaskLearner
from maskd_triton import functional as F

CHANNELS = {"p3": 5, "p4": 5, "pool": 4}
NAMES = list(CHANNELS)
SIZES = ((6, 5), (3, 4), (2, 2))


def learned(channels: Any, seed: int = 0, **options: Any) -> MaskLearner:
    torch.manual_seed(seed)
    learner = MaskLearner(channels, 3, **options)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.normal_()
    return learner


def features(seed: int, channels: list[int] | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    widths = channels or list(CHANNELS.values())
    return {name: torch.randn(2, c, *size, generator=generator) for name, c, size in zip(NAMES, widths, SIZES, strict=True)}


def turned(levels: dict[str, Any]) -> dict[str, Any]:
    return dict(reversed(levels.items()))


S, T = features(1), features(2)
NAMED, PLAIN = learned(CHANNELS), learned(list(CHANNELS.values()))  # the same numbers
OPTIONS: dict[str, Any] = {"num_tokens": 3, "custom_mask_warmup": 0}


def test_state_dicts_are_named() -> None:
    criterion = MaskedDistillLoss(CHANNELS, student_channels=dict.fromkeys(turned(CHANNELS), 2), pretrained=NAMED, **OPTIONS)
    keys = set(criterion.state_dict())
    assert {f"mask_modules.{name}.pool_rows" for name in NAMES} < keys
    assert {f"align.{name}.weight" for name in NAMES} < keys
    assert {f"mask_modules.{name}.prob.0.weight" for name in NAMES} < set(NAMED.state_dict())
    assert criterion.align["pool"].out_channels == 4
    assert criterion.channels == NAMED.channels == [5, 5, 4]
    criterion.load_state_dict(NAMED.state_dict(), strict=False)  # entries of the learner's levels, by name


@pytest.mark.parametrize("order", [lambda x: x, turned, OrderedDict, lambda x: list(x.values()), lambda x: tuple(x.values())])
def test_criterion(order: Callable[[dict[str, Any]], Any], target: tuple[str, str]) -> None:
    impl, device = target
    s, t = ({k: x.to(device) for k, x in levels.items()} for levels in (S, T))
    plain = MaskedDistillLoss(PLAIN.channels, pretrained=PLAIN, impl=impl, **OPTIONS).to(device)
    want = plain(list(s.values()), list(t.values()), reduction="none")
    criterion = MaskedDistillLoss(CHANNELS, pretrained=NAMED, impl=impl, **OPTIONS).to(device)
    for student, teacher in ((s, order(t)), (order(s), t), (turned(s), order(t)), (order(s), list(t.values()))):
        assert torch.equal(criterion(student, teacher, reduction="none"), want)
    assert list(criterion.diagnostics()) == NAMES
    weights = {name: torch.rand(2, 3, device=device) for name in NAMES}
    masks = {name: torch.rand(2, 3, *x.shape[2:], device=device) for name, x in t.items()}
    values = [list(x.values()) for x in (masks, weights)]
    want = plain(list(s.values()), list(t.values()), masks=values[0], mask_weights=values[1])
    assert torch.equal(criterion(order(s), turned(t), masks=order(masks), mask_weights=turned(weights)), want)


def test_align_by_name() -> None:
    modules = {name: nn.Conv2d(2, c, 1) for name, c in CHANNELS.items()}
    student = features(3, [2, 2, 2])
    want = MaskedDistillLoss(PLAIN.channels, align=list(modules.values()), pretrained=PLAIN, **OPTIONS)
    loss = want(list(student.values()), list(T.values()))
    for given in (turned(modules), nn.ModuleDict(turned(modules)), nn.ModuleDict(modules), list(modules.values())):
        assert torch.equal(MaskedDistillLoss(CHANNELS, align=given, pretrained=NAMED, **OPTIONS)(turned(student), T), loss)
    numbered = MaskedDistillLoss({0: 5, 1: 5}, align=nn.ModuleDict({"1": modules["p4"], "0": modules["p3"]}), **OPTIONS)
    assert numbered.align["0"] is modules["p3"]


def test_modules_put_in_another_order() -> None:
    """As they come where one is taken out and put back, wrapped."""
    modules = {name: nn.Conv2d(2, c, 1) for name, c in CHANNELS.items()}
    student = features(3, [2, 2, 2])
    criterion, learner = MaskedDistillLoss(CHANNELS, align=modules, pretrained=NAMED, **OPTIONS), copy.deepcopy(NAMED)
    want, masked = criterion(student, T), learner(T)
    for container in (criterion.align, criterion.mask_modules, learner.mask_modules):
        container["p3"] = container.pop("p3")
        assert list(container) == ["p4", "pool", "p3"]
    assert torch.equal(criterion(student, T), want)
    assert all(torch.equal(x, masked[name]) for name, x in learner(T).items())
    criterion.align["p5"] = criterion.align.pop("p3")
    with pytest.raises(
        ValueError, match=r"align: expected one module for each of the levels \['p3', 'p4', 'pool'\], got \['p4', 'po"
    ):
        criterion(student, T)
    learner.mask_modules["p3"] = nn.Identity()
    with pytest.raises(TypeError, match=r"mask_modules\[0\]: expected a MaskModule, got Identity"):
        learner(T)


@pytest.mark.parametrize("order", [lambda x: x, turned])
def test_learner(order: Callable[[dict[str, Any]], Any]) -> None:
    """Masked features in the container that came, in its order: what reads it by position sees its own levels."""
    want = PLAIN(list(T.values()))
    found = NAMED(order(T))
    assert list(found) == list(order(T))
    for name, x in zip(NAMES, want, strict=True):
        assert torch.equal(found[name], x)
    assert torch.equal(NAMED.dice_loss(), PLAIN.dice_loss())
    assert list(NAMED.diagnostics()) == NAMES
    assert all(torch.equal(a, b) for a, b in zip(NAMED(list(T.values())), want, strict=True))


class Teacher(nn.Module):
    """Two necks, whose levels come by key, or one by one."""

    def __init__(self, order: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__()
        self.neck, self.order = nn.Identity(), order

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.neck(self.order(x))


@pytest.mark.parametrize("order", [lambda x: x, turned])
def test_attach_and_calibrate(order: Callable[[dict[str, Any]], Any]) -> None:
    learner = learned(CHANNELS, standardize=True)
    teacher = Teacher(order)
    with pytest.raises(RuntimeError, match="calibrate: level 'p3': no features seen"), learner.calibrate(teacher, "neck"):
        pass
    with learner.calibrate(teacher, "neck"):
        teacher(T)
    for name, x in T.items():
        torch.testing.assert_close(learner.mask_modules[name].channel_mean, x.mean((0, 2, 3)))
    with learner.attach(teacher, "neck"):
        masked = teacher(T)
        dice = learner.dice_loss()
    want = learner(T)
    assert list(masked) == list(order(T))
    assert all(torch.equal(masked[name], want[name]) for name in NAMES)
    assert torch.equal(dice, learner.dice_loss())
    assert list(learner.diagnostics()) == NAMES
    learner = MaskLearner({"p3": 5, "p4": 5, "p5": 4}, 3)
    with learner.attach(teacher, "neck"), pytest.raises(ValueError, match=r"expected levels of \['p3', 'p4', 'p5'\], got"):
        teacher(T)


def test_files(tmp_path: Path) -> None:
    """Names match names, in any order; numbered levels (official files) go by position."""
    learned(CHANNELS).save(tmp_path / "named.pt")
    learned(list(CHANNELS.values())).save(tmp_path / "plain.pt")
    want = NAMED.state_dict()
    for source in ("named.pt", "plain.pt"):
        found = MaskLearner(CHANNELS, 3, pretrained=tmp_path / source).state_dict()
        assert found.keys() == want.keys()
        assert all(torch.equal(found[key], value) for key, value in want.items())
    other = MaskLearner({"p4": 5, "pool": 4, "p3": 5}, 3, pretrained=tmp_path / "named.pt")
    assert all(torch.equal(other.state_dict()[key], value) for key, value in want.items())
    criteria = [MaskedDistillLoss(CHANNELS, pretrained=tmp_path / source, **OPTIONS) for source in ("named.pt", "plain.pt")]
    criteria.append(MaskedDistillLoss(CHANNELS, pretrained=criteria[0], **OPTIONS))
    assert len({criterion(S, T).item() for criterion in criteria}) == 1
    with pytest.raises(ValueError, match=r"pretrained: its levels have names.*channels=\{'p3': 5, 'p4': 5, 'pool': 4\}"):
        MaskLearner([5, 5, 4], 3, pretrained=tmp_path / "named.pt")
    with pytest.raises(ValueError, match=r"missing: mask_modules\.p5\.mask_token(.|\n)*unexpected: mask_modules\.pool"):
        MaskLearner({"p3": 5, "p4": 5, "p5": 4}, 3, pretrained=tmp_path / "named.pt")
    with pytest.raises(ValueError, match=r"missing: mask_modules\.pool"):
        MaskLearner(CHANNELS, 3, pretrained=learned([5, 5]))
    torchvision = MaskLearner({"0": 5, "1": 5, "pool": 4}, 3, pretrained=tmp_path / "plain.pt")
    assert torch.equal(torchvision.mask_modules["pool"].mask_token, PLAIN.mask_modules[2].mask_token)


def test_functional(target: tuple[str, str]) -> None:
    """Everything by level is a mapping, whatever the order of each."""
    impl, device = target
    s, t = ({k: x.to(device) for k, x in levels.items()} for levels in (S, T))
    tables = [module.tables(torch.float32) for module in PLAIN.requires_grad_(False).to(device).mask_modules]
    tokens, weighting = ({name: table[i] for name, table in zip(NAMES, tables, strict=True)} for i in (0, 1))
    want = F.masked_distill_loss(list(s.values()), list(t.values()), list(tokens.values()), list(weighting.values()), impl=impl)
    got = F.masked_distill_loss(turned(s), t, turned(tokens), turned(weighting), impl=impl)
    assert torch.equal(got, want)
    assert torch.equal(F.masked_distill_loss(turned(s), t, list(tokens.values()), list(weighting.values()), impl=impl), want)
    with pytest.raises(TypeError, match="tokens: a mapping by level, but student is none"):
        F.masked_distill_loss(list(s.values()), list(t.values()), tokens)
    with pytest.raises(ValueError, match=r"tokens: expected the levels \['p3', 'p4', 'pool'\], got \['p3'\]"):
        F.masked_distill_loss(s, t, {"p3": tokens["p3"]})
    PLAIN.cpu().requires_grad_(True)


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: MaskedDistillLoss(CHANNELS, pretrained=NAMED, **OPTIONS)({"p3": S["p3"]}, T), ValueError, "student: expected the levels ['p3', 'p4', 'pool'], got ['p3']"),
    (lambda: MaskedDistillLoss(CHANNELS, pretrained=NAMED, **OPTIONS)(S, turned(S) | {"p6": S["p3"]}), ValueError, "teacher: expected the levels ['p3', 'p4', 'pool'], got"),
    (lambda: MaskedDistillLoss(CHANNELS, pretrained=NAMED, **OPTIONS)(S, T | {"pool": T["p3"]}), ValueError, "teacher['pool']: expected 4 channels, got 5"),
    (lambda: MaskedDistillLoss([5, 5], student_channels={"p3": 2, "p4": 2}), TypeError, "student_channels: a mapping by level, but channels is none"),
    (lambda: MaskedDistillLoss(CHANNELS, student_channels={"p3": 2, "p4": 2}), ValueError, "student_channels: expected the levels ['p3', 'p4', 'pool'], got ['p3', 'p4']"),
    (lambda: MaskLearner({"a.b": 4}), ValueError, "channels: 'a.b' cannot name a level"),
    (lambda: MaskLearner({"": 4}), ValueError, "channels: '' cannot name a level"),
    (lambda: MaskLearner({"keys": 4}), ValueError, "channels: 'keys' cannot name a level"),
    (lambda: MaskLearner({2.5: 4}), ValueError, "channels: 2.5 cannot name a level"),
    (lambda: MaskLearner({0: 4, "0": 4}), ValueError, "channels: expected names that differ as strings"),
    (lambda: MaskLearner({"p3": 0}), ValueError, "channels: expected a positive int or one per level"),
    (lambda: MaskLearner({}), ValueError, "channels: expected a positive int or one per level"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "sentence"), WRONG, ids=[case[2] for case in WRONG])
@pytest.mark.filterwarnings("ignore:MaskedDistillLoss without pretrained")
def test_wrong_names(call: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert sentence in str(caught.value)


def test_without_names_the_first_order_counts(target: tuple[str, str]) -> None:
    """The first mapping that a module sees says which level is which, the teacher's; later ones may come in another order."""
    impl, device = target
    s, t = ({k: x.to(device) for k, x in levels.items()} for levels in (S, T))
    criterion = MaskedDistillLoss([5, 5, 4], pretrained=PLAIN, impl=impl, **OPTIONS).to(device).eval()
    want = criterion(list(s.values()), list(t.values()), reduction="none")
    for twin in (criterion, copy.deepcopy(criterion)):
        for student, teacher in ((turned(s), t), (s, turned(t)), (turned(s), turned(t))):
            assert torch.equal(twin(student, teacher, reduction="none"), want)
            assert list(twin.diagnostics()) == NAMES
    masks = criterion.masks(turned(t))
    assert list(masks) == NAMES[::-1]
    weights = {name: torch.rand(2, 3, device=device) for name in NAMES}
    assert torch.equal(
        criterion(s, turned(t), mask_weights=turned(weights)),
        criterion(list(s.values()), list(t.values()), mask_weights=list(weights.values())),
    )
    late = MaskedDistillLoss([5, 5, 4], pretrained=PLAIN, impl=impl, **OPTIONS).to(device).eval()
    late.masks(t)
    assert torch.equal(late(s, turned(t), reduction="none"), want)
    others = {"a": 0, "b": 1, "c": 2}  # another pair of models: nothing is known of their order
    a, b = ({name: list(x.values())[i] for name, i in others.items()} for x in (s, t))
    assert torch.equal(criterion(a, b, reduction="none"), want)


@pytest.mark.slow
def test_without_names_compiled(target: tuple[str, str]) -> None:
    """Whether the criterion sees its first mapping before or while it is compiled."""
    impl, device = target
    s, t = ({k: x.to(device) for k, x in levels.items()} for levels in (S, T))
    criterion = MaskedDistillLoss([5, 5, 4], pretrained=PLAIN, impl=impl, **OPTIONS).to(device).eval()
    want = criterion(s, t, reduction="none")
    torch._dynamo.reset()
    assert torch.equal(torch.compile(criterion, backend="aot_eager", fullgraph=True)(s, turned(t), reduction="none"), want)
    torch._dynamo.reset()
    late = MaskedDistillLoss([5, 5, 4], pretrained=PLAIN, impl=impl, **OPTIONS).to(device).eval()
    compiled = torch.compile(late, backend="aot_eager", fullgraph=True)  # sees the first mapping itself
    for student, teacher in ((s, t), (s, turned(t)), (turned(s), turned(t))):
        assert torch.equal(compiled(student, teacher, reduction="none"), want)


@pytest.mark.parametrize("order", [lambda x: x, turned])
def test_learner_without_names(order: Callable[[dict[str, Any]], Any]) -> None:
    learner = learned([5, 5, 4])
    want = learner(T)
    found = learner(order(T))
    assert list(found) == list(order(T))
    assert all(torch.equal(found[name], want[name]) for name in NAMES)
    teacher = Teacher(order)
    with learner.attach(teacher, "neck"):
        masked = teacher(T)
    assert all(torch.equal(masked[name], want[name]) for name in NAMES)


def test_one_level_needs_no_name() -> None:
    learner = learned(5)
    criterion = MaskedDistillLoss(5, pretrained=learner, **OPTIONS)
    want = criterion(S["p3"], T["p3"])
    assert torch.equal(criterion({"p3": S["p3"]}, {"p3": T["p3"]}), want)
    assert list(criterion.diagnostics()) == ["p3"]
    assert torch.equal(learner({"p3": T["p3"]})["p3"], learner(T["p3"]))
    numbered = MaskedDistillLoss({0: 5, 1: 5}, pretrained=learned([5, 5]), **OPTIONS)
    assert torch.equal(
        numbered({1: S["p4"], 0: S["p3"]}, {0: T["p3"], 1: T["p4"]}), numbered([S["p3"], S["p4"]], [T["p3"], T["p4"]])
    )


def test_compiled() -> None:
    torch._dynamo.reset()
    criterion = MaskedDistillLoss(CHANNELS, pretrained=NAMED, **OPTIONS)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(turned(S), T), criterion(S, T))
