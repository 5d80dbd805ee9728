"""A GPU made of numpy: runs the PTX that Triton compiles on CPU tensors, and checks every access. No GPU is needed.

A launch goes through Triton's ordinary path for an NVIDIA GPU of compute capability 8.0 or 9.0. Checked are

* global memory: inside the views that were passed, aligned, written before it is read (`driver.Device.initcheck`), and
  free of races: of two threads that access one place in a launch, one writing, a barrier of their CTA is between;
* shared memory: inside, aligned, free of races between warps. It starts as NaN. ``cp.async`` takes effect at the wait that
  covers it; what a ``wgmma`` reads counts as being read until the wait that covers it, unless ptxas serialises (C7515).

Lanes that store different values to one place at once are a race, unless they are of one warp and differ by rounding only.

Not covered: timing; caches and their eviction policies; other interleavings than lowest-pc-first (the race checks stand in for
them); a missing ``__syncwarp`` or ``fence.proxy.async``; registers of a ``wgmma`` in flight; contraction of mul and add by
ptxas (LLVM's own is in the PTX); the error of approximate functions (``ex2``, ``rcp``, ``div.full`` are correctly rounded here,
1 to 2 units off on a GPU); tensor cores' truncating sums (float32 sums here); atomics, TMA, mbarrier, tcgen05, fp8, textures,
clusters, barriers of a part of the CTA. An unknown instruction raises NotImplementedError with its line. PTX is not machine
code: a bug of ptxas does not show.
"""
