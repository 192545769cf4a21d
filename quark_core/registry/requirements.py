"""Whether what a backend requires is installed, from metadata alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata


@dataclass(frozen=True)
class Requirement:
    """A requirement against what is installed.

    Attributes:
        text: As pip spells it.
        installed: Version found, or None.
        satisfied: Whether that version is in the wanted range.
    """

    text: str
    installed: str | None
    satisfied: bool

    def __str__(self) -> str:
        return f"{self.text} ({self.installed or 'not'} installed)"


@lru_cache(maxsize=256)
def check(text: str) -> Requirement:
    """Compare one requirement with the installed distributions."""
    from packaging.requirements import Requirement as Parsed

    parsed = Parsed(text)
    try:
        installed = metadata.version(parsed.name)
    except metadata.PackageNotFoundError:
        return Requirement(text, None, False)
    return Requirement(text, installed, parsed.specifier.contains(installed, prereleases=True))


def missing(requires: Iterable[str]) -> list[Requirement]:
    """The requirements that are not satisfied."""
    return [found for found in map(check, requires) if not found.satisfied]
