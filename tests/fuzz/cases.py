"""The strategy that draws a case over all options, and which field of a case draws which of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from maskd_triton import MaskedDistillLoss, MaskLearner, MaskModule
from maskd_triton import functional as F
from tests.cases import LAYOUTS, MOST, SIZES, STAGE_1, STAGE_2, VALUES, Case, Maps, sound

CHANNELS = (3, 4, 1, 2, 5, 7, 8, 16, 17, 19, 31, 32, 33, 64, 70, 128, 257, 300, 512, 600)
TOKENS = (3, 3, 3, 3, 1, 2, 6, 8, 9, 16, 17, 19, 31, 32)


def _often(*values: Any, times: int = 3) -> tuple[Any, ...]:
    """The first, usual one ``times`` as often as all others together."""
    return values[:1] * (times * (len(values) - 1)) + values[1:]


# Of every field what it may be, whatever the stage; `tests.cases.sound` takes out what does not go together.
DRAWN: dict[str, tuple[Any, ...]] = {
    "stage": (2, 2, 1),
    "through": STAGE_2["through"],
    "images": (2, 2, 2, 2, 1, 3, 0),
    "tokens": TOKENS,
    "container": STAGE_2["container"],
    "upstream": STAGE_1["upstream"],
    "learned": _often("trained", "untrained", "zeros", "saturating"),
    "weighted": STAGE_2["weighted"],
    "standardize": ("", "", "channel", "isotropic"),
    "valid": ("", "", *STAGE_2["valid"], "all", "none"),
    "rubbish": ("0", "nan", "inf", "1e4"),
    "seed": (),
    "pretrained": ("learner", "state dict"),
    "masks": _often(*STAGE_2["masks"], times=1),
    "tokenless": STAGE_2["tokenless"],
    "mask_weights": (False, False, True),
    "custom": STAGE_2["custom"],
    "advance": (True, False),
    "power": STAGE_2["power"],
    "distance": _often(*STAGE_2["distance"], times=1),
    "beta": (1.0, 0.3, 7.0),
    "eps": (1e-12, 1e-5, 0.0, 1.0),
    "loss_weight": (1.0, 0.7, 0.0, 25.0),
    "weight_as": STAGE_2["weight_as"],
    "reduction": STAGE_2["reduction"],
    "align": (0, 0, 0, 1, 4, 9),
    "own_align": STAGE_2["own_align"],
    "resize": _often(*STAGE_2["resize"], times=1),
    "cast": _often(*STAGE_2["cast"], times=2),
    "inputs": STAGE_1["inputs"],
    "dice_scale": (1.0, 3.0, 0.0),
}
BY_HAND = ("levels", "sizes", "teacher", "student")  # drawn to fit each other

# What draws an argument. "tester": who runs a case says so. A new argument that is not here fails a test.
_FEATURES = {"student": "student", "teacher": "teacher", "valid": "valid", "masks": "masks", "mask_weights": "mask_weights"}
_DISTANCE = {"mask_power": "power", "distance": "distance", "beta": "beta", "eps": "eps", "impl": "tester"}
_LEARNED = {"num_tokens": "tokens", "weight_mask": "weighted", "standardize": "standardize", "pretrained": "pretrained"}
ARGUMENTS: dict[Callable[..., Any], dict[str, str]] = {
    MaskedDistillLoss: {
        **_LEARNED, **_DISTANCE, "channels": "levels", "student_channels": "align", "align": "own_align",
        "custom_mask": "custom", "custom_mask_warmup": "custom", "loss_weight": "loss_weight", "resize": "resize",
    },
    MaskedDistillLoss.forward: {**_FEATURES, "advance": "advance", "reduction": "reduction"},
    F.masked_distill_loss: {
        **_FEATURES, **_DISTANCE, "tokens": "tokens", "weighting": "weighted", "standardize": "standardize",
        "custom_mask": "custom", "warmup_step": "custom", "custom_mask_warmup": "custom", "loss_weight": "loss_weight",
        "reduction": "reduction",
    },
    MaskLearner: {**_LEARNED, "channels": "levels", "impl": "tester"},
    MaskLearner.forward: {"features": "teacher", "valid": "valid"},
    F.masked_features_and_dice: {
        "features": "teacher", "tokens": "tokens", "weighting": "weighted", "token_bias": "standardize", "valid": "valid",
        "impl": "tester",
    },
    F.receptive_masks: {"x": "teacher", "tokens": "tokens", "token_bias": "standardize"},
    F.mask_weights: {"x": "teacher", "rows": "weighted", "bias": "weighted"},
    F.dice_loss: {"masks": "teacher"},
    F.compose_weighting: {"w3": "weighted", "b3": "weighted", "w1": "weighted", "b1": "weighted"},
    F.compose_standardization: {"tokens": "tokens", "mean": "standardize", "std": "standardize", "weighting": "weighted"},
    MaskModule.masks: {"x": "teacher"},
    MaskModule.weights: {"x": "teacher"},
}  # fmt: skip


@st.composite
def cases(draw: Any, most: int = MOST) -> Case:
    """Any case whose literal tensors have at most ``most`` elements."""
    fields = {name: draw(st.sampled_from(values)) for name, values in DRAWN.items() if values}
    room = max(most // (max(fields["images"], 1) * fields["tokens"]), 1)
    channels = [c for c in CHANNELS if c <= room and (c <= 128 or not fields["weighted"])]
    levels, sizes = [], []
    for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
        c = draw(st.sampled_from(channels))
        levels.append((c, *draw(st.sampled_from([hw for hw in SIZES if c * hw[0] * hw[1] <= room] or [(1, 1)]))))
        sizes.append(draw(st.sampled_from(SIZES[:7])))
    dtypes = ("fp64",) if draw(st.sampled_from((False, False, False, True))) else ("fp32", "fp16", "bf16")
    teacher, student = (_maps(draw, dtypes, values) for values in (VALUES, ("equal", "near", *VALUES)))
    seed = draw(st.integers(0, 2**32 - 1))
    return sound(Case(**fields, levels=tuple(levels), sizes=tuple(sizes), teacher=teacher, student=student, seed=seed))


def _maps(draw: Any, dtypes: tuple[str, ...], values: tuple[str, ...]) -> Maps:
    usual = draw(st.sampled_from((True, True, False)))
    held = "normal" if usual else draw(st.sampled_from(values))
    return Maps(draw(st.sampled_from(dtypes)), draw(st.sampled_from(LAYOUTS)), held)


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
    case = draw(cases(300))
    sizes = draw(st.sampled_from(((3, 3), (1, 7), (5, 3), (7, 5)))), draw(st.sampled_from(((1, 1), (3, 1), (5, 3))))
    levels = tuple((draw(st.sampled_from((3, 5, 7, 17))), *size) for size in sizes)
    changes: dict[str, Any] = {"stage": variant.stage, "images": max(case.images, 1), "levels": levels, **variant.options}
    for name, dtype in zip(("teacher", "student")[: variant.stage], variant.dtypes, strict=False):
        changes[name] = replace(getattr(case, name), dtype=dtype, layout=draw(st.sampled_from(variant.layouts)))
    return sound(replace(case, **changes))
