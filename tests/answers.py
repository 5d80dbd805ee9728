"""Both answers to a case: the library's, and that of the literal formulas under plain autograd; and how far apart they are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from maskd_triton import MaskedDistillLoss, MaskLearner, reference
from maskd_triton import functional as F
from tests.bounds import SAMPLES, UNITS_OF_SUMS, Moved, bound, unit_of
from tests.cases import DTYPES, Case
from tests.given import Given, counted
from tests.helpers import default_dtype, rounding, strides

Results = dict[str, Tensor]
STEPS = {"no": 0, "from the start": 0, "warm-up": 3, "warmed up": 5}  # of the warm-up, which takes 5


# --- the library ------------------------------------------------------------------------------------------------------


def ours(given: Given, impl: str, device: str = "cpu") -> Results:
    """Losses or masked features, and all gradients, by name, on the CPU."""
    there = given if device == "cpu" else given.on(device)
    found = _learned(there, impl) if given.case.stage == 1 else _distilled(there, impl)
    return {name: x.cpu() for name, x in found.items()}


def _distilled(given: Given, impl: str) -> Results:
    leaves = {f"student.{i}": _leaf(s) for i, s in enumerate(given.student)}
    distilled = _by_module if given.case.through == "module" else _by_function
    loss = distilled(given, impl, leaves)
    mixed = bool(given.case.align or given.case.resize)
    found = {"loss": loss.detach(), **_gradients([loss], given.upstream, leaves, mixed)}
    assert loss.dtype == given.case.precise
    return found


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _gradients(outputs: Sequence[Tensor], upstream: Sequence[Tensor], leaves: Results, mixed: bool = False) -> Results:
    """By the names of the leaves, in their dtype and, but for features that torch aligns or resizes (``mixed``), their strides;
    zeros where nothing depends on one."""
    found = torch.autograd.grad(outputs, list(leaves.values()), upstream, materialize_grads=True)
    for g, (name, x) in zip(found, leaves.items(), strict=True):
        assert g.dtype == x.dtype, name
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        assert mixed or not x.numel() or not dense or strides(g) == strides(x), name
    return dict(zip(leaves, found, strict=True))


def _contained(levels: list[Tensor], container: str, other: bool = False) -> Any:
    """A mapping comes in another order where it is matched by key, that is, but for the teacher's."""
    if container == "list":
        return levels
    if container == "tensor":
        return levels[0]
    named = [(f"p{i}", x) for i, x in enumerate(levels)]
    return dict(reversed(named) if container == "another order" and other else named)


def _options(case: Case, impl: str) -> dict[str, Any]:
    return {"mask_power": case.power, "distance": case.distance, "beta": case.beta, "eps": case.eps, "impl": impl}


def _call(given: Given) -> dict[str, Any]:
    case = given.case
    call: dict[str, Any] = {"valid": given.valid, "reduction": case.reduction}
    for name, levels in (("masks", given.masks), ("mask_weights", given.mask_weights)):
        call |= {name: _contained(levels, case.container, True)} if levels else {}
    return call


def _by_function(given: Given, impl: str, leaves: Results) -> Tensor:
    case, tables = given.case, _tables(given)
    if case.masks:
        tables = {"standardize": tables["standardize"]}
    elif case.mask_weights:
        tables["weighting"] = None
    weight = torch.tensor(case.loss_weight, dtype=case.precise) if case.weight_as == "tensor" else case.loss_weight
    custom: dict[str, Any] = {"custom_mask": case.custom != "no"}
    if case.custom in ("warm-up", "warmed up"):
        step = torch.tensor(STEPS[case.custom], device=given.teacher[0].device)
        custom |= {"warmup_step": step, "custom_mask_warmup": 5}
    options = _options(case, impl) | custom | _call(given)
    return F.masked_distill_loss(list(leaves.values()), given.teacher, **tables, loss_weight=weight, **options)


def _tables(given: Given) -> dict[str, Any]:
    """``tokens``, ``weighting`` and ``standardize`` of every level, composed in float64."""
    tables: dict[str, list[Any]] = {"tokens": [], "weighting": [], "standardize": []}
    with torch.no_grad():
        for module in given.learner.mask_modules:
            weighting = F.compose_weighting(*(p.double() for p in module.weighting())) if module.weight_mask else None
            tables["tokens"].append(module.mask_token.detach().to(given.case.precise))
            if module.standardize:
                standard = [x.double() for x in (module.mask_token, module.channel_mean, module.channel_std)]
                level, weighting = F.compose_standardization(*standard, weighting)
                tables["standardize"].append(F.Standardization(*(x.to(given.case.precise) for x in level)))
            if weighting is not None:
                tables["weighting"].append(tuple(x.to(given.case.precise) for x in weighting))
    return {name: levels or None for name, levels in tables.items()}


def _pretrained(given: Given) -> Any:
    return given.learner.state_dict() if given.case.pretrained == "state dict" else given.learner


def criterion_of(given: Given, impl: str) -> MaskedDistillLoss:
    """In training mode, at the case's step of the warm-up, cast as the case says."""
    case = given.case
    align: dict[str, Any] = {}
    with default_dtype(case.precise):
        if case.own_align:
            align = {"align": [nn.Conv2d(w.shape[1], w.shape[0], 1) for w, _ in given.align]}
        elif case.align:
            align = {"student_channels": [case.align] * len(case.levels)}
        criterion = MaskedDistillLoss(
            [c for c, *_ in case.levels], None if case.tokenless else case.tokens, weight_mask=case.weighted, **align,
            custom_mask=case.custom != "no", custom_mask_warmup=5 if case.custom in ("warm-up", "warmed up") else 0,
            standardize=case.standardize or False, pretrained=None if case.tokenless else _pretrained(given),
            resize=case.resize or None, loss_weight=case.loss_weight, **_options(case, impl),
        ).to(given.teacher[0].device)  # fmt: skip
    with torch.no_grad():
        criterion.warmup_step.fill_(STEPS[case.custom])
        for conv, values in zip(criterion.align or (), given.align, strict=True):
            for p, value in zip((conv.weight, conv.bias), values, strict=True):
                p.copy_(value)
    return criterion.to(DTYPES[case.cast]) if case.cast else criterion


def _by_module(given: Given, impl: str, leaves: Results) -> Tensor:
    case, students = given.case, list(leaves.values())
    criterion, call = criterion_of(given, impl), _call(given)
    for i, conv in enumerate(criterion.align or ()):
        leaves |= {f"align.{i}.weight": conv.weight, f"align.{i}.bias": conv.bias}
    maps = _contained(students, case.container, True), _contained(given.teacher, case.container)
    if case.weight_as == "assigned":
        criterion.loss_weight = 3.0
        criterion(*maps, **call, advance=False)
        criterion.loss_weight = case.loss_weight
    elif case.weight_as == "tensor":
        criterion.loss_weight = torch.tensor(case.loss_weight, dtype=case.precise)
    loss = criterion(*maps, **call, advance=case.advance)
    assert criterion.warmup_step == STEPS[case.custom] + case.advance
    return loss


def _learned(given: Given, impl: str) -> Results:
    case = given.case
    channels = [c for c, *_ in case.levels]
    options: dict[str, Any] = {"standardize": case.standardize or False, "pretrained": _pretrained(given), "impl": impl}
    learner = MaskLearner(channels, case.tokens, case.weighted, **options).to(given.teacher[0].device, case.precise)
    features = [_leaf(x) if case.inputs else x for x in given.teacher]
    leaves = {f"features.{i}": x for i, x in enumerate(features)} if case.inputs else {}
    for i, module in enumerate(learner.mask_modules):
        leaves |= {f"{name}.{i}": p for name, p in module.named_parameters()}
    if case.through == "module":
        masked = learner(_contained(features, case.container), given.valid)
        masked = masked if isinstance(masked, list) else [masked] if isinstance(masked, Tensor) else list(masked.values())
        dice = learner.dice_loss()
        upstream = torch.full_like(dice, case.dice_scale)
    else:
        tables = [module.tables(case.precise) for module in learner.mask_modules]
        masked, dice = F.masked_features_and_dice(
            features,
            [x.teacher_tokens if case.standardize else x.tokens for x in tables],
            [(x.pool_rows, x.pool_bias) for x in tables] if case.weighted else None,
            token_bias=[x.token_bias for x in tables] if case.standardize else None,
            valid=given.valid,
            impl=impl,
        )
        upstream = dice_upstream(case, dice)
    seen = {} if case.valid else _looked_at(learner, features, case)
    for y, x in zip(masked, features, strict=True):
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
    outputs = {f"masked.{i}": y for i, y in enumerate(masked)} | {"dice": dice}
    # in plain torch, autograd adds up the shares of a feature's gradient, in strides of its own
    found = _gradients(list(outputs.values()), [*given.upstream, upstream], leaves, mixed=impl == "eager")
    return {**{name: x.detach() for name, x in outputs.items()}, **found, **seen}


@torch.no_grad()
def _looked_at(learner: MaskLearner, features: list[Tensor], case: Case) -> Results:
    """Masks, their weights and their Dice loss by the functions that only look."""
    seen = {}
    for i, (module, x) in enumerate(zip(learner.mask_modules, features, strict=True)):
        tables = module.tables(case.precise)
        tokens = (tables.teacher_tokens, tables.token_bias) if case.standardize else (tables.tokens,)
        m = module.masks(x) if case.through == "module" else F.receptive_masks(x, *tokens)
        seen |= {f"masks.{i}": m, f"dice.{i}": F.dice_loss(m)}
        if case.weighted:
            by_function = F.mask_weights(x, tables.pool_rows, tables.pool_bias)
            seen[f"weights.{i}"] = module.weights(x) if case.through == "module" else by_function
    return seen


def dice_upstream(case: Case, dice: Tensor) -> Tensor:
    """Of the levels' Dice losses: of the module's sum the same for all, of the function another for each."""
    if case.through == "module":
        return torch.full_like(dice, case.dice_scale)
    return case.dice_scale * torch.arange(1, len(dice) + 1).to(dice)


# --- the formulas -----------------------------------------------------------------------------------------------------


def literal(given: Given, precise: torch.dtype | None = torch.float64, moved: Moved | None = None) -> Results:
    """What the library's should be, in ``precise``, or in the case's own dtypes; ``moved``: see there."""
    formulas = _literal_1 if given.case.stage == 1 else _literal_2
    if moved is None:
        return formulas(given, precise, None)
    with moved:
        return formulas(given, precise, moved)


def _exact(x: Tensor, precise: torch.dtype | None) -> Tensor:
    return x.detach().to(precise or x.dtype, memory_format=torch.contiguous_format).clone().requires_grad_()


def _statistics(given: Given) -> list[tuple[Tensor, Tensor]] | None:
    return [(m.channel_mean, m.channel_std) for m in given.learner.mask_modules] if given.case.standardize else None


def _literal_2(given: Given, precise: torch.dtype | None, moved: Moved | None) -> Results:
    case, sums = given.case, precise or given.case.precise
    leaves = {f"student.{i}": _exact(s, precise) for i, s in enumerate(given.student)}
    students = list(leaves.values())
    if case.align:
        half = half_unit(case.student.dtype)
        for i, (x, values) in enumerate(zip(given.student, given.align, strict=True)):
            values = [p.to(DTYPES[case.cast]) for p in values] if case.cast else values
            weight, bias = (_exact(p, precise) for p in values)
            leaves |= {f"align.{i}.weight": weight, f"align.{i}.bias": bias}
            x = counted(students[i], given.valid, 0.0)
            students[i] = moved.aligned(x, weight, bias, half) if moved else conv2d(x, weight.to(x), bias.to(x))
    modules = given.learner.mask_modules
    weighted = case.weighted and not case.masks and not case.mask_weights
    # without eps, a mask that is 0 on all that counts gives 0 where the library says so, not 0 / 0
    smallest = torch.finfo(sums).tiny if case.eps == 0 and (case.masks or given.valid is not None) else case.eps
    losses = reference.distill_loss(
        [s.to(sums) for s in students],
        [t.detach().to(sums) for t in given.teacher],
        [module.mask_token.detach() for module in modules],
        [tuple(p.detach() for p in module.weighting()) for module in modules] if weighted else None,
        standardize=_statistics(given), masks=[m.to(sums) for m in given.masks] or None,
        mask_weights=[w.to(sums) for w in given.mask_weights] or None, valid=given.valid, resize=case.resize or None,
        loss_weight=case.loss_weight, custom_mask=case.custom in ("from the start", "warmed up"), mask_power=case.power,
        distance=case.distance, beta=case.beta, eps=smallest,
    )  # fmt: skip
    loss = losses.sum() if case.reduction == "sum" else losses
    gradients = torch.autograd.grad(loss, list(leaves.values()), given.upstream[0].to(loss), materialize_grads=True)
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def _literal_1(given: Given, precise: torch.dtype | None, moved: Moved | None) -> Results:
    case, sums, leaves, results, dice, seen = given.case, precise or given.case.precise, {}, {}, [], {}
    statistics = _statistics(given)
    for i, (features, module) in enumerate(zip(given.teacher, given.learner.mask_modules, strict=True)):
        x = _exact(features, precise)
        own = {f"{name}.{i}": _exact(p, precise or case.precise) for name, p in module.named_parameters()}
        leaves |= {f"features.{i}": x, **own} if case.inputs else own
        weighting = tuple(p for name, p in own.items() if name.startswith("prob")) or None
        y, d = reference.masked_features_and_dice(
            x.to(sums), own[f"mask_token.{i}"], weighting, statistics and statistics[i], given.valid
        )
        results[f"masked.{i}"] = y.to(precise or features.dtype)
        dice.append(d)
        if not case.valid:
            with torch.no_grad():
                z = reference.standardised(x.to(sums), *statistics[i]) if statistics else x.to(sums)
                seen |= {f"masks.{i}": reference.masks(z, own[f"mask_token.{i}"]), f"dice.{i}": d.detach()}
                seen |= {f"weights.{i}": reference.mask_weights(z, *weighting)} if weighting else {}
    results["dice"] = torch.stack(dice)
    outputs = list(results.values())
    upstream = [*(g.to(y) for g, y in zip(given.upstream, outputs, strict=False)), dice_upstream(case, outputs[-1])]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream, materialize_grads=True)
    if case.through == "module":
        results["dice"] = results["dice"].sum()
    return {**{k: v.detach() for k, v in results.items()}, **dict(zip(leaves, gradients, strict=True)), **seen}


def half_unit(dtype: str) -> float:
    """Relative error of rounding to half precision; 0 for other dtypes."""
    return torch.finfo(DTYPES[dtype]).eps / 2 if DTYPES[dtype].itemsize == 2 else 0.0


# --- both -------------------------------------------------------------------------------------------------------------


class Comparison:
    """The formulas' results of a case, and how far the library's may be from them."""

    def __init__(self, given: Given, impl: str) -> None:
        case = self.case = given.case
        dtypes = [case.teacher.dtype] if case.stage == 1 else [case.teacher.dtype, case.student.dtype]
        self.impl, self.unit = impl, unit_of(case.precise, impl, dtypes)
        self.want = literal(given)
        extreme = {case.teacher.values, case.student.values} & {"huge", "inf", "nan"} or case.eps == 0
        self.plain = literal(given, None) if extreme else self.want  # tells what leaves the range of the dtypes
        seeds = [case.seed + 1 + i for i in range(SAMPLES)]
        rounded = half_unit(getattr(case, case.resize).dtype) if case.resize else 0.0
        moves = [Moved(self.unit, seed, bool(case.standardize), rounded) for seed in seeds]
        self.moved = [literal(given, moved=each) for each in moves]

    def last(self, name: str, dtype: torch.dtype) -> float:
        """Relative error of a result that is rounded to half precision."""
        case, times = self.case, 1
        if case.stage == 2 and name.startswith("align"):  # a sum of gradients that were rounded
            dtype, times = DTYPES[case.student.dtype], 8
        elif name.startswith("features") and case.valid and case.weighted:  # the sum of two gradients
            times = 3
        return times * rounding(dtype, (self.impl, "cpu")) if dtype.itemsize == 2 else 0.0

    def parts(self, name: str, *others: Tensor) -> list[tuple[str, list[Tensor]]]:
        """Image by image, so that none hides another's error."""
        every = [*others, self.want[name], self.plain[name], *(each[name] for each in self.moved)]
        if name.startswith(("student", "features", "masked")):
            return [(f"{name}, image {n}", list(xs)) for n, xs in enumerate(zip(*every, strict=True))]
        return [(name, every)]

    def allowed(self, name: str, dtype: torch.dtype) -> list[float]:
        """The bound of every part."""
        return [self._bound(name, dtype, want, moved) for _, (want, _, *moved) in self.parts(name)]

    def _bound(self, name: str, dtype: torch.dtype, want: Tensor, moved: Sequence[Tensor]) -> float:
        info, precise = torch.finfo(dtype), self.case.precise
        # what underflows: a mask, times features and in sums, which a Dice loss divides by 2e-12, and a result
        least = torch.finfo(precise).smallest_normal * (1e12 if name.startswith("dice") else 1e6)
        least += info.smallest_normal * info.eps
        return bound(want, moved, self.unit, UNITS_OF_SUMS[precise], self.last(name, dtype)) + least

    def largest(self, name: str, part: int) -> float:
        want = self.parts(name)[part][1][0]
        return want.abs().max().item() if want.numel() else 0.0

    def shares(self, got: Results) -> dict[str, float]:
        """Every error as a share of what is allowed; AssertionError for a NaN out of nowhere."""
        assert got.keys() == self.want.keys()
        return {part: self._share(name, *parts) for name in got for part, parts in self.parts(name, got[name])}

    def _share(self, name: str, got: Tensor, want: Tensor, plain: Tensor, *moved: Tensor) -> float:
        assert got.shape == want.shape, name
        info = torch.finfo(got.dtype)
        dtype, got, plain = got.dtype, got.detach().double(), plain.double()
        rounded = want.to(dtype).double()
        ended = ~got.isfinite() | (got.abs() >= info.max)
        assert ended[~rounded.isfinite() & ~plain.isfinite()].all(), f"{name}: a finite number where there is none"
        known = rounded.isfinite() & plain.isfinite()
        assert not known.all() or got.isfinite().all(), f"{name}: not finite, unlike the formulas"
        known &= got.isfinite()  # beside a number that is not, its image's others may be so, too
        if not known.any():
            return 0.0
        return (got[known] - want[known]).abs().max().item() / self._bound(name, dtype, want[known], [x[known] for x in moved])


def check(given: Given, impl: str, device: str = "cpu") -> float:
    """AssertionError unless the library's results are right, the same in every run, and nothing given is written.

    Returns the largest error as a share of what is allowed."""
    tensors = given.tensors()
    before, versions = [x.clone() for x in tensors], [x._version for x in tensors]
    got = ours(given, impl, device)
    if impl == "eager" or device != "cpu" or given.case.seed % 4 == 1:  # the interpreter is slow
        again = ours(given, impl, device)
        for name, value in got.items():
            assert _same(value, again[name]), f"{name} differs from run to run"
    assert all(_same(x, y) for x, y in zip(tensors, before, strict=True)), "an input was written"
    assert versions == [x._version for x in tensors]
    shares = Comparison(given, impl).shares(got)
    where = max(shares, key=shares.__getitem__, default="")
    share = shares.get(where, 0.0)
    assert share <= 1, f"{where}: {share:.2f} times the error that is allowed"
    return share


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
