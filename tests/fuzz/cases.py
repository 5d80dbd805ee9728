"""What a case of the fuzzing is, and the strategy that draws one. A case is plain data: its repr is all that a report needs."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
LAYOUTS = (
    "nchw", "channels_last", "nlc", "batch_last", "offset", "channels of more", "columns of more", "every second channel",
    "rows and columns swapped", "expanded images", "expanded channels", "expanded pixels",
)  # fmt: skip
VALUES = ("normal", "zeros", "ones", "far from zero", "huge", "tiny", "images of all sizes", "inf", "nan")
CHANNELS = (3, 4, 1, 2, 5, 7, 8, 16, 17, 19, 31, 32, 33, 64, 70, 128, 257, 300, 512, 600)
TOKENS = (3, 1, 2, 6, 8, 9, 16, 17, 19, 32, 33, 64)
SIZES = ((3, 4), (1, 1), (1, 7), (5, 1), (2, 2), (3, 3), (7, 5), (1, 37), (41, 1), (8, 8), (11, 13), (9, 17), (16, 16))
MOST = 40_000  # elements of the literal formulas' [N, T, C, H, W]
MOST_INTERPRETED = 4_000


@dataclass(frozen=True)
class Maps:
    """Feature maps of all levels: how they lie in memory and what they hold."""

    dtype: str
    layout: str
    values: str


@dataclass(frozen=True)
class Case:
    """One call, forward and backward.

    Attributes:
        stage: 1 or 2.
        images, levels, tokens: N, ``(C, H, W)`` of every level, and T.
        teacher: in stage 1 the features.
        upstream: layout of the gradient from above; of the losses in stage 2, of the masked features in stage 1.
        learned: size of the tokens: "trained", "untrained" (0.01), "zeros", "saturating".
        valid: which pixels count; ``rubbish`` is what the others hold, a number.
        through: the module or the function.
        seed: of all values.
    """

    stage: int
    images: int
    levels: tuple[tuple[int, int, int], ...]
    tokens: int
    teacher: Maps
    upstream: str
    learned: str
    weighted: bool
    standard: bool
    valid: str
    rubbish: str
    through: str
    seed: int


@dataclass(frozen=True)
class Distillation(Case):
    """Stage 2.

    Attributes:
        student: its values may also be "equal" or "near" to the teacher's.
        masks: given ones: "" (none), "boxes" (0 and 1), "scores" (0 to 2), "expanded" (over the images).
        mask_weights: given ones.
        custom: "no", "from the start", "warm-up" (not yet) or "warmed up".
        student_channels: of an align, or 0.
        resize, sizes: which side is resized, and the student's sizes then.
    """

    student: Maps
    masks: str
    mask_weights: bool
    custom: str
    power: int
    distance: str
    beta: float
    eps: float
    loss_weight: float
    weight_as_tensor: bool
    reduction: str
    student_channels: int
    resize: str
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Learning(Case):
    """Stage 1.

    Attributes:
        inputs: the features' gradient is wanted, too.
        dice_scale: upstream gradient of the Dice losses.
    """

    inputs: bool
    dice_scale: float


def _flag(draw: Any, one_in: int = 2) -> bool:
    return draw(st.integers(0, one_in - 1)) == one_in - 1


def _often(draw: Any, usual: Any, others: tuple[Any, ...], one_in: int = 2) -> Any:
    return draw(st.sampled_from(others)) if _flag(draw, one_in) else usual


def _maps(draw: Any, dtypes: tuple[str, ...], values: tuple[str, ...] = VALUES) -> Maps:
    return Maps(draw(st.sampled_from(dtypes)), draw(st.sampled_from(LAYOUTS)), _often(draw, "normal", values))


@st.composite
def cases(draw: Any, most: int = MOST) -> Case:
    """Any case whose literal tensors have at most ``most`` elements."""
    stage = draw(st.sampled_from((2, 1)))
    images = _often(draw, 2, (1, 3, 0), 3)
    tokens = _often(draw, 3, TOKENS)
    levels = []
    for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
        room = max(most // (max(images, 1) * tokens), 1)
        c = draw(st.sampled_from([c for c in CHANNELS if c <= room]))
        levels.append((c, *draw(st.sampled_from([hw for hw in SIZES if c * hw[0] * hw[1] <= room] or [(1, 1)]))))
    precise = _flag(draw, 4)
    dtypes = ("fp64",) if precise else ("fp32", "fp16", "bf16")
    weighted = _flag(draw) and max(c for c, *_ in levels) <= 128
    valid = _often(draw, "", ("rectangles", "pixels", "all", "none"), 3)
    common: dict[str, Any] = {
        "stage": stage,
        "images": images,
        "levels": tuple(levels),
        "tokens": tokens,
        "teacher": _maps(draw, dtypes),
        "upstream": draw(st.sampled_from(("contiguous", "expanded", "strided", "zeros"))),
        "learned": _often(draw, "trained", ("untrained", "zeros", "saturating"), 3),
        "weighted": weighted,
        "standard": _flag(draw, 3),
        "valid": valid,
        "rubbish": draw(st.sampled_from(("0", "nan", "inf", "1e4"))) if valid else "0",
        "through": draw(st.sampled_from(("function", "module"))),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }
    if stage == 1:
        return Learning(**common, inputs=_flag(draw), dice_scale=draw(st.sampled_from((1.0, 3.0, 0.0))))
    masks = _often(draw, "", ("boxes", "scores", "expanded"), 4)
    module = common["through"] == "module"
    student = _maps(draw, dtypes, ("equal", "near", *VALUES))
    resize = _often(draw, "", ("student", "teacher"), 4) if module else ""
    narrow = draw(st.sampled_from((1, 4, 9))) if module and _flag(draw, 4) else 0
    distance = draw(st.sampled_from(("squared", "squared", "smooth_l1", "cosine")))
    drawn = Distillation(
        **common,
        student=student,
        masks=masks,
        mask_weights=_flag(draw, 2 if masks else 6),
        custom=draw(st.sampled_from(("no", "from the start", "warm-up", "warmed up"))),
        power=draw(st.sampled_from((2, 1))),
        distance=distance,
        beta=draw(st.sampled_from((1.0, 0.3, 7.0))),
        eps=draw(st.sampled_from((1e-12, 1e-5, 0.0, 1.0))),
        loss_weight=draw(st.sampled_from((1.0, 0.7, 0.0, 25.0))),
        weight_as_tensor=_flag(draw, 4),
        reduction=draw(st.sampled_from(("none", "sum"))),
        student_channels=narrow,
        resize=resize,
        sizes=tuple(draw(st.sampled_from(SIZES[:7])) for _ in levels) if resize else (),
    )
    return _sound(drawn)


def _sound(case: Distillation) -> Case:
    """The case without what is known to differ from the formulas or cannot be."""
    student = case.student
    if case.distance == "cosine" and student.values == "tiny":  # below a length of 1e-8 torch has another gradient
        student = replace(student, values="images of all sizes")
    if (case.resize or case.student_channels) and student.values in ("equal", "near"):
        student = replace(student, values="normal")
    without_tokens = bool(case.masks) and case.through == "module"  # and so without statistics
    return replace(case, student=student, standard=case.standard and not without_tokens)


@dataclass(frozen=True)
class Variant:
    """What kernels are compiled for.

    Attributes:
        stage: 1 or 2.
        dtypes: of the teacher and, in stage 2, the student.
        layouts: those with the same axis in front.
        options: fields of the case.
    """

    stage: int
    dtypes: tuple[str, str]
    layouts: tuple[str, ...]
    options: dict[str, Any]


@st.composite
def cases_of(draw: Any, variant: Variant) -> Case:
    """Any case that the kernels of ``variant`` run: two levels of odd sizes, so that no row is aligned."""
    case = draw(cases(300).filter(lambda case: case.stage == variant.stage))
    sizes = draw(st.sampled_from(((3, 3), (1, 7), (5, 3), (7, 5)))), draw(st.sampled_from(((1, 1), (3, 1), (5, 3))))
    levels = tuple((draw(st.sampled_from((3, 5, 7, 17))), *size) for size in sizes)
    changes: dict[str, Any] = {"images": max(case.images, 1), "levels": levels, **variant.options}
    for name, dtype in zip(("teacher", "student")[: variant.stage], variant.dtypes, strict=False):
        changes[name] = replace(getattr(case, name), dtype=dtype, layout=draw(st.sampled_from(variant.layouts)))
    case = replace(case, **changes)
    return _sound(case) if isinstance(case, Distillation) else case
