"""Learned tokens from every source users have; a sentence with the way out for every other; nothing in a file is executed."""

import os
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import trained
from programs.without import Absent
from torch import Tensor, nn

from maskd_triton import MaskedDistillLoss, MaskLearner
from maskd_triton.checkpoints import load_masks, mask_state

CHANNELS, TOKENS = [4, 6], 3
STRANGERS = {"backbone.conv.weight": torch.ones(2, 3, 1, 1), "neck.mask_modules_norm.weight": torch.ones(5)}
BOTH = pytest.mark.parametrize("weight_mask", [True, False], ids=["weighted", "unweighted"])
SUFFIXES = pytest.mark.parametrize("suffix", [".pt", ".safetensors"])


def learned(weight_mask: bool = True, standardize: bool | str = False, seed: int = 1) -> MaskLearner:
    return trained(CHANNELS, TOKENS, weight_mask, standardize, seed=seed)


def assert_holds(module: MaskedDistillLoss | MaskLearner, learner: MaskLearner) -> None:
    """A learner's entries, bit for bit; a criterion's masks and weights."""
    if isinstance(module, MaskLearner):
        entries, own = learner.state_dict(), module.state_dict()
        assert entries.keys() == own.keys()
        assert all(torch.equal(x, entries[key]) for key, x in own.items())
        return
    for level, want in zip(module.mask_modules, learner.mask_modules, strict=True):
        x = torch.randn(2, level.channels, 5, 4, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(level.masks(x), want.masks(x), rtol=1e-5, atol=1e-6)
        if learner.weight_mask:
            torch.testing.assert_close(level.weights(x), want.weights(x), rtol=1e-5, atol=1e-6)


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
    "reversed": lambda learner, _: dict(reversed(learner.state_dict().items())),
    "path": lambda learner, folder: saved(learner.state_dict(), folder),
    "str_of_an_old_format": lambda learner, folder: str(
        saved(learner.state_dict(), folder, _use_new_zipfile_serialization=False)
    ),
    "mmdet": lambda learner, folder: saved(mmdet(learner), folder),
    "detector": lambda learner, _: mmdet(learner)["state_dict"],
    "yolov5": lambda learner, folder: saved(yolov5(learner), folder),
}


@BOTH
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_sources(source: Callable[[MaskLearner, Path], Any], weight_mask: bool, tmp_path: Path) -> None:
    learner = learned(weight_mask)
    for kind in (MaskedDistillLoss, MaskLearner):
        found = kind(CHANNELS, TOKENS, weight_mask=weight_mask, pretrained=source(learner, tmp_path))
        assert_holds(found, learner)
        trained(CHANNELS, TOKENS, weight_mask, seed=9)  # memory of its own
    assert mask_state(source(learner, tmp_path)).keys() == learner.state_dict().keys()


@BOTH
def test_bare_entries_of_one_level(weight_mask: bool, tmp_path: Path) -> None:
    """As segmentation's files hold them."""
    learner = trained([19], 8, weight_mask)
    path = saved(learner.mask_modules[0].state_dict(), tmp_path)
    for kind in (MaskedDistillLoss, MaskLearner):
        assert_holds(kind(19, 8, weight_mask=weight_mask, pretrained=path), learner)


@pytest.mark.parametrize("as_state", [True, False], ids=["state", "module"])
def test_another_criterion(as_state: bool) -> None:
    learner = learned()
    other = MaskedDistillLoss(CHANNELS, TOKENS, student_channels=[2, 3], pretrained=learner)
    other.warmup_step.fill_(77)
    source = other.state_dict() if as_state else other
    criterion = MaskedDistillLoss(CHANNELS, TOKENS, pretrained=source)
    assert_holds(criterion, learner)
    assert criterion.warmup_step.item() == 0
    with pytest.raises(ValueError, match=r"pretrained: these are the tables of a MaskedDistillLoss.*pass the MaskLearner"):
        MaskLearner(CHANNELS, TOKENS, pretrained=source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_entries_of_other_dtypes_are_cast(dtype: torch.dtype) -> None:
    entries = {k: v.to(dtype) for k, v in learned().state_dict().items()}
    expected = learned()
    expected.load_state_dict(entries)
    assert_holds(MaskedDistillLoss(CHANNELS, TOKENS, pretrained=entries), expected)
    assert_holds(MaskLearner(CHANNELS, TOKENS, pretrained=entries), expected)


# --- what does not fit -------------------------------------------------------------------------------------------------

OWN = "2 levels of 4, 6 channels, 3 tokens, with mask weights, not standardised"
STANDARDISED = OWN.replace("not ", "")
UNLIKE: dict[str, tuple[Callable[[], MaskLearner], dict[str, Any], str, str, str]] = {
    "standardised": (lambda: learned(standardize=True), {}, STANDARDISED, "standardize=", "channel_mean"),
    "not_standardised": (learned, {"standardize": True}, OWN, "standardize=", "channel_mean"),
    "of_single_channels": (
        lambda: learned(standardize=True),
        {"standardize": "isotropic"},
        STANDARDISED,
        "",
        ": expected one scale for all channels, got several: these are not standardize='isotropic'",
    ),
    "single_channel": (lambda: trained([1], 1), {}, "1 level of 1 channel, 1 token, with", "channels= and num_tokens=", ""),
    "levels_of_the_same_channels": (
        lambda: trained([4, 4, 6], 3),
        {},
        OWN.replace("2 levels of", "3 levels of 4,"),
        "channels=",
        "",
    ),
    "levels_alike": (lambda: trained([2] * 5, 3), {}, "5 levels of 2 channels, 3 tokens", "channels=", ""),
    "unweighted": (lambda: learned(False), {}, OWN.replace("with mask", "no mask"), "weight_mask=", "prob.0.bias"),
}


@pytest.mark.parametrize(("make", "options", "holds", "unlike", "line"), UNLIKE.values(), ids=UNLIKE)
def test_tokens_of_other_options(
    make: Callable[[], MaskLearner], options: dict[str, Any], holds: str, unlike: str, line: str, tmp_path: Path
) -> None:
    advice = f"Give the {unlike} that these tokens were learned with, or other tokens" if unlike else "Not all entries fit"
    expected = STANDARDISED if options else OWN
    path = tmp_path / "tokens.pt"
    make().save(path)
    for kind in (MaskedDistillLoss, MaskLearner):
        for source, name in ((make(), "MaskLearner"), (path, path)):
            with pytest.raises(ValueError, match="pretrained: ") as caught:
                kind(CHANNELS, TOKENS, pretrained=source, **options)
            first, _, rest = str(caught.value).partition("\n")
            assert first.startswith(f"pretrained: {name} holds {holds}")
            assert first.endswith(f"; expected {expected}. {advice}")
            assert line in rest


def test_one_scale_for_all_channels_fits_where_each_has_its_own() -> None:
    learner = learned(standardize="isotropic")
    for module in learner.mask_modules:
        module.channel_std.fill_(2)
    for standardize in ("isotropic", "channel", True):
        criterion = MaskedDistillLoss(CHANNELS, TOKENS, standardize=standardize, pretrained=learner)
        assert_holds(criterion, learner)
        assert_holds(MaskedDistillLoss(CHANNELS, TOKENS, standardize=standardize, pretrained=criterion), learner)


NAN = torch.zeros(3, 4)
NAN[2, 1] = float("nan")
PROBLEMS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing": ({"0.prob.0.bias": None}, "0.bias"),
    "no_tokens": ({"1.mask_token": None}, "2 levels of 4, ? channels, 3, ? tokens, "),
    "of_no_dimension": ({"1.mask_token": torch.tensor(1.0)}, "2 levels of 4, ? channels, 3, ? tokens, "),
    "one_level_more": ({"2.mask_token": torch.ones(3, 6)}, "3 levels of 4, 6, 6 channels"),
    "transposed": ({"1.mask_token": torch.ones(6, 3)}, "2 levels of 4, 3 channels, 3, 6 tokens, "),
    "nan": ({"0.mask_token": NAN}, "0.mask_token: expected finite values"),
    "infinite_once_cast": ({"0.mask_token": torch.full((3, 4), 1e300, dtype=torch.float64)}, "expected finite values"),
    "meta": ({"0.mask_token": torch.ones(3, 4, device="meta")}, "expected values, got a tensor on the meta device"),
}


@pytest.mark.parametrize(("entries", "line"), PROBLEMS.values(), ids=PROBLEMS)
def test_entries_that_do_not_fit(entries: dict[str, Tensor | None], line: str) -> None:
    state = learned().state_dict() | {f"mask_modules.{name}": x for name, x in entries.items()}
    state = {name: x for name, x in state.items() if x is not None}
    for module in (learned(seed=5), MaskedDistillLoss(CHANNELS, TOKENS, pretrained=learned(seed=5))):
        with pytest.raises(ValueError, match="pretrained: the state dict holds ") as caught:
            load_masks(module.mask_modules, state)
        assert line in str(caught.value)


INF = torch.tensor([1, 1, float("inf"), 1])
NONE: dict[str, tuple[str, Tensor, str]] = {
    "uncalibrated": (
        "pixels_seen",
        torch.tensor(0),
        "expected a count above 0, got 0: no statistics yet; gather them with Mask",
    ),
    "zero": ("channel_std", torch.zeros(4), "expected deviations of at least 1.2e-38"),
    "infinite": ("channel_std", INF, "expected finite values"),
    "nan": ("channel_mean", INF * 0, "expected finite values"),
    "mean_in_half": (
        "channel_mean",
        (1e5 * INF).half(),
        "expected finite values; torch.float16 does not hold statistics: save",
    ),
    "deviation_in_half": (
        "channel_std",
        torch.full((4,), 1e-7).half(),
        "expected deviations of at least 6.1e-05; torch.float16",
    ),
    "deviation_that_float32_lacks": (
        "channel_std",
        torch.full((4,), 1e-60, dtype=torch.float64),
        "expected deviations of at least 1.2e-38",
    ),
}


@pytest.mark.parametrize(("name", "value", "line"), NONE.values(), ids=NONE)
def test_statistics_that_are_none(name: str, value: Tensor, line: str) -> None:
    """One rule for both ways into a criterion; a learner's own state dict may still lack statistics."""
    learner, key = learned(standardize=True), f"mask_modules.0.{name}"
    state = learner.state_dict() | {key: value}
    criterion = MaskedDistillLoss(CHANNELS, TOKENS, standardize=True, pretrained=learner)
    before = {k: v.clone() for k, v in criterion.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"pretrained: the state dict holds .*, standardised; expected .*, standardised"
    ) as caught:
        MaskedDistillLoss(CHANNELS, TOKENS, standardize=True, pretrained=state)
    assert f"0.{name}: {line}" in str(caught.value)
    for module in (criterion, learner):
        if module is learner and name == "pixels_seen":
            module.load_state_dict(state)
            continue
        for assign in (False, True):
            with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict") as raised:
                module.load_state_dict(state, strict=False, assign=assign)
            assert f"{key}: {line}" in str(raised.value)
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items() if ".0." in k)


# --- tokens that nothing has trained ------------------------------------------------------------------------------------

UNTRAINED = "^{}: the tokens of level{} are no larger than as initialised, .* masks of about 0.5 .*learner.parameters"


@BOTH
@SUFFIXES
def test_untrained_tokens(suffix: str, weight_mask: bool, tmp_path: Path) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="needs the safetensors extra")
    path = tmp_path / f"tokens{suffix}"
    learner = MaskLearner([64, 64], 6, weight_mask)
    with pytest.warns(UserWarning, match=UNTRAINED.format("save", "s 0, 1")) as caught:
        learner.save(path)
    warned = list(caught)
    for source in (learner, path):
        for kind in (MaskLearner, MaskedDistillLoss):
            with pytest.warns(UserWarning, match=UNTRAINED.format("pretrained", "s 0, 1")) as more:
                kind([64, 64], 6, weight_mask=weight_mask, pretrained=source)
            warned += more
    assert len(warned) == 5
    assert {warning.filename for warning in warned} == {__file__}


def stage1(learner: MaskLearner, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x = torch.randn(2, *learner.channels, 6, 6, generator=torch.Generator().manual_seed(3)).relu()
    for _ in range(steps):
        optimizer.zero_grad()
        (learner(x).square().mean() + learner.dice_loss()).backward()
        optimizer.step()


@BOTH
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_trained_tokens_are_not_called_untrained(
    kind: str, weight_mask: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    learner = MaskLearner(64, 6, weight_mask)
    sgd = kind == "sgd"
    optimizer = torch.optim.SGD(learner.parameters(), 1.0) if sgd else torch.optim.Adam(learner.parameters(), 0.01)
    stage1(learner, optimizer, 20)
    learner.save(tmp_path / "tokens.pt")
    MaskedDistillLoss(64, 6, weight_mask=weight_mask, pretrained=tmp_path / "tokens.pt")
    assert not [str(w.message) for w in recwarn if "as initialised" in str(w.message)]


def test_a_trained_weighting_does_not_hide_untrained_tokens(tmp_path: Path) -> None:
    learner = MaskLearner(64, 6)
    stage1(learner, torch.optim.Adam(learner.mask_modules[0].prob.parameters(), 0.01), 5)
    assert learner.mask_modules[0].prob[2].bias.any()
    with pytest.warns(UserWarning, match=UNTRAINED.format("save", " 0")):
        learner.save(tmp_path / "tokens.pt")


@pytest.mark.parametrize("lr", [1e-4, 1.0])
def test_masks_are_about_a_half_where_that_is_said(lr: float, tmp_path: Path) -> None:
    """After a few steps values do not tell trained tokens from new ones. What is said is true of either."""
    learner = MaskLearner(64, 6, False)
    stage1(learner, torch.optim.SGD(learner.parameters(), lr), 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner.save(tmp_path / "tokens.pt")
    said = any("as initialised" in str(w.message) for w in caught)
    masks = learner.mask_modules[0].masks(torch.randn(4, 64, 8, 8, generator=torch.Generator().manual_seed(5)))
    assert said == (lr < 0.1)
    assert not said or (masks - 0.5).abs().max() < 0.15


# --- sources that hold no mask entries, or hold them elsewhere ------------------------------------------------------------


@pytest.mark.parametrize("state", [{}, STRANGERS, {"state_dict": STRANGERS}, nn.Linear(2, 2)], ids=str)
def test_no_mask_entries(state: Any) -> None:
    origin = "Linear" if isinstance(state, nn.Module) else "the state dict"
    with pytest.raises(ValueError, match=rf"{origin} holds no mask entries: expected keys like 'mask_modules\.0") as caught:
        MaskedDistillLoss(CHANNELS, TOKENS, pretrained=state)
    assert len(str(caught.value)) < 250


def test_mask_entries_under_an_inner_key(tmp_path: Path) -> None:
    learner = learned()
    checkpoint = {"m": learner.state_dict(), "ema": {"module": learner.state_dict()}, "optimizer": {"state": {}}, "epoch": 3}
    path = saved(checkpoint, tmp_path)
    with pytest.raises(ValueError, match="holds no mask entries: ") as caught:
        MaskLearner(CHANNELS, TOKENS, pretrained=path)
    assert "; there are mask entries under ['m'], ['ema']['module']: pass what it holds there" in str(caught.value)
    assert_holds(MaskLearner(CHANNELS, TOKENS, pretrained=torch.load(path)["m"]), learner)


OTHER = {"student.weight": torch.ones(2)}
ELSEWHERE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "beside_a_state_dict": (lambda own: {"state_dict": OTHER, "learner": own}, "['learner']"),
    "beside_the_port's": (lambda own: {"maskd_model": OTHER, "state_dict": {}, "ema": own}, "['ema']"),
    "inside_of_it": (lambda own: {"state_dict": OTHER | {"loops": {"ema": own}}}, "['state_dict']['loops']['ema']"),
    "in_a_list": (lambda own: {"state_dict": OTHER, "models": [OTHER, (own,)]}, "['models'][1][0]"),
    "of_arrays": (lambda own: {"state_dict": OTHER, "ema": {k: x.numpy() for k, x in own.items()}}, "['ema']"),
    "of_bare_entries": (lambda own: {"p3": {"mask_token": own["mask_modules.0.mask_token"]}}, "['p3']"),
    "a_list": (lambda own: [3, own], "[1]"),
}


@pytest.mark.parametrize(("nested", "where"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_mask_entries_elsewhere(nested: Callable[[dict[str, Any]], Any], where: str, tmp_path: Path) -> None:
    source = nested(dict(learned().state_dict()))
    sources = [source] if where == "['ema']" else [source, saved(source, tmp_path)]  # arrays are not read from a file
    for each in sources:
        with pytest.raises((ValueError, TypeError)) as caught:
            MaskLearner(CHANNELS, TOKENS, pretrained=each)
        assert str(caught.value).endswith(f"; there are mask entries under {where}: pass what it holds there")


def test_other_entries_than_those_that_do_not_fit() -> None:
    """A backbone's own ``mask_token``; a criterion's tables beside the learner."""
    learner = learned()
    tables = MaskedDistillLoss(CHANNELS, TOKENS, pretrained=learner).state_dict()
    for state in ({"mask_token": torch.ones(1, 384)}, tables):
        with pytest.raises(ValueError, match=r"; there are mask entries under \['learner'\]: pass what it holds there"):
            MaskLearner(CHANNELS, TOKENS, pretrained={"state_dict": state, "learner": learner.state_dict()})


def test_a_checkpoint_that_holds_modules_and_itself() -> None:
    checkpoint: dict[str, Any] = {"state_dict": OTHER, "learner": learned()}
    checkpoint["self"] = [checkpoint]
    with pytest.raises(ValueError, match=r"; there are mask entries under \['learner'\]: pass"):
        MaskLearner(CHANNELS, TOKENS, pretrained=checkpoint)


def test_arrays_in_place_of_tensors() -> None:
    arrays = {name: x.numpy() for name, x in learned().state_dict().items()}
    one = learned().state_dict() | {"mask_modules.1.mask_token": arrays["mask_modules.1.mask_token"]}
    for source in (arrays, one):
        sentence = r"mask_modules\.1\.mask_token: expected a tensor, got numpy\.ndarray; make .* with torch\.from_numpy"
        with pytest.raises(TypeError, match=sentence.replace("1", r"\d")):
            MaskLearner(CHANNELS, TOKENS, pretrained=source)
        for module in (learned(), MaskedDistillLoss(CHANNELS, TOKENS, pretrained=learned())):
            with pytest.raises(RuntimeError, match=sentence):
                module.load_state_dict(source)
    tables = MaskedDistillLoss(CHANNELS, TOKENS, pretrained=learned())
    with pytest.raises(RuntimeError, match=r"pool_rows: expected a tensor, got numpy\.ndarray"):
        tables.load_state_dict({name: x.numpy() for name, x in tables.state_dict().items()})
    assert_holds(MaskLearner(CHANNELS, TOKENS, pretrained={k: torch.from_numpy(x) for k, x in arrays.items()}), learned())


def test_one_entry_under_two_prefixes() -> None:
    state = mmdet(learned())["state_dict"] | {"mask_modules.1.mask_token": torch.ones(3, 6)}
    with pytest.raises(ValueError, match=r"holds 'mask_modules\.1\.mask_token' more than once, under different prefixes"):
        MaskedDistillLoss(CHANNELS, TOKENS, pretrained=state)


@pytest.mark.parametrize("source", [3, [1, 2], torch.ones(2, 3), b"tokens.pth"], ids=lambda source: type(source).__name__)
def test_wrong_source(source: Any, tmp_path: Path) -> None:
    kind = type(source).__name__
    with pytest.raises(TypeError, match=f"pretrained: expected a path, a state dict or a MaskLearner, got {kind}"):
        MaskLearner(CHANNELS, TOKENS, pretrained=source)
    if kind != "bytes":
        with pytest.raises(ValueError, match=f"pretrained: expected .*tokens.pth to hold a state dict, got {kind}"):
            mask_state(saved(source, tmp_path))


# --- files ---------------------------------------------------------------------------------------------------------------


@SUFFIXES
def test_places_that_hold_no_file(suffix: str, tmp_path: Path) -> None:
    learner, path = learned(), tmp_path / f"tokens{suffix}"
    with pytest.raises(FileNotFoundError, match=r"pretrained: no such file: .*tokens"):
        MaskLearner(CHANNELS, TOKENS, pretrained=str(path))
    with pytest.raises(FileNotFoundError, match=r"save: no such folder: .*missing"):
        learner.save(tmp_path / "missing" / path.name)
    path.mkdir()
    with pytest.raises(FileNotFoundError, match="pretrained: no such file"):
        mask_state(path)
    with pytest.raises(IsADirectoryError):
        learner.save(path)
    assert list(tmp_path.iterdir()) == [path]


CONTENTS = {
    "empty": b"",
    "text": b"hello world\n",
    "git_lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 1024\n",
}


@SUFFIXES
@pytest.mark.parametrize("content", [*CONTENTS.values(), 0.01, 0.5], ids=[*CONTENTS, "1 %", "half"])
def test_files_that_are_no_checkpoint_or_cut_short(content: bytes | float, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"tokens{suffix}"
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="needs the safetensors extra")
    learned().save(path)
    whole = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else whole[: int(content * len(whole))])
    with pytest.raises(
        ValueError, match=rf"^pretrained: {path} (cannot be loaded with weights_only=True: [\w\[]+|is damaged, or no)"
    ):
        MaskLearner(CHANNELS, TOKENS, pretrained=path)


class Trap:
    """Unpickling it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nothing_in_a_file_is_executed(zipped: bool, tmp_path: Path) -> None:
    trap = learned().state_dict() | {"epoch": Trap(tmp_path / "marker")}
    path = saved(trap, tmp_path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"cannot be loaded with weights_only=True: .*GLOBAL posix\.system"):
        mask_state(path)
    assert not (tmp_path / "marker").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "marker").exists()  # the trap was real


def test_a_file_of_a_whole_learner(tmp_path: Path) -> None:
    """The error names ``save``, and the other way on works."""
    learner = learned()
    path = saved(learner, tmp_path)
    with pytest.raises(ValueError, match=r"holds a whole MaskLearner, .*; write the tokens with learner\.save\(path\), or, if"):
        MaskLearner(CHANNELS, TOKENS, pretrained=path)
    assert_holds(MaskLearner(CHANNELS, TOKENS, pretrained=torch.load(path, weights_only=False)), learner)


def test_more_than_tensors_in_a_file(tmp_path: Path) -> None:
    """What was refused, in a few words, and two ways on that work."""
    learner = learned()
    path = saved({"state_dict": learner.state_dict(), "best": np.float64(0.4)}, tmp_path)
    with pytest.raises(ValueError, match=r"GLOBAL numpy\._core\.multiarray\.scalar .*safe_globals.*weights_only=False"):
        mask_state(path)
    scalar = np.float64(0.4).__reduce__()[0]
    with torch.serialization.safe_globals([scalar, np.dtype, np.dtypes.Float64DType]):
        assert_holds(MaskLearner(CHANNELS, TOKENS, pretrained=path), learner)
    torch.save(torch.load(path, weights_only=False)["state_dict"], tmp_path / "plain.pt")
    assert_holds(MaskLearner(CHANNELS, TOKENS, pretrained=tmp_path / "plain.pt"), learner)
    arrays = {name: x.numpy() for name, x in learner.state_dict().items()}
    for content in (arrays, {"state_dict": arrays}):
        with pytest.raises(ValueError, match=r"GLOBAL numpy.* with arrays as tensors \(torch\.from_numpy\)"):
            mask_state(saved(content, tmp_path))
    np.savez(tmp_path / "tokens.npz", **arrays)
    with pytest.raises(ValueError, match=r"tokens\.npz cannot be loaded.* or numpy\.load, .* \(torch\.from_numpy\)$"):
        mask_state(tmp_path / "tokens.npz")
    read = {name: torch.from_numpy(x) for name, x in np.load(tmp_path / "tokens.npz").items()}
    assert_holds(MaskLearner(CHANNELS, TOKENS, pretrained=read), learner)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
def test_saved_and_loaded(suffix: str, tmp_path: Path) -> None:
    """Entries alone, in the dtype they have and memory of their own; saved again, also through a link."""
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="needs the safetensors extra")
    learner, path = learned().to(torch.bfloat16).to(memory_format=torch.channels_last), tmp_path / f"tokens{suffix}"
    with torch.no_grad():  # entries that share memory
        whole = torch.randn(1000, 4, dtype=torch.bfloat16)
        learner.mask_modules[0].mask_token.set_(whole[:3])
        learner.mask_modules[0].prob[0].bias.set_(whole[0])
    learner.save(str(path))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    expected, state = learner.state_dict(), mask_state(path)
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[key]), key
    assert path.stat().st_size < 6000 + 2 * sum(v.numel() for v in expected.values())  # not the 8000 bytes of ``whole``
    link = tmp_path / f"link{suffix}"
    link.symlink_to(path)
    with path.open("rb") as reader:
        before = path.read_bytes()
        learned(seed=9).save(link)
        assert reader.read() == before  # replaced, never written over
    assert link.is_symlink()
    assert_holds(MaskLearner(CHANNELS, TOKENS, pretrained=path), learned(seed=9))


def test_safetensors_of_a_whole_detector(tmp_path: Path) -> None:
    writer = pytest.importorskip("safetensors.torch", reason="needs the safetensors extra")
    writer.save_file(dict(mmdet(learned())["state_dict"]), tmp_path / "detector.SafeTensors")
    assert_holds(MaskedDistillLoss(CHANNELS, TOKENS, pretrained=tmp_path / "detector.SafeTensors"), learned())


def test_safetensors_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent("safetensors"), *sys.meta_path])
    (tmp_path / "tokens.safetensors").write_bytes(b"")
    sentence = r"a \.safetensors file needs the safetensors package: pip install safetensors"
    for call in (
        lambda: learned().save(tmp_path / "other.safetensors"),
        lambda: mask_state(tmp_path / "tokens.safetensors"),
    ):
        with pytest.raises(ModuleNotFoundError, match=sentence):
            call()
    learned().save(tmp_path / "tokens.pt")


def test_failed_save_leaves_the_old_file_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "tokens.pt"
    learned().save(path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        learned(seed=9).save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


@pytest.mark.slow
def test_killed_save_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "tokens.pt"
    learned().save(path)
    before = path.read_bytes()
    command = [sys.executable, str(Path(__file__).parent / "programs" / "killed_save.py"), str(path)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == 42, killed.stderr
    assert path.read_bytes() == before
