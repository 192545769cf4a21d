"""What a source may use of the recipe it stands in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Context:
    """The surroundings of a recipe.

    Attributes:
        folder: What relative paths start from.
        allow_code: Whether Python code that the recipe names may be imported.
    """

    folder: Path
    allow_code: bool = True

    def path(self, name: str | Path) -> Path:
        """A path of the recipe, made absolute."""
        return (self.folder / Path(name).expanduser()).resolve()
