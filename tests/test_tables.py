"""A criterion's state is what its kernels read: whatever users do to it, the next call follows, and later ones still train."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import default_dtype
from problems import trained
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from maskd_triton import MaskedDistillLoss, MaskLearner
from maskd_triton.checkpoints import load_masks
from maskd_triton.tables import LevelTables

CHANNELS, TOKENS = [5, 4], 3
KINDS = [(weight_mask, standardize) for weight_mask in (True, False) for standardize in (False, True)]
OPTIONS = pytest.mark.parametrize(("weight_mask", "standardize"), KINDS)
HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def learned(seed: int, weight_mask: bool = True, standardize: bool = True) -> MaskLearner:
    return trained(CHANNELS, TOKENS, weight_mask, standardize, seed=seed)


def criterion_of(learner: MaskLearner, **options: Any) -> MaskedDistillLoss:
    kind = {"weight_mask": learner.weight_mask, "standardize": learner.standardize, "custom_mask_warmup": 0}
    return MaskedDistillLoss(CHANNELS, TOKENS, pretrained=learner, **kind, **options).eval()


def features(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, c, 6, 5, generator=generator) for c in CHANNELS]


S, T = features(1), features(2)

# --- every way to write a state is followed, in eager mode and by what was compiled before ----------------------------

Change = Callable[[MaskedDistillLoss, MaskedDistillLoss, Path], Any]


def distributed_checkpoint(criterion: MaskedDistillLoss, other: MaskedDistillLoss, folder: Path) -> None:
    """Its loader writes into the tensors of ``state_dict()``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        dcp.save({"criterion": other.state_dict()}, checkpoint_id=folder, no_dist=True)
        dcp.load({"criterion": criterion.state_dict()}, checkpoint_id=folder, no_dist=True)


def swapped_data(criterion: MaskedDistillLoss, other: MaskedDistillLoss, _: Path) -> None:
    for own, new in zip(criterion.buffers(), other.buffers(), strict=True):
        own.data = new.clone()


def entries_of_a_learner(criterion: MaskedDistillLoss, other: MaskedDistillLoss, _: Path) -> None:
    learner = learned(3, other.weight_mask, other.standardize)
    own = {**dict(learner.named_parameters()), **dict(learner.named_buffers())}
    criterion.load_state_dict(own, assign=True)  # strict: what else a criterion counts, a learner need not hold
    assert not any(x.requires_grad for x in criterion.mask_modules.buffers())


def replaced_modules(criterion: MaskedDistillLoss, other: MaskedDistillLoss, _: Path) -> None:
    for i, tables in enumerate(other.mask_modules):
        criterion.mask_modules[i] = copy.deepcopy(tables)


CHANGES: dict[str, Change] = {
    "load": lambda criterion, other, _: criterion.load_state_dict(other.state_dict()),
    "load_assign": lambda criterion, other, _: criterion.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
    "load_of_a_part": lambda c, other, _: c.mask_modules.load_state_dict(other.mask_modules.state_dict()),
    "load_assign_of_parameters": entries_of_a_learner,
    "distributed_checkpoint": distributed_checkpoint,
    "data_swapped": swapped_data,
    "modules_replaced": replaced_modules,
}
IN_PLACE = ["load", "load_of_a_part", "distributed_checkpoint"]


@OPTIONS
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(change: Change, weight_mask: bool, standardize: bool, tmp_path: Path) -> None:
    criterion, other = (criterion_of(learned(seed, weight_mask, standardize)) for seed in (2, 3))
    before, want = criterion(S, T), other(S, T)
    assert (before - want).abs() > 1e-3 * want
    change(criterion, other, tmp_path)
    assert torch.equal(criterion(S, T), want)
    criterion([s.clone().requires_grad_() for s in S], T).backward()
    assert all(p.grad is None for p in criterion.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("change", IN_PLACE)
def test_changes_are_seen_by_a_compiled_criterion(change: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    criterion, other = (criterion_of(learned(seed)) for seed in (2, 3))
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(S, T), criterion(S, T))
    CHANGES[change](criterion, other, tmp_path)
    assert torch.equal(compiled(S, T), other(S, T))


@pytest.mark.parametrize("change", IN_PLACE)
def test_tables_stay_where_they_are(change: str, tmp_path: Path) -> None:
    """A captured CUDA graph goes on reading the memory that it was captured with."""
    criterion, other = (criterion_of(learned(seed)) for seed in (1, 2))
    at = {name: x.data_ptr() for name, x in criterion.mask_modules.named_buffers()}
    CHANGES[change](criterion, other, tmp_path)
    assert {name: x.data_ptr() for name, x in criterion.mask_modules.named_buffers()} == at


@pytest.mark.parametrize("before", ["", "load", "made"])
@pytest.mark.parametrize("copied", [lambda c: c, copy.deepcopy], ids=["itself", "deepcopy"])
def test_validation_under_inference_mode_then_training(copied: Callable[[MaskedDistillLoss], Any], before: str) -> None:
    learner = learned(1)
    with torch.inference_mode(before == "made"):
        criterion = criterion_of(learner)
    criterion = copied(criterion)
    with torch.inference_mode():
        if before == "load":
            criterion.mask_modules.load_state_dict(learner.mask_modules.state_dict())
        want = criterion.eval()(S, T).item()
    loss = criterion.train()([s.clone().requires_grad_() for s in S], T)
    loss.backward()
    assert loss.item() == want


# --- entries of a learner --------------------------------------------------------------------------------------------


@OPTIONS
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entries_of_a_learner(dtype: torch.dtype, assign: bool, weight_mask: bool, standardize: bool) -> None:
    """Composed in float64 from what is given, whatever the criterion's dtype."""
    learner = learned(2, weight_mask, standardize).double()
    with torch.no_grad():
        for p in learner.parameters():
            p /= 3  # digits that float32 does not hold
    entries = {**dict(learner.mask_modules.named_parameters()), **dict(learner.mask_modules.named_buffers())}
    modules = criterion_of(learned(1, weight_mask, standardize)).to(dtype).mask_modules
    modules.load_state_dict(entries, assign=assign)
    assert not any(x.requires_grad for x in modules.buffers())
    for tables, module in zip(modules, learner.mask_modules, strict=True):
        want = module.tables(torch.float64)
        values = [x for x in want if x is not None]
        for (name, got), value in zip(tables.named_buffers(), values, strict=True):
            assert torch.equal(got, value.detach() if assign else value.detach().to(dtype)), name


@OPTIONS
def test_part_of_a_level_is_an_error(weight_mask: bool, standardize: bool) -> None:
    """Also where missing keys are allowed: tables of two origins fit in shape, and to nothing else."""
    learner = learned(2, weight_mask, standardize)
    for state in (learner.mask_modules.state_dict(), criterion_of(learner).mask_modules.state_dict()):
        names = [key for key in state if key.startswith("1.")]
        for name in names if len(names) > 1 else ():
            modules = criterion_of(learned(1, weight_mask, standardize)).mask_modules
            before = copy.deepcopy(modules[1].state_dict())
            part = {key: value for key, value in state.items() if key != name}
            with pytest.raises(RuntimeError, match=r"1: expected all entries of a level, got no"):
                modules.load_state_dict(part, strict=False)
            assert all(torch.equal(v, before[k]) for k, v in modules[1].state_dict().items())
    assert criterion_of(learned(1)).load_state_dict({}, strict=False).missing_keys


@pytest.mark.parametrize("assign", [False, True])
def test_entries_of_other_options_are_an_error(assign: bool) -> None:
    """Also where unexpected keys are allowed, as they are for a criterion with an align."""
    raw, isotropic = criterion_of(learned(1, standardize=False)), trained(CHANNELS, TOKENS, standardize="isotropic")
    for module in isotropic.mask_modules:
        module.channel_std.fill_(2)
    for state in (learned(2).state_dict(), criterion_of(learned(2)).state_dict()):
        with pytest.raises(RuntimeError, match=r"mask_modules\.0: expected no \w+, .*with weight_mask=True, standardize=False"):
            raw.load_state_dict(state, strict=False, assign=assign)
        for module in (MaskedDistillLoss(CHANNELS, TOKENS, standardize="isotropic", pretrained=isotropic), isotropic):
            if module is not isotropic or "mask_modules.0.channel_std" in state:
                with pytest.raises(
                    RuntimeError, match=r"mask_modules\.0\.\w+: expected one scale for all channels, got several"
                ):
                    module.load_state_dict(state, assign=assign)
    for state in (
        isotropic.state_dict(),
        MaskedDistillLoss(CHANNELS, TOKENS, standardize="isotropic", pretrained=isotropic).state_dict(),
    ):
        for standardize in (True, "isotropic"):
            criterion = MaskedDistillLoss(CHANNELS, TOKENS, standardize=standardize, pretrained=isotropic)
            criterion.load_state_dict(state, assign=assign)


def test_tables_of_one_level() -> None:
    learner = learned(1)
    tables = LevelTables(CHANNELS[0], TOKENS, standardize=True)
    assert (tables.masks(T[0]) == 0.5).all()
    tables.load_state_dict(learner.mask_modules[0].state_dict())
    torch.testing.assert_close(tables.masks(T[0]), learner.mask_modules[0].masks(T[0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tables.weights(T[0]), learner.mask_modules[0].weights(T[0]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="x: expected 5 channels, got 4"):
        tables.masks(T[1])
    with pytest.raises(RuntimeError, match=r"size mismatch for mask_token: expected \[3, 5\], got \[3, 4\]"):
        tables.load_state_dict(learner.mask_modules[1].state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"prob\.0\.weight\""):
        LevelTables(CHANNELS[0], TOKENS, False).load_state_dict(learned(1, standardize=False).mask_modules[0].state_dict())


def test_masks_of_a_criterion() -> None:
    learner = learned(1)
    criterion = criterion_of(learner)
    want = [module.masks(t) for module, t in zip(learner.mask_modules, T, strict=True)]
    for found in (criterion.masks(T), list(criterion.masks(dict(zip("ab", T, strict=True))).values())):
        for m, w in zip(found, want, strict=True):
            torch.testing.assert_close(m, w.detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="features: expected 2 levels, got 1"):
        criterion.masks(T[0])
    with pytest.raises(RuntimeError, match="masks: this criterion has no tokens"):
        MaskedDistillLoss(CHANNELS, None).masks(T)


# --- the meta device --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:MaskedDistillLoss without pretrained")
@pytest.mark.parametrize("assign", [False, True])
def test_meta_device(assign: bool) -> None:
    """Tokens given where tensors hold nothing are refused, never lost in silence; made without, loading works later."""
    learner = learned(1)
    want = criterion_of(learner)
    with torch.device("meta"):
        for make in (MaskedDistillLoss, MaskLearner):
            with pytest.raises(ValueError, match="pretrained: tensors on the meta device hold no values"):
                make(CHANNELS, TOKENS, standardize=True, pretrained=learner)
        criteria = [MaskedDistillLoss(CHANNELS, TOKENS, standardize=True, custom_mask_warmup=0).eval() for _ in range(3)]
    for criterion, state in zip(criteria, (want.state_dict(), learner.state_dict()), strict=False):
        if not assign:
            criterion.to_empty(device="cpu")
        criterion.load_state_dict(state, assign=assign, strict=False)
        assert torch.equal(criterion(S, T), want(S, T))
    load_masks(criteria[2].to_empty(device="cpu").mask_modules, learner)
    assert torch.equal(criteria[2](S, T), want(S, T))


@pytest.mark.filterwarnings("ignore:MaskedDistillLoss without pretrained")
def test_fake_tensors_have_no_values_to_check() -> None:
    with FakeTensorMode():
        for standardize in (False, True, "isotropic"):
            criterion = MaskedDistillLoss(CHANNELS, TOKENS, standardize=standardize)
            criterion.load_state_dict(criterion.state_dict())


# --- half precision: tables and statistics stay as they are ------------------------------------------------------------

CASTS: dict[str, Callable[[nn.Module, torch.dtype], object]] = {
    "half": lambda module, half: module.half() if half == torch.float16 else module.bfloat16(),
    "to_device": lambda module, half: module.to("cpu", half),
    "of_a_parent": lambda module, half: nn.ModuleList([module]).to(half),
}


def level_of_hard_statistics() -> MaskLearner:
    """Deviations from 1e-6 to 1e5: neither they nor their reciprocals fit into float16."""
    learner = trained([8], TOKENS, standardize=True)
    module = learner.mask_modules[0]
    module.channel_std.copy_(torch.logspace(-6, 5, 8))
    module.channel_mean.copy_(3 * module.channel_std)
    return learner


@HALVES
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_criterion_gives_the_uncast_loss(cast: Callable[..., object], half: torch.dtype) -> None:
    learner = level_of_hard_statistics()
    module = learner.mask_modules[0]
    noise = torch.randn(2, 2, 8, 6, 5, generator=torch.Generator().manual_seed(0))
    t = noise[0] * module.channel_std[:, None, None] + module.channel_mean[:, None, None]
    criterion = MaskedDistillLoss(8, TOKENS, pretrained=learner, standardize=True, custom_mask_warmup=0).eval()
    results = []
    for changed in (False, True):
        if changed:
            cast(criterion, half)
        s = (noise[0] + 0.1 * noise[1]).requires_grad_()
        loss = criterion(s, t)
        loss.backward()
        results.append((loss, s.grad))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
    assert all(x.dtype == torch.float32 for x in criterion.mask_modules.buffers())


@HALVES
def test_a_cast_learner_keeps_its_statistics(half: torch.dtype) -> None:
    learner = level_of_hard_statistics()
    before = copy.deepcopy(learner.state_dict())
    module = learner.to(half).mask_modules[0]
    assert module.mask_token.dtype == half
    assert torch.equal(module.channel_std, before["mask_modules.0.channel_std"])
    assert torch.equal(module.channel_mean, before["mask_modules.0.channel_mean"])
    x = torch.randn(2, 8, 4, 4) * module.channel_std[:, None, None] + module.channel_mean[:, None, None]
    wide = MaskLearner(8, TOKENS, standardize=True, pretrained=before).mask_modules[0]
    torch.testing.assert_close(module.masks(x), wide.masks(x), rtol=0, atol=0.05)
    assert module.weights(x).isfinite().all()


def test_other_moves_still_work() -> None:
    criterion = criterion_of(learned(1))
    assert {x.dtype for x in criterion.double().mask_modules.buffers()} == {torch.float64}
    assert {x.dtype for x in criterion.half().mask_modules.buffers()} == {torch.float64}
    assert {x.dtype for x in criterion.float().mask_modules.buffers()} == {torch.float32}
    for moved in (criterion.to("meta", torch.float16), criterion.half()):
        assert all(x.is_meta and x.dtype == torch.float32 for x in moved.mask_modules.buffers())
    empty = criterion.to_empty(device="cpu").mask_modules
    assert {(x.device.type, x.dtype) for x in empty.buffers()} == {("cpu", torch.float32)}


@HALVES
@pytest.mark.parametrize("assign", [False, True])
def test_entries_in_half_precision_become_tables_in_float32(assign: bool, half: torch.dtype) -> None:
    """Composed in float64 of what the entries hold, and never cast back."""
    learner = learned(1)
    rounded = {key: x.to(half) if x.is_floating_point() else x for key, x in learner.state_dict().items()}
    want = criterion_of(learned(2))
    want.load_state_dict({key: x.double() for key, x in rounded.items()}, strict=False)
    got = criterion_of(learned(2))
    got.load_state_dict(rounded, assign=assign, strict=False)
    assert {x.dtype for x in got.mask_modules.buffers()} == {torch.float32}
    assert torch.equal(got(S, T), want(S, T))
    tables = {key: x.to(half) if x.is_floating_point() else x for key, x in want.state_dict().items()}
    got.load_state_dict(tables, assign=assign, strict=False)
    assert {x.dtype for x in got.mask_modules.buffers()} == {torch.float32}
    learner.load_state_dict(rounded, assign=assign)
    assert {module.channel_std.dtype for module in learner.mask_modules} == {torch.float32}


@HALVES
def test_made_under_a_half_default_dtype(half: torch.dtype) -> None:
    """As transformers and Lightning make models."""
    learner = learned(1)
    with default_dtype(half):
        criterion = criterion_of(learner)
        fresh = MaskLearner(CHANNELS, TOKENS, standardize=True)
    assert {x.dtype for x in criterion.mask_modules.buffers()} == {torch.float32}
    assert {module.channel_std.dtype for module in fresh.mask_modules} == {torch.float32}
    assert torch.equal(criterion(S, T), criterion_of(learner)(S, T))


def test_buffers_that_a_wrapper_has_cast() -> None:
    """As FSDP with MixedPrecision(buffer_dtype=torch.float16) does, past every method of the module."""
    learner = learned(1)
    criterion = criterion_of(learner)
    for module in (criterion, learner):
        for x in module.buffers():
            x.data = x.data.half() if x.is_floating_point() else x.data
    sentence = r"expected float32 or float64, got torch\.float16: .* a wrapper has cast .* buffer_dtype=None or torch\.float32"
    for call in (lambda: criterion(S, T), lambda: criterion.masks(T), lambda: learner(T)):
        with pytest.raises(TypeError, match=sentence):
            call()
    load_masks(criterion.mask_modules, learned(1))
    assert criterion(S, T).isfinite()


@HALVES
@OPTIONS
def test_one_buffer_that_is_narrow(weight_mask: bool, standardize: bool, half: torch.dtype) -> None:
    """Whichever it is, and whoever has cast it."""
    learner = learned(1, weight_mask, standardize)
    for name in dict(criterion_of(learner).mask_modules[1].named_buffers()):
        for assigned in (True, False):
            criterion = criterion_of(learner)
            tables = criterion.mask_modules[1]
            if assigned:
                setattr(tables, name, getattr(tables, name).to(half))
            else:
                getattr(tables, name).data = getattr(tables, name).to(half)
            with pytest.raises(TypeError, match=rf"LevelTables\.{name}: expected float32 or float64, got {half}"):
                criterion(S, T)


# --- values that no training gives --------------------------------------------------------------------------------------


def test_a_state_that_was_cast_to_half_precision() -> None:
    """Deviations of 1e-7 are 1e7 as reciprocals, which float16 does not hold."""
    learner = trained([8], TOKENS, standardize=True)
    learner.mask_modules[0].channel_std.fill_(1e-7)
    criterion = MaskedDistillLoss(8, TOKENS, pretrained=learner, standardize=True)
    for module, name in (
        (criterion, "statistics: expected finite values"),
        (learner, "channel_std: expected deviations of at"),
    ):
        state = {key: x.half() if x.is_floating_point() else x for key, x in module.state_dict().items()}
        with pytest.raises(RuntimeError, match=rf"mask_modules\.0\.{name}.*; torch\.float16 does not hold statistics"):
            criterion.load_state_dict(state)


@OPTIONS
def test_tables_that_are_not_finite(weight_mask: bool, standardize: bool) -> None:
    learner = learned(1, weight_mask, standardize)
    for module in (criterion_of(learner), learner):
        for key, x in module.state_dict().items():
            if not x.is_floating_point():
                continue
            bad = x.clone()
            bad.view(-1)[-1] = float("nan")
            with pytest.raises(RuntimeError, match=rf"{key}: expected finite values"):
                module.load_state_dict(module.state_dict() | {key: bad})


def test_tables_that_overflow_once_composed() -> None:
    """Every entry is finite, but the tokens over the deviations are not."""
    learner = trained([8], TOKENS, standardize=True)
    learner.mask_modules[0].channel_std.fill_(1e-30)
    learner.mask_modules[0].mask_token.data.fill_(1e20)
    with pytest.raises(ValueError, match=r"(?s)^pretrained: .*0\.teacher_tokens: expected finite values"):
        MaskedDistillLoss(8, TOKENS, pretrained=learner, standardize=True)


@pytest.mark.filterwarnings("ignore:MaskedDistillLoss without pretrained")
def test_entries_on_the_meta_device() -> None:
    """They have no values: only a module that has none either takes them."""
    with torch.device("meta"):
        empty, entries = MaskedDistillLoss(CHANNELS, TOKENS, standardize=True), MaskLearner(CHANNELS, TOKENS, standardize=True)
    empty.load_state_dict(empty.state_dict())
    entries.load_state_dict(entries.state_dict())
    for module in (criterion_of(learned(1)), learned(1)):
        with pytest.raises(RuntimeError, match=r"mask_token: expected values, got a tensor on the meta device"):
            module.load_state_dict(entries.state_dict() if isinstance(module, MaskLearner) else empty.state_dict())
    with pytest.raises(RuntimeError, match=r"mask_token: expected values, got a tensor on the meta device"):
        empty.load_state_dict(entries.state_dict())
