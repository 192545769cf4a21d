"""quark-pt2e: torchao and ExecuTorch PT2E quantizers behind the quark_core interface."""

__version__ = "0.1.0"
