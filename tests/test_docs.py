"""What the pages show is accepted: recipes, configurations, commands, files and options."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import pytest
import torch
import yaml

from quark_core.cli import quark
from quark_core.config import QuantizationConfig
from quark_core.errors import MissingDependencyError
from quark_core.execution import Silent
from quark_core.recipe.evaluate import Evaluation
from quark_core.recipe.load import load_recipe
from quark_core.recipe.run import plan_recipe
from quark_core.recipe.schema import Data, Evaluate
from quark_core.registry import registry
from quark_core.spec import FrozenModel, TensorSpec

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("extensions/*/README.md"),
        *ROOT.glob("examples/*/README.md"),
    ]
)
FASHION = ROOT / "examples" / "fashion_mnist"
BREVITAS = ROOT / "docs" / "reference" / "brevitas.md"
HOW_TO_BREVITAS = ROOT / "docs" / "how-to" / "quantize-with-brevitas.md"

OF_THE_READER = "examples/fashion_mnist/recipe.yaml"
"""A file that the README asks for."""


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _blocks(page: Path, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


YAML = [
    pytest.param(page, block, id=f"{_name(page)}-{index}")
    for page in PAGES
    for index, block in enumerate(_blocks(page, "yaml"))
]


@pytest.mark.parametrize(("page", "block"), YAML)
def test_parts_of_recipes(page: Path, block: str) -> None:
    for document in _documents(block):
        quantizer = document.get("quantizer")
        if quantizer is not None:
            name = quantizer.setdefault("name", _backend(page))
            assert registry().config_class(name)(**quantizer).name == name
        if "evaluate" in document:
            Evaluate.model_validate(document["evaluate"])
        if "data" in document:
            Data.model_validate(document["data"])
        for kind, section in _sources(document):
            (entry,) = (e for e in registry().entries(kind) if e.spec.name == section["source"])
            given = {key: value for key, value in section.items() if key != "source"}
            registry().resolve(entry, entry.spec.options).model_validate(given)


def _documents(block: str) -> Iterator[dict[str, Any]]:
    """The mapping of a block; a key that comes again begins the next, as in lists of variants."""
    lines: list[str] = []
    seen: set[str] = set()
    for line in block.splitlines():
        key = re.match(r"(\w+):", line)
        if key and key[1] in seen:
            yield yaml.safe_load("\n".join(lines))
            lines, seen = [], set()
        if key:
            seen.add(key[1])
        lines.append(line)
    yield yaml.safe_load("\n".join(lines))


def _backend(page: Path) -> str:
    return "brevitas" if "brevitas" in page.name else "native"


def _sources(document: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    if "model" in document:
        yield "model_source", document["model"]
    for section in (document.get("data") or {}).values():
        yield "data_source", section


def test_the_recipe_of_the_readme_works_as_it_stands(tmp_path: Path) -> None:
    for name in ("model.py", "fashion_net.safetensors", "data.npz"):
        shutil.copy(FASHION / name, tmp_path / name)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(next(_blocks(ROOT / "README.md", "yaml")))
    loaded = load_recipe(recipe)
    plan = plan_recipe(loaded)
    assert [entry.name for entry in plan.entries if not entry.specs] == ["classifier"]
    loaded = load_recipe(recipe, overrides=["evaluate.batches=4", "evaluate.metrics=[accuracy]"])
    data = loaded.load_data("evaluation")
    assert data is not None
    found = Evaluation(loaded, data, Silent()).of_float(loaded.load_model())
    assert found["accuracy"] > 0.9


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples").glob("*/**/*.yaml")), ids=_name)
def test_examples_are_accepted(recipe: Path) -> None:
    try:
        loaded = load_recipe(recipe)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    if loaded.config.name == "brevitas" and FASHION in recipe.parents:
        plan = plan_recipe(loaded)
        assert len(plan.quantized) == 11
        assert "rewriting" in " ".join(step.name for step in plan.steps)


PYTHON = [
    pytest.param(block, id=f"{_name(page)}-{index}")
    for page in (
        ROOT / "README.md",
        ROOT / "docs" / "how-to" / "use-your-own-model-and-data.md",
        BREVITAS,
    )
    for index, block in enumerate(_blocks(page, "python"))
]


@pytest.mark.parametrize("block", PYTHON)
def test_python(block: str, tmp_path: Path) -> None:
    """Runs, given the names that a page leaves to its reader."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
    batches = [torch.randn(16, 64) for _ in range(4)]
    model = torch.nn.Sequential(*layers)
    names: dict[str, Any] = {
        "model": model,
        "batches": batches,
        "inputs": batches[0],
        "folder": tmp_path / "new",
    }
    exec(block, names)
    assert names["quantized"].size_bytes() < 5000
    assert torch.isfinite(names["quantized"](batches[0])).all()


COMMANDS = [
    pytest.param(line, id=f"{_name(page)}: {line}")
    for page in PAGES
    if page.name != "cli.md"
    for line in re.findall(r"^    (?:\.venv/bin/)?(quark [^#\n]*)", page.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line: str) -> None:
    """The command exists, takes these options, and files that are named in full are there."""
    words = shlex.split(line)[1:]
    command: click.Command = quark
    with click.Context(quark) as context:
        while isinstance(command, click.Group) and words:
            inner = command.get_command(context, words[0])
            if inner is None:
                break
            command, words = inner, words[1:]
        assert command is not quark, line
        command.make_parser(click.Context(command, parent=context)).parse_args(list(words))
    for word in words:
        if word.startswith("examples/"):
            assert list(ROOT.glob(word)), word


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_files_that_are_named(page: Path) -> None:
    for path in re.findall(
        r"`((?:docs|examples|benchmarks|extensions)/[\w./*-]+)`", page.read_text()
    ):
        if path != OF_THE_READER:
            assert list(ROOT.glob(path.rstrip("/"))), f"{path} does not exist"


def _rows(page: Path, head: str) -> list[list[str]]:
    """Cells of the rows of the table that begins with ``head``."""
    lines = page.read_text().split(f"\n{head}", 1)[1].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def test_wishes_and_what_to_write_for_them() -> None:
    brevitas = registry().config_class("brevitas")
    rows = _rows(HOW_TO_BREVITAS, "| you want | write |")
    assert len(rows) >= 8
    for _, write in rows:
        codes = [code for code in re.findall(r"`([^`]+)`", write) if ":" in code]
        for together in codes if "` or `" in write else [", ".join(codes)]:
            fields = yaml.safe_load("{" + together + "}")
            assert brevitas(**{"name": "brevitas", "weight": "int4/channel", **fields})


def test_every_option_of_brevitas_is_in_the_table() -> None:
    rows = _rows(BREVITAS, "| option | values (default) |")
    assert all(all(cells) for cells in rows)
    lacking = list(_lacking(rows))
    assert not lacking, f"docs/reference/brevitas.md: {'; '.join(lacking)}"
    fields = {*registry().config_class("brevitas").model_fields, "accumulator"}
    named = {name for cells in rows for name in re.findall(r"^`(\w+)", cells[0])}
    assert named <= fields, f"docs/reference/brevitas.md: no options are {named - fields}"


def test_every_flag_of_brevitas_scripts_is_on_the_page_for_their_users() -> None:
    scripts = Path(str(metadata.distribution("brevitas").locate_file("brevitas_examples")))
    flags: set[str] = set()
    for script in ("imagenet_classification/ptq/ptq_imagenet_args.py", "llm/llm_args.py"):
        text = (scripts / script).read_text()
        flags.update(re.findall(r"""['"]--([a-z0-9-]+)['"]""", text))
        flags.update(re.findall(r"add_bool_arg\(\s*parser,\s*'([a-z0-9-]+)'", text))
    page = ROOT / "docs" / "how-to" / "come-from-brevitas.md"
    assert flags == set(re.findall(r"`--([a-z0-9-]+)`", page.read_text()))


def _lacking(rows: list[list[str]]) -> Iterator[str]:
    """What the table does not say of the fields of BrevitasConfig and of the options within."""
    for name, field in registry().config_class("brevitas").model_fields.items():
        if name in QuantizationConfig.model_fields:
            continue
        found = [cells for cells in rows if f"`{name}" in cells[0]]
        if not found:
            yield f"{name} has no row"
        elif models := _models_in(field.annotation):
            for model in models:
                yield from _lacking_within(rows, name, model)
        else:
            yield from _unsaid(name, field, found[0][1])


def _lacking_within(rows: list[list[str]], name: str, model: Any) -> Iterator[str]:
    fields = dict(model.model_fields)
    tag = fields.pop("name").default if "name" in fields else None
    first = f"`{name}: {tag}`" if tag else f"`{name}"
    own = [cells for cells in rows if first in cells[0]]
    for part, field in fields.items():
        yield from _unsaid(f"{tag or name}.{part}", field, _part(own, part, model))
        for inner in _models_in(field.annotation):
            yield from _lacking_within(rows, part, inner)


def _part(rows: list[list[str]], part: str, model: Any) -> str | None:
    """What the table says of an option within an option, in a row of its own or beside others."""
    for cells in rows:
        if cells[0].endswith((f".{part}`", f"`{part}` of it")):
            return cells[1]
        pieces = re.split(r"`(" + "|".join(model.model_fields) + r")`", cells[1])
        if part in pieces[1::2]:
            return pieces[pieces[1::2].index(part) * 2 + 2]
    return None


def _unsaid(place: str, field: Any, text: str | None) -> Iterator[str]:
    if text is None:
        yield f"{place} is not named"
        return
    for value in _choices(field.annotation):
        if f"`{value}`" not in text:
            yield f"{place} does not list {value}"
    default = "required" if field.is_required() else field.get_default(call_default_factory=True)
    shown = f"{default:g}" if isinstance(default, int | float) else str(default)
    if default is None or isinstance(default, bool):
        shown = {None: "null", True: "true", False: "false"}[default]
    if not re.search(r"\(`?" + re.escape(str(shown)) + r"`?[:,;)]", text.replace("1e-6", "1e-06")):
        yield f"{place} has no default ({shown})"


def _choices(annotation: Any) -> list[Any]:
    """The values of a Literal, alone or in a union."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in _choices(part)]


def _models_in(annotation: Any) -> list[type[FrozenModel]]:
    if isinstance(annotation, type) and issubclass(annotation, FrozenModel):
        return [] if annotation is TensorSpec else [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
