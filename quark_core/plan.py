"""Plan: what will happen to each layer and why, before anything happens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from quark_core.errors import UnmatchedRuleError
from quark_core.selection import Unmatched
from quark_core.spec import ROLES, Role, TensorSpec


@dataclass(frozen=True)
class PlanEntry:
    """One layer (or graph node) of the plan.

    Attributes:
        name: Dotted name in the float model.
        type: Class name of the layer, or the graph operation.
        op: Operation as rules select it: ``linear``, ``conv2d``, ``add``...
        shape: Shape of the weight, or None.
        weight, input, output, bias: What each tensor becomes; None leaves it float.
        rule: What decided: ``defaults`` or the rule in words.
        reason: Why the layer stays float or differs from what the rule asked, else empty.
    """

    name: str
    type: str
    op: str
    shape: tuple[int, ...] | None = None
    weight: TensorSpec | None = None
    input: TensorSpec | None = None
    output: TensorSpec | None = None
    bias: TensorSpec | None = None
    rule: str = "defaults"
    reason: str = ""

    @property
    def specs(self) -> dict[Role, TensorSpec]:
        """The tensors that are quantized."""
        found = {role: getattr(self, role) for role in ROLES}
        return {role: spec for role, spec in found.items() if spec is not None}

    @property
    def quantized(self) -> bool:
        """Whether any tensor of the layer is quantized."""
        return bool(self.specs)

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON-ready data."""
        return {
            "name": self.name,
            "type": self.type,
            "op": self.op,
            "shape": list(self.shape) if self.shape is not None else None,
            **{role: str(spec) if spec else None for role, spec in self._roles()},
            "rule": self.rule,
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PlanEntry:
        """The entry that :meth:`to_dict` wrote."""
        roles: dict[str, Any] = {
            role: TensorSpec.model_validate(data[role]).resolve(role) if data[role] else None
            for role in ROLES
        }
        shape = data["shape"]
        return cls(**{**data, **roles, "shape": tuple(shape) if shape is not None else None})

    def _roles(self) -> Iterator[tuple[Role, TensorSpec | None]]:
        for role in ROLES:
            yield role, getattr(self, role)


@dataclass(frozen=True)
class Step:
    """One pass a backend will run, in order, and why it stands there."""

    name: str
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """What a backend will do to a model; made without touching it.

    Attributes:
        entries: One for each layer the backend knows how to quantize, and for those it leaves
            float although a rule or default asked for more.
        needs_calibration: Whether :meth:`ModelQuantizer.quantize` needs data.
        steps: The passes the backend will run.
        unmatched: Rules that selected nothing; the host turns them into an error.
        warnings: Sentences the user should read before starting.
    """

    entries: tuple[PlanEntry, ...]
    needs_calibration: bool = False
    steps: tuple[Step, ...] = ()
    unmatched: tuple[Unmatched, ...] = ()
    warnings: tuple[str, ...] = ()
    _by_name: dict[str, PlanEntry] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {entry.name: entry for entry in self.entries})

    def __getitem__(self, name: str) -> PlanEntry:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @property
    def quantized(self) -> tuple[PlanEntry, ...]:
        """The entries of layers that will be quantized."""
        return tuple(entry for entry in self.entries if entry.quantized)

    def require_matches(self) -> None:
        """Refuse a plan with a rule that selected nothing.

        Raises:
            UnmatchedRuleError: Names each such rule with near misses.
        """
        if not self.unmatched:
            return
        sentences = []
        for rule in self.unmatched:
            near = f" (nearest: {', '.join(rule.near)})" if rule.near else ""
            if not near and "io: " in rule.selector:
                near = " (the backend quantizes nothing of what stands there)"
            sentences.append(f"rules[{rule.index}] ({rule.selector}) matches no layer{near}")
        raise UnmatchedRuleError(
            "; ".join(sentences),
            where="quantizer.rules",
            fix="`quark plan` lists the layers; allow_unmatched: true accepts a rule without any",
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data (unmatched rules never get that far)."""
        return {
            "layers": [entry.to_dict() for entry in self.entries],
            "needs_calibration": self.needs_calibration,
            "steps": [{"name": step.name, "reason": step.reason} for step in self.steps],
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The plan that :meth:`to_dict` wrote."""
        return cls(
            tuple(PlanEntry.from_dict(entry) for entry in data["layers"]),
            needs_calibration=data["needs_calibration"],
            steps=tuple(Step(**step) for step in data["steps"]),
            warnings=tuple(data["warnings"]),
        )
