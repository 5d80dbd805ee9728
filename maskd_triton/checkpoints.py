"""Learned tokens in files: writes our layout, and reads ours and those of three other implementations."""

import os
import pickle
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._warn import warn
from .tables import COMPOSED, PUBLISHED, LevelTables, tokens_as_initialised

__all__ = ["load_masks", "mask_state", "save_masks"]

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module

_KEY = re.compile(r"(?:^|.*\.)(mask_modules\.\d+\..+)$")
_BARE = COMPOSED | PUBLISHED | {"mask_token"}
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
    for key in _NESTED:
        if isinstance(state.get(key), Mapping):
            state = state[key]
    found: dict[str, Tensor] = {}
    for name, value in _mask_entries(state):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"pretrained: {origin} holds a {type(value).__module__}.{type(value).__name__} as {name!r}, expected a tensor; "
                "make tensors of arrays with torch.from_numpy"
            )
        if name in found:
            raise ValueError(f"pretrained: {origin} holds {name!r} more than once, under different prefixes")
        found[name] = value
    if not found:
        keys = [str(key) for key in state]
        more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
        raise ValueError(
            f"pretrained: {origin} holds no mask entries: expected keys like 'mask_modules.0.mask_token', got {keys[:4]}{more}"
            + "".join(f"; there are some under {where}: pass what it holds there" for where in _inner_keys(state))
        )
    return found


def load_masks(modules: nn.ModuleList, source: Source) -> None:
    """Copy the tokens and mask weights of ``source`` into ``modules``, all or nothing.

    A criterion's modules compose their tables from a learner's entries, or copy those of another criterion. Warns
    (UserWarning) about tokens that are as initialised.

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
    found = mask_state(source)
    levels: list[Any] = list(modules)
    composed = any(key.split(".", 2)[2] in COMPOSED for key in found)
    if composed and not all(isinstance(level, LevelTables) for level in levels):
        raise ValueError(
            "pretrained: these are the tables of a MaskedDistillLoss, composed of tokens and mask weights that a learner "
            "cannot get back; pass the MaskLearner or the file that it saved"
        )
    shapes = {
        f"mask_modules.{i}.{name}": shape
        for i, level in enumerate(levels)
        for name, shape in (level.table_shapes() if composed else level.published_shapes()).items()
    }
    held, expected = _kind_of_entries(found), _kind_of_modules(levels)
    problems = _misfits(found, shapes)
    fits = expected in (
        held,
        held._replace(standardize=held.standardize and "channel"),
    )  # one scale fits where each has its own
    if problems or not fits:
        origin = source if isinstance(source, str | os.PathLike) else "the source"
        options = {name: True if value == "channel" else value for name, value in held._asdict().items()}
        unlike = [f"{name}={value!r}" for name, value in options.items() if getattr(held, name) != getattr(expected, name)]
        advice = ", but not all entries fit"
        if not fits:
            advice = f": pass {', '.join(unlike)} here, too, or tokens that were learned with the options given here"
        shown = problems[:4] + ([f"and {len(problems) - 4} more"] if len(problems) > 4 else [])
        raise ValueError("\n  ".join([f"pretrained: {origin} holds {held}; expected {expected}{advice}", *shown]))
    if not composed:
        _warn_if_untrained(found, "pretrained")
    modules.load_state_dict({key.removeprefix("mask_modules."): value for key, value in found.items()})


class _Kind(NamedTuple):
    """The options that decide which entries there are, as the constructors name them."""

    channels: list[int]
    num_tokens: int
    weight_mask: bool
    standardize: bool | str

    def __str__(self) -> str:
        levels = f"{len(self.channels)} level{'s' if len(self.channels) > 1 else ''}"
        channels = ", ".join(map(str, dict.fromkeys(self.channels)))
        weights = "with mask weights" if self.weight_mask else "no mask weights"
        standardised = {False: "not standardised", "channel": "standardised", "isotropic": "standardised (isotropic)"}
        return f"{levels} of {channels} channels, {self.num_tokens} tokens, {weights}, {standardised[self.standardize]}"


def _kind_of_modules(levels: list[Any]) -> _Kind:
    first = levels[0]
    return _Kind([level.channels for level in levels], first.num_tokens, first.weight_mask, first.standardize)


def _kind_of_entries(found: Mapping[str, Tensor]) -> _Kind:
    levels = sorted({int(key.split(".")[1]) for key in found})
    names = {key.split(".", 2)[2] for key in found}
    sizes = [found.get(f"mask_modules.{i}.mask_token", torch.empty(0, 0)).shape for i in levels]
    standardize: bool | str = not names.isdisjoint(("channel_mean", "channel_std", "statistics")) and "channel"
    scales = [x for key, x in found.items() if key.endswith(".channel_std")]
    scales += [x[1:] for key, x in found.items() if key.endswith(".statistics")]
    if scales and all((x == x.flatten()[:1]).all() for x in scales):
        standardize = "isotropic"
    weighted = not names.isdisjoint(("prob.0.weight", "pool_rows"))
    return _Kind([size[-1] for size in sizes], sizes[0][0], weighted, standardize)


def _misfits(found: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A line for every entry that is missing, unexpected, of another shape, or of values that no training gives."""
    problems = []
    for key in sorted(found.keys() | shapes.keys()):
        want = list(shapes[key]) if key in shapes else "no such entry"
        got = list(found[key].shape) if key in found else "no such entry"
        if got != want:
            problems.append(f"{key}: expected {want}, got {got}")
        elif found[key].is_meta:
            problems.append(f"{key}: expected values, got a tensor on the meta device")
        elif not torch.isfinite(found[key].float()).all():
            problems.append(f"{key}: expected finite values")
        elif key.endswith(".channel_std") and not (found[key] > 0).all():
            problems.append(f"{key}: expected deviations above 0")
        elif key.endswith(".pixels_seen") and not found[key] > 0:
            problems.append(f"{key} is {found[key].item()}: no statistics yet; gather them with MaskLearner.calibrate")
    return problems


def _mask_entries(state: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """What belongs to masks, by the names of `mask_state`."""
    for key, value in state.items():
        if not isinstance(key, str):
            continue
        if match := _KEY.match(key):
            yield match[1], value
        elif key in _BARE and "mask_token" in state:
            yield f"mask_modules.0.{key}", value


def _inner_keys(state: Mapping[Any, Any], path: str = "") -> Iterator[str]:
    """Where mappings inside of ``state`` hold mask entries: ``['model']['ema']``."""
    for key, inner in state.items():
        if isinstance(inner, Mapping):
            if any(isinstance(value, Tensor) for _, value in _mask_entries(inner)):
                yield f"{path}[{key!r}]"
            else:
                yield from _inner_keys(inner, f"{path}[{key!r}]")


def _state_dict(source: Source) -> tuple[Mapping[str, Any], str]:
    if isinstance(source, nn.Module):
        return source.state_dict(), type(source).__name__
    if isinstance(source, Mapping):
        return source, "the state dict"
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"pretrained: expected a path, a state dict or a MaskLearner, got {type(source).__name__}")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"pretrained: no such file: {path}")
    loaded = _read_safetensors(path) if _is_safetensors(path) else _read(path)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"pretrained: expected {path} to hold a state dict, got {type(loaded).__name__}")
    return loaded, str(path)


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        # what torch found, without the advice that it puts around it
        reason = str(error.__context__ or error).split(". ")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"pretrained: {path} cannot be loaded with weights_only=True: {reason}. It is damaged, no checkpoint, or holds "
            "more than tensors. If you trust it, load it once with torch.load(..., weights_only=False) and save its state dict "
            "alone, or allow what it holds with torch.serialization.safe_globals"
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
    (UserWarning) about tokens that are as initialised.

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
    """Of what `mask_state` gives; tables, which are composed, do not tell."""
    levels: dict[str, dict[str, Tensor]] = {}
    for key, value in found.items():
        _, level, entry = key.split(".", 2)
        levels.setdefault(level, {})[entry] = value
    untrained = [level for level, entries in levels.items() if not COMPOSED & entries.keys() and tokens_as_initialised(entries)]
    if untrained:
        warn(
            f"{name}: the tokens are as initialised (level {', '.join(untrained)}): untrained, so every mask is about "
            "0.5 and the loss half a plain feature MSE; train them in stage 1 (learner.parameters() in the optimizer)"
        )
