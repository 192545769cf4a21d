"""Content hashes: what a stage depends on, and what it wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quark_core.batch import as_batch, leaves

if TYPE_CHECKING:
    import torch

_BYTES = 16


def of_data(value: Any) -> str:
    """Hash of plain data; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=_BYTES).hexdigest()


def of_file(file: Path) -> str:
    """Hash of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, _hasher).hexdigest()


def of_files(files: Iterable[Path]) -> str:
    """Hash of several files' names and contents."""
    return of_data(sorted((file.name, of_file(file)) for file in files))


def of_model(model: torch.nn.Module) -> str:
    """Hash of a model's weights: names, dtypes, shapes and values, and the module's layout."""
    hasher = _hasher()
    hasher.update(repr(model).encode())
    for name, tensor in model.state_dict().items():
        hasher.update(name.encode())
        _add(hasher, tensor)
    return hasher.hexdigest()


def of_batches(items: Iterable[Any], limit: int | None = None) -> str:
    """Hash of the batches' inputs and targets, of the first ``limit`` ones."""
    hasher = _hasher()
    for index, item in enumerate(items):
        if limit is not None and index >= limit:
            break
        batch = as_batch(item)
        hasher.update(repr(sorted(batch.kwargs)).encode())
        for tensor in leaves((batch.args, batch.kwargs, batch.target)):
            _add(hasher, tensor)
    return hasher.hexdigest()


@lru_cache(maxsize=64)
def of_package(name: str) -> str:
    """Hash of a package's Python files, so that edited code counts as another version."""
    spec = find_spec(name)
    if spec is None:
        return ""
    hasher = _hasher()
    if spec.submodule_search_locations is None:
        files = [Path(spec.origin)] if spec.origin else []
    else:
        roots = [Path(root) for root in spec.submodule_search_locations]
        files = sorted(file for root in roots for file in root.rglob("*.py"))
    for file in files:
        hasher.update(file.name.encode())
        hasher.update(file.read_bytes())
    return hasher.hexdigest()


def _hasher() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=_BYTES)


def _add(hasher: hashlib.blake2b, tensor: torch.Tensor) -> None:
    import torch

    hasher.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    hasher.update(data.numpy().data)
