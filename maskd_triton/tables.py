"""The frozen tables of one level that stage 2 reads, composed once, in float64, from what stage 1 learned."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import _checks as check
from ._eager import acc_dtype
from .functional import Standardization, compose_standardization, compose_weighting, mask_weights, receptive_masks

__all__ = ["LevelTables"]

CONVOLUTIONS = ("prob.0.weight", "prob.0.bias", "prob.2.weight", "prob.2.bias")


class Tables(NamedTuple):
    """One level as the operators take it.

    Attributes:
        tokens: ``[T, C]``.
        weighting: ``rows [9, T, C]`` and ``bias [T]`` or ``[5, T]``; None without mask weights.
        standardization: None for raw features.
    """

    tokens: Tensor
    weighting: tuple[Tensor, Tensor] | None
    standardization: Standardization | None


def compose(level: Mapping[str, Tensor], dtype: torch.dtype) -> Tables:
    """The tables of one level's published entries (`MaskLevel.published_shapes`), composed in ``dtype``.

    Tokens, which nothing is composed of, stay as they are. Differentiable."""
    weighting = None
    if CONVOLUTIONS[0] in level:
        weighting = compose_weighting(*(level[name].to(dtype) for name in CONVOLUTIONS))
    if "channel_mean" not in level:
        return Tables(level["mask_token"], weighting, None)
    token, mean, std = (level[name].to(dtype) for name in ("mask_token", "channel_mean", "channel_std"))
    standardization, weighting = compose_standardization(token, mean, std, weighting)
    return Tables(level["mask_token"], weighting, standardization)


COMPOSED = frozenset(("pool_rows", "pool_bias", "teacher_tokens", "token_bias", "statistics"))  # of LevelTables alone
PUBLISHED = frozenset((*CONVOLUTIONS, "channel_mean", "channel_std", "pixels_seen"))  # of MaskModule alone


class MaskLevel(nn.Module):
    """What a level in training and a frozen one have in common: its options, and masks and weights of features."""

    def __init__(self, channels: int, num_tokens: int, weight_mask: bool, standardize: bool | str) -> None:
        super().__init__()
        self.channels = check.positive_int(channels, "channels")
        self.num_tokens = check.positive_int(num_tokens, "num_tokens")
        self.weight_mask = check.flag(weight_mask, "weight_mask")
        self.standardize = check.standardize(standardize)

    def extra_repr(self) -> str:
        standardize = f", standardize={self.standardize!r}" if self.standardize else ""
        return f"{self.channels}, num_tokens={self.num_tokens}, weight_mask={self.weight_mask}{standardize}"

    def tables(self, dtype: torch.dtype) -> Tables:
        """What the operators take; what must be composed for it is composed in ``dtype``."""
        raise NotImplementedError

    def published_shapes(self) -> dict[str, tuple[int, ...]]:
        """The entries of a level as `MaskModule` and the official implementation name them."""
        t, c = self.num_tokens, self.channels
        shapes: dict[str, tuple[int, ...]] = {"mask_token": (t, c)}
        if self.weight_mask:
            shapes |= dict(zip(CONVOLUTIONS, ((c, c, 3, 3), (c,), (t, c, 1, 1), (t,)), strict=True))
        if self.standardize:
            shapes |= {"channel_mean": (c,), "channel_std": (c,), "pixels_seen": ()}
        return shapes

    def table_shapes(self) -> dict[str, tuple[int, ...]]:
        """The entries of a `LevelTables`."""
        t, c = self.num_tokens, self.channels
        shapes: dict[str, tuple[int, ...]] = {"mask_token": (t, c)}
        if self.weight_mask:
            shapes |= {"pool_rows": (9, t, c), "pool_bias": (5, t) if self.standardize else (t,)}
        if self.standardize:
            shapes |= {"teacher_tokens": (t, c), "token_bias": (t,), "statistics": (2, c)}
        return shapes

    def masks(self, x: Tensor) -> Tensor:
        """``sigmoid(E x)`` of the teacher's features ``[N, C, H, W]``: ``[N, T, H, W]``."""
        check.features(x, "x", self.channels)
        tokens, _, standard = self.tables(acc_dtype(x.dtype))
        if standard is None:
            return receptive_masks(x, tokens)
        return receptive_masks(x, standard.tokens, standard.token_bias)

    def weights(self, x: Tensor) -> Tensor:
        """Softmax mask weights ``[N, T]``; ValueError with ``weight_mask=False``."""
        check.features(x, "x", self.channels)
        weighting = self.tables(acc_dtype(x.dtype)).weighting
        if weighting is None:
            raise ValueError("weight_mask=False: this module has no mask weights")
        return mask_weights(x, *weighting)


def of_shapes(entries: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """``entries``; ValueError unless they have these shapes: kernels would read past their ends."""
    for name, x in entries.items():
        if tuple(x.shape) != shapes[name]:
            raise ValueError(f"{name}: expected shape {list(shapes[name])}, got {list(x.shape)}")
    return entries


Level = TypeVar("Level", bound=MaskLevel)


def fitting(
    levels: Sequence[Any],
    kind: type[Level],
    channels: Sequence[int],
    num_tokens: int,
    weight_mask: bool,
    standardize: bool | str,
) -> list[Level]:
    """``levels``; TypeError or ValueError unless each is of ``kind`` and as it was made: a user may have put in others."""
    like = num_tokens, weight_mask, bool(standardize)
    for i, (level, c) in enumerate(zip(levels, channels, strict=True)):
        if not isinstance(level, kind):
            expected = "LevelTables (or MaskModule)" if kind is MaskLevel else f"a {kind.__name__}"
            raise TypeError(f"mask_modules[{i}]: expected {expected}, got {type(level).__name__}")
        if level.channels != c or (level.num_tokens, level.weight_mask, bool(level.standardize)) != like:
            own = MaskLevel(c, num_tokens, weight_mask, standardize)
            raise ValueError(f"mask_modules[{i}]: expected one of {own.extra_repr()}, got {level.extra_repr()}")
    return levels  # type: ignore[return-value]


class LevelTables(MaskLevel):
    r"""The tables of one level in a `MaskedDistillLoss`: frozen buffers, exactly what its kernels read.

    $$
    m = \sigma(E' x + b), \quad w = \mathrm{softmax}_t\big(\tfrac{1}{HW} \textstyle\sum_s R_s S_s(x) + c\big)
    $$

    with the nine sums ``S_s`` of ``x`` (`functional.compose_weighting`).

    Args:
        channels: C, channels of the teacher's features.
        num_tokens: T.
        weight_mask: whether there are mask weights.
        standardize: ``"channel"`` (or True) or ``"isotropic"`` for tables of standardised features.

    Buffers, in the default dtype: ``mask_token [T, C]`` (``E``, which the student's masks use); with mask weights ``pool_rows
    [9, T, C]`` and ``pool_bias [T]`` (``[5, T]`` with ``standardize``); with ``standardize`` also ``teacher_tokens [T, C]``
    (``E'``), ``token_bias [T]`` and ``statistics [2, C]`` (mean and 1 / std). Zeros until they are loaded.

    ``load_state_dict`` takes these, and the entries of a `MaskModule` (``mask_token``, ``prob.0.weight``, ...,
    ``channel_mean``, ...), which it composes in float64. All entries of a level or none: part of one is an error.

    Raises:
        TypeError, ValueError: sizes that are not positive ints.

    Examples:
        >>> import torch
        >>> from maskd_triton import MaskModule
        >>> from maskd_triton.tables import LevelTables
        >>> learned, tables = MaskModule(16, num_tokens=6), LevelTables(16, num_tokens=6)
        >>> tables.load_state_dict(learned.state_dict())
        <All keys matched successfully>
        >>> x = torch.randn(2, 16, 8, 8)
        >>> torch.allclose(tables.masks(x), learned.masks(x)), tables.weights(x).shape
        (True, torch.Size([2, 6]))
    """

    mask_token: Tensor
    pool_rows: Tensor
    pool_bias: Tensor
    teacher_tokens: Tensor
    token_bias: Tensor
    statistics: Tensor

    def __init__(self, channels: int, num_tokens: int = 6, weight_mask: bool = True, standardize: bool | str = False) -> None:
        super().__init__(channels, num_tokens, weight_mask, standardize)
        with torch.inference_mode(False):  # whatever mode they are made in, a backward pass may need them
            for name, shape in self.table_shapes().items():
                self.register_buffer(name, torch.zeros(shape))

    def tables(self, dtype: torch.dtype | None = None) -> Tables:
        """The buffers as the operators take them.

        Args:
            dtype: ignored; `MaskModule.tables`, which has the same arguments, needs it.
        """
        try:
            return self._tables(self._buffers)  # in every step; nn.Module's own way to an attribute takes 0.4 us
        except KeyError:  # a parametrisation, a parameter in its place
            shapes = self.table_shapes()
            return self._tables(of_shapes({name: getattr(self, name) for name in shapes}, shapes))

    def __setattr__(self, name: str, value: Any) -> None:
        """Tables keep their shapes."""
        if isinstance(value, Tensor) and name in self.__dict__.get("_buffers", ()):
            of_shapes({name: value}, self.table_shapes())
        super().__setattr__(name, value)

    def _tables(self, of: Mapping[str, Any]) -> Tables:
        return Tables(
            of["mask_token"],
            (of["pool_rows"], of["pool_bias"]) if self.weight_mask else None,
            Standardization(of["teacher_tokens"], of["token_bias"], of["statistics"]) if self.standardize else None,
        )

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        level = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        composed = not level or bool(COMPOSED & level.keys())
        expected = self.table_shapes() if composed else self.published_shapes()
        missing = [name for name in expected if name not in level]
        if strict:
            missing_keys += [prefix + name for name in missing]
            unexpected_keys += [prefix + name for name in level if name not in expected]
        if missing:
            if len(missing) < len(expected):  # the tables of a level belong together
                error_msgs.append(f"{prefix[:-1]}: expected all entries of a level, got no {', '.join(missing)}")
            return
        if not composed:
            wrong = [n for n, shape in expected.items() if level[n].shape != shape or level[n].is_meta]
            if wrong:
                error_msgs += [
                    f"size mismatch for {prefix}{name}: expected {list(expected[name])}, "
                    f"got {list(level[name].shape)}{' on meta' * level[name].is_meta}"
                    for name in wrong
                ]
                return
            level = self._composed(
                {name: level[name] for name in expected}, bool(local_metadata.get("assign_to_params_buffers", False))
            )
        own = {prefix + name: level[name].detach() for name in self._buffers}
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _composed(self, level: Mapping[str, Tensor], assign: bool) -> dict[str, Tensor]:
        """The buffers in float64 on the CPU, or, to be assigned, in dtype and on the device of the tokens they are made of."""
        with torch.inference_mode(False), torch.no_grad():  # in this order: the first turns gradients on
            full = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in level.items()}  # of DTensors
            like = full["mask_token"]
            tables = compose({name: x.to("cpu", torch.float64) for name, x in full.items()}, torch.float64)
            values = [tables.tokens, *(tables.weighting or ()), *(tables.standardization or ())]
            if assign:
                values = [value.to(like.device, like.dtype) for value in values]
            return dict(zip(self._buffers, values, strict=True))
