"""Learned tokens in files: writes our layout, and reads ours and those of three other implementations."""

import os
import pickle
import re
import secrets
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .tables import COMPOSED, PUBLISHED, LevelTables, MaskLevel

__all__ = ["load_masks", "mask_state", "save_masks"]

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module

_KEY = re.compile(r"(?:^|.*\.)(mask_modules\.[^.]+\..+)$")
_STATISTIC = re.compile(r"\.(?:channel_mean|channel_std|statistics)$")
_BARE = COMPOSED | PUBLISHED | {"mask_token"}
_NESTED = ("state_dict", "maskd_model")  # mmcv's detector checkpoints; the YOLOv5 port

# How torch.load names what weights_only=True refuses
_REFUSED = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)|(?:_globals`|lists), but got <class '(.+?)'>")

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
        FileNotFoundError, IsADirectoryError: no such file.
        ValueError: a file that cannot be loaded safely, with the names of what torch refuses and what to do about it; no mask
            entries; one entry under two prefixes.
        TypeError: any other kind of source.
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
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            continue
        if match := _KEY.match(key):
            name = match[1]
        elif key in _BARE and "mask_token" in state:
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


def load_masks(modules: nn.ModuleList | nn.ModuleDict, source: Source) -> None:
    """Copy the tokens and mask weights of ``source`` into ``modules``, all or nothing.

    A criterion's modules compose their tables from a learner's entries, or copy those of another criterion. Named levels are
    found by name, or by position in a source whose levels are numbered.

    Args:
        modules: the ``mask_modules`` of a learner or criterion.
        source: as for `mask_state`.

    Raises:
        ValueError: a list of all missing, unexpected, misshapen, sparse and non-finite entries, and statistics
            (``standardize=True``) that were never gathered; a criterion as the source of a learner; named levels for modules
            without names; ``modules`` on the meta device.

    Examples:
        >>> from maskd_triton import MaskedDistillLoss, MaskLearner
        >>> from maskd_triton.checkpoints import load_masks
        >>> learner, criterion = MaskLearner(16), MaskedDistillLoss(16, pretrained=MaskLearner(16))
        >>> load_masks(criterion.mask_modules, learner)
    """
    if any(x.is_meta for x in modules.state_dict().values()):
        raise ValueError(
            "pretrained: tensors on the meta device hold no values; build the module without pretrained= there, and load the "
            "tokens once it has memory (to_empty): checkpoints.load_masks(module.mask_modules, pretrained), or load_state_dict"
        )
    found = _for_levels(mask_state(source), modules)
    composed = any(key.split(".", 2)[2] in COMPOSED for key in found)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for i, module in modules.named_children():
        if not isinstance(module, MaskLevel):
            raise TypeError(f"mask_modules.{i}: expected a MaskModule or LevelTables, got {type(module).__name__}")
        if composed and not isinstance(module, LevelTables):
            raise ValueError(
                "pretrained: these are the tables of a MaskedDistillLoss, composed of tokens and mask weights that a learner "
                "cannot get back; pass the MaskLearner or the file that it saved"
            )
        for name, shape in (module.table_shapes() if composed else module.published_shapes()).items():
            dtype = torch.int64 if name == "pixels_seen" else module.mask_token.dtype
            expected[f"mask_modules.{i}.{name}"] = shape, dtype  # type: ignore[assignment]
    problems = [f"missing: {k} {list(shape)}" for k, (shape, _) in expected.items() if k not in found]
    problems += [f"unexpected: {k} {list(v.shape)}" for k, v in found.items() if k not in expected]
    for key, value in found.items():
        if key not in expected:
            continue
        shape, dtype = expected[key]
        if value.shape != shape:
            problems.append(f"misshapen: {key} is {list(value.shape)}, expected {list(shape)}")
        elif value.is_meta or value.layout != torch.strided:
            problems.append(f"not a dense tensor: {key}")
        elif value.is_floating_point() != dtype.is_floating_point:
            kind = "floating point" if dtype.is_floating_point else "integers"
            problems.append(f"wrong dtype: {key} is {value.dtype}, expected {kind}")
        elif not torch.isfinite(value.to(dtype)).all():
            problems.append(f"not finite: {key}")
        elif key.endswith(".channel_std") and not (value > 0).all():
            problems.append(f"not above 0: {key}")
        elif key.endswith(".pixels_seen") and not value > 0:
            problems.append(f"no statistics: {key} is {value.item()}; gather them with MaskLearner.calibrate")
    for name, module in modules.named_children():
        scales = found.get(f"mask_modules.{name}.channel_std")
        if scales is not None and module.standardize == "isotropic" and bool((scales != scales.flatten()[:1]).any()):
            problems.append(f"level {name} was learned with standardize='channel', expected 'isotropic': pass the same")
    standardised = any(_STATISTIC.search(key) for key in found)
    if standardised != any(_STATISTIC.search(key) for key in expected):
        problems.append(f"these tokens were learned with standardize={standardised}: pass the same")
    if problems:
        raise ValueError("pretrained: the mask entries do not fit:\n  " + "\n  ".join(problems))
    modules.load_state_dict({k.removeprefix("mask_modules."): v for k, v in found.items()})


def _for_levels(found: dict[str, Tensor], modules: nn.ModuleList | nn.ModuleDict) -> dict[str, Tensor]:
    """``found`` under the names of ``modules``: by name where it has them, by position where its levels are numbered."""
    own, given = list(modules._modules), list(dict.fromkeys(key.split(".", 2)[1] for key in found))
    numbered = all(name.isdecimal() for name in given)
    if isinstance(modules, nn.ModuleList) and not numbered:
        tokens = {name: found.get(f"mask_modules.{name}.mask_token") for name in given}
        shown = {name: x.shape[-1] for name, x in tokens.items() if x is not None}
        raise ValueError(f"pretrained: its levels have names, so the module needs them, too: give channels={shown}")
    if isinstance(modules, nn.ModuleList) or set(given) == set(own) or not numbered or len(given) != len(own):
        return found  # what is missing or unexpected is listed
    renamed = dict(zip(sorted(given, key=int), own, strict=True))
    parts = [(key.split(".", 2), value) for key, value in found.items()]
    return {f"{container}.{renamed[name]}.{entry}": value for (container, name, entry), value in parts}


def save_masks(modules: nn.ModuleList | nn.ModuleDict, path: str | os.PathLike[str]) -> None:
    """Write the tokens and mask weights of ``modules`` as CPU tensors ``mask_modules.{level}.<parameter>``.

    An existing file is replaced in one step once the new one is on disk: a process killed while saving leaves the old file
    as it was, and at worst a ``.tmp`` file beside it. A symbolic link is kept, and the file it leads to is replaced.

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
        >>> from maskd_triton import MaskLearner
        >>> from maskd_triton.checkpoints import mask_state, save_masks
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_masks(MaskLearner(16, weight_mask=False).mask_modules, os.path.join(folder, "tokens.pt"))
        ...     list(mask_state(os.path.join(folder, "tokens.pt")))
        ['mask_modules.0.mask_token']
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"save: expected a file, got the folder {target}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"save: no such folder: {target.parent}")
    package = _safetensors(f"save: {path}") if _is_safetensors(path) else None
    # copies: safetensors refuses channels_last and shared memory, and torch writes all of the memory a view is part of
    state = {
        f"mask_modules.{key}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in modules.state_dict().items()
    }
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


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix.lower() == ".safetensors"


def _safetensors(needed_by: str) -> ModuleType:
    """The safetensors package, imported on first use."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise ModuleNotFoundError(
            f"{needed_by}: a .safetensors file needs the safetensors package, which is not installed: "
            "pip install 'maskd-triton[safetensors]'",
            name="safetensors",
        ) from error
    return safetensors


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
    if _is_safetensors(path):
        return _read_safetensors(path), str(path)
    with path.open("rb") as file:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except _DAMAGE as error:
            unsafe = f"pretrained: {path} cannot be loaded safely (weights_only=True): it "
            if refused := _refused(path, error):
                dtypes = " (a numpy.dtype asks for its class in numpy.dtypes next)" if "numpy.dtype" in refused else ""
                raise ValueError(
                    f"{unsafe}holds more than tensors and plain containers: {', '.join(refused)}. If you trust where it comes "
                    "from, load it once with torch.load(..., weights_only=False) and save its state dict alone, or allow these "
                    f"while it is read: with torch.serialization.safe_globals([{', '.join(refused)}]): ...{dtypes}"
                ) from error
            raise ValueError(f"{unsafe}is damaged, or no checkpoint") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"pretrained: expected {path} to hold a state dict, got {type(loaded).__name__}")
    return loaded, str(path)


def _refused(path: Path, error: Exception) -> list[str]:
    """Dotted names of what torch would not make while it read ``path``; none where the file is damaged."""
    first = _REFUSED.search(str(error))
    if not isinstance(error, pickle.UnpicklingError) or first is None:
        return []
    names = {next(filter(None, first.groups()))}
    with suppress(*_DAMAGE):  # all others at once; of files in torch's older format the first alone
        names.update(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return sorted({name if "." in name else f"builtins.{name}" for name in names})


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    package = _safetensors(f"pretrained: {path}")
    content = path.read_bytes()  # not mapped: a file cut short while it is read would end the process
    try:
        return package.torch.load(content)
    except (package.SafetensorError, *_DAMAGE) as error:
        raise ValueError(f"pretrained: {path} cannot be loaded safely: it is damaged, or no safetensors file") from error


def _listing(names: Any, most: int = 8) -> str:
    names = list(names)
    return str(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
