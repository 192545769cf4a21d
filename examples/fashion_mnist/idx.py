"""Reads Fashion-MNIST's gzip-compressed idx files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Reads one idx file of unsigned bytes.

    Args:
        path: The .gz file.

    Returns:
        The array, in the shape that the file's header gives.

    Raises:
        ValueError: If the file does not hold unsigned bytes.
    """
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    rank = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=rank, offset=4).astype(int)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_split(folder: Path, split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Reads the images and labels of one split.

    Args:
        folder: The folder of the idx files.
        split: "train" (60,000 images) or "t10k" (10,000 images).

    Returns:
        Images [N, 1, 28, 28] and labels [N].
    """
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    return images[:, None], labels.astype(np.int64)
