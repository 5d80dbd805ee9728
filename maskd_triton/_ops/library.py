"""How operators are registered, when they are called through torch's dispatcher, and what their functions have in common.

Defined with ``torch.library.Library`` rather than ``custom_op``, whose wrappers flatten every list several times, which takes
longer than all else on the host (``python -m bench.host``).
"""

import functools
import importlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters, temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .._checks import are_plain

Implementation = Callable[..., Any]
NAMESPACE = "maskd_triton"  # of the operators; a build for the Hugging Face Hub has one of its own (bench/hub.py)


class _Registry:
    """The operators of this process; each calls the latest function that was registered under its name."""

    def __init__(self) -> None:
        self.library = torch.library.Library(NAMESPACE, "DEF")
        self.functions: dict[str, Implementation] = {}
        self.fakes: dict[str, Implementation] = {}
        self.derivatives: dict[str, Implementation] = {}


def _registry() -> _Registry:
    """Kept with torch's operators, which survive this module: a second import (a notebook, a reloader) finds it there."""
    kept = vars(getattr(torch.ops, NAMESPACE))
    if "registry" not in kept:
        kept["registry"] = _Registry()
    return kept["registry"]


def operator(signature: str, fake: Implementation) -> Callable[[Implementation], Any]:
    """Registers the decorated function as ``torch.ops.maskd_triton.<its name>``, on every device.

    ``signature``: arguments and returns as in a schema; ``fake``: what the operator returns for tensors without data.
    """

    def decorator(function: Implementation) -> Any:
        name, registry = function.__name__, _registry()
        new = name not in registry.functions
        registry.functions[name], registry.fakes[name] = function, fake
        if new:
            registry.library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
            registry.library.impl(name, lambda *args: registry.functions[name](*args), "CompositeExplicitAutograd")
        result = getattr(getattr(torch.ops, NAMESPACE), name).default
        if new:
            torch.library.register_fake(result.name(), lambda *args: registry.fakes[name](*args), lib=registry.library)
            torch.library.register_vmap(result, functools.partial(_one_by_one, result), lib=registry.library)
        _FUNCTIONS[result] = function
        return result

    return decorator


_FUNCTIONS: dict[Any, Implementation] = {}


def differentiable(operator: Any, function: Implementation) -> None:
    """In an exported graph only the operator is left: there, ``function`` of the same arguments gives it its gradient."""
    name, registry = operator.name().split("::")[1], _registry()
    new = name not in registry.derivatives
    registry.derivatives[name] = function

    def dispatch(*args: Any) -> Any:
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in _tensors_in(args))
        if wanted and not torch.compiler.is_exporting():
            return registry.derivatives[name](*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    if new:
        registry.library.impl(name, dispatch, "Autograd")


def _one_by_one(operator: Any, info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """The operator over a dimension that ``torch.vmap`` adds: one call for each entry."""
    leaves, structure = pytree.tree_flatten(args)
    dims = pytree.tree_leaves(in_dims, is_leaf=lambda dim: dim is None)
    results = []
    for i in range(info.batch_size):
        taken = [x if dim is None else x.select(dim, i) for x, dim in zip(leaves, dims, strict=True)]
        results.append(operator(*pytree.tree_unflatten(taken, structure)))
    stacked = pytree.tree_map(lambda *each: torch.stack(each), *results)
    return stacked, pytree.tree_map(lambda _: 0, stacked)


def needs_dispatcher(tensors: Iterable[Tensor]) -> bool:
    """True under torch.compile, under a dispatch mode, inside torch.func, or for tensor subclasses.

    Otherwise an operator's function is called as it is: the dispatcher converts every list of tensors four times a pass, which
    takes longer than all else on the host.
    """
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or not are_plain(tensors)
    )


def call(operator: Any, maps: Iterable[Tensor], *args: Any) -> Any:
    """``operator(*args)``, through the dispatcher where ``maps`` need it."""
    return (operator if needs_dispatcher(maps) else _FUNCTIONS[operator])(*args)


class Function(torch.autograd.Function):
    """An operator that is differentiable once, in reverse; inside torch.func, too."""

    generate_vmap_rule = True

    @classmethod
    def call(cls, tensors: Sequence[Tensor], *args: Any) -> Any:
        """``apply``; gradients reach those ``tensors`` that are arguments themselves, not entries of one."""
        if torch.compiler.is_compiling():
            # without gradients, dynamo would take the first argument of this forward for a context; an exported graph has the
            # operator alone, which brings its gradient, and apply would export it as one without
            wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
            return cls.apply(*args) if wanted and not torch.compiler.is_exporting() else cls.forward(*args)
        if forward_ad._current_level >= 0 and _in_forward_mode(args):
            raise NotImplementedError(
                "maskd_triton: forward-mode derivatives (jvp, jacfwd, hessian, forward_ad) are not supported; use backward(), "
                "torch.autograd.grad, or torch.func.grad, vjp or jacrev"
            )
        if needs_dispatcher(tensors):
            return cls.apply(*args)
        # what apply does for torch.func alone takes 60 us
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def _tensors_in(args: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]


def _in_forward_mode(args: Any) -> bool:
    if any(level.key() == TransformType.Jvp for level in retrieve_all_functorch_interpreters()):
        return True
    return any(forward_ad.unpack_dual(x).tangent is not None for x in _tensors_in(args))


class _DifferentiableOnce(Function):
    """The first ``count`` tensors as they are, made to depend on all the others; to differentiate that is an error."""

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{NAMESPACE}::{ctx.operator} has no derivative: the loss can be differentiated once only")


_Backward = Callable[..., tuple[Tensor | None, ...]]


def once_differentiable(name: str) -> Callable[[_Backward], _Backward]:
    """Torch's decorator of this name makes the gradient a silent constant wherever the incoming one needs no gradient."""

    def decorator(backward: _Backward) -> _Backward:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if torch.compiler.is_compiling():
                return backward(ctx, *grads)
            if any(torch._C._functorch.is_legacy_batchedtensor(x) for x in grads if x is not None):
                raise NotImplementedError(
                    "maskd_triton: batches of gradients (is_grads_batched=True, vectorize=True) are not supported; use "
                    "torch.func.vjp, vmap or jacrev"
                )
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                results = backward(ctx, *grads)
            present, inputs = ([x for x in xs if x is not None] for xs in (results, grads))
            tensors = [*present, *inputs, *ctx.saved_tensors]
            checked = iter(_DifferentiableOnce.call(tensors, name, len(present), *tensors))
            return tuple(None if x is None else next(checked) for x in results)

        return wrapper

    return decorator


def graph_task() -> int:
    """The backward pass that is running now, -1 if none is. What runs inside of one is recomputed: activation checkpointing."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


@functools.cache
def kernels(stage: str) -> ModuleType:
    """The Triton launchers of a stage, imported on first use: the package itself must work without triton."""
    try:
        launchers = importlib.import_module(f"..kernels.{stage}", __package__)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            'impl="triton" needs the triton package, which is not installed: install it, or pass impl="eager"',
            name="triton",
        ) from error
    if os.environ.get("MASKD_TRITON_AUTOTUNE") == "1":
        importlib.import_module("..kernels.autotune", __package__).enable()
    return launchers


def in_lists(tensors: Iterable[Tensor], lengths: Iterable[int]) -> list[list[Tensor]]:
    """The flat ``tensors`` as lists of these lengths."""
    left = iter(tensors)
    return [list(itertools.islice(left, length)) for length in lengths]


def outside_transforms(counter: Tensor) -> AbstractContextManager[Any]:
    """Out of torch.func's transforms, which let nobody write to a tensor that they do not know, as a module's counter."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return nullcontext()
    known = torch._C._functorch.is_functorch_wrapped_tensor(counter)
    return nullcontext() if known else temporarily_clear_interpreter_stack()
