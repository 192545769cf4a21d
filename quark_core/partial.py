"""Partial: finished parts of a long step, kept so that an interrupted one can go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    import torch


class Partial:
    """Tensors by name, each name written in one step or not at all.

    A backend that works layer by layer asks :meth:`get` before a layer, does the layer's passes
    only if nothing is there, and hands the result to :meth:`put`. A run deletes the folder when
    the step is finished.

    Args:
        folder: Where the tensors are kept; made when first needed. It must belong to one model,
            configuration and set of data. None keeps nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def get(self, name: str) -> dict[str, torch.Tensor] | None:
        """What an earlier attempt put there, on the CPU; None if it did not get so far."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._file(name)
        if file is None or not file.exists():
            return None
        try:
            return load_file(file)
        except SafetensorError:
            # A disk that was full, say: the part is done again.
            file.unlink()
            return None

    def put(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the tensors of a finished part; tensors may share memory.

        Raises:
            OSError: They cannot be written.
        """
        import torch
        from safetensors.torch import save_file

        file = self._file(name)
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".new")
        own = {
            key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, tensor in tensors.items()
        }
        save_file(own, beside)
        beside.replace(file)

    def _file(self, name: str) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"{quote(name, safe='')}.safetensors"
