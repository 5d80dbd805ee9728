"""The frozen tables of one level that stage 2 reads, composed once, in float64, from what stage 1 learned."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import _checks as check
from ._eager import acc_dtype
from ._options import Check, Options
from ._records import DistillTables
from ._torch import tracing
from .functional import compose_standardization, compose_weighting, mask_weights, receptive_masks

__all__ = ["LevelTables"]

CONVOLUTIONS = ("prob.0.weight", "prob.0.bias", "prob.2.weight", "prob.2.bias")


class Tables(NamedTuple):
    """One level's entries of a `DistillTables`; None without mask weights or standardisation."""

    tokens: Tensor
    pool_rows: Tensor | None = None
    pool_bias: Tensor | None = None
    teacher_tokens: Tensor | None = None
    token_bias: Tensor | None = None
    statistics: Tensor | None = None


def of_levels(levels: Sequence[Tables]) -> DistillTables:
    """The tables of all levels, field by field."""
    return DistillTables(*([x for x in field if x is not None] for field in zip(*levels, strict=True)))


def compose(level: Mapping[str, Tensor], dtype: torch.dtype) -> Tables:
    """The tables of one level's published entries (`MaskLevel.published_shapes`), composed in ``dtype``.

    Tokens are not composed with anything. Differentiable."""
    weighting = None
    if CONVOLUTIONS[0] in level:
        weighting = compose_weighting(*(level[name].to(dtype) for name in CONVOLUTIONS))
    if "channel_mean" not in level:
        return Tables(level["mask_token"], *(weighting or ()))
    token, mean, std = (level[name].to(dtype) for name in ("mask_token", "channel_mean", "channel_std"))
    standardization, weighting = compose_standardization(token, mean, std, weighting)
    rows, bias = weighting or (None, None)
    return Tables(level["mask_token"], rows, bias, *standardization)


COMPOSED = frozenset(("pool_rows", "pool_bias", "teacher_tokens", "token_bias", "statistics"))  # of LevelTables alone
PUBLISHED = frozenset((*CONVOLUTIONS, "channel_mean", "channel_std", "pixels_seen"))  # of MaskModule alone
ENTRIES = COMPOSED | PUBLISHED | {"mask_token"}
WEIGHTING = frozenset((*CONVOLUTIONS, "pool_rows", "pool_bias"))
STATISTICS = ENTRIES - WEIGHTING - {"mask_token"}


TOKEN_STD = 0.01  # a `MaskModule` draws its tokens from N(0, TOKEN_STD^2)


def as_small_as_drawn(tokens: Tensor) -> bool:
    """Whether the root mean square of tokens is at most that of fresh tokens: 4 of its deviations above `TOKEN_STD`."""
    return bool(tokens.float().square().mean().sqrt() <= TOKEN_STD * (1 + 4 / math.sqrt(2 * tokens.numel())))


def buffer_dtype() -> torch.dtype:
    """Dtype of new statistics and tables: the default dtype, but at least float32."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def is_narrow(x: Tensor) -> bool:
    """Whether ``x`` is of a float dtype below float32: such a table loses digits, and 1 / std may overflow."""
    return x.dtype.itemsize < 4 and x.is_floating_point()


def fault(name: str, x: Any, isotropic: bool = False) -> str:
    """Say what is wrong with the values of a level's entry, of `MaskModule` or `LevelTables`; "" where nothing is.

    ``isotropic``: whether deviations must be one scale for all channels."""
    if not isinstance(x, Tensor):
        return f"expected a tensor, got {type(x).__module__}.{type(x).__name__}; make tensors of arrays with torch.from_numpy"
    if x.is_meta:
        return "expected values, got a tensor on the meta device"
    if tracing():  # fake tensors have no values to look at
        return ""
    cast = name in ("channel_mean", "channel_std", "statistics") and is_narrow(x)
    hint = f"; {x.dtype} does not hold statistics: save them without a cast" if cast else ""
    if not torch.isfinite(x.float()).all():
        return f"expected finite values{hint}"
    if name == "pixels_seen" and not (x > 0).all():
        return f"expected a count above 0, got {x.tolist()}: no statistics yet; gather them with MaskLearner.calibrate"
    least = max(torch.finfo(dtype).tiny for dtype in (torch.float32, x.dtype) if dtype.is_floating_point)
    if name == "channel_std" and (x < least).any():
        return f"expected deviations of at least {least:.1e}{hint}"
    if name == "statistics" and x.dim() and (x[1:] < least).any():
        return f"expected 1 / deviations of at least {least:.1e} in its second row{hint}"
    scales = {"channel_std": x, "statistics": x[1:] if x.dim() else x}.get(name)
    if isotropic and scales is not None and (scales != scales.flatten()[:1]).any():
        return "expected one scale for all channels, got several: these are not standardize='isotropic'"
    return ""


class MaskLevel(Options):
    """What a level in training and a frozen one have in common: its options, and masks and weights of features.

    Its buffers, tables and statistics, never become narrower than float32, whatever the module is cast to."""

    mask_token: Tensor

    CHECKS: ClassVar[dict[str, Check]] = {
        "channels": check.positive_int,
        "num_tokens": check.num_tokens,
        "weight_mask": check.flag,
        "standardize": check.standardize,
    }
    FIXED = frozenset(CHECKS)

    def __init__(self, channels: int, num_tokens: int, weight_mask: bool, standardize: bool | str) -> None:
        super().__init__()
        self.channels = channels
        self.num_tokens = num_tokens
        self.weight_mask = weight_mask
        self.standardize = standardize

    def extra_repr(self) -> str:
        standardize = f", standardize={self.standardize!r}" if self.standardize else ""
        return f"{self.channels}, num_tokens={self.num_tokens}, weight_mask={self.weight_mask}{standardize}"

    def _apply(self, fn: Any, recurse: bool = True) -> "MaskLevel":
        """``half()``, ``to(torch.bfloat16)`` and the like move buffers, but do not narrow them."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and is_narrow(new) and not is_narrow(old):
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        """Values that no training gives are an error. With ``assign=True``, half-precision entries become buffers, too."""
        unready = {f"{prefix}pixels_seen"}  # a learner may go on before it has statistics
        if self.mask_token.is_meta:
            unready |= {key for key, x in state_dict.items() if isinstance(x, Tensor) and x.is_meta}
        if wrong := self.faults({key: x for key, x in state_dict.items() if key not in unready}, prefix):
            others[-1].extend(wrong)
            return
        super()._load_from_state_dict(state_dict, prefix, *others)
        for name, x in self._buffers.items():
            if x is not None and is_narrow(x):
                self._buffers[name] = x.float()

    def faults(self, state: Mapping[str, Any], prefix: str) -> list[str]:
        """A line for every entry of this level in a state dict that has a `fault`."""
        entries = {key: key.removeprefix(prefix) for key in state if key.removeprefix(prefix) in ENTRIES}
        found = {key: fault(name, state[key], self.standardize == "isotropic") for key, name in entries.items()}
        return [f"{key}: {what}" for key, what in found.items() if what]

    def __setattr__(self, name: str, value: Any) -> None:
        old = self.__dict__.get("_buffers", {}).get(name)
        if isinstance(old, Tensor) and isinstance(value, Tensor) and value.shape != old.shape:
            raise ValueError(f"{name}: expected shape {list(old.shape)}, got {list(value.shape)}")
        super().__setattr__(name, value)

    def check_buffers(self, device: torch.device | None = None) -> None:
        """TypeError where a wrapper has written half-precision numbers into the buffers; ValueError for buffers that require
        grad or are on another device than the features (None: any)."""
        for name, x in self._buffers.items():
            if x is None:
                continue
            if x.requires_grad:
                check.frozen(x, name)
            if device is not None and x.device != device:
                check.on_device(x, f"the criterion's {name}", device)
            if x.dtype is not torch.float32 and is_narrow(x):
                raise TypeError(
                    f"{type(self).__name__}.{name}: expected float32 or float64, got {x.dtype}: an assignment or a wrapper has "
                    "cast the buffers (as FSDP's MixedPrecision(buffer_dtype=...) does) and they have lost digits; pass "
                    "buffer_dtype=None or torch.float32, and load the tokens again"
                )

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
        tables = self.tables(acc_dtype(x.dtype))
        return receptive_masks(x, tables.tokens if tables.teacher_tokens is None else tables.teacher_tokens, tables.token_bias)

    def weights(self, x: Tensor) -> Tensor:
        """Softmax mask weights ``[N, T]``; ValueError with ``weight_mask=False``."""
        check.features(x, "x", self.channels)
        tables = self.tables(acc_dtype(x.dtype))
        if tables.pool_rows is None or tables.pool_bias is None:
            raise ValueError("weight_mask=False: this module has no mask weights")
        return mask_weights(x, tables.pool_rows, tables.pool_bias)


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

    Buffers, in the default dtype (at least float32), until they are loaded, for tokens of 0: ``mask_token [T, C]``
    (``E``, which the student's masks use); with mask weights ``pool_rows [9, T, C]`` and ``pool_bias [T]`` (``[5, T]`` with
    ``standardize``); with ``standardize`` also ``teacher_tokens [T, C]`` (``E'``), ``token_bias [T]`` and
    ``statistics [2, C]`` (mean, 1 / std).

    ``load_state_dict`` takes these, and the entries of a `MaskModule` (``mask_token``, ``prob.0.weight``, ...,
    ``channel_mean``, ...), which it composes in float64. All entries of a level or none: part of one is an error, and so are
    entries of other options, values that are not finite, and statistics that were never gathered or did not survive a cast.
    Neither a cast to half precision (``half()``, ``to(torch.bfloat16)``) nor half-precision entries make buffers narrower than
    float32.

    Raises:
        TypeError, ValueError: sizes that are not positive ints.
        TypeError: on use, if a wrapper has written half-precision numbers into the buffers.

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
                self.register_buffer(name, torch.zeros(shape, dtype=buffer_dtype()))
            if standardize:
                self.statistics[1].fill_(1)

    def tables(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tables:
        """The buffers as the operators take them.

        Args:
            dtype: ignored; `MaskModule.tables` needs it.
            device: of the features that they are for; None: any.

        Raises:
            ValueError: buffers on another device.
        """
        self.check_buffers(device)
        buffers: Any = self._buffers  # in every step; nn.Module's own way to an attribute takes longer
        return Tables(buffers["mask_token"], *map(buffers.get, Tables._fields[1:]))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
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
        extra = [name for name in level if name in ENTRIES and name not in expected]
        if extra:  # also where unexpected keys are allowed
            options = f"weight_mask={self.weight_mask}, standardize={self.standardize!r}"
            error_msgs.append(f"{prefix[:-1]}: expected no {', '.join(extra)} with {options}")
            return
        if missing:
            if len(missing) < len(expected):  # the tables of a level belong together
                error_msgs.append(f"{prefix[:-1]}: expected all entries of a level, got no {', '.join(missing)}")
            return
        if not composed:
            wrong = self.faults(state_dict, prefix) or [
                f"size mismatch for {prefix}{name}: expected {list(shape)}, got {list(level[name].shape)}"
                for name, shape in expected.items()
                if level[name].shape != shape
            ]
            if wrong:
                error_msgs += wrong
                return
            level = self._composed(
                {name: level[name] for name in expected}, bool(local_metadata.get("assign_to_params_buffers", False))
            )
        own = {prefix + name: level[name] for name in self._buffers}
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _composed(self, level: Mapping[str, Tensor], assign: bool) -> dict[str, Tensor]:
        """The buffers in float64 on the CPU; to be assigned, on the tokens' device and in their dtype (at least float32)."""
        with torch.inference_mode(False), torch.no_grad():  # in this order: the first turns gradients on
            tables = compose({name: x.to("cpu", torch.float64) for name, x in level.items()}, torch.float64)
            values = [x for x in tables if x is not None]
            if assign:
                like = level["mask_token"]
                values = [value.to(like.device, torch.promote_types(like.dtype, torch.float32)) for value in values]
            return {name: value.detach() for name, value in zip(self._buffers, values, strict=True)}
