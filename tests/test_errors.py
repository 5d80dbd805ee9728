"""Wrong calls of the criterion and of the formulas, and the sentence that a user sees: a case a line."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import Problem
from torch import Tensor, nn

from maskd_triton import MaskedDistillLoss
from maskd_triton import functional as F

PROBLEM = Problem([(2, 4, 6, 5), (2, 3, 3, 2)], 6, dtype=torch.float32)
S, T = PROBLEM.student, PROBLEM.teacher
MASKS = [torch.ones(2, 3, 6, 5), torch.ones(2, 3, 3, 2)]
X, E, ROWS, BIAS = torch.zeros(2, 4, 3, 3), torch.zeros(6, 4), torch.zeros(9, 6, 4), torch.zeros(6)
STANDARD = F.Standardization(E, BIAS, torch.ones(2, 4))


def call(student: Any = S, teacher: Any = T, **options: Any) -> Tensor:
    return PROBLEM.criterion()(student, teacher, **options)


def narrow(student: Any, teacher: Any = T, **options: Any) -> Tensor:
    return PROBLEM.criterion(**options or {"student_channels": [2, 5]})(student, teacher)


def given(**options: Any) -> Tensor:
    return MaskedDistillLoss([4, 3], None)(S, T, **options)


def loss(tokens: Any = (E,), *others: Any, **options: Any) -> Tensor:
    return F.masked_distill_loss(X, X + 1, tokens, *others, **options)


def learn(features: Any = (X,), tokens: Any = (E,), *others: Any, **options: Any) -> Any:
    return F.masked_features_and_dice(features, tokens, *others, **options)


def loss_of_square_maps(channels: int) -> Tensor:
    """As many channels as pixels a side, so that the student's [N, C, H, W] could be [N, H, W, C] by its last size."""
    return MaskedDistillLoss(4, None)(torch.zeros(2, channels, 4, 4), torch.zeros(2, 4, 4, 4), masks=torch.ones(2, 1, 4, 4))


def with_tokens(tokens: Tensor) -> Tensor:
    criterion = PROBLEM.criterion()
    criterion.mask_modules[0].mask_token = tokens
    return criterion(S, T)


def keyed(levels: list[Tensor], *keys: Any) -> dict[Any, Tensor]:
    return dict(zip(keys, levels, strict=True))


def with_grad(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


Wrong = list[tuple[Callable[[], object], type[Exception], str]]

CONSTRUCTIONS: Wrong = [
    (lambda: MaskedDistillLoss(0), ValueError, "channels: expected a positive int, got 0"),
    (lambda: MaskedDistillLoss([4, -1]), ValueError, "channels[1]: expected a positive int, got -1"),
    (lambda: MaskedDistillLoss([]), ValueError, "channels: expected a positive int or one per level, got []"),
    (lambda: MaskedDistillLoss([4.0]), TypeError, "channels[0]: expected a positive int, got 4.0"),
    (lambda: MaskedDistillLoss("4"), TypeError, "channels: expected a positive int, got '4'"),
    (lambda: MaskedDistillLoss({"p3": 0}), ValueError, "channels[0]: expected a positive int, got 0"),
    (lambda: MaskedDistillLoss(4, 0), ValueError, "num_tokens: expected a positive int, got 0"),
    (lambda: MaskedDistillLoss(4, True), TypeError, "num_tokens: expected a positive int, got True"),
    (lambda: MaskedDistillLoss(4, 33), ValueError, "num_tokens: expected at most 32 tokens, got 33"),
    (lambda: MaskedDistillLoss(4, None, standardize=True), ValueError, "num_tokens: num_tokens=None takes its masks from masks= in every call"),
    (lambda: MaskedDistillLoss([4, 3], student_channels=[2]), ValueError, "student_channels: expected one value for each of the 2 levels, got [2]"),
    (lambda: MaskedDistillLoss([4, 3], student_channels={"p3": 2, "p4": 2}), TypeError, "student_channels: a mapping by level, but the levels have no names"),
    (lambda: MaskedDistillLoss({"p3": 4}, student_channels={"p4": 2}), ValueError, "student_channels: expected the levels ['p3'], got ['p4']"),
    (lambda: MaskedDistillLoss(4, weight_mask="no"), TypeError, "weight_mask: expected True or False, got 'no'"),
    (lambda: MaskedDistillLoss(4, standardize="rows"), ValueError, "standardize: expected False, True, 'channel' or 'isotropic', got 'rows'"),
    (lambda: MaskedDistillLoss(4, pretrained=3), TypeError, "pretrained: expected a path, a state dict or a MaskLearner, got int"),
    (lambda: MaskedDistillLoss(4, align=nn.Identity(), student_channels=4), ValueError, "align and student_channels: expected at most one of them"),
    (lambda: MaskedDistillLoss([4, 3], align=nn.Identity()), ValueError, "align: expected one entry for each of the 2 levels, got 1"),
    (lambda: MaskedDistillLoss(4, align=[nn.Identity()] * 2), ValueError, "align: expected one entry for the only level, got 2"),
    (lambda: MaskedDistillLoss(4, align=[torch.relu]), TypeError, "align[0]: expected an nn.Module, got builtin_function_or_method"),
    (lambda: MaskedDistillLoss(4, align="conv"), TypeError, "align: expected a sequence with one entry per level, got str"),
]  # fmt: skip

CALLS: Wrong = [
    (lambda: call(S[:1], T[:1]), ValueError, "teacher: expected 2 levels, got 1"),
    (lambda: MaskedDistillLoss(4, None)([X] * 3, [X] * 3, masks=[X] * 3), ValueError, "teacher: expected 1 level, got 3"),
    (lambda: MaskedDistillLoss(1, None)(X, X, masks=X), ValueError, "teacher[0]: expected 1 channel, got 4"),
    (lambda: call(S[:1]), ValueError, "student and teacher: expected as many levels in both, got 1 and 2"),
    (lambda: call(keyed(S, "a", "b")), TypeError, "student and teacher: expected both or neither to be a mapping of levels, got dict and list"),
    (lambda: call(keyed(S, "a", "c"), keyed(T, "a", "b")), ValueError, "student: expected the levels ['a', 'b'], got ['a', 'c']"),
    (lambda: call(3, 4), TypeError, "teacher: expected a tensor, or a sequence or mapping of tensors, got int"),
    (lambda: call([S[0], None]), TypeError, "student[1]: expected a tensor, got NoneType"),
    (lambda: call(S, [T[0], T[0]]), ValueError, "teacher[1]: expected 3 channels, got 4 (shape [2, 4, 6, 5])"),
    (lambda: call([S[0][:, :2], S[1]]), ValueError, "student[0]: expected 4 channels, got 2 (shape [2, 2, 6, 5]); give student_channels="),
    (lambda: loss_of_square_maps(2), ValueError, "student[0]: expected 4 channels, got 2 (shape [2, 2, 4, 4]); give student_channels="),
    (lambda: call([x.permute(0, 2, 3, 1) for x in S]), ValueError, "channels last, [N, H, W, C]? shapes.from_nhwc(x) makes it [N, C, H, W]"),
    (lambda: call(S, [x.permute(0, 2, 3, 1) for x in T]), ValueError, "teacher[0]: expected 4 channels, got 6 (shape [2, 6, 5, 4]); channels last"),
    (lambda: call(S, [x.flatten(2).mT for x in T]), ValueError, "teacher[0]: expected features [N, C, H, W], got shape [2, 30, 4]; tokens [N, L, C]? shapes.from_tokens(x, (H, W))"),
    (lambda: call([S[0][..., :4], S[1]]), ValueError, "student[0]: expected the shape of teacher[0], [2, 4, 6, 5], got [2, 4, 6, 4]"),
    (lambda: call([S[0][..., :4], S[1]]), ValueError, "different sizes: give resize='student' or 'teacher'"),
    (lambda: call([S[0][:1], S[1]]), ValueError, "student[0]: expected the shape of teacher[0], [2, 4, 6, 5], got [1, 4, 6, 5]"),
    (lambda: call([S[0], S[1][:1]], [T[0], T[1][:1]]), ValueError, "teacher[1]: expected the batch size of student[0], 2, got 1"),
    (lambda: call(S, [torch.nested.nested_tensor(list(T[0])), T[1]]), TypeError, "teacher[0]: expected a dense tensor, got a nested one; pad it, and give valid="),
    (lambda: call([torch._neg_view(S[0]), S[1]]), ValueError, "student[0]: a view with the negative bit"),
    (lambda: call([S[0][..., :0], S[1]], [T[0][..., :0], T[1]]), ValueError, "teacher[0]: expected at least one channel and one pixel"),
    (lambda: call(S, [T[0].long(), T[1]]), TypeError, "teacher[0]: expected float16, bfloat16, float32 or float64 features, got torch.int64"),
    (lambda: call([x.double() for x in S]), TypeError, "expected all features to be float64 or none, got torch.float32 and torch.float64"),
    (lambda: call(S, [T[0].to("meta"), T[1]]), ValueError, "teacher[0]: expected the device of student[0], cpu, got meta"),
    (lambda: call([s.to("meta") for s in S], [t.to("meta") for t in T]), ValueError, "the criterion's mask_token: expected the device of the features, meta, got cpu"),
    (lambda: call(keyed([S[0], S[1][..., :1]], "p3", "p4"), keyed(T, "p3", "p4")), ValueError, "student['p4']: expected the shape of teacher['p4'], [2, 3, 3, 2]"),
    (lambda: call([with_grad(s) for s in S], [T[0], with_grad(T[1])]), ValueError, "teacher[1]: requires grad, but the loss is differentiable in the student only; compute the teacher under torch.no_grad()"),
    (lambda: call(T, [with_grad(s) for s in S]), ValueError, "teacher[0]: requires grad, but the loss is differentiable in the student only (did you swap student and teacher?)"),
    (lambda: narrow(T, [with_grad(x[:, :2]) for x in S]), ValueError, "teacher[0]: expected 4 channels, got 2 (shape [2, 2, 6, 5]); did you swap student and teacher?"),
    (lambda: narrow([S[0][:, :3], S[1]]), ValueError, "student[0]: expected 2 channels, got 3 (shape [2, 3, 6, 5]); that is what student_channels= or align= said"),
    (lambda: call(T, [with_grad(x[:, :2]) for x in S]), ValueError, "teacher[0]: expected 4 channels, got 2 (shape [2, 2, 6, 5]); did you swap student and teacher?"),
    (lambda: narrow(T, [with_grad(x[:, :2]) for x in S], resize="teacher"), ValueError, "teacher[0]: expected 4 channels, got 2 (shape [2, 2, 6, 5]); did you swap student and teacher?"),
    (lambda: narrow(T, [with_grad(x[:, :2]) for x in S], align=[nn.Sequential(nn.Conv2d(2, c, 1)) for c in (4, 3)]), ValueError, "teacher[0]: expected 4 channels, got 2 (shape [2, 2, 6, 5]); did you swap student and teacher?"),
    (lambda: narrow(T, [with_grad(s) for s in S], student_channels=[4, 3]), ValueError, "teacher[0]: requires grad, but the loss is differentiable in the student only (did you swap student and teacher?)"),
    (lambda: narrow([s.permute(0, 2, 3, 1) for s in S], student_channels=None, resize="student"), ValueError, "student[0]: expected 4 channels, got 6 (shape [2, 6, 5, 4]); channels last, [N, H, W, C]? shapes.from_nhwc(x)"),
    (lambda: narrow([x[:, :2].permute(0, 2, 3, 1) for x in S], align=[nn.Sequential(nn.Conv2d(2, c, 1)) for c in (4, 3)]), ValueError, "student[0]: expected 2 channels, got 6 (shape [2, 6, 5, 2]); channels last, [N, H, W, C]? shapes.from_nhwc(x)"),
    (lambda: narrow(S, align=[nn.Conv2d(4, 7, 1), nn.Identity()]), ValueError, "align[0]: expected an output [N, 4, H, W], got shape [2, 7, 6, 5]"),
    (lambda: narrow(S, align=[nn.Flatten()] * 2), ValueError, "align[0]: expected an output [N, 4, H, W], got shape [2, 120]"),
    (lambda: narrow([s.double() for s in S], student_channels=[4, 3]), TypeError, "align[0]: its parameters are torch.float32, the student's features torch.float64; cast one of them"),
    (lambda: with_tokens(torch.zeros(5, 4)), ValueError, "mask_token: expected shape [6, 4], got [5, 4]"),
    (lambda: with_tokens(with_grad(torch.zeros(6, 4))), ValueError, "mask_token: requires grad, but is frozen in stage 2; pass it detached"),
    (lambda: call(reduction="mean"), ValueError, "reduction: expected one of 'sum', 'none', got 'mean'"),
    (lambda: call(valid=torch.ones(2, 6, 5)), TypeError, "valid: expected a bool or integer tensor, non-zero where valid, got torch.float32"),
    (lambda: call(valid=torch.ones(6, 5).bool()), ValueError, "valid: expected shape [2, H0, W0], the size of the padded images, got [6, 5]"),
    (lambda: call(valid="mask"), TypeError, "valid: expected a bool tensor [N, H0, W0], or images with .tensors and .image_sizes"),
    (lambda: given(), ValueError, "masks: expected masks with every call, because num_tokens=None"),
    (lambda: given(masks=[m[:, 0] for m in MASKS]), ValueError, "masks[0]: expected masks [2, T, 6, 5], got shape [2, 6, 5]; add a token dimension: masks[:, None]"),
    (lambda: given(masks=MASKS[:1]), ValueError, "masks: expected one entry for each of the 2 levels, got 1"),
    (lambda: given(masks=[MASKS[0], MASKS[1][:, :2]]), ValueError, "masks[1]: expected as many masks as on the first level, 3, got 2"),
    (lambda: given(masks=[m.int() for m in MASKS]), TypeError, "masks[0]: expected masks of a float dtype or bool, got torch.int32"),
    (lambda: given(masks=[m.repeat(1, 11, 1, 1) for m in MASKS]), ValueError, "masks[0]: T: expected at most 32 tokens, got 33"),
    (lambda: given(masks=[with_grad(m) for m in MASKS]), ValueError, "masks[0]: requires grad, but is frozen in stage 2"),
    (lambda: given(masks=keyed(MASKS, "a", "b")), TypeError, "masks: expected a sequence, because teacher is no mapping, got a mapping"),
    (lambda: given(masks=MASKS, mask_weights=[torch.ones(2, 4)] * 2), ValueError, "mask_weights[0]: expected shape [2, 3], got [2, 4]"),
    (lambda: MaskedDistillLoss(4, None).masks(X), RuntimeError, "masks: this criterion has no tokens (num_tokens=None)"),
    (lambda: PROBLEM.criterion().masks(T[:1]), ValueError, "features: expected 2 levels, got 1"),
    (lambda: PROBLEM.criterion().diagnostics(), RuntimeError, "diagnostics: no call to look at; call the criterion first"),
]  # fmt: skip

FORMULAS: Wrong = [
    (lambda: F.masked_distill_loss([], [], []), ValueError, "student: expected at least one level, got none"),
    (lambda: F.masked_distill_loss(S, T, []), ValueError, "tokens: expected one entry for each of the 2 levels, got 0"),
    (lambda: loss(E), TypeError, "tokens: expected a sequence with one entry per level, got Tensor"),
    (lambda: loss(None), ValueError, "tokens and masks: expected one of them, got none"),
    (lambda: loss(masks=MASKS), ValueError, "tokens and masks: expected one of them, got both"),
    (lambda: loss(None, masks=[X], custom_mask=True), ValueError, "masks: given masks are not customised"),
    (lambda: loss([torch.zeros(6, 5)]), ValueError, "tokens of level 0: expected shape [6, 4], got [6, 5]"),
    (lambda: loss([torch.zeros(4)]), ValueError, "tokens of level 0: expected shape [T, C], got [4]"),
    (lambda: loss([torch.zeros(33, 4)]), ValueError, "tokens of level 0: T: expected at most 32 tokens, got 33"),
    (lambda: loss([with_grad(E)]), ValueError, "tokens of level 0: requires grad, but is frozen in stage 2; pass it detached"),
    (lambda: F.masked_distill_loss([X, X], [X, X], [E, E[:5]]), ValueError, "tokens of level 1: expected shape [6, 4], got [5, 4]"),
    (lambda: loss([E], []), ValueError, "weighting: expected one entry for the only level, got 0"),
    (lambda: loss([E], [ROWS]), TypeError, "weighting[0]: expected the 2 tensors that compose_weighting gives, got Tensor"),
    (lambda: loss([E], [(ROWS[..., :3], BIAS)]), ValueError, "weighting: rows of level 0: expected shape [9, 6, 4], got [9, 6, 3]"),
    (lambda: loss([E], [(ROWS.to("meta"), BIAS)]), ValueError, "weighting: rows of level 0: expected the device of the features, cpu, got meta"),
    (lambda: loss([E], [(ROWS, torch.zeros(5, 6))]), ValueError, "weighting: bias of level 0: expected shape [6], got [5, 6]"),
    (lambda: loss([E], [(ROWS, BIAS)], mask_weights=[torch.ones(2, 6)]), ValueError, "mask_weights and weighting: expected at most one of them"),
    (lambda: loss(standardize=[None]), TypeError, "standardize[0]: expected the 3 tensors that compose_standardization gives, got NoneType"),
    (lambda: loss(standardize=[STANDARD._replace(affine=torch.zeros(4, 2))]), ValueError, "standardize: affine of level 0: expected shape [2, 4], got [4, 2]"),
    (lambda: loss(warmup_step=3), TypeError, "warmup_step: expected an int64 scalar tensor, got 3"),
    (lambda: loss(warmup_step=torch.zeros(1, dtype=torch.int64)), ValueError, "warmup_step: expected an int64 scalar tensor, got torch.int64 of shape [1]"),
    (lambda: loss(custom_mask=torch.ones(2).bool()), TypeError, "custom_mask: expected True or False, got tensor"),
    (lambda: loss(distance="l2"), ValueError, "distance: expected one of 'squared', 'smooth_l1', 'cosine', got 'l2'"),
    (lambda: loss(impl="gpu"), ValueError, "impl: expected one of 'auto', 'triton', 'eager', got 'gpu'"),
    (lambda: F.receptive_masks(X, torch.zeros(6, 5)), ValueError, "x: expected 5 channels, got 4"),
    (lambda: F.mask_weights(X, torch.zeros(9, 6, 5), BIAS), ValueError, "rows: expected shape [9, 6, 4], got [9, 6, 5]"),
    (lambda: F.mask_weights(X, E, BIAS), ValueError, "rows: expected shape [9, T, 4], got [6, 4]"),
    (lambda: F.dice_loss(X[0]), ValueError, "masks: expected features [N, C, H, W], got shape [4, 3, 3]"),
    (lambda: F.compose_weighting(None, E, E, E), TypeError, "w3: expected a tensor of 4 dimensions, got NoneType"),
    (lambda: F.compose_weighting(torch.zeros(4, 4, 5, 5), torch.zeros(4), torch.zeros(6, 4, 1, 1), BIAS), ValueError, "w3: expected shape [4, 4, 3, 3], got [4, 4, 5, 5]"),
    (lambda: F.compose_standardization(E, torch.zeros(3), torch.ones(4)), ValueError, "mean: expected shape [4], got [3]"),
    (lambda: learn(X), TypeError, "features: expected a sequence of levels [N, C, H, W], got a tensor"),
    (lambda: learn([]), ValueError, "tokens: expected one entry for each of the 0 levels, got 1"),
    (lambda: learn([X], None), TypeError, "tokens: expected a sequence with one entry per level, got None"),
    (lambda: learn([X[:1], X], [E, E]), ValueError, "features[1]: expected the batch size of features[0], 1, got 2"),
    (lambda: learn([X, X.double()], [E, E]), TypeError, "features[1]: expected all features to be float64 or none"),
    (lambda: learn([X, X], [E, E], [(ROWS, BIAS), (ROWS, torch.zeros(5, 6))]), ValueError, "weighting: bias of level 1: expected shape [6], got [5, 6]"),
    (lambda: learn(token_bias=[torch.zeros(5)]), ValueError, "token_bias of level 0: expected shape [6], got [5]"),
    (lambda: learn([X], [torch.zeros(6, 5)]), ValueError, "tokens of level 0: expected shape [6, 4], got [6, 5]"),
]  # fmt: skip

WRONG = [*CONSTRUCTIONS, *CALLS, *FORMULAS]


@pytest.mark.parametrize(("wrong", "error", "sentence"), WRONG, ids=[case[2] for case in WRONG])
@pytest.mark.filterwarnings("ignore:MaskedDistillLoss without pretrained")
def test_sentence(wrong: Callable[[], object], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        wrong()
    assert sentence in str(caught.value)


OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("weight", -1.0, ValueError, "expected a number from 0 to 3.4e+38, got -1.0"),
    ("weight", float("nan"), ValueError, "expected a number from 0 to 3.4e+38, got nan"),
    ("weight", "1", TypeError, "expected a number from 0 to 3.4e+38, got '1'"),
    ("weight", True, TypeError, "expected a number from 0 to 3.4e+38, got True"),
    ("weight", torch.ones(1), ValueError, "expected a number or a scalar tensor, got torch.float32 of shape [1]"),
    ("eps", -1e-3, ValueError, "expected a number from 0 to 1e+30, got -0.001"),
    ("eps", None, TypeError, "expected a number from 0 to 1e+30, got None"),
    ("beta", 0, ValueError, "expected a number from 1e-30 to 1e+30, got 0"),
    ("mask_power", 3, ValueError, "expected 1 or 2, got 3"),
    ("distance", np.array(["squared"]), ValueError, "expected one of 'squared', 'smooth_l1', 'cosine', got array"),
    ("custom_mask", None, TypeError, "expected True or False, got None"),
    ("custom_mask_warmup", -1, ValueError, "expected an int of at least 0, got -1"),
    ("custom_mask_warmup", 2.0, TypeError, "expected an int of at least 0, got 2.0"),
    ("custom_mask_warmup", 2**70, ValueError, "expected an int of at least 0, got 1180591620717411303424"),
    ("resize", "both", ValueError, "expected None, 'student' or 'teacher', got 'both'"),
    ("impl", "cuda", ValueError, "expected one of 'auto', 'triton', 'eager', got 'cuda'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "sentence"), OPTIONS)
def test_options_are_refused_alike(name: str, value: Any, error: type[Exception], sentence: str) -> None:
    """In the constructor, and when they are assigned later."""
    name = "loss_weight" if name == "weight" else name
    criterion = PROBLEM.criterion()
    before = getattr(criterion, name)
    for assign in (lambda: PROBLEM.criterion(**{name: value}), lambda: setattr(criterion, name, value)):
        with pytest.raises(error) as caught:
            assign()
        assert f"{name}: {sentence}" in str(caught.value)
    assert getattr(criterion, name) == before


@pytest.mark.parametrize("name", ["channels", "num_tokens", "weight_mask", "standardize"])
def test_options_that_tables_are_made_for(name: str) -> None:
    for criterion in (PROBLEM.criterion(), copy.deepcopy(PROBLEM.criterion())):
        with pytest.raises(AttributeError, match=f"{name}: cannot be changed, .*; make a new MaskedDistillLoss"):
            setattr(criterion, name, getattr(criterion, name))


def test_a_refused_call_is_no_step() -> None:
    criterion = PROBLEM.criterion(student_channels=[2, 5])
    for student in (S[:1], [S[0][:, :3], S[1]], [S[0][:, :2].double(), S[1]], [S[0][:, :2, :4], torch.ones(2, 5, 3, 2)]):
        with pytest.raises((TypeError, ValueError)):
            criterion(student, T)
        assert int(criterion.warmup_step) == 0
