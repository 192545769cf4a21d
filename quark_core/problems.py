"""What pydantic finds wrong with a configuration, in our words and as a recipe spells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from quark_core.errors import ConfigError, Problem, UnsupportedSpecError, did_you_mean

UNSUPPORTED = "unsupported_spec"
"""Type of pydantic's errors that say a backend cannot do a spec."""

_WRITE = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "string_type": "text",
    "tuple_type": "a list: [...]",
    "list_type": "a list: [...]",
    "dict_type": "a mapping: {key: value}",
    "model_attributes_type": "a mapping: {key: value}",
}
"""What to write instead, by pydantic's type of error."""


def config_error(
    error: ValidationError,
    known: Mapping[str, Any] = {},
    *,
    prefix: str = "",
    instead: Mapping[str, str] = {},
) -> ConfigError:
    """Turn pydantic's errors into ours: one line each, the path as a recipe spells it.

    Args:
        error: What pydantic found.
        known: The model's fields by name, for suggestions on unknown ones.
        prefix: Path of the validated part within the recipe.
        instead: What to write in place of fields that are looked for by another name.
    """
    problems = []
    unsupported = True
    for details in error.errors(include_url=False):
        place, beside = _places(details["loc"], known)
        found = _Found(
            details["type"],
            str(details["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, "),
            details["input"],
            details.get("ctx", {}),
            str(place[-1]) if place else "",
            beside,
            _places((*details["loc"], ""), known)[1],
            instead if len(place) == 1 else {},
        )
        path = _path((prefix, *place) if prefix else place)
        unsupported = unsupported and found.type == UNSUPPORTED
        problems.append(Problem(path or "configuration", _sentence(found)))
    return (UnsupportedSpecError if unsupported else ConfigError)(problems)


@dataclass(frozen=True)
class _Found:
    """One thing pydantic found: its facts, and the fields around and within the place."""

    type: str
    message: str
    given: Any
    context: Mapping[str, Any]
    name: str
    beside: Mapping[str, Any]
    within: Mapping[str, Any]
    instead: Mapping[str, str]


def _sentence(found: _Found) -> str:
    if found.type in {"value_error", UNSUPPORTED}:
        return found.message
    if found.type in _WRITE:
        return f"{found.given!r} is not accepted: write {_WRITE[found.type]}"
    if found.type in _SENTENCES:
        return _SENTENCES[found.type](found)
    return f"{found.message}, got {found.given!r}"


def _unknown(found: _Found) -> str:
    if found.name in found.instead:
        return f"unknown field. Write {found.instead[found.name]}"
    hint = did_you_mean(found.name, found.beside)
    if not hint and found.beside:
        hint = f"Accepted are {', '.join(found.beside)}"
    return "unknown field" + (f". {hint}" if hint else "")


def _missing(found: _Found) -> str:
    return "required but missing"


def _choice(found: _Found) -> str:
    expected = str(found.context["expected"])
    hint = did_you_mean(str(found.given), expected.split("'")[1::2])
    return f"{found.given!r} is not accepted: write {expected}" + (f". {hint}" if hint else "")


def _tagged(found: _Found) -> str:
    accepted = str(found.context["expected_tags"]).split("'")[1::2]
    hint = did_you_mean(str(found.context["tag"]), accepted)
    return f"{found.context['tag']!r} is not accepted: write {', '.join(accepted)}" + (
        f". {hint}" if hint else ""
    )


def _untagged(found: _Found) -> str:
    return f"{found.context['discriminator']} is required but missing"


def _mapping(found: _Found) -> str:
    keys = f"; it may hold {', '.join(found.within)}" if found.within else ""
    return f"{found.given!r} is not accepted: write a mapping, {{}} for its defaults{keys}"


def _form(found: _Found) -> str:
    """A text's form is told by the field's description, not by a regular expression."""
    field = found.beside.get(found.name)
    if field is None or not field.description:
        return f"{found.message}, got {found.given!r}"
    return f"{found.given!r} is not accepted. Accepted: {field.description}".rstrip(".")


_SENTENCES: Mapping[str, Callable[[_Found], str]] = {
    "extra_forbidden": _unknown,
    "missing": _missing,
    "literal_error": _choice,
    "union_tag_invalid": _tagged,
    "union_tag_not_found": _untagged,
    "model_type": _mapping,
    "string_pattern_mismatch": _form,
}


def _path(place: Sequence[str | int]) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _places(
    place: Sequence[str | int], fields: Mapping[str, Any]
) -> tuple[list[str | int], Mapping[str, Any]]:
    """A place as a recipe spells it, and the fields that stand beside its last part.

    Pydantic puts the tag of a member of a union into the place (``algorithm.gptq.damping``); a
    recipe has no such level.
    """
    spelled: list[str | int] = []
    models: list[type[BaseModel]] = []
    for index, part in enumerate(place):
        if isinstance(part, int) or index == len(place) - 1:
            spelled.append(part)
            continue
        tagged = [model for model in models if _tag(model) == part]
        if len(models) > 1 and tagged:
            models, fields = tagged, tagged[0].model_fields
            continue
        spelled.append(part)
        field = fields.get(part)
        models = models_in(field.annotation) if field is not None else []
        fields = models[0].model_fields if models else {}
    return spelled, fields


def _tag(model: type[BaseModel]) -> Any:
    """What tells a member of a discriminated union: the default of its first field."""
    return next(iter(model.model_fields.values())).default


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models within a type such as ``tuple[LayerRule, ...]`` or ``A | B | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]
