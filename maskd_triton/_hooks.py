"""Reaching into a model: the levels that its named modules give, found in their outputs and replaced there.

docs/reaching-into-models.md is the design of `attach`, `calibrate`, `FeatureCapture` and `capture.call`.
"""

import copy
import dataclasses
import difflib
import functools
import inspect
import math
import operator
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import EllipsisType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import _checks as check
from ._levels_old import FIELD, Levels, as_list, is_record, labels, mapping_like, pixels_in, sequence_like, tensor_of
from ._torch import graph_task
from .shapes import from_nhwc, from_tokens, pair
from .teacher import FrozenTeacher, named_paths

LAYOUTS = ("nchw", "nhwc", "tokens")
Key = str | int
Step = Key | EllipsisType | list[Key]  # of a path: one part, every part, or several
Output = Step | tuple[Step, ...]
Valid = str | Callable[..., Any]


# Where, and in what layout


@dataclasses.dataclass(frozen=True)
class Where:
    """Which modules, which of their calls, which part of their output, and how it is laid out."""

    names: tuple[str, ...]
    call: int | None = None
    output: Output | None = None
    layout: str | None = None
    grid: tuple[int, int] | None = None
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.call is not None:
            check.count(self.call, "call")
        if self.output is not None and not all(map(_is_step, _steps(self.output))):
            raise TypeError(
                "output: expected a field, a key, a position, ... (every part), a list of parts, or a tuple of those as a "
                f"path, got {self.output!r}"
            )
        if self.layout is not None:
            check.choice(self.layout, "layout", LAYOUTS)
        if self.layout != "tokens" and (self.grid is not None or self.prefix_tokens != 0):
            raise ValueError(f"grid, prefix_tokens: only layout='tokens' has them, got layout={self.layout!r}")
        check.count(self.prefix_tokens, "prefix_tokens")
        if self.grid is not None:
            pair(self.grid, "grid")

    def find(self, result: Any, name: str) -> tuple[Levels, list[Tensor], list[Any] | None]:
        """The levels in what a module returned, in their container, as a list, and their keys; ``name`` is for errors."""
        paths = self._paths(result, name)
        parts = [_at(result, path, name) for path in paths]
        found = parts if self._several() else parts[0]
        try:
            return found, *as_list(found, name)
        except TypeError as error:
            if self.output is None and isinstance(found, Sequence | Mapping):
                raise TypeError(f"{error} (output= names the part that holds the levels)") from None
            raise

    def replaced(self, result: Any, name: str, levels: Levels) -> Any:
        """``result`` with ``levels`` in the place of those that `find` found; the type stays."""
        paths = self._paths(result, name)
        for path, level in zip(paths, levels if self._several() else [levels], strict=True):
            result = _with_part(result, path, name, level)
        return result

    def _several(self) -> bool:
        """Whether every level has a path of its own."""
        return any(isinstance(step, list | EllipsisType) for step in _steps(self.output))

    def _paths(self, result: Any, name: str) -> list[tuple[Key, ...]]:
        """The paths to the levels, or the one to their container."""
        if self.output is None:
            return [(FIELD,) if is_record(result) else ()]
        paths: list[tuple[Key, ...]] = [()]
        for step in _steps(self.output):
            if isinstance(step, EllipsisType):
                paths = [(*path, key) for path in paths for key in _keys(_at(result, path, name), name)]
            else:
                keys = step if isinstance(step, list) else [step]
                paths = [(*path, k if isinstance(k, str) else operator.index(k)) for path in paths for k in keys]
        return paths

    def maps(self, x: Tensor, name: str, images: tuple[int, int] | None, channels: int | None = None) -> Tensor:
        """``x`` as ``[N, C, H, W]``, a view; ValueError that names the layout which fits, where another does."""
        if self.layout is None and channels is None:
            return x
        given = self.layout or "nchw"
        fits = {layout: x.dim() == dim and channels in (None, x.shape[axis]) for layout, (dim, axis) in _AXES.items()}
        others = " or ".join(f"layout={other!r}" for other, fit in fits.items() if fit)
        if not fits[given] and (others or x.dim() != _AXES[given][0]):
            expected = _SHAPES[given].replace("C", str(channels or "C"))
            hint = f"; the shape fits {others}" if others else ""
            raise ValueError(f"{name}: expected {expected} (layout={given!r}), got shape {list(x.shape)}{hint}")
        if given == "nhwc":
            return from_nhwc(x)
        return from_tokens(x[:, self.prefix_tokens :], self._grid(x, name, images)) if given == "tokens" else x

    def restored(self, y: Tensor, x: Tensor) -> Tensor:
        """Maps ``y`` in the layout of ``x``, with its prefix tokens in front."""
        if self.layout == "nhwc":
            return y.permute(0, 2, 3, 1)
        if self.layout != "tokens":
            return y
        tokens = y.flatten(2).transpose(1, 2)
        return torch.cat([x[:, : self.prefix_tokens].to(y.dtype), tokens], 1) if self.prefix_tokens else tokens

    def _grid(self, x: Tensor, name: str, images: tuple[int, int] | None) -> tuple[int, int]:
        """The tokens' rows and columns: as given, or from square patches of the images."""
        tokens = x.shape[1] - self.prefix_tokens
        if self.grid is not None:
            height, width = self.grid
            if height * width != tokens:
                more = x.shape[1] - height * width
                hint = f"; prefix_tokens={more} would fit" if more > 0 else ""
                raise ValueError(
                    f"{name}: expected {self.prefix_tokens} + {height} * {width} tokens (prefix_tokens, grid), "
                    f"got {x.shape[1]}{hint}"
                )
            return height, width
        if images is None:
            raise ValueError(f"{name}: no images [N, C, H, W] among the arguments of the model's call; give grid=(h, w)")
        found = _square_patches(images, tokens)
        if found is None:
            prefix = next((n for n in range(1, 65) if _square_patches(images, x.shape[1] - n)), None)
            hint = "" if prefix is None else f"; prefix_tokens={prefix} would fit"
            raise ValueError(
                f"{name}: {tokens} tokens are no grid of square patches of {images[0]}x{images[1]} images; "
                f"give grid=(h, w){hint}"
            )
        return found


_AXES = {"nchw": (4, 1), "nhwc": (4, 3), "tokens": (3, 2)}  # number of dimensions, and which of them is the channels
_SHAPES = {"nchw": "[N, C, H, W]", "nhwc": "[N, H, W, C]", "tokens": "[N, L, C]"}


def _square_patches(images: tuple[int, int], tokens: int) -> tuple[int, int] | None:
    """The grid of ``tokens`` square patches that fill the images."""
    if tokens < 1:
        return None
    side = math.isqrt(images[0] * images[1] // tokens)
    if side < 1 or images[0] % side or images[1] % side:
        return None
    height, width = images[0] // side, images[1] // side
    return (height, width) if height * width == tokens else None


def _steps(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def _is_step(step: Any) -> bool:
    keys = step if isinstance(step, list) else [step]
    return step is ... or (bool(keys) and all(isinstance(key, str) or check.integer(key) is not None for key in keys))


def _fields(result: Any) -> dict[Any, Any] | None:
    """What ``result`` holds by name: a dataclass, mapping, namedtuple or plain object; None for what has no names."""
    if is_record(result):
        return {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        return dict(result)
    if hasattr(result, "_asdict"):
        return result._asdict()
    if result is None or isinstance(result, Tensor | Sequence):
        return None
    slots = {name for kind in type(result).__mro__ for name in kind.__dict__.get("__slots__", ())} - {"__dict__", "__weakref__"}
    held = {name: getattr(result, name) for name in slots if hasattr(result, name)} | getattr(result, "__dict__", {})
    return held if held or hasattr(result, "__dict__") else None


def _keys(result: Any, name: str) -> list[Key]:
    """Of all that ``result`` holds."""
    fields = _fields(result)
    if isinstance(result, Sequence) and not isinstance(result, str):
        return list(range(len(result)))
    if fields is None:
        raise TypeError(f"{name}: expected a sequence or a mapping of parts (output= has ...), got {type(result).__name__}")
    return [key for key, value in fields.items() if value is not None]


def _at(result: Any, path: tuple[Key, ...], name: str) -> Any:
    for key in path:
        result = _part(result, key, name)
    return result


def _part(result: Any, key: str | int, name: str) -> Any:
    fields = _fields(result)
    if isinstance(key, int) and not (fields and key in fields):
        held = result if isinstance(result, Sequence) else [v for v in (fields or {}).values() if v is not None]
        if isinstance(result, Sequence) or fields is not None:
            if not -len(held) <= key < len(held):
                raise ValueError(f"{name}: expected a part at position {key} (output=), got {len(held)} of them")
            return held[key]
    if fields is None:
        what = "sequence" if isinstance(key, int) else "mapping or dataclass with the field"
        raise TypeError(f"{name}: expected a {what} {key!r}, got {type(result).__name__}")
    if fields.get(key) is None:
        held = ", ".join(f"{k!r} ({type(value).__name__})" for k, value in fields.items())
        raise ValueError(f"{name}: expected levels in the field {key!r} (output=) of {type(result).__name__}, got {held}")
    return fields[key]


def _with_part(result: Any, path: tuple[str | int, ...], name: str, levels: Any) -> Any:
    if not path:
        return levels
    key, *rest = path
    value = _with_part(_part(result, key, name), tuple(rest), name, levels)
    fields = _fields(result)
    if isinstance(key, int) and isinstance(result, Sequence):
        items = list(result)
        items[key] = value
        return sequence_like(result, items)
    if isinstance(key, int) and fields is not None and key not in fields:
        key = [k for k, held in fields.items() if held is not None][key]
    if hasattr(result, "_replace"):
        return result._replace(**{str(key): value})
    if isinstance(result, Mapping) and not is_record(result):
        return mapping_like(result, {key: value})
    result = copy.copy(result)  # dataclasses.replace would run __post_init__ again
    try:
        setattr(result, str(key), value)
    except dataclasses.FrozenInstanceError:
        object.__setattr__(result, str(key), value)
    return result


# Whose, and when


class _Hook:
    """A hook of one module; a copy of that module, deep or by pickle, carries one that does nothing."""

    def __init__(self, module: nn.Module | None = None, act: Callable[..., Any] | None = None) -> None:
        self.module, self.act = module, act

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        return self.act(*arguments) if module is self.module and self.act is not None else None

    def __deepcopy__(self, _memo: Any) -> "_Hook":
        return _Hook()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Hook, ()


class _Exclusive(_Hook):
    """One that replaces its module's output."""


UNREAD = object()  # valid pixels that the pass has not given


class Target:
    """A module whose levels are wanted, and its part of the pass that runs now or ran last.

    A pass is the outermost call of a module that holds this one; a call of the module itself outside of those is ``direct``.
    """

    def __init__(self, name: str, role: str, chain: tuple[nn.Module, ...]) -> None:
        self.name, self.label, self.chain = name, f"output of the {role}'s {name!r}", chain
        self.only: bool | None = None  # passes with (True) or without gradients (False) alone count
        self.depth, self.skipped = 0, False
        self.clear()

    def clear(self) -> None:
        self.calls, self.direct, self.gradient = 0, False, True
        self.images: tuple[int, int] | None = None
        self.valid: Any = UNREAD
        self.whole = False  # whether the pass is a call of the model itself
        self.parts: list[Any] = []

    @property
    def module(self) -> nn.Module:
        return self.chain[-1]

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of no pass, and not yet of a module."""
        fresh = Target.__new__(Target)
        fresh.clear()
        return self.__dict__ | fresh.__dict__ | {"depth": 0, "skipped": False, "chain": ()}


class Hooked:
    """Hooks on the modules that ``where`` names, while the block lasts; nothing of them acts on a copy of the model.

    A subclass says what they do. ``bounds=False``: the caller says where passes begin. ``exclusive``: RuntimeError for a module
    that has such a hook already.
    """

    def __init__(
        self,
        caller: str,
        role: str,
        model: nn.Module,
        where: Where,
        valid: Valid | None = None,
        bounds: bool = True,
        exclusive: bool = False,
    ) -> None:
        self.caller, self.role, self.model, self.where, self.given = caller, role, model, where, valid
        self.task, self.bounds, self.exclusive = -1, bounds, exclusive
        self._stack = ExitStack()
        self.resolve()

    def resolve(self) -> None:
        """Find the modules that the names mean now."""
        self.chains = dict(named_paths(self.model))  # a shared module has several names
        self.targets = [Target(name, self.role, self._chain(name)) for name in self.where.names]
        self.roots = [self.model]
        while isinstance(self.roots[-1], FrozenTeacher):
            self.roots.append(self.roots[-1].model)
        self.valid: Callable[..., Any] | None = None
        self.padding: nn.Module | None = None  # one that pads, and gives the valid pixels
        valid = self.given
        if (
            isinstance(valid, str)
            and valid in self.chains
            and valid not in inspect.signature(self.roots[-1].forward).parameters
        ):
            self.padding = self.chains[valid][-1]
        elif valid is not None:
            self.valid = _reader(valid, self.roots[-1])
        if not torch.compiler.is_compiling():
            for name in (*self.where.names, *([str(valid)] if self.padding else [])):
                self._refuse_deaf(name)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no hooks, not even to remove, and knows of the model alone."""
        return self.__dict__ | {"_stack": ExitStack(), "task": -1, "chains": {}, "roots": [], "valid": None, "padding": None}

    def __enter__(self) -> "Hooked":
        self.task = graph_task()
        for target in self.targets if self.exclusive else ():
            if any(
                isinstance(hook, _Exclusive) and hook.module is target.module for hook in target.module._forward_hooks.values()
            ):
                raise RuntimeError(
                    f"{self.caller}: another learner is attached to the {self.role}'s {target.name!r}; leave that block first"
                )
        with ExitStack() as stack:  # removes hooks if one cannot be set
            for target in self.targets:
                kind = _Exclusive if self.exclusive else _Hook
                hook = kind(target.module, functools.partial(self._output, target))
                # what replaces an output comes first: others, like those by which transformers collects hidden states, see it
                stack.callback(target.module.register_forward_hook(hook, prepend=self.exclusive).remove)
            if self.padding is not None:
                stack.callback(self.padding.register_forward_hook(_Hook(self.padding, self._padded)).remove)
            bounds = {m: None for target in self.targets for m in target.chain if m is not target.module or m in self.roots}
            for module in bounds if self.bounds else ():
                inside = [target for target in self.targets if module in target.chain]
                bound = _Bound(self, module, inside)
                stack.callback(module.register_forward_pre_hook(_Hook(module, bound.begin), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(_Hook(module, bound.end), always_call=True).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def act(self, target: Target, result: Any, number: int | None) -> Any:
        """Sees every call of a target, numbered from 0 in its pass, or None in a recomputation by a backward pass.

        What it returns replaces the result, unless that is None.
        """
        raise NotImplementedError

    def done(self, target: Target) -> None:
        """Follows the end of a pass."""

    def start(self, target: Target, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A new pass, unless it is one that does not count."""
        frozen = isinstance(module, FrozenTeacher) and not module.with_gradient
        gradient = torch.is_grad_enabled() and not frozen
        target.skipped = target.only not in (None, gradient)
        if target.skipped:
            return
        target.clear()
        target.gradient, target.whole = gradient, module in self.roots
        if self.where.layout == "tokens" and self.where.grid is None:
            target.images = _image_size([*args, *kwargs.values()])
        if self.valid is not None and target.whole:
            target.valid = self.valid(*args, **kwargs)

    def _padded(self, _inputs: Any, result: Any) -> None:
        if graph_task() == self.task:
            for target in self.targets:
                if target.whole and not target.skipped:
                    target.valid = pixels_in(result)

    def _output(self, target: Target, _inputs: Any, result: Any) -> Any:
        if graph_task() != self.task:
            return self.act(target, result, None)
        if target.depth == 0 and not (target.direct and target.gradient == torch.is_grad_enabled()):
            self.start(target, target.module, (), {})
            target.direct = target.direct or not target.skipped
        if target.skipped:
            return None
        number = target.calls
        target.calls += 1
        if self.where.call is not None and target.depth == 0:
            raise RuntimeError(
                f"{self.caller}: call={self.where.call} counts within a call of the {self.role}, but {target.name!r} ran "
                f"outside of one; call the {self.role} itself"
            )
        return self.act(target, result, number)

    def _chain(self, name: str) -> tuple[nn.Module, ...]:
        """The model, ..., the submodule of that dotted name; AttributeError with the names that come near."""
        if name not in self.chains:
            inside = [known for known in self.chains if known.endswith(f".{name}")]  # the name before something was wrapped
            near = inside[:5] or difflib.get_close_matches(name, self.chains, n=5, cutoff=0.4)
            own = [child for child in self.chains if child and "." not in child]
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {own}"
            kind = type(self.model).__name__
            raise AttributeError(f"{self.caller}: the {self.role} {kind} has no module {name!r}; {hint}")
        return self.chains[name]

    def _refuse_deaf(self, name: str) -> None:
        """ValueError for a module that runs inside of compiled or scripted code, which does not look for hooks."""
        chain = self.chains[name]
        deaf = next((m for m in chain if _is_compiled(m) or (m is not chain[-1] and _has_compiled_forward(m))), None)
        if deaf is None:
            return
        scripted = isinstance(deaf, torch.jit.ScriptModule)
        kind = deaf.original_name if scripted else type(getattr(deaf, "_orig_mod", deaf)).__name__
        what, way = ("scripted", "torch.jit") if scripted else ("compiled", "torch.compile, and compile it inside the block")
        part = f"'s {name!r} lies inside of a {kind} that" if deaf is not self.model else ""
        raise ValueError(
            f"{self.caller}: the {self.role}{part} is {what} already, and {what} code does not see hooks that "
            f"are added later; give the module as it was before {way}"
        )


class _Bound:
    """A module that holds targets: the outermost of its calls are passes."""

    def __init__(self, hooked: Hooked, module: nn.Module, inside: list[Target]) -> None:
        self.hooked, self.module, self.inside = hooked, module, inside
        self.running = 0  # another hook may raise before a call has begun here, and it ends all the same

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if graph_task() != self.hooked.task:
            return
        self.running += 1
        outermost = [target for target in self.inside if target.depth == 0]
        for target in self.inside:
            target.depth += 1
        for target in outermost:
            self.hooked.start(target, self.module, args, kwargs)

    def end(self, _inputs: Any, result: Any) -> None:
        if graph_task() != self.hooked.task or not self.running:
            return
        self.running -= 1
        for target in self.inside:
            target.depth -= 1
            if target.depth == 0 and not target.skipped and result is not None:  # None: the model raised
                self.hooked.done(target)


def names_of(names: str | Sequence[str]) -> tuple[str, ...]:
    """TypeError unless they are dotted names."""
    given = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, Sequence) else ()
    if not given or not all(isinstance(name, str) for name in given):
        raise TypeError(f"names: expected dotted names of modules, got {names!r}")
    return given


def _is_compiled(module: nn.Module) -> bool:
    """Whether hooks on the module, and on all in it, are not seen."""
    return (
        isinstance(module, torch.jit.ScriptModule) or "_orig_mod" in module._modules or module._compiled_call_impl is not None
    )


def _has_compiled_forward(module: nn.Module) -> bool:
    """Whether hooks in the module are not seen, but its own are."""
    return hasattr(module.forward, "_torchdynamo_orig_callable")


def _image_size(arguments: list[Any]) -> tuple[int, int] | None:
    for x in map(tensor_of, arguments):
        if isinstance(x, Tensor) and x.dim() == 4:
            return x.shape[2], x.shape[3]
    return None


def _reader(valid: Valid, model: nn.Module) -> Callable[..., Any]:
    """A function of the model's call arguments that gives the valid pixels."""
    if not isinstance(valid, str):
        if not callable(valid):
            raise TypeError(
                "valid: expected the name of an argument of forward or of a module that pads, or a function of the arguments, "
                f"got {type(valid).__name__}"
            )
        return valid
    kind, parameters = type(model).__name__, inspect.signature(model.forward).parameters
    if valid not in parameters and all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"valid: {kind}.forward has no argument {valid!r}, nor has the model such a module; it has {list(parameters)}"
        )
    place = list(parameters).index(valid) if valid in parameters else None

    def read(*args: Any, **kwargs: Any) -> Any:
        if valid in kwargs:
            return kwargs[valid]
        if place is None:  # one of **kwargs: whether it is misspelt or among *args, nobody knows
            raise ValueError(f"valid: the {kind} was called without {valid!r}; give it by keyword, None where all pixels count")
        if place < len(args):
            return args[place]
        default = parameters[valid].default
        return None if default is inspect.Parameter.empty else default

    return read


def warn_without_gradient(features: Sequence[Tensor], keys: Sequence[Any] | None, warned: set[str], stacklevel: int) -> None:
    """UserWarning, once per level, for student features that no gradient goes through although they are to be trained."""
    if all(x.requires_grad for x in features):
        return
    for x, name in zip(features, labels(len(features), keys), strict=True):
        if not x.requires_grad and name not in warned:
            warned.add(name)
            warnings.warn(
                f"student{name}: carries no gradient, so the student does not learn from it; usual causes are a detach(), "
                "torch.no_grad(), or a reentrant activation checkpoint around the module (use_reentrant=False)",
                stacklevel=stacklevel + 1,
            )


# Freezing


_FIXED = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase, nn.RReLU)
_RANDOM = re.compile(r"Drop(?:Path|Block|out)|StochasticDepth")  # timm's, transformers' and torchvision's, by their names


class _Found:
    """How a block has found a model, by the ids of its parts, to leave it like that."""

    open: ClassVar[list["_Found"]] = []

    def __init__(self, modules: list[nn.Module]) -> None:
        plain = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
        held = [b for m in modules for b in m._buffers.values() if b is not None and not b.is_inference()]
        self.holders = {id(m): (m, m.with_gradient) for m in modules if isinstance(m, FrozenTeacher)}
        self.training = {id(m): (m, m.training) for m in plain}
        self.parameters = {id(p): (p, p.requires_grad) for m in modules for p in m._parameters.values() if p is not None}
        self.buffers = {id(m): (m, m._buffers.copy()) for m in plain}
        self.values = {id(b): (b, (b.clone(), b._version)) for b in held}
        self.open.append(self)

    def restore(self) -> None:
        """Put everything back, but what a block that lasts longer holds, too: that is left to it."""
        later = self.open[self.open.index(self) + 1 :]
        self.open.remove(self)
        for other in later:
            for mine, others in zip(vars(self).values(), vars(other).values(), strict=True):
                others.update({key: mine.pop(key) for key in mine.keys() & others.keys()})
        for parameter, flag in self.parameters.values():
            if parameter.is_inference():
                with torch.inference_mode():
                    parameter.requires_grad_(flag)
            else:
                parameter.requires_grad_(flag)
        for holder, flag in self.holders.values():
            holder.with_gradient = flag
        for module, flag in self.training.values():
            if module.training != flag:  # nn.Module takes long to set anything
                module.training = flag
        for module, own in self.buffers.values():
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, (value, version) in self.values.values():
                if buffer._version != version:  # a backward pass after the block may need the others untouched
                    buffer.copy_(value)


@contextmanager
def frozen(hooked: Hooked) -> Iterator[None]:
    """The model's parameters without gradients, its normalisation and random layers in eval mode; restored at the end."""
    modules = list(dict.fromkeys(module for chain in hooked.chains.values() for module in chain))
    fixed = [m for m in modules if isinstance(m, _FIXED) or _RANDOM.search(type(m).__name__)]
    compiled = {m for m in modules if _is_compiled(m)}
    deaf = {c[-1] for c in hooked.chains.values() if not compiled.isdisjoint(c)} if compiled else set()  # they see no hooks
    found, watch = _Found(modules), _Watch(hooked)
    try:
        for module in modules:
            if module in deaf:
                continue
            layers = [m for m in fixed if m in deaf] if module in hooked.roots else [module] if module in fixed else []
            if layers or module._parameters:
                hook = _Hook(module, functools.partial(watch.before, layers))
                watch.stack.callback(module.register_forward_pre_hook(hook).remove)
        for parameter, _ in found.parameters.values():
            parameter.requires_grad_(False)
        for layer in fixed:
            if layer.training:
                layer.training = False
        for holder, _ in found.holders.values():
            holder.with_gradient = True
        yield
        watch.left = watch.pending()
    finally:
        if not watch.left:
            watch.stack.close()
        found.restore()


class _Watch:
    """Keeps layers in eval mode; and sees that a checkpointed model is recomputed only while it is frozen and masked."""

    def __init__(self, hooked: Hooked) -> None:
        self.hooked, self.stack = hooked, ExitStack()
        self.graphs: weakref.WeakSet[Any] = weakref.WeakSet()  # hooks by which graphs ask for a recomputation
        self.reentrant = 0  # calls in reentrant checkpoints that backward has not repeated
        self.left = False

    def before(self, layers: list[nn.Module], *_: Any) -> None:
        again = graph_task() != self.hooked.task
        if self.left:
            if again:
                raise RuntimeError(
                    f"{self.hooked.caller}: backward() recomputes the checkpointed {self.hooked.role}, but the block in which "
                    "it was frozen and masked has been left; call backward() inside the block, or turn activation "
                    "checkpointing off"
                )
            self.stack.close()  # a new pass: the old one is done with
            return
        for layer in layers:
            if layer.training:
                layer.training = False
        if not torch.compiler.is_compiling():
            self._count(again)

    def pending(self) -> bool:
        """Whether a backward pass may yet recompute."""
        return self.reentrant > 0 or len(self.graphs) > 0

    def _count(self, again: bool) -> None:
        """A call of a module, which a checkpoint may repeat, or has repeated."""
        if not torch.is_grad_enabled():  # inside of a pass with gradients: a reentrant checkpoint
            self.reentrant += any(target.depth and target.gradient for target in self.hooked.targets)
            return
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        kind = getattr(hooks[0], "__qualname__", "") if hooks is not None else ""
        if kind.startswith("_checkpoint_hook") and hooks is not None:
            self.graphs.add(hooks[1])
        elif again and self.reentrant and not kind.startswith("_recomputation_hook"):
            self.reentrant -= 1
