"""Coverage, Dice and weight entropy against loops in float64, and which masks are reported as collapsed."""

import copy
import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Target, trained
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from maskd_triton import MaskedDistillLoss, MaskLearner, MaskModule, reference
from maskd_triton.diagnostics import LevelDiagnostics, collapsed, describe, gradient_ratio, suggest_loss_weight

SHAPES = {  # N, T, H, W
    "everyday": (3, 6, 9, 7),
    "one_token": (2, 1, 4, 5),
    "one_pixel": (3, 4, 1, 1),
    "one_row": (1, 2, 1, 8),
    "many_tokens": (2, 64, 3, 4),
}


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    masks = torch.sigmoid(2 * torch.randn(shape, generator=generator, dtype=torch.float64) - 0.5)
    weights = torch.softmax(torch.randn(shape[:2], generator=generator, dtype=torch.float64), 1)
    return masks.to(dtype), weights.to(dtype)


def expected(masks: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Coverage, Dice, weight and entropy, word for word."""
    m, w = masks.double(), weights.double()
    n, t = m.shape[:2]
    coverage = torch.stack([m[:, i].mean() for i in range(t)])
    dice = torch.zeros(t, t, dtype=torch.float64)
    for k in range(n):
        for i in range(t):
            for j in range(t):
                shared, own, other = ((m[k, a] * m[k, b]).sum() for a, b in ((i, j), (i, i), (j, j)))
                dice[i, j] += 2 * shared / (own + other + 2e-12) / n
    entropies = [-sum(p * math.log(p) for p in image) / math.log(t) if t > 1 else 1.0 for image in w.tolist()]
    return coverage, dice, torch.stack([w[:, i].mean() for i in range(t)]), sum(entropies) / n


def assert_describes(level: LevelDiagnostics, masks: Tensor, weights: Tensor, bound: float) -> None:
    coverage, dice, weight, entropy = expected(masks, weights)
    assert level.weight is not None
    assert level.entropy is not None
    assert level.entropy.shape == ()
    for got, want in ((level.coverage, coverage), (level.dice, dice), (level.weight, weight)):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)
    assert abs(level.entropy.item() - entropy) <= bound


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
def test_against_loops(dtype: torch.dtype, bound: float, shape: tuple[int, ...]) -> None:
    masks, weights = drawn(shape, dtype)
    level = describe(masks, weights)
    assert {v.dtype for v in vars(level).values()} == {dtype}
    assert_describes(level, masks, weights, bound)
    torch.testing.assert_close(level.dice.diag(), torch.ones(shape[1], dtype=dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_off_diagonal_mean_is_the_dice_loss(shape: tuple[int, ...]) -> None:
    masks, _ = drawn(shape)
    t = shape[1]
    others = describe(masks).dice.masked_fill(torch.eye(t, dtype=torch.bool), 0).sum() / max(t * (t - 1), 1)
    assert abs(others.item() - reference.dice(masks).item()) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    masks, weights = drawn((2, 5, 70, 60), dtype)
    level = describe(masks, weights)
    assert {v.dtype for v in vars(level).values()} == {torch.float32}
    assert_describes(level, masks, weights, 2e-6)


def test_autocast_changes_nothing() -> None:
    masks, weights = drawn((2, 4, 6, 5), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        level = describe(masks, weights)
    assert_describes(level, masks, weights, 1e-6)


def test_without_weights() -> None:
    masks, weights = drawn((2, 3, 4, 4))
    level = describe(masks)
    assert level.weight is None
    assert level.entropy is None
    assert torch.equal(level.dice, describe(masks, weights).dice)
    assert collapsed(level) == []


def test_empty_batch() -> None:
    level = describe(torch.zeros(0, 3, 4, 4), torch.zeros(0, 3))
    assert [tuple(v.shape) for v in vars(level).values()] == [(3,), (3, 3), (3,), ()]
    assert all(v.isnan().all() for v in vars(level).values())
    assert collapsed(level) == []


def test_nothing_is_read_and_no_gradient_is_kept() -> None:
    """A meta tensor has no values: whatever waited for one would raise."""
    level = describe(torch.ones(2, 3, 4, 4, device="meta"), torch.ones(2, 3, device="meta"))
    assert {v.device.type for v in vars(level).values()} == {"meta"}
    masks, weights = (x.requires_grad_() for x in drawn((2, 3, 4, 4)))
    assert not any(v.requires_grad for v in vars(describe(masks, weights)).values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        level.coverage = level.dice  # type: ignore[misc]


@pytest.mark.parametrize(
    ("masks", "weights", "sentence"),
    [
        ((3, 4, 4), None, r"masks: expected \[N, T, H, W\] .* got shape \[3, 4, 4\]"),
        ((2, 0, 4, 4), None, "at least one token and one pixel"),
        ((2, 3, 0, 4), None, "at least one token and one pixel"),
        ((2, 3, 4, 4), (3, 2), r"weights: expected shape \[2, 3\], as the masks, got \[3, 2\]"),
    ],
)
def test_wrong_shapes(masks: tuple[int, ...], weights: tuple[int, ...] | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        describe(torch.zeros(masks), None if weights is None else torch.zeros(weights))


ON, OFF = 6.0, -6.0  # logits: masks of .9975 and .0025


def masks_of(*rows: list[float]) -> Tensor:
    """Masks ``[2, T, 1, W]`` from each token's logits."""
    return torch.sigmoid(torch.tensor([[[row] for row in rows]] * 2))


def weights_of(*row: float) -> Tensor:
    return torch.tensor([row] * 2)


QUARTERS = [[ON if p // 2 == t else OFF for p in range(8)] for t in range(4)]
CASES: dict[str, tuple[Tensor, Tensor | None, list[str]]] = {
    "quarters": (masks_of(*QUARTERS), weights_of(0.7, 0.1, 0.1, 0.1), []),
    "background_and_objects": (
        masks_of([ON] * 7 + [OFF], [OFF] * 7 + [ON], [0.0] * 8),
        weights_of(0.9, 0.05, 0.05),
        [],
    ),
    "as_in_the_study": (
        masks_of([OFF] * 8, [OFF] * 8, [OFF] * 8, [ON] * 8, [OFF] * 8),
        weights_of(0.002, 0.002, 0.003, 0.99, 0.003),
        [
            "token 3 is on everywhere: coverage 1.00",
            "tokens 0, 1, 2, 4 are empty: coverage below 0.02",
            "token 3 takes all weight: mean 0.99, entropy of the weights 0.04",
        ],
    ),
    "unweighted": (
        masks_of([ON] * 8, [OFF] * 8),
        None,
        ["token 0 is on everywhere: coverage 1.00", "token 1 is empty: coverage below 0.02"],
    ),
    "two_on_everywhere": (
        masks_of([ON] * 8, [ON, OFF] * 4, [ON] * 8),
        None,
        ["token 0 is on everywhere: coverage 1.00", "token 2 is on everywhere: coverage 1.00"],
    ),
    "one_empty": (masks_of(*QUARTERS[:3], [OFF] * 8), None, ["token 3 is empty: coverage below 0.02"]),
    "twins": (masks_of(QUARTERS[0], QUARTERS[1], QUARTERS[0]), None, ["tokens 0 and 2 are the same: Dice 1.00"]),
    "two_pairs_of_twins": (
        masks_of(QUARTERS[0], QUARTERS[1], QUARTERS[0], QUARTERS[1]),
        None,
        ["tokens 0 and 2 are the same: Dice 1.00", "tokens 1 and 3 are the same: Dice 1.00"],
    ),
    "untrained": (masks_of(*[[0.01, -0.01] * 4] * 3), None, ["tokens 0, 1, 2 are the same: Dice 1.00"]),
    "all_weight_on_a_good_mask": (
        masks_of(*QUARTERS[:2]),
        weights_of(0.04, 0.96),
        ["token 1 takes all weight: mean 0.96, entropy of the weights 0.24"],
    ),
    "one_token_on_everywhere": (masks_of([ON] * 8), weights_of(1.0), ["token 0 is on everywhere: coverage 1.00"]),
    "one_good_token": (masks_of(QUARTERS[0]), weights_of(1.0), []),
}


@pytest.mark.parametrize(("masks", "weights", "sentences"), CASES.values(), ids=CASES)
def test_collapsed(masks: Tensor, weights: Tensor | None, sentences: list[str]) -> None:
    assert collapsed(describe(masks, weights)) == sentences


# Coverage, weight and entropy of tokens learned on the demo's teacher, on raw and on standardised features.
MEASURED: dict[str, tuple[list[float], list[float], float, list[str]]] = {
    "raw_fine": (
        [0.9868, 0.9974, 0.0, 0.0078, 0.0381, 0.0015],
        [0.0, 1.0, 0.0, 0.0, 0.0, 0.0],
        0.0,
        [
            "token 0 is on everywhere: coverage 0.99",
            "token 1 is on everywhere: coverage 1.00",
            "tokens 2, 3, 5 are empty: coverage below 0.02",
            "token 1 takes all weight: mean 1.00, entropy of the weights 0.00",
        ],
    ),
    "raw_middle": (
        [0.0297, 0.0508, 0.9646, 0.211, 0.0136, 0.0012],
        [0.0, 0.0, 0.998, 0.0, 0.0, 0.0],
        0.01,
        [
            "tokens 4 and 5 are empty: coverage below 0.02",
            "token 2 takes all weight: mean 1.00, entropy of the weights 0.01",
        ],
    ),
    "raw_coarse": (
        [0.0823, 0.2609, 0.0506, 0.9017, 0.2817, 0.1322],
        [0.001, 0.001, 0.001, 0.994, 0.002, 0.001],
        0.02,
        ["token 3 takes all weight: mean 0.99, entropy of the weights 0.02"],
    ),
    "standardised_fine": (
        [0.6289, 0.3179, 0.5717, 0.3141, 0.3515, 0.6703],
        [0.36, 0.064, 0.464, 0.049, 0.027, 0.035],
        0.38,
        [],
    ),
    "standardised_coarse": (
        [0.4614, 0.5055, 0.4565, 0.4397, 0.4384, 0.5059],
        [0.258, 0.096, 0.142, 0.106, 0.229, 0.169],
        0.39,
        [],
    ),
}


@pytest.mark.parametrize(("coverage", "weight", "entropy", "sentences"), MEASURED.values(), ids=MEASURED)
def test_collapsed_as_measured(coverage: list[float], weight: list[float], entropy: float, sentences: list[str]) -> None:
    dice = torch.full((6, 6), 0.92).fill_diagonal_(1)  # the largest that was measured for useful tokens
    level = LevelDiagnostics(torch.tensor(coverage), dice, torch.tensor(weight), torch.tensor(entropy))
    assert collapsed(level) == sentences


def test_one_token_per_image_is_no_collapse() -> None:
    """Weights that pick one token in each image, but not the same: entropy 0, and all tokens used."""
    level = describe(masks_of(*QUARTERS[:2]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert level.entropy is not None
    assert level.entropy.item() == 0
    assert collapsed(level) == []


def test_tokens_as_initialised_are_reported_as_the_same() -> None:
    torch.manual_seed(0)
    module: Any = MaskModule(16, num_tokens=3)
    x = torch.randn(2, 16, 6, 6)
    (sentence,) = collapsed(describe(module.masks(x), module.weights(x)))
    assert sentence == "tokens 0, 1, 2 are the same: Dice 1.00"


# --- MaskLearner.diagnostics ------------------------------------------------------------------------------------------


def learner_and_features(device: str, impl: str, weighted: bool = True) -> tuple[MaskLearner, dict[str, Tensor]]:
    """Two levels with tokens that have learned something."""
    torch.manual_seed(0)
    learner = trained([8, 5], 3, weighted, impl=impl).to(device)
    return learner, {"p3": torch.randn(2, 8, 6, 5, device=device), "p4": torch.randn(2, 5, 3, 3, device=device)}


@pytest.mark.parametrize("weighted", [True, False])
def test_learner_describes_its_latest_forward(weighted: bool, target: tuple[str, str]) -> None:
    impl, device = target
    learner, features = learner_and_features(device, impl, weighted)
    with pytest.raises(RuntimeError, match="diagnostics: no features seen yet"):
        learner.diagnostics()
    learner({name: -x for name, x in features.items()})
    learner(features)
    found = learner.diagnostics()
    assert list(found) == ["p3", "p4"]
    for module, (name, x) in zip(learner.mask_modules, features.items(), strict=True):
        masks = reference.masks(x.cpu().double(), module.mask_token.cpu().double()).detach()
        level = found[name]
        assert not level.coverage.requires_grad
        coverage, dice, _, _ = expected(masks, masks[:, :, 0, 0])
        torch.testing.assert_close(level.coverage.cpu().double(), coverage, rtol=0, atol=1e-6)
        torch.testing.assert_close(level.dice.cpu().double(), dice, rtol=0, atol=1e-6)
        if weighted:
            weights = reference.mask_weights(x.cpu().double(), *(p.cpu().double() for p in module.weighting()))
            torch.testing.assert_close(level.weight.cpu().double(), weights.mean(0).detach(), rtol=0, atol=1e-6)
        else:
            assert level.weight is None
            assert level.entropy is None
    learner(list(features.values()))
    assert list(learner.diagnostics()) == [0, 1]


def test_learner_warns_once_per_level(tmp_path: Path) -> None:
    def collapsed_learner() -> MaskLearner:
        learner, features = learner_and_features("cpu", "eager")
        with torch.no_grad():
            learner.mask_modules[1].mask_token.copy_(torch.tensor([100.0, -100.0, -100.0])[:, None].expand(3, 5))
        learner({name: x.abs() for name, x in features.items()})
        return learner

    sentence = r"MaskLearner, level 'p4': masks have collapsed: token 0 is on everywhere.*; tokens 1 and 2 are empty"
    learner = collapsed_learner()
    with pytest.warns(UserWarning, match=sentence) as caught:
        learner.diagnostics()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.diagnostics()
        learner.save(tmp_path / "tokens.pt")
    with pytest.warns(UserWarning, match=sentence):
        collapsed_learner().save(tmp_path / "tokens.pt")


def test_untrained_tokens_are_no_collapse() -> None:
    torch.manual_seed(0)
    learner = MaskLearner(256)
    learner(torch.randn(2, 256, 9, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (level,) = learner.diagnostics().values()
    (sentence,) = collapsed(level)
    assert sentence == "tokens 0, 1, 2, 3, 4, 5 are the same: Dice 0.99"
    assert collapsed(level, overlap=False) == []


# --- gradients --------------------------------------------------------------------------------------------------------


def two_losses(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor]:
    """Levels of a student, and two losses that are computed from them."""
    torch.manual_seed(0)
    x, first, second = torch.randn(2, 3, 8, 8, dtype=torch.float64), nn.Conv2d(3, 4, 3).double(), nn.Conv2d(4, 5, 3).double()
    levels = [first(x).to(dtype)]
    levels.append(second(levels[0].double()).to(dtype))
    task = levels[1].double().square().mean()
    return levels, task, 0.1 * (levels[0].double().abs().mean() + levels[1].double().mean())


def test_gradient_ratio() -> None:
    levels, task, distill = two_losses()
    norms = []
    for loss in (task, distill):
        grads = torch.autograd.grad(loss, levels, retain_graph=True, allow_unused=True)
        norms.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt())
    passes: list[Tensor] = []
    for loss in (task, distill):
        loss.grad_fn.register_prehook(lambda grads: passes.append(grads[0]))
    ratio = gradient_ratio(task, distill, dict(enumerate(levels)))
    assert len(passes) == 2  # one backward pass from each
    torch.testing.assert_close(ratio, norms[1] / norms[0], rtol=1e-14, atol=0)
    assert ratio.shape == ()
    assert not ratio.requires_grad
    assert all(x.grad is None for x in levels if x.is_leaf)
    (task + distill).backward()  # the step's own backward still runs
    last = two_losses()
    alone = gradient_ratio(last[1], last[2], last[0][1])  # of one level
    assert alone.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradient_ratio_of_small_gradients(dtype: torch.dtype) -> None:
    """Under AMP features are half, and gradients of a mean are below what float16 holds."""
    levels, task, distill = two_losses(dtype)
    exact = two_losses()
    want = gradient_ratio(exact[1], exact[2], exact[0])
    got = gradient_ratio(1e-4 * task, 1e-4 * distill, levels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0)


@pytest.mark.parametrize("half", [True, False], ids=["half features", "float32 features"])
def test_gradient_ratio_in_a_step(half: bool, target: Target) -> None:
    """Under autocast, beside a GradScaler, of losses small enough for float16 to lose: the ratio is right, no ``.grad`` and no
    step of the warm-up is left behind, and the optimiser takes the same step as without."""
    impl, device = target
    steps = []
    for asked in (False, True):
        torch.manual_seed(0)
        first, second, head = (nn.Conv2d(i, o, 3, padding=1).to(device) for i, o in ((3, 6), (6, 4), (4, 5)))
        criterion = MaskedDistillLoss(
            [6, 4], 3, pretrained=MaskLearner([6, 4], 3), distance="cosine", loss_weight=1e-5, impl=impl
        ).to(device)
        trained = [*first.parameters(), *second.parameters(), *head.parameters()]
        optimizer, scaler = torch.optim.SGD(trained, lr=0.1), torch.amp.GradScaler(device, init_scale=2.0**10)
        images, labels = torch.randn(2, 3, 6, 7).to(device), torch.randint(5, (2, 6, 7)).to(device)
        teacher = [torch.randn(2, c, 6, 7).to(device) for c in (6, 4)]
        with torch.autocast(device, torch.float16):
            levels = [first(images)]
            levels.append(second(levels[0]))
            if not half:
                levels = [x.float() for x in levels]
            task, distill = 1e-5 * cross_entropy(head(levels[1]), labels), criterion(levels, teacher)
        if asked:
            ratio = gradient_ratio(task, distill, levels)
            assert all(p.grad is None for p in trained)
            assert int(criterion.warmup_step) == 1
            exact, s = copy.deepcopy(head).double(), [x.detach().double().requires_grad_() for x in levels]
            losses = 1e-5 * cross_entropy(exact(s[1]), labels), criterion.eval()(s, [t.double() for t in teacher])
            torch.testing.assert_close(ratio.double(), gradient_ratio(*losses, s), rtol=0.02, atol=0)
        scaler.scale(task + distill).backward()
        scaler.step(optimizer)
        steps.append([p.detach().clone() for p in trained])
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


@pytest.mark.slow
def test_gradient_ratio_of_compiled_parts() -> None:
    torch._dynamo.reset()
    learner = MaskLearner(3, 2)
    criterion, head = MaskedDistillLoss(3, 2, pretrained=learner, distance="smooth_l1"), nn.Conv2d(3, 2, 1)
    x, t = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)

    def losses(s: Tensor) -> tuple[Tensor, Tensor]:
        return head(s).square().mean(), criterion(s, t)

    want = gradient_ratio(*losses(x), x)
    compiled = torch.compile(losses, backend="aot_eager")
    task, distill = compiled(x)
    torch.testing.assert_close(gradient_ratio(task, distill, x), want)
    (task + distill).backward()
    task, distill, s = torch.compile(lambda x: (*losses(2 * x), 2 * x), backend="aot_eager")(x)
    with pytest.raises(ValueError, match=r"task_loss: depends on none of the features; .* in one compiled function"):
        gradient_ratio(task, distill, s)


def test_loss_weight_by_gradient() -> None:
    """With the suggested weight, the distillation has its share of the norms."""
    levels, task, distill = two_losses()
    weight = suggest_loss_weight([task], [0.5 * distill], [levels], loss_weight=0.5, by="gradient", share=0.1)
    ratio = float(gradient_ratio(task, weight * distill, levels))
    assert ratio / (1 + ratio) == pytest.approx(0.1, rel=1e-6)


def test_wrong_gradients() -> None:
    levels, task, distill = two_losses()
    x = torch.zeros(1, 1, 1, 1)
    for call, sentence in (
        (lambda: gradient_ratio(task, distill, [x]), r"features\[0\]: expected the student's features with gradient"),
        (lambda: gradient_ratio(task.detach(), distill, levels), "task_loss: expected a scalar with gradient"),
        (lambda: gradient_ratio(task, levels[0], levels), "distill_loss: expected a scalar with gradient"),
        (lambda: gradient_ratio(task, distill, x.clone().requires_grad_()), "task_loss: depends on none of the features"),
        (lambda: suggest_loss_weight([1.0], [1.0], by="norm"), "by: expected 'loss' or 'gradient', got 'norm'"),
        (lambda: suggest_loss_weight([task], [distill], by="gradient"), "features: expected the student's of every batch"),
        (lambda: suggest_loss_weight([task], [distill], [levels]), "features: expected the student's of every batch"),
        (
            lambda: suggest_loss_weight([task], [distill], [], by="gradient"),
            "features: expected a list with .* 1 batches, got 0",
        ),
        (lambda: suggest_loss_weight([task], [distill], x[None], by="gradient"), "features: .* of the 1 batches, got a tensor"),
        (
            lambda: suggest_loss_weight([task], [0 * distill], [levels], by="gradient"),
            r"gradients' ratios: .* got 0.0 of \[0.0\]",
        ),
        (
            lambda: suggest_loss_weight([0 * task], [distill], [levels], by="gradient"),
            r"gradients' ratios: .* got inf of \[inf\]",
        ),
        (lambda: suggest_loss_weight([0 * task], [0 * distill], [levels], by="gradient"), "gradients' ratios: .* got nan"),
        (lambda: suggest_loss_weight([math.nan, 1, 2], [1, 1, 1]), r"task_losses: .* of \[nan, 1.0, 2.0\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
