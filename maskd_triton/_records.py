"""What an operator, its launcher and its eager twin hand to each other, as one object: a new option is a new field here."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


def _new(like: Tensor, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Makes tensors of the sizes it is called with; ``new_empty`` with a dtype takes half as long again."""
    return functools.partial(torch.empty, dtype=dtype, device=like.device)


class DistillTables(NamedTuple):
    """Tables that kernels of stage 2 read beside features: a tensor per level, or none where the loss does without.

    Attributes:
        tokens: ``[T, C]``, for the student.
        pool_rows, pool_bias: mask weighting, ``[9, T, C]`` and ``[T]`` or ``[5, T]``.
        teacher_tokens, token_bias, statistics: a ``Standardization``: ``[T, C]``, ``[T]`` and ``[2, C]``.
    """

    tokens: Tensors = ()
    pool_rows: Tensors = ()
    pool_bias: Tensors = ()
    teacher_tokens: Tensors = ()
    token_bias: Tensors = ()
    statistics: Tensors = ()


class LearnTables(NamedTuple):
    """The parameters of stage 1, of every level: ``[T, C]``, ``[T]``, ``[9, T, C]`` and ``[T]`` or ``[5, T]``."""

    tokens: Tensors = ()
    token_bias: Tensors = ()
    pool_rows: Tensors = ()
    pool_bias: Tensors = ()


class DistillOptions(NamedTuple):
    """Everything that stage 2 depends on, except the features.

    Attributes:
        tables: see there.
        valid: bytes ``[N, P_i]`` of every level, pixels that count; none: all.
        masks: ``[N, T, P_i]`` of every level in place of the tokens' masks; none: the tokens' masks.
        weights: ``[levels, N, T]`` in place of the weighting.
        customised: bool scalar on the features' device, whether masks follow the student in this call; None: they do.
        custom_mask: False: masks never follow the student.
        mask_power: power of the mask in front of the distance, 2 or 1.
        eps: added to mask areas.
        distance: of a pixel's features, ``"squared"``, ``"smooth_l1"`` or ``"cosine"``.
        beta: where ``"smooth_l1"`` turns from squares to absolute values.
    """

    tables: DistillTables
    valid: Tensors = ()
    masks: Tensors = ()
    weights: Tensor | None = None
    customised: Tensor | None = None
    custom_mask: bool = False
    mask_power: int = 2
    eps: float = 1e-12
    distance: str = "squared"
    beta: float = 1.0

    @property
    def num_tokens(self) -> int:
        return self.masks[0].shape[1] if self.masks else self.tables.tokens[0].shape[0]


class Distilled(NamedTuple):
    """The outputs of stage 2.

    Attributes:
        per_image: losses ``[levels, N]``, already divided by ``N``.
        weights: mask weights ``[levels, N, T]``, also uniform or given ones.
        coefficients: ``[levels, N, T]``: ``grad_student = grad slope sum_t coefficients m^mask_power``. The slope is ``s - t``
            (squared), ``clip((s - t) / beta, -1, 1)`` (smooth L1) or ``u s - v t`` (cosine).
        masks: ``[N, T, P_i]`` of every level, as the loss used them.
        cosines: ``u`` and ``v`` ``[N, 2, P_i]`` of every level; none for other distances.
    """

    per_image: Tensor
    weights: Tensor
    coefficients: Tensor
    masks: Tensors
    cosines: Tensors

    @classmethod
    def empty(cls, student: Tensors, options: DistillOptions, dtype: torch.dtype) -> "Distilled":
        """Not yet written, for ``student [N, C_i, H_i, W_i]``."""
        first, levels, t = student[0], len(student), options.num_tokens
        n = first.shape[0]
        pixels, new = [s.shape[2] * s.shape[3] for s in student], _new(first, dtype)
        return cls(
            *(new(levels, n), new(levels, n, t), new(levels, n, t)),
            [new(n, t, p) for p in pixels],
            [new(n, 2, p) for p in pixels] if options.distance == "cosine" else [],
        )

    def kept(self, options: DistillOptions) -> "DistillKept":
        """For the backward pass."""
        statistics, valid = options.tables.statistics, options.valid
        return DistillKept(
            *(self.coefficients, self.masks, self.cosines, statistics, valid),
            *(options.mask_power, options.distance, options.beta),
        )


class DistillKept(NamedTuple):
    """Everything that the gradient of stage 2 depends on, except the features; see `Distilled` and `DistillOptions`."""

    coefficients: Tensor
    masks: Tensors
    cosines: Tensors
    statistics: Tensors
    valid: Tensors
    mask_power: int
    distance: str
    beta: float


class Seen(NamedTuple):
    """Masks and weights of one level, without gradient, of which diagnostics are made.

    Attributes:
        masks: ``[N, T, H, W]``.
        weights: ``[N, T]``.
        valid: ``[N, H, W]``, non-zero where pixels count; None: all.
    """

    masks: Tensor
    weights: Tensor | None
    valid: Tensor | None


class Latest(NamedTuple):
    """What diagnostics need of the latest call of stage 2, without its features.

    Attributes:
        outputs: without gradient; the losses have their weight.
        shapes: of every level's features.
        keys: of the levels, where they are mappings.
        valid: bytes ``[N, P_i]`` of every level; none: all pixels count.
        weighted: there are mask weights; False: a mean over tokens.
    """

    outputs: Distilled
    shapes: Sequence[Any]
    keys: Sequence[Any] | None
    valid: Tensors
    weighted: bool

    def levels(self) -> dict[Any, Seen]:
        """By key, or by position in a sequence."""
        seen = {}
        for i, (n, _, h, w) in enumerate(self.shapes):
            weights = self.outputs.weights[i]
            total = weights.sum(1, keepdim=True)  # given weights need not sum to 1
            seen[self.keys[i] if self.keys else i] = Seen(
                self.outputs.masks[i].unflatten(2, (h, w)),
                weights / total.where(total > 0, 1) if self.weighted else None,
                self.valid[i].view(n, h, w) if self.valid else None,
            )
        return seen


class LearnOptions(NamedTuple):
    """Everything that stage 1 depends on, except the features.

    Attributes:
        tables: see there.
        weights: mask weights ``[N, T]`` of every level in place of the weighting; none: no given ones.
        valid: bytes ``[N, P_i]`` of every level, pixels that count; none: all.
        heights: of every level.
    """

    tables: LearnTables
    weights: Tensors
    valid: Tensors
    heights: Sequence[int]


class LearnKept(NamedTuple):
    """Tensors that stage 1 keeps for its backward pass and for diagnostics.

    Attributes:
        weights: mask weights ``[levels, N, T]``.
        grams: products of masks ``[levels, N, T, T]``, of which the Dice losses are made.
        masks: ``[N, T, P_i]`` of every level.
        sums: strip sums ``[N, 9, C_i]`` of every level with weighting.
    """

    weights: Tensor
    grams: Tensor
    masks: Tensors
    sums: Tensors

    @classmethod
    def empty(cls, features: Tensors, tables: LearnTables, dtype: torch.dtype) -> "LearnKept":
        """Not yet written, for ``features [N, C_i, P_i]``."""
        first, levels, t = features[0], len(features), tables.tokens[0].shape[0]
        n, new = first.shape[0], _new(first, dtype)
        return cls(
            *(new(levels, n, t), new(levels, n, t, t)),
            [new(n, t, x.shape[2]) for x in features],
            [new(n, 9, x.shape[1]) for x in features if tables.pool_rows],
        )
