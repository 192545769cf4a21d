"""Progress as lines and as bars."""

from __future__ import annotations

import sys

import pytest

from quark_core.cli import progress


def _tell(reporter: progress.LineReporter) -> None:
    with reporter as report:
        report.run_started("demo")
        report.stage_started("quantize")
        report.progress("calibrate", 1, 4)
        report.progress("calibrate", 4, 4)
        report.progress("unknown length", 1, None)
        report.warn("[careful] with this")
        report.stage_finished("quantize", 1.25)
        report.stage_finished("export", 0.0, "finished before")


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    _tell(progress.LineReporter())
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "demo:",
        "  warning: [careful] with this",
        "  quantize   1.2 s",
        "  export     finished before",
    ]


def test_long_tasks_are_told_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", 0.0)
    _tell(progress.LineReporter())
    assert "  calibrate: 1 of 4\n" in capsys.readouterr().err


def test_bars_leave_the_same_lines(capsys: pytest.CaptureFixture[str]) -> None:
    _tell(progress.BarReporter())
    said = capsys.readouterr()
    assert said.out == ""
    for line in ("demo", "warning: [careful] with this", "quantize   1.2 s", "export     finished"):
        assert line in said.err


def test_bars_end_when_the_run_fails() -> None:
    def fail(reporter: progress.BarReporter) -> None:
        with reporter:
            reporter.stage_started("quantize")
            raise RuntimeError("stop")

    reporter = progress.BarReporter()
    with pytest.raises(RuntimeError, match="stop"):
        fail(reporter)
    assert not reporter._progress.live.is_started


def test_bars_only_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(progress.reporter(), progress.BarReporter)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert not isinstance(progress.reporter(), progress.BarReporter)
