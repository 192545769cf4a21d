"""Running models over the evaluation data: metrics, and how each layer fares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from quark_core.batch import Batch, as_batch, main_output
from quark_core.errors import DataError, QuantizationError
from quark_core.execution import Reporter
from quark_core.quantized import QuantizedModel
from quark_core.recipe.load import LoadedRecipe, build_metric
from quark_core.registry import registry

if TYPE_CHECKING:
    import torch

_FLOAT = "float model"
_LAYER_SAMPLES = 16


class Evaluation:
    """The evaluation of one recipe: its data and metrics, for any model.

    Args:
        loaded: The recipe.
        data: Its evaluation batches.
        reporter: Told how far each pass is.
    """

    def __init__(self, loaded: LoadedRecipe, data: Iterable[Any], reporter: Reporter) -> None:
        self._loaded, self._data, self._reporter = loaded, data, reporter
        self._limit = loaded.recipe.evaluate.batches
        self._metrics = [
            (item, registry().get("metric", item.name)) for item in loaded.recipe.evaluate.metrics
        ]

    def of_float(self, model: torch.nn.Module) -> dict[str, float]:
        """The metrics that make sense for the float model alone."""
        alone = [(item, entry) for item, entry in self._metrics if not _referenced(entry)]
        return self._run(_FLOAT, alone, model, None)

    def of_quantized(self, quantized: QuantizedModel, model: torch.nn.Module) -> dict[str, float]:
        """All metrics of a quantized model, beside the float model where they need it."""
        return self._run("quantized model", self._metrics, quantized.module, model)

    def _run(
        self,
        task: str,
        metrics: Sequence[tuple[Any, Any]],
        model: torch.nn.Module,
        reference: torch.nn.Module | None,
    ) -> dict[str, float]:
        built = {
            item.name: build_metric(entry, item, self._loaded.context) for item, entry in metrics
        }
        if not built:
            return {}
        side_by_side = reference is not None and any(_referenced(entry) for _, entry in metrics)
        total = _length(self._data, self._limit)
        self._reporter.progress(task, 0, total)
        with inference(model, *([reference] if reference is not None else [])):
            done = 0
            for done, batch in enumerate(_batches(self._data, self._limit), start=1):
                # The float model first: if it fails, the data are to blame and not the backend.
                truth = _output(reference, batch, _FLOAT, done) if side_by_side else None
                output = _output(model, batch, task, done)
                for metric in built.values():
                    metric.update(output, batch.target, truth)
                self._reporter.progress(task, done, total)
        if done == 0:
            raise DataError("the evaluation data hold no batch", where="data.evaluation")
        return {name: float(metric.compute()) for name, metric in built.items()}

    def layers(self, quantized: QuantizedModel, model: torch.nn.Module) -> list[dict[str, Any]]:
        """SQNR in dB of each planned layer's output on a few samples, against the float model.

        Errors of earlier layers are included: it is what arrives, not what the layer adds. Null
        where the layer has no counterpart that can be listened to.
        """
        sample = next(_batches(self._data, 1), None)
        if sample is None:
            return []
        batch = _few(sample)
        names = [entry.name for entry in quantized.plan.entries]
        with inference(model, quantized.module):
            counterparts = {name: quantized.counterpart(name) for name in names}
            floats = {name: _submodule(model, other) for name, other in counterparts.items()}
            truth = _listen(floats, model, batch)
            found = _listen(
                {name: quantized.layer(name) for name in names}, quantized.module, batch
            )
        return [
            {"name": entry.name, "op": entry.op, "sqnr": _sqnr(truth, found, entry.name)}
            for entry in quantized.plan.entries
        ]


@contextmanager
def inference(*models: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for some models; as before afterwards."""
    import torch

    flags = [(module, module.training) for model in models for module in model.modules()]
    with torch.no_grad():
        for module, _ in flags:
            module.training = False
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag


def _referenced(entry: Any) -> bool:
    return "reference" in entry.spec.needs


def _batches(data: Iterable[Any], limit: int | None) -> Iterator[Batch]:
    return map(as_batch, islice(data, limit))


def _length(data: Iterable[Any], limit: int | None) -> int | None:
    if not isinstance(data, Sized):
        return limit
    return len(data) if limit is None else min(len(data), limit)


def _output(model: Any, batch: Batch, task: str, index: int) -> torch.Tensor:
    given = batch.beside(model)
    if task == _FLOAT:
        output = main_output(given.run_float(model, f"data.evaluation, batch {index}")).cpu()
    else:
        output = main_output(given.run(model)).cpu()
    if output.is_floating_point() and bool(output.isnan().any()):
        raise QuantizationError(
            f"the {task} returns NaN",
            where=f"evaluation batch {index}",
            fix="The per-layer figures of a run with fewer quantized layers show where it begins",
        )
    return output


def _few(batch: Batch) -> Batch:
    """Few enough samples that the outputs of all layers fit in memory at once.

    A token becomes a vector of hundreds of values in every layer, a pixel does not.
    """
    integers = not any(leaf.is_floating_point() for leaf in batch.tensors())
    count = 1 if integers else _LAYER_SAMPLES
    return batch.map(lambda tensor: tensor[:count] if tensor.ndim else tensor)


def _submodule(model: torch.nn.Module, name: str | None) -> torch.nn.Module | None:
    if name is None:
        return None
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _listen(
    modules: dict[str, torch.nn.Module | None], model: torch.nn.Module, batch: Batch
) -> dict[str, torch.Tensor]:
    heard: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in modules.items():
        if module is not None:

            def keep(_module: Any, _args: Any, output: Any, name: str = name) -> None:
                heard[name] = main_output(output).detach()

            handles.append(module.register_forward_hook(keep))
    try:
        batch.beside(model).run(model)
    finally:
        for handle in handles:
            handle.remove()
    return heard


def _sqnr(
    truth: dict[str, torch.Tensor], found: dict[str, torch.Tensor], name: str
) -> float | None:
    if name not in truth or name not in found or truth[name].shape != found[name].shape:
        return None
    expected, got = truth[name].double(), found[name].double()
    noise = float((expected - got).square().sum())
    signal = float(expected.square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
