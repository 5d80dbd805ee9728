"""Find the fastest launch configurations on this GPU: ``python -m bench.autotune``.

Times every candidate with a cold L2 cache, for every kernel, dtype and layout given, in two buckets of pixels (a pyramid of 2
and one of 16 images), and writes ``~/.config/maskd_triton/<GPU>.json`` (or ``$MASKD_TRITON_CONFIGS``), where the library finds
it. To ship it with the library, copy it to ``kernels/configs/`` and commit it as it is. Without a GPU it says so and exits
with 2.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from maskd_triton.kernels import autotune, tuning

from . import environment

KERNELS = (*tuning.READING, *tuning.WRITING)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.autotune", description=__doc__)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--bits", nargs="+", type=int, choices=(16, 32), default=(16, 32), help="of the features")
    parser.add_argument("--layout", nargs="+", choices=("nchw", "nhwc"), default=("nchw", "nhwc"))
    parser.add_argument("--channels", nargs="+", type=int, default=[256])
    parser.add_argument("--tokens", nargs="+", type=int, default=[6])
    parser.add_argument("--log2-pixels", nargs="+", type=int, default=[18, 21], help="of all levels and images of a launch")
    parser.add_argument("--out", type=Path, help="a second copy of the file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.autotune: torch sees no GPU here, so there is nothing to tune; nothing was run")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    keys = [
        tuning.Key(kernel, bits, layout, channels, tuning.token_rows(tokens), pixels)
        for kernel in args.kernel
        for bits in args.bits
        for layout in args.layout
        for channels in args.channels
        for tokens in args.tokens
        for pixels in args.log2_pixels
    ]
    about = {k: str(v) for k, v in environment.describe(device).items()}
    autotune.tune(keys, device, about=about, say=lambda line: print(line, flush=True))
    path = tuning.user_file(tuning.gpu_name(device))
    print(f"written to {path}")
    if args.out:
        shutil.copyfile(path, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
