"""Features of named modules, without changing the models: two models to two aligned lists of levels."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ._levels import as_list
from ._outputs import find_levels, find_module, refuse_compiled

Names = str | Sequence[str] | Mapping[str, str]


class FeatureCapture:
    """What named modules of a student and a teacher return, as two aligned lists of levels.

    Args:
        student, teacher: the models, not compiled.
        names: modules by their dotted names: a mapping from the student's to the teacher's, or a name or names that both have.
        output: field of the modules' output that holds the levels, where they return a dataclass or a mapping of several
            things; None: ``"feature_maps"`` of a dataclass, otherwise the output itself.

    A module may return a tensor, or a sequence or mapping of levels, which are taken in their order. Inside the ``with`` block
    every call of the models leaves its levels here; :meth:`take` hands over those of the latest one and keeps nothing, so no
    features stay alive after the step.

    Hooks do not survive ``torch.compile(fullgraph=True)``, and a model compiled before is refused. Compile a module whose
    ``forward`` returns the features beside its result, or call :func:`call` inside what is compiled.

    Raises:
        AttributeError: a model has no such module; the message lists near matches.
        ValueError: a model is compiled already; student and teacher give different numbers of levels.
        TypeError, ValueError: outputs that hold no levels, when the model runs.
        RuntimeError: :meth:`take` before both models have run; entered twice.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from maskd_triton.capture import FeatureCapture
        >>> student, teacher = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
        >>> with FeatureCapture(student, teacher, "0") as features:
        ...     images = torch.randn(2, 3, 4, 4)
        ...     scores = student(images)
        ...     with torch.no_grad():
        ...         _ = teacher(images)
        ...     students, teachers = features.take()
        >>> students[0].shape, students[0].requires_grad, teachers[0].requires_grad
        (torch.Size([2, 8, 4, 4]), True, False)
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, names: Names, *, output: str | None = None) -> None:
        self._sides: list[tuple[str, list[tuple[str, nn.Module]]]] = []
        for role, model, chosen in (("student", student, _names(names, 0)), ("teacher", teacher, _names(names, 1))):
            refuse_compiled(model, "capture", role)
            self._sides.append((role, [(name, find_module(model, name, "capture", role)) for name in chosen]))
        self._output = output
        self._found: dict[tuple[str, str], list[Tensor]] = {}
        self._stack: ExitStack | None = None

    def __enter__(self) -> "FeatureCapture":
        if self._stack is not None:
            raise RuntimeError("capture: entered already; leave that block first")
        self._stack = ExitStack()
        for role, modules in self._sides:
            for name, module in modules:
                handle = module.register_forward_hook(_hook(self._found, (role, name), self._output))
                self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        if self._stack is not None:
            self._stack.close()
        self._stack = None

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """The student's and the teacher's levels of their latest calls; nothing of them is kept."""
        found = self._found.copy()
        self._found.clear()
        lists = []
        for role, modules in self._sides:
            if missing := [name for name, _ in modules if (role, name) not in found]:
                raise RuntimeError(f"capture: the {role}'s {', '.join(map(repr, missing))} has not run since the latest take()")
            lists.append([x for name, _ in modules for x in found[role, name]])
        students, teachers = lists
        if len(students) != len(teachers):
            raise ValueError(f"capture: expected as many levels of both models, got {len(students)} and {len(teachers)}")
        return students, teachers


def call(
    model: nn.Module, names: str | Sequence[str], *args: Any, output: str | None = None, **kwargs: Any
) -> tuple[Any, list[Tensor]]:
    """``model(*args, **kwargs)`` and the levels that its modules ``names`` returned in this call.

    Hooks are set and removed within the call, so it also works in a function that is compiled, and copies of a model under DDP
    or FSDP see their own. ``output`` and errors as for :class:`FeatureCapture`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from maskd_triton import capture
        >>> scores, levels = capture.call(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), ["0", "1"], torch.randn(2, 3, 4, 4))
        >>> len(levels), bool((levels[1] == scores).all())
        (2, True)
    """
    chosen = _names(names, 0)
    found: dict[tuple[str, str], list[Tensor]] = {}
    with ExitStack() as stack:
        for name in chosen:
            module = find_module(model, name, "capture", "model")
            stack.callback(module.register_forward_hook(_hook(found, ("model", name), output)).remove)
        result = model(*args, **kwargs)
    if missing := [name for name in chosen if ("model", name) not in found]:
        raise RuntimeError(f"capture: the model's {', '.join(map(repr, missing))} has not run in this call")
    return result, [x for name in chosen for x in found["model", name]]


def _names(names: Names, side: int) -> list[str]:
    """The student's (0) or the teacher's (1) names."""
    if isinstance(names, Mapping):
        return list(names.values() if side else names)
    given = [names] if isinstance(names, str) else list(names)
    if not given or not all(isinstance(name, str) for name in given):
        raise TypeError(f"names: expected dotted names of modules, got {names!r}")
    return given


def _hook(
    found: dict[tuple[str, str], list[Tensor]], key: tuple[str, str], output: str | None
) -> Callable[[nn.Module, Any, Any], None]:
    name = f"output of the {key[0]}'s {key[1]!r}"

    def hook(_module: nn.Module, _inputs: Any, result: Any) -> None:
        found[key] = as_list(find_levels(result, output, name), name)[0]

    return hook
