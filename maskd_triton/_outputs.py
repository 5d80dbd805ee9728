"""Feature levels inside what a module returns: finding them, and putting others in their place."""

import copy
import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ._levels import Levels
from .teacher import named_modules

FIELD = "feature_maps"  # where transformers' backbones keep their levels


def replace_levels(result: Any, field: str | None, name: str, function: Callable[[Levels], Levels]) -> Any:
    """``result`` with ``function`` applied to its levels (:func:`find_levels`); all else, and the type, stay."""
    changed = function(find_levels(result, field, name))
    if _is_record(result):
        return dataclasses.replace(result, **{field or FIELD: changed})
    if field is None:
        return changed
    result = copy.copy(result)
    result[field] = changed
    return result


def find_levels(result: Any, field: str | None, name: str) -> Levels:
    """The levels that a module returned: a tensor, sequence or mapping of them, or something that holds one in ``field``: a
    dataclass (transformers' model outputs are) or, if ``field`` is given, a mapping. ``name`` is the module's, for errors."""
    record = _is_record(result)
    if not record and field is None:
        return result
    if not record and not isinstance(result, Mapping):
        raise TypeError(f"{name}: expected a mapping or dataclass with the field {field!r}, got {type(result).__name__}")
    names = [f.name for f in dataclasses.fields(result)] if record else list(result)
    values = {key: getattr(result, key) if record else result[key] for key in names}
    chosen = FIELD if field is None else field
    if values.get(chosen) is None:
        held = ", ".join(f"{key!r} ({type(value).__name__})" for key, value in values.items())
        raise ValueError(f"{name}: expected levels in the field {chosen!r} (output=) of {type(result).__name__}, got {held}")
    return values[chosen]


def _is_record(result: Any) -> bool:
    return dataclasses.is_dataclass(result) and not isinstance(result, type)


def find_module(model: nn.Module, name: str, caller: str, role: str = "teacher") -> nn.Module:
    """The submodule of that dotted name; AttributeError with the names that come near."""
    modules = dict(named_modules(model))  # a shared module has several names
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {[n for n, _ in model.named_children()]}"
        raise AttributeError(f"{caller}: the {role} {type(model).__name__} has no module {name!r}; {hint}")
    return modules[name]


def refuse_compiled(model: nn.Module, caller: str, role: str = "teacher") -> None:
    """ValueError for a compiled model: torch.compile does not look for hooks that come later."""
    if hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for _, m in named_modules(model)):
        raise ValueError(
            f"{caller}: the {role} is compiled already, and a compiled module does not see hooks that are added later; give "
            "the module as it was before torch.compile, and compile it inside the block"
        )
