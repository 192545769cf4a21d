"""QuantizationConfig: the configuration every backend understands, and extends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from quark_core.problems import UNSUPPORTED, config_error
from quark_core.spec import ROLES, FrozenModel, LayerRule, Role, TensorSpec
from quark_core.support import Support, misfit


class Calibration(FrozenModel):
    """How much of the calibration data is used.

    Attributes:
        batches: Stop after this many batches; None takes all there are.
    """

    batches: Annotated[int, Field(gt=0)] | None = None


class QuantizationConfig(FrozenModel):
    """What to do to a model, for any backend.

    A backend subclasses it, says in ``supports`` which specs it can do, and adds fields of its
    own. An instance is complete and checked: every spec in it is resolved and supported, so a
    backend never meets a combination it cannot do.

    Raises:
        ConfigError: On construction; lists every problem with its place.
        UnsupportedSpecError: The same, if all problems are specs the backend cannot do.
    """

    supports: ClassVar[Sequence[Support] | None] = None
    """Rows of what the backend can do; None accepts every spec."""

    instead: ClassVar[Mapping[str, str]] = {}
    """What to write in place of fields that users of the wrapped library may look for."""

    name: str = Field(description="The backend, as `quark list` shows it.")
    weight: TensorSpec | None = Field(default=None, description="Weights; null leaves them float.")
    input: TensorSpec | None = Field(default=None, description="Inputs of layers.")
    output: TensorSpec | None = Field(default=None, description="Outputs of layers.")
    bias: TensorSpec | None = Field(default=None, description="Biases.")
    rules: tuple[LayerRule, ...] = Field(
        default=(), description="Exceptions, read top to bottom; the last that matches wins."
    )
    calibration: Calibration = Field(
        default_factory=Calibration, description="How much calibration data is used."
    )
    seed: int = Field(default=0, ge=0, description="Seed of everything random in quantization.")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise config_error(error, type(self).model_fields, instead=self.instead) from None

    @model_validator(mode="wrap")
    @classmethod
    def _resolve_and_check(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        problems: list[InitErrorDetails] = []
        try:
            config = handler(data)
        except ValidationError as error:
            # The specs that can be read are judged all the same: all problems at once.
            for place, role, spec in _readable_specs(data):
                cls._accept(spec, role, place, problems, data.get("name"))
            known = [_again(found) for found in error.errors()]
            raise ValidationError.from_exception_data(cls.__name__, known + problems) from None
        updates: dict[str, Any] = {
            role: cls._accept(spec, role, (role,), problems, config.name)
            for role, spec in _specs(config)
        }
        rules = []
        for index, rule in enumerate(config.rules):
            changed: dict[str, Any] = {
                role: cls._accept(spec, role, ("rules", index, role), problems, config.name)
                for role, spec in _specs(rule)
            }
            rules.append(rule.model_copy(update=changed))
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        # The instance is not handed out yet, so completing it does not break its immutability.
        config.__dict__.update(updates, rules=tuple(rules))
        return config

    @classmethod
    def _accept(
        cls,
        spec: TensorSpec,
        role: Role,
        place: tuple[str | int, ...],
        problems: list[InitErrorDetails],
        backend: Any,
    ) -> TensorSpec:
        """Resolve one spec; what is wrong with it joins ``problems``."""
        try:
            resolved = spec.resolve(role)
        except ValueError as error:
            problems.append(_detail(place, str(error), spec))
            return spec
        found = None
        if cls.supports is not None:
            found = misfit(resolved, role, cls.supports, str(backend or "this backend"))
        if found is None and (reason := cls.refuses(resolved, role)) is not None:
            found = "format", reason
        if found is not None:
            problems.append(_detail((*place, found[0]), found[1], spec))
        return resolved

    @classmethod
    def refuses(cls, spec: TensorSpec, role: Role) -> str | None:
        """Why a resolved spec cannot be done although its row of ``supports`` fits, or None.

        A backend overrides it for limits that a table of names cannot say, such as those on the
        parameters of ``fp[s|e|m]``.
        """
        return None


def _specs(holder: QuantizationConfig | LayerRule) -> Iterator[tuple[Role, TensorSpec]]:
    for role in ROLES:
        spec = getattr(holder, role)
        if spec is not None:
            yield role, spec


def _readable_specs(data: Any) -> Iterator[tuple[tuple[str | int, ...], Role, TensorSpec]]:
    """Every spec in raw data that can be read, with its place."""
    if not isinstance(data, Mapping):
        return
    holders: list[tuple[tuple[str | int, ...], Any]] = [((), data)]
    rules = data.get("rules")
    if isinstance(rules, list | tuple):
        holders += [(("rules", index), rule) for index, rule in enumerate(rules)]
    for place, holder in holders:
        for role in ROLES:
            if isinstance(holder, Mapping) and holder.get(role) is not None:
                try:
                    yield (*place, role), role, TensorSpec.model_validate(holder[role])
                except ValidationError:
                    continue


def _again(found: Any) -> InitErrorDetails:
    details = InitErrorDetails(type=found["type"], loc=found["loc"], input=found["input"])
    if "ctx" in found:
        details["ctx"] = found["ctx"]
    return details


def _detail(place: tuple[str | int, ...], message: str, value: Any) -> InitErrorDetails:
    error = PydanticCustomError(UNSUPPORTED, "{message}", {"message": message})
    return InitErrorDetails(type=error, loc=place, input=value)
