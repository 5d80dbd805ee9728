"""What a kernel must not do. Messages name the kernel, the line of PTX and of source, the CTA and the thread."""


class PtxError(RuntimeError):
    """Base of all that the emulator finds in a kernel."""


class MemoryFault(PtxError):
    """An access outside of every tensor, or not aligned to its size."""


class Race(PtxError):
    """Two threads that nothing orders access one place, and one of them writes."""


class Uninitialised(PtxError):
    """A read of memory that nothing has written."""
