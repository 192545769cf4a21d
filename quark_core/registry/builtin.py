"""What the host brings itself, declared like a plugin's facts: light, with import strings."""

from __future__ import annotations

from typing import Any

from quark_core.registry.specs import ExporterSpec, MetricSpec, SourceSpec

_OPTIONS = "quark_core.sources.options"
_MODELS = "quark_core.sources.models"
_DATA = "quark_core.sources.data"
_LABELS = "quark_core.metrics.labels"
_FIDELITY = "quark_core.metrics.fidelity"
_EXPORT = "quark_core.export"

MODEL_SOURCES = [
    SourceSpec(
        "python",
        f"{_OPTIONS}:PythonModelOptions",
        f"{_MODELS}:from_python",
        "a Python callable that returns the module, and a checkpoint",
        runs_code=True,
    ),
    SourceSpec(
        "huggingface",
        f"{_OPTIONS}:HuggingFaceOptions",
        f"{_MODELS}:from_huggingface",
        "a transformers model, from a folder or by id",
        requires=("transformers>=5",),
    ),
    SourceSpec(
        "timm",
        f"{_OPTIONS}:TimmOptions",
        f"{_MODELS}:from_timm",
        "a timm model by name",
        requires=("timm>=1.0",),
    ),
]
DATA_SOURCES = [
    SourceSpec(
        "python",
        f"{_OPTIONS}:PythonDataOptions",
        f"{_DATA}:from_python",
        "a Python callable that returns batches",
        runs_code=True,
    ),
    SourceSpec("npz", f"{_OPTIONS}:ArrayOptions", f"{_DATA}:from_npz", "arrays of a numpy archive"),
    SourceSpec(
        "safetensors",
        f"{_OPTIONS}:ArrayOptions",
        f"{_DATA}:from_safetensors",
        "arrays of a safetensors file",
    ),
    SourceSpec(
        "images",
        f"{_OPTIONS}:ImageFolderOptions",
        f"{_DATA}:from_image_folder",
        "images in one subfolder a class",
        requires=("pillow>=9",),
    ),
    SourceSpec(
        "text",
        f"{_OPTIONS}:TextOptions",
        f"{_DATA}:from_text",
        "windows of tokens from a text or JSONL file",
        requires=("transformers>=5",),
    ),
]
_LABELLED = ("target",)
_REFERENCED = ("reference",)
METRICS = [
    MetricSpec("accuracy", f"{_LABELS}:Accuracy", "share of right top-1 answers", _LABELLED),
    MetricSpec("top5", f"{_LABELS}:Top5", "share of labels among the top five", _LABELLED),
    MetricSpec("topk", f"{_LABELS}:TopK", "share of labels among the top k", _LABELLED),
    MetricSpec(
        "perplexity",
        f"{_LABELS}:Perplexity",
        "exp of the mean loss of the labels",
        _LABELLED,
        higher_is_better=False,
    ),
    MetricSpec("sqnr", f"{_FIDELITY}:Sqnr", "signal to noise against float, dB", _REFERENCED),
    MetricSpec("cosine", f"{_FIDELITY}:Cosine", "cosine against float outputs", _REFERENCED),
    MetricSpec(
        "kl",
        f"{_FIDELITY}:KlDivergence",
        "divergence from the float model's softmax, nats",
        _REFERENCED,
        higher_is_better=False,
    ),
    MetricSpec(
        "mse",
        f"{_FIDELITY}:Mse",
        "mean squared difference from float outputs",
        _REFERENCED,
        higher_is_better=False,
    ),
    MetricSpec(
        "top1_agreement",
        f"{_FIDELITY}:Top1Agreement",
        "share of positions with the float model's top-1",
        _REFERENCED,
    ),
    MetricSpec("python", f"{_LABELS}:PythonMetric", "a function of your own"),
]
EXPORTERS: list[ExporterSpec] = [
    ExporterSpec(
        "checkpoint",
        f"{_EXPORT}.checkpoint:export",
        "what the backend saves and loads again: safetensors and JSON",
    ),
    ExporterSpec(
        "encodings", f"{_EXPORT}.encodings:export", "scales and zero points as JSON", ".json"
    ),
    ExporterSpec(
        "pt2",
        f"{_EXPORT}.pt2:export",
        "torch.export program, loaded again and compared",
        ".pt2",
    ),
]


def specs() -> dict[str, list[Any]]:
    """The host's own specs by kind."""
    return {
        "model_source": MODEL_SOURCES,
        "data_source": DATA_SOURCES,
        "metric": METRICS,
        "exporter": EXPORTERS,
    }
