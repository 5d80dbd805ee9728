"""Reading learned tokens: our own state dicts and the three layouts other implementations write."""

import os
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module

_KEY = re.compile(r"(?:^|.*\.)(mask_modules\.\d+\..+)$")
_BARE = re.compile(r"(mask_token|prob\.[02]\.(?:weight|bias))$")
_NESTED = ("state_dict", "maskd_model")  # mmcv's detector checkpoints; the YOLOv5 port

# What torch.load is seen to raise for files that are no checkpoint: its unpickler trusts the bytes it follows.
_DAMAGE = (
    pickle.UnpicklingError,
    struct.error,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    OverflowError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def mask_state(source: Source) -> dict[str, Tensor]:
    """All mask entries of ``source`` as ``mask_modules.{i}.<parameter>``, on the CPU when read from a file.

    ``source`` is a path, a module (``MaskLearner``, ``MaskedDistillLoss``), or a state dict: our own, a whole detector's
    (any prefix before ``mask_modules``, also below a ``"state_dict"`` key), the YOLOv5 port's (below ``"maskd_model"``),
    or one level's bare ``mask_token`` (segmentation). Files are read with ``weights_only=True``: nothing is executed.

    Raises:
        FileNotFoundError, IsADirectoryError: no such file.
        ValueError: a file that torch refuses to load safely; no mask entries; one entry under two prefixes.
        TypeError: any other kind of source.
    """
    state, origin = _state_dict(source)
    for key in _NESTED:
        if isinstance(state.get(key), Mapping):
            state = state[key]
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            continue
        if match := _KEY.match(key):
            name = match[1]
        elif _BARE.match(key):
            name = f"mask_modules.0.{key}"
        else:
            continue
        if name in found:
            raise ValueError(f"pretrained: {origin} holds {name!r} more than once, under different prefixes")
        found[name] = value
    if not found:
        raise ValueError(
            f"pretrained: {origin} holds no mask entries: expected keys like 'mask_modules.0.mask_token', "
            f"got {_listing(map(str, state))}"
        )
    return found


def load_masks(modules: nn.ModuleList, source: Source) -> None:
    """Copy the tokens and mask weights of ``source`` into ``modules``, all or nothing.

    Raises ValueError listing every missing, unexpected, misshapen, sparse or non-finite entry.
    """
    found = mask_state(source)
    expected = {f"mask_modules.{k}": v for k, v in modules.state_dict().items()}
    problems = [f"missing: {k} {list(v.shape)}" for k, v in expected.items() if k not in found]
    problems += [f"unexpected: {k} {list(v.shape)}" for k, v in found.items() if k not in expected]
    for key, value in found.items():
        if key not in expected:
            continue
        if value.shape != expected[key].shape:
            problems.append(f"misshapen: {key} is {list(value.shape)}, expected {list(expected[key].shape)}")
        elif value.is_meta or value.layout != torch.strided:
            problems.append(f"not a dense tensor: {key}")
        elif not value.is_floating_point():
            problems.append(f"wrong dtype: {key} is {value.dtype}, expected floating point")
        elif not torch.isfinite(value.to(expected[key].dtype)).all():
            problems.append(f"not finite: {key}")
    if problems:
        raise ValueError("pretrained: the mask entries do not fit:\n  " + "\n  ".join(problems))
    modules.load_state_dict({k.removeprefix("mask_modules."): v for k, v in found.items()})


def _state_dict(source: Source) -> tuple[Mapping[str, Any], str]:
    if isinstance(source, nn.Module):
        return source.state_dict(), type(source).__name__
    if isinstance(source, Mapping):
        return source, "the state dict"
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"pretrained: expected a path, a state dict or a MaskLearner, got {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        raise IsADirectoryError(f"pretrained: expected a file, got the folder {path}")
    if not path.is_file():
        raise FileNotFoundError(f"pretrained: no such file: {path}")
    with path.open("rb") as file:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except _DAMAGE as error:
            raise ValueError(
                f"pretrained: {path} cannot be loaded safely (weights_only=True): it is damaged, or holds more than "
                "tensors and plain containers"
            ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"pretrained: expected {path} to hold a state dict, got {type(loaded).__name__}")
    return loaded, str(path)


def _listing(names: Any, most: int = 8) -> str:
    names = list(names)
    return str(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
