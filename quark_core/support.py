"""What a backend can do, as a table; and what to say about a spec that is not in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from quark_core.errors import near_misses
from quark_core.spec import ObserverName, Role, Rounding, ScaleFormat, ScaleRule, TensorSpec

OBSERVERS: tuple[ObserverName, ...] = get_args(ObserverName)
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)


def integers(low: int, high: int, *, signed: bool = True) -> tuple[str, ...]:
    """Names of the integer formats of ``low`` to ``high`` bits."""
    prefix = "" if signed else "u"
    return tuple(f"{prefix}int{bits}" for bits in range(low, high + 1))


@dataclass(frozen=True)
class Support:
    """One row: every combination of these values works.

    Attributes:
        roles: Tensors of a layer the row speaks of.
        formats: Canonical format names; a trailing ``*`` stands for any ending.
        granularity: Kinds of :class:`~quark_core.spec.Granularity`.
        symmetric: Allowed values.
        scale: Allowed scale formats.
        observer: Allowed observers of static ranges; empty where no range is observed.
        rounding: Allowed roundings.
        dynamic: Allowed values.
        scale_rule: Allowed rules of MX scales.
        narrow: Allowed values.
    """

    roles: tuple[Role, ...]
    formats: tuple[str, ...]
    granularity: tuple[str, ...] = ("tensor",)
    symmetric: tuple[bool, ...] = (True,)
    scale: tuple[ScaleFormat, ...] = ("float32",)
    observer: tuple[ObserverName, ...] = ("minmax",)
    rounding: tuple[Rounding, ...] = ("nearest_even",)
    dynamic: tuple[bool, ...] = (False,)
    scale_rule: tuple[ScaleRule | None, ...] = (None, "floor")
    narrow: tuple[bool, ...] = (False,)

    def accepts_format(self, name: str) -> bool:
        """Whether a canonical format name is in the row."""
        return any(
            name.startswith(entry[:-1]) if entry.endswith("*") else name == entry
            for entry in self.formats
        )

    def misfits(self, spec: TensorSpec) -> list[tuple[str, str, tuple[Any, ...]]]:
        """Fields of a resolved spec outside the row: (field, value, accepted values)."""
        found: list[tuple[str, str, tuple[Any, ...]]] = []
        values: dict[str, Any] = {
            "granularity": spec.granularity.kind if spec.granularity else "tensor",
            "symmetric": spec.symmetric,
            "scale": spec.scale,
            "rounding": spec.rounding,
            "dynamic": spec.dynamic,
            "scale_rule": spec.scale_rule,
            "narrow": spec.narrow,
        }
        if spec.observer is not None:
            values["observer"] = spec.observer.name
        for field, value in values.items():
            accepted = getattr(self, field)
            if value not in accepted:
                found.append((field, _yaml(value), accepted))
        return found

    def as_dict(self) -> dict[str, list[Any]]:
        """The row as plain data, for ``quark info --json``."""
        return {field.name: list(getattr(self, field.name)) for field in fields(self)}


def misfit(
    spec: TensorSpec, role: Role, table: Sequence[Support], backend: str
) -> tuple[str, str] | None:
    """Why a backend cannot do a resolved spec: (field, sentence), or None if it can.

    Of the rows for the format, the one that comes closest is used to say what would work.
    """
    rows = [row for row in table if role in row.roles]
    if not rows:
        return "format", f"{backend} does not quantize the {role} of a layer: leave it out"
    fitting = [row for row in rows if row.accepts_format(spec.format)]
    if not fitting:
        return "format", _unsupported_format(spec, role, rows, backend)
    wrong = min((row.misfits(spec) for row in fitting), key=len)
    if not wrong:
        return None
    field, value, accepted = wrong[0]
    choices = ", ".join(_yaml(choice) for choice in accepted) or "none (leave it out)"
    others = "; ".join(
        f"{name} {_yaml(value)} must be {' or '.join(_yaml(choice) for choice in choices_)}"
        for name, value, choices_ in wrong[1:]
    )
    return field, (
        f"{backend} cannot do {field} {value} for {_a(role)} of format {spec.format}: "
        f"accepted are {choices}"
        + (f" (also {others})" if others else "")
        + _elsewhere(field, value, [row.misfits(spec) for row in fitting])
    )


def _elsewhere(
    field: str, value: str, rows: Iterable[list[tuple[str, str, tuple[Any, ...]]]]
) -> str:
    """What else would have to change for a row in which the value itself is accepted."""
    fits = [wrong for wrong in rows if all(name != field for name, _, _ in wrong)]
    needs = " and ".join(
        f"{name} {' or '.join(_yaml(choice) for choice in choices)}"
        for name, _, choices in min(fits, key=len, default=[])
        if choices  # no choice: the field goes away by itself, as an observer does with dynamic
    )
    return f"; {field} {value} needs {needs}" if needs else ""


def _nearest_width(name: str, known: Iterable[str]) -> list[str]:
    """The integer of the same sign whose width comes closest."""
    head = name.rstrip("0123456789")
    widths = [one for one in known if one.startswith(head) and one[len(head) :].isdecimal()]
    if head not in ("int", "uint") or head == name:
        return []
    bits = int(name.removeprefix(head))
    return sorted(widths, key=lambda one: abs(int(one.removeprefix(head)) - bits))[:1]


def _unsupported_format(spec: TensorSpec, role: Role, rows: Iterable[Support], backend: str) -> str:
    known = list(dict.fromkeys(name for row in rows for name in row.formats))
    near = _nearest_width(spec.format, known) or near_misses(spec.format, known, 1)
    hint = f"; nearest: {near[0]}" if near else ""
    return (
        f"{backend} cannot do {spec.format} for {_a(role)}: accepted are "
        f"{', '.join(shorten(known))}{hint}"
    )


def shorten(names: Iterable[str]) -> Iterator[str]:
    """Fold runs such as int2, int3, int4 into ``int2..int4``; say what ``fp[1|*`` stands for."""
    run: list[str] = []

    def stem(name: str) -> tuple[str, int] | None:
        head = name.rstrip("0123456789")
        tail = name[len(head) :]
        return (head, int(tail)) if head in ("int", "uint") and tail else None

    def flush() -> Iterator[str]:
        if len(run) > 2:
            yield f"{run[0]}..{run[-1]}"
        else:
            yield from run
        run.clear()

    for name in names:
        here, last = stem(name), stem(run[-1]) if run else None
        if run and (here is None or last is None or here != (last[0], last[1] + 1)):
            yield from flush()
        run.append(f"{name.removesuffix('*')}e|m]" if name.endswith("|*") else name)
    yield from flush()


def _a(role: Role) -> str:
    return f"an {role}" if role[0] in "io" else f"a {role}"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
