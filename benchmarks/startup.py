"""How long ``quark --help`` and ``quark list`` take with 200 further distributions installed.

Prints medians of interleaved runs, beside a bare interpreter and the import of click, pluggy and
importlib.metadata, which is the least such a command can cost.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = {
    "bare interpreter": ["-c", "pass"],
    "import click, pluggy, metadata": ["-c", "import click, pluggy, importlib.metadata"],
    "quark --help": ["-m", "quark_core.cli", "--help"],
    "quark list": ["-m", "quark_core.cli", "list"],
}
PLUGIN = """
from quark_core import QuantizerSpec, hookimpl

@hookimpl
def quark_quantizers():
    return [QuantizerSpec("demo{index}", "demo{index}:C", "demo{index}:Q", summary="a demo")]
"""


def install(folder: Path, count: int, plugins: int) -> None:
    """Write ``count`` distributions' metadata, ``plugins`` of them with a plugin of ours."""
    for index in range(count):
        info = folder / f"demo{index}-1.0.dist-info"
        info.mkdir()
        name = f"Metadata-Version: 2.1\nName: demo{index}\nVersion: 1.0\n"
        (info / "METADATA").write_text(name + "Requires-Dist: something\n" * 10)
        if index < plugins:
            entry = f"[quark_core]\ndemo{index} = demo{index}\n"
            (folder / f"demo{index}.py").write_text(PLUGIN.format(index=index))
        else:
            entry = f"[console_scripts]\ndemo{index} = demo{index}:main\n"
        (info / "entry_points.txt").write_text(entry)


def main() -> None:
    """Measure and print one line a command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--distributions", type=int, default=200)
    parser.add_argument("--plugins", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder), args.distributions, args.plugins)
        environ = {**os.environ, "PYTHONPATH": folder}
        times: dict[str, list[float]] = {name: [] for name in COMMANDS}
        for _ in range(args.repeats):
            for name, arguments in COMMANDS.items():
                started = time.perf_counter()
                subprocess.run(
                    [sys.executable, *arguments], env=environ, stdout=subprocess.DEVNULL, check=True
                )
                times[name].append((time.perf_counter() - started) * 1000)
    print(f"{args.distributions} distributions, {args.plugins} plugins, {args.repeats} runs each")
    for name, found in times.items():
        print(f"{name:<32} median {statistics.median(found):6.1f} ms  best {min(found):6.1f} ms")


if __name__ == "__main__":
    main()
