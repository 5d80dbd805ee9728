"""Masked distillation with receptive tokens (MasKD, ICLR 2023) for PyTorch, exact and fused in Triton."""

from . import functional
from .losses import MaskedDistillLoss
from .masks import MaskLearner, MaskModule
from .teacher import FrozenTeacher

__all__ = ["FrozenTeacher", "MaskLearner", "MaskModule", "MaskedDistillLoss", "functional"]
__version__ = "0.2.0"
