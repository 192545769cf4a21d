"""The backend of the how-to, taken from the page, built, installed and run by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "write-a-backend.md"
pytestmark = pytest.mark.install

USE = """
import torch, quark_core
from quark_core.errors import UnsupportedSpecError
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
quantized = quark_core.quantize(model, {"name": "half", "weight": "bfloat16",
                                        "rules": [{"name": "2", "skip": True}]})
assert [e.tensor for e in quantized.encodings()] == ["0.weight"]
weight = model[0].weight
assert torch.equal(quantized.module[0].weight, weight.bfloat16().float())
assert not torch.equal(quantized.module[0].weight, weight)
assert quantized.storage()["0.weight"] == 2 * 32
try:
    quark_core.quantize(model, {"name": "half", "weight": "int8"})
except UnsupportedSpecError as error:
    print(error)
"""


def test_the_how_to_works_as_written(tmp_path: Path) -> None:
    blocks = re.findall(r"`([\w/.]+)`:\n\n```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == [
        "pyproject.toml",
        "quark_half/plugin.py",
        "quark_half/backend.py",
    ]
    for name, source in blocks:
        file = tmp_path / "half" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    (tmp_path / "half" / "quark_half" / "__init__.py").write_text("")
    code = "\n".join(source for name, source in blocks if name.endswith("backend.py"))
    assert len([line for line in code.splitlines() if line.strip()]) < 50
    site = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--target",
            str(site),
            str(tmp_path / "half"),
        ],
        check=True,
        capture_output=True,
    )
    environ = {**os.environ, "PYTHONPATH": str(site)}
    listed = subprocess.run(
        [sys.executable, "-m", "quark_core.cli", "list"],
        env=environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    line = next(line for line in listed.stdout.splitlines() if line.startswith("half "))
    assert line.split() == ["half", "quark-half", "1.0", "ready", "bfloat16", "weights"]
    used = subprocess.run(
        [sys.executable, "-c", USE], env=environ, capture_output=True, text=True, check=False
    )
    assert used.returncode == 0, used.stderr
    assert "half cannot do int8 for a weight: accepted are bfloat16" in used.stdout
