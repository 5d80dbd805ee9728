"""Launch configurations: a pure function of GPU, kernel, width of features, layout, channels, tokens and a bucket of pixels.

Nothing is timed, and nothing compiled twice, while a model trains. In this order:

1. ``<folder>/<GPU>.json`` of the user, written by ``python -m maskd_triton.kernels.autotune`` or by online tuning; the folder
   is ``$MASKD_TRITON_CONFIGS`` or else ``~/.config/maskd_triton``.
2. ``configs/<GPU>.json`` beside this file, for GPUs that were measured. None was yet.
3. `default`, chosen by compiling (``python -m bench.inspect``): no spill and 16-byte loads on sm_80 and sm_90.

The search itself (``autotune.py``) lies above this file, which only calls `search`.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = "MASKD_TRITON_CONFIGS"
READING = ("forward_kernel", "mask_kernel", "token_gradient_kernel")  # a program takes all channels of its pixels
WRITING = ("backward_kernel", "gate_kernel", "feature_gradient_kernel")  # a program takes one tile


@dataclass(frozen=True)
class Config:
    """Channels and pixels of a tile, threads of a program, stages of the load pipeline."""

    block_c: int
    block_p: int
    threads: int
    num_stages: int = 1

    @property
    def program(self) -> dict[str, int]:
        return {"num_warps": self.threads // warp_size()}

    @property
    def tile(self) -> dict[str, int]:
        return {"BLOCK_C": self.block_c, "BLOCK_P": self.block_p, **self.program}


class Key(NamedTuple):
    """The properties that a configuration may depend on.

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


Search = Callable[[Key, torch.device], object]
search: Search | None = None
"""Called where no file knows a key, unless a configuration is forced or a CUDA graph captured; it may `write` one."""

_forced: dict[str, Config] = {}
_generation = 0


def generation() -> int:
    """Another number whenever `config` may answer otherwise than before."""
    return _generation


def forget() -> None:
    """From now on plan every launch anew."""
    global _generation
    _generation += 1


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Inside, every launch of ``kernel`` takes ``config``: to measure it."""
    _forced[kernel] = config
    forget()
    try:
        yield
    finally:
        del _forced[kernel]
        forget()


def config(key: Key, device: torch.device) -> Config:
    """The configuration of a launch."""
    if key.kernel in _forced:
        return _forced[key.kernel]
    gpu = gpu_name(device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if search and not _forced and not capturing and key not in read(shipped_file(gpu)) | read(user_file(gpu)):
        search(key, device)
    return choose(key, gpu)


def gpu_name(device: torch.device) -> str:
    """The name of a device in its files' names."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choose(key: Key, gpu: str) -> Config:
    """The nearest configuration measured on ``gpu`` with the same kernel, width, layout and tokens, or the default."""
    for path in (user_file(gpu), shipped_file(gpu)):
        alike = {k: c for k, c in read(path).items() if k[:3] == key[:3] and k.tokens == key.tokens}
        if alike:
            return alike[min(alike, key=lambda k: (_distance(k, key), k))]
    return default(key)


def _distance(a: Key, b: Key) -> int:
    return abs(a.channels.bit_length() - b.channels.bit_length()) + abs(a.log2_pixels - b.log2_pixels)


def default(key: Key) -> Config:
    """The configuration where nothing was measured."""
    if key.kernel in WRITING:
        across, along = (16, 64) if key.bits == 64 else (32, 64 if key.kernel == "feature_gradient_kernel" else 128)
        narrow = key.layout == "nhwc" and key.channels * key.bits % 128 != 0  # elements are loaded one by one
        threads = 256 if narrow or across * along < 4096 else 128
        if key.layout == "nchw":
            return Config(across, along, threads)
        channels = min(along, max(across, power_of_2(key.channels)))
        return Config(channels, across * along // channels, threads)
    if key.bits == 64:  # no matrix instruction: the product is a [T, C, P] block
        return Config(2, 16, 256) if key.tokens > 16 else Config(8, 32, 128)
    across = 64 if key.bits == 16 and key.tokens > 16 else 32  # 16 bytes for every thread
    return Config(across, 1024 // key.tokens, 256)


def user_file(gpu: str) -> Path:
    """The file of configurations that were tuned on this machine."""
    folder = os.environ.get(FOLDER) or Path.home() / ".config" / "maskd_triton"
    return Path(folder, _file_name(gpu))


def shipped_file(gpu: str) -> Path:
    """The file of configurations that come with the package."""
    return Path(__file__).parent / "configs" / _file_name(gpu)


def _file_name(gpu: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", gpu).strip("_") + ".json"


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
    entries: list[dict[str, Any]] = [{"key": k._asdict(), "config": asdict(c)} for k, c in (read(path) | configs).items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump({"about": about, "configs": entries}, file, indent=1)
    os.replace(file.name, path)
    forget()
    return path
