"""Learned tokens in files: writes our layout, and reads ours and those of three other implementations."""

import os
import pickle
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _checks as check
from ._warn import warn
from .tables import (
    COMPOSED,
    ENTRIES,
    SCALES,
    STATISTICS,
    TOKEN_STD,
    WEIGHTING,
    LevelTables,
    as_small_as_drawn,
    fault,
    several_scales,
)

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
    """Where mask entries are looked for: the first mapping with some, of the state dict and those known to be in it."""
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
    """Copy the tokens and mask weights of ``source`` into ``modules``, all or nothing.

    A criterion's modules compose their tables from a learner's entries, or copy those of another criterion. Warns
    (UserWarning) about tokens that are no larger than as initialised.

    Args:
        modules: the ``mask_modules`` of a learner or criterion.
        source: as for `mask_state`.

    Raises:
        ValueError: entries that do not fit, with what the source holds, what is expected, and the options to change; values
            that are not finite; statistics (``standardize=True``) that were never gathered; a criterion as the source of a
            learner; ``modules`` on the meta device.

    Examples:
        >>> import torch
        >>> from maskd_triton import MaskedDistillLoss, MaskLearner
        >>> from maskd_triton.checkpoints import load_masks
        >>> learner = MaskLearner(16)
        >>> _ = torch.nn.init.normal_(learner.mask_modules[0].mask_token)  # in place of stage 1
        >>> criterion = MaskedDistillLoss(16, pretrained=learner)
        >>> load_masks(criterion.mask_modules, learner)
    """
    if any(x.is_meta for x in modules.state_dict().values()):
        raise ValueError(
            "pretrained: tensors on the meta device hold no values; build the module without pretrained= there, and load the "
            "tokens once it has memory (to_empty): checkpoints.load_masks(module.mask_modules, pretrained), or load_state_dict"
        )
    state, origin = _state_dict(source)
    place = _place(state)
    found = _found(place, state, origin)
    levels: list[Any] = list(modules)
    composed = any(key.split(".", 2)[2] in COMPOSED for key in found)
    if composed and not all(isinstance(level, LevelTables) for level in levels):
        raise ValueError(
            "pretrained: these are the tables of a MaskedDistillLoss, composed of tokens and mask weights that a learner "
            "cannot get back; pass the MaskLearner or the file that it saved"
            f"{_elsewhere(state, place)}"
        )
    shapes = {
        f"mask_modules.{i}.{name}": shape
        for i, level in enumerate(levels)
        for name, shape in (level.table_shapes() if composed else level.published_shapes()).items()
    }
    held, expected = _kind_of_entries(found), _kind_of_modules(levels)
    problems = _misfits(found, shapes)
    unlike = _unlike(held, expected)
    if problems or unlike:
        holder = source if isinstance(source, str | os.PathLike) else "the source"
        advice = ", but not all entries fit"
        if unlike:
            first = "gather statistics with MaskLearner.calibrate and " if held.standardize == "uncalibrated" else ""
            advice = f": {first}pass {', '.join(unlike)} here, too, or tokens that were learned with the options given here"
        advice += _elsewhere(state, place)
        shown = problems[:4] + ([f"and {len(problems) - 4} more"] if len(problems) > 4 else [])
        raise ValueError("\n  ".join([f"pretrained: {holder} holds {held}; expected {expected}{advice}", *shown]))
    if not composed:
        _warn_if_untrained(found, "pretrained")
    modules.load_state_dict({key.removeprefix("mask_modules."): value for key, value in found.items()})


class _Kind(NamedTuple):
    """The options that decide which entries there are, as the constructors name them.

    Attributes:
        channels, num_tokens: of every level; None where tokens are missing.
        weight_mask: None if levels differ.
        standardize: None if levels differ; ``"uncalibrated"``; True where the numbers do not tell which of the two it is.
    """

    channels: list[int | None]
    num_tokens: list[int | None]
    weight_mask: bool | None
    standardize: bool | str | None

    def __str__(self) -> str:
        levels = f"{check.counted(len(self.channels))} of {_listed(self.channels, 'channel')}"
        weights = {True: "with mask weights", False: "no mask weights", None: "mask weights on some levels"}
        standardised = {
            False: "not standardised",
            True: "standardised",
            "channel": "standardised (channel)",
            "isotropic": "standardised (isotropic)",
            "uncalibrated": "standardised, not calibrated",
            None: "standardised on some levels",
        }
        return ", ".join((levels, _listed(self.num_tokens, "token"), weights[self.weight_mask], standardised[self.standardize]))


def _listed(numbers: Sequence[int | None], noun: str) -> str:
    """``"8, 16, 16 channels"``; once if they are all alike."""
    shown = ["?" if number is None else str(number) for number in numbers]
    if len(set(shown)) == 1:
        del shown[1:]
    more = f" and {len(shown) - 6} more" if len(shown) > 8 else ""
    return f"{', '.join(shown[:6] if more else shown)}{more} {noun}{'' if shown == ['1'] else 's'}"


def _kind_of_modules(levels: list[Any]) -> _Kind:
    first = levels[0]
    channels: list[int | None] = [level.channels for level in levels]
    return _Kind(channels, [first.num_tokens] * len(levels), first.weight_mask, first.standardize)


def _kind_of_entries(found: Mapping[str, Tensor]) -> _Kind:
    levels = _by_level(found)
    tokens = [level.get("mask_token", torch.empty(0)) for level in levels.values()]
    sizes = [tuple(x.shape) if x.dim() == 2 else (None, None) for x in tokens]
    weighted = {not WEIGHTING.isdisjoint(level) for level in levels.values()}
    return _Kind(
        [size[1] for size in sizes],
        [size[0] for size in sizes],
        weighted.pop() if len(weighted) == 1 else None,
        _standardize_of(list(levels.values())),
    )


def _standardize_of(levels: Sequence[Mapping[str, Tensor]]) -> bool | str | None:
    standardised = {not STATISTICS.isdisjoint(level) for level in levels}
    if len(standardised) > 1:
        return None
    if standardised == {False}:
        return False
    entries = [(name, x) for level in levels for name, x in level.items() if name in STATISTICS]
    if any(name == "pixels_seen" and not x.is_meta and not (x > 0).all() for name, x in entries):
        return "uncalibrated"
    scales = [(name, x) for name, x in entries if name in SCALES]
    if any(fault(name, x) for name, x in scales) or all(x.shape[-1:] in ((), (1,)) for _, x in scales):
        return True  # one channel fits both
    return "channel" if any(several_scales(name, x) for name, x in scales) else "isotropic"


_TAKEN_BY = {  # one scale for all channels fits where each has its own
    False: (False,),
    "channel": ("channel",),
    "isotropic": ("isotropic", "channel"),
    True: ("isotropic", "channel"),
    "uncalibrated": ("isotropic", "channel"),
}


def _unlike(held: _Kind, expected: _Kind) -> list[str]:
    """The options that a module must be given to take what is held; none if no options would do."""
    if len(set(held.num_tokens)) > 1 or None in (*held.channels, held.weight_mask, held.standardize):
        return []
    options: list[str] = []
    if held.channels != expected.channels:
        options.append(f"channels={held.channels}")
    if held.num_tokens[0] != expected.num_tokens[0]:
        options.append(f"num_tokens={held.num_tokens[0]}")
    if held.weight_mask != expected.weight_mask:
        options.append(f"weight_mask={held.weight_mask}")
    if expected.standardize not in _TAKEN_BY[held.standardize]:
        options.append(f"standardize={held.standardize if held.standardize in (False, 'isotropic') else True!r}")
    return options


def _by_level(found: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The entries of every level, of what `mask_state` gives, by their names in a level."""
    levels: dict[int, dict[str, Tensor]] = {}
    for key, value in found.items():
        _, level, name = key.split(".", 2)
        levels.setdefault(int(level), {})[name] = value
    return dict(sorted(levels.items()))


def _misfits(found: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A line for every entry that is missing, unexpected, of another shape, or of values that no training gives."""
    problems = []
    for key in sorted(found.keys() | shapes.keys()):
        want = list(shapes[key]) if key in shapes else "no such entry"
        got = list(found[key].shape) if key in found else "no such entry"
        if got != want:
            problems.append(f"{key}: expected {want}, got {got}")
        elif what := fault(key.split(".", 2)[2], found[key]):
            problems.append(f"{key}: {what}")
    return problems


def _mask_entries(state: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """What belongs to masks, by the names of `mask_state`."""
    for key, value in state.items():
        if not isinstance(key, str):
            continue
        if match := _KEY.match(key):
            yield match[1], value
        elif key in ENTRIES and "mask_token" in state:
            yield f"mask_modules.0.{key}", value


def _elsewhere(held: Any, looked_at: Any = None) -> str:
    """For an error: where in the containers of a source there are mask entries, or others than those that were looked at."""
    places = list(_inner_keys(held, "", {id(held), id(looked_at)}))
    some = "some" if looked_at is None else "others"
    more = f" and {len(places) - 4} more places" if len(places) > 4 else ""
    return f"; there are {some} under {', '.join(places[:4])}{more}: pass what it holds there" if places else ""


def _inner_keys(held: Any, path: str, seen: set[int]) -> Iterator[str]:
    """Where containers and modules inside of ``held`` have mask entries: ``['model']['ema']``; no container twice."""
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
        # what torch found, without the advice that it puts around it
        reason = str(error.__context__ or error).split(". ")[0].rstrip(".") or type(error).__name__
        if path.suffix.lower() in (".npz", ".npy"):
            raise ValueError(
                f"pretrained: {path} is a numpy file, expected one of torch; pass its arrays as a state dict of tensors "
                "(numpy.load, torch.from_numpy)"
            ) from error
        what, arrays = "is damaged, no checkpoint, or holds more than tensors", ""
        if "GLOBAL numpy" in reason:
            what, arrays = "holds numpy arrays or numbers", ", with arrays as tensors (torch.from_numpy)"
        raise ValueError(
            f"pretrained: {path} cannot be loaded with weights_only=True: {reason}. It {what}. If you trust it, load it once "
            f"with torch.load(..., weights_only=False) and save its state dict alone{arrays}, or allow what it holds with "
            "torch.serialization.safe_globals"
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
    """Of what `mask_state` gives; a criterion's tables were asked about when they were composed."""
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
