"""What the commands share: options, plain tables, JSON, progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from quark_core.recipe.load import LoadedRecipe

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
Options = Callable[[FunctionT], FunctionT]

recipe_argument = click.argument(
    "recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PATH=VALUE",
    help="Override a value of the recipe, such as quantizer.weight=mxfp4. Repeatable.",
)
no_code_option = click.option(
    "--no-code", is_flag=True, help="Refuse recipes that name Python code to be run."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


_TALKATIVE = ("torchao", "torch.utils._pytree")
"""Loggers that warn whenever transformers is imported beside torchao."""


def load(
    recipe: Path, overrides: tuple[str, ...], quantizer: str | None, *, no_code: bool
) -> LoadedRecipe:
    """Read a recipe, and quiet what its libraries would tell their developers meanwhile."""
    import logging

    from quark_core.recipe.load import load_recipe

    if not sys.warnoptions:
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
    return load_recipe(recipe, overrides=overrides, quantizer=quantizer, allow_code=not no_code)


def echo_json(data: Any) -> None:
    """Print data as JSON to standard output."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def echo_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns to standard output; the last column may be of any width.

    Plain on purpose: listings must not wait for a drawing library to be imported.
    """
    table = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[index]) for row in table) for index in range(len(head) - 1)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]).rstrip())


def draw(renderable: Any) -> None:
    """Print a rich table to standard output; wide and uncoloured when that is no terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160
    Console(file=sys.stdout, width=width, highlight=False).print(renderable)
