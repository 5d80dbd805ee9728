"""Find the fastest launch configurations on this GPU: ``python -m maskd_triton.kernels.autotune``.

Times every candidate with a cold L2 cache, for every kernel, dtype and layout given, in two buckets of pixels (a pyramid of 2
and one of 16 images). Writes ``~/.config/maskd_triton/<GPU>.json`` (or ``$MASKD_TRITON_CONFIGS/<GPU>.json``), where the
library finds it. To ship it with the library, copy it to ``kernels/configs/`` and commit it as it is. Without a GPU it says so
and exits with 2.

``MASKD_TRITON_AUTOTUNE=1`` tunes online: the first launch in a bucket that no file knows takes a few seconds, and its result
goes into the same file. Processes of one job tune on their own and may disagree, so for several GPUs tune beforehand.
"""

import argparse
import datetime
import itertools
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .._eager import acc_dtype
from .._records import Distilled, DistillOptions, DistillTables, LearnKept, LearnOptions, LearnTables
from . import distill, learn, tuning
from .tuning import Config, Key

Clock = Callable[[Callable[[], object]], float]
DTYPES = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}
KERNELS = (*tuning.READING, *tuning.WRITING)


def enable() -> None:
    """From now on tune online, in this process."""
    tuning.search = lambda key, device: tune([key], device)


def candidates(key: Key) -> list[Config]:
    """The default first, then every tile with 8 to 32 elements a thread and runs of at least 128 contiguous bytes."""
    stages = (1, 2, 3) if key.kernel in tuning.READING else (1,)
    found = [tuning.default(key)]
    for c, p, threads, n in itertools.product((16, 32, 64, 128), (32, 64, 128, 256), (128, 256), stages):
        run = (c if key.layout == "nhwc" else p) * key.bits // 8
        config = Config(c, p, threads, n)
        if 8 <= c * p // threads <= 32 and run >= 128 and config not in found:
            found.append(config)
    return found


def cold_median(call: Callable[[], object]) -> float:
    """Median milliseconds of a call, the L2 cache flushed before each."""
    return triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")


def tune(
    keys: Iterable[Key],
    device: torch.device,
    clock: Clock = cold_median,
    by: str = "online tuning",
    say: Callable[[str], None] = lambda line: None,
) -> dict[Key, Config]:
    """The fastest candidate of every key on ``device``, written into the user's file (`tuning.user_file`).

    ``clock`` gives the milliseconds of a call, ``by`` goes into the file, ``say`` gets a line per key.
    """
    best: dict[Key, Config] = {}
    for key in keys:
        best[key] = _fastest(key, _launch(key, device), clock, say)
    tuning.write(tuning.gpu_name(device), best, _about(by, device))
    return best


def _fastest(key: Key, call: Callable[[], object], clock: Clock, say: Callable[[str], None]) -> Config:
    times: dict[Config, float] = {}
    for config in candidates(key):
        with tuning.forced(key.kernel, config):
            try:
                times[config] = clock(call)
            except OutOfResources:  # more shared memory or registers than this GPU has
                continue
    best = min(times, key=lambda config: times[config])
    other = times.get(tuning.default(key), float("nan"))
    say(f"{' '.join(map(str, key))}: {best} {times[best]:.4f} ms, default {other:.4f} ms, {len(times)} tried")
    return best


def _about(by: str, device: torch.device) -> dict[str, str]:
    return {
        "by": by,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": tuning.gpu_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda or hip": str(torch.version.cuda or torch.version.hip),
    }


def _launch(key: Key, device: torch.device) -> Callable[[], object]:
    """A call that launches the key's kernel over one level with about as many pixels; whatever else it launches costs the same
    with every candidate."""
    with tuning.forced(key.kernel, tuning.default(key)):  # a launch that comes before the timed one is not searched for
        return _prepared(key, device)


def _prepared(key: Key, device: torch.device) -> Callable[[], object]:
    dtype = DTYPES[key.bits]
    n = min(4, 2**key.log2_pixels)
    height = 2 ** (key.log2_pixels // 2) // 2 or 1
    width = max(1, 2**key.log2_pixels // n // height)
    c, t = key.channels, key.tokens

    layout = torch.channels_last if key.layout == "nhwc" else torch.contiguous_format

    def features() -> list[Tensor]:
        return [torch.randn((n, c, height, width), device=device, dtype=dtype).contiguous(memory_format=layout)]

    def parameters(*shape: int) -> list[Tensor]:
        return [torch.randn(shape, device=device) * c**-0.5]

    student, teacher = features(), features()
    tokens, rows, bias = parameters(t, c), parameters(9, t, c), parameters(t)
    if key.kernel in ("forward_kernel", "backward_kernel"):
        customised = torch.ones((), dtype=torch.bool, device=device)
        distill_options = DistillOptions(DistillTables(tokens, rows, bias), customised=customised, custom_mask=True)

        def forward() -> Distilled:
            outputs = Distilled.empty(student, distill_options, acc_dtype(dtype))
            distill.forward(student, teacher, distill_options, outputs)
            return outputs

        if key.kernel == "forward_kernel":
            return forward
        outputs = forward()
        return lambda: distill.backward(student, teacher, outputs.per_image, outputs.kept(distill_options))

    student, teacher = [student[0].flatten(2)], [teacher[0].flatten(2)]
    learn_options = LearnOptions(LearnTables(tokens, pool_rows=rows, pool_bias=bias), (), (), [height])

    def learned() -> tuple[Tensor, LearnKept]:
        kept = LearnKept.empty(teacher, learn_options.tables, acc_dtype(dtype))
        dice = kept.weights.new_empty((1, n))
        learn.forward(teacher, learn_options, dice, kept)
        return dice.sum(1), kept

    if key.kernel in ("mask_kernel", "gate_kernel"):
        return learned
    dice, kept = learned()
    gradients = LearnTables(*([torch.empty_like(x) for x in field] for field in learn_options.tables))
    need_features = key.kernel == "feature_gradient_kernel"
    return lambda: learn.backward(teacher, learn_options, student, dice, kept, gradients, [], need_features)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m maskd_triton.kernels.autotune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--bits", nargs="+", type=int, choices=(16, 32), default=(16, 32), help="of the features")
    parser.add_argument("--layout", nargs="+", choices=("nchw", "nhwc"), default=("nchw", "nhwc"))
    parser.add_argument("--channels", nargs="+", type=int, default=[256])
    parser.add_argument("--tokens", nargs="+", type=int, default=[6])
    parser.add_argument("--log2-pixels", nargs="+", type=int, default=[18, 21], help="of all levels and images of a launch")
    parser.add_argument("--out", type=Path, help="a second copy of the file")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"{parser.prog}: torch sees no GPU here, so there is nothing to tune; nothing was run")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    keys = [
        Key(kernel, bits, layout, channels, tuning.token_rows(tokens), pixels)
        for kernel in args.kernel
        for bits in args.bits
        for layout in args.layout
        for channels in args.channels
        for tokens in args.tokens
        for pixels in args.log2_pixels
    ]
    command = " ".join([parser.prog, *(sys.argv[1:] if arguments is None else arguments)])
    tune(keys, device, by=command, say=lambda line: print(line, flush=True))
    path = tuning.user_file(tuning.gpu_name(device))
    print(f"written to {path}")
    if args.out:
        shutil.copyfile(path, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
