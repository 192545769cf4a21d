"""``quark init``: a commented recipe to start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quark_core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from quark_core.config import QuantizationConfig
    from quark_core.spec import Role

_HEAD = """\
# A recipe for quark. Check it with `quark plan`, run it with `quark run`.
version: 1

model:
  source: python                # `quark list model-sources` shows the others
  factory: model.py:build       # a function that returns the torch.nn.Module
  checkpoint: model.safetensors # its weights; leave out if the function loads them

data:
  # Static ranges are calibrated on this; without it use dynamic inputs or weights only.
  calibration: {source: npz, path: data.npz, input: calibration_inputs, batch_size: 32}
  evaluation: {source: npz, path: data.npz, input: test_inputs, target: test_labels}

quantizer:
"""
_TAIL = """\
  # Exceptions, read top to bottom; the last that matches a layer wins. Select by name, glob,
  # re, type, op or io.
  # rules:
  #   - {glob: "head*", skip: true}

evaluate:
  metrics: [accuracy, sqnr]     # `quark list metrics` shows the others
  # require: {accuracy: ">= 0.90"}

# export: [checkpoint]          # `quark list exporters` shows the others
"""


@click.command("init")
@click.argument("name")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write to this file instead of standard output; never overwrites.",
)
def command(name: str, output: Path | None) -> None:
    """Write a commented recipe for backend NAME."""
    from quark_core.registry import registry

    text = _HEAD + _section(name, registry().config_class(name)) + _TAIL
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        problem = Problem("--output", f"{output} exists already: choose another name")
        raise ConfigError([problem]) from None
    click.echo(f"wrote {output}; edit it, then run: quark plan {output}")


def _section(name: str, config: type[QuantizationConfig]) -> str:
    from quark_core.config import QuantizationConfig as Base

    lines = [f"  name: {name}"]
    weight = _usable(name, config, "weight", {})
    inputs = _usable(name, config, "input", {"weight": weight})
    lines.append(f"  weight: {weight}" if weight else "  weight: null")
    lines.append(f"  {'' if inputs else '# '}input: {inputs or 'int8'}")
    own = {key: field for key, field in config.model_fields.items() if key not in Base.model_fields}
    for key, field in own.items():
        default = field.get_default(call_default_factory=True)
        note = f"  # {field.description}" if field.description else ""
        lines.append(f"  # {key}: {_flow(default)}{note}")
    return "\n".join(lines) + "\n"


def _usable(
    name: str, config: type[QuantizationConfig], role: Role, beside: dict[str, Any]
) -> str | None:
    """A spec the backend accepts for a role: eight bits if it can, else its first format."""
    rows = [row for row in config.supports or () if role in row.roles]
    formats = ["int8", *(entry for row in rows for entry in row.formats if "*" not in entry)]
    for text in formats:
        try:
            config(name=name, **{**beside, role: text})
        except ConfigError:
            continue
        return text
    return None


def _flow(value: Any) -> str:
    plain = value.model_dump(mode="json") if hasattr(value, "model_dump") else value
    return json.dumps(plain, default=str)
