"""Feature levels inside what a module returns: finding them, and putting others in their place."""

import copy
import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ._levels import Levels

FIELD = "feature_maps"  # where transformers' backbones keep their levels


def replace_levels(result: Any, field: str | None, name: str, function: Callable[[Levels], Levels]) -> Any:
    """``result`` with ``function`` applied to its levels; all else, and the type, stay.

    ``result`` is a tensor, sequence or mapping of levels, or holds one in ``field``: of a dataclass (transformers'
    model outputs are) or, if ``field`` is given, of a mapping. ``name`` is the module's, for errors.
    """
    record = dataclasses.is_dataclass(result) and not isinstance(result, type)
    if not record and field is None:
        return function(result)
    if not record and not isinstance(result, Mapping):
        raise TypeError(f"{name}: expected a mapping or dataclass with the field {field!r}, got {type(result).__name__}")
    names = [f.name for f in dataclasses.fields(result)] if record else list(result)
    values = {key: getattr(result, key) if record else result[key] for key in names}
    chosen = FIELD if field is None else field
    if values.get(chosen) is None:
        held = ", ".join(f"{key!r} ({type(value).__name__})" for key, value in values.items())
        raise ValueError(f"{name}: expected levels in the field {chosen!r} (output=) of {type(result).__name__}, got {held}")
    masked = function(values[chosen])
    if record:
        return dataclasses.replace(result, **{chosen: masked})
    changed = copy.copy(result)
    changed[chosen] = masked
    return changed


def find_module(model: nn.Module, name: str, caller: str) -> nn.Module:
    """The submodule of that dotted name; AttributeError with the names that come near."""
    modules = dict(model.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {[n for n, _ in model.named_children()]}"
        raise AttributeError(f"{caller}: the teacher {type(model).__name__} has no module {name!r}; {hint}")
    return modules[name]


def refuse_compiled(model: nn.Module, caller: str) -> None:
    """ValueError for a compiled model: torch.compile does not look for hooks that come later."""
    if hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules()):
        raise ValueError(
            f"{caller}: the teacher is compiled already, and a compiled module does not see hooks that are added later; give "
            "the module as it was before torch.compile, and compile it inside the block"
        )
