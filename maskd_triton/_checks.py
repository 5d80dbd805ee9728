"""Sentences for wrong arguments: each names the argument, what was expected and what was given."""

import numbers
import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

IMPLS = ("auto", "triton", "eager")
MOST_TOKENS = 32  # the kernels keep a sum for each of them in registers; published are 6 and 8
MOST_FLOAT = 3.4e38  # of float32
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)


# Options: each function takes a value and its name, and gives the value to keep


def choice(value: Any, name: str, choices: Collection[str]) -> str:
    """ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def impl(value: Any, name: str = "impl") -> str:
    """ValueError unless it is one of `IMPLS`."""
    return choice(value, name, IMPLS)


def resize(value: Any, name: str = "resize") -> str | None:
    """ValueError unless it is None, ``"student"`` or ``"teacher"``."""
    if value not in (None, "student", "teacher"):
        raise ValueError(f"{name}: expected None, 'student' or 'teacher', got {value!r}")
    return value


def flag(value: Any, name: str) -> bool:
    """TypeError unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def integer(value: Any) -> int | None:
    """An int, numpy integer or integer scalar as an int; None for anything else, bools among them."""
    if isinstance(value, bool) or getattr(value, "ndim", 0) != 0 or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # no number at all; a tensor of floats
        return None


def positive_int(value: Any, name: str) -> int:
    """TypeError or ValueError unless it is an integer of at least 1."""
    whole = integer(value)
    if whole is None or whole < 1:
        raise (TypeError if whole is None else ValueError)(f"{name}: expected a positive int, got {value!r}")
    return whole


def num_tokens(value: Any, name: str = "num_tokens") -> int:
    """TypeError or ValueError unless it is an integer from 1 to `MOST_TOKENS`."""
    whole = positive_int(value, name)
    if whole > MOST_TOKENS:
        raise ValueError(f"{name}: expected at most {MOST_TOKENS} tokens, got {whole}")
    return whole


def count(value: Any, name: str) -> int:
    """TypeError or ValueError unless it is an integer of at least 0 that int64 can hold."""
    whole = integer(value)
    if whole is None or not 0 <= whole < 2**63:
        raise (TypeError if whole is None else ValueError)(f"{name}: expected an int of at least 0, got {value!r}")
    return whole


def mask_power(value: Any, name: str = "mask_power") -> int:
    """ValueError unless it is 1 or 2."""
    power = integer(value)
    if power not in (1, 2):
        raise ValueError(f"{name}: expected 1 or 2, got {value!r}")
    return power


def number(value: Any, name: str, least: float, most: float) -> float:
    """TypeError or ValueError unless it is a number, also numpy's, from ``least`` to ``most``."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not least <= value <= most:
        raise (ValueError if real else TypeError)(f"{name}: expected a number from {least:g} to {most:g}, got {value!r}")
    return float(value)


def eps(value: Any, name: str = "eps") -> float:
    """TypeError or ValueError unless it is a number from 0 to 1e30."""
    return number(value, name, 0, 1e30)


def positive(value: Any, name: str) -> float:
    """TypeError or ValueError unless it is a number that float32 can divide by."""
    return number(value, name, 1e-30, 1e30)


def loss_weight(value: Any, name: str = "loss_weight") -> float | Tensor:
    """A number of at least 0, or a scalar tensor, whose value is not checked, as that would wait for its device."""
    if not isinstance(value, Tensor):
        return number(value, name, 0, MOST_FLOAT)
    if value.dim() != 0 or value.dtype == torch.bool or value.is_complex():
        raise ValueError(f"{name}: expected a number or a scalar tensor, got {value.dtype} of shape {list(value.shape)}")
    return value


def constant_loss_weight(value: Any, name: str) -> float | Tensor:
    """`loss_weight`; ValueError for one that is to be learned.

    A parameter or a buffer is taken as a plain tensor in the same memory: as one of the module it would be cast with it.
    """
    weight = loss_weight(value, name)
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError(f"{name}: expected a number or a scalar tensor without gradient; to learn it, multiply the loss by it")
    return weight.detach() if isinstance(weight, nn.Parameter | nn.Buffer) else weight


def counter(value: Any, name: str) -> Tensor:
    """TypeError or ValueError unless it is an int64 scalar tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an int64 scalar tensor, got {value!r}; {name}.fill_(k) sets it")
    if value.dtype != torch.int64 or value.dim() != 0:
        raise ValueError(f"{name}: expected an int64 scalar tensor, got {value.dtype} of shape {list(value.shape)}")
    return value


def standardize(value: Any, name: str = "standardize") -> str | bool:
    """``"channel"`` (also for True), ``"isotropic"`` or False; ValueError for anything else."""
    if value is True or value is False:
        return value and "channel"
    if value not in ("channel", "isotropic"):
        raise ValueError(f"{name}: expected False, True, 'channel' or 'isotropic', got {value!r}")
    return value


def listed(value: Any) -> Any:
    """An array or tensor with a dimension as a list (of lists); other values unchanged. Waits for a tensor's device."""
    return value.tolist() if getattr(value, "ndim", 0) and hasattr(value, "tolist") else value


# Tensors


def counted(number: int, noun: str = "level") -> str:
    """``"1 level"``, ``"3 levels"``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def for_each(levels: int) -> str:
    """``"for the only level"``, ``"for each of the 3 levels"``."""
    return "for the only level" if levels == 1 else f"for each of the {counted(levels)}"


def per_level(given: Sequence[object] | None, name: str, levels: int) -> None:
    """TypeError or ValueError unless ``given`` is None or has one entry for each level."""
    if given is None:
        return
    if isinstance(given, str | Tensor) or not isinstance(given, Sequence):
        raise TypeError(f"{name}: expected a sequence with one entry per level, got {type(given).__name__}")
    if len(given) != levels:
        raise ValueError(f"{name}: expected one entry {for_each(levels)}, got {len(given)}")


def level_count(levels: Sequence[Tensor], name: str, channels: Sequence[int | None]) -> None:
    """ValueError unless there are as many levels as ``channels``."""
    if len(levels) != len(channels):
        raise ValueError(f"{name}: expected {counted(len(channels))}, got {len(levels)}")


def levels(maps: Sequence[Tensor], name: str, labels: Sequence[str], channels: Sequence[int | None]) -> None:
    """TypeError or ValueError unless ``maps`` are features of these channels, one per level; None: any."""
    level_count(maps, name, channels)
    for x, label, c in zip(maps, labels, channels, strict=True):
        features(x, f"{name}{label}", c)


def features(x: Tensor, name: str, channels: int | None = None, hint: str = "") -> None:
    """TypeError or ValueError unless ``x`` is ``[N, C, H, W]`` of a float dtype, with a pixel and ``channels`` channels.

    ``hint``: what to do about other channels, where no other layout fits.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor [N, C, H, W], got {type(x).__name__}")
    dense(x, name)
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64 features, got {x.dtype}")
    shape = x.shape
    if len(shape) != 4:
        tokens = "; tokens [N, L, C]? shapes.from_tokens(x, (H, W)) makes them features" if len(shape) == 3 else ""
        raise ValueError(f"{name}: expected features [N, C, H, W], got shape {list(shape)}{tokens}")
    if shape[1] == 0 or shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"{name}: expected at least one channel and one pixel, got shape {list(shape)}")
    if channels is not None and shape[1] != channels:
        square = shape[2] == shape[3]  # such a map has channels pixels a side by chance
        if shape[3] == channels and not square and "swap" not in hint:
            hint = "; channels last, [N, H, W, C]? shapes.from_nhwc(x) makes it [N, C, H, W]"
        raise ValueError(f"{name}: expected {counted(channels, 'channel')}, got {shape[1]} (shape {list(shape)}){hint}")


def dense(x: Tensor, name: str) -> None:
    """TypeError or ValueError unless the memory of ``x`` holds its numbers."""
    if x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one; pad it, and give valid=")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {x.layout}; call to_dense()")
    if type(x) not in _PLAIN and hasattr(x, "to_local"):
        raise TypeError(f"{name}: expected a plain tensor, got a DTensor; pass {name.partition('[')[0]}.to_local()")


def readable(x: Tensor, name: str) -> None:
    """ValueError for a view that says of its numbers that they are negative."""
    if x.is_neg():
        raise ValueError(f"{name}: a view with the negative bit, as of a conjugate's imaginary part; call resolve_neg()")


def recordable(x: Tensor, name: str, made: str = "it") -> None:
    """ValueError where a backward pass cannot keep ``x``."""
    if x.is_inference() and torch.is_grad_enabled():
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


def parameter(x: Tensor, name: str, shape: Sequence[int | str], device: torch.device | None) -> None:
    """TypeError or ValueError unless ``x`` is a float tensor of that shape on that device. Shapes with a name fit none."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {list(shape)}, got {type(x).__name__}")
    dense(x, name)
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if list(x.shape) != list(shape):
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {list(x.shape)}")
    on_device(x, name, device)


def on_device(x: Tensor, name: str, device: torch.device | None) -> None:
    """ValueError unless ``x`` is on the device of the features; None: any."""
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected the device of the features, {device}, got {x.device}")


def tokens(e: Tensor, name: str, device: torch.device | None = None) -> None:
    """TypeError or ValueError unless ``e`` is ``[T, C]`` on ``device``; None: any."""
    parameter(e, name, list(e.shape) if isinstance(e, Tensor) and e.dim() == 2 and e.numel() else ["T", "C"], device)
    num_tokens(len(e), f"{name}: T")


def weighting(rows: Tensor, bias: Tensor, channels: int, device: torch.device) -> None:
    """TypeError or ValueError unless they are ``rows [9, T, C]`` and ``bias [T]`` or ``[5, T]``."""
    t = len(rows[0]) if isinstance(rows, Tensor) and rows.dim() == 3 and len(rows) else "T"
    parameter(rows, "rows", [9, t, channels], device)
    parameter(bias, "bias", [5, t] if isinstance(bias, Tensor) and bias.dim() == 2 else [t], device)


def tables(given: Any, maps: Sequence[Tensor], constant: bool) -> None:
    """TypeError or ValueError unless every level's tables fit its features: kernels read as many numbers as these say.

    ``given``: a `DistillTables`, which are ``constant``: none may require grad; or a `LearnTables`.
    """
    if given.tokens:
        tokens(given.tokens[0], "tokens of level 0")
    t = len(given.tokens[0]) if given.tokens else 0
    # in stage 1 the first bias says whether the weighting is one of standardised features
    standard = bool(given.statistics) if constant else any(getattr(x, "ndim", 0) == 2 for x in given.pool_bias[:1])
    leading: dict[str, tuple[int, ...]] = {  # sizes; but for biases, channels follow
        "tokens": (t,), "pool_rows": (9, t), "pool_bias": (5, t) if standard else (t,),
        "teacher_tokens": (t,), "token_bias": (t,), "statistics": (2,),
    }  # fmt: skip
    fits = [(x.shape[1:2], x.device) for x in maps]
    for name, levels in zip(given._fields, given, strict=True):
        if not levels:
            continue
        sizes, bias = leading[name], name in ("pool_bias", "token_bias")
        for i, (table, (channels, device)) in enumerate(zip(levels, fits, strict=True)):
            shape = sizes if bias else (*sizes, *channels)
            fit = isinstance(table, Tensor) and table.shape == shape and table.device == device and table.dtype in _DTYPES
            if not fit or (constant and table.requires_grad):
                label = f"{_ARGUMENTS.get(name, name)} of level {i}"
                parameter(table, label, shape, device)  # says which
                frozen(table, label)


_ARGUMENTS = {  # what users call what the tables hold
    "pool_rows": "weighting: rows",
    "pool_bias": "weighting: bias",
    "teacher_tokens": "standardize: tokens",
    "statistics": "standardize: affine",
}


def frozen(x: Tensor, name: str) -> None:
    """ValueError if ``x`` requires grad: in stage 2 only the student gets gradients."""
    if x.requires_grad:
        raise ValueError(f"{name}: requires grad, but is frozen in stage 2; pass it detached")


def pair(s: Tensor, t: Tensor, names: tuple[str, str], channels: int | None, first: Tensor, first_name: str) -> None:
    """TypeError or ValueError unless student and teacher features of a level fit each other and the first level."""
    student, teacher = names
    features(t, teacher)
    if channels is not None and t.shape[1] != channels:
        features(t, teacher, channels, swapped(s, t, channels))
    dense(s, student)
    if s.shape != t.shape or s.dtype not in _DTYPES:
        features(s, student, channels, "; give student_channels= and the criterion aligns them")
        raise ValueError(
            f"{student}: expected the shape of {teacher}, {list(t.shape)}, got {list(s.shape)} "
            "(different channels: give student_channels; different sizes: give resize='student' or 'teacher')"
        )
    alike(t, teacher, first, first_name)
    if s is not first:
        alike(s, student, first, first_name)
    constant_teacher(s, t, teacher)
    if not torch.compiler.is_compiling():  # dynamo asks no such questions
        readable(s, student)
        readable(t, teacher)
        recordable(t, teacher, "the teacher")


def swapped(s: Any, t: Any, channels: int) -> str:
    """Ask whether student and teacher were swapped, where the channels of both suggest it."""
    if not (isinstance(s, Tensor) and isinstance(t, Tensor) and s.dim() == t.dim() == 4):
        return ""
    by_gradient = t.requires_grad and not s.requires_grad
    by_channels = s.shape[1] == channels and channels not in (t.shape[1], t.shape[3])
    return "; did you swap student and teacher?" if by_gradient or by_channels else ""


def constant_teacher(s: Tensor, t: Tensor, name: str) -> None:
    """ValueError if the teacher's features ``t`` require grad; ``s``: the student's of the same level, as they were given."""
    if t.requires_grad:
        question = "" if s.requires_grad else " (did you swap student and teacher?)"
        raise ValueError(
            f"{name}: requires grad, but the loss is differentiable in the student only{question}; "
            "compute the teacher under torch.no_grad() or pass teacher.detach()"
        )


def maps(m: Tensor, name: str, like: Tensor) -> None:
    """TypeError or ValueError unless ``m`` are masks ``[N, T, H, W]`` for the features ``like``, without gradient."""
    dense(m, name)
    if m.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected masks of a float dtype or bool, got {m.dtype}; call .bool() or .float()")
    n, _, h, w = like.shape
    if m.dim() != 4 or (m.shape[0], *m.shape[2:]) != (n, h, w) or m.shape[1] == 0:
        token = "; add a token dimension: masks[:, None]" if list(m.shape) == [n, h, w] else ""
        raise ValueError(f"{name}: expected masks [{n}, T, {h}, {w}], got shape {list(m.shape)}{token}")
    num_tokens(m.shape[1], f"{name}: T")
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
        raise TypeError(f"{name}: expected a bool or integer tensor, non-zero where valid, got {x.dtype}; pass {name} != 0")
    if x.dim() != 3 or x.shape[0] != batch or 0 in x.shape[1:]:
        raise ValueError(f"{name}: expected shape [{batch}, H0, W0], the size of the padded images, got {list(x.shape)}")
    on_device(x, name, device)
