"""Learned tokens from every source users have, and one clear sentence for every file that cannot be one."""

import argparse
import copy
import datetime
import os
import pydoc
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from problems import literal_losses
from programs.without import Absent
from torch import Tensor, nn

from maskd_triton import MaskedDistillLoss, MaskLearner
from maskd_triton import functional as F
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
    """The tables of the learner's parameters, composed here by the public formulas in float64, and the loss by them."""
    modules = [module.double() for module in copy.deepcopy(learner).mask_modules]
    want: dict[str, Tensor] = {}
    with torch.no_grad():
        for i, module in enumerate(modules):
            weighting = F.compose_weighting(*module.weighting()) if module.weight_mask else ()
            tables = dict(zip(("mask_token", "pool_rows", "pool_bias"), (module.mask_token, *weighting), strict=False))
            want |= {f"mask_modules.{i}.{name}": value.float() for name, value in tables.items()}
    state = criterion.state_dict()
    assert want.keys() == {k for k in state if k.startswith("mask_modules.")}
    for name, value in want.items():
        assert torch.equal(state[name], value), name
    assert not list(criterion.mask_modules.parameters())
    loss = loss_of(criterion)
    generator = torch.Generator().manual_seed(2)
    s, t = ([torch.randn(2, c, 5, 4, generator=generator).double() for c in criterion.channels] for _ in range(2))
    torch.testing.assert_close(loss.double(), literal_losses(learner, s, t), rtol=1e-5, atol=0)
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
    assert {x.dtype for x in criterion.mask_modules.buffers()} == {torch.float32}
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


class Config:
    """What a training framework puts beside the weights."""


STRANGE: dict[str, tuple[Any, str]] = {
    "numpy_scalar": (np.float64(0.4), "numpy._core.multiarray.scalar"),
    "array": (np.zeros(3), "numpy._core.multiarray._reconstruct"),
    "namespace": (argparse.Namespace(lr=0.1), "argparse.Namespace"),
    "path": (PurePosixPath("runs"), "pathlib.PurePosixPath"),
    "date": (datetime.date(2026, 11, 25), "datetime.date"),
    "class": (Config(), f"{__name__}.Config"),
    "builtin": (len, "builtins.len"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(("value", "name"), STRANGE.values(), ids=STRANGE)
def test_what_is_refused_and_the_two_ways_on(value: Any, name: str, zipped: bool, tmp_path: Path) -> None:
    learner = learned()
    state = {"state_dict": learner.state_dict(), "meta": {"best": [value]}}
    path = saved(state, tmp_path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"cannot be loaded safely \(weights_only=True\): it holds more than tensors"
    ) as caught:
        mask_state(path)
    assert name in str(caught.value)
    allowed: dict[str, Any] = {}
    while True:  # as a reader of the sentences would
        try:
            with torch.serialization.safe_globals(list(allowed.values())):
                assert_equal_entries(learner, MaskLearner(CHANNELS, TOKENS, pretrained=path))
            break
        except ValueError as error:
            names = re.search(r"safe_globals\(\[(.+)\]\)", str(error))[1].split(", ")
            assert not allowed.keys() >= set(names)
            allowed |= {n: pydoc.locate(n) for n in names}
    torch.save(torch.load(path, weights_only=False)["state_dict"], tmp_path / "plain.pt")
    assert_equal_entries(learner, MaskLearner(CHANNELS, TOKENS, pretrained=tmp_path / "plain.pt"))


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
    entries = ["mask_token", *(("pool_rows", "pool_bias") if weight_mask else ())]
    documented = {f"mask_modules.{i}.{entry}" for i in levels for entry in entries} | {"warmup_step", "loss_weight"}
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


SUFFIXES = [".pt", ".safetensors"]


def needs_package_of(suffix: str) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="needs the safetensors extra")


def assert_equal_entries(learner: MaskLearner, other: nn.Module) -> None:
    entries = learner.state_dict()
    assert entries.keys() == other.state_dict().keys()
    for key, value in other.state_dict().items():
        assert torch.equal(value, entries[key]), key


@pytest.mark.parametrize("weight_mask", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_sources_of_a_learner(source: Callable[[MaskLearner, Path], Any], weight_mask: bool, tmp_path: Path) -> None:
    learner = learned(weight_mask)
    loaded = MaskLearner(CHANNELS, TOKENS, weight_mask, pretrained=source(learner, tmp_path))
    assert_equal_entries(learner, loaded)
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("standardize", [False, True])
def test_a_learner_from_bare_entries(standardize: bool) -> None:
    single = filled(MaskLearner(19, 8, standardize=standardize))
    for module in single.mask_modules if standardize else ():
        module.pixels_seen.fill_(1)
    entries = single.mask_modules[0].state_dict()
    assert_equal_entries(single, MaskLearner(19, 8, standardize=standardize, pretrained=entries))


def test_a_learner_from_a_criterion() -> None:
    criterion = MaskedDistillLoss(CHANNELS, TOKENS, pretrained=learned())
    for source in (criterion, criterion.state_dict(), criterion.mask_modules[0].state_dict()):
        with pytest.raises(ValueError, match=r"pretrained: these are the tables of a MaskedDistillLoss.*pass the MaskLearner"):
            MaskLearner(CHANNELS, TOKENS, pretrained=source)


@pytest.mark.parametrize(("entries", "problems"), PROBLEMS.values(), ids=PROBLEMS)
def test_entries_that_do_not_fit_a_learner(entries: dict[str, Tensor | None], problems: list[str]) -> None:
    with pytest.raises(ValueError, match="do not fit") as caught:
        MaskLearner(CHANNELS, TOKENS, pretrained=broken(**entries))
    assert sorted(str(caught.value).split("\n  ")[1:]) == sorted(problems)


def test_wrong_sources_of_a_learner(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="pretrained: expected a path, a state dict or a MaskLearner, got int"):
        MaskLearner(CHANNELS, TOKENS, pretrained=3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"pretrained: no such file: .*nothing"):
        MaskLearner(CHANNELS, TOKENS, pretrained=tmp_path / "nothing")


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("weight_mask", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("suffix", [*SUFFIXES, ""])
def test_saved_and_loaded(suffix: str, weight_mask: bool, kind: type, tmp_path: Path) -> None:
    needs_package_of(suffix)
    learner, path = learned(weight_mask), kind(tmp_path / f"tokens{suffix}")
    learner.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [f"tokens{suffix}"]
    options = {"weight_mask": weight_mask, "custom_mask": False}
    assert_holds(MaskedDistillLoss(CHANNELS, TOKENS, pretrained=path, **options), learner)
    assert_equal_entries(learner, MaskLearner(CHANNELS, TOKENS, weight_mask, pretrained=path))
    filled(learner, seed=9).save(path)
    assert_equal_entries(learner, MaskLearner(CHANNELS, TOKENS, weight_mask, pretrained=path))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_saved_entries(suffix: str, tmp_path: Path) -> None:
    """Masks only, no gradient, the dtypes and values of the module; what others' readers give."""
    needs_package_of(suffix)
    learner = learned().to(torch.bfloat16).to(memory_format=torch.channels_last)
    with torch.no_grad():  # entries that share memory
        whole = torch.randn(1000, 4, dtype=torch.bfloat16)
        learner.mask_modules[0].mask_token.set_(whole[:3])
        learner.mask_modules[0].prob[0].bias.set_(whole[0])
    path = tmp_path / f"tokens{suffix}"
    learner.save(path)
    if suffix == ".pt":
        state = torch.load(path, weights_only=True)
    else:
        state = pytest.importorskip("safetensors.torch").load_file(path)
    expected = learner.state_dict()
    assert state.keys() == expected.keys() == {k for k in expected if k.startswith("mask_modules.")}
    for key, value in state.items():
        assert value.dtype == torch.bfloat16
        assert value.is_contiguous()
        assert not value.requires_grad
        assert torch.equal(value, expected[key]), key
    assert path.stat().st_size < 6000 + 2 * sum(v.numel() for v in expected.values())  # not the 8000 bytes of ``whole``


def test_safetensors_of_a_whole_detector(tmp_path: Path) -> None:
    writer = pytest.importorskip("safetensors.torch", reason="needs the safetensors extra")
    learner = learned()
    writer.save_file(dict(mmdet(learner)["state_dict"]), tmp_path / "detector.SafeTensors")
    criterion = MaskedDistillLoss(CHANNELS, TOKENS, custom_mask=False, pretrained=tmp_path / "detector.SafeTensors")
    assert_holds(criterion, learner)


@pytest.mark.parametrize("share", [0, 0.004, 0.02, 0.5, 0.99])
def test_damaged_safetensors(share: float, tmp_path: Path) -> None:
    needs_package_of(".safetensors")
    path = tmp_path / "tokens.safetensors"
    learned().save(path)
    content = path.read_bytes()
    other = saved(learned().state_dict(), tmp_path).read_bytes()
    for damaged in (content[: int(share * len(content))], random_bytes(5), other, b'{"a": 1}' + bytes(20)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be loaded safely: it is damaged, or no safetensors file") as caught:
            MaskLearner(CHANNELS, TOKENS, pretrained=path)
        assert str(path) in str(caught.value)


def test_safetensors_with_a_flipped_bit(tmp_path: Path) -> None:
    """Whatever it does to the header, it is a ValueError, or entries that fit."""
    needs_package_of(".safetensors")
    path = tmp_path / "tokens.safetensors"
    learned().save(path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for i in range(header):
        damaged = bytearray(content)
        damaged[i] ^= 1
        path.write_bytes(damaged)
        try:
            MaskLearner(CHANNELS, TOKENS, pretrained=path)
        except ValueError:
            refused += 1
    assert header - 50 < refused < header  # a bit of the metadata, or of a space, means nothing


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_save_where_there_is_no_place(suffix: str, tmp_path: Path) -> None:
    needs_package_of(suffix)
    learner = learned()
    with pytest.raises(FileNotFoundError, match=r"save: no such folder: .*missing"):
        learner.save(tmp_path / "missing" / f"tokens{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(IsADirectoryError, match=r"save: expected a file, got the folder .*folder"):
        learner.save(tmp_path / f"folder{suffix}")
    assert [p.name for p in tmp_path.iterdir()] == [f"folder{suffix}"]


def test_save_through_a_link(tmp_path: Path) -> None:
    """The link stays; the format is that of the name given, which is the one that is read."""
    needs_package_of(".safetensors")
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link.safetensors", tmp_path / "there" / "tokens.pt"
    link.symlink_to(target)
    learned().save(link)
    assert link.is_symlink()
    assert_equal_entries(learned(), MaskLearner(CHANNELS, TOKENS, pretrained=link))
    assert [p.name for p in target.parent.iterdir()] == ["tokens.pt"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
def test_saved_file_has_everyday_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    learned().save(tmp_path / "tokens.pt")
    assert (tmp_path / "tokens.pt").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "interrupt"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_failed_save_leaves_the_old_file_alone(
    suffix: str, step: str, failure: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needs_package_of(suffix)
    path = tmp_path / f"tokens{suffix}"
    learned().save(path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        assert len(list(tmp_path.iterdir())) == 2
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(failure)):
        filled(learned(), seed=9).save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_killed_save_leaves_the_old_file_whole(step: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.pt"
    learned().save(path)
    before = path.read_bytes()
    command = [sys.executable, str(Path(__file__).parent / "programs" / "killed_save.py"), str(path), step]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == 42, killed.stderr
    assert path.read_bytes() == before
    assert_equal_entries(learned(), MaskLearner(CHANNELS, TOKENS, pretrained=path))
    assert [p.suffix for p in tmp_path.iterdir() if p != path] == [".tmp"]
    filled(learned(), seed=9).save(path)
    assert_equal_entries(filled(learned(), seed=9), MaskLearner(CHANNELS, TOKENS, pretrained=path))


def test_safetensors_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent("safetensors"), *sys.meta_path])
    sentence = r"a \.safetensors file needs the safetensors package.*pip install 'maskd-triton\[safetensors\]'"
    with pytest.raises(ModuleNotFoundError, match="save: .*" + sentence) as caught:
        learned().save(tmp_path / "tokens.safetensors")
    assert caught.value.name == "safetensors"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "tokens.safetensors").write_bytes(b"")
    with pytest.raises(ModuleNotFoundError, match="pretrained: .*" + sentence):
        MaskLearner(CHANNELS, TOKENS, pretrained=tmp_path / "tokens.safetensors")
    learned().save(tmp_path / "tokens.pt")
    assert_equal_entries(learned(), MaskLearner(CHANNELS, TOKENS, pretrained=tmp_path / "tokens.pt"))
