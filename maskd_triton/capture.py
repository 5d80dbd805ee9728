"""Features of named modules of a student and a teacher, without changes to the models."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._hooks import Hooked, Output, Where, changes_in_train_mode, check_alive
from ._levels import Unpacked
from ._torch import Model, version
from ._warn import warn

__all__ = ["FeatureCapture", "call"]

Names = str | Sequence[str] | Mapping[str, str]
Features = list[Tensor] | dict[Any, Tensor]  # a mapping where every level has a key of its own


class FeatureCapture:
    """Features of named modules of a student and a teacher, as levels that belong together.

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

    A module may return a tensor, or a sequence or mapping of levels, also inside of NestedTensors and ImageLists. Levels of a
    sequence keep their order. Levels of a mapping keep their keys. They come in the order of the teacher's mapping, and the
    student's are matched by key. So ``criterion(*features.take())`` is the criterion of what the modules returned. Inside the
    ``with`` block every pass of the models leaves its levels here. `take` hands over the levels of the latest pass and keeps
    nothing, so no features stay alive after the step. Copies of a model that are made in the block (EMA), recomputations of
    activation checkpoints and traces (``torch.export``, fake or meta tensors) leave nothing here. If both are one model
    (self-distillation), passes with gradients are the student's, and those under ``torch.no_grad()`` the teacher's.

    Code compiled before you enter the block ignores its hooks, and `take` raises. Compile the models inside the block, or use
    `capture.call` inside what is compiled.

    Raises:
        AttributeError: a model has no such module; the message lists near matches.
        ValueError: outputs hold no such levels, when the model runs.
        TypeError: a model that is no module, or TorchScript; outputs of another kind, when the model runs.
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
        student: Model,
        teacher: Model,
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
            ("student", student, Where(of_student, **_of_side(options, "student"))),
            ("teacher", teacher, Where(of_teacher, **_of_side(options, "teacher"))),
        ]
        self._recorders = self._new_recorders()
        self._stack: ExitStack | None = None  # of a block that is entered
        self._warned = False

    def _new_recorders(self) -> list["_Recorder"]:
        """Make recorders for the modules that the names mean now; the models may have changed."""
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

    def take(self) -> tuple[Features, Features]:
        """Hand over the levels of the latest passes, and keep nothing of them.

        Warns (UserWarning), once, if the teacher ran with a batch norm or dropout in train mode.

        Returns:
            The student's levels and the teacher's. Each is a list, or a mapping with the keys of the mappings that the modules
            returned, if every level has a key of its own. Two mappings have one order, the teacher's.

        Raises:
            RuntimeError: a model has not run in the block; `take` cannot tell which calls belong together; a later layer has
                overwritten the features in place; they are of a transform of torch.func that is over.
            ValueError: student and teacher gave different numbers of levels, or levels with different keys.
        """
        if not self._recorders:
            raise RuntimeError("capture: this is a copy; enter it, and run both models inside of its `with` block")
        student, teacher = self._recorders
        taken, taught = student.forget(), teacher.forget()  # also where the student's raises
        students, teachers = student.checked(taken), teacher.checked(taught)
        students = _in_order(students, teachers)
        if not self._warned and teacher.only is None:
            self._warned = teacher.warn_of_train_mode()
        return _held(students), _held(teachers)


def call(
    model: Model,
    names: str | Sequence[str],
    *args: Any,
    output: Output | None = None,
    layout: str | None = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    **kwargs: Any,
) -> tuple[Any, Features]:
    """Call ``model(*args, **kwargs)`` and get its result with the features of its modules.

    Hooks are set and removed within the call. So this also works inside a function that is compiled, and copies of a model
    under DDP or FSDP see their own features. Warns (UserWarning) if features without gradients, a teacher's, were made with a
    batch norm or dropout in train mode.

    Args:
        model: the model to call.
        names: modules by their dotted names.
        output: as for `FeatureCapture`.
        layout: as for `FeatureCapture`.
        grid: as for `FeatureCapture`.
        prefix_tokens: as for `FeatureCapture`.

    Returns:
        What the model returned, and its levels: a list, or a mapping if the modules returned mappings and every level has a
        key of its own.

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
    recorder = _Recorder("capture", "model", model, Where(names, output, layout, grid, prefix_tokens))
    try:
        with recorder:
            recorder.settle(args, kwargs)  # features of fake or meta images are what is asked for
            recorder.begin(args, kwargs)  # the hooks of a compiled model itself do not run
            result = model(*args, **kwargs)
    finally:
        taken = recorder.forget()
    levels = recorder.checked(taken, "in this call")
    if not (torch.compiler.is_compiling() or any(level.tensor.requires_grad for level in levels)):
        recorder.warn_of_train_mode()
    return result, _held(levels)


class _Level(NamedTuple):
    """A level that a module gave.

    Attributes:
        module: the place of the module's name.
        key: of a mapping, alone in a tuple; empty for everything else.
        version: how often ``tensor`` had been written to; None where nobody counts.
    """

    module: int
    key: tuple[Any, ...]
    tensor: Tensor
    version: int | None


@dataclass
class _Taken:
    """The levels that a module gave in the latest pass, and how often it was called outside of one."""

    levels: list[_Level] = field(default_factory=list)
    direct: int = 0


class _Recorder(Hooked):
    """The levels of one model's latest pass.

    Attributes:
        only: passes with (True) or without gradients (False) alone count; None: all.
        watched: layers that do something else in train mode.
        trained: one of these that was in train mode when features were made.
    """

    def __init__(self, caller: str, role: str, model: Model, where: Where) -> None:
        super().__init__(caller, role, model, where)
        self.only: bool | None = None
        self.skipped = False
        self.watched = []
        if role != "student":  # which trains
            self.watched = [(name, m) for name, m in self.root.named_modules() if changes_in_train_mode(m)]
        self.trained: str | None = None
        self.taken = [_Taken() for _ in self.modules]

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().begin(args, kwargs)
        self.skipped = self.only not in (None, torch.is_grad_enabled())
        if not self.skipped:
            self.forget()

    def act(self, i: int, found: Unpacked, repeated: bool) -> None:
        skipped = self.skipped if self.inside else self.only not in (None, torch.is_grad_enabled())
        if repeated or skipped:
            return
        self.watch()
        taken = self.taken[i]
        if not self.inside:  # a call of the module itself: the latest counts
            taken.levels.clear()
            taken.direct += 1
        keys = [()] * len(found.tensors) if found.keys is None else [(key,) for key in found.keys]
        for key, x in zip(keys, found.tensors, strict=True):
            level = self.where.maps(x, self.labels[i], self.images)
            written = version(x)
            taken.levels.append(_Level(i, key, level.clone() if written is None else level, written))  # a copy stays as it is

    def forget(self) -> list[_Taken]:
        """Hand over the levels of the latest pass, and keep none of them."""
        taken, self.taken = self.taken, [_Taken() for _ in self.modules]
        return taken

    def watch(self) -> None:
        """Remember a layer that is in train mode now, while features are made."""
        if self.trained is None:
            trained = (f"{name!r} ({type(m).__name__})" for name, m in self.watched if m.training and _has_effect(m))
            self.trained = next(trained, None)

    def warn_of_train_mode(self) -> bool:
        """Whether there was something to warn of."""
        if self.trained is not None:
            warn(
                f"capture: the {self.role} ran with its {self.trained} in train mode: batch norms then depend on the batch and "
                f"update their statistics, dropouts draw at random; call {self.role}.eval(), or hold it in a FrozenTeacher"
            )
        return self.trained is not None

    def checked(self, taken: list[_Taken], since: str = "since the latest take()") -> list[_Level]:
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
            if any(level.version is not None and level.version != version(level.tensor) for level in module.levels):
                raise RuntimeError(
                    f"capture: a later layer has overwritten the features of the {role}'s {name!r} in place; make that layer "
                    "inplace=False (an activation that follows, as a rule), or capture its output instead"
                )
        levels = [level for module in taken for level in module.levels]
        check_alive([level.tensor for level in levels], "capture", role)
        return levels


def _held(levels: list[_Level]) -> Features:
    """A mapping if every level has a key of its own."""
    keys = [level.key for level in levels]
    if all(keys) and len(set(keys)) == len(keys):
        return {level.key[0]: level.tensor for level in levels}
    return [level.tensor for level in levels]


def _in_order(students: list[_Level], teachers: list[_Level]) -> list[_Level]:
    """Put the student's levels into the teacher's order. Levels of a mapping are matched by key, others keep their order."""
    of, goal = dict(zip(_labels(students), students, strict=True)), _labels(teachers)
    if of.keys() == set(goal):
        return [of[label] for label in goal]
    alike = isinstance(_held(students), dict) == isinstance(_held(teachers), dict)
    if alike and any(level.key for level in (*students, *teachers)):
        keys = [[level.key[0] if level.key else "no key" for level in levels] for levels in (teachers, students)]
        raise ValueError(f"capture: expected the student's levels to have the keys of the teacher's, {keys[0]}, got {keys[1]}")
    if len(students) != len(teachers):
        raise ValueError(f"capture: expected as many levels of both models, got {len(students)} and {len(teachers)}")
    return students  # a mapping and a sequence: who takes them must know both orders


def _labels(levels: list[_Level]) -> list[tuple[int, tuple[Any, ...], int]]:
    """Label each level; a module that runs several times gives several levels of one key."""
    seen: Counter[tuple[int, tuple[Any, ...]]] = Counter()
    labels = []
    for level in levels:
        name = level.module, level.key
        labels.append((*name, seen[name]))
        seen[name] += 1
    return labels


def _has_effect(layer: nn.Module) -> bool:
    """False for a dropout of rate 0, and for an instance norm that keeps no statistics."""
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
