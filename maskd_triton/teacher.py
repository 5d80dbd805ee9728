"""A teacher that nothing trains, saves or shards."""

from typing import Any

import torch
from torch import nn


class FrozenTeacher(nn.Module):
    """A model in eval mode, run without gradients, that the module which holds it does not count as its own.

    It has no parameters and no state dict, so an optimiser, DDP, FSDP and a checkpoint of student and criterion do not see it;
    yet it follows ``.to()``, ``.cuda()`` and ``.half()`` of the module that holds it, and ``.train()`` leaves it in eval mode.

    Args:
        model: the teacher; put into eval mode, its parameters frozen.

    ``forward`` passes everything on to the model, under ``torch.no_grad()``; :attr:`model` is the model itself.
    Raises TypeError for anything that is no module.

    Example:
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
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        object.__setattr__(self, "model", model.eval().requires_grad_(False))  # not through nn.Module: it would be registered

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.model(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenTeacher":
        self.model._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return type(self.model).__name__
