"""Search for launch configurations on the GPU at hand. Nothing here runs unless it is asked for: ``python -m bench.autotune``,
or ``MASKD_TRITON_AUTOTUNE=1``."""

import itertools
from collections.abc import Callable, Iterable

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .._records import Distilled, DistillOptions, DistillTables, LearnKept, LearnOptions, LearnTables, flat
from . import tuning
from .tuning import Config, Key

Clock = Callable[[Callable[[], object]], float]
DTYPES = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}


def candidates(key: Key) -> list[Config]:
    """The default first, then every tile with 8 to 32 elements a thread and runs of at least 128 contiguous bytes."""
    stages = (2, 3, 4) if key.kernel in tuning.READING else (1,)
    default = tuning.default(key)
    found = [default]
    for c, p, threads, n in itertools.product((16, 32, 64, 128), (32, 64, 128, 256), (128, 256), stages):
        run = (c if key.layout == "nhwc" else p) * key.bits // 8
        config = Config(c, p, threads, n, default.registers)
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
    about: dict[str, str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[Key, Config]:
    """The fastest candidate of every key on ``device``, written into the user's file (:func:`tuning.user_file`).

    ``clock`` gives the milliseconds of a call, ``about`` goes into the file, ``say`` gets a line per key.
    """
    best: dict[Key, Config] = {}
    for key in keys:
        call = _launch(key, device)
        times: dict[Config, float] = {}
        for config in candidates(key):
            with tuning.forced(key.kernel, config):
                try:
                    times[config] = clock(call)
                except OutOfResources:  # more shared memory or registers than this GPU has
                    continue
        best[key] = min(times, key=lambda config: times[config])
        default = times.get(tuning.default(key), float("nan"))
        say(f"{' '.join(map(str, key))}: {best[key]} {times[best[key]]:.4f} ms, default {default:.4f} ms, {len(times)} tried")
    tuning.write(tuning.gpu_name(device), best, about or {"by": "online tuning", "torch": torch.__version__})
    return best


def _launch(key: Key, device: torch.device) -> Callable[[], object]:
    """A call that launches the key's kernel over one level with about as many pixels; whatever else it launches costs the same
    with every candidate."""
    from .._ops.distill import distill_backward, masked_distill
    from .._ops.learn import learn_backward, masked_learn

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
        step = torch.zeros((), dtype=torch.int64, device=device)

        options = DistillOptions(DistillTables(tokens, rows, bias), step=step, custom_mask=True)

        def forward() -> Distilled:
            return masked_distill(student, teacher, options, "triton")

        if key.kernel == "forward_kernel":
            return forward
        loss, _, coefficients, masks = forward()
        return lambda: distill_backward(student, teacher, "triton", loss, coefficients, masks, [], [], options.mask_power)

    student, teacher = [student[0].flatten(2)], [teacher[0].flatten(2)]
    parameters_of_level = LearnTables(tokens, pool_rows=rows, pool_bias=bias)

    def learn() -> tuple[list[Tensor], Tensor, LearnKept]:
        return masked_learn(teacher, LearnOptions(parameters_of_level, (), (), [height]), "triton")

    if key.kernel in ("mask_kernel", "gate_kernel"):
        return learn
    _, dice, kept = learn()
    need_features = key.kernel == "feature_gradient_kernel"
    tables = flat(parameters_of_level)
    return lambda: learn_backward(teacher, "triton", tables, [], [], [height], student, dice, *kept, need_features)
