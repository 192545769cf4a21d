"""Matching rules to layers: pure functions from names and rules to decisions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from quark_core.config import QuantizationConfig
from quark_core.errors import near_misses
from quark_core.spec import ROLES, LayerRule, Role, Selector, TensorSpec


@dataclass(frozen=True)
class Target:
    """Something a rule can select: a layer of a module tree, or a node of a graph.

    Attributes:
        name: Dotted name, unique within the model.
        types: Names of its class and the classes it derives from, bare and qualified.
        op: Operation, such as ``linear`` or ``add``.
        io: Whether it reads the model's ``input`` or makes its ``output``.
        node: Name of the graph node, for backends that work on graphs.
        scopes: The modules around it, each as (name, names of its classes).
    """

    name: str
    types: tuple[str, ...] = ()
    op: str = ""
    io: tuple[str, ...] = ()
    scopes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    node: str = ""


@dataclass(frozen=True)
class Decision:
    """What shall happen to one target, and which rule said so.

    Attributes:
        skip: A rule leaves the target in float.
        specs: The spec of each role; None leaves that tensor in float.
        rule: Index of the deciding rule, or None where the configuration's own specs apply.
        why: The same for people: ``defaults`` or ``rules[1] (type: Conv2d)``.
    """

    skip: bool
    specs: dict[Role, TensorSpec | None]
    rule: int | None
    why: str


@dataclass(frozen=True)
class Unmatched:
    """A rule that selected nothing.

    Attributes:
        index: Position of the rule.
        selector: The rule's selector in one line.
        near: Names that exist and resemble what was asked for.
    """

    index: int
    selector: str
    near: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """Decisions by target name, and the rules that decided nothing because nothing matched."""

    decisions: dict[str, Decision]
    unmatched: tuple[Unmatched, ...]


def matches(selector: Selector, target: Target) -> bool:
    """Whether every criterion of the selector holds for the target.

    ``name`` and ``type`` also hold if a module around the target has that name or type.
    """
    for key, wanted in selector.criteria().items():
        if key == "name":
            held = wanted == target.name or any(wanted == name for name, _ in target.scopes)
        elif key == "type":
            held = wanted in target.types or any(wanted in types for _, types in target.scopes)
        elif key == "glob":
            held = fnmatchcase(target.name, wanted)
        elif key == "re":
            held = re.fullmatch(wanted, target.name) is not None
        elif key == "op":
            held = wanted == target.op
        elif key == "node":
            held = wanted == target.node
        else:
            held = wanted in target.io
        if not held:
            return False
    return True


def select(targets: Sequence[Target], config: QuantizationConfig) -> Selection:
    """Decide for each target by the last rule that matches it."""
    decisions = {}
    used: set[int] = set()
    for target in targets:
        deciding: int | None = None
        for index, rule in enumerate(config.rules):
            if matches(rule, target):
                used.add(index)
                deciding = index
        decisions[target.name] = _decide(config, deciding)
    unmatched = tuple(
        Unmatched(index, rule.describe(), _near(rule, targets))
        for index, rule in enumerate(config.rules)
        if index not in used and not rule.allow_unmatched
    )
    return Selection(decisions, unmatched)


def _decide(config: QuantizationConfig, index: int | None) -> Decision:
    defaults: dict[Role, TensorSpec | None] = {role: getattr(config, role) for role in ROLES}
    if index is None:
        return Decision(False, defaults, None, "defaults")
    rule = config.rules[index]
    why = f"rules[{index}] ({rule.describe()})"
    if rule.skip:
        return Decision(True, dict.fromkeys(ROLES), index, why)
    overrides = {role: getattr(rule, role) for role in ROLES if role in rule.model_fields_set}
    return Decision(False, {**defaults, **overrides}, index, why)


def _near(rule: LayerRule, targets: Iterable[Target]) -> tuple[str, ...]:
    known: dict[str, list[str]] = {"name": [], "type": [], "op": [], "node": []}
    known["io"] = ["input", "output"]
    for target in targets:
        known["name"] += [target.name, *(name for name, _ in target.scopes if name)]
        known["type"] += [*target.types, *(t for _, types in target.scopes for t in types)]
        known["op"].append(target.op)
        known["node"].append(target.node)
    found: list[str] = []
    for key, wanted in rule.criteria().items():
        names = dict.fromkeys(known["name" if key in ("glob", "re") else key])
        if wanted not in names:
            found += near_misses(wanted, names)
    return tuple(dict.fromkeys(found))
