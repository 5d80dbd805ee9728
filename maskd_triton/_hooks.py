"""Reaching into a model: hooks that find levels in what named modules return, or put others there.

docs/reaching-into-models.md tells users what `attach`, `calibrate`, `FeatureCapture` and `capture.call` share.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import _checks as check
from ._levels import Unpacked, is_record, tensor_of, unpack, with_part
from ._torch import Model, compiled, graph_task, outlived, tracing
from .shapes import from_nhwc, from_tokens, pair
from .teacher import FrozenTeacher

Output = str | int
Valid = str | Callable[..., Any]


# Where, and in what layout


@dataclasses.dataclass(frozen=True)
class Where:
    """Which modules, which part of their output, and how it is laid out. A single name may stand for a sequence of one."""

    names: Sequence[str]
    output: Output | None = None
    layout: str | None = None
    grid: tuple[int, int] | None = None
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        names = [self.names] if isinstance(self.names, str) else list(self.names) if isinstance(self.names, Sequence) else []
        if not names or not all(isinstance(name, str) for name in names):
            got = f"a module, {type(self.names).__name__}" if isinstance(self.names, nn.Module) else repr(self.names)
            raise TypeError(f"names: expected dotted names of modules, as in model.named_modules(), got {got}")
        object.__setattr__(self, "names", names)
        if not (self.output is None or isinstance(self.output, str) or check.integer(self.output) is not None):
            raise TypeError(f"output: expected one field, key or position, got {self.output!r}; name a module further inside")
        if self.layout is not None:
            check.choice(self.layout, "layout", list(_AXES))
        if self.layout != "tokens" and (self.grid is not None or self.prefix_tokens != 0):
            raise ValueError(f"grid, prefix_tokens: only layout='tokens' has them, got layout={self.layout!r}")
        check.count(self.prefix_tokens, "prefix_tokens")
        if self.grid is not None:
            pair(self.grid, "grid")

    def find(self, result: Any, label: str, keys: Sequence[Any] | None = None) -> Unpacked:
        """The levels in what a module returned; ``rebuild`` gives the whole result with others in their place."""
        if self.output is not None:
            found = unpack(_part(result, self.output, label), label, keys)
            return found._replace(rebuild=lambda levels: with_part(result, self.output, found.rebuild(levels)))
        try:
            return unpack(result, label, keys)
        except TypeError as error:
            if is_record(result) or isinstance(result, Sequence | Mapping):
                raise TypeError(f"{error} (output= names the part that holds the levels)") from None
            raise

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
                expected = f"{self.prefix_tokens} + {height} * {width} tokens (prefix_tokens, grid)"
                raise ValueError(f"{name}: expected {expected}, got {x.shape[1]}")
            if images is not None and height != width and images[0] * height == images[1] * width:
                raise ValueError(
                    f"{name}: grid=({height}, {width}) does not fit images of {images[0]}x{images[1]} pixels; rows come "
                    f"first, so for square patches give grid=({width}, {height})"
                )
            return height, width
        if images is None:
            raise ValueError(f"{name}: no images [N, C, H, W] among the arguments of the model's call; give grid=(h, w)")
        found = _square_patches(images, tokens)
        if found is None:
            raise ValueError(
                f"{name}: {tokens} tokens are no grid of square patches of {images[0]}x{images[1]} images; give grid=(h, w), "
                "or prefix_tokens=, the number of class and register tokens"
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


def _part(result: Any, key: Output, label: str) -> Any:
    """Get a field, key or position of ``result``; a ValueError lists those that there are."""
    found, sequence = None, isinstance(result, Sequence)
    if isinstance(result, Mapping) and not is_record(result):
        found = result.get(key)
    elif isinstance(key, str):
        found = getattr(result, key, None)
    elif sequence and -len(result) <= key < len(result):
        found = result[key]
    if found is None:
        held = dict(result) if isinstance(result, Mapping) else getattr(result, "__dict__", {})
        names = [f"{name!r} ({type(value).__name__})" for name, value in held.items()]
        shown = f"{len(result)} entries" if sequence else ", ".join(names) or "no such parts"
        raise ValueError(f"{label}: expected levels in output={key!r} of {type(result).__name__}, which has {shown}")
    return found


# Hooks


class _Hook:
    """A hook of one module; a copy of that module, deep or by pickle, carries one that does nothing."""

    def __init__(self, module: nn.Module | None = None, act: Callable[..., Any] | None = None) -> None:
        self.module, self.act = module, act

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        return self.act(*arguments) if module is self.module and self.act is not None else None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Hook, ()


class Hooked:
    """Hooks on the modules that ``where`` names, while the block lasts.

    A pass is a call of the model: `begin` starts it, `end` ends it. A subclass says in `act` what becomes of an output.

    Attributes:
        modules: those that ``where`` names.
        keys: of each module, the keys that a mapping of levels must have; None: any.
        inside: a pass is running. A module that runs outside of one was called by itself.
        images: height and width of the images of the pass, which a grid of tokens is compared with or made of.
        arguments: of the model's call, until ``valid`` has read the valid ``pixels`` in them.
    """

    FIRST: ClassVar[bool] = False  # whether `act` runs before other hooks, which then see what it puts into the output

    def __init__(self, caller: str, role: str, model: Model, where: Where, valid: Valid | None = None) -> None:
        self.caller, self.role, self.where = caller, role, where
        if not isinstance(model, nn.Module):
            raise TypeError(f"{caller}: {role}: expected an nn.Module, got {type(model).__name__}")
        self.model, self.root = model, looked_through(model)
        self._check_script("", self.root)
        self.modules = [self._module(name) for name in where.names]
        self.labels = [f"output of the {role}'s {name!r}" for name in where.names]
        self.keys: Sequence[Sequence[Any] | None] = [None] * len(self.modules)
        self.read = None if valid is None else _reader(valid, self.root)
        self.arguments: tuple[Any, Any] | None = None
        self.pixels: Any = None
        self.images: tuple[int, int] | None = None
        self.inside = False
        self.stack = ExitStack()

    def __enter__(self) -> "Hooked":
        self.settle()
        begin, end = _Hook(self.root, self._begin), _Hook(self.root, self._end)
        with ExitStack() as stack:  # removes hooks if one cannot be set, as on TorchScript
            for i, module in enumerate(self.modules):
                hook = _Hook(module, functools.partial(self._output, i))
                stack.callback(module.register_forward_hook(hook, prepend=self.FIRST).remove)
            stack.callback(self.root.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(self.root.register_forward_hook(end, with_kwargs=True, always_call=True).remove)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
        self.arguments = self.pixels = None

    def settle(self, *values: Any) -> None:
        """Note in which recomputation or trace the block itself is, if any; ``values``: what the model will be called with."""
        self.context = graph_task(), tracing(*values)

    def act(self, i: int, found: Unpacked, repeated: bool) -> Any:
        """Give what the i-th module returns in place of the levels that were ``found`` in its output; None: these.

        ``repeated``: a checkpoint recomputes the call in the backward pass.
        """
        raise NotImplementedError

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass begins."""
        self.inside, self.images = True, None
        if self.where.layout == "tokens":
            self.images = _image_size([*args, *kwargs.values()])
        if self.read is not None:
            self.arguments = args, kwargs

    def end(self, result: Any) -> None:
        """A pass is over; ``result`` is None if it raised."""
        self.inside = False

    def valid(self, name: str, repeated: bool) -> Any:
        """The valid pixels of the pass, read when its first level arrives: the model may have padded the images by then."""
        if self.read is None:
            return None
        if not (self.inside or repeated):
            raise RuntimeError(
                f"{self.caller}: valid= is read in a call of the {self.role}, but {name!r} ran outside of one; call the "
                f"{self.role} itself, compiled by {self.role}.compile() rather than torch.compile({self.role})"
            )
        if self.arguments is not None:
            self.pixels, self.arguments = self.read(*self.arguments), None
        return self.pixels

    def not_run(self, names: Sequence[str]) -> str:
        """Why modules of these names have not run, and what to do."""
        where = (
            f"run the {self.role} inside the `with` block, and neither in code that was compiled before it nor in a trace "
            "(torch.export, make_fx, fake or meta tensors)"
        )
        parts = ((name, looked_through(self._module(name))) for name in names)
        children = [repr(f"{name}.{child}".lstrip(".")) for name, part in parts for child, _ in part.named_children()]
        if not children:
            return where
        return f"{where}; if a part is not called, but its children are, as by torch.fx, name one of them, like {children[-1]}"

    def _elsewhere(self, *values: Any) -> bool:
        """Whether what runs now, with these tensors, is a trace or a recomputation, of which no pass is made."""
        return (graph_task(), tracing(*values)) != self.context

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._elsewhere(args, kwargs):
            self.begin(args, kwargs)

    def _end(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not self._elsewhere(args, kwargs):
            self.end(result)

    def _output(self, i: int, _inputs: Any, result: Any) -> Any:
        task, traced = self.context
        if tracing() and not traced:  # then nobody knows what an output is
            return None
        found = self.where.find(result, self.labels[i], self.keys[i])
        if tracing(found.tensors) != traced:
            return None
        return self.act(i, found, graph_task() != task)

    def _check_script(self, name: str, module: nn.Module) -> None:
        """TypeError where hooks cannot be set on the way to the module of that name."""
        if isinstance(looked_through(module), torch.jit.ScriptModule):
            what = f"the {self.role}'s {name!r}" if name else f"the {self.role}"
            raise TypeError(
                f"{self.caller}: {what} is TorchScript, which takes no hooks; give the model that it was made of, or wrap it "
                "in a module that returns its features"
            )

    def _module(self, name: str) -> nn.Module:
        """The submodule of that dotted name; AttributeError with the names that come near."""
        module = self.root
        try:
            for step in name.split(".") if name else ():
                module = looked_through(module).get_submodule(step)
                self._check_script(name, module)
            return module
        except AttributeError:
            known = [path for path, _ in self.root.named_modules()]
            inside = [path for path in known if path.endswith(f".{name}")]  # the name before something was wrapped
            near = inside[:5] or difflib.get_close_matches(name, known, n=5, cutoff=0.4)
            own = [child for child, _ in self.root.named_children()]
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {own}"
            kind = type(self.root).__name__
            raise AttributeError(f"{self.caller}: the {self.role} {kind} has no module {name!r}; {hint}") from None


def check_alive(tensors: Iterable[Tensor], caller: str, role: str) -> None:
    """RuntimeError for what a transform of torch.func has left behind."""
    if outlived(tensors):
        raise RuntimeError(
            f"{caller}: the {role} ran inside of a transform of torch.func (vmap, grad, functionalize), which is over, and its "
            f"features with it; read them inside of it, or call the {role} outside"
        )


def looked_through(module: nn.Module) -> nn.Module:
    """Unwrap a `FrozenTeacher` or a compiled module; other modules are returned unchanged."""
    inner = module.model if isinstance(module, FrozenTeacher) else compiled(module)
    return module if inner is None else looked_through(inner)


def _image_size(arguments: list[Any]) -> tuple[int, int] | None:
    for x in map(tensor_of, arguments):
        if isinstance(x, Tensor) and x.dim() == 4:
            return x.shape[2], x.shape[3]
    return None


def _reader(valid: Valid, model: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """A function of the model's call arguments that gives the valid pixels."""
    if not isinstance(valid, str):
        if not callable(valid):
            raise TypeError(
                "valid: expected the name of an argument of forward, or a function of its arguments, "
                f"got {type(valid).__name__}"
            )
        return lambda args, kwargs: valid(*args, **kwargs)
    kind, signature = type(model).__name__, inspect.signature(model.forward)
    parameters = signature.parameters
    if valid not in parameters and all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(f"valid: {kind}.forward has no argument {valid!r}; it has {list(parameters)}")

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if valid in kwargs:
            return kwargs[valid]
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if valid not in bound.arguments:  # one of **kwargs: whether it is misspelt or among *args, nobody knows
            raise ValueError(f"valid: the {kind} was called without {valid!r}; give it by keyword, None where all pixels count")
        return bound.arguments[valid]

    return read


# Freezing


_FIXED = re.compile(
    r"(?<!Frozen)BatchNorm|InstanceNorm|Drop(?:Path|Block|out)|StochasticDepth|MultiheadAttention|RNNBase|RReLU"
)


def changes_in_train_mode(module: nn.Module) -> bool:
    """Whether it is of a kind that normalises by the batch or draws at random in train mode, by the names of its classes."""
    return any(_FIXED.search(kind.__name__) for kind in type(module).__mro__)


def _all_modules(model: nn.Module) -> list[nn.Module]:
    """Its modules, and those that a `FrozenTeacher` in it holds."""
    held = [m.model for m in model.modules() if isinstance(m, FrozenTeacher)]
    return [*model.modules(), *(m for inner in held for m in _all_modules(inner))]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Its parameters without gradient, its normalisation and random layers in eval mode; as they were afterwards.

    Layers stay in eval mode although the model is switched to train mode, as torchvision's detectors must be to return losses.
    """
    modules, root = _all_modules(model), looked_through(model)
    holders = [(m, m.with_gradient) for m in modules if isinstance(m, FrozenTeacher)]
    trained = [p for m in modules for p in m.parameters(recurse=False) if p.requires_grad]
    training = [(m, m.training) for m in modules if hasattr(m, "training")]  # frozen TorchScript has none
    fixed = [m for m in modules if changes_in_train_mode(m)]
    handles = []
    try:
        for layer in fixed:
            handles.append(layer.register_forward_pre_hook(_Hook(layer, functools.partial(_to_eval, [layer]))))
        # also before the model runs: layers in compiled code do not see their hooks
        handles.append(root.register_forward_pre_hook(_Hook(root, functools.partial(_to_eval, fixed))))
        _to_eval(fixed)
        for parameter in trained:
            parameter.requires_grad_(False)
        for holder, _ in holders:
            holder.with_gradient = True
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            with torch.inference_mode(parameter.is_inference()):
                parameter.requires_grad_(True)
        for holder, flag in holders:
            holder.with_gradient = flag
        for module, flag in training:
            if module.training != flag:
                module.training = flag


def _to_eval(layers: Sequence[nn.Module], *_: Any) -> None:
    for layer in layers:
        if layer.training:  # nn.Module takes long to set anything
            layer.training = False
