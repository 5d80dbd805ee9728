"""Learned tokens from every source users have, and one clear sentence for every file that cannot be one."""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskd_triton import MaskedDistillLoss, MaskLearner
from maskd_triton.checkpoints import load_masks, mask_state

CHANNELS, TOKENS = [4, 6], 3
STRANGERS = {"backbone.conv.weight": torch.ones(2, 3, 1, 1), "neck.mask_modules_norm.weight": torch.ones(5)}


def filled(module: nn.Module, seed: int = 1) -> Any:
    """``module`` with all parameters away from their initial values: biases start at 0, tokens close to it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return module


def learned(weight_mask: bool = True) -> MaskLearner:
    return filled(MaskLearner(CHANNELS, TOKENS, weight_mask))


def untrained(*args: Any, **options: Any) -> MaskedDistillLoss:
    with pytest.warns(UserWarning, match="untrained"):
        return MaskedDistillLoss(*args, **options)


def loss_of(criterion: MaskedDistillLoss) -> Tensor:
    """The loss of fixed features, one value per level."""
    generator = torch.Generator().manual_seed(2)
    student, teacher = ([torch.randn(2, c, 5, 4, generator=generator) for c in criterion.channels] for _ in range(2))
    return criterion.eval()(student, teacher, reduction="none")


def assert_holds(criterion: MaskedDistillLoss, learner: MaskLearner) -> None:
    """Every mask entry, and the loss against a criterion whose parameters were copied one by one."""
    options = {"weight_mask": learner.mask_modules[0].weight_mask, "custom_mask": False}
    direct = untrained(learner.channels, learner.mask_modules[0].num_tokens, **options)
    entries = learner.state_dict()
    assert entries.keys() == {k for k in criterion.state_dict() if k.startswith("mask_modules.")}
    with torch.no_grad():
        for name, parameter in direct.mask_modules.named_parameters(prefix="mask_modules"):
            parameter.copy_(entries[name])
            assert torch.equal(criterion.state_dict()[name], entries[name]), name
    assert not any(p.requires_grad for p in criterion.mask_modules.parameters())
    loss = loss_of(criterion)
    assert torch.equal(loss, loss_of(direct))
    assert (loss > 0.01).all()


def saved(state: Any, folder: Path, **options: Any) -> Path:
    torch.save(state, folder / "tokens.pth", **options)
    return folder / "tokens.pth"


def mmdet(learner: MaskLearner) -> dict[str, Any]:
    entries = {f"some.prefix.{k}": v for k, v in learner.state_dict().items()}
    return {"meta": {"epoch": 12, "CLASSES": ("cat", "dog")}, "state_dict": OrderedDict(STRANGERS | entries)}


def yolov5(learner: MaskLearner) -> dict[str, Any]:
    return {"iteration": 2000, "maskd_model": learner.state_dict(), "loss": 0.25, "optimizer": {"state": {}}}


SOURCES: dict[str, Callable[[MaskLearner, Path], Any]] = {
    "learner": lambda learner, _: learner,
    "state_dict": lambda learner, _: learner.state_dict(),
    "reversed": lambda learner, _: dict(reversed(learner.state_dict().items())),
    "path": lambda learner, folder: saved(learner.state_dict(), folder),
    "str": lambda learner, folder: str(saved(learner.state_dict(), folder)),
    "legacy_file": lambda learner, folder: saved(learner.state_dict(), folder, _use_new_zipfile_serialization=False),
    "mmdet": lambda learner, _: mmdet(learner),
    "mmdet_file": lambda learner, folder: saved(mmdet(learner), folder),
    "detector": lambda learner, _: mmdet(learner)["state_dict"],
    "yolov5": lambda learner, _: yolov5(learner),
    "yolov5_file": lambda learner, folder: saved(yolov5(learner), folder),
}


@pytest.mark.parametrize("weight_mask", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_sources(source: Callable[[MaskLearner, Path], Any], weight_mask: bool, tmp_path: Path) -> None:
    learner = learned(weight_mask)
    options = {"weight_mask": weight_mask, "custom_mask": False}
    assert_holds(MaskedDistillLoss(CHANNELS, TOKENS, pretrained=source(learner, tmp_path), **options), learner)


@pytest.mark.parametrize("as_state", [True, False], ids=["state", "module"])
def test_another_criterion(as_state: bool) -> None:
    learner = learned()
    other = MaskedDistillLoss(CHANNELS, TOKENS, student_channels=[2, 3], pretrained=learner)
    other.warmup_step.fill_(77)
    source = other.state_dict() if as_state else other
    assert {"align.0.weight", "warmup_step"} <= other.state_dict().keys()
    criterion = MaskedDistillLoss(CHANNELS, TOKENS, custom_mask=False, pretrained=source)
    assert_holds(criterion, learner)
    assert criterion.warmup_step.item() == 0


@pytest.mark.parametrize("in_file", [True, False], ids=["file", "dict"])
@pytest.mark.parametrize("weight_mask", [True, False], ids=["weighted", "unweighted"])
def test_bare_entries_of_one_level(weight_mask: bool, in_file: bool, tmp_path: Path) -> None:
    learner = filled(MaskLearner(19, 8, weight_mask))
    state = learner.mask_modules[0].state_dict()
    assert state.keys() >= ({"mask_token", "prob.0.weight"} if weight_mask else {"mask_token"})
    source = saved(state, tmp_path) if in_file else state
    options = {"weight_mask": weight_mask, "custom_mask": False}
    assert_holds(MaskedDistillLoss(19, 8, pretrained=source, **options), learner)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_entries_of_other_dtypes_are_cast(dtype: torch.dtype) -> None:
    entries = {k: v.to(dtype) for k, v in learned().state_dict().items()}
    expected = learned()
    expected.load_state_dict({k: v.float() for k, v in entries.items()})
    criterion = MaskedDistillLoss(CHANNELS, TOKENS, custom_mask=False, pretrained=entries)
    assert {p.dtype for p in criterion.parameters()} == {torch.float32}
    assert_holds(criterion, expected)


def test_mask_state_names_and_values() -> None:
    state = mask_state(mmdet(learned()))
    assert state.keys() == learned().state_dict().keys()
    assert all(torch.equal(v, learned().state_dict()[k]) for k, v in state.items())


def test_the_source_is_not_shared() -> None:
    learner = learned()
    criterion = MaskedDistillLoss(CHANNELS, TOKENS, custom_mask=False, pretrained=learner)
    filled(learner, seed=9)
    assert_holds(criterion, learned())


def broken(**entries: Tensor | None) -> dict[str, Tensor]:
    """The learner's state dict with ``entries`` (``__`` for a dot, after ``mask_modules.``) replaced, None: left out."""
    state = dict(learned().state_dict())
    for key, value in entries.items():
        name = "mask_modules." + key.removeprefix("level_").replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


NAN, INF = torch.zeros(3, 4), torch.zeros(3)
NAN[2, 1], INF[1] = float("nan"), -float("inf")
PROBLEMS: dict[str, tuple[dict[str, Tensor | None], list[str]]] = {
    "missing": ({"level_0__prob__0__bias": None}, ["missing: mask_modules.0.prob.0.bias [4]"]),
    "unexpected_level": ({"level_2__mask_token": torch.ones(3, 6)}, ["unexpected: mask_modules.2.mask_token [3, 6]"]),
    "unexpected_name": ({"level_0__prob__1__bias": torch.ones(3)}, ["unexpected: mask_modules.0.prob.1.bias [3]"]),
    "misshapen": (
        {"level_1__mask_token": torch.ones(3, 5)},
        ["misshapen: mask_modules.1.mask_token is [3, 5], expected [3, 6]"],
    ),
    "transposed": (
        {"level_1__mask_token": torch.ones(6, 3)},
        ["misshapen: mask_modules.1.mask_token is [6, 3], expected [3, 6]"],
    ),
    "broadcastable": (
        {"level_1__mask_token": torch.ones(1, 6)},
        ["misshapen: mask_modules.1.mask_token is [1, 6], expected [3, 6]"],
    ),
    "integer": (
        {"level_0__prob__2__bias": torch.ones(3, dtype=torch.int64)},
        ["wrong dtype: mask_modules.0.prob.2.bias is torch.int64, expected floating point"],
    ),
    "nan": ({"level_0__mask_token": NAN}, ["not finite: mask_modules.0.mask_token"]),
    "inf": ({"level_1__prob__2__bias": INF}, ["not finite: mask_modules.1.prob.2.bias"]),
    "infinite_once_cast": (
        {"level_0__mask_token": torch.full((3, 4), 1e300, dtype=torch.float64)},
        ["not finite: mask_modules.0.mask_token"],
    ),
    "sparse": ({"level_0__mask_token": torch.ones(3, 4).to_sparse()}, ["not a dense tensor: mask_modules.0.mask_token"]),
    "meta": ({"level_0__mask_token": torch.ones(3, 4, device="meta")}, ["not a dense tensor: mask_modules.0.mask_token"]),
    "all_at_once": (
        {
            "level_0__prob__0__bias": None,
            "level_0__prob__0__weight": None,
            "level_2__mask_token": torch.ones(3, 6),
            "level_1__mask_token": torch.ones(3, 5),
            "level_0__prob__2__bias": torch.ones(3, dtype=torch.int64),
            "level_0__mask_token": NAN,
            "level_1__prob__2__bias": INF,
        },
        [
            "missing: mask_modules.0.prob.0.bias [4]",
            "missing: mask_modules.0.prob.0.weight [4, 4, 3, 3]",
            "unexpected: mask_modules.2.mask_token [3, 6]",
            "misshapen: mask_modules.1.mask_token is [3, 5], expected [3, 6]",
            "wrong dtype: mask_modules.0.prob.2.bias is torch.int64, expected floating point",
            "not finite: mask_modules.0.mask_token",
            "not finite: mask_modules.1.prob.2.bias",
        ],
    ),
}


@pytest.mark.parametrize(("entries", "problems"), PROBLEMS.values(), ids=PROBLEMS)
def test_entries_that_do_not_fit(entries: dict[str, Tensor | None], problems: list[str]) -> None:
    modules = filled(MaskLearner(CHANNELS, TOKENS), seed=5).mask_modules
    before = {k: v.clone() for k, v in modules.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit") as caught:
        load_masks(modules, broken(**entries))
    first, *lines = str(caught.value).split("\n  ")
    assert first == "pretrained: the mask entries do not fit:"
    assert sorted(lines) == sorted(problems)
    assert all(torch.equal(v, before[k]) for k, v in modules.state_dict().items())
    with pytest.raises(ValueError, match="do not fit"):
        MaskedDistillLoss(CHANNELS, TOKENS, pretrained=broken(**entries))


def test_weights_without_weight_mask() -> None:
    names = sorted(k for k in learned().state_dict() if "prob" in k)
    with pytest.raises(ValueError, match="unexpected") as caught:
        MaskedDistillLoss(CHANNELS, TOKENS, weight_mask=False, pretrained=learned())
    lines = str(caught.value).split("\n  ")[1:]
    assert sorted(line.split()[1] for line in lines) == names
    assert {line.split()[0] for line in lines} == {"unexpected:"}


def test_weight_mask_without_weights() -> None:
    with pytest.raises(ValueError, match=r"missing: mask_modules\.0\.prob\.0\.weight \[4, 4, 3, 3\]"):
        MaskedDistillLoss(CHANNELS, TOKENS, pretrained=learned(weight_mask=False))


@pytest.mark.parametrize("second", ["student.mask_modules.1.mask_token", "mask_modules.1.mask_token"])
def test_one_entry_under_two_prefixes(second: str) -> None:
    state = mmdet(learned())
    state["state_dict"][second] = torch.ones(3, 6)
    sentence = r"the state dict holds 'mask_modules\.1\.mask_token' more than once, under different prefixes"
    with pytest.raises(ValueError, match=sentence):
        MaskedDistillLoss(CHANNELS, TOKENS, pretrained=state)


@pytest.mark.parametrize("state", [{}, STRANGERS, {"state_dict": STRANGERS}, {"mask_modules.0.mask_token": 3}])
def test_no_mask_entries(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"the state dict holds no mask entries: expected keys like 'mask_modules\.0"):
        mask_state(state)


def test_no_mask_entries_lists_what_is_there(tmp_path: Path) -> None:
    path = saved({f"layer{i}.weight": torch.ones(1) for i in range(11)}, tmp_path)
    with pytest.raises(ValueError, match=r"holds no mask entries.*'layer0\.weight', .*'layer7\.weight'\] and 3 more") as caught:
        mask_state(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("source", [3, [1, 2], torch.ones(2, 3), b"tokens.pth"], ids=lambda source: type(source).__name__)
def test_wrong_source(source: Any) -> None:
    kind = type(source).__name__
    with pytest.raises(TypeError, match=f"pretrained: expected a path, a state dict or a MaskLearner, got {kind}"):
        MaskedDistillLoss(CHANNELS, TOKENS, pretrained=source)


@pytest.mark.parametrize("kind", [str, Path])
def test_missing_file_and_folder(kind: type, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pretrained: no such file: .*nothing\.pth"):
        mask_state(kind(tmp_path / "nothing.pth"))
    with pytest.raises(IsADirectoryError, match="pretrained: expected a file, got the folder .*" + tmp_path.name):
        mask_state(kind(tmp_path))


def assert_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be loaded safely \(weights_only=True\)") as caught:
        MaskedDistillLoss(CHANNELS, TOKENS, pretrained=path)
    assert str(path) in str(caught.value)


def random_bytes(seed: int, size: int = 1000) -> bytes:
    return bytes(torch.randint(256, (size,), generator=torch.Generator().manual_seed(seed)).tolist())


CONTENTS = {
    "empty": b"",
    "text": b"hello world\n",
    "csv": b"token,weight\n0,0.5\n",
    "json": b'{"mask_modules.0.mask_token": [[0.5]]}',
    "git_lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 1024\n",
    "zip_header": b"PK\x03\x04" + bytes(40),
    **{f"random_{seed}": random_bytes(seed) for seed in range(4)},
    **{f"opcode_{first:02x}": bytes([first]) for first in b"h)\x86r"},
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_files_that_are_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    assert_refused(content, tmp_path / "tokens.pth")


def test_legacy_file_with_a_damaged_storage_key(tmp_path: Path) -> None:
    """torch's reader asserts where the storages a legacy file announces are not those it holds."""
    path = saved(learned().state_dict(), tmp_path, _use_new_zipfile_serialization=False)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"mask_modules.0.mask_token")  # the key of this entry's storage follows its name
    damaged = 0
    for i in range(at + 20, min(at + 400, len(data))):
        broken_data = bytearray(data)
        broken_data[i] ^= 1
        path.write_bytes(broken_data)
        try:
            mask_state(path)
        except ValueError:
            damaged += 1
    assert damaged > 20  # all others load, or change a name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.5, 0.7, 0.9, 0.99])
def test_truncated_file(share: float, zipped: bool, tmp_path: Path) -> None:
    path = saved(learned().state_dict(), tmp_path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    assert_refused(content[: int(share * len(content))], path)


@pytest.mark.parametrize("content", [[torch.ones(3, 4)], torch.ones(3, 4), 3], ids=lambda content: type(content).__name__)
def test_file_without_a_state_dict(content: Any, tmp_path: Path) -> None:
    path = saved(content, tmp_path)
    with pytest.raises(ValueError, match=f"to hold a state dict, got {type(content).__name__}") as caught:
        mask_state(path)
    assert str(path) in str(caught.value)


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "tokens.pth"
    state = {**learned().state_dict(), "extra": Trap(marker)}
    pickle.loads(pickle.dumps(Trap(marker))).close()
    marker.unlink()  # raises unless the trap works
    assert_refused(pickle.dumps({"mask_modules.0.mask_token": Trap(marker)}, protocol=2), path)
    assert_refused(pickle.dumps(Trap(marker), protocol=2), path)
    for zipped in (True, False):
        saved(state, tmp_path, _use_new_zipfile_serialization=zipped)
        assert_refused(path.read_bytes(), path)
    assert not marker.exists()


def test_whole_module_in_a_file(tmp_path: Path) -> None:
    path = saved(learned(), tmp_path)
    assert_refused(path.read_bytes(), path)


@pytest.mark.parametrize("weight_mask", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("student_channels", [None, [2, 3]], ids=["plain", "aligned"])
def test_criterion_round_trip(student_channels: list[int] | None, weight_mask: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"student_channels": student_channels, "weight_mask": weight_mask, "custom_mask_warmup": 2}
    criterion = MaskedDistillLoss(CHANNELS, TOKENS, pretrained=learned(weight_mask), **options)
    generator = torch.Generator().manual_seed(3)
    student, teacher = (
        [torch.randn(2, c, 4, 5, generator=generator) for c in channels]
        for channels in (student_channels or CHANNELS, CHANNELS)
    )
    for _ in range(3):
        criterion(student, teacher)
    levels = range(len(CHANNELS))
    entries = ["mask_token", *(f"prob.{i}.{p}" for i in (0, 2) for p in ("weight", "bias") if weight_mask)]
    documented = {f"mask_modules.{i}.{entry}" for i in levels for entry in entries} | {"warmup_step"}
    if student_channels:
        documented |= {f"align.{i}.{p}" for i in levels for p in ("weight", "bias")}
    state = criterion.state_dict()
    assert state.keys() == documented
    assert state["warmup_step"].item() == 3

    other = untrained(CHANNELS, TOKENS, **options)
    assert not torch.equal(other.eval()(student, teacher), criterion.eval()(student, teacher))
    other.load_state_dict(torch.load(saved(state, tmp_path), weights_only=True))
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    assert torch.equal(other.eval()(student, teacher), criterion.eval()(student, teacher))
