"""The entry point is light."""

from __future__ import annotations

import json
import subprocess
import sys

from quark_native.config import NativeConfig
from quark_native.quantizer import NativeQuantizer

from quark_core.registry import registry

HEAVY = ("torch", "numpy", "pydantic", "safetensors")


def loaded_after(statement: str) -> set[str]:
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_plugin_imports_neither_torch_nor_pydantic():
    loaded = loaded_after("from quark_native.plugin import quark_quantizers; quark_quantizers()")
    assert "quark_native.plugin" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_configuration_imports_no_torch():
    loaded = loaded_after("from quark_native.config import NativeConfig")
    assert "pydantic" in loaded
    assert "torch" not in loaded


def test_the_host_finds_the_backend_by_name():
    assert registry().config_class("native") is NativeConfig
    assert registry().quantizer_class("native") is NativeQuantizer
    capabilities = registry().get("quantizer", "native").spec.capabilities
    assert capabilities.save_load
    assert capabilities.set_enabled
