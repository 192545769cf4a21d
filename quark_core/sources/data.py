"""The host's data sources: each returns batches that can be read again and again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quark_core.batch import Batch
from quark_core.errors import DataError, MissingDependencyError, did_you_mean
from quark_core.sources import code
from quark_core.sources.context import Context
from quark_core.sources.options import (
    ArrayOptions,
    ImageFolderOptions,
    Normalize,
    PythonDataOptions,
    TextOptions,
)

IGNORED = -100
"""Target of positions that have no right answer, as torch's cross entropy has it."""


class Batches(Sequence[Batch]):
    """Samples cut into batches when they are asked for.

    Args:
        samples: How many samples there are.
        batch_size: Samples in a batch; the last may have fewer.
        cut: Makes the batch of samples ``start`` to ``stop``.
    """

    def __init__(self, samples: int, batch_size: int, cut: Callable[[int, int], Batch]) -> None:
        self._samples, self._size, self._cut = samples, batch_size, cut

    def __len__(self) -> int:
        return math.ceil(self._samples / self._size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self._size
        return self._cut(start, min(start + self._size, self._samples))


def from_python(options: PythonDataOptions, context: Context) -> Iterable[Any]:
    """What the recipe's callable returns, limited to ``batches``.

    Raises:
        UntrustedContentError: Code is not allowed.
        DataError: The callable fails, or returns nothing iterable.
    """
    found = code.call(options.factory, options.kwargs, context, "data.factory")
    if isinstance(found, Iterator):
        # A generator could be read only once, but calibration may take several passes.
        return [item for _, item in zip(range(options.batches or 10**9), found, strict=False)]
    if not isinstance(found, Iterable) or isinstance(found, str | Mapping):
        raise DataError(
            f"{options.factory!r} returned {type(found).__name__}, not batches",
            where="data.factory",
            fix="Return a list or DataLoader of batches, or write a generator function",
        )
    return found if options.batches is None else _Limited(found, options.batches)


class _Limited:
    """The first items of something that can be iterated again."""

    def __init__(self, items: Iterable[Any], count: int) -> None:
        self._items, self._count = items, count

    def __iter__(self) -> Iterator[Any]:
        return (item for _, item in zip(range(self._count), self._items, strict=False))


def from_npz(options: ArrayOptions, context: Context) -> Batches:
    """Arrays of a numpy archive.

    Raises:
        DataError: The archive is damaged, lacks an array, or the arrays do not fit together.
    """
    file = context.path(options.path)
    try:
        with np.load(file, allow_pickle=False) as archive:
            wanted = [*_inputs(options).values(), *filter(None, [options.target])]
            arrays = {
                name: torch.from_numpy(archive[name]) for name in wanted if name in archive.files
            }
            return _from_arrays(options, arrays, archive.files)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{file} cannot be read as npz",
            where="data.path",
            cause=str(error).splitlines()[0],
            fix="Write it with numpy.savez or savez_compressed, without object arrays",
        ) from error


def from_safetensors(options: ArrayOptions, context: Context) -> Batches:
    """Arrays of a safetensors file.

    Raises:
        DataError: The file is damaged, lacks an array, or the arrays do not fit together.
    """
    from quark_core.sources.checkpoint import read_state

    state = read_state(context.path(options.path), "data.path")
    return _from_arrays(options, state, list(state))


def from_image_folder(options: ImageFolderOptions, context: Context) -> Batches:
    """Images in one subfolder a class, read when their batch is asked for.

    Raises:
        MissingDependencyError: Pillow is not installed.
        DataError: There are no class folders, or an image cannot be read.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "source images needs Pillow", where="data.source", fix="Run: pip install pillow"
        ) from error
    root = context.path(options.path)
    classes = sorted(folder for folder in root.iterdir() if folder.is_dir())
    files = [
        (file, label)
        for label, folder in enumerate(classes)
        for file in sorted(folder.iterdir())
        if file.is_file()
    ][: options.samples]
    if not files:
        raise DataError(
            f"{root} has no images in subfolders",
            where="data.path",
            fix="Put the images of each class into a folder of its own",
        )

    def read(file: Path) -> torch.Tensor:
        try:
            with Image.open(file) as image:
                pixels = image.convert("L" if options.grey else "RGB")
                if options.size is not None:
                    height, width = options.size
                    pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
                array = np.asarray(pixels)
        except OSError as error:
            raise DataError(f"{file} is no image", where="data.path", cause=str(error)) from error
        return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)

    def cut(start: int, stop: int) -> Batch:
        images = [read(file) for file, _ in files[start:stop]]
        if len({image.shape for image in images}) > 1:
            raise DataError(
                "the images differ in size", where="data.path", fix="Give size: [height, width]"
            )
        labels = torch.tensor([label for _, label in files[start:stop]])
        return Batch((_as_input(torch.stack(images), options.normalize),), {}, labels)

    return Batches(len(files), options.batch_size, cut)


def from_text(options: TextOptions, context: Context) -> Batches:
    """Windows of tokens ``[batch, length]`` that do not overlap, with the next tokens as target.

    Raises:
        MissingDependencyError: transformers is not installed.
        DataError: The text is shorter than one window, or a JSONL line has no text.
    """
    from quark_core.sources.models import require_transformers

    tokenizers = require_transformers("data.tokenizer").AutoTokenizer
    folder = context.path(options.tokenizer)
    name = str(folder) if folder.is_dir() else options.tokenizer
    try:
        tokenizer = tokenizers.from_pretrained(name)
    except Exception as error:
        raise DataError(
            f"transformers cannot load the tokenizer {name!r}",
            where="data.tokenizer",
            cause=str(error).splitlines()[0][:200],
        ) from error
    text = _read_text(context.path(options.path), options.field)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = min(len(ids) // options.length, options.samples or len(ids))
    if windows == 0:
        raise DataError(
            f"{options.path} has {len(ids)} tokens, fewer than one window of {options.length}",
            where="data.length",
        )
    grid = torch.tensor(ids[: windows * options.length]).view(windows, options.length)

    def cut(start: int, stop: int) -> Batch:
        rows = grid[start:stop]
        target = torch.nn.functional.pad(rows[:, 1:], (0, 1), value=IGNORED)
        return Batch((), {"input_ids": rows}, target)

    return Batches(windows, options.batch_size, cut)


def _read_text(file: Path, field: str) -> str:
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".jsonl":
        return text
    parts = []
    for number, line in enumerate(filter(str.strip, text.splitlines()), start=1):
        try:
            parts.append(str(json.loads(line)[field]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"line {number} of {file.name} has no text under {field!r}", where="data.field"
            ) from error
    return "\n\n".join(parts)


def _inputs(options: ArrayOptions) -> dict[str, str]:
    return {"": options.input} if isinstance(options.input, str) else options.input


def _from_arrays(
    options: ArrayOptions, arrays: Mapping[str, torch.Tensor], known: Sequence[str]
) -> Batches:
    inputs = _inputs(options)
    for field, name in [
        *(("input", name) for name in inputs.values()),
        *([("target", options.target)] if options.target else []),
    ]:
        if name not in arrays:
            hint = did_you_mean(name, known) or f"It has {', '.join(known)}"
            raise DataError(
                f"{options.path} has no array {name!r}", where=f"data.{field}", fix=hint
            )
    lengths = {name: len(arrays[name]) for name in [*inputs.values(), options.target or ""] if name}
    if len(set(lengths.values())) > 1:
        words = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"the arrays differ in length: {words}", where="data.input")
    samples = min(next(iter(lengths.values())), options.samples or 10**18)
    if samples == 0:
        raise DataError(f"{options.path} holds no samples", where="data.input")

    def cut(start: int, stop: int) -> Batch:
        rows = {
            argument: _as_input(arrays[name][start:stop], options.normalize)
            for argument, name in inputs.items()
        }
        target = arrays[options.target][start:stop] if options.target else None
        if isinstance(options.input, str):
            return Batch((rows[""],), {}, target)
        return Batch((), rows, target)

    return Batches(samples, options.batch_size, cut)


def _as_input(values: torch.Tensor, normalize: Normalize | None) -> torch.Tensor:
    if normalize is None:
        return values
    scaled = values.float() / 255 if values.dtype == torch.uint8 else values.float()
    channels = values.shape[1] if values.ndim > 1 else 0
    if len(normalize.mean) not in (1, channels):
        raise DataError(
            f"normalize has {len(normalize.mean)} channels, the data {channels}",
            where="data.normalize",
        )
    shape = (1, -1, *[1] * (values.ndim - 2))
    mean = torch.tensor(normalize.mean).view(shape)
    return (scaled - mean) / torch.tensor(normalize.std).view(shape)
