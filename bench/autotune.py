"""Another name of ``python -m maskd_triton.kernels.autotune``, beside the other benchmarks."""

from maskd_triton.kernels.autotune import main

if __name__ == "__main__":
    raise SystemExit(main())
