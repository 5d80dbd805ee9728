"""Launch configurations: a pure function of GPU, kernel, width of features, layout, channels, tokens and a bucket of pixels.

Nothing is timed, and nothing compiled twice, while a model trains. In this order:

1. ``<folder>/<GPU>.json`` of the user, written by ``python -m maskd_triton.kernels.autotune`` or by online tuning; the folder
   is ``$MASKD_TRITON_CONFIGS`` or else ``~/.config/maskd_triton``.
2. ``configs/<GPU>.json`` beside this file, for GPUs that were measured. None was yet.
3. `default`, chosen by compiling (``python -m bench.inspect``) and by counts (``python -m bench.defaults``): no spill and
   16-byte loads on sm_80, sm_90, sm_100 and gfx942, runs of at least 64 contiguous bytes, and for bfloat16 and up to 8
   tokens a time, modelled by memory, instructions, shared memory and loads in flight, near that of the best candidate.

The search itself (``autotune.py``) lies above this file, which only calls `on_miss`.
"""

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .tiles import CHANNELS

FOLDER = "MASKD_TRITON_CONFIGS"
READING = ("forward_kernel", "mask_kernel", "token_gradient_kernel")  # a program takes all channels of its pixels
WRITING = ("backward_kernel", "gate_kernel", "feature_gradient_kernel")  # a program takes one tile


@dataclass(frozen=True)
class Config:
    """Channels and pixels of a tile, threads of a program, stages of the load pipeline, registers of a thread.

    Where ``registers`` is 0, NVIDIA's assembler chooses how many. For one more program per multiprocessor it then spills a few
    of them, which Triton's versions do in different kernels; where it is told how many there may be, it does not.
    """

    block_c: int
    block_p: int
    threads: int
    num_stages: int = 1
    registers: int = 0

    @property
    def program(self) -> dict[str, int]:
        """Warps and registers as a launch takes them."""
        return {"num_warps": self.threads // warp_size(), **most_registers(self.registers)}


class Key(NamedTuple):
    """What a configuration may depend on.

    Attributes:
        kernel: one of `READING` and `WRITING`.
        bits: of an element of the widest feature map.
        layout: "nchw" or "nhwc", of the first feature map.
        channels: of the level with the most.
        tokens: rows that they are padded to.
        log2_pixels: of all levels and images of a launch, rounded up.
    """

    kernel: str
    bits: int
    layout: str
    channels: int
    tokens: int
    log2_pixels: int


def ceil_div(a: int, b: int) -> int:
    """``triton.cdiv``, which takes longer to call than all the rest of a launch's arithmetic."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def token_rows(num_tokens: int) -> int:
    """Rows that tokens are padded to in a matrix product: a power of 2, at least 8."""
    return max(8, power_of_2(num_tokens))


def warp_size() -> int:
    """Threads in a warp: 64 on AMD's CDNA GPUs."""
    return 64 if torch.version.hip else 32


def most_registers(registers: int) -> dict[str, int]:
    """The argument of a launch that bounds the registers of a thread; AMD's compiler takes none."""
    return {"maxnreg": registers} if registers and warp_size() == 32 else {}


def config(kernel: str, maps: Sequence[torch.Tensor], bits: int, axis: int, num_tokens: int) -> Config:
    """The configuration of a launch over ``maps [N, C, P]``, one per level, contiguous along ``axis``."""
    if kernel in _forced:
        return _forced[kernel]
    device, pixels, channels = maps[0].device, 0, 0
    for x in maps:
        pixels += x.shape[0] * x.shape[2]
        channels = max(channels, x.shape[1])
    layout = "nhwc" if axis == CHANNELS else "nchw"
    key = Key(kernel, bits, layout, channels, token_rows(num_tokens), (pixels - 1).bit_length())
    search = on_miss and not _forced and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    return _choice(key, device, on_miss if search else None)


Miss = Callable[[Key, torch.device], object]
on_miss: Miss | None = None
"""Called where no file knows a key, unless a configuration is forced or a CUDA graph captured; it may `write` one."""


def state() -> tuple[Any, ...]:
    """All that `config` depends on beside its arguments."""
    return _generation, on_miss, *_forced.items()


def forget() -> None:
    """Read all files again."""
    global _generation
    read.cache_clear()
    _choice.cache_clear()
    _generation += 1


_generation = 0


@functools.cache
def _choice(key: Key, device: torch.device, on_miss: Miss | None) -> Config:
    gpu = gpu_name(device)
    if on_miss and not any(key in read(path) for path in (user_file(gpu), shipped_file(gpu))):
        on_miss(key, device)
    return choose(key, gpu)


def gpu_name(device: torch.device) -> str:
    """What the files of a device are called after."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


_forced: dict[str, Config] = {}


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Inside, every launch of ``kernel`` takes ``config``: to measure it."""
    _forced[kernel] = config
    try:
        yield
    finally:
        del _forced[kernel]


def default(key: Key) -> Config:
    """The configuration where nothing was measured."""
    return replace(_default_tile(key), registers=_default_registers(key))


def _default_tile(key: Key) -> Config:
    narrow = _is_narrow(key)
    if key.kernel in WRITING:
        if key.bits == 64:
            return Config(64, 16, 256) if key.layout == "nhwc" else Config(16, 64, 256)
        if key.layout == "nhwc":
            size = 2048 if key.kernel == "feature_gradient_kernel" else 4096
            block_c = min(size // 32, max(32, power_of_2(key.channels)))
            return Config(block_c, size // block_c, 256 if narrow else 128)
        if key.kernel == "feature_gradient_kernel":
            return Config(32, 64, 256)
        return Config(32, 64 if key.tokens > 16 else 128, 128)
    masks = key.kernel == "mask_kernel"
    if key.bits == 64:  # no matrix instruction: the product is a [T, C, P] block
        return Config(2, 16, 256) if key.tokens > 16 else Config(8, 32, 128, 1 if masks else 3)
    if key.kernel == "forward_kernel" and key.bits == 32 and key.tokens > 32:
        return Config(32, 32, 256)  # larger, or with a pipeline, every Triton spills some layout on sm_90 or sm_100
    if narrow and key.bits < 64 and key.tokens <= 32:
        few = key.bits == 16 and key.tokens <= 8
        return Config(32, 1024 // key.bits if key.tokens <= 16 else 32, 128 if few else 256)
    if key.bits == 16:  # one stage: what the pipeline copies into shared memory, matrix products read with conflicts
        if key.kernel == "forward_kernel":  # it holds three sums for every token and pixel
            if key.tokens <= 8 or (key.layout == "nchw" and key.tokens <= 16):
                return Config(16 if key.layout == "nchw" else 32, 128, 128)
            return Config(64, 32, 256) if key.tokens > 16 else Config(32, 2048 // key.tokens, 256)
        if key.kernel == "token_gradient_kernel" and key.layout == "nchw" and key.tokens <= 8:
            return Config(16, 128, 128)  # on gfx942 more channels spill
        if key.tokens > 16 and masks and key.layout == "nhwc":
            return Config(64, 64, 256)
        if key.tokens > (16 if masks else 8):
            return Config(32, 128 if key.tokens <= 32 else 64, 256)
        return Config(64 if key.layout == "nhwc" else 32, 128, 128)
    if key.kernel == "token_gradient_kernel" and key.tokens <= 8:
        return Config(32, 64, 128)
    if key.tokens > 8:
        return Config(16, 64, 256, 2 if masks else 3)
    return Config(32, 64, 256, 2) if key.layout == "nhwc" else Config(16, 128, 128)


def _is_narrow(key: Key) -> bool:
    """Whether 16 bytes do not divide a pixel: elements are then loaded one by one, each with a register for its address."""
    return key.layout == "nhwc" and key.channels * key.bits % 128 != 0


def _default_registers(key: Key) -> int:
    """Enough for the kernels that were seen to spill when NVIDIA's assembler chose; 0 for all others."""
    if key.kernel not in ("forward_kernel", "mask_kernel", "token_gradient_kernel", "feature_gradient_kernel"):
        return 0
    if key.bits == 64 or key.kernel in ("forward_kernel", "feature_gradient_kernel"):
        return 255
    if key.kernel == "token_gradient_kernel" and key.bits == 32:
        return 0
    if key.kernel == "mask_kernel":
        return 128 if (key.bits, key.layout, key.tokens) == (16, "nchw", 8) else 168
    return 168 if _default_tile(key).threads == 128 else 128


def choose(key: Key, gpu: str) -> Config:
    """The nearest configuration measured on ``gpu`` with the same kernel, width, layout and tokens, or the default."""
    for path in (user_file(gpu), shipped_file(gpu)):
        measured = {k: c for k, c in read(path).items() if _alike(k, key)}
        if measured:
            return measured[min(measured, key=lambda k: (_distance(k, key), k.channels, k.log2_pixels))]
    return default(key)


def _alike(a: Key, b: Key) -> bool:
    return (a.kernel, a.bits, a.layout, a.tokens) == (b.kernel, b.bits, b.layout, b.tokens)


def _distance(a: Key, b: Key) -> int:
    return abs(a.channels.bit_length() - b.channels.bit_length()) + abs(a.log2_pixels - b.log2_pixels)


def user_file(gpu: str) -> Path:
    """Where configurations tuned on this machine are kept."""
    folder = os.environ.get(FOLDER) or Path.home() / ".config" / "maskd_triton"
    return Path(folder, _file_name(gpu))


def shipped_file(gpu: str) -> Path:
    """Where configurations that come with the package are kept."""
    return Path(__file__).parent / "configs" / _file_name(gpu)


def _file_name(gpu: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", gpu).strip("_") + ".json"


@functools.cache
def read(path: Path) -> dict[Key, Config]:
    """The configurations in a file; none if there is no such file."""
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text())["configs"]
        return {Key(**entry["key"]): Config(**entry["config"]) for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected what `python -m maskd_triton.kernels.autotune` writes; delete it or run that again"
        ) from error


def write(gpu: str, configs: dict[Key, Config], about: dict[str, str]) -> Path:
    """Add measured configurations, and how they were measured, to the user's file; an interrupted write changes nothing."""
    path = user_file(gpu)
    entries = [{"key": k._asdict(), "config": asdict(c)} for k, c in (read(path) | configs).items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump({"about": about, "configs": entries}, file, indent=1)
    os.replace(file.name, path)
    forget()
    return path


def finish_block(rows: int) -> int:
    """Rows of partial sums that the finishing kernel of stage 2 adds at a time."""
    return max(16, 1024 // rows)


def add_blocks(rows: int, itemsize: int) -> dict[str, int]:
    """Blocks in which the finishing kernel of stage 1's forward pass adds sums of channels and of pairs of ``rows`` tokens."""
    return {"ROWS": 64, "PAIR_ROWS": max(1, 16384 // itemsize // rows**2), **_parameter_block(rows, itemsize)}


def share_blocks(rows: int, itemsize: int) -> dict[str, int]:
    """Blocks in which the finishing kernel of stage 1's backward pass adds shares of gradients."""
    return {"ROWS": 64, "SHARE_ROWS": max(16, 2048 // rows), **_parameter_block(rows, itemsize)}


def _parameter_block(rows: int, itemsize: int) -> dict[str, int]:
    """Channels of a block that holds pool rows of all strips and tokens in registers, and what a program takes: few run."""
    return {"BLOCK_C": max(4, min(64, 1024 // (rows * itemsize))), "num_warps": itemsize, **most_registers(255)}


def pool_blocks(itemsize: int) -> dict[str, int]:
    """Tile of the kernel that adds up valid pixels, tiles in a program's run, and its warps."""
    if itemsize == 8:  # no matrix instruction: the product is a [16, C, P] block
        return {"BLOCK_C": 8, "BLOCK_P": 16, "RUN": 16, "num_warps": 4, **most_registers(255)}
    return {"BLOCK_C": 64 if itemsize == 2 else 32, "BLOCK_P": 128 // itemsize, "RUN": 16, "num_warps": 4}
