"""Reading a recipe file: plain data, and the line each value stands on."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from quark_core.errors import ConfigError, Problem

MAX_BYTES = 1_000_000
MAX_VALUES = 20_000
"""Limits of a recipe, aliases expanded; a real one has some dozens of values."""

_ENVIRONMENT = re.compile(r"\$\{\w+\}")


@dataclass(frozen=True)
class Document:
    """A recipe as written.

    Attributes:
        data: Mappings, lists, text, numbers, booleans and None only.
        lines: Line of each value by its path, such as ``quantizer.rules[2].weight``.
        file: Where it was read from, or None.
    """

    data: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)
    file: Path | None = None

    def line(self, path: str) -> int | None:
        """The line of a value, or of the nearest thing around it."""
        while path:
            if path in self.lines:
                return self.lines[path]
            path = re.sub(r"(\.?[^.\[\]]+|\[\d+\])$", "", path)
        return self.lines.get("")


def read(file: Path) -> Document:
    """Read a YAML or TOML recipe.

    Raises:
        ConfigError: The file is missing, too large, malformed, or holds what no recipe may:
            duplicate keys, tags that build objects, aliases that multiply, ``${NAME}``.
    """
    try:
        size = file.stat().st_size
        text = file.read_text(encoding="utf-8") if size <= MAX_BYTES else ""
    except (OSError, UnicodeDecodeError) as error:
        raise _refusal(file, None, f"cannot be read: {error}") from None
    if size > MAX_BYTES:
        raise _refusal(file, None, f"has {size} bytes; a recipe has at most {MAX_BYTES}")
    data, lines = (_toml if file.suffix == ".toml" else _yaml)(text, file)
    if not isinstance(data, dict):
        raise _refusal(file, 1, f"must be a mapping with keys, not {type(data).__name__}")
    document = Document(data, lines, file)
    problems = [
        Problem(path, _environment_sentence(value), str(file), document.line(path))
        for path, value in walk(data)
        if isinstance(value, str) and _ENVIRONMENT.search(value)
    ]
    if problems:
        raise ConfigError(problems)
    return document


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested data with its path, outer ones first."""
    yield path, value
    if isinstance(value, dict):
        for key, part in value.items():
            yield from walk(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from walk(part, f"{path}[{index}]")


def _environment_sentence(value: str) -> str:
    return (
        f"{value!r} asks for an environment variable, which recipes do not expand: write the "
        "value, or give it on the command line with --set"
    )


def _refusal(file: Path, line: int | None, message: str) -> ConfigError:
    return ConfigError([Problem("recipe", message, str(file), line)])


# YAML


def _yaml(text: str, file: Path) -> tuple[Any, dict[str, int]]:
    lines: dict[str, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return {}, {}
        budget = [MAX_VALUES]
        return _build(node, "", lines, budget, file), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise _refusal(file, mark.line + 1 if mark else None, f"not YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise _refusal(file, None, f"not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise _refusal(file, None, "is nested too deeply, or refers to itself") from None


def _build(node: yaml.Node, path: str, lines: dict[str, int], budget: list[int], file: Path) -> Any:
    """Data from a YAML node; each visit costs from the budget, so aliases cannot multiply."""
    budget[0] -= 1
    line = node.start_mark.line + 1
    if budget[0] < 0:
        raise _refusal(file, line, f"holds more than {MAX_VALUES} values, aliases expanded")
    lines.setdefault(path, line)
    if isinstance(node, yaml.SequenceNode):
        _require_plain(node, "seq", file)
        return [
            _build(part, f"{path}[{index}]", lines, budget, file)
            for index, part in enumerate(node.value)
        ]
    if isinstance(node, yaml.MappingNode):
        _require_plain(node, "map", file)
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, place = _key(key_node, file), key_node.start_mark.line + 1
            inner = f"{path}.{key}" if path else key
            if key in built:
                raise _refusal(file, place, f"the key {inner!r} stands there twice")
            lines[inner] = place
            built[key] = _build(value_node, inner, lines, budget, file)
        return built
    return _scalar(node, file)


def _key(node: yaml.Node, file: Path) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":merge"):
        line = node.start_mark.line + 1
        raise _refusal(file, line, "keys are plain words: merges and complex keys are not accepted")
    return str(node.value)


def _scalar(node: yaml.Node, file: Path) -> Any:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == "timestamp":
        return str(node.value)
    _require_plain(node, kind if kind in ("str", "int", "float", "bool", "null") else "", file)
    constructor = yaml.SafeLoader("")
    try:
        return constructor.construct_object(node, deep=True)
    except ValueError as error:
        raise _refusal(file, node.start_mark.line + 1, f"bad value: {error}") from None
    finally:
        constructor.dispose()


def _require_plain(node: yaml.Node, kind: str, file: Path) -> None:
    if node.tag != f"tag:yaml.org,2002:{kind}":
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        line = node.start_mark.line + 1
        raise _refusal(file, line, f"the tag {tag} is not accepted: a recipe is plain data")


# TOML

_TABLE = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_PAIR = re.compile(r"^\s*([A-Za-z0-9_.\"'-]+)\s*=")


def _toml(text: str, file: Path) -> tuple[Any, dict[str, int]]:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+)", str(error))
        message = re.sub(r" \(at .*\)$", "", str(error))
        raise _refusal(file, int(found[1]) if found else None, f"not TOML: {message}") from None
    return data, _toml_lines(text)


def _toml_lines(text: str) -> dict[str, int]:
    """Lines of tables and of keys that begin a line; values inside inline tables have none."""
    lines, prefix = {"": 1}, ""
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if table := _TABLE.match(line):
            prefix = _unquoted(table[2])
            if table[1] == "[[":
                index = counts.get(prefix, 0)
                counts[prefix] = index + 1
                prefix = f"{prefix}[{index}]"
            lines.setdefault(prefix, number)
        elif pair := _PAIR.match(line):
            key = _unquoted(pair[1])
            lines.setdefault(f"{prefix}.{key}" if prefix else key, number)
    return lines


def _unquoted(key: str) -> str:
    return re.sub(r"\s*\.\s*", ".", key.replace('"', "").replace("'", ""))
