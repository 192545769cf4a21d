"""What is not imported: the command line answers before heavy libraries could load."""

from __future__ import annotations

import subprocess
import sys

import pytest

import quark_core


def _loaded_after(code: str) -> set[str]:
    script = (
        "import sys\ntry:\n    exec(sys.argv[1])\nexcept SystemExit:\n    pass\n"
        "print('\\nMODULES', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.rpartition("MODULES")[2].split())


def _command(*arguments: str) -> str:
    return f"from quark_core.cli import main; main({list(arguments)!r})"


def test_importing_the_package_is_light() -> None:
    loaded = _loaded_after("import quark_core")
    assert not loaded & {"torch", "pydantic", "rich", "click", "pluggy", "yaml", "transformers"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_is_light(arguments: list[str]) -> None:
    loaded = _loaded_after(_command(*arguments))
    assert "click" in loaded
    heavy = {"torch", "transformers", "pydantic", "rich", "yaml", "numpy", "brevitas", "logging"}
    assert not loaded & heavy


def test_list_imports_no_backend() -> None:
    loaded = _loaded_after(_command("list"))
    assert {"quark_native.plugin", "quark_brevitas.plugin", "quark_pt2e.plugin"} <= loaded
    heavy = {"torch", "brevitas", "torchao", "executorch", "transformers", "numpy", "pydantic"}
    assert not loaded & heavy
    assert not any(name.startswith("quark_native.") for name in loaded - {"quark_native.plugin"})


@pytest.mark.parametrize(
    "arguments", [["schema", "native"], ["schema", "brevitas"], ["schema", "ethos-u"], ["schema"]]
)
def test_schemas_need_no_torch(arguments: list[str]) -> None:
    assert not _loaded_after(_command(*arguments)) & {
        "torch",
        "brevitas",
        "torchao",
        "transformers",
    }


def test_public_names_resolve_and_are_documented() -> None:
    for name in quark_core.__all__:
        value = getattr(quark_core, name)
        if callable(value):
            assert value.__doc__, f"{name} has no docstring"
    assert set(quark_core.__all__) <= set(dir(quark_core))
    assert set(quark_core._HOME_OF) == set(quark_core.__all__) - {"__version__"}


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        quark_core.quantise  # noqa: B018


def test_errors_formats_and_registry_are_modules() -> None:
    assert quark_core.errors.QuarkError is quark_core.QuarkError
    assert quark_core.formats.parse_format("int8").bits == 8
    assert callable(quark_core.registry.registry)
