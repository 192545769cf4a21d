"""From a recipe file to something that can run, with everything wrong said at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from quark_core.config import QuantizationConfig
from quark_core.errors import (
    ConfigError,
    MissingDependencyError,
    Problem,
    QuarkError,
    UnsupportedSpecError,
    UntrustedContentError,
    did_you_mean,
)
from quark_core.problems import config_error
from quark_core.recipe import overrides as overriding
from quark_core.recipe.document import Document, read
from quark_core.recipe.schema import MetricItem, Recipe, Source
from quark_core.registry import Entry, Kind, registry
from quark_core.registry.requirements import missing
from quark_core.sources.context import Context
from quark_core.sources.options import SourceOptions

if TYPE_CHECKING:
    import torch

Part = Literal["model", "calibration", "evaluation"]


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe that has been checked whole.

    Attributes:
        recipe: Its form.
        config: The backend's configuration.
        data: The recipe as plain data, overrides included.
        file: Where it was read from, or None.
        folder: What relative paths in it start from.
        allow_code: Whether the recipe may name Python code.
    """

    recipe: Recipe
    config: QuantizationConfig
    data: dict[str, Any]
    file: Path | None
    folder: Path
    allow_code: bool
    _sources: dict[str, tuple[Entry, SourceOptions]] = field(repr=False, default_factory=dict)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.recipe.name or (self.file.stem if self.file else "recipe")

    @property
    def context(self) -> Context:
        """What sources and metrics may use."""
        return Context(self.folder, self.allow_code)

    def load_model(self) -> torch.nn.Module:
        """The float model, from its source."""
        model: torch.nn.Module = self._load("model")
        return model

    def load_data(self, part: Literal["calibration", "evaluation"]) -> Iterable[Any] | None:
        """The batches of one data set, re-iterable; None if the recipe has none."""
        return self._load(part) if part in self._sources else None

    def code_files(self) -> list[Path]:
        """The user's code files that the recipe names."""
        found = [
            file
            for _, options in self._sources.values()
            for file in options.code_files(self.context)
        ]
        for metric in self.recipe.evaluate.metrics:
            function = metric.options.get("function")
            if isinstance(function, str) and ".py:" in function:
                found.append(self.folder / function.rpartition(":")[0])
        return list(dict.fromkeys(found))

    def _load(self, part: Part) -> Any:
        entry, options = self._sources[part]
        try:
            return registry().resolve(entry, entry.spec.load)(options, self.context)
        except QuarkError as error:
            if part != "model" and error.where and error.where.startswith("data."):
                # A source does not know which of the two data sets it reads.
                error.where = f"data.{part}.{error.where.removeprefix('data.')}"
            raise


def load_recipe(
    source: Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    quantizer: str | None = None,
    allow_code: bool = True,
) -> LoadedRecipe:
    """Read a recipe and check all of it: form, sources, metrics, and the backend's own section.

    Args:
        source: A YAML or TOML file, or the recipe as a mapping (paths in it are then relative
            to the working directory).
        overrides: ``PATH=VALUE`` texts.
        quantizer: Backend to use in place of the recipe's.
        allow_code: Whether the recipe may name Python code to be imported.

    Raises:
        ConfigError: With every problem found.
        UnmatchedRuleError, PluginError, MissingDependencyError: If that is all that is wrong.
        UntrustedContentError: The recipe names code and ``allow_code`` is false.
    """
    if isinstance(source, Mapping):
        document, folder = Document(dict(source)), Path.cwd()
    else:
        document, folder = read(source), source.resolve().parent
    data, given = overriding.apply(document.data, overrides)
    if quantizer is not None:
        section = data.get("quantizer")
        data["quantizer"] = {**(section if isinstance(section, dict) else {}), "name": quantizer}
        given.add("quantizer.name")
    return _Checker(document, data, given, folder, allow_code).run()


class _Checker:
    """Collects what is wrong; each check goes as far as the others let it."""

    def __init__(
        self,
        document: Document,
        data: dict[str, Any],
        given: set[str],
        folder: Path,
        allow_code: bool,
    ) -> None:
        self.document, self.data, self.given = document, data, given
        self.context = Context(folder, allow_code)
        self.problems: list[Problem] = []
        self.others: list[QuarkError] = []
        self.unsupported = True

    def run(self) -> LoadedRecipe:
        recipe = self._form()
        sources = self._sources()
        config = self._config()
        self._metrics()
        self._evaluation()
        self._exports(config)
        if config is not None:
            self._calibration(config)
        self._raise()
        assert recipe is not None
        assert config is not None
        return LoadedRecipe(
            recipe,
            config,
            self.data,
            self.document.file,
            self.context.folder,
            self.context.allow_code,
            sources,
        )

    def _form(self) -> Recipe | None:
        try:
            return Recipe.model_validate(self.data)
        except ValidationError as error:
            self._add(config_error(error, Recipe.model_fields))
            return None

    def _sources(self) -> dict[str, tuple[Entry, SourceOptions]]:
        found: dict[str, tuple[Entry, SourceOptions]] = {}
        data = self.data.get("data")
        sections: dict[str, tuple[str, Kind, Any]] = {
            "model": ("model", "model_source", self.data.get("model"))
        }
        if isinstance(data, dict):
            for part in ("calibration", "evaluation"):
                sections[part] = (f"data.{part}", "data_source", data.get(part))
        for part, (path, kind, section) in sections.items():
            if isinstance(section, dict) and isinstance(section.get("source"), str):
                checked = self._source(path, kind, section)
                if checked is not None:
                    found[part] = checked
        return found

    def _source(
        self, path: str, kind: Kind, section: dict[str, Any]
    ) -> tuple[Entry, SourceOptions] | None:
        entry = self._entry(kind, section["source"], f"{path}.source")
        if entry is None:
            return None
        if entry.spec.runs_code and not self.context.allow_code:
            self.others.append(_untrusted(f"source {section['source']!r}", path))
            return None
        options_class = registry().resolve(entry, entry.spec.options)
        try:
            options: SourceOptions = options_class.model_validate(Source(**section).options)
        except ValidationError as error:
            self._add(config_error(error, options_class.model_fields, prefix=path))
            return None
        for key, file in options.files(self.context).items():
            if not file.exists():
                self._problem(f"{path}.{key}", f"{file} does not exist")
        return entry, options

    def _config(self) -> QuantizationConfig | None:
        section = self.data.get("quantizer")
        if not isinstance(section, dict):
            return None
        name = section.get("name")
        if not isinstance(name, str):
            self._problem("quantizer.name", "required but missing: name a backend, see quark list")
            return None
        entry = self._entry("quantizer", name, "quantizer.name")
        if entry is None:
            return None
        if entry.spec.runs_code and not self.context.allow_code:
            self.others.append(_untrusted(f"quantizer {name!r}", "quantizer"))
            return None
        try:
            return registry().config_class(name)(**section)
        except ConfigError as error:
            self._add(error, "quantizer")
        except TypeError as error:
            self._problem("quantizer", str(error))
        except QuarkError as error:
            self.others.append(error)
        return None

    def _metrics(self) -> None:
        section = self.data.get("evaluate")
        metrics = section.get("metrics") if isinstance(section, dict) else None
        if not isinstance(metrics, list):
            return
        for index, item in enumerate(metrics):
            path = f"evaluate.metrics[{index}]"
            try:
                metric = MetricItem.model_validate(item)
            except ValidationError:
                continue  # already reported with the form
            entry = self._entry("metric", metric.name, path)
            if entry is not None:
                try:
                    build_metric(entry, metric, self.context)
                except (TypeError, ValueError) as error:
                    self._problem(path, f"metric {metric.name!r}: {error}")
                except QuarkError as error:
                    self.others.append(error)

    def _evaluation(self) -> None:
        section, data = self.data.get("evaluate"), self.data.get("data")
        metrics = section.get("metrics") if isinstance(section, dict) else None
        if metrics and not (isinstance(data, dict) and data.get("evaluation") is not None):
            self._problem(
                "data.evaluation",
                "missing, but evaluate.metrics asks for figures: add it, or drop evaluate.metrics",
            )

    def _exports(self, config: QuantizationConfig | None) -> None:
        names = self.data.get("export")
        if config is None or not isinstance(names, list):
            return
        abilities = registry().get("quantizer", config.name).spec.capabilities
        shared = {entry.spec.name: entry.spec.requires for entry in registry().entries("exporter")}
        known = list(dict.fromkeys([*abilities.exports, *shared]))
        required = {**shared, **dict.fromkeys(abilities.exports, ()), **abilities.export_requires}
        for index, name in enumerate(names):
            if name not in known:
                hint = did_you_mean(str(name), known) or f"Accepted are {', '.join(known)}"
                self._problem(
                    f"export[{index}]", f"{config.name} cannot be written as {name!r}. {hint}"
                )
            elif lacking := missing(required[name]):
                self.others.append(
                    MissingDependencyError(
                        f"{name!r} requires {', '.join(map(str, lacking))}",
                        where=f"export[{index}]",
                        fix="Run: pip install " + " ".join(f'"{one.text}"' for one in lacking),
                    )
                )

    def _calibration(self, config: QuantizationConfig) -> None:
        data = self.data.get("data")
        if isinstance(data, dict) and data.get("calibration") is not None:
            return
        for role in ("input", "output"):
            spec = getattr(config, role)
            if spec is not None and not spec.dynamic and not spec.number_format.is_block:
                self._problem(
                    "data.calibration",
                    f"missing, but quantizer.{role} {spec} has static ranges: add it, or write "
                    f"{role}: {spec.format}/dynamic",
                )
                return

    def _entry(self, kind: Kind, name: str, path: str) -> Entry | None:
        try:
            return registry().get(kind, name)
        except ConfigError as error:
            self._add(error)
        except QuarkError as error:
            if error.exit_code == ConfigError.exit_code:
                self._problem(path, str(error).rstrip("."))
            else:
                self.others.append(error)
        return None

    def _add(self, error: ConfigError, prefix: str = "") -> None:
        self.unsupported = self.unsupported and isinstance(error, UnsupportedSpecError)
        for problem in error.problems:
            whole = problem.path == "configuration"
            path = prefix if prefix and whole else ".".join(filter(None, [prefix, problem.path]))
            self._place(path, problem.message)

    def _problem(self, path: str, message: str) -> None:
        self.unsupported = False
        self._place(path, message)

    def _place(self, path: str, message: str) -> None:
        if any(
            path == given or path.startswith((f"{given}.", f"{given}[")) for given in self.given
        ):
            self.problems.append(Problem(path, message, "--set"))
            return
        file = self.document.file
        line = self.document.line(path) if file else None
        self.problems.append(Problem(path, message, str(file) if file else None, line))

    def _raise(self) -> None:
        if not self.problems and self.others:
            raise self.others[0]
        for error in self.others:
            self._problem(error.where or "recipe", str(error).rstrip("."))
        if self.problems:
            known = {(p.path, p.message): p for p in self.problems}
            ordered = sorted(known.values(), key=lambda problem: problem.line or 0)
            raise (UnsupportedSpecError if self.unsupported else ConfigError)(ordered)


def build_metric(entry: Entry, item: MetricItem, context: Context) -> Any:
    """A fresh metric of a recipe, ready for its first batch."""
    metric_class = registry().resolve(entry, entry.spec.metric)
    options = item.options
    if getattr(metric_class, "takes_context", False):
        options = {**options, "context": context}
    return metric_class(**options)


def _untrusted(what: str, where: str) -> UntrustedContentError:
    return UntrustedContentError(
        f"{what} runs Python code that the recipe names",
        where=where,
        fix="Leave --no-code out if you trust the recipe",
    )
