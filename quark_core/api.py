"""The Python face: as short as the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quark_core.config import QuantizationConfig
from quark_core.errors import ConfigError, Problem
from quark_core.quantized import QuantizedModel
from quark_core.quantizer import ModelQuantizer, Progress
from quark_core.registry import registry

if TYPE_CHECKING:
    import torch

    from quark_core.recipe.run import RunResult


def quantize(
    model: torch.nn.Module,
    config: QuantizationConfig | Mapping[str, Any],
    calibration: Iterable[Any] | None = None,
    *,
    inplace: bool = False,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Quantize a model with the backend that the configuration names.

    Args:
        model: The float model; left untouched unless ``inplace``.
        config: A backend's configuration, or a mapping as a recipe's ``quantizer`` section has
            it: ``{"name": "native", "weight": "int8/channel", "input": "int8"}``.
        calibration: Batches as :func:`quark_core.batch.as_batch` reads them: tensors, dicts of
            keyword arguments, or pairs (inputs, target). Needed for static ranges.
        inplace: Let the backend change ``model`` itself.
        progress: Called with (task, done, total) as work proceeds.

    Raises:
        ConfigError: The configuration is wrong; lists every problem.
        QuarkError: As :meth:`ModelQuantizer.quantize` does.
    """
    if not isinstance(config, QuantizationConfig):
        if not isinstance(config, Mapping):
            raise ConfigError(
                [
                    Problem(
                        "configuration",
                        f"is a {type(config).__name__}: give a mapping such as "
                        '{"name": "native", "weight": "int8/channel"}',
                    )
                ]
            )
        name = config.get("name")
        if not isinstance(name, str):
            raise ConfigError([Problem("name", "required but missing: name a backend")])
        config = registry().config_class(name)(**config)
    quantizer = get_quantizer(config.name)(config)
    if progress is None:
        return quantizer.quantize(model, calibration, inplace=inplace)
    return quantizer.quantize(model, calibration, inplace=inplace, progress=progress)


def get_quantizer(name: str) -> type[ModelQuantizer[Any]]:
    """The quantizer class of a backend, to be called with its configuration.

    Raises:
        UnknownNameError, PluginError, MissingDependencyError: As the registry does.
    """
    return registry().quantizer_class(name)


def list_quantizers() -> list[str]:
    """Names of the backends that are installed and can be used, sorted."""
    return [entry.spec.name for entry in registry().entries("quantizer")]


def run(
    recipe: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    quantizer: str | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
) -> RunResult:
    """Carry out a recipe, as ``quark run`` does; finished stages are not done again.

    Args:
        recipe: A YAML or TOML file, or the recipe as a mapping.
        overrides: ``PATH=VALUE`` texts.
        quantizer: Backend to use in place of the recipe's.
        folder: The run folder; by default one under the recipe's ``output``.
        overwrite: Replace a run of another recipe found in ``folder``.

    Raises:
        QuarkError: The recipe is wrong, or a stage failed.
        AccuracyGateError: A gate was missed; the results are written all the same.
    """
    from quark_core.recipe.load import load_recipe
    from quark_core.recipe.run import run_recipe

    source = recipe if isinstance(recipe, Mapping) else Path(recipe)
    loaded = load_recipe(source, overrides=overrides, quantizer=quantizer)
    place = None if folder is None else Path(folder)
    result = run_recipe(loaded, folder=place, overwrite=overwrite)
    result.require_gates()
    return result
