"""The library's results of a case, and how far they may be from the literal ones."""

import torch
from torch import Tensor, nn

from maskd_triton import MaskedDistillLoss, MaskLearner
from maskd_triton import functional as F
from tests.fuzz.cases import DTYPES, Distillation, Learning
from tests.fuzz.literal import Results, dice_upstream, gradients, literal, off_by
from tests.fuzz.tensors import Given
from tests.helpers import default_dtype, rounding


def results(given: Given, impl: str) -> Results:
    """Of the library."""
    return (_learn if isinstance(given.case, Learning) else _distill)(given, impl)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _distill(given: Given, impl: str) -> Results:
    case = given.case
    assert isinstance(case, Distillation)
    leaves = {f"student.{i}": _leaf(s) for i, s in enumerate(given.student)}
    students = list(leaves.values())
    step = None if case.custom in ("no", "from the start") else torch.tensor(3 if case.custom == "warm-up" else 5)
    factor = torch.tensor(case.loss_weight, dtype=given.precise) if case.weight_as_tensor else case.loss_weight
    call = {"valid": given.valid, "reduction": case.reduction}
    call |= {"masks": given.masks} if case.masks else {}
    call |= {"mask_weights": given.mask_weights} if case.mask_weights else {}
    options = {"mask_power": case.power, "distance": case.distance, "beta": case.beta, "eps": case.eps, "impl": impl}
    custom = {"custom_mask": case.custom != "no" and not case.masks, "custom_mask_warmup": 0 if step is None else 5}
    if case.through == "function":
        tables = function_tables(given)
        if case.masks:
            tables = {"standardize": tables["standardize"]}
        elif case.mask_weights:
            tables["weighting"] = None
        loss = F.masked_distill_loss(
            students, given.teacher, **tables, warmup_step=step, loss_weight=factor, **custom, **options, **call
        )  # type: ignore[arg-type]
    else:
        channels, without = [c for c, *_ in case.levels], bool(case.masks) and case.seed % 2 == 0
        with default_dtype(given.precise):
            align = [nn.Conv2d(w.shape[1], w.shape[0], 1) for w, _ in given.align]
            criterion = MaskedDistillLoss(
                channels, None if without else case.tokens, align=align or None, weight_mask=case.weighted, **custom,
                standardize=case.standard, pretrained=None if without else given.learner, resize=case.resize or None, **options,
            ).eval()  # type: ignore[arg-type]  # fmt: skip
        criterion.loss_weight = factor  # type: ignore[assignment]
        criterion.warmup_step.fill_(0 if step is None else step)
        for i, (conv, (weight, bias)) in enumerate(zip(align, given.align, strict=True)):
            conv.weight, conv.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            leaves |= {f"align.{i}.weight": conv.weight, f"align.{i}.bias": conv.bias}
        loss = criterion(students, given.teacher, **call)
    found = {"loss": loss.detach(), **gradients([loss], given.upstream, leaves)}
    assert loss.dtype == given.precise
    for name, x in leaves.items():
        assert found[name].dtype == x.dtype, name
    return found


def function_tables(given: Given) -> dict[str, list[object] | None]:
    """``tokens``, ``weighting`` and ``standardize`` of every level, composed in float64."""
    tables: dict[str, list[object]] = {"tokens": [], "weighting": [], "standardize": []}
    with torch.no_grad():
        for module in given.learner.mask_modules:
            weighting = F.compose_weighting(*(p.double() for p in module.weighting())) if module.weight_mask else None
            tables["tokens"].append(module.mask_token.detach().to(given.precise))
            if module.standardize:
                standard = [x.double() for x in (module.mask_token, module.channel_mean, module.channel_std)]
                level, weighting = F.compose_standardization(*standard, weighting)
                tables["standardize"].append(F.Standardization(*(x.to(given.precise) for x in level)))
            if weighting is not None:
                tables["weighting"].append(tuple(x.to(given.precise) for x in weighting))
    return {name: levels or None for name, levels in tables.items()}


def _learn(given: Given, impl: str) -> Results:
    case = given.case
    assert isinstance(case, Learning)
    learner = MaskLearner([c for c, *_ in case.levels], case.tokens, case.weighted, standardize=case.standard, impl=impl)
    learner.to(given.precise).load_state_dict(given.learner.state_dict())
    features = [x.detach().requires_grad_(case.inputs) for x in given.teacher]
    leaves: Results = {}
    for i, (x, module) in enumerate(zip(features, learner.mask_modules, strict=True)):
        leaves |= {f"features.{i}": x} if case.inputs else {}
        leaves |= {f"{name}.{i}": p for name, p in module.named_parameters()}
    if case.through == "module":
        masked = list(learner(features, given.valid))
        dice = learner.dice_loss()
        upstream = torch.full_like(dice, case.dice_scale)
    else:
        tables = [module.tables(given.precise) for module in learner.mask_modules]
        standards = [x.standardization for x in tables if x.standardization is not None]
        masked, dice = F.masked_features_and_dice(
            features,
            [s.tokens for s in standards] or [x.tokens for x in tables],
            [x.weighting for x in tables if x.weighting is not None] or None,
            token_bias=[s.token_bias for s in standards] or None,
            valid=given.valid,
            impl=impl,
        )
        upstream = dice_upstream(case, dice)
    for y, x in zip(masked, features, strict=True):
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
    outputs = {f"masked.{i}": y for i, y in enumerate(masked)} | {"dice": dice}
    found = gradients(list(outputs.values()), [*given.upstream, upstream], leaves)
    return {**{name: x.detach() for name, x in outputs.items()}, **found}


# --- how far off they may be ------------------------------------------------------------------------------------------

SAMPLES = 2  # of literal results with roundings
ROUNDING = 64  # units that each of them may be off
UNITS = {torch.float32: 8, torch.float64: 100}  # of the largest value: those of a sum; in float64, of what is wanted, too


def unit(given: Given, impl: str) -> float:
    """Half a unit in the last place of sums; a factor enters a kernel's product with bfloat16 features with 16 bits."""
    if impl == "triton" and "bf16" in (given.case.teacher.dtype, getattr(getattr(given.case, "student", None), "dtype", "")):
        return 2.0**-17
    return torch.finfo(given.precise).eps / 2


def last_rounding(dtype: torch.dtype, impl: str) -> float:
    """Relative error of a result that is rounded to half precision; 0 for others."""
    return rounding(dtype, (impl, "cpu")) if dtype.itemsize == 2 else 0.0


def squares_leave(given: Given) -> bool:
    """Whether squared differences leave the range of the sums: masks of 0 times infinity are NaN then."""
    sizes = [x.double().nan_to_num(0, 0, 0).abs().max().item() for x in (*given.student, *given.teacher) if x.numel()]
    most = max(channels for channels, *_ in given.case.levels) * (100 if given.case.standard else 1)
    return bool(given.student) and most * max(sizes, default=0.0) > torch.finfo(given.precise).max ** 0.5


def worst(given: Given, got: Results, impl: str) -> tuple[float, str]:
    """The largest of all errors as a share of what is allowed, and where; AssertionError for a NaN out of nowhere."""
    u, case = unit(given, impl), given.case
    want, plain = literal(given, torch.float64), literal(given)
    near = [literal(given, torch.float64, off_by(ROUNDING * u, case.seed + i)) for i in range(SAMPLES)]
    if isinstance(case, Learning) and case.through == "module":
        for each in (want, plain, *near):
            each["dice"] = each["dice"].sum()
    assert got.keys() == want.keys()
    leaves = squares_leave(given)
    shares = [(0.0, "nothing")]
    for name, value in got.items():
        if isinstance(case, Distillation) and name.startswith("align"):  # a sum of gradients that were rounded
            last = 8 * last_rounding(DTYPES[case.student.dtype], impl)
        else:
            last = last_rounding(value.dtype, impl)
        parts = (value, want[name], plain[name], *(each[name] for each in near))
        by_image = name.startswith(("student", "features", "masked"))  # an image does not hide another's error
        for n, (x, exact, eager, *moved) in enumerate(zip(*parts, strict=True) if by_image else [parts]):
            assert leaves or not x[~eager.isnan() & ~exact.isnan()].isnan().any(), (
                f"{name}: a NaN that eager torch does not give"
            )
            share = _share(x, exact, eager, moved, u, UNITS[given.precise], last)
            shares.append((share, f"{name}, image {n}" if by_image else name))
    return max(shares)


def _share(got: Tensor, want: Tensor, plain: Tensor, near: list[Tensor], unit: float, units: float, last: float) -> float:
    """The error of ``got`` as a share of twice that of ``plain`` plus rounding; ``last``: that of halves."""
    assert got.shape == want.shape
    info = torch.finfo(got.dtype)
    rounded = want.to(got.dtype).double()
    got, plain = got.detach().double(), plain.double()
    ended = ~got.isfinite() | (got.abs() >= info.max)
    assert ended[~rounded.isfinite() & ~plain.isfinite()].all(), "a finite number where there is none"
    known = rounded.isfinite() & plain.isfinite()
    if not known.any():
        return 0.0
    got, want, plain = got[known], want[known], plain[known]
    assert got.isfinite().all(), "not finite, unlike eager torch"
    moved = max((x[known] - want).abs().nan_to_num().max().item() for x in near)
    allowed = 2 * (plain - want).abs().max().item() + moved + (units * unit + last) * want.abs().max().item()
    allowed += info.smallest_normal * info.eps  # of what underflows
    return (got - want).abs().max().item() / allowed


def check(given: Given, impl: str) -> float:
    """AssertionError unless the library's results are right, the same in every run, and nothing given is written.

    Returns the largest error as a share of what is allowed."""
    tensors = given.tensors()
    before, versions = [x.clone() for x in tensors], [x._version for x in tensors]
    got = results(given, impl)
    if impl == "eager" or given.case.seed % 4 == 0:
        again = results(given, impl)
        for name, value in got.items():
            assert _same(value, again[name]), f"{name} differs from run to run"
    assert all(_same(x, y) for x, y in zip(tensors, before, strict=True)), "an input was written"
    assert versions == [x._version for x in tensors]
    share, where = worst(given, got, impl)
    assert share <= 1, f"{where}: {share:.2f} times the error that is allowed"
    return share


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
