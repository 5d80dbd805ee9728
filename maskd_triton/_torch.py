"""Private names of torch that the package needs, each with its reason."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.fx import _symbolic_trace
from torch.jit import _trace


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


def tracing() -> bool:
    """Whether torch.export, make_fx, torch.fx, torch.jit.trace or fake tensors run a model without computing anything.

    Torch has no public way to ask for all of them. Dynamo's own trace is none of them: what it leaves behind is real.
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.compiler.is_exporting()
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    jit = _trace.is_tracing() or _trace._trace_module_map is not None  # also while it checks its trace
    return fake or jit or _symbolic_trace._is_fx_tracing_flag


def compiled(module: nn.Module) -> nn.Module | None:
    """What ``torch.compile(module)`` wraps, whose submodules go by their own names; None for other modules."""
    return module._modules.get("_orig_mod")
