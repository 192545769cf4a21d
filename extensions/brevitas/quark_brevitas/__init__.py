"""quark-brevitas: Brevitas behind the quark_core interface."""

__version__ = "0.1.0"
