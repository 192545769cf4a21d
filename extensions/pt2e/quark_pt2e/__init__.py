"""quark-pt2e: torchao and ExecuTorch PT2E quantizers behind the quark_core interface."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__version__ = "0.1.0"


def load_program(path: Path | str) -> torch.export.ExportedProgram:
    """Load what the export ``pt2`` wrote, in any process.

    torch.export.load alone fails unless the libraries with the program's operations happen to be
    imported already.
    """
    import torch

    import quark_pt2e.backends  # noqa: F401 (imports torchao, which registers them)

    return torch.export.load(path)
