"""What a case should give: the published formulas of ``maskd_triton.reference``, image by image, under plain autograd.

In float64; in the case's own dtypes, as eager torch would compute them (sums in float32); or in float64 with masks, weights and
all that they are made of off by some units in the last place: how far that moves a result is what rounding alone may cost,
however the sums are arranged.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from maskd_triton import MaskModule, reference
from tests.fuzz.cases import Distillation, Learning
from tests.fuzz.tensors import Given, of_level

Results = dict[str, Tensor]
Rounding = Callable[[Tensor], Tensor]


def exact(x: Tensor) -> Tensor:
    return x


def off_by(unit: float, seed: int) -> Rounding:
    """Every element moved by up to ``unit`` of itself."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: x * (1 + unit * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1))


def literal(given: Given, precise: torch.dtype | None = None, rounding: Rounding = exact) -> Results:
    """Losses or masked features, and all gradients, by name; in ``precise``, or in the case's own dtypes."""
    with torch.enable_grad():
        return _learn(given, precise, rounding) if isinstance(given.case, Learning) else _distill(given, precise, rounding)


def gradients(outputs: Sequence[Tensor], upstream: Sequence[Tensor], leaves: dict[str, Tensor]) -> Results:
    """By the names of the leaves; zeros where nothing depends on one."""
    found = torch.autograd.grad(outputs, list(leaves.values()), upstream, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def dice_upstream(case: Learning, dice: Tensor) -> Tensor:
    """Of the levels' Dice losses: of the module's sum the same for all, expanded; of the function another for each."""
    if case.through == "module":
        return torch.full_like(dice[:1], case.dice_scale).expand(dice.shape)
    return case.dice_scale * torch.arange(1, len(dice) + 1).to(dice)


def _leaf(x: Tensor, precise: torch.dtype | None) -> Tensor:
    return x.detach().to(precise or x.dtype, memory_format=torch.contiguous_format).clone().requires_grad_()


def _counted(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else torch.where(valid, x, 0)


def _weights(x: Tensor, raw: Tensor, valid: Tensor | None, parameters: Sequence[Tensor], rounding: Rounding) -> Tensor:
    """Softmax weights of (standardised) features, which are 0 in their padding; averages are over valid pixels.

    ``raw``: the same before a mean was taken off."""
    exact_w3, b3, w1, b1 = (p.to(x.dtype) for p in parameters)
    w3, b3, w1, b1 = (rounding(p) for p in (exact_w3, b3, w1, b1))
    x = rounding(x)
    if valid is None and rounding is exact:
        return reference.mask_weights(x, w3, b3, w1, b1)
    pixels = x.shape[2] * x.shape[3] if valid is None else valid.sum((2, 3)).clamp(min=1)
    # the sums of all taps over all pixels, of which those outside are taken off again: their rounding stays
    outside = torch.einsum("oikl,ni->no", rounding(exact_w3) - exact_w3, raw.sum((2, 3)) / pixels)
    pooled = _counted(conv2d(x, w3, b3, padding=1), valid).sum((2, 3)) / pixels + outside
    scores = conv2d(pooled[:, :, None, None], w1, b1).flatten(1)
    w = torch.softmax(scores, 1)
    # off forward, and in the gradient, where it is a difference of the weights' gradients
    return w + (rounding(w) - w).detach() * (1 + scores - scores.detach())


def _standardised(module: MaskModule, x: Tensor, valid: Tensor | None, rounding: Rounding) -> Tensor:
    if not module.standardize:
        return x
    mean, std = (v.to(x.dtype)[:, None, None] for v in (module.channel_mean, module.channel_std))
    return _counted((rounding(x) - rounding(mean)) / std, valid)


def _scaled(module: MaskModule, x: Tensor) -> Tensor:
    return x / module.channel_std.to(x.dtype)[:, None, None] if module.standardize else x


def _dice(m: Tensor) -> Tensor:
    """``reference.dice``, which takes the pairs one by one; all at once where there are many."""
    n, t = m.shape[:2]
    if t <= 6:
        return reference.dice(m)
    gram = torch.einsum("nihw,njhw->nij", m, m)
    area = gram.diagonal(dim1=1, dim2=2)
    coefficients = 2 * gram / (area[:, :, None] + area[:, None, :] + 2e-12)
    return (coefficients * (1 - torch.eye(t, dtype=m.dtype))).sum() / max(n * t * (t - 1), 1)


def _distill(given: Given, precise: torch.dtype | None, rounding: Rounding) -> Results:
    case = given.case
    assert isinstance(case, Distillation)
    leaves: Results = {}
    losses = []
    for i, teacher in enumerate(given.teacher):
        s = leaves[f"student.{i}"] = _leaf(given.student[i], precise)
        t = teacher.detach().to(precise or teacher.dtype)
        if case.student_channels or case.resize == "student":
            s = _counted(s, of_level(given.valid, s))
        if case.resize == "teacher":
            t = _counted(t, of_level(given.valid, t))
        if case.student_channels:
            weight, bias = (_leaf(x, precise) for x in given.align[i])
            leaves |= {f"align.{i}.weight": weight, f"align.{i}.bias": bias}
            s = conv2d(s, weight.to(s.dtype), bias.to(s.dtype))
        if case.resize and s.shape[2:] != t.shape[2:]:
            if case.resize == "student":
                s = interpolate(s, t.shape[2:], mode="bilinear")
            else:
                t = interpolate(t, s.shape[2:], mode="bilinear")
        losses.append(_distill_level(given, i, s.to(precise or given.precise), t.to(precise or given.precise), rounding))
    loss = case.loss_weight * torch.stack(losses)
    if case.reduction == "sum":
        loss = loss.sum()
    return {"loss": loss.detach(), **gradients([loss], [given.upstream[0].to(loss)], leaves)}


def _distill_level(given: Given, i: int, s: Tensor, t: Tensor, rounding: Rounding) -> Tensor:
    case, module, valid = given.case, given.learner.mask_modules[i], of_level(given.valid, t)
    assert isinstance(case, Distillation)
    s, t = _counted(s, valid), _counted(t, valid)
    target, seen = (_standardised(module, t, valid, r) for r in (exact, rounding))
    if case.distance == "cosine":  # a difference of directions, not of features
        s, target = rounding(s), rounding(target)
    tokens = rounding(module.mask_token.detach().to(s.dtype))
    if case.masks:
        m = given.masks[i].to(s.dtype)
    else:
        m = rounding(reference.masks(rounding(seen), tokens))
        if case.custom in ("from the start", "warmed up"):
            m = m * reference.masks(rounding(s.detach()), tokens)
    m = _counted(m, valid)
    w = None
    if case.mask_weights:
        w = given.mask_weights[i].to(s.dtype)
    elif case.weighted and not case.masks:
        w = _weights(seen, _scaled(module, t), valid, [p.detach() for p in module.weighting()], rounding)
    # without eps, a mask that is 0 on all that counts gives 0 where the library says so, not 0 / 0
    smallest = torch.finfo(s.dtype).tiny if case.eps == 0 and (case.masks or valid is not None) else case.eps
    options = {"mask_power": case.power, "distance": case.distance, "beta": case.beta, "eps": smallest}
    total = s.sum() * 0 if s.shape[0] == 0 else s.new_zeros(())
    for n in range(s.shape[0]):
        one = slice(n, n + 1)
        own = None if w is None else w[one]
        total = total + reference.masked_distance(s[one], target[one], m[one], own, **options) / s.shape[0]  # type: ignore[arg-type]
        if case.distance == "cosine" and rounding is not exact:  # 1 less a number near 1, whose gradient is a difference, too
            share = m[one] ** case.power / (m[one].sum((2, 3), keepdim=True) + smallest)
            share = share.mean(1) if own is None else torch.einsum("nt,nthw->nhw", own, share)
            direction = s[one] / s[one].detach().norm(dim=1, keepdim=True).clamp(min=1e-8)
            total = total + (share * (rounding(direction) - direction).sum(1)).sum() / s.shape[0]
    return total


def _learn(given: Given, precise: torch.dtype | None, rounding: Rounding) -> Results:
    case = given.case
    assert isinstance(case, Learning)
    leaves: Results = {}
    results: Results = {}
    dice = []
    for i, (features, module) in enumerate(zip(given.teacher, given.learner.mask_modules, strict=True)):
        leaf = _leaf(features, precise)
        own = {f"{name}.{i}": _leaf(p, precise or given.precise) for name, p in module.named_parameters()}
        leaves |= {f"features.{i}": leaf, **own} if case.inputs else own
        valid = of_level(given.valid, leaf)
        x = _counted(leaf.to(precise or given.precise), valid)
        seen = _standardised(module, x, valid, rounding)
        m = _counted(rounding(reference.masks(rounding(seen), rounding(own[f"mask_token.{i}"]))), valid)
        w = m.new_ones(m.shape[:2])
        if case.weighted:
            parameters = [p for name, p in own.items() if name.startswith("prob")]
            w = _weights(seen, _scaled(module, x), valid, parameters, rounding)
        y = _counted((w[:, :, None, None, None] * rounding(m[:, :, None] * x[:, None])).sum(1), valid)
        results[f"masked.{i}"] = y.to(precise or features.dtype)
        dice.append(_dice(m))
    results["dice"] = torch.stack(dice)
    outputs = list(results.values())
    upstream = [
        *(g.to(y) for g, y in zip(given.upstream, outputs, strict=False)),
        dice_upstream(case, outputs[-1]),
    ]
    return {**{k: v.detach() for k, v in results.items()}, **gradients(outputs, upstream, leaves)}
