"""Stage 2 against the literal formulas in float64: sizes, layouts, dtypes, upstream gradients, degenerate inputs."""

import pytest
import torch
from helpers import BATCH_LAST, LAYOUTS, NLC, default_dtype, far_apart, in_layout, moved, rounding
from problems import Problem, Shape, Target, close, literal_losses
from torch import Tensor

from maskd_triton import MaskedDistillLoss, MaskLearner, reference
from maskd_triton import functional as F
from maskd_triton._ops.distill import masked_distill
from maskd_triton._records import DistillOptions, flat

HALF = (torch.float16, torch.bfloat16)


SIZES: list[tuple[list[Shape], int]] = [
    ([(1, 1, 1, 1)], 1),
    ([(3, 5, 1, 7)], 2),
    ([(2, 70, 5, 1)], 6),
    ([(1, 13, 7, 11)], 8),
    ([(2, 16, 3, 3)], 19),
    ([(1, 3, 2, 5)], 64),
    ([(0, 4, 3, 3)], 6),
    ([(1, 8, 8, 8)], 3),
    ([(2, 4, 5, 5), (2, 9, 2, 3), (2, 4, 1, 1)], 6),
]


@pytest.mark.parametrize("custom", [False, True], ids=["", "custom"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize(("shapes", "num_tokens"), SIZES)
def test_float64_matches_the_formulas(
    shapes: list[Shape], num_tokens: int, weighted: bool, custom: bool, target: Target
) -> None:
    problem = Problem(shapes, num_tokens, weighted)
    layouts = (*LAYOUTS, NLC)
    options = {"custom_mask": custom, "loss_weight": 0.7, "eps": 1e-3}
    losses, grads = problem.literal(**options)
    for layout in layouts if target[0] == "eager" else [layouts[(num_tokens + weighted + custom) % 3]]:
        got, got_grads = problem.ours(target, layout, **options)
        close(got, losses, 1e-12)
        for g, e in zip(got_grads, grads, strict=True):
            close(g, e, 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", [(2, 33, 9, 7), (1, 64, 4, 8)], ids=str)
def test_error_is_that_of_the_dtype(shape: Shape, dtype: torch.dtype, layout: str, target: Target) -> None:
    """No more than twice the error of the literal formulas in the same dtype; and in fact that of float32 sums."""
    problem = Problem([shape], 6, dtype=dtype)
    losses, grads = problem.literal(custom_mask=True)
    plain, plain_grads = problem.literal(dtype, custom_mask=True)
    got, got_grads = problem.ours(target, layout, custom_mask=True)
    eps = torch.finfo(dtype).eps
    largest = grads[0].abs().max()
    error, plain_error = ((g[0] - grads[0]).abs().max() for g in (got_grads, plain_grads))
    assert error <= 2 * (plain_error + eps * largest)
    assert (got - losses).abs().max() <= 2 * ((plain - losses).abs().max() + torch.finfo(torch.float32).eps * losses.max())
    # Sums are float32 whatever the features: only the gradient's last rounding depends on their dtype.
    # A kernel's bfloat16 tokens keep 16 bits (two parts), all others are float32 or exact.
    close(got, losses, 1e-5 if target[0] == "triton" and dtype == torch.bfloat16 else 1e-6)
    close(got_grads[0], grads[0], rounding(dtype, target) + 2e-6 if dtype in HALF else 1e-6)


def op_arguments(
    problem: Problem, target: Target, custom: bool = False
) -> tuple[list[Tensor], list[Tensor], DistillOptions, str]:
    impl, device = target
    student = [s.detach().to(device).requires_grad_() for s in problem.student]
    tables = F.distill_tables(*problem.parameters(device), None)
    return student, [t.to(device) for t in problem.teacher], DistillOptions(tables, custom_mask=custom), impl


@pytest.mark.parametrize("form", ["contiguous", "transposed", "expanded", "strided", "expanded over levels"])
def test_upstream_gradients_of_any_strides(form: str, target: Target) -> None:
    problem = Problem([(3, 5, 2, 3), (3, 4, 1, 3)], 2)
    student, *rest = op_arguments(problem, target)
    device = target[1]
    values = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -4.0]], dtype=torch.float64, device=device)
    up = {
        "contiguous": values,
        "transposed": values.T.contiguous().T,
        "expanded": values[:, :1].expand(2, 3),
        "strided": torch.stack([values, values * 100], dim=2)[..., 0],
        "expanded over levels": values[:1].expand(2, 3),
    }[form]
    losses = masked_distill(student, *rest).per_image
    losses.backward(up)
    for n in range(3):  # the literal gradient of one image: a batch of one, so 3 times too large
        one = [s[n : n + 1].clone().requires_grad_() for s in problem.student]
        literal_losses(problem.learner, one, [t[n : n + 1] for t in problem.teacher]).sum().backward()
        for i, s in enumerate(one):
            close(student[i].grad[n : n + 1], s.grad / 3 * up[i, n].cpu(), 1e-12)


def test_upstream_gradients_through_reductions(target: Target) -> None:
    problem = Problem([(2, 5, 2, 3), (2, 4, 1, 3)], 2)
    _, grads = problem.literal()
    device = target[1]
    weights = torch.tensor([3.0, -0.5], dtype=torch.float64, device=device)
    for upstream in (lambda x: (x * weights).sum(), lambda x: (x.expand(4, 2).T * weights[:, None]).sum() / 4):
        student = [s.detach().to(device).requires_grad_() for s in problem.student]
        upstream(problem.loss(target, student, reduction="none")).backward()
        for i, s in enumerate(student):
            close(s.grad, weights[i].cpu() * grads[i], 1e-12)


def test_sum_is_the_sum_of_levels(target: Target) -> None:
    problem = Problem([(2, 5, 2, 3), (2, 4, 1, 3)], 2)
    total, levels = problem.loss(target), problem.loss(target, reduction="none")
    assert total.shape == ()
    assert levels.shape == (2,)
    assert total.item() == pytest.approx(levels.sum().item(), rel=1e-14)


def test_one_backward_only(target: Target) -> None:
    """Second derivatives are not offered: an error rather than a silent zero."""
    problem = Problem([(1, 2, 1, 2)], 2)
    student, *rest = op_arguments(problem, target)
    (grad,) = torch.autograd.grad(masked_distill(student, *rest).per_image.sum(), student, create_graph=True)
    penalty = student[0].sum() + grad.square().sum()
    with pytest.raises(RuntimeError, match="maskd_triton::distill_backward has no derivative"):
        penalty.backward()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_equal_features_give_exactly_nothing(dtype: torch.dtype, weighted: bool, target: Target) -> None:
    problem = Problem([(2, 9, 3, 5)], 6, weighted, dtype)
    problem.student = problem.teacher
    losses, (grad,) = problem.ours(target, custom_mask=True)
    assert losses.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_empty_masks_are_finite(dtype: torch.dtype, weighted: bool, target: Target) -> None:
    problem = Problem([(2, 4, 2, 3)], 3, weighted, dtype)
    problem.teacher = [torch.ones_like(t) for t in problem.teacher]
    problem.tokens[0].fill_(-1e4)  # sigmoid(-4e4) is 0 in float64 too
    losses, (grad,) = problem.ours(target)
    assert losses.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_one_empty_mask_of_several(dtype: torch.dtype, target: Target) -> None:
    problem = Problem([(1, 4, 3, 3)], 3, dtype=dtype)
    problem.teacher = [t.abs() for t in problem.teacher]
    problem.tokens[0][1] = -1e4
    losses, grads = problem.literal()
    got, got_grads = problem.ours(target)
    close(got, losses, 1e-5)
    close(got_grads[0], grads[0], rounding(dtype, target) + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nlc"])
def test_saturated_masks_are_one(dtype: torch.dtype, layout: str, target: Target) -> None:
    """Masks of 1 everywhere: the loss is the plain MSE. Tokens of 1e6 do not fit into float16."""
    problem = Problem([(2, 4, 3, 3)], 3, False, dtype)
    problem.teacher = [t.abs() + 1 for t in problem.teacher]
    problem.student = [s.abs() + 1 for s in problem.student]
    problem.tokens[0].fill_(1e6)
    mse = (problem.student[0].double() - problem.teacher[0].double()).square().mean()
    losses, _ = problem.ours(target, layout, custom_mask=True)
    assert losses.item() == pytest.approx(mse.item(), rel=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 10.0])
def test_eps(eps: float, target: Target) -> None:
    problem = Problem([(2, 4, 2, 3)], 3)
    losses, grads = problem.literal(eps=eps)
    got, got_grads = problem.ours(target, eps=eps)
    close(got, losses, 1e-12)
    close(got_grads[0], grads[0], 1e-12)


def test_eps_zero_gives_the_originals_nan_for_empty_masks(target: Target) -> None:
    problem = Problem([(1, 2, 1, 2)], 2, False)
    problem.teacher = [torch.ones(1, 2, 1, 2).double()]
    problem.tokens[0].fill_(-1e4)
    losses, _ = problem.ours(target, eps=0.0)
    assert losses.isnan().all()


@pytest.mark.parametrize("weight", [0.0, 1e-3, 10.0, 1 / 3])
def test_loss_weight(weight: float, target: Target) -> None:
    problem = Problem([(2, 4, 2, 3)], 3)
    losses, grads = problem.literal(loss_weight=weight)
    got, got_grads = problem.ours(target, loss_weight=weight)
    close(got, losses, 1e-12)
    close(got_grads[0], grads[0], 1e-12)


MIXED = [
    (torch.float16, "nchw", torch.float32, "channels_last"),
    (torch.float32, "nlc", torch.float16, "nchw"),
    (torch.bfloat16, "channels_last", torch.float16, "nchw"),
    (torch.float64, "nchw", torch.float64, "nlc"),
]


@pytest.mark.parametrize(("s_dtype", "s_layout", "t_dtype", "t_layout"), MIXED)
def test_mixed_dtypes_and_layouts(
    s_dtype: torch.dtype, s_layout: str, t_dtype: torch.dtype, t_layout: str, target: Target
) -> None:
    precise = torch.float64 if s_dtype == torch.float64 else torch.float32
    problem = Problem([(2, 24, 3, 5)], 6, dtype=precise)
    problem.student, problem.teacher = [problem.student[0].to(s_dtype)], [problem.teacher[0].to(t_dtype)]
    losses, grads = problem.literal(custom_mask=True)
    student = in_layout(problem.student[0], s_layout).detach().to(target[1]).requires_grad_()
    loss = problem.loss(target, [student], [in_layout(problem.teacher[0], t_layout)], custom_mask=True)
    loss.backward()
    assert loss.dtype == precise
    assert student.grad.dtype == s_dtype
    assert student.grad.stride() == student.stride()
    assert loss.item() == pytest.approx(losses.item(), rel=1e-5 if precise == torch.float32 else 1e-12)
    close(student.grad, grads[0], rounding(s_dtype, target) + (1e-5 if precise == torch.float32 else 1e-12))


def views() -> dict[str, tuple[Tensor, Tensor]]:
    """Features ``[2, 6, 3, 4]`` that are not a dense tensor of their own: student and teacher."""
    torch.manual_seed(0)
    big = torch.randn(4, 9, 5, 7, dtype=torch.float64)
    base = big[:2, :6, :3, :4].clone()
    flat = torch.randn(2 * 6 * 12 + 3, dtype=torch.float64)
    every = torch.randn(2, 12, 3, 4, dtype=torch.float64)
    return {
        "cropped": (big[1:3, 2:8, 1:4, 2:6], base),
        "cropped teacher": (base, big[1:3, 2:8, 1:4, 2:6]),
        "channel slice": (every[:, 3:9], every[:, :6]),
        "every second channel": (every[:, ::2], base),
        "batch slice": (every[:, :6].repeat(2, 1, 1, 1)[::2], base),
        "storage offset": (flat[3:].view(2, 6, 3, 4), base),
        "expanded batch": (base[:1].expand(2, 6, 3, 4), base + 1),
        "expanded teacher": (base, base[:1].expand(2, 6, 3, 4) + 0 * base[:1] + 1),
        "expanded channels of teacher": (base, base[:, :1].expand(2, 6, 3, 4)),
        "expanded pixels of teacher": (base, base[:, :, :1, :1].expand(2, 6, 3, 4)),
        "spatially transposed": (base, torch.randn(2, 6, 4, 3, dtype=torch.float64).transpose(2, 3)),
        "both spatially transposed": tuple(torch.randn(2, 6, 4, 3, dtype=torch.float64).transpose(2, 3) for _ in "st"),
        "batch innermost": (base.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2), base + 1),
        "flipped": (base.flip(3), base),
    }


@pytest.mark.parametrize("name", list(views()))
def test_views(name: str, target: Target) -> None:
    device = target[1]
    given_s, given_t = views()[name]
    student, teacher = moved(given_s, device), moved(given_t, device)
    problem = Problem([(2, 6, 3, 4)], 3)
    problem.student, problem.teacher = [given_s.clone()], [given_t.clone()]
    losses, grads = problem.literal(custom_mask=True)
    kept = student.clone(), teacher.clone()
    versions = student._version, teacher._version
    leaf = student.detach().requires_grad_()
    loss = problem.loss(target, [leaf], [teacher], custom_mask=True)
    loss.backward()
    assert loss.item() == pytest.approx(losses.item(), rel=1e-12)
    close(leaf.grad, grads[0], 1e-12)
    assert torch.equal(student, kept[0])
    assert torch.equal(teacher, kept[1])
    assert (student._version, teacher._version) == versions


def test_inputs_are_never_written(target: Target) -> None:
    problem = Problem([(2, 6, 3, 4), (2, 3, 1, 2)], 3)
    student, *rest = op_arguments(problem, target, custom=True)
    teacher, options, _ = rest
    tensors = [*student, *teacher, *flat(options.tables)]
    kept, versions = [x.detach().clone() for x in tensors], [x._version for x in tensors]
    masked_distill(student, *rest).per_image.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
    assert [x._version for x in tensors] == versions


def test_two_runs_are_bit_equal(target: Target) -> None:
    problem = Problem([(2, 33, 9, 7)], 6, dtype=torch.float32)
    (a, [ga]), (b, [gb]) = (problem.ours(target, custom_mask=True) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(ga, gb)


def test_loss_does_not_depend_on_requires_grad(target: Target) -> None:
    problem = Problem([(2, 6, 3, 4)], 3, dtype=torch.float32)
    with torch.no_grad():
        without = problem.loss(target)
    assert not without.requires_grad
    assert torch.equal(without, problem.loss(target))
    loss = problem.loss(target, [s.requires_grad_() for s in problem.student])
    assert loss.requires_grad
    assert torch.equal(without, loss.detach())


def test_only_one_level_of_the_student_requires_grad(target: Target) -> None:
    problem = Problem([(2, 5, 2, 3), (2, 4, 1, 3)], 2)
    _, grads = problem.literal()
    student = [s.to(target[1]) for s in problem.student]
    student[1].requires_grad_()
    problem.loss(target, student).backward()
    assert student[0].grad is None
    close(student[1].grad, grads[1], 1e-12)


@pytest.mark.parametrize("valid", [False, True], ids=["", "valid"])
@pytest.mark.parametrize("distance", F.DISTANCES)
def test_empty_batch_trains(distance: str, valid: bool, target: Target) -> None:
    impl, device = target
    learner = MaskLearner(4)
    criterion = MaskedDistillLoss(4, student_channels=3, pretrained=learner, distance=distance, impl=impl).to(device)
    pixels = torch.zeros(0, 4, 4, dtype=torch.bool, device=device) if valid else None
    loss = criterion(torch.zeros(0, 3, 2, 2, device=device), torch.zeros(0, 4, 2, 2, device=device), valid=pixels)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(criterion.align[0].weight.grad, torch.zeros_like(criterion.align[0].weight))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype, target: Target) -> None:
    """Sums stay in float32 where the criterion is called inside an autocast region."""
    problem = Problem([(2, 6, 3, 4)], 3, dtype=torch.float32)
    expected = problem.loss(target, custom_mask=True)
    student, teacher = ([x.to(target[1]) for x in xs] for xs in (problem.student, problem.teacher))
    tokens, weighting = problem.parameters(target[1])
    with torch.autocast(target[1], dtype):
        got = F.masked_distill_loss(student, teacher, tokens, weighting, custom_mask=True, impl=target[0])
    assert torch.equal(got, expected)


def test_teacher_in_inference_mode(target: Target) -> None:
    """Either it works or it says what to do; torch's own words come from the middle of the graph."""
    problem = Problem([(2, 6, 3, 4)], 3)
    losses, grads = problem.literal()
    student = problem.student[0].detach().to(target[1]).requires_grad_()
    with torch.inference_mode():
        teacher = problem.teacher[0].to(target[1]) * 1
    try:
        loss = problem.loss(target, [student], [teacher])
    except ValueError as error:
        assert "teacher[0]" in str(error)  # noqa: PT017
        assert "no_grad" in str(error)  # noqa: PT017
        return
    loss.backward()
    close(loss.detach(), losses.sum(), 1e-12)
    close(student.grad, grads[0], 1e-12)


# --- the criterion: warm-up ------------------------------------------------------------------------------------------


def warm_up(target: Target, warmup: int, **options: object) -> tuple[MaskedDistillLoss, Problem, Tensor, Tensor]:
    """A criterion in float64, its problem, and the losses expected before and after the warm-up."""
    impl, device = target
    problem = Problem([(2, 4, 2, 3)], 2, weighted=False)
    criterion = MaskedDistillLoss(
        4, 2, weight_mask=False, custom_mask_warmup=warmup, impl=impl,
        pretrained=problem.learner, **options,
    )  # fmt: skip
    criterion.to(device, torch.float64)
    before, after = (problem.literal(custom_mask=custom)[0].sum() for custom in (False, True))
    assert (before - after).abs() > 1e-3 * before
    return criterion, problem, before, after


def losses_of(criterion: MaskedDistillLoss, problem: Problem, calls: int) -> Tensor:
    device = criterion.warmup_step.device
    student, teacher = problem.student[0].to(device), problem.teacher[0].to(device)
    return torch.stack([criterion(student, teacher) for _ in range(calls)]).cpu()


def test_warm_up_counts_training_calls(target: Target) -> None:
    criterion, problem, before, after = warm_up(target, 2)
    criterion.train()
    close(losses_of(criterion, problem, 4), torch.stack([before, before, after, after]), 1e-12)
    assert criterion.warmup_step.item() == 4


def test_eval_mode_does_not_advance(target: Target) -> None:
    criterion, problem, before, after = warm_up(target, 1)
    criterion.eval()
    close(losses_of(criterion, problem, 3), before.expand(3), 1e-12)
    assert criterion.warmup_step.item() == 0
    criterion.train()
    close(losses_of(criterion, problem, 1), before.expand(1), 1e-12)
    criterion.eval()
    close(losses_of(criterion, problem, 2), after.expand(2), 1e-12)
    assert criterion.warmup_step.item() == 1


def test_warm_up_of_zero_customises_at_once(target: Target) -> None:
    criterion, problem, _, after = warm_up(target, 0)
    close(losses_of(criterion.eval(), problem, 1), after.expand(1), 1e-12)


def test_custom_mask_off_never_customises(target: Target) -> None:
    criterion, problem, before, _ = warm_up(target, 0, custom_mask=False)
    close(losses_of(criterion, problem, 2), before.expand(2), 1e-12)


def test_warm_up_is_saved_and_restored(target: Target) -> None:
    criterion, problem, before, after = warm_up(target, 3)
    losses_of(criterion, problem, 2)
    state = criterion.state_dict()
    assert state["warmup_step"].dtype == torch.int64
    resumed, *_ = warm_up(target, 3)
    resumed.load_state_dict(state)
    assert resumed.warmup_step.item() == 2
    close(losses_of(resumed, problem, 2), torch.stack([before, after]), 1e-12)


def test_a_rejected_call_does_not_advance(target: Target) -> None:
    criterion, problem, *_ = warm_up(target, 3)
    device = target[1]
    with pytest.raises(ValueError, match="student"):
        criterion(problem.student[0].to(device)[:, :, :1], problem.teacher[0].to(device))
    assert criterion.warmup_step.item() == 0


def test_align_is_trained_through_the_loss(target: Target) -> None:
    impl, device = target
    torch.manual_seed(0)
    learner = MaskLearner(5, 3).double()
    with default_dtype(torch.float64):
        criterion = MaskedDistillLoss(5, 3, student_channels=2, pretrained=learner, impl=impl).to(device)
    student = torch.randn(2, 2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    teacher = torch.randn(2, 5, 3, 4, dtype=torch.float64, device=device)
    criterion(student, teacher).backward()
    weight, bias = (p.detach().clone().requires_grad_() for p in criterion.align[0].parameters())
    copy = student.detach().clone().requires_grad_()
    module = learner.to(device).mask_modules[0]
    aligned = torch.nn.functional.conv2d(copy, weight, bias)
    reference.distill_loss([aligned], [teacher], [module.mask_token], [module.weighting()]).backward()
    for got, expected in zip((student, *criterion.align[0].parameters()), (copy, weight, bias), strict=True):
        close(got.grad, expected.grad.cpu(), 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_offsets(layout: str, target: Target) -> None:
    """Images of 2**31 elements and more take 64-bit offsets."""
    problem = Problem([(2, 9, 5, 7)], 6, dtype=torch.float16)
    losses, grads = problem.literal(custom_mask=True)
    student, teacher = (far_apart(x, layout, target[1]) for x in (problem.student[0], problem.teacher[0]))
    loss = problem.loss(target, [student.requires_grad_()], [teacher], custom_mask=True)
    loss.backward()
    close(loss, losses.sum(), 1e-6)
    close(student.grad, grads[0], rounding(torch.float16, target) + 2e-6)


def test_when_offsets_become_wide() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from maskd_triton.kernels import launch

    for channels, pixels, wide in [(2, 2**30, False), (2, 2**30 + 1, True), (1, 2**31, False), (4096, 2**19, False)]:
        (group,) = launch.groups([*map(launch.Map.of, launch.looks([torch.empty((4, channels, pixels), device="meta")]))])
        assert group.wide is wide


def test_features_without_a_contiguous_axis(target: Target) -> None:
    """Gradients keep such strides, too."""
    problem = Problem([(2, 9, 5, 7), (2, 4, 2, 2)], 6)
    losses, grads = problem.literal(custom_mask=True)
    got, got_grads = problem.ours(target, BATCH_LAST, custom_mask=True)
    close(got, losses, 1e-12)
    for g, e in zip(got_grads, grads, strict=True):
        close(g, e, 1e-12)


def test_many_channels(target: Target) -> None:
    problem = Problem([(1, 4096, 1, 3)], 2, weighted=False)
    losses, grads = problem.literal()
    got, got_grads = problem.ours(target)
    close(got, losses, 1e-12)
    close(got_grads[0], grads[0], 1e-12)
