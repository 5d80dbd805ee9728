"""Masked distillation with receptive tokens (MasKD, ICLR 2023) for PyTorch, exact and fused in Triton.

- `MaskLearner`: stage 1, which learns the tokens of a frozen teacher; `MaskModule` is one level of it.
- `MaskedDistillLoss`: stage 2, the loss that a student is trained with.
- `FrozenTeacher`: holds a teacher in a student's module without becoming part of it.
- ``capture``: features of a model that does not return them.
- ``diagnostics``: what masks and losses look like, and a loss weight to start from.
- ``shapes``: features in other shapes, valid pixels, masks made of boxes.
- ``checkpoints``: tokens in files.
- ``viz``: pictures of masks.
- ``functional``: the formulas, without modules.
"""

from . import capture, checkpoints, diagnostics, functional, shapes, viz
from .losses import MaskedDistillLoss
from .masks import MaskLearner, MaskModule
from .teacher import FrozenTeacher

__all__ = [
    "FrozenTeacher",
    "MaskLearner",
    "MaskModule",
    "MaskedDistillLoss",
    "capture",
    "checkpoints",
    "diagnostics",
    "functional",
    "shapes",
    "viz",
]
__version__ = "0.2.0"
