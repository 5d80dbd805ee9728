"""What ``test_pyramid.py`` runs for a dtype and a layout: both stages on pyramids of 500 image sizes, and how many variants of
every kernel were compiled."""

import random
import sys

import torch

from bench import inspect
from maskd_triton import _ops


def main(dtype_name: str, layout: str) -> None:
    dtype = getattr(torch, dtype_name)
    random.seed(0)
    tokens, rows, bias = ([torch.empty(shape) for _ in range(5)] for shape in ((6, 16), (9, 6, 16), (6,)))
    with inspect._compiling_for(inspect.TARGETS["sm_90"]):
        for _ in range(500):
            h, w, n = random.randint(320, 800), random.randint(320, 1344), random.randint(1, 3)
            sizes = [(-(-h // stride), -(-w // stride)) for stride in (8, 16, 32, 64, 128)]
            maps = [torch.empty(n, 16, a * b, dtype=dtype) for a, b in sizes]
            if layout == "nhwc":
                maps = [torch.empty(n, a * b, 16, dtype=dtype).transpose(1, 2) for a, b in sizes]
            heights, step = [a for a, _ in sizes], torch.zeros((), dtype=torch.int64)
            student = [m.unflatten(2, size) for m, size in zip(maps, sizes, strict=True)]
            teacher = [torch.empty_like(m) for m in student]
            loss, masks, weights = _ops.distill(
                student, teacher, tokens, rows, bias, [], [], [], [], [], None, True, step, 1000, 2, 1e-12, "triton"
            )
            _ops.distill_backward(loss, student, teacher, masks, weights, [], 2, "triton")
            y, dice, kept = _ops.learn(maps, tokens, [], rows, bias, [], [], heights, "triton")
            _ops.learn_backward(y, dice, maps, tokens, [], rows, bias, [], kept, heights, False, "triton")
            _ops.pool(maps, [torch.empty(n, a * b, dtype=torch.uint8) for a, b in sizes], heights, "triton")
        counts = {inspect.kernel_name(k): sum(len(cache[0]) for cache in k.device_caches.values()) for k in inspect.KERNELS}
    print(counts)
    assert {name: n for name, n in counts.items() if not 1 <= n <= 8} == {"feature_gradient_kernel": 0}, counts


if __name__ == "__main__":
    main(*sys.argv[1:])
