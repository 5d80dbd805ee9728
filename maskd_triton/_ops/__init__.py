"""The torch.library operators: for each stage one forward and one backward for all levels, and their derivatives.

Opaque operators rather than ``triton_op``: the CPU path and the choice of launch configuration are the same in eager mode,
under compile and in an exported graph. The ``autograd.Function`` of an operator stands outside of it.
"""
