"""A criterion's state is what its kernels read: whatever users do to it, the next call follows, and later ones still train."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from problems import trained
from torch import Tensor, nn
from torch.nn.utils import parametrize

from maskd_triton import MaskedDistillLoss, MaskLearner
from maskd_triton.checkpoints import load_masks
from maskd_triton.tables import LevelTables

CHANNELS, TOKENS = [5, 4], 3
KINDS = [(weight_mask, standardize) for weight_mask in (True, False) for standardize in (False, True)]
OPTIONS = pytest.mark.parametrize(("weight_mask", "standardize"), KINDS)


def learned(seed: int, weight_mask: bool = True, standardize: bool = True) -> MaskLearner:
    return trained(CHANNELS, TOKENS, weight_mask, standardize, seed=seed)


def criterion_of(learner: MaskLearner, **options: Any) -> MaskedDistillLoss:
    kind = {"weight_mask": learner.weight_mask, "standardize": learner.standardize, "custom_mask_warmup": 0}
    return MaskedDistillLoss(CHANNELS, TOKENS, pretrained=learner, **kind, **options).eval()


def features(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, c, 6, 5, generator=generator) for c in CHANNELS]


def old_state(learner: MaskLearner) -> dict[str, Tensor]:
    """A criterion's state dict as it was before it held tables: the entries of its mask modules as a learner has them."""
    return {**learner.state_dict(), "warmup_step": torch.tensor(7)}


S, T = features(1), features(2)

# --- every way to write a state is followed, in eager mode and by what was compiled before ----------------------------

Change = Callable[[MaskedDistillLoss, MaskedDistillLoss, Path], None]


def distributed_checkpoint(criterion: MaskedDistillLoss, other: MaskedDistillLoss, folder: Path) -> None:
    dcp.save({"criterion": other.state_dict()}, checkpoint_id=folder, no_dist=True)
    dcp.load({"criterion": criterion.state_dict()}, checkpoint_id=folder, no_dist=True)  # writes into its tensors


def through_data(criterion: MaskedDistillLoss, other: MaskedDistillLoss, _: Path) -> None:
    for own, new in zip(criterion.buffers(), other.buffers(), strict=True):
        own.data.copy_(new)


def through_a_hook(criterion: MaskedDistillLoss, other: MaskedDistillLoss, _: Path) -> None:
    """As renamers of old keys do."""
    criterion.register_load_state_dict_pre_hook(lambda module, state, *_: state.update(other.state_dict()))
    criterion.load_state_dict({})


def swapped_data(criterion: MaskedDistillLoss, other: MaskedDistillLoss, _: Path) -> None:
    for own, new in zip(criterion.buffers(), other.buffers(), strict=True):
        own.data = new.clone()


def replaced_buffers(criterion: MaskedDistillLoss, other: MaskedDistillLoss, _: Path) -> None:
    for own, new in zip(criterion.mask_modules, other.mask_modules, strict=True):
        for name, value in new.named_buffers():
            delattr(own, name)
            own.register_buffer(name, value.clone())


def parameters_for_buffers(criterion: MaskedDistillLoss, other: MaskedDistillLoss, _: Path) -> None:
    for own, new in zip(criterion.mask_modules, other.mask_modules, strict=True):
        for name, value in new.named_buffers():
            delattr(own, name)
            setattr(own, name, nn.Parameter(value.clone()))


def assigned_parameters(criterion: MaskedDistillLoss, other: MaskedDistillLoss, _: Path) -> None:
    learner = learned(3, other.weight_mask, other.standardize)
    own = {**dict(learner.named_parameters()), **dict(learner.named_buffers())}
    criterion.load_state_dict(own, assign=True, strict=False)
    assert not any(x.requires_grad or x.grad_fn for x in criterion.mask_modules.buffers())


def replaced_modules(criterion: MaskedDistillLoss, other: MaskedDistillLoss, _: Path) -> None:
    for i, tables in enumerate(other.mask_modules):
        criterion.mask_modules[i] = copy.deepcopy(tables)


def under_inference_mode(criterion: MaskedDistillLoss, other: MaskedDistillLoss, _: Path) -> None:
    with torch.inference_mode():
        criterion.load_state_dict(other.state_dict())


CHANGES: dict[str, Change] = {
    "load": lambda criterion, other, _: criterion.load_state_dict(other.state_dict()),
    "load_assign": lambda criterion, other, _: criterion.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
    "load_of_a_parent": lambda c, other, _: nn.ModuleDict({"c": c}).load_state_dict(nn.ModuleDict({"c": other}).state_dict()),
    "load_of_a_part": lambda c, other, _: c.mask_modules.load_state_dict(other.mask_modules.state_dict()),
    "load_through_a_hook": through_a_hook,
    "load_under_inference_mode": under_inference_mode,
    "distributed_checkpoint": distributed_checkpoint,
    "data": through_data,
    "data_swapped": swapped_data,
    "parameters_for_buffers": parameters_for_buffers,
    "load_assign_of_parameters": assigned_parameters,
    "buffers_replaced": replaced_buffers,
    "modules_replaced": replaced_modules,
}


@OPTIONS
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(change: Change, weight_mask: bool, standardize: bool, tmp_path: Path) -> None:
    criterion, other = (criterion_of(learned(seed, weight_mask, standardize)) for seed in (2, 3))
    before, want = criterion(S, T), other(S, T)
    assert (before - want).abs() > 1e-3 * want
    change(criterion, other, tmp_path)
    assert torch.equal(criterion(S, T), want)
    student = [s.clone().requires_grad_() for s in S]
    criterion(student, T).backward()
    assert all(p.grad is None for p in criterion.parameters())


COMPILED = ["load", "load_of_a_part", "distributed_checkpoint", "data", "load_under_inference_mode", "parameters_for_buffers"]


@pytest.mark.slow
@pytest.mark.parametrize("change", [*COMPILED, "load_assign_of_parameters"])
def test_changes_are_seen_by_a_compiled_criterion(change: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    criterion, other = (criterion_of(learned(seed)) for seed in (2, 3))
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(S, T), criterion(S, T))
    CHANGES[change](criterion, other, tmp_path)
    assert torch.equal(compiled(S, T), other(S, T))


@pytest.mark.parametrize("change", ["load", "load_of_a_part", "distributed_checkpoint", "data", "load_under_inference_mode"])
def test_tables_stay_where_they_are(change: str, tmp_path: Path) -> None:
    """A captured CUDA graph goes on reading the memory that it was captured with."""
    criterion, other = (criterion_of(learned(seed)) for seed in (1, 2))
    at = {name: x.data_ptr() for name, x in criterion.named_buffers()}
    CHANGES[change](criterion, other, tmp_path)
    criterion.mask_modules.load_state_dict({k.split(".", 1)[1]: v for k, v in learned(3).state_dict().items()})
    assert {name: x.data_ptr() for name, x in criterion.named_buffers()} == at
    assert torch.equal(criterion(S, T), criterion_of(learned(3))(S, T))


def test_a_mask_module_in_the_place_of_tables() -> None:
    learner = learned(2)
    criterion, want = criterion_of(learned(1)), criterion_of(learner)(S, T)
    for i, module in enumerate(learner.mask_modules):
        criterion.mask_modules[i] = module
    student = [s.clone().requires_grad_() for s in S]
    loss = criterion(student, T)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    loss.backward()
    assert all(p.grad is None for p in learner.parameters())
    with torch.no_grad():
        learner.mask_modules[0].prob[2].weight.mul_(-3)
    torch.testing.assert_close(criterion(S, T), criterion_of(learner)(S, T), rtol=1e-5, atol=0)


def wrong_level(i: int, *args: Any, **options: Any) -> Callable[[MaskedDistillLoss], None]:
    return lambda criterion: criterion.mask_modules.__setitem__(i, LevelTables(*args, **options))


UNFIT: list[tuple[Callable[[MaskedDistillLoss], object], str]] = [
    (lambda c: c.mask_modules.__setitem__(1, nn.Identity()), r"\[1\]: expected LevelTables \(or MaskModule\), got Identity"),
    (wrong_level(0, 7, TOKENS, standardize=True), r"\[0\]: expected one of 5, num_tokens=3.*, got 7, num_tokens=3"),
    (wrong_level(1, 4, 2, standardize=True), r"\[1\]: expected one of 4, num_tokens=3.*, got 4, num_tokens=2"),
    (wrong_level(1, 4, TOKENS, False, True), r"\[1\]: expected one of .*weight_mask=True.*, got .*weight_mask=False"),
    (wrong_level(1, 4, TOKENS), r"\[1\]: expected one of .*standardize='channel', got 4, .*weight_mask=True$"),
    (lambda c: c.mask_modules.append(LevelTables(4, 3)), r": expected one module for each of the 2 levels, got \['0', '1', '2"),
    (lambda c: c.mask_modules.__delitem__(0), r": expected one module for each of the 2 levels, got \['0'\]"),
]


@pytest.mark.parametrize(("change", "sentence"), UNFIT)
def test_replaced_modules_that_do_not_fit(change: Callable[[MaskedDistillLoss], object], sentence: str) -> None:
    """Kernels would read beyond the end of a table that is smaller."""
    criterion = criterion_of(learned(1))
    criterion(S, T)
    change(criterion)
    for call in (lambda: criterion(S, T), lambda: criterion.masks(T)):
        with pytest.raises((TypeError, ValueError), match="mask_modules" + sentence):
            call()


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 8).round() / 8


def test_parametrised_tables() -> None:
    criterion, want = (criterion_of(learned(1)) for _ in range(2))
    for level, plain in zip(criterion.mask_modules, want.mask_modules, strict=True):
        for name in ("mask_token", "pool_rows"):
            parametrize.register_parametrization(level, name, Rounded())
            plain.get_buffer(name).copy_(Rounded()(plain.get_buffer(name)))
    assert torch.equal(criterion(S, T), want(S, T))


# --- training after everything that comes before it --------------------------------------------------------------------

COPIES: dict[str, Callable[[MaskedDistillLoss], MaskedDistillLoss]] = {
    "itself": lambda c: c,
    "deepcopy": copy.deepcopy,
    "pickle": lambda c: pickle.loads(pickle.dumps(c)),
    "saved_whole": lambda c: torch.load(io.BytesIO(written(c)), weights_only=False),
}


def written(criterion: MaskedDistillLoss) -> bytes:
    file = io.BytesIO()
    torch.save(criterion, file)
    return file.getvalue()


@pytest.mark.parametrize("before", ["", "load", "made"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_validation_under_inference_mode_then_training(copied: Callable[[MaskedDistillLoss], Any], before: str) -> None:
    learner = learned(1)
    with torch.inference_mode(before == "made"):
        criterion = criterion_of(learner)
    criterion = copied(criterion)
    with torch.inference_mode():
        if before == "load":
            criterion.load_state_dict(old_state(learner), strict=False)
        want = criterion.eval()(S, T).item()
    student = [s.clone().requires_grad_() for s in S]
    loss = criterion.train()(student, T)
    loss.backward()
    assert loss.item() == want
    assert int(criterion.warmup_step) == 1 + 7 * (before == "load")


@pytest.mark.parametrize("strict", [False, True])
def test_export_leaves_the_criterion_usable(strict: bool) -> None:
    criterion = criterion_of(learned(1))
    want = criterion(S, T)
    exported = torch.export.export(criterion, (S, T), strict=strict)
    assert torch.equal(exported.module()(S, T), want)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(S, T), want)
    assert torch.equal(criterion(S, T), want)
    student = [s.clone().requires_grad_() for s in S]
    criterion.train()(student, T).backward()


# --- entries of a learner, and of criteria that were saved before there were tables ----------------------------------


@OPTIONS
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_old_state_dicts(dtype: torch.dtype, assign: bool, weight_mask: bool, standardize: bool) -> None:
    """Composed in float64 from what is given, whatever the criterion's dtype; no word about what they do not know."""
    learner = learned(2, weight_mask, standardize).double()
    criterion = criterion_of(learned(1, weight_mask, standardize)).to(dtype)
    state = old_state(learner)
    criterion.load_state_dict(state, assign=assign)
    assert int(criterion.warmup_step) == 7
    for tables, module in zip(criterion.mask_modules, learner.mask_modules, strict=True):
        want = module.tables(torch.float64)
        values = [want.tokens, *(want.weighting or ()), *(want.standardization or ())]
        for (name, got), value in zip(tables.named_buffers(), values, strict=True):
            assert torch.equal(got, value.detach() if assign else value.detach().to(dtype)), name


@OPTIONS
def test_part_of_a_level_is_an_error(weight_mask: bool, standardize: bool) -> None:
    """Also where missing keys are allowed: tables of two origins fit in shape, and to nothing else."""
    learner = learned(2, weight_mask, standardize)
    for state in (old_state(learner), criterion_of(learner).state_dict()):
        names = [key for key in state if key.startswith("mask_modules.1.")]
        for name in names if len(names) > 1 else ():
            criterion = criterion_of(learned(1, weight_mask, standardize))
            before = copy.deepcopy(criterion.mask_modules[1].state_dict())
            part = {key: value for key, value in state.items() if key != name}
            with pytest.raises(RuntimeError, match=r"mask_modules\.1: expected all entries of a level, got no"):
                criterion.load_state_dict(part, strict=False)
            assert all(torch.equal(v, before[k]) for k, v in criterion.mask_modules[1].state_dict().items())
    found = criterion_of(learned(1)).load_state_dict({"warmup_step": torch.tensor(3)}, strict=False)
    assert {key.split(".")[-1] for key in found.missing_keys} >= {"mask_token", "pool_rows", "statistics"}


def test_entries_that_do_not_belong() -> None:
    criterion, learner = criterion_of(learned(1, False, False)), learned(2, True, False)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"mask_modules\.0\.prob\.0\.weight\""):
        criterion.load_state_dict(old_state(learner))
    with pytest.raises(RuntimeError, match=r"size mismatch for mask_modules\.0\.mask_token: expected \[3, 5\], got \[3, 4\]"):
        criterion_of(learner).load_state_dict(
            {k.replace("s.1", "s.0"): v for k, v in learner.state_dict().items()}, strict=False
        )


# --- the meta device ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:MaskedDistillLoss without pretrained")
@pytest.mark.parametrize("assign", [False, True])
def test_meta_device(assign: bool) -> None:
    """Tokens given where tensors hold nothing are refused, never lost in silence; made without, both kinds of loading work."""
    learner = learned(1)
    with torch.device("meta"):
        for make in (MaskedDistillLoss, MaskLearner):
            with pytest.raises(ValueError, match="pretrained: tensors on the meta device hold no values"):
                make(CHANNELS, TOKENS, standardize=True, pretrained=learner)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "MaskedDistillLoss without pretrained")
            criteria = [MaskedDistillLoss(CHANNELS, TOKENS, standardize=True, custom_mask_warmup=0) for _ in range(2)]
    want = criterion_of(learner)
    for criterion, state in zip(criteria, (want.state_dict(), old_state(learner)), strict=True):
        if not assign:
            criterion.to_empty(device="cpu")
        criterion.load_state_dict(state, assign=assign)
        assert torch.equal(criterion(S, T), want(S, T))
    with torch.device("meta"):
        late = MaskedDistillLoss(CHANNELS, TOKENS, standardize=True, custom_mask_warmup=0, loss_weight=3.0)
        written = MaskedDistillLoss(CHANNELS, TOKENS, standardize=True, custom_mask_warmup=0)
        assert written([s.to("meta") for s in S], [t.to("meta") for t in T]).is_meta
        written.warmup_step.zero_()
    written.loss_weight = torch.tensor(3)
    moved = criterion_of(learned(2)).to("meta")
    moved.load_state_dict({k: v for k, v in old_state(learner).items() if k != "warmup_step"}, assign=True, strict=False)
    assert not moved.mask_modules[0].mask_token.is_meta
    moved.load_state_dict(want.state_dict(), assign=True)
    assert torch.equal(moved(S, T), want(S, T))
    real = MaskedDistillLoss(CHANNELS, TOKENS, standardize=True, custom_mask_warmup=0, loss_weight=3.0)
    for criterion in (late, written, real):
        load_masks(criterion.to_empty(device="cpu").mask_modules, learner)  # which overwrites all tables, but no number
        torch.testing.assert_close(criterion(S, T), 3 * want(S, T))
        assert int(criterion.warmup_step) == 1


def test_tables_of_one_level() -> None:
    learner = learned(1)
    tables = LevelTables(CHANNELS[0], TOKENS, standardize=True)
    assert not any(x.any() for x in tables.buffers())
    tables.load_state_dict(learner.mask_modules[0].state_dict())
    torch.testing.assert_close(tables.masks(T[0]), learner.mask_modules[0].masks(T[0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tables.weights(T[0]), learner.mask_modules[0].weights(T[0]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="x: expected 5 channels, got 4"):
        tables.masks(T[1])


def test_masks_of_a_criterion() -> None:
    learner = learned(1)
    criterion = criterion_of(learner)
    want = [module.masks(t) for module, t in zip(learner.mask_modules, T, strict=True)]
    for container in (list, tuple, lambda x: dict(zip("ab", x, strict=True))):
        found = criterion.masks(container(T))
        assert type(found) is type(container(T))
        for m, w in zip(found.values() if isinstance(found, dict) else found, want, strict=True):
            torch.testing.assert_close(m, w.detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="features: expected 2 levels, got 1"):
        criterion.masks(T[0])
    with pytest.raises(RuntimeError, match="masks: this criterion has no tokens"):
        MaskedDistillLoss(CHANNELS, None).masks(T)
