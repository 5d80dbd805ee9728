"""What ``test_pyramid.py`` runs for a dtype and a layout: both stages on pyramids of 500 image sizes, and how many variants of
every kernel were compiled."""

import random
import sys

import torch

from bench import inspect
from maskd_triton._ops.distill import distill_backward, masked_distill
from maskd_triton._ops.learn import learn_backward, masked_learn
from maskd_triton._ops.pool import pool
from maskd_triton._records import DistillOptions, DistillTables, LearnOptions, LearnTables, flat


def main(dtype_name: str, layout: str) -> None:
    dtype = getattr(torch, dtype_name)
    random.seed(0)
    tokens, rows, bias = ([torch.empty(shape) for _ in range(5)] for shape in ((6, 16), (9, 6, 16), (6,)))
    with inspect.compiling_for(inspect.TARGETS["sm_90"]):
        for _ in range(500):
            h, w, n = random.randint(320, 800), random.randint(320, 1344), random.randint(1, 3)
            sizes = [(-(-h // stride), -(-w // stride)) for stride in (8, 16, 32, 64, 128)]
            maps = [torch.empty(n, 16, a * b, dtype=dtype) for a, b in sizes]
            if layout == "nhwc":
                maps = [torch.empty(n, a * b, 16, dtype=dtype).transpose(1, 2) for a, b in sizes]
            heights, customised = [a for a, _ in sizes], torch.ones((), dtype=torch.bool)
            student = [m.unflatten(2, size) for m, size in zip(maps, sizes, strict=True)]
            teacher = [torch.empty_like(m) for m in student]
            options = DistillOptions(DistillTables(tokens, rows, bias), customised=customised, custom_mask=True)
            outputs = masked_distill(student, teacher, options, "triton")
            distill_backward(student, teacher, "triton", outputs.per_image, *outputs.kept(options))
            tables = LearnTables(tokens, pool_rows=rows, pool_bias=bias)
            y, dice, kept = masked_learn(maps, LearnOptions(tables, [], [], heights), "triton")
            learn_backward(maps, "triton", flat(tables), [], [], heights, y, dice, *kept, False)
            pool(maps, [torch.empty(n, a * b, dtype=torch.uint8) for a, b in sizes], heights, "triton")
        counts = {k.fn.__name__: sum(len(cache[0]) for cache in k.device_caches.values()) for k in inspect.KERNELS}
    print(counts)
    assert {name: n for name, n in counts.items() if not 1 <= n <= 8} == {"feature_gradient_kernel": 0}, counts


if __name__ == "__main__":
    main(*sys.argv[1:])
