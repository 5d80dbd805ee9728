"""Learned tokens in files. Reads our layout and the layouts of three other implementations, and writes ours."""

import os
import pickle
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks as check
from ._warn import warn
from .tables import COMPOSED, ENTRIES, STATISTICS, TOKEN_STD, WEIGHTING, LevelTables, as_small_as_drawn, fault

__all__ = ["load_masks", "mask_state", "save_masks"]

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module

_KEY = re.compile(r"(?:^|.*\.)(mask_modules\.\d+\..+)$")
_NESTED = ("state_dict", "maskd_model")  # mmcv's detector checkpoints; the YOLOv5 port

# What torch.load raises for what weights_only=True refuses, for damaged files, and for those that are no checkpoint at all
_UNREADABLE = (pickle.UnpicklingError, EOFError, LookupError, OSError, RuntimeError)


def mask_state(source: Source) -> dict[str, Tensor]:
    """Read the tokens and mask weights that a source holds.

    Args:
        source: a module (`MaskLearner` or `MaskedDistillLoss`), a state dict, or the path of one. A state dict may be our own;
            a whole detector's, with any prefix before ``mask_modules``, also below a ``"state_dict"`` key; the YOLOv5
            port's, below ``"maskd_model"``; or one level's bare entries, such as segmentation's ``mask_token``. Files that end
            in ``.safetensors`` are read by safetensors, others by torch with ``weights_only=True``: nothing in them is
            executed.

    Returns:
        Tensors by their names ``mask_modules.{level}.<parameter>``, on the CPU when read from a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be loaded safely, with torch's reason and what to do about it; no mask entries, with the
            inner keys that hold some; one entry under two prefixes.
        TypeError: any other kind of source; entries that are not tensors.
        ModuleNotFoundError: a ``.safetensors`` file without the safetensors package.

    Examples:
        >>> from maskd_triton import MaskLearner
        >>> from maskd_triton.checkpoints import mask_state
        >>> {name: list(x.shape) for name, x in mask_state(MaskLearner([8, 16], weight_mask=False)).items()}
        {'mask_modules.0.mask_token': [6, 8], 'mask_modules.1.mask_token': [6, 16]}
    """
    state, origin = _state_dict(source)
    return _found(_place(state), state, origin)


def _place(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the mapping with mask entries: the state dict, or the first of the known mappings in it."""
    inner = (state[key] for key in _NESTED if isinstance(state.get(key), Mapping))
    return next((place for place in (state, *inner) if any(_mask_entries(place))), state)


def _found(place: Mapping[str, Any], state: Mapping[str, Any], origin: str) -> dict[str, Tensor]:
    """`mask_state` of a place in a state dict."""
    found: dict[str, Tensor] = {}
    for name, value in _mask_entries(place):
        if not isinstance(value, Tensor):
            raise TypeError(f"pretrained: {origin}: {name}: {fault(name, value)}")
        if name in found:
            raise ValueError(
                f"pretrained: {origin} holds {name!r} more than once, under different prefixes; pass one of them alone"
            )
        found[name] = value
    if not found:
        keys = [str(key) for key in state]
        more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
        raise ValueError(
            f"pretrained: {origin} holds no mask entries: expected keys like 'mask_modules.0.mask_token', got {keys[:4]}{more}"
            f"{_elsewhere(state)}"
        )
    return found


def load_masks(modules: nn.ModuleList, source: Source) -> None:
    """Copy the tokens and mask weights of ``source`` into ``modules``.

    A criterion's modules compose their tables from a learner's entries, or copy the tables of another criterion. Warns
    (UserWarning) about tokens that are no larger than as initialised.

    Args:
        modules: the ``mask_modules`` of a learner or criterion.
        source: as for `mask_state`.

    Raises:
        ValueError: entries that do not fit, with what the source holds and what is expected; values that are not finite; for a
            criterion, statistics (``standardize=True``) that were never gathered; a criterion as the source of a learner;
            ``modules`` on the meta device.

    Examples:
        >>> import torch
        >>> from maskd_triton import MaskedDistillLoss, MaskLearner
        >>> from maskd_triton.checkpoints import load_masks
        >>> learner = MaskLearner(16)
        >>> _ = torch.nn.init.normal_(learner.mask_modules[0].mask_token)  # in place of stage 1
        >>> criterion = MaskedDistillLoss(16, pretrained=learner)
        >>> load_masks(criterion.mask_modules, learner)
    """
    own = modules.state_dict()
    if any(x.is_meta for x in own.values()):
        raise ValueError(
            "pretrained: tensors on the meta device hold no values; build the module without pretrained= there, and load the "
            "tokens once it has memory (to_empty): checkpoints.load_masks(module.mask_modules, pretrained), or load_state_dict"
        )
    state, origin = _state_dict(source)
    place = _place(state)
    found = _found(place, state, origin)
    composed = any(key.split(".", 2)[2] in COMPOSED for key in found)
    if composed and not all(isinstance(level, LevelTables) for level in modules):
        raise ValueError(
            "pretrained: these are the tables of a MaskedDistillLoss, composed of tokens and mask weights that a learner "
            f"cannot get back; pass the MaskLearner or the file that it saved{_elsewhere(state, place)}"
        )
    try:
        modules.load_state_dict({key.removeprefix("mask_modules."): value for key, value in found.items()})
    except RuntimeError as error:
        held, expected = _contents(found), _contents({f"mask_modules.{key}": x for key, x in own.items()})
        unlike = " and ".join(f"{option}=" for option in held if held[option] != expected[option])
        advice = f"Give the {unlike} that these tokens were learned with, or other tokens" if unlike else "Not all entries fit"
        raise ValueError(
            f"pretrained: {origin} holds {', '.join(held.values())}; expected {', '.join(expected.values())}. {advice}"
            f"{_elsewhere(state, place)}\n{error}"
        ) from error
    if not composed:
        _warn_if_untrained(found, "pretrained")


def _contents(found: Mapping[str, Tensor]) -> dict[str, str]:
    """Describe what `mask_state` gave, by the option that says so: ``"2 levels of 4, 6 channels"``, ``"3 tokens"``, ..."""
    levels = list(_by_level(found).values())
    tokens = [level.get("mask_token", torch.empty(0)) for level in levels]
    num_tokens, channels = zip(*(x.shape if x.dim() == 2 else "??" for x in tokens), strict=True)
    weighted, standardised = (any(not names.isdisjoint(level) for level in levels) for names in (WEIGHTING, STATISTICS))
    return {
        "channels": f"{check.counted(len(levels))} of {_listed(channels, 'channel')}",
        "num_tokens": _listed(num_tokens, "token"),
        "weight_mask": f"{'with' if weighted else 'no'} mask weights",
        "standardize": f"{'' if standardised else 'not '}standardised",
    }


def _listed(numbers: Sequence[Any], noun: str) -> str:
    """``"8, 16, 16 channels"``; once if they are all alike."""
    shown = numbers if len(set(numbers)) > 1 else numbers[:1]
    return f"{', '.join(map(str, shown))} {noun}{'' if list(shown) == [1] else 's'}"


def _by_level(found: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The entries of every level, of what `mask_state` gives, by their names in a level."""
    levels: dict[int, dict[str, Tensor]] = {}
    for key, value in found.items():
        _, level, name = key.split(".", 2)
        levels.setdefault(int(level), {})[name] = value
    return dict(sorted(levels.items()))


def _mask_entries(state: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Find the entries that belong to masks, by the names of `mask_state`."""
    for key, value in state.items():
        if not isinstance(key, str):
            continue
        if match := _KEY.match(key):
            yield match[1], value
        elif key in ENTRIES and "mask_token" in state:
            yield f"mask_modules.0.{key}", value


def _elsewhere(held: Any, looked_at: Any = None) -> str:
    """Say, for an error, where else in the containers of a source there are mask entries."""
    places = list(_inner_keys(held, "", {id(held), id(looked_at)}))
    return f"; there are mask entries under {', '.join(places)}: pass what it holds there" if places else ""


def _inner_keys(held: Any, path: str, seen: set[int]) -> Iterator[str]:
    """Find the places inside of ``held`` with mask entries, such as ``['model']['ema']``; no container is visited twice."""
    for key, inner in held.items() if isinstance(held, Mapping) else enumerate(held) if isinstance(held, list | tuple) else ():
        if not isinstance(inner, Mapping | list | tuple | nn.Module) or id(inner) in seen:
            continue
        seen.add(id(inner))
        state = inner.state_dict() if isinstance(inner, nn.Module) else inner
        if isinstance(state, Mapping) and any(hasattr(value, "shape") for _, value in _mask_entries(state)):
            yield f"{path}[{key!r}]"
        else:
            yield from _inner_keys(state, f"{path}[{key!r}]", seen)


def _state_dict(source: Source) -> tuple[Mapping[str, Any], str]:
    if isinstance(source, nn.Module):
        return source.state_dict(), type(source).__name__
    if isinstance(source, Mapping):
        return source, "the state dict"
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"pretrained: expected a path, a state dict or a MaskLearner, got {type(source).__name__}{_elsewhere(source)}"
        )
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"pretrained: no such file: {path}")
    loaded = _read_safetensors(path) if _is_safetensors(path) else _read(path)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"pretrained: expected {path} to hold a state dict, got {type(loaded).__name__}{_elsewhere(loaded)}")
    return loaded, str(path)


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        if pickled := re.search(r"GLOBAL maskd_triton\.\w+\.(\w+)", str(error.__context__ or error)):
            raise ValueError(
                f"pretrained: {path} holds a whole {pickled[1]}, which weights_only=True refuses to load; write the tokens "
                "with learner.save(path), or, if you trust this file, pass torch.load(path, weights_only=False)"
            ) from error
        raise ValueError(
            f"pretrained: {path} cannot be loaded with weights_only=True: {error.__context__ or error!r}. It is damaged, no "
            "checkpoint of torch, or holds more than tensors, such as numpy arrays and numbers. If you trust it, load it once "
            "with torch.load(..., weights_only=False), or numpy.load, and save its state dict alone, with arrays as tensors "
            "(torch.from_numpy)"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    package = _safetensors()
    content = path.read_bytes()  # not mapped: a file cut short while it is read would end the process
    try:
        return package.torch.load(content)
    except package.SafetensorError as error:
        raise ValueError(f"pretrained: {path} is damaged, or no safetensors file: {error}") from error


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix.lower() == ".safetensors"


def _safetensors() -> ModuleType:
    """The safetensors package, imported on first use."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a .safetensors file needs the safetensors package: pip install safetensors", name="safetensors"
        ) from error
    return safetensors


def save_masks(modules: nn.ModuleList, path: str | os.PathLike[str]) -> None:
    """Write the tokens and mask weights of ``modules`` as CPU tensors ``mask_modules.{level}.<parameter>``.

    An existing file is replaced in one step once the new one is on disk: a process killed while saving leaves the old file
    as it was, and at worst a ``.tmp`` file beside it. A symbolic link is kept, and the file it leads to is replaced. Warns
    (UserWarning) about tokens that are no larger than as initialised.

    Args:
        modules: the ``mask_modules`` of a learner or criterion.
        path: the file. ``.safetensors`` at its end asks for safetensors' format; others are written by ``torch.save``.
            `mask_state` reads both.

    Raises:
        FileNotFoundError: no such folder.
        IsADirectoryError: ``path`` is a folder.
        ModuleNotFoundError: a ``.safetensors`` path without the safetensors package.

    Examples:
        >>> import os, tempfile
        >>> import torch
        >>> from maskd_triton import MaskLearner
        >>> from maskd_triton.checkpoints import mask_state, save_masks
        >>> learner = MaskLearner(16, weight_mask=False)
        >>> _ = torch.nn.init.normal_(learner.mask_modules[0].mask_token)  # in place of stage 1
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_masks(learner.mask_modules, os.path.join(folder, "tokens.pt"))
        ...     list(mask_state(os.path.join(folder, "tokens.pt")))
        ['mask_modules.0.mask_token']
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"save: no such folder: {target.parent}")
    package = _safetensors() if _is_safetensors(path) else None
    # copies: safetensors refuses channels_last and shared memory, and torch writes all of the memory a view is part of
    state = {
        f"mask_modules.{key}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in modules.state_dict().items()
    }
    _warn_if_untrained(state, "save")
    unfinished = target.with_name(f".maskd-{secrets.token_hex(8)}.tmp")  # the same file system: replacing is one step
    try:
        with unfinished.open("xb") as file:
            if package:
                file.write(package.torch.save(state, metadata={"format": "pt"}))
            else:
                torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _warn_if_untrained(found: Mapping[str, Tensor], name: str) -> None:
    """Warn of what `mask_state` gives; a criterion's tables were asked about when they were composed."""
    small = [
        i for i, level in _by_level(found).items() if not COMPOSED & level.keys() and as_small_as_drawn(level["mask_token"])
    ]
    if small:
        where = f"level{'' if len(small) == 1 else 's'} {', '.join(map(str, small))}"
        warn(
            f"{name}: the tokens of {where} are no larger than as initialised, N(0, {TOKEN_STD}^2): "
            "untrained ones give masks of about 0.5 and half a plain feature MSE. Check that stage 1 trained them "
            "(learner.parameters() in the optimizer) and for long enough"
        )
