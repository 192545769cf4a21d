"""What ``quark doctor`` says of the kernels."""

from __future__ import annotations

import os

import torch

from quark_core.registry.specs import Diagnostic
from quark_native.kernels import gpu, library

_BUILD = (
    "Install a C++17 compiler (gcc or clang) and run: "
    "pip install --force-reinstall --no-deps quark-native"
)


def diagnostics() -> list[Diagnostic]:
    """Which kernel will run on each device, and why."""
    found = [_cpu(), _gpu()]
    forced = os.environ.get("QUARK_NATIVE_KERNEL")
    if forced:
        text = f"{forced} for everything, by QUARK_NATIVE_KERNEL"
        fix = "Take QUARK_NATIVE_KERNEL out of the environment to choose by tensor"
        found.append(Diagnostic("kernels forced", text, fix=fix))
    return found


def _cpu() -> Diagnostic:
    name, threads = "kernels on cpu", torch.get_num_threads()
    compiled, why = library.load()
    if compiled is None:
        text = f"plain torch, about eight times slower than compiled: {why}"
        return Diagnostic(name, text, fix=_BUILD)
    return Diagnostic(name, f"compiled, {why}, {threads} threads")


def _gpu() -> Diagnostic:
    name = "kernels on gpu"
    if not torch.cuda.is_available():
        return Diagnostic(name, "no GPU that torch can use")
    device = torch.cuda.get_device_name(0)
    found = gpu.kernels()
    if isinstance(found, str):
        return Diagnostic(name, f"plain torch on {device}: {found}", fix="Run: pip install triton")
    return Diagnostic(name, f"Triton on {device}")
