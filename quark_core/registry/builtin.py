"""What the host brings itself, declared like a plugin's facts: light, with import strings."""

from __future__ import annotations

from typing import Any

from quark_core.registry.specs import ExporterSpec, MetricSpec, SourceSpec

MODEL_SOURCES: list[SourceSpec] = []
DATA_SOURCES: list[SourceSpec] = []
METRICS: list[MetricSpec] = []
EXPORTERS: list[ExporterSpec] = []


def specs() -> dict[str, list[Any]]:
    """The host's own specs by kind."""
    return {
        "model_source": MODEL_SOURCES,
        "data_source": DATA_SOURCES,
        "metric": METRICS,
        "exporter": EXPORTERS,
    }
