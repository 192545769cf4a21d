"""What is known of a run besides its results: versions, hashes, machine, memory."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import psutil

from quark_core.recipe import hashing
from quark_core.recipe.load import LoadedRecipe
from quark_core.registry import Entry, registry

SCHEMA = 1
_SAMPLE_SECONDS = 0.02


@dataclass
class Measured:
    """What a stage took.

    Attributes:
        seconds: Wall time.
        peak_memory_bytes: Largest resident memory of the process, sampled every 20 ms.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0


@contextmanager
def measure() -> Iterator[Measured]:
    """Time a block, and watch the process's memory meanwhile."""
    found, process, ended = Measured(), psutil.Process(), threading.Event()

    def watch() -> None:
        while True:
            found.peak_memory_bytes = max(found.peak_memory_bytes, process.memory_info().rss)
            if ended.wait(_SAMPLE_SECONDS):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - started
        ended.set()
        watcher.join()


def fresh(loaded: LoadedRecipe) -> dict[str, Any]:
    """The manifest of a run that has done nothing yet."""
    entry = registry().get("quantizer", loaded.config.name)
    return {
        "schema": SCHEMA,
        "name": loaded.name,
        "status": "running",
        "recipe": loaded.data,
        "recipe_file": str(loaded.file) if loaded.file else None,
        "recipe_key": recipe_key(loaded),
        "started": now(),
        "versions": versions(entry),
        "quantizer": {
            "name": entry.spec.name,
            "distribution": entry.plugin.distribution,
            "version": entry.plugin.version,
        },
        "hashes": {},
        "seed": loaded.config.seed,
        "hardware": hardware(),
        "stages": {},
        "warnings": [],
    }


def recipe_key(loaded: LoadedRecipe) -> str:
    """Hash of what the recipe says; where it lies and where results go do not matter."""
    said = loaded.recipe.model_dump(mode="json", exclude={"name", "output"})
    config = loaded.config.model_dump(mode="json", exclude_unset=True)
    return hashing.of_data({**said, "quantizer": config})


def versions(entry: Entry) -> dict[str, str]:
    """Versions of Python and of every distribution that has a part in the run."""
    from packaging.requirements import Requirement

    names = ["torch", "numpy", "safetensors", "pydantic", "pluggy", "quark-core"]
    names.append(entry.plugin.distribution)
    names += [Requirement(text).name for text in entry.spec.requires]
    found = {"python": platform.python_version()}
    for name in dict.fromkeys(names):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def host_versions() -> dict[str, str]:
    """Versions of Python and torch, which the float model's outputs depend on."""
    return {"python": platform.python_version(), "torch": metadata.version("torch")}


def code_key(entry: Entry) -> str:
    """Hash of the code that computes: the host's and the backend's, and versions of the rest."""
    packages = {
        target.split(".")[0].split(":")[0] for target in (entry.spec.quantizer, "quark_core")
    }
    hashes = {name: hashing.of_package(name) for name in packages}
    return hashing.of_data({"packages": hashes, "versions": versions(entry)})


def hardware() -> dict[str, Any]:
    """The machine, as far as results and times depend on it."""
    import torch

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
