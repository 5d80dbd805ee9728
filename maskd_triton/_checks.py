"""Sentences for wrong arguments: each names the argument, what was expected and what was given."""

import numbers
import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Weighting = tuple[Tensor, Tensor]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def are_plain(values: Iterable[Any]) -> bool:
    """Whether all are tensors or parameters, none of a subclass."""
    return _PLAIN.issuperset(map(type, values))


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def choice(value: str, name: str, choices: Sequence[str]) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def flag(value: Any, name: str) -> bool:
    """``value`` as a bool; TypeError unless it is one, numpy's, 0 or 1."""
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    if str(getattr(value, "dtype", "")) != "bool" or getattr(value, "ndim", 0) != 0:  # torch's is "torch.bool"
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def integer(value: Any) -> int | None:
    """An int, numpy integer or integer scalar (tensor or array) as an int; None for anything else, bools among them."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or getattr(value, "ndim", 0) != 0 or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # no number at all; a tensor of floats
        return None


def number(value: Any) -> float | None:
    """A number, also numpy's, or a scalar array as a Python number; None for anything else, bools and tensors among them."""
    if type(value) in (int, float):
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool | Tensor) or getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return None
    return number(value.item())


def positive_int(value: Any, name: str) -> int:
    """``value`` as an int; TypeError or ValueError unless it is an integer of at least 1."""
    whole = integer(value)
    if whole is None:
        raise TypeError(f"{name}: expected a positive int, got {value!r}")
    if whole < 1:
        raise ValueError(f"{name}: expected a positive int, got {value!r}")
    return whole


def count(value: Any, name: str) -> int:
    """``value`` as an int; TypeError or ValueError unless it is an integer of at least 0 that int64 can hold."""
    whole = integer(value)
    if whole is None:
        raise TypeError(f"{name}: expected an int of at least 0, got {value!r}")
    if not 0 <= whole < 2**63:
        raise ValueError(f"{name}: expected an int of at least 0 and below 2**63, got {value!r}")
    return whole


def amount(value: Any, name: str, most: float = sys.float_info.max) -> float:
    """``value`` as a Python number; TypeError or ValueError unless it is a finite number of at least 0 and at most ``most``."""
    found = number(value)
    if found is not None and 0 <= found <= most:
        return found
    limit = f" and at most {most:g}" if most < sys.float_info.max else ""
    error = TypeError if found is None else ValueError
    raise error(f"{name}: expected a finite number of at least 0{limit}, got {value!r}")


def positive(value: Any, name: str) -> float:
    """``value`` as a Python number; TypeError or ValueError unless it is from 1e-30 to 1e30, which float32 can divide by and,
    in two parts, hold to 15 digits."""
    found, expected = number(value), f"{name}: expected a number above 0, from 1e-30 to 1e30, got {value!r}"
    if found is None:
        raise TypeError(expected)
    if not 1e-30 <= found <= 1e30:
        raise ValueError(expected)
    return found


def standardize(value: Any) -> str | bool:
    """``"channel"`` (also for True), ``"isotropic"`` or False; ValueError for anything else."""
    if value is True or value is False or str(getattr(value, "dtype", "")) == "bool":  # numpy's
        return bool(value) and "channel"
    if value not in ("channel", "isotropic"):
        raise ValueError(f"standardize: expected False, True, 'channel' or 'isotropic', got {value!r}")
    return value


def scale(value: Any, name: str) -> float | Tensor:
    """`amount`, or a scalar tensor as it is: its value is not looked at, which would wait for its device."""
    if not isinstance(value, Tensor):
        return amount(value, name)
    if value.dim() != 0 or value.dtype == torch.bool or value.is_complex():
        raise ValueError(f"{name}: expected a number or a scalar tensor, got {value.dtype} of shape {list(value.shape)}")
    return value


def listed(value: Any) -> Any:
    """An array or tensor with a dimension as a list (of lists); anything else as it is. Waits for a tensor's device."""
    return value.tolist() if getattr(value, "ndim", 0) and hasattr(value, "tolist") else value


def per_level(given: Sequence[object] | None, name: str, levels: int) -> None:
    """TypeError or ValueError unless ``given`` is None or has one entry for each level."""
    if given is None:
        return
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        raise TypeError(f"{name}: expected a sequence with one entry per level, got {type(given).__name__}")
    if len(given) != levels:
        raise ValueError(f"{name}: expected one entry for each of the {levels} levels, got {len(given)}")


def features(x: Tensor, name: str, channels: int | None = None) -> None:
    """TypeError or ValueError unless ``x`` is ``[N, C, H, W]`` of a float dtype, with a pixel and ``channels`` channels."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor [N, C, H, W], got {type(x).__name__}")
    dense(x, name)
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64 features, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected features [N, C, H, W], got shape {list(x.shape)}")
    if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name}: expected at least one channel and one pixel, got shape {list(x.shape)}")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{name}: expected {channels} channels, got {x.shape[1]} (shape {list(x.shape)})")


def dense(x: Tensor, name: str) -> None:
    """TypeError or ValueError unless the numbers of ``x`` lie in memory as they are."""
    if x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one; pad it, and give valid=")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {x.layout}; call to_dense()")
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError(f"{name}: a view with the negative bit, as of a conjugate's imaginary part; call resolve_neg()")


def recordable(x: Tensor, name: str, made: str = "it") -> None:
    """ValueError where a backward pass cannot keep ``x``."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.is_inference():
        raise ValueError(
            f"{name}: an inference tensor cannot be kept for the backward pass; compute {made} under "
            f"torch.no_grad() instead of torch.inference_mode(), or pass {name.partition('[')[0]}.clone()"
        )


def alike(x: Tensor, name: str, first: Tensor, first_name: str) -> None:
    """TypeError or ValueError unless the features ``x`` have the batch size and device of ``first``, and both or neither are
    float64."""
    if x.shape[0] != first.shape[0]:
        raise ValueError(f"{name}: expected the batch size of {first_name}, {first.shape[0]}, got {x.shape[0]}")
    if x.device != first.device:
        raise ValueError(f"{name}: expected the device of {first_name}, {first.device}, got {x.device}")
    if (x.dtype == torch.float64) != (first.dtype == torch.float64):
        raise TypeError(f"{name}: expected all features to be float64 or none, got {x.dtype} and {first.dtype}")


def parameter(x: Tensor, name: str, shape: Sequence[int], device: torch.device | None) -> None:
    """TypeError or ValueError unless ``x`` is a float tensor of that shape on that device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {list(shape)}, got {type(x).__name__}")
    dense(x, name)
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if list(x.shape) != list(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    on_device(x, name, device)


def on_device(x: Tensor, name: str, device: torch.device | None) -> None:
    """ValueError unless ``x`` is on the device of the features; None: any."""
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected the device of the features, {device}, got {x.device}")


def tokens(e: Tensor, name: str, device: torch.device | None = None, num_tokens: int | None = None) -> None:
    """TypeError or ValueError unless ``e`` is ``[T, C]`` with at least one token, ``num_tokens`` if given, on ``device``; None:
    any."""
    if not isinstance(e, Tensor):
        raise TypeError(f"{name}: expected a tensor [T, C], got {type(e).__name__}")
    dense(e, name)
    shape = list(e.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name}: expected [T, C] with at least one token, got shape {shape}")
    if num_tokens is not None and shape[0] != num_tokens:
        raise ValueError(f"{name}: expected {num_tokens} tokens, as on level 0, got {shape[0]}")
    parameter(e, name, shape, device)


def weighting(
    level: Weighting, name: str, tokens_shape: Sequence[int], device: torch.device, standard: bool | None = None
) -> None:
    """TypeError or ValueError unless ``level`` is ``rows [9, T, C]`` and ``bias [T]``, or ``[5, T]`` where it is ``standard``;
    None: either."""
    t, c = tokens_shape
    if not isinstance(level, tuple | list) or len(level) != 2:
        raise TypeError(f"{name}: expected (rows [9, {t}, {c}], bias [{t}]) from compose_weighting, got {type(level).__name__}")
    rows, bias = level
    for x, part in ((rows, "rows"), (bias, "bias")):
        parameter(x, f"{name} {part}", list(x.shape) if isinstance(x, Tensor) and not x.is_nested else [], device)
    if list(rows.shape) != [9, t, c] or list(bias.shape) not in ([t], [5, t]):
        raise ValueError(
            f"{name}: expected rows {[9, t, c]} and bias {[t]} or {[5, t]}, got {list(rows.shape)} and {list(bias.shape)}"
        )
    if standard is not None and (bias.dim() == 2) != standard:
        raise ValueError(
            f"{name}: expected bias {[5, t] if standard else [t]}, got {list(bias.shape)}; standardised features take the "
            "weighting that compose_standardization gives, others that of compose_weighting"
        )


def frozen(x: Tensor, name: str) -> None:
    """ValueError if ``x`` requires grad: in stage 2 only the student gets gradients."""
    if x.requires_grad:
        raise ValueError(f"{name}: requires grad, but is frozen in stage 2; pass it detached")


def pair(s: Tensor, t: Tensor, names: tuple[str, str], channels: int | None, first: Tensor, first_name: str) -> None:
    """TypeError or ValueError unless student and teacher features of a level fit each other and the first level."""
    student, teacher = names
    features(t, teacher, channels)
    features(s, student, channels)
    if s.shape != t.shape:
        raise ValueError(
            f"{student}: expected the shape of {teacher}, {list(t.shape)}, got {list(s.shape)} "
            "(different channels: give student_channels; different sizes: give resize='student' or 'teacher')"
        )
    for x, name in ((s, student), (t, teacher)):
        alike(x, name, first, first_name)
    if t.requires_grad:
        raise ValueError(
            f"{teacher}: requires grad, but the loss is differentiable in the student only; "
            "compute the teacher under torch.no_grad() or pass teacher.detach()"
        )
    recordable(t, teacher, "the teacher")


def step(x: Tensor | None, name: str, device: torch.device) -> None:
    """TypeError or ValueError unless ``x`` is None or an int64 scalar on that device."""
    if x is None:
        return
    if not isinstance(x, Tensor) or x.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 scalar tensor, got {x.dtype if isinstance(x, Tensor) else repr(x)}")
    if x.dim() != 0 or (x.device != device and device.type != "meta"):  # there it is not read
        raise ValueError(f"{name}: expected an int64 scalar on {device}, got shape {list(x.shape)} on {x.device}")


def maps(m: Tensor, name: str, like: Tensor) -> None:
    """TypeError or ValueError unless ``m`` are masks ``[N, T, H, W]`` for the features ``like``, without gradient."""
    features(m, name)
    n, _, h, w = like.shape
    if (m.shape[0], *m.shape[2:]) != (n, h, w):
        raise ValueError(f"{name}: expected masks [{n}, T, {h}, {w}], got shape {list(m.shape)}")
    on_device(m, name, like.device)
    frozen(m, name)


def valid(x: Tensor, name: str, batch: int, device: torch.device) -> None:
    """TypeError or ValueError unless ``x`` says of a batch which pixels are valid: ``[N, H0, W0]``, bool or integer."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name}: expected a bool tensor [N, H0, W0], or images with .tensors and .image_sizes as torchvision's ImageList, "
            f"got {type(x).__name__}"
        )
    dense(x, name)
    if x.is_floating_point() or x.is_complex():
        raise TypeError(f"{name}: expected a bool or integer tensor, non-zero where pixels are valid, got {x.dtype}")
    if x.dim() != 3 or x.shape[0] != batch or 0 in x.shape[1:]:
        raise ValueError(f"{name}: expected shape [{batch}, H0, W0], that of the padded images, got {list(x.shape)}")
    on_device(x, name, device)
