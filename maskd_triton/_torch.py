"""Private names of torch that the package needs, each with its reason."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


def graph_task() -> int:
    """The backward pass that is running now, -1 if none is.

    What runs inside of one is repeated by activation checkpointing, and torch has no public way to ask.
    """
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def outside_transforms() -> AbstractContextManager[Any]:
    """Out of torch.func's transforms: inside of one, nobody may count calls in a module's buffer."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return nullcontext()
    return temporarily_clear_interpreter_stack()
