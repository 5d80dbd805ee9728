"""A teacher in eval mode, without gradients, that optimisers, checkpoints and wrappers do not see."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["FrozenTeacher"]


class FrozenTeacher(nn.Module):
    """Keeps a teacher in eval mode, runs it without gradients and leaves it out of parameters and checkpoints.

    The model is held, not registered: an optimiser, DDP, FSDP, a state dict, ``to_empty()`` and ``train()`` of the module that
    holds it do not reach it. It still follows ``.to()``, ``.cuda()`` and ``.half()``, unless it is offloaded or spread over
    devices; then it is left where it is. A deep copy (an EMA of the holder) shares the model; a pickle contains it.

    Args:
        model: the teacher, compiled or not. It is put into eval mode, and its parameters are frozen. It can be replaced later:
            ``teacher.model = torch.compile(teacher.model)``.

    ``forward`` passes everything on to the model, under ``torch.no_grad()`` and in eval mode, whoever called ``train()`` on the
    model since. ``MaskLearner.attach``, ``calibrate`` and ``maskd_triton.capture`` look through it: give the names of modules
    as the model itself has them. Inside an ``attach`` block it runs with gradients, which the tokens need.

    Raises:
        TypeError: anything that is no module; half-precision arguments that a float32 model cannot take.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from maskd_triton import FrozenTeacher
        >>> both = nn.ModuleDict({"student": nn.Linear(4, 2), "teacher": FrozenTeacher(nn.Linear(4, 2))})
        >>> sorted(both.state_dict()), both["teacher"](torch.ones(1, 4)).requires_grad
        (['student.bias', 'student.weight'], False)
    """

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.with_gradient = False  # an attach block sets it
        self.model = model

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "model":
            super().__setattr__(name, value)
        elif isinstance(value, nn.Module):
            self.__dict__["model"] = value.eval().requires_grad_(False)  # nn.Module would register it
        else:
            raise TypeError(f"model: expected an nn.Module, got {type(value).__name__}")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if any(module.training for module in self.model.modules()):
            self.model.eval()
        with torch.set_grad_enabled(self.with_gradient and torch.is_grad_enabled()):
            try:
                return self.model(*args, **kwargs)
            except RuntimeError as error:
                if type(error) is RuntimeError:
                    self._check_dtypes([*args, *kwargs.values()], error)
                raise

    def _check_dtypes(self, arguments: list[Any], error: RuntimeError) -> None:
        """TypeError where the model may have raised ``error`` because its arguments are narrower than its parameters."""
        wide = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        for x in tree_leaves(arguments):
            if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) and wide in (torch.float32, torch.float64):
                raise TypeError(
                    f"FrozenTeacher: the teacher's parameters are {wide}, but it was called with {x.dtype}, as by FSDP's mixed "
                    "precision, which casts the inputs of the module that holds it; call it with .float() inputs, under "
                    "torch.autocast, or cast the teacher to that dtype"
                ) from error

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
    """``fn(x)``, with the values of ``x`` also where ``fn`` only allocates, as that of ``to_empty`` does."""
    new = fn(x)
    if new.is_meta:
        return x
    return new.copy_(x) if new is not x and (new.shape, new.dtype) == (x.shape, x.dtype) else new
