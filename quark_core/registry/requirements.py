"""Whether what a backend requires is installed, from metadata alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata

# What nearly every requirement and version looks like. Comparing those as tuples spares
# `quark list` the import of packaging, a sixth of its time; packaging judges all others.
_PLAIN = re.compile(r"([A-Za-z0-9._-]+?)((?:(?:>=|<)\d+(?:\.\d+)*,?)*)")
_BOUND = re.compile(r"(>=|<)([\d.]+)")
_RELEASE = re.compile(r"(\d+(?:\.\d+)*)(?:\+[A-Za-z0-9.]+)?")


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
    plain = _PLAIN.fullmatch(text)
    if plain:
        name = plain[1]
    else:
        from packaging.requirements import Requirement as Parsed

        name = Parsed(text).name
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Requirement(text, None, False)
    return Requirement(text, installed, satisfies(installed, text))


def missing(requires: Iterable[str]) -> list[Requirement]:
    """The requirements that are not satisfied."""
    return [found for found in map(check, requires) if not found.satisfied]


def satisfies(version: str, text: str) -> bool:
    """Whether a version is in the range that a requirement names; prereleases count."""
    plain, release = _PLAIN.fullmatch(text), _RELEASE.fullmatch(version)
    if plain and release:
        have = _numbers(release[1])
        return all(
            have >= _numbers(bound) if relation == ">=" else have < _numbers(bound)
            for relation, bound in _BOUND.findall(plain[2])
        )
    from packaging.requirements import Requirement as Parsed

    return Parsed(text).specifier.contains(version, prereleases=True)


def _numbers(release: str) -> tuple[int, ...]:
    """The numbers of a release; 2.0 equals 2."""
    numbers = [int(part) for part in release.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
