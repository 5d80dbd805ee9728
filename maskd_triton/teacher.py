"""A teacher in eval mode, without gradients, that optimisers, checkpoints and wrappers do not see."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FrozenTeacher"]


class FrozenTeacher(nn.Module):
    """Keeps a teacher in eval mode, runs it without gradients and leaves it out of parameters and checkpoints.

    The model is held, not registered: an optimiser, DDP, FSDP, a state dict, ``to_empty()`` and ``train()`` of the module that
    holds it do not reach it. It still follows ``.to()``, ``.cuda()`` and ``.half()``, unless it is sharded, offloaded or spread
    over devices: then its owner places it. A deep copy (an EMA of the holder) shares the model; a pickle contains it.

    Args:
        model: the teacher, compiled or not. It is put into eval mode, and its parameters are frozen. It can be replaced later:
            ``teacher.model = torch.compile(teacher.model)``.

    ``forward`` passes everything on to the model, under ``torch.no_grad()`` and in eval mode, whoever called ``train()`` on the
    model since. ``MaskLearner.attach``, ``calibrate`` and ``maskd_triton.capture`` look through it: give the names of modules
    as the model itself has them. Inside an ``attach`` block it runs with gradients, which the tokens need.

    Raises:
        TypeError: anything that is no module.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from maskd_triton import FrozenTeacher
        >>> both = nn.ModuleDict({"student": nn.Linear(4, 2), "teacher": FrozenTeacher(nn.Linear(4, 2))})
        >>> sorted(both.state_dict()), both["teacher"](torch.ones(1, 4)).requires_grad
        (['student.bias', 'student.weight'], False)
    """

    _held: tuple[nn.Module]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.with_gradient = False  # an attach block sets it
        self.model = model

    @property
    def model(self) -> nn.Module:
        """The teacher itself."""
        return self._held[0]

    @model.setter
    def model(self, value: nn.Module) -> None:
        if not isinstance(value, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(value).__name__}")
        self._held = (value.eval().requires_grad_(False),)  # nn.Module does not look into a tuple

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":  # nn.Module would register it before it asks the property
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        modules = [self.model]
        for module in modules:  # grows as it goes: a third of the time of model.modules()
            if module.training:
                module.training = False
            modules.extend(child for child in module._modules.values() if child is not None)
        with torch.set_grad_enabled(self.with_gradient and torch.is_grad_enabled()):
            return self.model(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenTeacher":
        held = [*self.model.parameters(), *self.model.buffers()]
        sharded = any(hasattr(x, "device_mesh") for x in held)  # DTensor, which not every build of torch has
        sharded |= any("_fsdp_wrapped_module" in module._modules for module in self.model.modules())  # FSDP 1
        placed_by_owner = sharded or len({x.device for x in held}) > 1 or any(x.is_meta for x in held)
        if not placed_by_owner:
            self.model._apply(lambda x: _converted(fn, x), recurse)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenTeacher":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        own = {name: value for name, value in self.__getstate__().items() if name != "_held"}
        twin.__dict__.update(copy.deepcopy(own, memo) | {"_held": self._held})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"with_gradient": False}

    def extra_repr(self) -> str:
        return type(self.model).__name__


def _converted(fn: Any, x: Tensor) -> Tensor:
    """``fn(x)``, with the values of ``x`` also where ``fn`` only allocates, as that of ``to_empty`` does."""
    new = fn(x)
    if new.is_meta:
        return x
    return new.copy_(x) if new is not x and (new.shape, new.dtype) == (x.shape, x.dtype) else new


def named_paths(
    model: nn.Module, prefix: str = "", above: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[str, tuple[nn.Module, ...]]]:
    """All modules by all their names, each with the modules that hold it, from ``model`` to the module itself.

    What a `FrozenTeacher` holds, or ``torch.compile`` wraps, goes by the names that it has there.
    """
    path = (*above, model)
    yield prefix, path
    children = model._modules
    inner = model.model if isinstance(model, FrozenTeacher) else children["_orig_mod"] if "_orig_mod" in children else None
    if inner is not None:
        yield from named_paths(inner, prefix, path)
    for name, child in children.items():
        if child is not None and name != "_orig_mod":
            yield from named_paths(child, f"{prefix}.{name}" if prefix else name, path)
