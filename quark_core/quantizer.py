"""ModelQuantizer: the interface of a backend, and what the host does around it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from quark_core import _checks
from quark_core.batch import Batch, as_batch
from quark_core.config import QuantizationConfig
from quark_core.errors import DataError, QuantizationError, QuarkError
from quark_core.partial import Partial
from quark_core.plan import Plan
from quark_core.quantized import QuantizedModel

if TYPE_CHECKING:
    import torch

ConfigT = TypeVar("ConfigT", bound=QuantizationConfig)


class Progress(Protocol):
    """What the host reports to while it drives a backend."""

    def __call__(self, task: str, done: int, total: int | None) -> None:
        """``done`` of ``total`` (None if unknown) units of ``task`` are finished."""


def _silent(task: str, done: int, total: int | None) -> None:
    """Report nothing."""


class ModelQuantizer(ABC, Generic[ConfigT]):
    """A backend: turns a float model into a quantized one in three steps.

    A backend implements :meth:`plan`, :meth:`prepare` and :meth:`convert`; calibration runs the
    prepared model on each batch unless the backend overrides :meth:`calibrate` or
    :meth:`passes`. Users call :meth:`quantize`, which belongs to the host.
    """

    config_class: ClassVar[type[QuantizationConfig]] = QuantizationConfig

    partial: Partial = Partial()
    """Where an algorithm that goes layer by layer keeps finished layers, so that the next attempt
    goes on after them. Keeps nothing unless :meth:`quantize` is given a folder."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    # What a backend implements.

    @abstractmethod
    def plan(self, model: torch.nn.Module, example: Batch | None = None) -> Plan:
        """Say what will happen to each layer and why. Reads the model, changes nothing.

        Args:
            model: The float model.
            example: One batch, for backends that must trace; None if there is no data.
        """

    @abstractmethod
    def prepare(self, model: torch.nn.Module, plan: Plan, example: Batch | None = None) -> Any:
        """Make the model ready for calibration: insert observers, or capture the graph.

        The host passes a model of its own (a copy unless the user said otherwise), which may be
        changed and returned.
        """

    @abstractmethod
    def convert(self, prepared: Any) -> QuantizedModel:
        """Freeze what calibration found and return the quantized model."""

    def calibrate(self, prepared: Any, batch: Batch) -> None:
        """Let the prepared model see one batch."""
        batch.run(prepared)

    def passes(self, prepared: Any, plan: Plan) -> Iterator[str]:
        """The passes over the calibration data, by name.

        The host runs the whole calibration set between two steps of this generator, so a
        backend brackets a pass with ``with``: enter a calibration mode, yield the name, and
        leave the mode when the generator goes on. Needed only with several passes, or with
        something to do before and after.
        """
        yield "calibrate"

    def load(
        self, model: torch.nn.Module, directory: Path, example: Batch | None = None
    ) -> QuantizedModel:
        """Rebuild what :meth:`QuantizedModel.save` wrote, from a copy of the float model.

        Args:
            model: The float model.
            directory: Where it was saved.
            example: One batch, for backends that must trace; None if there is no data.

        Raises:
            QuantizationError: The backend cannot load, or the files do not fit the model.
        """
        raise QuantizationError(f"{type(self).__name__} cannot load saved models")

    def require_export(self, name: str, plan: Plan, model: torch.nn.Module) -> None:
        """Refuse a form of export that could not hold what is planned, before any work.

        A backend that cannot tell beforehand leaves the refusal to the export itself.

        Args:
            name: A form that a recipe asks for; the host's own hold anything.
            plan: What will be done.
            model: The float model.

        Raises:
            ExportError: The form cannot hold it; says which would.
        """

    # What the host does, the same for all.

    def make_plan(self, model: torch.nn.Module, example: Any = None) -> Plan:
        """The backend's plan, refused if a rule matches nothing.

        Raises:
            UnmatchedRuleError: A rule selected no layer.
        """
        batch = as_batch(example) if example is not None else None
        with _inference(model, self.config.seed), self._step("plan"):
            plan = self.plan(model, batch)
        plan.require_matches()
        return plan

    def quantize(
        self,
        model: torch.nn.Module,
        calibration: Iterable[Any] | None = None,
        *,
        inplace: bool = False,
        progress: Progress = _silent,
        partial: Path | None = None,
    ) -> QuantizedModel:
        """Quantize a model: plan, prepare, calibrate, convert, then check the result.

        The model's training flag, the gradient mode and torch's random state are as before
        afterwards, also on failure.

        Args:
            model: The float model; left untouched unless ``inplace``.
            calibration: Batches as :func:`quark_core.batch.as_batch` reads them. Needed where
                ranges are static; read more than once only if it is a sequence or can be
                iterated again.
            inplace: Let the backend change ``model`` itself, saving a copy of it in memory.
            progress: Called as work proceeds.
            partial: Folder for the finished layers of algorithms that go layer by layer; the same
                call with the same model, configuration and data goes on after them. Deleted by
                the caller.

        Raises:
            UnmatchedRuleError: A rule selected no layer.
            DataError: Calibration is needed but there are no batches, or the model cannot take
                them.
            QuantizationError: The backend failed, broke its plan, or made a layer NaN.
        """
        _check_model(model)
        data = _Calibration(calibration, self.config.calibration.batches)
        example = data.peek()
        trained = model.training
        with _inference(model, self.config.seed), self._keeping(partial):
            expected = _checks.signature(model, example)
            with self._step("plan"):
                plan = self.plan(model, example)
            plan.require_matches()
            if not plan.quantized:
                raise QuantizationError(
                    "nothing would be quantized: no layer has a spec",
                    where=f"quantizer {self.config.name}",
                    fix="Give quantizer.weight or quantizer.input, or relax the rules; "
                    "`quark plan` shows why each layer stays float",
                )
            if plan.needs_calibration and example is None:
                raise DataError(
                    f"{self.config.name} needs calibration data for static ranges",
                    fix="Give data.calibration, or make inputs dynamic, or quantize weights only",
                )
            float_tensors = _checks.tensor_table(model)
            with self._step("prepare"):
                prepared = self.prepare(model if inplace else copy.deepcopy(model), plan, example)
            if plan.needs_calibration:
                with self._step("calibrate"):
                    self._run_passes(prepared, plan, data, model, progress)
            with self._step("convert"):
                quantized = self.convert(prepared)
            quantized.float_tensors = float_tensors
            quantized.example = example
            if trained:
                quantized.notes.insert(0, "the model came in train mode; eval mode was quantized")
            _checks.carried_out(quantized, self.config.name)
            _checks.sound(quantized, example, expected, self.config.name)
        return quantized

    def restore(
        self, model: torch.nn.Module, directory: Path, example: Any = None
    ) -> QuantizedModel:
        """Load what a quantized model saved, for the same float model, which stays untouched.

        Args:
            model: The float model.
            directory: Where it was saved.
            example: A batch as :func:`quark_core.batch.as_batch` reads it, for backends that
                must trace.

        Raises:
            QuantizationError: The backend cannot load, or the files do not fit the model.
        """
        _check_model(model)
        batch = as_batch(example) if example is not None else None
        with _inference(model, self.config.seed), self._step("load"):
            loaded = self.load(copy.deepcopy(model), Path(directory), batch)
        loaded.example = batch
        loaded.float_tensors = _checks.tensor_table(model)
        return loaded

    @contextmanager
    def _keeping(self, folder: Path | None) -> Iterator[None]:
        self.partial = Partial(folder)
        try:
            yield
        finally:
            self.partial = Partial()

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        """What a backend raises becomes an error that names the backend and its step."""
        try:
            yield
        except QuarkError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines()
            raise QuantizationError(
                f"the backend failed in {name}: {type(error).__name__}",
                where=f"backend {self.config.name}",
                cause=lines[0][:300] if lines else None,
                fix="--traceback shows where; if the recipe is sound, report it to the backend",
            ) from error

    def _run_passes(
        self,
        prepared: Any,
        plan: Plan,
        data: _Calibration,
        model: torch.nn.Module,
        progress: Progress,
    ) -> None:
        passes = self.passes(prepared, plan)
        try:
            for name in passes:
                total = data.count
                progress(name, 0, total)
                for done, batch in enumerate(data, start=1):
                    self.calibrate(prepared, batch.beside(model))
                    progress(name, done, total)
        finally:
            close = getattr(passes, "close", None)
            if close is not None:
                close()


class _Calibration:
    """The calibration batches, limited in number and readable once a pass."""

    def __init__(self, items: Iterable[Any] | None, limit: int | None) -> None:
        if hasattr(items, "shape") or isinstance(items, Mapping | str):
            raise DataError(
                f"calibration is a {type(items).__name__}, not batches",
                fix="Give a list of batches, [x] for a single one, or a data loader",
            )
        # A generator can be read only once, but the example and later passes need it again.
        self._items = list(islice(items, limit)) if isinstance(items, Iterator) else items
        self._limit = limit

    @property
    def count(self) -> int | None:
        length = len(self._items) if hasattr(self._items, "__len__") else None  # type: ignore[arg-type]
        return length if self._limit is None else min(length or self._limit, self._limit)

    def __iter__(self) -> Iterator[Batch]:
        return map(as_batch, islice(self._items or (), self._limit))

    def peek(self) -> Batch | None:
        return next(iter(self), None)


def _check_model(model: Any) -> None:
    import torch

    if not isinstance(model, torch.nn.Module):
        raise QuantizationError(
            f"a model is a torch.nn.Module, not {type(model).__name__}",
            fix="Pass the module itself, not a path or a function",
        )


@contextmanager
def _inference(model: Any, seed: int) -> Iterator[None]:
    """Eval mode, no gradients and a fixed seed; everything as before afterwards."""
    import torch

    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    training = [module.training for module in modules]
    # fork_rng would start CUDA to save its state; without CUDA in use there is none to save.
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if started else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module, flag in zip(modules, training, strict=True):
                module.training = flag
