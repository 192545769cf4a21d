"""``--set quantizer.weight=mxfp4``: values of a recipe given on the command line."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import yaml

from quark_core.errors import ConfigError, Problem

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_PATH = re.compile(r"[^.\[\]]+(?:\[\d+\])*(?:\.[^.\[\]]+(?:\[\d+\])*)*")


def split_path(path: str) -> list[str | int]:
    """The keys and indices of a path such as ``quantizer.rules[2].weight``.

    Raises:
        ValueError: The path is malformed.
    """
    if not _PATH.fullmatch(path):
        raise ValueError(f"{path!r} is no path such as quantizer.rules[0].weight")
    return [int(index) if index else key for key, index in _STEP.findall(path)]


def apply(data: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """A copy of the data with each ``PATH=VALUE`` put in, and the paths that were set.

    Values are read as YAML, so ``true``, ``3``, ``null`` and ``{glob: "*", skip: true}`` mean
    what they mean in a recipe. Mappings on the way are made where missing; a list index must
    exist, or be the next one.

    Raises:
        ConfigError: An argument is malformed or leads nowhere; names the argument.
    """
    result, paths, problems = copy.deepcopy(data), set(), []
    for argument in overrides:
        path, equals, text = argument.partition("=")
        try:
            if not equals:
                raise ValueError("has no '=': write --set PATH=VALUE")
            _put(result, split_path(path.strip()), _value(text))
            paths.add(path.strip())
        except ValueError as error:
            problems.append(Problem(f"--set {argument}", str(error)))
    if problems:
        raise ConfigError(problems)
    return result, paths


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is no value: {str(error).splitlines()[0]}") from None


def _put(data: Any, steps: list[str | int], value: Any) -> None:
    here = data
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        if isinstance(step, int):
            if not isinstance(here, list):
                raise ValueError(f"[{step}] needs a list before it, found {type(here).__name__}")
            if step > len(here):
                raise ValueError(f"[{step}] is past the end: the list has {len(here)} entries")
            if step == len(here):
                here.append(None)
        elif not isinstance(here, dict):
            raise ValueError(f"{step!r} needs a mapping before it, found {type(here).__name__}")
        if last:
            here[step] = value
            return
        known = here[step] if isinstance(step, int) else here.get(step)
        if known is None:
            known = [] if isinstance(steps[position + 1], int) else {}
            here[step] = known
        here = known
