"""quark-native: number formats, observers and quantized modules of our own, in plain torch."""

__version__ = "0.1.0"
