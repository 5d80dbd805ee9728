"""Stage 1 against the literal formulas in float64: sizes, layouts, dtypes, upstream gradients, degenerate inputs."""

import copy

import pytest
import torch
from helpers import BATCH_LAST, LAYOUTS, NLC, far_apart, in_layout, moved, rounding
from problems import DICE_SCALE, Problem, Target, close, literal_learn, literal_results, normal, results
from torch import Tensor

from maskd_triton import MaskLearner, MaskModule, reference
from maskd_triton import functional as F
from maskd_triton._ops.learn import learn, learn_backward, masked_learn
from maskd_triton._ops.library import in_lists
from maskd_triton._records import LearnKept, LearnOptions, LearnTables, flat

HALF = (torch.float16, torch.bfloat16)
SHAPES = [
    ((1, 1, 1, 1), 1),
    ((3, 5, 1, 7), 2),
    ((2, 70, 5, 1), 6),
    ((1, 13, 7, 11), 8),
    ((2, 16, 3, 3), 19),
    ((1, 3, 2, 5), 64),
    ((1, 8, 16, 17), 3),
]


def module_of(channels: int, num_tokens: int, weighted: bool, impl: str) -> MaskModule:
    module = Problem([(1, channels, 1, 1)], num_tokens, weighted).learner.mask_modules[0]
    module.impl = impl
    return module


def measured(module: MaskModule, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """What ``literal_results`` gives, from the library."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y, dice = module(x)
    assert y.dtype == x.dtype
    assert dice.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    return results(module, x, y, dice, g)


def all_close(got: dict[str, Tensor], want: dict[str, Tensor], bound: float, **bounds: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        close(got[name], value, bounds.get(name, bound), name)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize(("shape", "num_tokens"), SHAPES, ids=str)
def test_float64_matches_the_formulas(shape: tuple[int, ...], num_tokens: int, weighted: bool, target: Target) -> None:
    impl, device = target
    module = module_of(shape[1], num_tokens, weighted, impl).to(device).double()
    x, g = normal(*shape).double(), normal(*shape, seed=1).double()
    want = literal_results(module, x, g)
    layouts = (*LAYOUTS, NLC)
    for layout in layouts if impl == "eager" else [layouts[(num_tokens + weighted) % 3]]:
        placed = in_layout(x, layout).to(device)
        got = measured(module, placed, in_layout(g, layout).to(device))
        all_close(got, want, 2e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", [(2, 33, 9, 7), (1, 64, 4, 8)], ids=str)
def test_error_is_that_of_the_dtype(shape: tuple[int, ...], dtype: torch.dtype, layout: str, target: Target) -> None:
    """Sums are float32 whatever the features: only the last rounding of y and of the feature gradient depends on them."""
    impl, device = target
    module = module_of(shape[1], 6, True, impl).to(device)
    x, g = (in_layout(normal(*shape, seed=i).to(dtype), layout) for i in (0, 1))
    want, plain = literal_results(module, x, g), literal_results(module, x, g, dtype)
    got = measured(module, x.to(device), g.to(device))
    # Measured: at most 7.4e-7 and 9.7e-6; a kernel's bfloat16 tokens keep 16 bits
    sums = 2e-6 if dtype != torch.bfloat16 or impl == "eager" else 2e-5
    rounded = sums if dtype == torch.float32 else rounding(dtype, target) + sums
    all_close(got, want, sums, y=rounded, x=rounded)
    eps = max(torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps)  # sums round more than once
    for name, value in want.items():  # and never above that of the formulas in this dtype
        allowed = (plain[name] - value).abs().max() + eps * value.abs().max()
        assert (got[name] - value).abs().max() <= 2 * allowed, name


GRADIENTS = ["expanded", "transposed", "sliced", "channels_last", "scalar"]


@pytest.mark.parametrize("form", GRADIENTS)
def test_upstream_gradients_of_any_strides(form: str, target: Target) -> None:
    impl, device = target
    shape = (2, 5, 4, 6)
    module = module_of(5, 3, True, impl).to(device).double()
    x = normal(*shape).double()
    g = {
        "expanded": normal(2, 1, 4, 6, seed=1).double().expand(shape),
        "transposed": normal(2, 5, 6, 4, seed=1).double().transpose(2, 3),
        "sliced": normal(2, 9, 5, 7, seed=1).double()[:, 2:7, 1:, :6],
        "channels_last": in_layout(normal(*shape, seed=1).double(), "channels_last"),
        "scalar": torch.ones((), dtype=torch.float64).expand(shape),
    }[form]
    all_close(measured(module, x.to(device), moved(g, device)), literal_results(module, x, g), 1e-12)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinite_feature_gives_masks_of_0_and_1(sign: int, dtype: torch.dtype, target: Target) -> None:
    """As in the formulas, although a kernel multiplies it by two parts of a token, whose signs may differ."""
    impl, device = target
    module = module_of(5, 8, False, impl).to(device)
    x = normal(2, 5, 4, 6).to(dtype)
    x[0, 1, 2, 3] = sign * torch.inf
    with torch.no_grad():
        y, dice = module(x.to(device))
        want, literal_dice = literal_learn(copy.deepcopy(module).cpu(), x.float())
    assert dice.isfinite()
    close(dice, literal_dice, 2e-5 if dtype == torch.bfloat16 else 2e-6)
    assert torch.equal(y.cpu().isfinite(), want.isfinite())
    assert not y.cpu()[~want.isnan()].isnan().any()


def test_an_upstream_gradient_with_the_negative_bit(target: Target) -> None:
    impl, device = target
    module = module_of(5, 3, True, impl).to(device).double()
    x, g = normal(2, 5, 4, 6).double(), normal(2, 5, 4, 6, seed=1).double()
    all_close(measured(module, x.to(device), torch._neg_view(g.to(device))), literal_results(module, x, -g), 1e-12)


def test_features_made_in_inference_mode(target: Target) -> None:
    """Nothing is kept of them where nothing learns."""
    impl, device = target
    module = module_of(5, 3, True, impl).to(device)
    with torch.inference_mode():
        x = normal(2, 5, 4, 6).to(device)
    with pytest.raises(ValueError, match=r"features\[0\]: an inference tensor cannot be kept .* or pass features.clone\(\)"):
        module(x)
    module.requires_grad_(False)
    assert torch.equal(module(x)[0], module(x.clone())[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_offsets(layout: str, target: Target) -> None:
    """Images of 2**31 elements and more, and such gradients from above, take 64-bit offsets."""
    impl, device = target
    module = module_of(9, 6, True, impl).to(device)
    x, g = normal(2, 9, 5, 7).half(), normal(2, 9, 5, 7, seed=1).half()
    want = literal_results(module, x, g)
    got = measured(module, far_apart(x, layout, device), far_apart(g, layout, device))
    rounded = rounding(torch.float16, target) + 2e-6
    all_close(got, want, 2e-6, y=rounded, x=rounded)


def test_features_without_a_contiguous_axis(target: Target) -> None:
    impl, device = target
    module = module_of(5, 3, True, impl).to(device).double()
    x, g = normal(2, 5, 4, 6).double(), normal(2, 5, 4, 6, seed=1).double()
    placed = in_layout(x, BATCH_LAST).to(device)
    all_close(measured(module, placed, in_layout(g, BATCH_LAST).to(device)), literal_results(module, x, g), 1e-12)
    assert module(placed)[0].stride() == placed.stride()


def test_a_pyramid_is_its_levels(target: Target) -> None:
    """All levels in one call: outputs, Dice sum and gradients of each level alone."""
    impl, device = target
    learner = MaskLearner([4, 9, 4], num_tokens=3, impl=impl).to(device).double()
    xs = [normal(2, c, h, w, seed=c).double().to(device) for c, h, w in ((4, 5, 5), (9, 2, 3), (4, 1, 1))]
    gs = [normal(*x.shape, seed=7).double().to(device) for x in xs]
    ys = learner(xs)
    loss = sum(((y * g).sum() for y, g in zip(ys, gs, strict=True)), DICE_SCALE * learner.dice_loss())
    loss.backward()
    total = 0.0
    for module, x, g, y in zip(learner.mask_modules, xs, gs, ys, strict=True):
        want = literal_results(module, x, g)
        total += want["dice"].item()
        assert torch.allclose(y.cpu(), want["y"], rtol=1e-12, atol=1e-14)
        for name, p in module.named_parameters():
            assert (p.grad.cpu() - want[name]).abs().max() <= 1e-12 * want[name].abs().max(), name
    assert learner.dice_loss().item() == pytest.approx(total, rel=1e-12)


def test_frozen_features_get_no_gradient_and_change_nothing(target: Target) -> None:
    impl, device = target
    module = module_of(5, 3, True, impl).to(device)
    x, g = normal(2, 5, 4, 3).to(device), normal(2, 5, 4, 3, seed=1).to(device)
    with_x = measured(module, x, g)
    module.zero_grad()
    kept = x.clone()
    y, dice = module(x)
    torch.autograd.backward([y, dice], [g, torch.full_like(dice, DICE_SCALE)])
    assert x.grad is None
    assert torch.equal(x, kept)
    for name, p in module.named_parameters():
        assert torch.equal(p.grad.cpu().double(), with_x[name]), name


def test_two_runs_are_bit_equal(target: Target) -> None:
    impl, device = target
    module = module_of(33, 6, True, impl).to(device)
    x, g = normal(2, 33, 9, 17).to(device), normal(2, 33, 9, 17, seed=1).to(device)
    first, second = measured(module, x, g), measured(module, x, g)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_small_gradients_are_not_lost(dtype: torch.dtype, target: Target) -> None:
    """A mean over a large head's output gives gradients below what float16 can hold: tokens must not stand still."""
    impl, device = target
    module = module_of(8, 4, False, impl).to(device)
    x = normal(1, 8, 5, 6).to(dtype)
    g = normal(1, 8, 5, 6, seed=1).to(dtype)
    small = torch.tensor(2.0**-10 if dtype == torch.float16 else 2.0**-40, dtype=dtype)
    grads = []
    for scale in (torch.ones((), dtype=dtype), small):
        module.zero_grad()
        y, _ = module(x.to(device))
        y.backward((g * scale).to(device))
        grads.append(module.mask_token.grad.cpu().double() / scale.double())
    want, bound = grads[0], 1e-5 if dtype != torch.float16 else 1e-2  # float16 rounds the upstream gradient itself
    assert (grads[1] - want).abs().max() <= bound * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_saturated_and_empty_masks(dtype: torch.dtype, target: Target) -> None:
    impl, device = target
    module = module_of(4, 3, True, impl).to(device)
    with torch.no_grad():
        module.mask_token.copy_(torch.tensor([1e3, -1e3, 0.0])[:, None].expand(3, 4))
    x, g = (normal(2, 4, 3, 3, seed=i).abs().to(dtype) + 1 for i in (0, 1))
    got = measured(module, x.to(device), g.to(device))
    assert all(value.isfinite().all() for value in got.values())
    rounded = rounding(dtype, target) + 2e-5
    all_close(got, literal_results(module, x, g), 2e-5, y=rounded, x=rounded)


def test_empty_batch(target: Target) -> None:
    impl, device = target
    learner = MaskLearner([4, 3], num_tokens=3, impl=impl).to(device)
    ys = learner([torch.zeros(0, 4, 2, 2, device=device), torch.zeros(0, 3, 1, 1, device=device)])
    (sum(y.sum() for y in ys) + learner.dice_loss()).backward()
    assert [y.shape for y in ys] == [(0, 4, 2, 2), (0, 3, 1, 1)]
    assert learner.dice_loss().item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in learner.parameters())


def test_only_the_dice_loss_is_used(target: Target) -> None:
    """No gradient reaches y: the tokens still learn to differ, and the weighting gets zeros."""
    impl, device = target
    module = module_of(5, 3, True, impl).to(device).double()
    x = normal(2, 5, 4, 3).double()
    module(x.to(device))[1].backward()
    want = literal_results(module, x, torch.zeros(2, 5, 4, 3))
    assert (module.mask_token.grad.cpu() * DICE_SCALE - want["mask_token"]).abs().max() <= 1e-12
    assert module.prob[0].weight.grad.abs().max() == 0


FULLEST = "weighted biased"
KINDS = ["plain", "weighted", "biased", FULLEST, "valid"]


def op_arguments(kind: str, target: Target, layout: str = "ncl", grad: bool = True) -> tuple[list[Tensor], LearnOptions, str]:
    impl, device = target
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float64).requires_grad_(grad)

    def features(c: int, p: int) -> Tensor:
        x = torch.randn(2, p, c) if layout == "nlc" else torch.randn(2, c, p)
        x = x.transpose(1, 2) if layout == "nlc" else x
        return moved(x.double(), device).requires_grad_(grad)

    token_bias = [leaf(3), leaf(3)] if "biased" in kind else []
    rows = [leaf(9, 3, 5), leaf(9, 3, 2)] if "weighted" in kind else []
    bias = [leaf(5, 3) if token_bias else leaf(3) for _ in rows]
    weights = [leaf(2, 3), leaf(2, 3)] if "valid" in kind else []
    valid = [moved(torch.rand(2, p) > 0.4, device).byte() for p in (12, 6) if weights]
    tables = LearnTables([leaf(3, 5), leaf(3, 2)], token_bias, rows, bias)
    return [features(5, 12), features(2, 6)], LearnOptions(tables, weights, valid, [3, 2]), impl


@pytest.mark.slow
# every kind in one layout and both layouts of one kind: what the fakes say of one does not depend on the other
@pytest.mark.parametrize(("kind", "layout"), [*((kind, "ncl") for kind in KINDS), (FULLEST, "nlc")])
def test_opcheck(kind: str, layout: str, target: Target) -> None:
    features, options, impl = op_arguments(kind, target, layout, grad=False)
    given = {"features": features, "impl": impl} | options._asdict() | {"tables": flat(options.tables)}
    torch.library.opcheck(learn, (), given)
    masked, dice, *kept = learn(**given)
    given |= {"grad_masked": [y + 1 for y in masked], "grad_dice": torch.ones_like(dice)}
    given |= dict(zip(("used_weights", *LearnKept._fields[1:]), kept, strict=True))
    for need in (True, False):
        torch.library.opcheck(learn_backward, (), given | {"need_features": need})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, target: Target) -> None:
    features, options, impl = op_arguments(kind, target)
    lists = features, *options.tables, options.weights
    sizes = [len(each) for each in lists]

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        features, *tables, weights = in_lists(tensors, sizes)
        masked, dice, _ = masked_learn(features, options._replace(tables=LearnTables(*tables), weights=weights), impl)
        return (*masked, dice)

    # every element of one kind in eager torch; a random projection, which is faster, misses no wrong gradient either
    fast = impl == "triton" or kind != FULLEST
    assert torch.autograd.gradcheck(outputs, [x for each in lists for x in each], fast_mode=fast)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_fullgraph(dynamic: bool, target: Target) -> None:
    impl, device = target
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    learner = MaskLearner([7, 5], num_tokens=3, impl=impl).to(device)

    def loss(features: list[Tensor]) -> Tensor:
        ys = learner(features)
        return sum(y.square().mean() for y in ys) + learner.dice_loss()

    # the operators are the same to the default backend, which takes longer, whoever computes in them and whatever the sizes
    backend = "inductor" if dynamic == (impl == "triton") else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=backend)
    for h, w in [(8, 12), (12, 14), (9, 18)] if dynamic else [(8, 12)] * 2:
        features = [normal(2, 7, h, w).to(device), normal(2, 5, h // 2, w // 2).to(device)]
        results = []
        for function in (loss, compiled):
            learner.zero_grad()
            value = function(features)
            value.backward()
            results.append([value.detach(), *(p.grad.clone() for p in learner.parameters())])
        for want, got in zip(*results, strict=True):
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-8)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype, target: Target) -> None:
    impl, device = target
    module = module_of(6, 3, True, impl).to(device)
    x = normal(2, 6, 3, 4).to(device)
    y, dice = module(x)
    with torch.autocast(device, dtype):
        y_inside, dice_inside = module(x)
    assert torch.equal(y, y_inside)
    assert torch.equal(dice, dice_inside)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_dice_loss_of_masks_in_any_dtype(dtype: torch.dtype) -> None:
    """Sums of a large half-precision map leave its range; autocast would take them in half."""
    large = torch.rand((2, 3, 200, 336), generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = F.dice_loss(large)
    for got in (inside, F.dice_loss(large)):
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(reference.dice(large.double()).item(), rel=1e-5)  # measured: 4e-6
    assert F.dice_loss(torch.ones(1, 2, 300, 300, dtype=dtype)).item() == 1
    assert F.dice_loss(torch.zeros(1, 2, 3, 3, dtype=dtype)).item() == 0


def test_functional_takes_lists(target: Target) -> None:
    impl, device = target
    xs = [normal(2, 4, 3, 3).to(device), normal(2, 2, 1, 5).to(device)]
    tokens = [normal(3, 4, seed=2).to(device), normal(3, 2, seed=3).to(device)]
    ys, dice = F.masked_features_and_dice(xs, tokens, impl=impl)
    for x, e, y, d in zip(xs, tokens, ys, dice, strict=True):
        want, want_dice = reference.masked_features_and_dice(x.double(), e.double())
        assert torch.allclose(y.double(), want, rtol=1e-5, atol=1e-6)
        assert d.item() == pytest.approx(want_dice.item(), rel=1e-6)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_one_backward_only(weighted: bool, target: Target) -> None:
    impl, device = target
    module = module_of(3, 2, weighted, impl).to(device)
    y, dice = module(normal(2, 3, 2, 3).to(device))
    (grad,) = torch.autograd.grad(y.sum() + dice, module.mask_token, create_graph=True)
    with pytest.raises(RuntimeError, match="maskd_triton::learn_backward has no derivative"):
        (module.mask_token.sum() + grad.square().sum()).backward()


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("used", ["masked features", "Dice loss"])
def test_an_output_without_use_has_no_gradient(used: str, weighted: bool, target: Target) -> None:
    impl, device = target
    module = module_of(5, 3, weighted, impl).to(device)
    x, g = normal(2, 5, 3, 4, seed=1).to(device), normal(2, 5, 3, 4, seed=2).to(device)
    literal = copy.deepcopy(module).to("cpu", torch.float64)
    for y, dice in (module(x), literal_learn(literal, x.cpu().double())):
        ((y * g.to(y)).sum() if used == "masked features" else dice).backward()
    torch.testing.assert_close(module.mask_token.grad.cpu().double(), literal.mask_token.grad, rtol=1e-5, atol=1e-6)
