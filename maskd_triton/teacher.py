"""A teacher in eval mode, without gradients, that optimisers, checkpoints and wrappers do not see."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ._torch import Model

__all__ = ["FrozenTeacher"]


class FrozenTeacher(nn.Module):
    """Keeps a teacher in eval mode, runs it without gradients and leaves it out of parameters and checkpoints.

    It holds the model without registering it, so an optimiser, DDP, FSDP, a state dict, ``to_empty()`` and ``train()`` of the
    module around it do not reach the model. The model still follows ``.to()``, ``.cuda()`` and ``.half()``, unless it is
    offloaded or spread over devices; then it is left where it is. A deep copy (an EMA of the holder) shares the model; a pickle
    contains it.

    Args:
        model: the teacher, compiled or not. It is put into eval mode, and its parameters are frozen. It can be replaced later:
            ``teacher.model = torch.compile(teacher.model)``.

    ``forward`` passes everything on to the model, under ``torch.no_grad()`` and in eval mode, whoever called ``train()`` on the
    model since. ``MaskLearner.attach``, ``calibrate`` and ``maskd_triton.capture`` look through it: give the names of modules
    as the model itself has them. Inside an ``attach`` block it runs with gradients, which the tokens need.

    Raises:
        TypeError: anything that is no module.
        RuntimeError: the model's own. It says so where half-precision arguments for a float32 model may be the reason.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from maskd_triton import FrozenTeacher
        >>> both = nn.ModuleDict({"student": nn.Linear(4, 2), "teacher": FrozenTeacher(nn.Linear(4, 2))})
        >>> sorted(both.state_dict()), both["teacher"](torch.ones(1, 4)).requires_grad
        (['student.bias', 'student.weight'], False)
    """

    model: Any  # an nn.Module, but torch.compile(model), which may be assigned, is a callable to a type checker

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.with_gradient = False  # an attach block sets it
        self.model = model

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "model":
            super().__setattr__(name, value)
        elif isinstance(value, nn.Module):
            for parameter in value.parameters():  # TorchScript has no requires_grad_()
                parameter.requires_grad_(False)
            self.__dict__["model"] = value.eval()  # nn.Module would register it
        else:
            raise TypeError(f"model: expected an nn.Module, got {type(value).__name__}")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if hasattr(self.__dict__.get("model"), name):
                raise AttributeError(f"{error}; its model has, as .model.{name}", name=name, obj=self) from None
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if any(getattr(module, "training", False) for module in self.model.modules()):  # frozen TorchScript has none
            self.model.eval()
        with torch.set_grad_enabled(self.with_gradient and torch.is_grad_enabled()):
            try:
                return self.model(*args, **kwargs)
            except RuntimeError as error:
                if type(error) is RuntimeError and (dtypes := self._narrower([*args, *kwargs.values()])):
                    raise RuntimeError(
                        f"{error}\nFrozenTeacher: {dtypes} outside of autocast (FSDP's mixed precision casts the inputs of the "
                        "module that holds a teacher). If that is why, call it with .float() inputs, under torch.autocast, or "
                        "cast the teacher to that dtype"
                    ) from error
                raise

    def _narrower(self, arguments: list[Any]) -> str | None:
        """Says that arguments are narrower than the parameters, if so, and nothing casts either."""
        wide = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        for x in tree_leaves(arguments) if wide in (torch.float32, torch.float64) else ():
            half = isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
            if half and not torch.is_autocast_enabled(x.device.type):
                return f"the teacher's parameters are {wide}, but it was called with {x.dtype}"
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenTeacher":
        held = [*self.model.parameters(), *self.model.buffers()]
        if len({x.device for x in held}) == 1 and not held[0].is_meta:
            self.model._apply(lambda x: _converted(fn, x), recurse)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenTeacher":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        own = {name: value for name, value in self.__getstate__().items() if name != "model"}
        twin.__dict__.update(copy.deepcopy(own, memo) | {"model": self.model})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"with_gradient": False}

    def extra_repr(self) -> str:
        return type(self.model).__name__


def _converted(fn: Any, x: Tensor) -> Tensor:
    """Apply ``fn``; where it only allocates, as for ``to_empty``, the values of ``x`` are kept."""
    new = fn(x)
    if new.is_meta:
        return x
    return new.copy_(x) if new is not x and (new.shape, new.dtype) == (x.shape, x.dtype) else new
