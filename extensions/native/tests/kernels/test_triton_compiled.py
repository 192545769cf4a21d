"""What the Triton kernels take of a GPU, told by compiling them ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
REGISTERS = 64
"""With 64 registers or fewer a multiprocessor of 64k holds 1,024 threads, enough to keep memory
busy; NVFP4's double-precision scale takes some more."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict[str, int]]:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    command = [sys.executable, str(SCRIPT)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_every_kernel_compiles_for_every_target(compiled):
    targets = {key.rpartition(" ")[2] for key in compiled}
    assert targets == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert len(compiled) == 136


def test_registers_suffice(compiled):
    for key, usage in compiled.items():
        assert usage["local"] == 0, key
        assert usage["registers"] <= (80 if key.startswith("nvfp") else REGISTERS), key


def test_memory_is_read_and_written_128_bits_at_once(compiled):
    for key, usage in compiled.items():
        # One more load for a scale of the whole tensor.
        assert usage["wide_loads"] >= usage["loads"] - 1 > 0 or usage["loads"] == 1, key
        assert usage["wide_loads"] > 0, key
        if not key.startswith("pack"):
            assert usage["wide_stores"] == usage["stores"] > 0, key
