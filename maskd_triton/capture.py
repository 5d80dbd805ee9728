"""Features of named modules, without changing the models: a list of levels from the student, and one from the teacher."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._hooks import Hooked, Output, Where, changes_in_train_mode, names_of
from ._warn import warn

__all__ = ["FeatureCapture", "call"]

Names = str | Sequence[str] | Mapping[str, str]


class FeatureCapture:
    """Features of named modules of a student and a teacher, as two lists of levels that belong together.

    Args:
        student: the model that learns.
        teacher: the model it learns from; a `FrozenTeacher` is looked through.
        names: modules by their dotted names; ``""`` is the model itself. A name or names that both models have, or a mapping
            from the student's names to the teacher's.
        output: which part of a module's output holds the levels: a field, a key, or a position in a tuple; None:
            ``"feature_maps"`` of a dataclass, otherwise the output itself.
        layout: ``"nchw"``, ``"nhwc"`` or ``"tokens"`` (``[N, L, C]``), which are handed over as views ``[N, C, H, W]``;
            None: tensors are handed over unchanged.
        grid: rows and columns ``(h, w)`` of the tokens; None: square patches of the images that the model is called with.
        prefix_tokens: how many class and register tokens stand in front; they are left out.

    Each of the last four may be a mapping ``{"student": ..., "teacher": ...}`` where the two differ.

    A module may return a tensor, or a sequence or mapping of levels, which are taken in their order, also inside of
    NestedTensors and ImageLists. Inside the ``with`` block every pass of the models leaves its levels here. `take` hands over
    those of the latest pass and keeps nothing, so no features stay alive after the step. Copies of a model that are made in
    the block (EMA), recomputations of activation checkpoints and traces (``torch.export``) leave nothing here. If both are one
    model (self-distillation), passes with gradients are the student's, and those under ``torch.no_grad()`` the teacher's.

    Code that was compiled before the block does not see its hooks: then `take` raises. Compile the models inside the block; or
    use `capture.call` inside what is compiled.

    Raises:
        AttributeError: a model has no such module; the message lists near matches.
        ValueError: outputs hold no such levels, when the model runs.
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
        output: Output | Mapping[str, Any] | None = None,
        layout: str | Mapping[str, Any] | None = None,
        grid: tuple[int, int] | Mapping[str, Any] | None = None,
        prefix_tokens: int | Mapping[str, Any] = 0,
    ) -> None:
        options = {"output": output, "layout": layout, "grid": grid, "prefix_tokens": prefix_tokens}
        of_student, of_teacher = (list(names), list(names.values())) if isinstance(names, Mapping) else (names, names)
        self._sides = [
            ("student", student, Where(names_of(of_student), **_of_side(options, "student"))),
            ("teacher", teacher, Where(names_of(of_teacher), **_of_side(options, "teacher"))),
        ]
        self._recorders = self._new_recorders()
        self._stack: ExitStack | None = None  # of a block that is entered
        self._warned = False

    def _new_recorders(self) -> list["_Recorder"]:
        """Of the modules that the names mean now: the models may have changed."""
        student, teacher = (_Recorder("capture", *side) for side in self._sides)
        if not set(student.modules).isdisjoint(teacher.modules):
            student.only, teacher.only = True, False
        return [student, teacher]

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not entered, and looks at the copies of the models if they are copied with it."""
        return self.__dict__ | {"_recorders": [], "_stack": None}

    def __enter__(self) -> "FeatureCapture":
        if self._stack is not None:
            raise RuntimeError("capture: entered already; leave that block first")
        self._recorders = self._new_recorders()
        with ExitStack() as stack:
            for side in self._recorders:
                stack.enter_context(side)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self._stack is not None:
            self._stack.close()
        self._stack = None

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """Hand over the levels of the latest passes, and keep nothing of them.

        Warns (UserWarning), once, if the teacher ran with a batch norm or dropout in train mode.

        Returns:
            The student's levels and the teacher's, two lists of one length.

        Raises:
            RuntimeError: a model has not run in the block; it is not known which calls belong together; a later layer has
                overwritten the features in place.
            ValueError: student and teacher gave different numbers of levels.
        """
        if not self._recorders:
            raise RuntimeError("capture: this is a copy; enter it, and run both models inside of its `with` block")
        student, teacher = self._recorders
        taken, taught = student.forget(), teacher.forget()  # also where the student's raises
        students, teachers = student.checked(taken), teacher.checked(taught)
        if len(students) != len(teachers):
            raise ValueError(f"capture: expected as many levels of both models, got {len(students)} and {len(teachers)}")
        layer = None if self._warned or teacher.only is not None else teacher.in_train_mode()
        if layer is not None:
            self._warned = True
            warn(
                f"capture: the teacher ran with {layer!r} in train mode, so its features depend on the batch or on chance; "
                "call teacher.eval(), or hold it in a FrozenTeacher",
            )
        return students, teachers


def call(
    model: nn.Module,
    names: str | Sequence[str],
    *args: Any,
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
    recorder = _Recorder("capture", "model", model, Where(names_of(names), output, layout, grid, prefix_tokens))
    try:
        with recorder:
            recorder.begin(args, kwargs)  # the hooks of a compiled model itself do not run
            result = model(*args, **kwargs)
    finally:
        taken = recorder.forget()
    return result, recorder.checked(taken, "in this call")


class _Level(NamedTuple):
    tensor: Tensor
    version: int | None


class _Taken(NamedTuple):
    """What a module gave in the latest pass, and how often it was called by itself, outside of one."""

    levels: list[_Level]
    direct: int


class _Recorder(Hooked):
    """The levels of one model's latest pass.

    Attributes:
        only: passes with (True) or without gradients (False) alone count; None: all.
        watched: layers that do something else in train mode.
    """

    def __init__(self, caller: str, role: str, model: nn.Module, where: Where) -> None:
        super().__init__(caller, role, model, where)
        self.only: bool | None = None
        self.skipped = False
        self.watched = [(name, m) for name, m in self.root.named_modules() if changes_in_train_mode(m)]
        self.levels: list[list[_Level]] = []
        self.direct: list[int] = []
        self.forget()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.skipped = self.only not in (None, torch.is_grad_enabled())
        if self.skipped:
            self.inside = True
            return
        super().begin(args, kwargs)
        self.forget()

    def act(self, i: int, result: Any, repeated: bool) -> None:
        skipped = self.skipped if self.inside else self.only not in (None, torch.is_grad_enabled())
        if repeated or skipped:
            return
        if not self.inside:  # a call of the module itself: the latest counts
            self.levels[i].clear()
            self.direct[i] += 1
        for x in self.where.find(result, self.labels[i]).tensors:
            level = self.where.maps(x, self.labels[i], self.images)
            if torch.compiler.is_compiling() or x.is_inference():  # these do not count writes: a copy
                self.levels[i].append(_Level(level.clone(), None))
            else:
                self.levels[i].append(_Level(level, x._version))

    def forget(self) -> list[_Taken]:
        """What the latest pass has left; nothing of it is kept."""
        taken = [_Taken(*module) for module in zip(self.levels, self.direct, strict=True)]
        self.levels = [[] for _ in self.modules]
        self.direct = [0] * len(self.modules)
        return taken

    def in_train_mode(self) -> str | None:
        """A layer by which the features depend on the batch or on chance."""
        return next((name for name, layer in self.watched if layer.training and _has_effect(layer)), None)

    def checked(self, taken: list[_Taken], since: str = "since the latest take()") -> list[Tensor]:
        """The levels of all modules; RuntimeError unless they are complete, of one pass, and as the modules gave them."""
        role, named = self.role, list(zip(self.where.names, taken, strict=True))
        if missing := [name for name, module in named if not module.levels]:
            how = {None: "", True: " with gradients", False: " without gradients"}[self.only]
            why = (
                "student and teacher are one model: run the teacher's pass under torch.no_grad()"
                if how
                else self.not_run(missing)
            )
            raise RuntimeError(f"capture: the {role}'s {', '.join(map(repr, missing))} has not run{how} {since}; {why}")
        for name, module in named:
            if module.direct > 1:
                raise RuntimeError(
                    f"capture: the {role}'s {name!r} ran {module.direct} times outside of a call of the {role} {since}, so it "
                    f"is not known which calls belong together; call the {role} itself, or take() after every call"
                )
            if any(level.version is not None and level.version != level.tensor._version for level in module.levels):
                raise RuntimeError(
                    f"capture: a later layer has overwritten the features of the {role}'s {name!r} in place; make that layer "
                    "inplace=False (an activation that follows, as a rule), or capture its output instead"
                )
        return [level.tensor for module in taken for level in module.levels]


def _has_effect(layer: nn.Module) -> bool:
    """Not a dropout of rate 0, nor an instance norm that keeps no statistics."""
    rate = next((getattr(layer, name) for name in ("p", "drop_prob", "dropout") if hasattr(layer, name)), 1)
    return rate != 0 and ("InstanceNorm" not in type(layer).__name__ or getattr(layer, "track_running_stats", True))


def _of_side(options: dict[str, Any], role: str) -> dict[str, Any]:
    """The options of the student or the teacher."""
    sides = {name: value for name, value in options.items() if isinstance(value, Mapping)}
    for name, value in sides.items():
        if not set(value) <= {"student", "teacher"}:
            raise ValueError(f"{name}: expected a mapping with the keys 'student' and 'teacher', got {list(value)}")
    defaults = {"prefix_tokens": 0}
    return options | {name: value.get(role, defaults.get(name)) for name, value in sides.items()}
