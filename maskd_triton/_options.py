"""Modules whose options are checked whenever they are assigned, in the constructor and later."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

Check = Callable[[Any, str], Any]  # of a value and its name: the value to keep, or a TypeError or ValueError


class Options(nn.Module):
    """Base of modules with options.

    Attributes:
        CHECKS: what each option is checked by.
        FIXED: options that parameters and tables are made for; they can be assigned once.
        USED_UP: arguments of the constructor of which the module keeps nothing; they cannot be assigned.
    """

    CHECKS: ClassVar[dict[str, Check]] = {}
    FIXED: ClassVar[frozenset[str]] = frozenset()
    USED_UP: ClassVar[frozenset[str]] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.USED_UP or (name in self.FIXED and name in self.__dict__):
            kind = type(self).__name__
            raise AttributeError(f"{name}: cannot be changed, the {kind}'s tables were made for it; make a new {kind}")
        if name in self.CHECKS:
            value = self.CHECKS[name](value, name)
        super().__setattr__(name, value)
