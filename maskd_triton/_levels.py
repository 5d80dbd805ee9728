"""Features as lists of levels: one tensor, a sequence matched by position, or a mapping matched by key."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks as check
from .shapes import valid_pixels

Levels = Tensor | Sequence[Tensor] | Mapping[Any, Tensor]
FIELD = "feature_maps"  # where transformers' backbones keep their levels


class Unpacked(NamedTuple):
    """The levels that a container holds.

    Attributes:
        tensors: of every level.
        keys: of a mapping, in the order of ``tensors``; None for everything else.
        rebuild: gives other tensors, one per level, in a copy of the container.
    """

    tensors: list[Tensor]
    keys: list[Any] | None
    rebuild: Callable[[Sequence[Tensor]], Any]


def unpack(features: Any, name: str, names: Sequence[Any] | None = None) -> Unpacked:
    """The levels of ``features``: a tensor, a sequence, a mapping, or a transformers backbone's output.

    Each level may be a NestedTensor or an ImageList. A mapping's levels come in the order of ``names``, which must be its keys;
    None: in its own order.
    """
    held = getattr(features, FIELD, features) if is_record(features) else features
    keys: list[Any] | None = None
    if isinstance(held, Mapping):
        keys = list(held if names is None else names)
        if set(keys) != set(held):
            raise ValueError(f"{name}: expected the levels {keys}, got {list(held)}")
        entries = [held[key] for key in keys]
    elif isinstance(held, Sequence) and not isinstance(held, str):
        entries = list(held)
    else:
        entries = [held]
    tensors = [x if isinstance(x, Tensor) else tensor_of(x) for x in entries]
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            if entries[i] is held:
                raise TypeError(f"{name}: expected a tensor, or a sequence or mapping of tensors, got {type(x).__name__}")
            raise TypeError(f"{name}{labels(len(tensors), keys)[i]}: expected a tensor, got {type(x).__name__}")

    def rebuild(new: Sequence[Tensor]) -> Any:
        fields = map(_field_of, entries)
        items = [x if f is None else with_part(old, f, x) for old, f, x in zip(entries, fields, new, strict=True)]
        result = items[0] if entries and entries[0] is held else refilled(held, keys, items)
        return result if held is features else with_part(features, FIELD, result)

    return Unpacked(tensors, keys, rebuild)


def is_record(result: Any) -> bool:
    """Whether it is a dataclass, as model outputs of transformers are."""
    return dataclasses.is_dataclass(result) and not isinstance(result, type)


def tensor_of(x: Any) -> Any:
    """The tensor in a NestedTensor (DETR), torchvision's ImageList (``.tensors``) or detectron2's (``.tensor``); else ``x``."""
    field = _field_of(x)
    return x if field is None else getattr(x, field)


def _field_of(wrapper: Any) -> str | None:
    if isinstance(wrapper, Tensor | Mapping | Sequence):
        return None
    return next((name for name in ("tensors", "tensor") if isinstance(getattr(wrapper, name, None), Tensor)), None)


def refilled(container: Any, keys: Sequence[Any] | None, items: Sequence[Any]) -> Any:
    """A copy of the sequence or mapping with ``items`` in it."""
    if hasattr(container, "_make"):
        return container._make(items)
    if isinstance(container, tuple):
        return type(container)(items)
    plain = type(container) in (list, dict)  # which torch.compile copies only like this
    refilled = container.copy() if plain else copy.copy(container)
    for key, item in zip(range(len(items)) if keys is None else keys, items, strict=True):
        refilled[key] = item
    return refilled


def with_part(result: Any, key: Any, value: Any) -> Any:
    """A copy of ``result`` that holds ``value`` under a key, at a position or in a field."""
    if isinstance(result, Mapping) and not is_record(result):
        return refilled(result, [key], [value])
    if not isinstance(key, str):
        items = list(result)
        items[key] = value
        return refilled(result, None, items)
    if hasattr(result, "_replace"):
        return result._replace(**{key: value})
    result = copy.copy(result)
    try:
        setattr(result, key, value)
    except dataclasses.FrozenInstanceError:
        object.__setattr__(result, key, value)
    return result


class Matched(NamedTuple):
    """Student and teacher levels side by side.

    Attributes:
        students, teachers: tensors of every level.
        keys: names of the levels, if they have any.
    """

    students: list[Tensor]
    teachers: list[Tensor]
    keys: list[Any] | None

    @property
    def labels(self) -> list[str]:
        """Name the level for an error, like ``"[0]"`` or ``"['p3']"``."""
        return labels(len(self.teachers), self.keys)


def match(student: Levels, teacher: Levels, names: Sequence[Any] | None = None) -> Matched:
    """TypeError or ValueError unless both have the same levels.

    With ``names``, levels come in that order, and each side may be a mapping or a sequence. Without, both or neither are
    mappings: levels come in the order of the teacher's, and the student's are matched by key.
    """
    teachers = unpack(teacher, "teacher", names)
    keys = teachers.keys if names is None else list(names)
    students = unpack(student, "student", keys)
    if names is None and (students.keys is None) != (keys is None):
        raise TypeError(
            "student and teacher: expected both or neither to be a mapping of levels, "
            f"got {type(student).__name__} and {type(teacher).__name__}; make the mapping a sequence in the order of the other"
        )
    if len(students.tensors) != len(teachers.tensors):
        raise ValueError(
            f"student and teacher: expected as many levels in both, got {len(students.tensors)} and {len(teachers.tensors)}"
        )
    return Matched(students.tensors, teachers.tensors, keys)


def labels(levels: int, keys: Sequence[Any] | None) -> list[str]:
    """Name each level for errors, by its key in a mapping and by its position otherwise."""
    return [f"[{key!r}]" for key in (keys or range(levels))]


def named(channels: Any) -> tuple[list[int], list[Any] | None]:
    """``channels=`` as one int per level, and the names of the levels, if it is a mapping."""
    if isinstance(channels, Mapping):
        return per_level(list(channels.values()), "channels"), list(channels)
    return per_level(channels, "channels"), None


def per_level(value: Any, name: str, levels: int | None = None) -> list[int]:
    """``value`` as one positive int per level; an int is repeated ``levels`` times (None: it means one level)."""
    value = check.listed(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        found = [check.positive_int(v, f"{name}[{i}]") for i, v in enumerate(value)]
    else:
        found = [check.positive_int(value, name)] * (levels or 1)
    if not found:
        raise ValueError(f"{name}: expected a positive int or one per level, got {value!r}")
    if levels is not None and len(found) != levels:
        raise ValueError(f"{name}: expected one value {check.for_each(levels)}, got {value!r}")
    return found


def in_order(value: Any, name: str, names: Sequence[Any] | None, levels: int) -> list[Any]:
    """One entry for each of the levels: a sequence as it is, a mapping in the order of ``names``."""
    if isinstance(value, Mapping):
        if names is None:
            raise TypeError(f"{name}: a mapping by level, but the levels have no names; give a sequence in their order")
        if set(value) != set(names):
            raise ValueError(f"{name}: expected the levels {list(names)}, got {list(value)}")
        return [value[key] for key in names]
    check.per_level(value, name, levels)
    return list(value)


def valid_of_levels(valid: Any, levels: Sequence[Tensor], name: str = "valid") -> list[Tensor]:
    """Bytes ``[N, P]`` of every level ``[N, C, H, W]``, 1 where its pixel stands for valid ones; none for ``valid=None``.

    ``valid``: bool or integer ``[N, H0, W0]``, an ImageList (torchvision's or detectron2's: ``image_sizes``), or a DETR's
    NestedTensor, whose ``mask`` is True on padding. A level's pixel is valid if the first of the pixels that it stands for is
    (nearest neighbour, as in transformers' detectors).
    """
    if valid is None:
        return []
    if hasattr(valid, "image_sizes") and _field_of(valid):
        valid = valid_pixels(valid.image_sizes, tensor_of(valid).shape[-2:], levels[0].device)
    elif hasattr(valid, "mask") and _field_of(valid):
        if valid.mask is None:
            return []
        valid = valid.mask == 0
    check.valid(valid, name, levels[0].shape[0], levels[0].device)
    bytes_ = (valid != 0).to(torch.uint8)[:, None]
    return [torch.nn.functional.interpolate(bytes_, x.shape[2:], mode="nearest").flatten(1) for x in levels]


def masks_of_levels(masks: Levels, levels: Matched) -> list[Tensor]:
    """Given masks as contiguous ``[N, T, P]`` of a float dtype, matched with the teacher's levels."""
    found = _given(masks, "masks", levels)
    found = [m.to(torch.float32) if m.dtype == torch.bool else m for m in found]
    for m, x, label in zip(found, levels.teachers, levels.labels, strict=True):
        check.maps(m, f"masks{label}", x)
        if m.shape[1] != found[0].shape[1]:
            raise ValueError(
                f"masks{label}: expected as many masks as on the first level, {found[0].shape[1]}, got {m.shape[1]}"
            )
    return [m.flatten(2).contiguous() for m in found]


def weights_of_levels(weights: Levels, shape: Sequence[int], dtype: torch.dtype, levels: Matched) -> Tensor:
    """Given mask weights as ``[levels, N, T]`` in ``dtype``; every level's are of ``shape`` ``[N, T]``."""
    found = _given(weights, "mask_weights", levels)
    for w, label in zip(found, levels.labels, strict=True):
        check.parameter(w, f"mask_weights{label}", shape, levels.teachers[0].device)
        check.frozen(w, f"mask_weights{label}")
    return torch.stack([w.to(dtype) for w in found])


def _given(value: Levels, name: str, levels: Matched) -> list[Tensor]:
    if isinstance(value, Mapping) and levels.keys is None:
        raise TypeError(f"{name}: expected a sequence, because teacher is no mapping, got a mapping")
    found = unpack(value, name, levels.keys).tensors
    if len(found) != len(levels.teachers):
        raise ValueError(f"{name}: expected one entry {check.for_each(len(levels.teachers))}, got {len(found)}")
    return found
