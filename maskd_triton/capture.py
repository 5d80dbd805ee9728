"""Features of named modules, without changing the models: a list of levels from the student, and one from the teacher."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._hooks import Hooked, Output, Target, Where, names_of

__all__ = ["FeatureCapture", "call"]

Names = str | Sequence[str] | Mapping[str, str]


class FeatureCapture:
    """Features of named modules of a student and a teacher, as two lists of levels that belong together.

    Args:
        student: the model that learns.
        teacher: the model it learns from; a `FrozenTeacher` is looked through.
        names: modules by their dotted names; ``""`` is the model itself. A name or names that both models have, or a mapping
            from the student's names to the teacher's.
        call: which call of a module that runs several times in one pass of its model, counted from 0; None: all, in order.
        output: which part of a module's output holds the levels: a field, a key, a position in a tuple, or a tuple of those
            as a path, in which ``...`` stands for every part and a list for several; None: ``"feature_maps"`` of a dataclass,
            otherwise the output itself.
        layout: ``"nchw"``, ``"nhwc"`` or ``"tokens"`` (``[N, L, C]``), which are handed over as views ``[N, C, H, W]``;
            None: as they are.
        grid: rows and columns ``(h, w)`` of the tokens; None: square patches of the images that the model is called with.
        prefix_tokens: how many class and register tokens stand in front; they are left out.

    Each of the last five may be a mapping ``{"student": ..., "teacher": ...}`` where the two differ.

    A module may return a tensor, or a sequence or mapping of levels, which are taken in their order, also inside of
    NestedTensors and ImageLists. Inside the ``with`` block every pass of the models leaves its levels here. `take` hands over
    those of the latest pass and keeps nothing, so no features stay alive after the step. Copies of a model that are made in
    the block (EMA) leave nothing here, nor do recomputations of activation checkpoints. If both are one model
    (self-distillation), passes with gradients are the student's, and those under ``torch.no_grad()`` the teacher's.

    A module inside a model that was compiled before is refused. Compile the models inside the block; or compile a module
    whose ``forward`` returns the features beside its result; or use `capture.call` inside what is compiled.

    Raises:
        AttributeError: a model has no such module; the message lists near matches.
        ValueError: a module lies in a compiled one; outputs hold no such levels, when the model runs.
        TypeError: outputs of another kind, when the model runs.
        RuntimeError: the block is entered twice.

    Examples:
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

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        names: Names,
        *,
        call: int | Mapping[str, Any] | None = None,
        output: Output | Mapping[str, Any] | None = None,
        layout: str | Mapping[str, Any] | None = None,
        grid: tuple[int, int] | Mapping[str, Any] | None = None,
        prefix_tokens: int | Mapping[str, Any] = 0,
    ) -> None:
        options = {"call": call, "output": output, "layout": layout, "grid": grid, "prefix_tokens": prefix_tokens}
        self._sides = []
        for role, model in (("student", student), ("teacher", teacher)):
            chosen = (names if role == "student" else names.values()) if isinstance(names, Mapping) else names
            where = Where(names_of(chosen if isinstance(chosen, str) else list(chosen)), **_of_side(options, role))
            self._sides.append(_Recorder(role, model, where))
        self._tell_apart()
        self._stack: ExitStack | None = None

    def _tell_apart(self) -> None:
        """Whether both are one model, or share the modules."""
        students, teachers = ({m for t in side.targets for m in t.chain} for side in self._sides)
        self._one_model = not students.isdisjoint(teachers)
        if not {t.module for t in self._sides[0].targets}.isdisjoint(t.module for t in self._sides[1].targets):
            for side in self._sides:
                for target in side.targets:
                    target.only = side.role == "student"

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not entered, and looks at the copies of the models if they are copied with it."""
        return self.__dict__ | {"_stack": None}

    def __enter__(self) -> "FeatureCapture":
        if self._stack is not None:
            raise RuntimeError("capture: entered already; leave that block first")
        for side in self._sides:
            side.resolve()  # the models may have changed: adapters, torch.compile, another teacher
        self._tell_apart()
        with ExitStack() as stack:
            for side in self._sides:
                stack.enter_context(side)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self._stack is not None:
            self._stack.close()
        self._stack = None

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """Hand over the levels of the latest passes, and keep nothing of them.

        Returns:
            The student's levels and the teacher's, two lists of one length.

        Raises:
            RuntimeError: a model has not run; it is not known which calls belong together; a later layer has overwritten the
                features in place.
            ValueError: student and teacher gave different numbers of levels.
        """
        passes = set().union(*(side.passes for side in self._sides))
        students, teachers = [side.checked(taken) for side, taken in [(side, side.forget()) for side in self._sides]]
        if self._one_model and passes == {True, False} and self._sides[0].targets[0].only is None:
            raise RuntimeError(
                "capture: student and teacher are one model, which ran both with and without gradients since the latest "
                "take(), so it is not known which pass is whose; call take() after every pass"
            )
        if len(students) != len(teachers):
            raise ValueError(f"capture: expected as many levels of both models, got {len(students)} and {len(teachers)}")
        return students, teachers


def call(
    model: nn.Module,
    names: str | Sequence[str],
    *args: Any,
    call: int | None = None,
    output: Output | None = None,
    layout: str | None = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    **kwargs: Any,
) -> tuple[Any, list[Tensor]]:
    """Call ``model(*args, **kwargs)`` and get its result with the features of its modules.

    Hooks are set and removed within the call. So this also works inside a function that is compiled, and copies of a model
    under DDP or FSDP see their own features.

    Args:
        model: the model to call.
        names: modules by their dotted names.
        call: as for `FeatureCapture`.
        output: as for `FeatureCapture`.
        layout: as for `FeatureCapture`.
        grid: as for `FeatureCapture`.
        prefix_tokens: as for `FeatureCapture`.

    Returns:
        What the model returned, and a list of levels.

    Raises:
        AttributeError, TypeError, ValueError, RuntimeError: as for `FeatureCapture`.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from maskd_triton import capture
        >>> scores, levels = capture.call(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), ["0", "1"], torch.randn(2, 3, 4, 4))
        >>> len(levels), bool((levels[1] == scores).all())
        (2, True)
    """
    recorder = _Recorder("model", model, Where(names_of(names), call, output, layout, grid, prefix_tokens), bounds=False)
    try:
        with recorder:
            for target in recorder.targets:
                recorder.start(target, model, args, kwargs)
                target.depth = 1  # this call is the pass, whichever module is called in it
            result = model(*args, **kwargs)
    finally:
        taken = recorder.forget()
    return result, recorder.checked(taken, "in this call")


class _Level(NamedTuple):
    tensor: Tensor
    version: int | None


_Taken = tuple[str, int, bool, list[_Level]]  # a module's name, number of calls, whether they are direct, and levels


class _Recorder(Hooked):
    """The levels of one model's latest pass."""

    def __init__(self, role: str, model: nn.Module, where: Where, bounds: bool = True) -> None:
        super().__init__("capture", role, model, where, bounds=bounds)
        self.passes: set[bool] = set()  # with gradients or without

    def act(self, target: Target, result: Any, number: int | None) -> None:
        where = self.where
        if number is None or where.call not in (None, number):
            return
        if target.direct and number > 0:
            target.parts = []  # take() refuses; nothing need stay alive until then
            return
        _, levels, _ = where.find(result, target.label)
        self.passes.add(target.gradient)
        for x in levels:
            level = where.maps(x, target.label, target.images)
            if torch.compiler.is_compiling() or x.is_inference():  # these do not count writes: a copy
                target.parts.append(_Level(level.clone(), None))
            else:
                target.parts.append(_Level(level, x._version))

    def forget(self) -> list[_Taken]:
        """What the latest pass has left; nothing of it is kept."""
        taken = [(target.name, target.calls, target.direct, target.parts) for target in self.targets]
        for target in self.targets:
            target.clear()
        self.passes.clear()
        return taken

    def checked(self, taken: list[_Taken], since: str = "since the latest take()") -> list[Tensor]:
        """The levels of all modules; RuntimeError unless they are complete, of one pass, and as the modules gave them."""
        role, only = self.role, self.targets[0].only
        if missing := [name for name, calls, _, _ in taken if not calls]:
            how = {None: "", True: " with gradients", False: " without gradients"}[only]
            one = "; student and teacher are one model: run the teacher's pass under torch.no_grad()"
            why = one if how else " (code that was compiled before does not say what runs)"
            raise RuntimeError(f"capture: the {role}'s {', '.join(map(repr, missing))} has not run{how} {since}{why}")
        for name, calls, direct, parts in taken:
            if direct and calls > 1:
                raise RuntimeError(
                    f"capture: the {role}'s {name!r} ran {calls} times outside of a call of the {role} {since}, so it is not "
                    f"known which calls belong together; call the {role} itself, or take() after every call"
                )
            if not parts and self.where.call is not None:
                raise RuntimeError(f"capture: the {role}'s {name!r} ran {calls} times, it has no call {self.where.call}")
            if any(level.version != level.tensor._version for level in parts if level.version is not None):
                raise RuntimeError(
                    f"capture: a later layer has overwritten the features of the {role}'s {name!r} in place; make that layer "
                    "inplace=False (an activation that follows, as a rule), or capture its output instead"
                )
        return [level.tensor for _, _, _, parts in taken for level in parts]


def _of_side(options: dict[str, Any], role: str) -> dict[str, Any]:
    """The options of the student or the teacher."""
    sides = {name: value for name, value in options.items() if isinstance(value, Mapping)}
    for name, value in sides.items():
        if not set(value) <= {"student", "teacher"}:
            raise ValueError(f"{name}: expected a mapping with the keys 'student' and 'teacher', got {list(value)}")
    defaults = {"prefix_tokens": 0}
    return options | {name: value.get(role, defaults.get(name)) for name, value in sides.items()}
