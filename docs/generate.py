"""Writes the pages that are made from the code: the command line, formats, and the schemas.

``python docs/generate.py`` writes them; ``--check`` fails if a page in the tree is not what would
be written, so that a change of the public face is always deliberate.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from quark_core.cli import quark
from quark_core.formats import EXAMPLES, parse_format
from quark_core.recipe.schema import Recipe
from quark_core.registry import registry

HERE = Path(__file__).parent
BACKENDS = (
    "native",
    "brevitas",
    "ethos-u",
    "tosa",
    "vgf",
    "xnnpack",
    "x86-inductor",
    "arm-inductor",
    "vulkan",
    "pt2e",
)


def cli_page() -> str:
    """Help of the program and of each command."""
    parts = ["# The command line\n\nResults go to standard output, progress and errors to standard"]
    parts[0] += " error. Every reading command takes `--json`.\n"
    for name, text in _helps(quark, "quark"):
        heading = "" if name == "quark" else f"## {name}\n\n"
        parts.append(f"{heading}```text\n{text}\n```\n")
    return "\n".join(parts)


def _helps(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
    """Names and helps of a command and of those within it, as a user sees them."""
    settings = {**quark.context_settings, **command.context_settings}
    with click.Context(command, info_name=name, **settings) as context:
        yield name, command.get_help(context)
        if isinstance(command, click.Group):
            for part in command.list_commands(context):
                inner = command.get_command(context, part)
                assert inner is not None
                yield from _helps(inner, f"{name} {part}")


def formats_page() -> str:
    """One row for an example of each format."""
    rows = [
        f"| `{name}` | {fmt.family.replace('_', ' ')} | {fmt.bits} | {fmt.block or ''} "
        f"| {fmt.bits_per_element:g} |"
        for name in EXAMPLES
        for fmt in [parse_format(name)]
    ]
    return (
        "# Number formats\n\nOne name means one thing for every backend. Numbers within names are "
        "examples; `{N}` is the number of elements that share a scale. The last column counts "
        "shared scales in. Other spellings (OCP, torchao, microxcaling, dmx: `BFP16_64`, "
        "`MXFP8_E4M3K32`, `float8_e4m3fn`...) are understood. `quark info NAME` says which of them "
        "a backend can do.\n\n"
        "| name | family | bits | block | bits an element |\n| --- | --- | --- | --- | --- |\n"
        + "\n".join(rows)
        + "\n"
    )


def schema_files() -> dict[str, str]:
    """JSON schemas of the recipe and of the backends in this repository."""
    schemas = {"recipe": Recipe.model_json_schema()}
    schemas |= {name: registry().config_class(name).model_json_schema() for name in BACKENDS}
    return {
        f"reference/schemas/{name}.json": json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
        for name, schema in schemas.items()
    }


def main() -> None:
    """Write the pages, or compare them with what is in the tree."""
    pages = {"reference/cli.md": cli_page(), "reference/formats.md": formats_page()}
    pages |= schema_files()
    if "--check" in sys.argv:
        stale = [
            name
            for name, text in pages.items()
            if not (HERE / name).exists() or (HERE / name).read_text(encoding="utf-8") != text
        ]
        if stale:
            sys.exit(f"stale: {', '.join(stale)}; run: python docs/generate.py")
        return
    for name, text in pages.items():
        (HERE / name).parent.mkdir(parents=True, exist_ok=True)
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
