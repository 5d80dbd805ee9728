"""Features as lists of levels: one tensor, a sequence matched by position, or a mapping matched by key."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import _checks as check
from .shapes import valid_pixels

X = TypeVar("X")
Levels = Tensor | Sequence[Tensor] | Mapping[Any, Tensor]
FIELD = "feature_maps"  # where transformers' backbones keep their levels


def per_level(value: Any, name: str, levels: int | None = None) -> list[int]:
    """``value`` as one positive int per level; an int is repeated ``levels`` times (None: it means one level)."""
    value = check.listed(value)
    if (single := check.integer(value)) is not None:
        values: list[int | None] = [single] * (levels or 1)
    elif isinstance(value, Sequence):
        values = [check.integer(v) for v in value]
    else:
        raise TypeError(f"{name}: expected a positive int or one per level, got {value!r}")
    found = [v for v in values if v is not None and v >= 1]
    if not values or len(found) < len(values):
        raise ValueError(f"{name}: expected a positive int or one per level, got {value!r}")
    if levels is not None and len(found) != levels:
        raise ValueError(f"{name}: expected one value for each of the {levels} levels, got {len(found)}: {value!r}")
    return found


def named(channels: Any) -> tuple[list[int], list[Any] | None]:
    """``channels=`` as one int per level, and the names of the levels, if it is a mapping."""
    if not isinstance(channels, Mapping):
        return per_level(channels, "channels"), None
    taken = nn.ModuleDict()
    for name in channels:
        text = str(name)
        if isinstance(name, bool) or not isinstance(name, str | int) or not text or "." in text or hasattr(taken, text):
            raise ValueError(
                f"channels: {name!r} cannot name a level: expected an int, or a str without '.' that is no attribute of "
                "nn.ModuleDict"
            )
    if len({str(name) for name in channels}) < len(channels):
        raise ValueError(f"channels: expected names that differ as strings, got {list(channels)}")
    return per_level(list(channels.values()), "channels"), list(channels)


def in_order(value: X | Mapping[Any, Any], name: str, names: Sequence[Any] | None, of: str = "channels") -> X:
    """A mapping by level as a list in the order of ``names``, which those of ``of`` are; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    if names is None:
        raise TypeError(f"{name}: a mapping by level, but {of} is none, so levels have no names")
    if set(value) != set(names):
        raise ValueError(f"{name}: expected the levels {list(names)}, got {list(value)}")
    return [value[key] for key in names]  # type: ignore[return-value]


def container(modules: Sequence[nn.Module], names: Sequence[Any] | None) -> nn.ModuleList | nn.ModuleDict:
    """One module per level, by name if the levels have names."""
    return nn.ModuleList(modules) if names is None else nn.ModuleDict(dict(zip(map(str, names), modules, strict=True)))


def members(modules: nn.Module, name: str, names: Sequence[Any] | None, levels: int) -> list[Any]:
    """The modules in a `container`, by name where levels have names; ValueError unless there is one for each level."""
    held = modules._modules
    found = list(held.values()) if names is None else [held[str(key)] for key in names if str(key) in held]
    if len(found) != levels or len(held) != levels:
        expected = f"{levels} levels" if names is None else f"levels {names}"
        raise ValueError(f"{name}: expected one module for each of the {expected}, got {list(held)}")
    return found


def usual(keys: Iterable[Any], order: Sequence[Any] | None) -> list[Any]:
    """``keys`` in the ``order`` in which the same ones came before; as they are, if those were others."""
    found = list(keys)
    return found if order is None or found == order or set(found) != set(order) else list(order)


def as_list(features: Levels, name: str, keys: Sequence[Any] | None = None) -> tuple[list[Tensor], list[Any] | None]:
    """The tensors of ``features`` and, for a mapping, their keys; ``keys`` gives the order a mapping must follow."""
    if isinstance(features, list | tuple):
        if check.are_plain(features):  # as usual; all other questions take longer
            return list(features), None
    else:
        features = tensor_of(maps_in(features))
    if isinstance(features, Tensor):
        return [features], None
    if isinstance(features, Mapping):
        order = list(features) if keys is None else list(keys)
        if set(order) != set(features):
            raise ValueError(f"{name}: expected the levels {order}, got {list(features)}")
        tensors, found = [tensor_of(features[k]) for k in order], order
    elif isinstance(features, Sequence) and not isinstance(features, str):
        tensors, found = [x if isinstance(x, Tensor) else tensor_of(x) for x in features], None
    else:
        raise TypeError(f"{name}: expected a tensor, or a sequence or mapping of tensors, got {type(features).__name__}")
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}{labels(len(tensors), found)[i]}: expected a tensor, got {type(x).__name__}")
    return tensors, found


def is_record(result: Any) -> bool:
    """Whether it is a dataclass, as model outputs of transformers are."""
    return dataclasses.is_dataclass(result) and not isinstance(result, type)


def maps_in(features: Any) -> Any:
    """The levels of a transformers backbone's output; anything else as it is."""
    return getattr(features, FIELD, features) if is_record(features) else features


def tensor_of(x: Any) -> Any:
    """The tensor in a NestedTensor (DETR), torchvision's ImageList (``.tensors``) or detectron2's (``.tensor``); else ``x``."""
    name = _tensor_in(x)
    return x if name is None else getattr(x, name)


def _tensor_in(x: Any) -> str | None:
    if isinstance(x, Tensor | Mapping | Sequence):
        return None
    return next((name for name in ("tensors", "tensor") if isinstance(getattr(x, name, None), Tensor)), None)


def like(features: Levels, tensors: Sequence[Tensor], keys: Sequence[Any] | None) -> Levels:
    """``tensors`` in the container of ``features``, of which each may be wrapped; a mapping's are those of ``keys``."""
    if (maps := maps_in(features)) is not features:
        output: Any = copy.copy(features)
        setattr(output, FIELD, like(maps, tensors, keys))
        return output
    if isinstance(features, Mapping):
        return mapping_like(
            features, {key: _wrapped_like(features[key], x) for key, x in zip(keys or (), tensors, strict=True)}
        )
    if isinstance(features, Sequence):
        return sequence_like(features, [_wrapped_like(old, x) for old, x in zip(features, tensors, strict=True)])
    return _wrapped_like(features, tensors[0])


def sequence_like(like: Any, items: list[Any]) -> Any:
    """A copy of the list, tuple, named tuple or other sequence with ``items`` in it; whatever its constructor takes."""
    if hasattr(like, "_make"):
        return like._make(items)
    if type(like) in (list, tuple) or hasattr(like, "n_sequence_fields"):  # those of torch.return_types
        return type(like)(items)
    if isinstance(like, tuple):
        changed: Any = tuple.__new__(type(like), items)
        changed.__dict__.update(getattr(like, "__dict__", {}))
        return changed
    changed = copy.copy(like)
    for i, item in enumerate(items):
        changed[i] = item
    return changed


def mapping_like(like: Any, changes: Mapping[Any, Any]) -> Any:
    """A copy of the mapping with ``changes`` in it."""
    if not isinstance(like, MutableMapping):
        return type(like)({**like, **changes})
    changed: Any = copy.copy(like)
    for key, value in changes.items():
        changed[key] = value
    return changed


def _wrapped_like(old: Any, x: Tensor) -> Any:
    name = _tensor_in(old)
    if name is None:
        return x
    wrapped = copy.copy(old)
    setattr(wrapped, name, x)
    return wrapped


class Matched(NamedTuple):
    """Student and teacher levels side by side.

    Attributes:
        students, teachers: tensors of every level.
        keys: names of the levels, if they have any.
        by_key: what else is given by level must be a mapping; False: or a sequence, if the levels have an order.
    """

    students: list[Tensor]
    teachers: list[Tensor]
    keys: list[Any] | None
    by_key: bool

    @property
    def labels(self) -> list[str]:
        """Which level it is in an error, like ``"[0]"`` or ``"['p3']"``."""
        return labels(len(self.teachers), self.keys)


def match(student: Levels, teacher: Levels, names: Sequence[Any] | None = None, order: Sequence[Any] | None = None) -> Matched:
    """TypeError or ValueError unless both have the same levels.

    Levels come in the order of their ``names``; each may then be a mapping or a sequence. Without names both or neither are
    mappings, whose order is the teacher's, or the ``order`` of an earlier call.
    """
    student, teacher = maps_in(student), maps_in(teacher)
    expected = usual(teacher, order) if names is None and isinstance(teacher, Mapping) else names
    teachers, keys = as_list(teacher, "teacher", expected)
    if names is not None:
        keys = list(names)
    elif isinstance(student, Mapping) != (keys is not None):
        raise TypeError(
            "student and teacher: expected both or neither to be a mapping of levels, "
            f"got {type(student).__name__} and {type(teacher).__name__}"
        )
    students, _ = as_list(student, "student", keys)
    if len(students) != len(teachers):
        raise ValueError(f"student and teacher: expected as many levels in both, got {len(students)} and {len(teachers)}")
    return Matched(students, teachers, keys, keys is not None and names is None)


def labels(levels: int, keys: Sequence[Any] | None) -> list[str]:
    """How to name each level in an error: its key in a mapping, its position otherwise."""
    return [f"[{key!r}]" for key in (keys or range(levels))]


def valid_of_levels(valid: Any, levels: Sequence[Tensor], name: str = "valid") -> list[Tensor]:
    """Bytes ``[N, P]`` of every level ``[N, C, H, W]``, 1 where its pixel stands for valid ones; none for ``valid=None``.

    ``valid``: bool or integer ``[N, H0, W0]``, an ImageList (torchvision's or detectron2's: ``image_sizes``), or a DETR's
    NestedTensor, whose ``mask`` is True on padding. A level's pixel is valid if
    the first of the pixels that it stands for is (nearest neighbour, as in transformers' detectors).
    """
    if valid is None:
        return []
    if hasattr(valid, "image_sizes") and _tensor_in(valid):
        valid = valid_pixels(valid.image_sizes, tensor_of(valid).shape[-2:], levels[0].device)
    elif hasattr(valid, "mask") and _tensor_in(valid):
        if valid.mask is None:
            return []
        valid = valid.mask == 0
    check.valid(valid, name, levels[0].shape[0], levels[0].device)
    bytes_ = (valid != 0).to(torch.uint8)[:, None]
    return [torch.nn.functional.interpolate(bytes_, x.shape[2:], mode="nearest").flatten(1) for x in levels]


def pixels_in(result: Any) -> Any:
    """What says which pixels are valid in the output of a module that pads: the first such part of a tuple, or itself."""

    def tells(x: Any) -> bool:
        if isinstance(x, Tensor):
            return x.dim() == 3 and not x.is_floating_point()
        return _tensor_in(x) is not None and (hasattr(x, "image_sizes") or hasattr(x, "mask"))

    return next(filter(tells, result), result) if isinstance(result, tuple | list) else result


def without_padding(levels: Sequence[Tensor], valid: Any) -> list[Tensor]:
    """``levels`` with 0 where pixels do not count: layers that mix pixels, or have gradients of their own, would keep a NaN."""
    counted = valid_of_levels(valid, levels)
    return [x.masked_fill((v == 0).view(len(x), 1, *x.shape[2:]), 0) for x, v in zip(levels, counted, strict=True)]


def entries(value: Sequence[X] | Mapping[Any, X] | None, name: str, levels: Matched) -> Sequence[X] | None:
    """Parameters given by level, one for each: a sequence in the order of the teacher, or a mapping with its keys."""
    found: Any = in_order(value, name, levels.keys, "student")
    check.per_level(found, name, len(levels.teachers))
    return found


def maps_of_levels(masks: Levels, levels: Matched, name: str = "masks") -> list[Tensor]:
    """Given masks as contiguous ``[N, T, P]``, matched with the teacher's levels."""
    found = _given(masks, levels, name)
    for m, x, label in zip(found, levels.teachers, levels.labels, strict=True):
        check.maps(m, f"{name}{label}", x)
        if m.shape[1] != found[0].shape[1]:
            raise ValueError(
                f"{name}{label}: expected as many masks as on the first level, {found[0].shape[1]}, got {m.shape[1]}"
            )
    return [m.flatten(2).contiguous() for m in found]


def weights_of_levels(weights: Levels, shape: Sequence[int], dtype: torch.dtype, levels: Matched) -> Tensor:
    """Given mask weights as ``[levels, N, T]`` in ``dtype``; every level's are of ``shape`` ``[N, T]``."""
    found = _given(weights, levels, "mask_weights")
    for w, label in zip(found, levels.labels, strict=True):
        check.parameter(w, f"mask_weights{label}", shape, levels.teachers[0].device)
        check.frozen(w, f"mask_weights{label}")
    return torch.stack([w.to(dtype) for w in found])


def _given(given: Levels, levels: Matched, name: str) -> list[Tensor]:
    """One entry for each of the levels, by key if it is a mapping."""
    mapping = isinstance(given, Mapping)
    if (mapping and levels.keys is None) or (not mapping and levels.by_key):
        raise TypeError(
            f"{name} and teacher: expected both or neither to be a mapping of levels, {name} is a {type(given).__name__}"
        )
    found, _ = as_list(given, name, levels.keys)
    if len(found) != len(levels.teachers):
        raise ValueError(f"{name}: expected one entry for each of the {len(levels.teachers)} levels, got {len(found)}")
    return found
