"""Progress on standard error: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

import click

_LINE_EVERY_SECONDS = 10.0


class LineReporter:
    """One line when a stage ends, and one every ten seconds of a long task."""

    def __enter__(self) -> Self:
        """Start reporting."""
        self._last = time.monotonic()
        return self

    def __exit__(self, *failure: object) -> None:
        """Nothing to clean up."""

    def run_started(self, name: str) -> None:
        """A run begins."""
        click.echo(f"{name}:", err=True)

    def stage_started(self, stage: str) -> None:
        """A stage begins."""
        self._last = time.monotonic()

    def stage_finished(self, stage: str, seconds: float, note: str = "") -> None:
        """A stage ended after ``seconds``, or was found finished (``note`` says so)."""
        click.echo(f"  {stage:<10} {note or f'{seconds:.1f} s'}", err=True)

    def progress(self, task: str, done: int, total: int | None) -> None:
        """``done`` of ``total`` units of a task within a stage are finished."""
        if time.monotonic() - self._last >= _LINE_EVERY_SECONDS:
            self._last = time.monotonic()
            click.echo(f"  {task}: {done}" + (f" of {total}" if total else ""), err=True)

    def note(self, text: str) -> None:
        """Something worth knowing of what was done."""
        click.echo(f"  note: {text}", err=True)

    def warn(self, text: str) -> None:
        """Something the user should know; the run goes on."""
        click.echo(f"  warning: {text}", err=True)


class BarReporter(LineReporter):
    """A rich progress bar for the task under way; stages as lines above it."""

    def __enter__(self) -> Self:
        """Start drawing."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._progress.start()
        self._task: Any = None
        self._name = ""
        return self

    def __exit__(self, *failure: object) -> None:
        """Stop drawing, whatever happened."""
        self._progress.stop()

    def run_started(self, name: str) -> None:
        """A run begins."""
        self._print(f"[bold]{name}[/bold]")

    def stage_started(self, stage: str) -> None:
        """A stage begins: show a bar of unknown length until it reports."""
        self._drop()
        self._begin(stage)

    def stage_finished(self, stage: str, seconds: float, note: str = "") -> None:
        """A stage ended; its bar becomes a line."""
        self._drop()
        self._print(f"  {stage:<10} {note or f'{seconds:.1f} s'}")

    def progress(self, task: str, done: int, total: int | None) -> None:
        """Move the bar."""
        if task != self._name:
            self._drop()
            self._begin(task)
        self._progress.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._progress.console.print(f"  note: {text}", markup=False)

    def warn(self, text: str) -> None:
        """A line above the bar."""
        self._progress.console.print(f"  warning: {text}", style="yellow", markup=False)

    def _begin(self, name: str) -> None:
        self._name = name
        self._task = self._progress.add_task(name, total=None)

    def _drop(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task, self._name = None, ""

    def _print(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)


def reporter() -> LineReporter:
    """Bars if standard error is a terminal, else lines."""
    return BarReporter() if sys.stderr.isatty() else LineReporter()
