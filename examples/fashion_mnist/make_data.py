"""Writes data.npz: the calibration and test images that the recipes use.

Run from the repository's root: python -m examples.fashion_mnist.make_data

The images stay unsigned bytes. Whoever reads them divides by 255, subtracts the mean 0.2860
and divides by the standard deviation 0.3530.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt

from examples.fashion_mnist.idx import DEFAULT_FOLDER, read_split


def balanced(labels: npt.NDArray[np.int64], count: int, seed: int) -> npt.NDArray[np.int64]:
    """Draws indices so that the classes' counts differ by at most one.

    Args:
        labels: Class of each sample, [N].
        count: How many to draw.
        seed: Seed of the draw.

    Returns:
        Indices into labels in random order, [count].
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    share, extra = divmod(count, len(classes))
    drawn = [
        rng.choice(np.flatnonzero(labels == label), share + (place < extra), replace=False)
        for place, label in enumerate(classes)
    ]
    return rng.permutation(np.concatenate(drawn))


def main() -> None:
    """Parses the command line and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("data.npz"))
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    train_images, train_labels = read_split(args.data, "train")
    test_images, test_labels = read_split(args.data, "t10k")
    drawn = balanced(train_labels, args.calibration, args.seed)
    np.savez_compressed(
        args.output,
        calibration_images=train_images[drawn],
        calibration_labels=train_labels[drawn],
        test_images=test_images[: args.test],
        test_labels=test_labels[: args.test],
    )
    print(f"{args.output}: {args.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
