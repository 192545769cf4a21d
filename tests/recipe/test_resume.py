"""A killed run resumes with the same command and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quark_core.recipe.run import STAGES

Write = Callable[..., Path]
pytestmark = pytest.mark.slow

KILLER = """
import os, signal
from quark_core import hookimpl

def _die(event, stage):
    if os.environ.get("KILL_AT") == f"{event}:{stage}":
        os.kill(os.getpid(), signal.SIGKILL)

@hookimpl
def quark_stage_started(stage):
    _die("started", stage)

@hookimpl
def quark_stage_finished(stage):
    _die("finished", stage)
"""
TRACKER = """
from quark_core import hookimpl

@hookimpl
def quark_stage_finished(stage):
    raise RuntimeError("the tracking server is down")
"""


def _plugin(site: Path, name: str, source: str) -> None:
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[quark_core]\n{name} = {name}_plugin\n")
    (site / f"{name}_plugin.py").write_text(source)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A place where a plugin is installed that kills the process when told to."""
    _plugin(tmp_path / "site", "killer", KILLER)
    return tmp_path / "site"


def _command(recipe: Path, folder: Path) -> list[str]:
    return [sys.executable, "-m", "quark_core.cli", "run", str(recipe), "--folder", str(folder)]


def _run(
    recipe: Path, folder: Path, site: Path, **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(recipe, folder),
        env={**os.environ, "PYTHONPATH": str(site), **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def _results(folder: Path) -> dict[str, bytes]:
    """Every result but times: what must be equal however often the run was interrupted."""
    names = ["metrics.json", "plan.json", "encodings.json", "float.json"]
    files = [folder / name for name in names]
    files += [path for path in sorted((folder / "export").rglob("*")) if path.is_file()]
    files += [path for path in sorted((folder / "quantized").rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def undisturbed(recipe: Write, site: Path, tmp_path: Path) -> dict[str, bytes]:
    """The results of a run that nothing happened to."""
    folder = tmp_path / "undisturbed" / "run"
    assert _run(recipe(), folder, site).returncode == 0
    return _results(folder)


def test_killed_at_every_boundary(
    recipe: Write, site: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    for event in ("started", "finished"):
        for stage in STAGES:
            folder = tmp_path / f"{event}-{stage}" / "run"
            killed = _run(recipe(), folder, site, KILL_AT=f"{event}:{stage}")
            assert killed.returncode == -signal.SIGKILL
            done = json.loads((folder / "manifest.json").read_text())["stages"]
            assert (stage in done) == (event == "finished")
            resumed = _run(recipe(), folder, site)
            assert resumed.returncode == 0, resumed.stderr
            assert resumed.stderr.count("finished before") == len(done)
            assert _results(folder) == undisturbed


def test_killed_at_ten_random_moments(
    recipe: Write, site: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    started = time.perf_counter()
    assert _run(recipe(), tmp_path / "timed" / "run", site).returncode == 0
    whole = time.perf_counter() - started
    moments = random.Random(5)
    for attempt in range(10):
        folder = tmp_path / f"random-{attempt}" / "run"
        process = subprocess.Popen(
            _command(recipe(), folder),
            env={**os.environ, "PYTHONPATH": str(site)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(moments.uniform(0.3, 1.0) * whole)
        process.kill()
        process.wait()
        resumed = _run(recipe(), folder, site)
        assert resumed.returncode == 0, resumed.stderr
        assert _results(folder) == undisturbed
        assert not list(folder.glob(".work-*"))


def test_interrupt_says_so_and_resumes(recipe: Write, site: Path, tmp_path: Path) -> None:
    # A process started in the background of a script would ignore the signal.
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), "
    source = KILLER.replace("os.kill(os.getpid(), signal.SIGKILL", f"{heard}signal.SIGINT")
    assert source != KILLER
    (site / "killer_plugin.py").write_text(source)
    folder = tmp_path / "interrupted" / "run"
    stopped = _run(recipe(), folder, site, KILL_AT="started:evaluate")
    assert stopped.returncode == 130
    assert "interrupted: the same command resumes where it stopped" in stopped.stderr
    assert json.loads((folder / "manifest.json").read_text())["status"] == "interrupted"
    assert _run(recipe(), folder, site).returncode == 0


def test_second_process_is_refused_and_a_dead_ones_lock_is_free(
    recipe: Write, site: Path, tmp_path: Path
) -> None:
    waiting = KILLER.replace("os.kill(os.getpid(), signal.SIGKILL)", "import time; time.sleep(60)")
    (site / "killer_plugin.py").write_text(waiting)
    folder = tmp_path / "locked" / "run"
    holder = subprocess.Popen(
        _command(recipe(), folder),
        env={**os.environ, "PYTHONPATH": str(site), "KILL_AT": "started:quantize"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not (folder / "plan.json").exists():
            assert time.monotonic() < deadline, "the first process never got to work"
            time.sleep(0.05)
        refused = _run(recipe(), folder, site)
        assert refused.returncode == 6
        assert f"another process is at work in {folder}" in refused.stderr
        assert f"process {holder.pid} on " in refused.stderr
    finally:
        holder.kill()
        holder.wait()
    assert _run(recipe(), folder, site).returncode == 0


def test_failing_tracker_is_a_warning(recipe: Write, site: Path, tmp_path: Path) -> None:
    _plugin(site, "tracker", TRACKER)
    folder = tmp_path / "tracked" / "run"
    done = _run(recipe(), folder, site)
    assert done.returncode == 0
    sentence = "tracker:tracker: quark_stage_finished raised RuntimeError: the tracking server is"
    assert sentence in done.stderr
    warnings = json.loads((folder / "manifest.json").read_text())["warnings"]
    assert len(warnings) == 1
    assert sentence in warnings[0]
