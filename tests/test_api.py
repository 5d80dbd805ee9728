"""The criterion's contract: what it takes, what it refuses and in which words, what it keeps."""

import copy
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers import default_dtype
from problems import Problem, Target, literal_losses
from torch import Tensor, nn

from maskd_triton import FrozenTeacher, MaskedDistillLoss, MaskLearner, MaskModule
from maskd_triton import functional as F
from maskd_triton.diagnostics import suggest_loss_weight

SHAPES = [(2, 4, 6, 5), (2, 3, 3, 2)]


PROBLEM = Problem(SHAPES, 6, dtype=torch.float32)
S, T = PROBLEM.student, PROBLEM.teacher


def cast(levels: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) for x in levels]


def agree(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)


# --- what it takes ----------------------------------------------------------------------------------------------------


def test_containers() -> None:
    criterion, s, t = PROBLEM.criterion(), S, T
    want = literal_losses(PROBLEM.learner, s, t)
    agree(criterion(s, t, reduction="none"), want)
    agree(criterion(tuple(s), tuple(t)), want.sum())
    keyed_teacher = OrderedDict(p3=t[0], p4=t[1])
    agree(criterion({"p4": s[1], "p3": s[0]}, keyed_teacher, reduction="none"), want)  # by key, in the teacher's order
    one = Problem(SHAPES[:1], 6, dtype=torch.float32)
    single, want = one.criterion(), literal_losses(one.learner, s[:1], t[:1]).sum()
    agree(single(s[0], t[0]), want)
    agree(single([s[0]], t[0]), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_loss_dtype(dtype: torch.dtype) -> None:
    s, t = cast(S, dtype), cast(T, dtype)
    loss = PROBLEM.criterion()(s, t)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ()
    agree(loss, literal_losses(PROBLEM.learner, s, t).sum())


def test_only_align_is_trained() -> None:
    assert not [n for n, p in PROBLEM.criterion().named_parameters() if p.requires_grad]
    criterion = PROBLEM.criterion(student_channels=[2, 5])
    assert {n for n, p in criterion.named_parameters() if p.requires_grad} == {
        f"align.{i}.{name}" for i in range(2) for name in ("weight", "bias")
    }


def test_align_runs_in_the_features_dtype() -> None:
    """Half features from an autocast region meet a float32 criterion outside of it, and inside."""
    criterion = PROBLEM.criterion(student_channels=[2, 5])
    s = [torch.randn(2, c, *shape[2:]).bfloat16().requires_grad_() for c, shape in zip((2, 5), SHAPES, strict=True)]
    t = cast(T, torch.bfloat16)
    aligned = [
        torch.nn.functional.conv2d(x, conv.weight.bfloat16(), conv.bias.bfloat16())
        for x, conv in zip(s, criterion.align, strict=True)
    ]
    outside = criterion(s, t)
    agree(outside, literal_losses(PROBLEM.learner, aligned, t).sum())
    with torch.autocast("cpu", torch.bfloat16):
        inside = criterion(s, t)
    agree(inside, outside.double())
    inside.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in criterion.align.parameters())


def test_untrained_tokens_warn_once() -> None:
    with pytest.warns(UserWarning, match=r"without pretrained=.*MaskLearner") as caught:
        criterion = MaskedDistillLoss(4)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(torch.ones(1, 4, 2, 2, requires_grad=True), torch.zeros(1, 4, 2, 2))
        PROBLEM.criterion()


INTS: list[Callable[[int], Any]] = [np.int64, np.uint8, np.array, torch.tensor]
NUMBERS: list[Callable[[float], Any]] = [np.float32, np.float64, np.float16, np.array, Fraction]


@pytest.mark.parametrize("kind", INTS)
def test_ints_of_other_kinds(kind: Callable[[int], Any]) -> None:
    assert MaskLearner(kind(8), kind(3)).mask_modules[0].mask_token.shape == (3, 8)
    assert MaskLearner([kind(8), kind(16)]).channels == MaskLearner(np.array([8, 16])).channels == [8, 16]
    assert MaskModule(kind(8), kind(3)).num_tokens == 3
    options = {"student_channels": kind(2), "custom_mask_warmup": kind(7), "mask_power": kind(1)}
    criterion = MaskedDistillLoss(kind(8), kind(3), pretrained=MaskLearner(8, 3), **options)
    assert (criterion.num_tokens, criterion.custom_mask_warmup, criterion.mask_power) == (3, 7, 1)
    assert all(
        type(n) is int for n in (criterion.num_tokens, criterion.custom_mask_warmup, criterion.mask_power, *criterion.channels)
    )
    x = torch.zeros(1, 8, 2, 2)
    F.masked_distill_loss(x, x, [torch.zeros(3, 8)], custom_mask_warmup=kind(7), mask_power=kind(1))


@pytest.mark.parametrize("value", [np.True_, np.False_])
def test_bools_of_numpy(value: Any) -> None:
    criterion = MaskedDistillLoss(8, 3, weight_mask=value, custom_mask=value, standardize=value)
    x = torch.ones(1, 8, 2, 2)
    assert torch.compile(criterion, backend="aot_eager", fullgraph=True)(x, x + 1) == criterion(x, x + 1)
    for module in (MaskLearner(8, 3, value, standardize=value), criterion):
        assert module.standardize == (value and "channel")
        assert (len(list(module.mask_modules[0].buffers())) > 2) == bool(value)


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_other_kinds(kind: Callable[[float], Any]) -> None:
    criterion = PROBLEM.criterion(loss_weight=kind(2.5), eps=kind(0.5))
    want = PROBLEM.criterion(loss_weight=2.5, eps=0.5)(S, T)
    assert torch.equal(criterion(S, T), want)
    assert type(criterion.eps) is float
    assert F.masked_distill_loss(X, X + 1, [torch.zeros(6, 4)], loss_weight=kind(2.5), eps=kind(0.5)) > 0
    assert suggest_loss_weight([kind(2.0)], [kind(0.5)], loss_weight=kind(1.0), share=kind(0.5)) == 4


# --- what it refuses --------------------------------------------------------------------------------------------------

X = torch.zeros(2, 4, 3, 3)


def with_level(learner: MaskLearner, module: MaskModule) -> MaskLearner:
    learner.mask_modules[1] = module
    return learner


WRONG_CONSTRUCTIONS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: MaskedDistillLoss(0), ValueError, "channels: expected a positive int or one per level, got 0"),
    (lambda: MaskedDistillLoss([4, -1]), ValueError, "channels: expected a positive int or one per level, got [4, -1]"),
    (lambda: MaskedDistillLoss([]), ValueError, "channels: expected a positive int or one per level, got []"),
    (lambda: MaskedDistillLoss([4.0]), ValueError, "channels: expected a positive int"),
    (lambda: MaskedDistillLoss("4"), ValueError, "channels: expected a positive int or one per level, got '4'"),
    (lambda: MaskedDistillLoss(None), TypeError, "channels: expected a positive int or one per level, got None"),
    (lambda: MaskedDistillLoss(4, 0), ValueError, "num_tokens: expected a positive int"),
    (lambda: MaskedDistillLoss(4, 2.5), TypeError, "num_tokens: expected a positive int"),
    (lambda: MaskedDistillLoss(4, True), TypeError, "num_tokens: expected a positive int"),
    (lambda: MaskedDistillLoss([4, 3], student_channels=[2]), ValueError, "student_channels: expected one value for each of the 2"),
    (lambda: MaskedDistillLoss(4, impl="cuda"), ValueError, "impl: expected one of 'auto', 'triton', 'eager', got 'cuda'"),
    (lambda: MaskedDistillLoss(4, custom_mask_warmup=-1), ValueError, "custom_mask_warmup: expected"),
    (lambda: MaskedDistillLoss(4, custom_mask_warmup=0.25 * 8), TypeError, "custom_mask_warmup: expected an int of at least 0, got 2.0"),
    (lambda: MaskedDistillLoss(4, custom_mask_warmup=2**70), ValueError, "custom_mask_warmup: expected an int of at least 0 and below 2**63"),
    (lambda: MaskedDistillLoss(4, loss_weight="1"), TypeError, "loss_weight: expected a finite number of at least 0, got '1'"),
    (lambda: MaskedDistillLoss(4, loss_weight=float("inf")), ValueError, "loss_weight: expected a finite number of at least 0, got inf"),
    (lambda: MaskedDistillLoss(4, eps=None), TypeError, "eps: expected a finite number of at least 0 and at most 1e+30, got None"),
    (lambda: MaskedDistillLoss(4, np.bool_(True)), TypeError, "num_tokens: expected a positive int"),
    (lambda: MaskedDistillLoss(np.array([4, 0])), ValueError, "channels: expected a positive int or one per level, got [4, 0]"),
    (lambda: MaskedDistillLoss(np.array([4.0])), ValueError, "channels: expected a positive int or one per level, got [4.0]"),
    (lambda: MaskedDistillLoss(4, loss_weight=True), TypeError, "loss_weight: expected a finite number of at least 0, got True"),
    (lambda: MaskedDistillLoss(4, loss_weight=np.array([1.0])), TypeError, "loss_weight: expected a finite number of at least 0"),
    (lambda: MaskedDistillLoss(4, eps=np.float32("nan")), ValueError, "eps: expected a finite number of at least 0 and at most 1e+30, got"),
    (lambda: MaskedDistillLoss(4, eps=torch.tensor(1.0)), TypeError, "eps: expected a finite number of at least 0 and at most 1e+30, got tensor"),
    (lambda: MaskedDistillLoss(4, custom_mask_warmup=np.float64(3)), TypeError, "custom_mask_warmup: expected an int of at least 0"),
    (lambda: MaskModule(4)([X]), TypeError, "x: expected a tensor [N, C, H, W], got list"),
    (lambda: MaskModule(4).to("meta").masks(X), ValueError, "tokens: expected the device of the features, cpu, got meta"),
    (lambda: MaskModule(4).to("meta").weights(X), ValueError, "weighting rows: expected the device of the features, cpu, got meta"),
    (lambda: MaskedDistillLoss(4, loss_weight=-1.0), ValueError, "loss_weight: expected"),
    (lambda: MaskedDistillLoss(4, loss_weight=float("nan")), ValueError, "loss_weight: expected"),
    (lambda: MaskedDistillLoss(4, eps=-1e-3), ValueError, "eps: expected"),
    (lambda: MaskedDistillLoss(4, pretrained=3), TypeError, "pretrained: expected a path, a state dict or a MaskLearner, got int"),
    (lambda: MaskModule(4, 65.0), TypeError, "num_tokens: expected a positive int"),
    (lambda: MaskLearner([4, 0]), ValueError, "channels: expected a positive int"),
    (lambda: MaskModule(4, 6, False).weights(X), ValueError, "weight_mask=False: this module has no mask weights"),
    (lambda: MaskModule(5).masks(X), ValueError, "x: expected 5 channels, got 4"),
    (lambda: MaskLearner([4, 4])([X]), ValueError, "features: expected 2 levels, got 1"),
    (lambda: MaskLearner([4, 4])([X, X[:1]]), ValueError, "features[1]: expected the batch size of features[0], 2, got 1"),
    (lambda: with_level(MaskLearner([4, 4]), MaskModule(4, 5))([X, X]), ValueError, "mask_modules[1]: expected one of 4, num_tokens=6, weight_mask=True, got 4, num_tokens=5"),
    (lambda: with_level(MaskLearner([4, 4]), MaskModule(3))([X, X]), ValueError, "mask_modules[1]: expected one of 4, num_tokens=6, weight_mask=True, got 3, num_tokens=6"),
    (lambda: with_level(MaskLearner([4, 4]), MaskModule(4, weight_mask=False))([X, X]), ValueError, "mask_modules[1]: expected one of 4, num_tokens=6, weight_mask=True, got"),
    (lambda: MaskedDistillLoss(4, eps=1e39), ValueError, "eps: expected a finite number of at least 0 and at most 1e+30, got 1e+39"),
    (lambda: MaskLearner(4, weight_mask="no"), TypeError, "weight_mask: expected True or False, got 'no'"),
    (lambda: MaskedDistillLoss(4, custom_mask=None), TypeError, "custom_mask: expected True or False, got None"),
    (lambda: MaskedDistillLoss(4, loss_weight=10**400), ValueError, "loss_weight: expected a finite number of at least 0, got 1000"),
    (lambda: MaskedDistillLoss(4, loss_weight=1e39), ValueError, "loss_weight: expected a number that torch.float32 can hold, got 1e+39"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "sentence"), WRONG_CONSTRUCTIONS, ids=[case[2] for case in WRONG_CONSTRUCTIONS])
@pytest.mark.filterwarnings("ignore:MaskedDistillLoss without pretrained")
def test_wrong_constructions(call: Callable[[], object], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert sentence in str(caught.value)


WRONG_CALLS: list[tuple[str, object, object, type[Exception], str]] = [
    ("too few levels", S[:1], T[:1], ValueError, "teacher: expected 2 levels, got 1"),
    ("unequal levels", S[:1], T, ValueError, "student and teacher: expected as many levels in both, got 1 and 2"),
    ("no levels", [], [], ValueError, "teacher: expected 2 levels, got 0"),
    ("mapping with list", {"a": S[0], "b": S[1]}, T, TypeError, "expected both or neither to be a mapping of levels"),
    ("other keys", {"a": S[0], "c": S[1]}, {"a": T[0], "b": T[1]}, ValueError, "student: expected the levels ['a', 'b']"),
    ("no tensors", 3, 4, TypeError, "teacher: expected a tensor, or a sequence or mapping of tensors, got int"),
    ("string", "ab", "ab", TypeError, "teacher: expected a tensor, or a sequence or mapping of tensors, got str"),
    ("level of another type", [S[0], None], T, TypeError, "student[1]: expected a tensor, got NoneType"),
    ("teacher's channels", S, [T[0], T[0]], ValueError, "teacher[1]: expected 3 channels, got 4 (shape [2, 4, 6, 5])"),
    ("student's channels", [S[0], S[0]], T, ValueError, "student[1]: expected 3 channels, got 4 (shape [2, 4, 6, 5])"),
    ("sizes", [S[0][..., :4], S[1]], T, ValueError, "student[0]: expected the shape of teacher[0], [2, 4, 6, 5], got [2, 4, 6, 4]"),
    ("batches", [S[0][:1], S[1]], T, ValueError, "student[0]: expected the shape of teacher[0], [2, 4, 6, 5], got [1, 4, 6, 5]"),
    ("batches of levels", [S[0], S[1][:1]], [T[0], T[1][:1]], ValueError, "student[1]: expected the batch size of student[0], 2, got 1"),
    ("nested", S, [torch.nested.nested_tensor(list(T[0])), T[1]], TypeError, "teacher[0]: expected a dense tensor, got a nested one; pad it, and give valid="),
    ("negative bit", [torch._neg_view(S[0]), S[1]], T, ValueError, "student[0]: a view with the negative bit, as of a conjugate's imaginary part; call resolve_neg()"),
    ("three dimensions", [S[0][0], S[1]], T, ValueError, "student[0]: expected features [N, C, H, W], got shape [4, 6, 5]"),
    ("sparse", S, [T[0].to_sparse(), T[1]], TypeError, "teacher[0]: expected a dense tensor, got torch.sparse_coo; call to_dense()"),
    ("no pixel", [S[0][..., :0], S[1]], [T[0][..., :0], T[1]], ValueError, "teacher[0]: expected at least one channel and one pixel"),
    ("integers", S, [T[0].long(), T[1]], TypeError, "teacher[0]: expected float16, bfloat16, float32 or float64 features, got torch.int64"),
    ("complex", [S[0].cfloat(), S[1]], T, TypeError, "student[0]: expected float16, bfloat16, float32 or float64 features"),
    ("float64 student", [S[0].double(), S[1].double()], T, TypeError, "expected all features to be float64 or none"),
    ("devices", S, [T[0].to("meta"), T[1]], ValueError, "teacher[0]: expected the device of student[0], cpu, got meta"),
    ("a level of a mapping", {"p3": S[0], "p4": S[1][:, :2]}, {"p3": T[0], "p4": T[1]}, ValueError, "student['p4']: expected 3 channels, got 2"),
    ("sizes in a mapping", {"p3": S[0], "p4": S[1][..., :1]}, {"p3": T[0], "p4": T[1]}, ValueError, "student['p4']: expected the shape of teacher['p4']"),
    ("teacher with gradient", S, [T[0], T[1].clone().requires_grad_()], ValueError, "teacher[1]: requires grad"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("student", "teacher", "error", "sentence"), [c[1:] for c in WRONG_CALLS], ids=[c[0] for c in WRONG_CALLS]
)
def test_wrong_calls(student: object, teacher: object, error: type[Exception], sentence: str) -> None:
    criterion = PROBLEM.criterion()
    with pytest.raises(error) as caught:
        criterion(student, teacher)
    assert sentence in str(caught.value)
    assert int(criterion.warmup_step) == 0  # a refused call is no step


@pytest.mark.parametrize(
    ("student", "teacher", "error", "sentence"), [c[1:] for c in WRONG_CALLS], ids=[c[0] for c in WRONG_CALLS]
)
def test_wrong_calls_after_right_ones(student: object, teacher: object, error: type[Exception], sentence: str) -> None:
    """What looked right before is not checked again; nothing else may pass for it."""
    criterion = PROBLEM.criterion()
    for _ in range(2):
        criterion(S, T)
    with pytest.raises(error) as caught:
        criterion(student, teacher)
    assert sentence in str(caught.value)


def test_wrong_reduction() -> None:
    with pytest.raises(ValueError, match="reduction: expected one of 'sum', 'none', got 'mean'"):
        PROBLEM.criterion()(S, T, reduction="mean")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mask_token", torch.ones(6, 9)),
        ("mask_token", torch.ones(4, 3)),
        ("pool_rows", torch.ones(9, 6, 2)),
        ("pool_bias", torch.ones(1)),
        ("pool_bias", torch.nn.Parameter(torch.ones(5, 6))),
    ],
)
def test_tables_keep_their_shapes(name: str, value: torch.Tensor) -> None:
    """Kernels would read past their ends."""
    level = MaskedDistillLoss([4, 3], pretrained=MaskLearner([4, 3])).mask_modules[1]
    with pytest.raises(ValueError, match=rf"{name}: expected shape \[.*\], got \[{str(list(value.shape))[1:-1]}\]"):
        setattr(level, name, value)


class Wider(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x], -1)


@pytest.mark.parametrize("entry", ["mask_token", "prob.0.bias", "prob.2.weight"])
def test_parameters_of_another_shape(entry: str, target: Target) -> None:
    """In stage 1, and where they stand in a table's place."""
    impl, device = target
    learner = MaskLearner([4, 3], impl=impl).to(device)
    owner, _, name = f"mask_modules.1.{entry}".rpartition(".")
    old = learner.get_parameter(f"mask_modules.1.{entry}")
    setattr(learner.get_submodule(owner), name, torch.nn.Parameter(torch.cat([old, old])))
    with pytest.raises(ValueError, match=f"{entry}: expected shape"):
        learner([x.to(device) for x in T])
    criterion = MaskedDistillLoss([4, 3], pretrained=MaskLearner([4, 3]), impl=impl).to(device)
    torch.nn.utils.parametrize.register_parametrization(criterion.mask_modules[1], "mask_token", Wider(), unsafe=True)
    with pytest.raises(ValueError, match=r"mask_token: expected shape \[6, 3\], got \[6, 6\]"):
        criterion([x.to(device) for x in S], [x.to(device) for x in T])


ROWS, STANDARD = torch.zeros(9, 6, 4), F.Standardization(torch.zeros(6, 4), torch.zeros(6), torch.ones(2, 4))
WRONG_FORMULAS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: F.masked_distill_loss(S, T, []), ValueError, "tokens: expected one entry for each of the 2 levels, got 0"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], []), ValueError, "weighting: expected one entry for each of the 1"),
    (lambda: F.masked_distill_loss([], [], []), ValueError, "student: expected at least one level, got none"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 5)]), ValueError, "teacher[0]: expected 5 channels, got 4 (shape"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4, requires_grad=True)]), ValueError, "tokens[0]: requires grad"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(4)]), ValueError, "tokens[0]: expected [T, C] with at least one token, got shape [4]"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(0, 4)]), ValueError, "tokens[0]: expected [T, C]"),
    (lambda: F.masked_distill_loss([X, X], [X, X], [torch.zeros(6, 4), torch.zeros(5, 4)]), ValueError, "tokens[1]: expected 6 tokens, as on level 0, got 5"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], [(torch.zeros(9, 6, 3), torch.zeros(6))]), ValueError, "weighting[0]: expected rows [9, 6, 4] and bias [6] or [5, 6], got [9, 6, 3] and [6]"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], [torch.zeros(9, 6, 4)]), TypeError, "weighting[0]: expected (rows [9, 6, 4], bias [6]) from compose_weighting, got Tensor"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], [(torch.zeros(9, 6, 4, device="meta"), torch.zeros(6))]), ValueError, "weighting[0] rows: expected the device of the features, cpu, got meta"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], [(torch.zeros(9, 6, 4, requires_grad=True), torch.zeros(6))]), ValueError, "weighting[0] rows: requires grad"),
    (lambda: F.masked_distill_loss(X, X, torch.zeros(1, 6, 4)), TypeError, "tokens: expected a sequence with one entry per level, got Tensor"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], warmup_step=3), TypeError, "warmup_step: expected an int64 scalar tensor, got 3"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], warmup_step=torch.zeros(1, dtype=torch.int64)), ValueError, "warmup_step: expected an int64 scalar on cpu, got shape [1] on cpu"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], loss_weight=float("nan")), ValueError, "loss_weight: expected a finite number"),
    (lambda: F.receptive_masks(X, torch.zeros(4)), ValueError, "tokens: expected [T, C] with at least one token, got shape [4]"),
    (lambda: F.receptive_masks(X, torch.zeros(6, 4, device="meta")), ValueError, "tokens: expected the device of the features, cpu, got meta"),
    (lambda: F.mask_weights(X, torch.zeros(9, 6, 5), torch.zeros(6)), ValueError, "x: expected 5 channels, got 4"),
    (lambda: F.mask_weights(X, torch.zeros(6, 4), torch.zeros(6)), ValueError, "weighting: expected rows [9, 1, 4] and bias [1] or [5, 1], got [6, 4] and [6]"),
    (lambda: F.compose_weighting(torch.zeros(4, 4, 5, 5), torch.zeros(4), torch.zeros(6, 4, 1, 1), torch.zeros(6)), ValueError, "w3: expected shape [4, 4, 3, 3], got [4, 4, 5, 5]"),
    (lambda: F.compose_standardization(torch.zeros(6, 4), torch.zeros(3), torch.ones(4)), ValueError, "mean: expected shape [4], got [3]"),
    (lambda: F.masked_features_and_dice(X, [torch.zeros(6, 4)]), TypeError, "features: expected a sequence of levels [N, C, H, W], got a tensor"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], standardize=[]), ValueError, "standardize: expected one entry for each of the 1 levels, got 0"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], standardize=[F.Standardization(torch.zeros(6, 4), torch.zeros(6), torch.zeros(4, 2))]), ValueError, "standardize[0].affine: expected shape [2, 4], got [4, 2]"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], impl="gpu"), ValueError, "impl: expected one of"),
    (lambda: F.receptive_masks(X, torch.zeros(6, 5)), ValueError, "x: expected 5 channels, got 4"),
    (lambda: F.masked_features_and_dice(None, []), TypeError, "features: expected a sequence of levels [N, C, H, W], got NoneType"),
    (lambda: F.masked_features_and_dice([X], None), TypeError, "tokens: expected a sequence with one entry per level, got None"),
    (lambda: F.masked_features_and_dice([X[:1], X], [torch.zeros(6, 4)] * 2), ValueError, "features[1]: expected the batch size of features[0], 1, got 2"),
    (lambda: F.masked_features_and_dice([X, X], [torch.zeros(6, 4)] * 2, [(ROWS, torch.zeros(6)), (ROWS, torch.zeros(5, 6))]), ValueError, "weighting[1]: expected bias [6], got [5, 6]; standardised features take the weighting that"),
    (lambda: F.masked_features_and_dice([X], [torch.zeros(6, 4).to(torch.float8_e4m3fn)]), TypeError, "tokens[0]: expected float16, bfloat16, float32 or float64, got torch.float8_e4m3fn"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], [(ROWS, torch.zeros(5, 6))]), ValueError, "weighting[0]: expected bias [6], got [5, 6]; standardised features take the weighting that"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], [(ROWS, torch.zeros(6))], standardize=[STANDARD]), ValueError, "weighting[0]: expected bias [5, 6], got [6]; standardised features take the weighting that"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], standardize=[None]), TypeError, "standardize[0]: expected a Standardization, got None"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4).to_sparse()]), TypeError, "tokens[0]: expected a dense tensor, got torch.sparse_coo; call to_dense()"),
    (lambda: F.masked_distill_loss(X, X, [torch._neg_view(torch.zeros(6, 4))]), ValueError, "tokens[0]: a view with the negative bit"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], valid=torch.ones(2, 3, 3).bool().to_sparse()), TypeError, "valid: expected a dense tensor, got torch.sparse_coo"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], custom_mask=torch.ones(2).bool()), TypeError, "custom_mask: expected True or False, got tensor"),
    (lambda: F.masked_distill_loss(X, X, [torch.zeros(6, 4)], distance=np.array(["squared", "cosine"])), ValueError, "distance: expected one of"),
    (lambda: F.compose_weighting(None, torch.zeros(4), torch.zeros(6, 4, 1, 1), torch.zeros(6)), TypeError, "w3: expected a tensor of 4 dimensions, got NoneType"),
    (lambda: F.compose_weighting(torch.zeros(4, 4, 3, 3), torch.zeros(4), torch.zeros(6), torch.zeros(6)), ValueError, "w1: expected a tensor of 4 dimensions, got shape [6]"),
    (lambda: F.compose_standardization([1.0], torch.zeros(4), torch.ones(4)), TypeError, "tokens: expected a tensor [T, C], got list"),
    (lambda: F.masked_features_and_dice([X], []), ValueError, "tokens: expected one entry for each of the 1 levels, got 0"),
    (lambda: F.masked_features_and_dice([], []), ValueError, "features: expected at least one level, got none"),
    (lambda: F.masked_features_and_dice([X], [torch.zeros(6, 5)]), ValueError, "features[0]: expected 5 channels, got 4"),
    (lambda: F.masked_features_and_dice([X], [torch.zeros(6, 4, device="meta")]), ValueError, "tokens[0]: expected the device of the features, cpu, got meta"),
    (lambda: F.masked_features_and_dice([X, X.double()], [torch.zeros(6, 4)] * 2), TypeError, "features[1]: expected all features to be float64 or none"),
    (lambda: F.masked_features_and_dice([X], [torch.zeros(6, 4)], token_bias=[torch.zeros(5)]), ValueError, "token_bias[0]: expected shape [6], got [5]"),
    (lambda: F.masked_features_and_dice([X], [torch.zeros(6, 4)], token_bias=[torch.zeros(6, device="meta")]), ValueError, "token_bias[0]: expected the device of the features, cpu, got meta"),
    (lambda: F.masked_features_and_dice([X], [torch.zeros(6, 4)], impl="gpu"), ValueError, "impl: expected one of"),
    (lambda: MaskModule(4, impl="gpu"), ValueError, "impl: expected one of"),
    (lambda: MaskLearner(4, impl="gpu"), ValueError, "impl: expected one of"),
    (lambda: F.dice_loss(torch.zeros(6, 3, 3)), ValueError, "masks: expected features [N, C, H, W], got shape [6, 3, 3]"),
]  # fmt: skip


def test_composing_takes_names() -> None:
    w3, b3, w1, b1 = torch.randn(4, 4, 3, 3), torch.randn(4), torch.randn(6, 4, 1, 1), torch.randn(6)
    weighting = F.compose_weighting(w3=w3, b3=b3, w1=w1, b1=b1)
    assert all(map(torch.equal, weighting, F.compose_weighting(w3, b3, w1, b1)))
    given = {"mean": torch.randn(4), "std": torch.rand(4) + 1, "weighting": weighting}
    level, pool = F.compose_standardization(tokens=torch.ones(6, 4), **given)
    want, want_pool = F.compose_standardization(torch.ones(6, 4), *given.values())
    assert all(map(torch.equal, (*level, *pool), (*want, *want_pool)))


@pytest.mark.parametrize(("call", "error", "sentence"), WRONG_FORMULAS, ids=[case[2] for case in WRONG_FORMULAS])
def test_wrong_formulas(call: Callable[[], object], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert sentence in str(caught.value)


def test_a_model_that_is_unfrozen_keeps_its_criterion() -> None:
    criterion = PROBLEM.criterion()
    want = criterion(S, T)
    torch.nn.ModuleList([criterion]).requires_grad_(True)
    student = [s.clone().requires_grad_() for s in S]
    loss = criterion(student, T)
    loss.backward()
    assert torch.equal(loss.detach(), want)
    assert all(p.grad is None for p in criterion.parameters())


def test_pickles_do_not_grow() -> None:
    """What a criterion remembers of the sizes it has seen is no part of it."""
    criterion = MaskedDistillLoss(4, 2, pretrained=MaskLearner(4, 2)).eval()
    before = len(pickle.dumps(criterion))
    for size in range(1, 40):
        criterion(torch.randn(1, 4, size, 3), torch.randn(1, 4, size, 3))
    assert len(pickle.dumps(criterion)) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(copied: Callable[[MaskedDistillLoss], MaskedDistillLoss]) -> None:
    criterion = PROBLEM.criterion(student_channels=[4, 3])
    criterion(S, T)
    other = copied(criterion)
    assert int(other.warmup_step) == 1
    assert torch.equal(other(S, T), criterion(S, T))
    before = criterion(S, T)
    with torch.no_grad():
        other.mask_modules[1].pool_rows.mul_(-2)
    assert not torch.equal(other(S, T), before)
    assert torch.equal(criterion(S, T), before)


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["criterion", "learner", "teacher"])
def test_copies_of_what_was_compiled_in_place(kind: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    """As torch has it: the copy is not compiled, and does not run the original."""
    torch._dynamo.reset()
    problem = Problem([(2, 4, 5, 6), (2, 3, 3, 4)], 3, dtype=torch.float32)
    module, inputs = {
        "criterion": (problem.criterion(), (S, T)),
        "learner": (problem.learner, (T,)),
        "teacher": (FrozenTeacher(nn.Conv2d(4, 2, 1)), (S[0],)),
    }[kind]
    module.compile(backend="eager")
    module(*inputs)
    twin = copied(module)
    twin.register_forward_hook(lambda *_: "its own")
    assert twin(*inputs) == "its own"
    assert module(*inputs) != "its own"


def test_tables_in_float64() -> None:
    with default_dtype(torch.float64):
        criterion = PROBLEM.criterion()
    s, t = cast(S, torch.float64), cast(T, torch.float64)
    want = literal_losses(PROBLEM.learner, s, t)
    torch.testing.assert_close(criterion(s, t, reduction="none"), want, rtol=1e-12, atol=0)


def test_half_tables() -> None:
    """model.half() on the whole rounds the tables; sums stay in float32."""
    criterion, s, t = PROBLEM.criterion().half(), cast(S, torch.float16), cast(T, torch.float16)
    rounded = [
        (x.half(), rows.half(), bias.half()) for x, (rows, bias), _ in (m.tables() for m in PROBLEM.criterion().mask_modules)
    ]
    want = F.masked_distill_loss(s, t, [x.double() for x, *_ in rounded], [(r.double(), b.double()) for _, r, b in rounded])
    agree(criterion(s, t), want.double())


def test_gives_the_same_inside_inference_mode_and_no_grad() -> None:
    criterion = PROBLEM.criterion()
    want = criterion(S, T)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(criterion(S, T), want)
            made_inside = PROBLEM.criterion()
        assert torch.equal(made_inside(S, T), want)


def test_repr_shows_the_settings() -> None:
    text = repr(PROBLEM.criterion(loss_weight=7.0, custom_mask_warmup=8500))
    assert "num_tokens=6" in text
    assert "loss_weight=7.0" in text
    assert "custom_mask_warmup=8500" in text
