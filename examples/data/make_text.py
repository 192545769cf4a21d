"""Cuts calibration.txt and evaluation.txt from Jane Austen's Persuasion (1818).

The novel's text is read from the data file of Debian's package r-cran-janeaustenr, without R.
Run from the repository's root: python -m examples.data.make_text
"""

from __future__ import annotations

import argparse
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

DEFAULT_SOURCE = Path("/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
TITLE = "Persuasion"
HEADING = re.compile(r"^Chapter \d+$", re.MULTILINE)

_STRING = 9  # R's type code of a character string, in the low byte of an item's flags


def books(source: Path) -> Iterator[list[str]]:
    """Yields the lines of each character vector in an R lazy-load database.

    Args:
        source: The .rdb file: blocks of a big-endian byte count and a zlib stream, each of
            which holds one vector in R's XDR serialization.

    Yields:
        The vector's strings.
    """
    raw = source.read_bytes()
    while raw:
        stream = zlib.decompressobj()
        block = stream.decompress(raw[4:])
        raw = stream.unused_data
        (encoding,) = struct.unpack_from(">i", block, 14)
        offset = 18 + encoding + 4
        (count,) = struct.unpack_from(">i", block, offset)
        offset += 4
        lines = []
        for _ in range(count):
            flags, size = struct.unpack_from(">ii", block, offset)
            if flags & 0xFF != _STRING:
                raise ValueError(f"{source} holds something other than character vectors")
            offset += 8 + size
            lines.append(block[offset - size : offset].decode())
        yield lines


def unwrap(lines: list[str]) -> str:
    """Joins wrapped lines into one line per paragraph, with an empty line between them."""
    paragraphs = "\n".join(line.strip() for line in lines).split("\n\n")
    joined = (" ".join(paragraph.split()) for paragraph in paragraphs)
    return "\n\n".join(paragraph for paragraph in joined if paragraph)


def cut(text: str, size: int) -> tuple[str, str]:
    """Cuts two consecutive runs of whole chapters, each the shortest of at least size characters.

    Args:
        text: The novel.
        size: Least length of each part, in characters.

    Returns:
        The first part and the one that follows it.
    """
    starts = [match.start() for match in HEADING.finditer(text)]
    middle = next(start for start in starts if start >= starts[0] + size)
    end = next(start for start in starts if start >= middle + size)
    return text[starts[0] : middle], text[middle:end]


def main() -> None:
    """Parses the command line and writes the two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--source", type=Path, default=DEFAULT_SOURCE)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--size", type=int, default=95_000)
    args = parser.parse_args()

    novel = next(lines for lines in books(args.source) if lines[0] == TITLE)
    parts = cut(unwrap(novel), args.size)
    for name, part in zip(("calibration", "evaluation"), parts, strict=True):
        path = args.folder / f"{name}.txt"
        path.write_text(part.strip() + "\n", encoding="utf-8")
        print(f"{path}: {path.stat().st_size} bytes, {len(HEADING.findall(part))} chapters")


if __name__ == "__main__":
    main()
