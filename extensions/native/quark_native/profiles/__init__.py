"""Other libraries' fake quantization, reproduced bit for bit, defects included.

One module a library. A profile answers the question what that library would have returned; the
formats of this package are the place for what is right. ``Format.parse(..., profile="dmx")`` makes
a format of them (see :mod:`~quark_native.profiles.adapter`); the functions take the libraries' own
parameters.
"""
