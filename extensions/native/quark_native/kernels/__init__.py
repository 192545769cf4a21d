"""The arithmetic of the formats, fast: compiled code on the CPU, Triton on the GPU.

:mod:`~quark_native.kernels.dispatch` chooses by device, dtype and layout. A kernel equals the
specification in :mod:`quark_native.formats` bit for bit, or is not used: where a format or tensor
has none, the specification itself computes in plain torch.
"""
