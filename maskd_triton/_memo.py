"""What was found once, kept for the next call: dicts that do not grow for ever, also where several threads write them."""

from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

MOST = 4096  # endless new sizes must not fill the memory


def remember(found: dict[Key, Value], key: Key, value: Value, most: int = MOST) -> Value:
    """``value``, written to ``found``; the oldest entries above ``most`` go."""
    found[key] = value
    if len(found) > most:
        for oldest in list(found)[:-most]:  # a copy: an iterator fails where another thread writes
            found.pop(oldest, None)
    return value
