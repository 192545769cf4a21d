"""``quark schema``: JSON schemas for editors and for other programs."""

from __future__ import annotations

import click

from quark_core.cli.output import echo_json


@click.command("schema")
@click.argument("name", default="recipe")
def command(name: str) -> None:
    """Print the JSON schema of a recipe or of a backend's configuration.

    NAME is a backend, for the schema of the recipe's quantizer section, or recipe (the default)
    for all of it.
    """
    if name == "recipe":
        from quark_core.recipe.schema import Recipe

        echo_json(Recipe.model_json_schema())
        return
    from quark_core.registry import registry

    echo_json(registry().config_class(name).model_json_schema())
