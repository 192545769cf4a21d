"""What a plugin hands to the host: light facts and import strings, resolved on first use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

API_VERSION = 1
"""Version of the interface between host and plugins; a spec states the one it was built for."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do beyond quantizing.

    Attributes:
        exports: Names that :meth:`QuantizedModel.export` accepts.
        save_load: Whether models can be saved and loaded again.
        set_enabled: Whether single layers can be switched to float and back.
        qat: Whether the quantized module can be trained further.
        submodule: Whether a part of a model can be quantized alone.
        weights_only: Whether one weight tensor can be quantized alone.
        export_requires: Requirements of single exports, by name, as pip spells them; checked
            before a run starts.
    """

    exports: tuple[str, ...] = ()
    save_load: bool = False
    set_enabled: bool = False
    qat: bool = False
    submodule: bool = False
    weights_only: bool = False
    export_requires: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class QuantizerSpec:
    """A backend.

    Attributes:
        name: What recipes call it.
        config: ``module:Class`` of its :class:`~quark_core.config.QuantizationConfig`.
        quantizer: ``module:Class`` of its :class:`~quark_core.quantizer.ModelQuantizer`.
        summary: One line for ``quark list``.
        api_version: The plugin API it was built for.
        capabilities: What it can do beyond quantizing.
        requires: Requirements as pip spells them; checked before it is imported.
        tested: Requirements it was tested with; ``quark doctor`` compares them.
        runs_code: Whether its configuration names Python code (refused by ``--no-code``).
    """

    name: str
    config: str
    quantizer: str
    summary: str = ""
    api_version: int = API_VERSION
    capabilities: Capabilities = Capabilities()
    requires: tuple[str, ...] = ()
    tested: tuple[str, ...] = ()
    runs_code: bool = False


@dataclass(frozen=True)
class SourceSpec:
    """A way to get a model, or data, by name.

    Attributes:
        name: What recipes call it under ``source``.
        options: ``module:Class`` of a pydantic model of the section's other keys.
        load: ``module:function`` taking (options, context) and returning the model, or the
            batches.
        summary: One line for listings.
        api_version: The plugin API it was built for.
        requires: Requirements as pip spells them.
        runs_code: Whether using it runs code that the recipe names (refused by ``--no-code``).
    """

    name: str
    options: str
    load: str
    summary: str = ""
    api_version: int = API_VERSION
    requires: tuple[str, ...] = ()
    runs_code: bool = False


@dataclass(frozen=True)
class MetricSpec:
    """A figure of merit by name.

    Attributes:
        name: What recipes call it under ``evaluate.metrics``.
        metric: ``module:Class`` with ``update(output, target, reference)`` and ``compute()``.
        summary: One line for listings.
        needs: ``target`` if it needs labels, ``reference`` if it needs the float outputs.
        higher_is_better: Direction of improvement.
        api_version: The plugin API it was built for.
    """

    name: str
    metric: str
    summary: str = ""
    needs: tuple[str, ...] = ()
    higher_is_better: bool = True
    api_version: int = API_VERSION


@dataclass(frozen=True)
class ExporterSpec:
    """A form any backend's model can be written in.

    Attributes:
        name: What recipes call it under ``export``.
        export: ``module:function`` taking (quantized, path, example) and returning the path.
        summary: One line for listings.
        suffix: Ending of the file, or empty for a directory.
        api_version: The plugin API it was built for.
        requires: Requirements as pip spells them.
    """

    name: str
    export: str
    summary: str = ""
    suffix: str = ""
    api_version: int = API_VERSION
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnostic:
    """One line of ``quark doctor``.

    Attributes:
        name: What is reported, such as ``kernels on cpu``.
        value: What was found.
        ok: Whether that is as it should be.
        fix: What to do if not.
    """

    name: str
    value: str
    ok: bool = True
    fix: str = ""


@dataclass(frozen=True)
class FormatExplanation:
    """What a format makes of some values.

    Attributes:
        facts: Title and text of what holds for all of them: elements, range, scale rule.
        columns: Titles of ``rows``.
        rows: One for each value, as text: the value, its code, what it becomes, and so on.
    """

    facts: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
