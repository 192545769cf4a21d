"""Real distributions, built and pip-installed into a directory of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HEALTHY = """
from quark_core import QuantizerSpec, hookimpl

@hookimpl
def quark_quantizers():
    return [QuantizerSpec({name!r}, "{module}.code:Config", "{module}.code:Quantizer",
                          summary="works", {extra})]
"""

BROKEN = {
    # distribution: (entry-point name, source of its plugin module)
    "demo-raises": ("raises", "import a_library_nobody_has\n"),
    "demo-exits": ("exits", "raise SystemExit('this plugin wants to end the process')\n"),
    "demo-syntax": ("syntax", "def broken(:\n"),
    "demo-type": (
        "type",
        "from quark_core import hookimpl\n\n@hookimpl\ndef quark_quantizers():\n"
        "    return {'type': 'a dict is no list'}\n",
    ),
    "demo-member": (
        "member",
        "from quark_core import hookimpl\n\n@hookimpl\ndef quark_quantizers():\n"
        "    return ['only a name']\n",
    ),
    "demo-hook-raises": (
        "hook-raises",
        "from quark_core import hookimpl\n\n@hookimpl\ndef quark_quantizers():\n"
        "    raise RuntimeError('no licence file')\n",
    ),
    "demo-typo": (
        "typo",
        "from quark_core import hookimpl\n\n@hookimpl\ndef quark_quantizer():\n    return []\n",
    ),
    "demo-empty": ("empty", "VALUE = 1\n"),
    "demo-string": (
        "string",
        "from quark_core import QuantizerSpec, hookimpl\n\n@hookimpl\ndef quark_quantizers():\n"
        "    return [QuantizerSpec('string', 'not an import string', 'a.b:C')]\n",
    ),
}


def _sources() -> dict[str, tuple[str, str]]:
    def healthy(name: str, module: str, extra: str = "") -> str:
        return HEALTHY.format(name=name, module=module, extra=extra)

    return {
        "demo-healthy": ("healthy", healthy("healthy", "demo_healthy")),
        "demo-prints": ("prints", "print('hello from a plugin')\n" + healthy("prints", "demo_p")),
        "demo-slow": ("slow", "import time; time.sleep(0.8)\n" + healthy("slow", "demo_slow")),
        "demo-future": ("future", healthy("future", "demo_future", "api_version=99")),
        "demo-past": ("past", healthy("past", "demo_past", "api_version=0")),
        "twin-one": ("twin", healthy("twin", "twin_one")),
        "twin-two": ("twin", healthy("twin", "twin_two")),
        "demo-alias": ("alias", healthy("healthy2", "demo_alias")),
        "demo-needs": (
            "needs",
            healthy("needs", "demo_needs", "requires=('surely-not-installed>=3', 'pluggy>=99')"),
        ),
        **BROKEN,
    }


def write_distribution(
    root: Path, name: str, entry: str, source: str, version: str = "1.2"
) -> Path:
    """A source tree of a distribution whose only module is a plugin."""
    folder = root / name
    module = name.replace("-", "_")
    package = folder / module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "plugin.py").write_text(source)
    (folder / "pyproject.toml").write_text(
        f"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"

[project.entry-points.quark_core]
{entry} = "{module}.plugin"
"""
    )
    return folder


def pip_install(target: Path, *sources: Path) -> None:
    """Build and install source trees into ``target``."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        + ["--disable-pip-version-check", "--no-index", "--target", str(target)]
        + [str(source) for source in sources],
        check=True,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all demonstration plugins installed."""
    root = tmp_path_factory.mktemp("distributions")
    target = root / "site"
    folders = [
        write_distribution(root, name, entry, source)
        for name, (entry, source) in _sources().items()
    ]
    pip_install(target, *folders)
    return target


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def python(site: Path) -> Run:
    """Runs Python code in a process that sees the demonstration plugins."""

    def run(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(site), **environ},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


@pytest.fixture
def listing(python: Run) -> Callable[..., dict[str, Any]]:
    """What ``quark list --json`` says beside the demonstration plugins."""

    def run(**environ: str) -> dict[str, Any]:
        code = "from quark_core.cli import main; main(['list', '--json'])"
        done = python(code, **environ)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run
