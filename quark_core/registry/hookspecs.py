"""Every hook a plugin can implement, in one place.

A plugin is a module named by an entry point of group ``quark_core``; its functions carry
:data:`hookimpl`. The first five hooks are called once, when the plugin is loaded, and return
light facts; they must import neither torch nor the wrapped library. What raises in them marks
the plugin as failed and leaves the others alone. ``quark doctor`` alone asks for diagnostics,
and ``quark formats`` alone for explanations.
The events are called while a run goes on; an exception in one is reported as a warning and never
stops the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from quark_core.registry.specs import (
        Diagnostic,
        ExporterSpec,
        FormatExplanation,
        MetricSpec,
        QuantizerSpec,
        SourceSpec,
    )

GROUP = "quark_core"
"""Entry-point group that plugins register in."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def quark_quantizers() -> list[QuantizerSpec]:  # type: ignore[empty-body]
    """The backends this plugin brings."""


@hookspec
def quark_exporters() -> list[ExporterSpec]:  # type: ignore[empty-body]
    """The export forms this plugin brings, usable with every backend."""


@hookspec
def quark_model_sources() -> list[SourceSpec]:  # type: ignore[empty-body]
    """The ways to get a model that this plugin brings."""


@hookspec
def quark_data_sources() -> list[SourceSpec]:  # type: ignore[empty-body]
    """The ways to get data that this plugin brings."""


@hookspec
def quark_metrics() -> list[MetricSpec]:  # type: ignore[empty-body]
    """The metrics this plugin brings."""


@hookspec
def quark_diagnostics() -> list[Diagnostic]:  # type: ignore[empty-body]
    """What ``quark doctor`` shall say of this plugin; called for nothing else, may be slow."""


@hookspec
def quark_explain_format(spec: str, values: list[float], profile: str) -> FormatExplanation | None:
    """What a format makes of some values, for ``quark formats explain``.

    Args:
        spec: Shorthand of a :class:`~quark_core.spec.TensorSpec`, in its canonical spelling.
        values: One after another along the axis of its blocks.
        profile: Whose numerics, ``ocp`` unless the user names another.

    Returns:
        None where this plugin has no arithmetic for it. The first plugin that answers is heard;
        a :class:`~quark_core.errors.QuarkError` is the user's to see.
    """


@hookspec
def quark_run_started(recipe: dict[str, Any], folder: Path) -> None:
    """A run begins or is resumed; ``recipe`` is the resolved recipe as plain data."""


@hookspec
def quark_stage_started(stage: str, folder: Path) -> None:
    """A stage begins; stages already finished in an earlier attempt are not announced."""


@hookspec
def quark_stage_finished(stage: str, folder: Path, record: dict[str, Any]) -> None:
    """A stage is finished and recorded; ``record`` is its entry in the manifest."""


@hookspec
def quark_run_finished(folder: Path, metrics: dict[str, Any]) -> None:
    """All stages are finished; ``metrics`` is what metrics.json holds."""


@hookspec
def quark_run_failed(folder: Path, error: BaseException) -> None:
    """The run stopped at ``error``; finished stages stay in the folder."""
