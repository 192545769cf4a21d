"""The form of a recipe; what lies in the hands of plugins is checked by them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_serializer, model_validator

from quark_core.spec import FrozenModel

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_GATE = re.compile(r"(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


class Open(FrozenModel):
    """A section whose other keys belong to the plugin it names."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the plugin."""
        return dict(self.model_extra or {})


class Source(Open):
    """Where a model or data come from: the source's name, and its own options beside it."""

    source: str = Field(description="Name of a source, as `quark list` shows it.")


class Data(FrozenModel):
    """The two data sets of a run."""

    calibration: Source | None = Field(default=None, description="For static ranges.")
    evaluation: Source | None = Field(default=None, description="For the metrics.")


class MetricItem(Open):
    """A metric by name, and its own options beside it. The name alone will do."""

    name: str = Field(description="Name of a metric, as `quark list metrics` shows it.")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Gate(FrozenModel):
    """A bound a metric must keep, written ``">= 0.89"``."""

    relation: Literal[">=", "<=", ">", "<"]
    bound: float

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError(f'a gate is text such as ">= 0.89", not {value!r}')
        match = _GATE.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"{value!r} is no gate: write >=, <=, > or < and a number")
        return {"relation": match[1], "bound": float(match[2])}

    @model_serializer
    def __str__(self) -> str:
        return f"{self.relation} {self.bound:g}"

    def holds(self, value: float) -> bool:
        """Whether a value keeps the bound; NaN never does."""
        return _OPERATORS[self.relation](value, self.bound)


class Evaluate(FrozenModel):
    """What is measured, and what must be reached."""

    metrics: tuple[MetricItem, ...] = Field(default=(), description="Metrics, in report order.")
    require: dict[str, Gate] = Field(
        default_factory=dict, description='Bounds the quantized model must keep: ">= 0.89".'
    )
    batches: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="Stop after this many evaluation batches."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [metric.name for metric in self.metrics]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"metrics names {', '.join(doubled)} twice")
        unknown = sorted(set(self.require) - set(names))
        if unknown:
            raise ValueError(
                f"require names {', '.join(unknown)}, which metrics does not list: add it there"
            )
        return self


class Recipe(FrozenModel):
    """Everything a run does, from the model to the files it leaves."""

    version: Literal[1] = Field(default=1, description="Version of the recipe's form.")
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = Field(
        default=None,
        description="Name of the run: letters, digits, _, . and -; the file's name if left out.",
    )
    model: Source = Field(description="The float model.")
    data: Data = Field(default_factory=Data, description="Calibration and evaluation data.")
    quantizer: dict[str, Any] = Field(
        description="The backend's name and its configuration; see `quark schema NAME`."
    )
    evaluate: Evaluate = Field(default_factory=Evaluate, description="Metrics and gates.")
    export: tuple[str, ...] = Field(
        default=(), description="Forms to write; see `quark list exporters` and `quark info`."
    )
    device: Annotated[str, Field(pattern=r"^(cpu|auto|cuda(:\d+)?)$")] = Field(
        default="cpu", description="cpu, cuda, cuda:N, or auto."
    )
    output: str = Field(default="runs", description="Folder that holds the run folders.")
