"""Other quantizers' arithmetic, bit for bit: one module a peer, its defects included.

A profile answers one question: what would that library have returned here? It is for comparing
and for reading old results, not for quantizing well; for that see :mod:`quark_native.formats`.
Each module has a ``VERSION``, and its functions take the peer's own parameters as keywords.
"""
