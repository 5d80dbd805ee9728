"""What ``test_pyramid.py`` runs for a dtype and a layout: both stages on pyramids of 500 image sizes, and how many variants of
every kernel were compiled."""

import random
import sys
import warnings

from bench import inspect


def main(dtype: str, layout: str) -> None:
    random.seed(0)
    warnings.simplefilter("ignore")
    with inspect.compiling_for(inspect.TARGETS["sm_90"]):
        for _ in range(500):
            h, w = random.randint(320, 800), random.randint(320, 1344)
            sizes = tuple((-(-h // stride), -(-w // stride)) for stride in (8, 16, 32, 64, 128))
            inspect.Case(dtype, layout, channels=16, sizes=sizes).step()
        counts = {k.fn.__name__: sum(len(cache[0]) for cache in k.device_caches.values()) for k in inspect.KERNELS}
    print(counts)
    # a launch for the levels that are aligned and one for the others: from 1 to 5 levels each
    assert all(1 <= n <= 10 for n in counts.values()), counts


if __name__ == "__main__":
    main(*sys.argv[1:])
