"""Private names of torch that the package needs, each with its reason."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses import FakeTensor
from torch.fx import _symbolic_trace
from torch.jit import _trace
from torch.utils._pytree import tree_leaves

Model = nn.Module | Callable[..., Any]  # an nn.Module; to a type checker, what torch.compile returns is a callable


def graph_task() -> int:
    """The backward pass that is running now, -1 if none is.

    What runs inside of one is repeated by activation checkpointing, and torch has no public way to ask.
    """
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def in_transforms() -> bool:
    """Whether a transform of torch.func runs, whose tensors have no memory that a kernel could read: operators unwrap them."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def outside_transforms() -> AbstractContextManager[Any]:
    """Out of torch.func's transforms: inside of one, nobody may count calls in a module's buffer."""
    return temporarily_clear_interpreter_stack() if in_transforms() else nullcontext()


def outlived(tensors: Iterable[Tensor]) -> bool:
    """Whether any belongs to a transform of torch.func that is over, and its numbers with it.

    Torch's public functions take such a tensor for an ordinary one.
    """
    if torch.compiler.is_compiling() or in_transforms():
        return False
    return any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)


def tracing(*values: Any) -> bool:
    """Whether torch.export, make_fx, torch.fx, torch.jit.trace or fake tensors run a model without computing anything.

    So it is, too, if all tensors in ``values`` are fake or meta: these compute nothing, also where no trace is active.
    Torch has no public way to ask for all of them. Dynamo's own trace is none of them: what it leaves behind is real.
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.compiler.is_exporting()
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    jit = _trace.is_tracing() or _trace._trace_module_map is not None  # also while it checks its trace
    if fake or jit or _symbolic_trace._is_fx_tracing_flag:
        return True
    leaves = values if len(values) == 1 and isinstance(values[0], Tensor) else tree_leaves(values)  # which takes 4 us
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    return bool(tensors) and all(x.is_meta or isinstance(x, FakeTensor) for x in tensors)


def version(x: Tensor) -> int | None:
    """Count how often ``x`` has been written to; None where torch does not count. Torch has no public way to ask."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def compiled(module: nn.Module) -> nn.Module | None:
    """Unwrap ``torch.compile(module)``, whose submodules go by their own names; None for other modules."""
    return module._modules["_orig_mod"] if "_orig_mod" in module._modules else None  # TorchScript's have no get()
