"""What a case of the tests of numbers is, which values every field may have, and the table of cases that every test run tries.

A case is plain data: its repr is all that a report needs. ``python -m tests.fuzz`` draws others from the same values.
"""

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from maskd_triton.functional import DISTANCES

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
LAYOUTS = (
    "nchw", "channels_last", "nlc", "batch_last", "offset", "channels of more", "columns of more", "every second channel",
    "rows and columns swapped", "expanded images", "expanded channels", "expanded pixels",
)  # fmt: skip
VALUES = ("normal", "zeros", "ones", "far from zero", "huge", "tiny", "images of all sizes", "inf", "nan")
SIZES = ((3, 4), (1, 1), (1, 7), (5, 1), (2, 2), (3, 3), (7, 5), (1, 37), (41, 1), (8, 8), (11, 13), (9, 17), (16, 16))
MOST = 40_000  # elements of the literal formulas' [N, T, C, H, W]
MOST_INTERPRETED = 4_000


@dataclass(frozen=True)
class Maps:
    """Feature maps of all levels: how they lie in memory and what they hold."""

    dtype: str = "fp64"
    layout: str = "nchw"
    values: str = "normal"


@dataclass(frozen=True)
class Case:
    """One call, forward and backward.

    Attributes:
        stage: 1 or 2.
        through: the module or the function.
        images, levels, tokens: N, ``(C, H, W)`` of every level, and T.
        teacher: in stage 1 the features.
        container: of the levels.
        upstream: layout of the gradient from above; of the losses in stage 2, of the masked features in stage 1.
        learned: size of the tokens: "trained", "untrained" (0.01), "zeros", "saturating", "open" or "closed" (masks of 1 or 0
            where features are positive), "one closed".
        standardize: "" (not), "channel" or "isotropic".
        valid: which pixels count: "" (all, none given), "rectangles", "letterbox", "pixels", "all" or "none".
        rubbish: a number that the others hold.
        seed: of all values.

        pretrained: what the module is loaded from.

        student: its values may also be "equal" or "near" to the teacher's.
        masks: given ones: "" (none), "boxes" (0 and 1), "bool", "scores" (0 to 2), "expanded" (over the
            images).
        tokenless: a criterion without tokens of its own.
        mask_weights: given ones.
        custom: "no", "from the start", "warm-up" (not yet) or "warmed up".
        advance: a call in training mode counts for the warm-up.
        weight_as: the loss weight is a "number", a "tensor" or "assigned" after a first call.
        align: the student's channels, 0 without an align; ``own_align``: the caller's convolution.
        resize, sizes: which side is resized, and the student's sizes then.
        cast: half precision that the criterion is cast to.

        inputs: the features' gradient is wanted, too.
        dice_scale: upstream gradient of the Dice losses.
    """

    stage: int = 2
    through: str = "module"
    images: int = 2
    levels: tuple[tuple[int, int, int], ...] = ((5, 4, 6), (3, 3, 3))
    tokens: int = 3
    teacher: Maps = Maps()
    container: str = "list"
    upstream: str = "contiguous"
    learned: str = "trained"
    weighted: bool = True
    standardize: str = ""
    valid: str = ""
    rubbish: str = "0"
    pretrained: str = "learner"
    seed: int = 0
    # stage 2
    student: Maps = Maps()
    masks: str = ""
    tokenless: bool = False
    mask_weights: bool = False
    custom: str = "from the start"
    advance: bool = True
    power: int = 2
    distance: str = "squared"
    beta: float = 1.0
    eps: float = 1e-12
    loss_weight: float = 0.7
    weight_as: str = "number"
    reduction: str = "none"
    align: int = 0
    own_align: bool = False
    resize: str = ""
    sizes: tuple[tuple[int, int], ...] = ()
    cast: str = ""
    # stage 1
    inputs: bool = True
    dice_scale: float = 3.0

    def __str__(self) -> str:
        """What is not as usual."""
        return ", ".join(f"{name}={value}" for name, value in unusual(self).items()) or "plain"

    @property
    def precise(self) -> torch.dtype:
        """Of sums and losses."""
        return torch.float64 if self.teacher.dtype == "fp64" else torch.float32


OF_STAGE_2 = [f.name for f in fields(Case)][[f.name for f in fields(Case)].index("student") :][:-2]
OF_STAGE_1 = ("inputs", "dice_scale")

# Of every option the values, the usual one first. All pairs of them that go together are in the table.
STAGE_2: dict[str, tuple[Any, ...]] = {
    "through": ("module", "function"),
    "dtypes": ("fp64", "fp32", "bf16", "fp16", "fp32 / bf16", "fp16 / fp32"),
    "layouts": ("nchw", "channels_last", "nlc / nchw", "batch_last", "columns of more", "expanded images / nchw"),
    "container": ("list", "mapping", "another order"),
    "upstream": ("contiguous", "expanded", "strided"),
    "weighted": (True, False),
    "standardize": ("", "channel", "isotropic"),
    "valid": ("", "rectangles", "letterbox", "pixels"),
    "rubbish": ("nan", "inf"),
    "masks": ("", "boxes", "bool", "scores", "expanded"),
    "tokenless": (False, True),
    "mask_weights": (False, True),
    "custom": ("from the start", "no", "warm-up", "warmed up"),
    "power": (2, 1),
    "distance": DISTANCES,
    "beta": (1.0, 0.3),
    "eps": (1e-12, 1e-3, 0.0),
    "weight_as": ("number", "tensor", "assigned"),
    "reduction": ("none", "sum"),
    "align": (0, 2),
    "own_align": (False, True),
    "resize": ("", "student", "teacher"),
    "sizes": (((5, 7), (1, 2)), ((3, 2), (4, 5))),
    "cast": ("", "fp16", "bf16"),
}
STAGE_1: dict[str, tuple[Any, ...]] = {
    **{name: STAGE_2[name] for name in ("through", "layouts", "container", "weighted", "standardize", "valid", "rubbish")},
    "dtypes": ("fp64", "fp32", "bf16", "fp16"),
    "upstream": ("contiguous", "expanded", "strided", "zeros"),
    "tokens": (3, 1),
    "inputs": (True, False),
    "dice_scale": (3.0, 0.0),
}


def case_of(**options: Any) -> Case:
    """``dtypes``, ``layouts`` and ``values`` are the student's and, after "/", the teacher's, if another."""
    usual = {"dtypes": "fp64", "layouts": "nchw", "values": "normal"}
    both = [options.pop(name, value).partition(" / ") for name, value in usual.items()]
    maps = {"student": Maps(*(own for own, _, _ in both)), "teacher": Maps(*(other or own for own, _, other in both))}
    return sound(Case(**{**maps, **options}))


def sound(case: Case) -> Case:
    """The case without what the pages do not promise together."""
    default, changes = Case(), dict[str, Any]()
    if not case.valid or "expanded" in case.student.layout + case.teacher.layout:  # which would spread it
        changes["rubbish"] = "0"
    if case.through == "function":
        changes["pretrained"] = "learner"
    if (case.container == "tensor" and len(case.levels) > 1) or case.through == "function":
        changes["container"] = "list"
    if case.stage == 1:
        changes |= {name: getattr(default, name) for name in OF_STAGE_2}
        return replace(case, **changes)
    changes |= {name: getattr(default, name) for name in OF_STAGE_1}
    tokenless = case.tokenless and bool(case.masks) and case.through == "module" and not case.standardize
    changes |= {"tokenless": tokenless, "weighted": case.weighted and not tokenless}
    if case.through == "function":
        changes |= {"align": 0, "resize": "", "cast": "", "advance": True}
        changes |= {"weight_as": "number"} if case.weight_as == "assigned" else {}
    if case.masks:
        changes["custom"] = "no"
    if case.distance != "smooth_l1":
        changes["beta"] = 1.0
    case = replace(case, **changes)
    if "fp64" in (case.student.dtype, case.teacher.dtype) or not case.cast:
        case = replace(case, cast="")
    elif case.align:  # a convolution takes one dtype
        case = replace(case, student=replace(case.student, dtype=case.cast))
    case = replace(case, own_align=case.own_align and case.align > 0, sizes=case.sizes if case.resize else ())
    values = case.student.values
    if case.distance == "cosine" and values == "tiny":  # below a length of 1e-8 torch has another gradient
        values = "images of all sizes"
    if (case.resize or case.align) and values in ("equal", "near", "tiny"):
        values = "normal"
    # where products of float32 or half numbers leave their range or lose all digits, no bound says how far a result may be
    extreme = {values, case.teacher.values} & {"huge", "inf", "far from zero"}
    if extreme and (case.custom != "no" or case.distance == "cosine" or case.align):
        case = replace(case, custom="no", distance="squared", align=0, own_align=False)
    if case.learned == "saturating" and case.eps == 0:  # a mask whose area is 0 in float32 alone
        case = replace(case, eps=default.eps)
    return replace(case, student=replace(case.student, values=values))


def unusual(case: Case) -> dict[str, Any]:
    """The fields that differ from a plain case's."""
    return {f.name: value for f in fields(Case) if (value := getattr(case, f.name)) != f.default}


def pairs_of(case: Case, options: dict[str, tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    """All pairs of values that the case has of ``options``."""
    dtypes, layouts = (
        own if own == other or case.stage == 1 else f"{own} / {other}"
        for own, other in (
            (case.student.dtype, case.teacher.dtype) if case.stage == 2 else (case.teacher.dtype,) * 2,
            (case.student.layout, case.teacher.layout) if case.stage == 2 else (case.teacher.layout,) * 2,
        )
    )
    own = {"dtypes": dtypes, "layouts": layouts}
    values = [(name, own.get(name, getattr(case, name, None))) for name in options]
    return set(itertools.combinations([(name, value) for name, value in values if value in options[name]], 2))


def possible(stage: int, options: dict[str, tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], Case]]:
    """Every pair that some case keeps, with such a case."""
    needs = ({}, {"valid": "rectangles"}, {"masks": "boxes"}, {"align": 2}, {"resize": "student"}, {"distance": "smooth_l1"})
    needs += ({"dtypes": "fp32"}, {"resize": "student", "valid": "rectangles"}, {"valid": "rectangles", "align": 2})
    needs += ({"valid": "rectangles", "masks": "boxes"}, {"align": 2, "resize": "student"}, {"dtypes": "fp32", "align": 2})
    needs += ({"masks": "boxes", "align": 2}, {"masks": "boxes", "resize": "student"}, {"dtypes": "fp32", "masks": "boxes"})
    usual = {name: values[0] for name, values in options.items()}
    for (one, values), (other, others) in itertools.combinations(options.items(), 2):
        for a, b in itertools.product(values, others):
            for need in needs:
                case = case_of(stage=stage, **{**usual, **{k: v for k, v in need.items() if k in usual}, one: a, other: b})
                if ((one, a), (other, b)) in pairs_of(case, options):
                    yield ((one, a), (other, b)), case
                    break


def covering(stage: int, options: dict[str, tuple[Any, ...]]) -> list[Case]:
    """Few cases in which every possible pair of values is."""
    random_ = random.Random(0)
    wanted = dict(possible(stage, options))
    chosen: list[Case] = []
    while wanted:
        drawn = [case_of(stage=stage, **{k: random_.choice(v) for k, v in options.items()}) for _ in range(30)]
        best = max([*drawn, next(iter(wanted.values()))], key=lambda case: len(wanted.keys() & pairs_of(case, options)))
        chosen.append(best)
        for pair in wanted.keys() & pairs_of(best, options):
            del wanted[pair]
    return chosen


def named(name: str, stages: Iterable[int] = (2, 1), **options: Any) -> dict[str, Case]:
    return {f"{stage}: {name}": case_of(stage=stage, **options) for stage in stages}


# What the pairs leave at its usual value: sizes, numbers of things, extreme values
SPECIAL: dict[str, Case] = {
    **named("one of everything", images=1, levels=((1, 1, 1),), tokens=1),
    **named("one row", images=3, levels=((5, 1, 7),), tokens=2, layouts="nlc"),
    **named("one column", levels=((70, 5, 1),), tokens=6, layouts="channels_last"),
    **named("odd sizes", images=1, levels=((13, 7, 11),), tokens=8),
    **named("32 tokens", levels=((16, 3, 3),), tokens=32),
    **named("17 tokens in half", levels=((16, 3, 3),), tokens=17, dtypes="bf16"),
    **named("no image", images=0, levels=((4, 3, 3), (2, 1, 1)), tokens=6, valid="rectangles"),
    **named("no image, cosine", (2,), images=0, distance="cosine", align=2),
    **named("sums of float64", levels=((33, 9, 7),)),
    **named("sums of float32", levels=((33, 9, 7),), dtypes="fp32"),
    **named("sums of float16", levels=((33, 9, 7),), dtypes="fp16"),
    **named("sums of bfloat16", levels=((33, 9, 7),), dtypes="bf16"),
    **named("untrained tokens", learned="untrained", dtypes="fp32"),
    **named("tokens of zeros", learned="zeros", dtypes="fp32"),
    **named("saturating tokens", learned="saturating", dtypes="fp32"),
    **named("masks of 1", learned="open", values="normal / ones", dtypes="fp16"),
    **named("masks of 0", learned="closed", values="normal / ones", dtypes="bf16"),
    **named("masks of 0 without eps", (2,), learned="closed", values="normal / ones", eps=0.0),
    **named("one mask of 0", learned="one closed", values="normal / ones", dtypes="fp16"),
    **named("features of zeros", values="zeros", dtypes="fp32"),
    **named("one infinite feature", values="inf", dtypes="bf16"),
    **named("one that is no number", values="nan", valid="rectangles"),
    **named("features far from zero", values="far from zero", dtypes="fp32", standardize="channel"),
    **named("huge features", values="huge", dtypes="fp32"),
    **named("tiny features", values="tiny", dtypes="fp16"),
    **named("equal features", (2,), values="equal / normal", dtypes="bf16"),
    **named("equal features, smooth_l1", (2,), values="equal / normal", dtypes="fp32", distance="smooth_l1"),
    **named("vectors of zeros, cosine", (2,), values="zeros / normal", dtypes="fp32", distance="cosine"),
    **named("zeros of both, cosine", (2,), values="zeros", dtypes="fp64", distance="cosine"),
    **{k: v for b in (1e-30, 1e-3, 1e3, 1e30) for k, v in named(f"beta {b}", (2,), distance="smooth_l1", beta=b).items()},
    **named("many channels", images=1, levels=((600, 1, 3),), tokens=2, weighted=False),
    **named("a pyramid", levels=((16, 4, 8), (16, 3, 5), (8, 1, 1), (24, 2, 4), (7, 3, 3), (8, 1, 16), (1, 5, 2))),
    **named("one level as a tensor", levels=((6, 4, 5),), container="tensor"),
    **named("not one valid pixel", valid="none", standardize="channel", rubbish="nan"),
    **named("every pixel valid", valid="all", standardize="channel"),
    **named("valid after resizing", (2,), valid="letterbox", resize="teacher", sizes=((5, 7), (2, 2)), rubbish="nan"),
}
