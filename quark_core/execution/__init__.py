"""Where independent tasks run, and whom they report to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Reporter(Protocol):
    """What a run tells while it goes on."""

    def run_started(self, name: str) -> None:
        """A run begins or is resumed."""

    def stage_started(self, stage: str) -> None:
        """A stage begins."""

    def stage_finished(self, stage: str, seconds: float, note: str = "") -> None:
        """A stage ended; ``note`` says so if nothing had to be done."""

    def progress(self, task: str, done: int, total: int | None) -> None:
        """``done`` of ``total`` (None if unknown) units of a task are finished."""

    def note(self, text: str) -> None:
        """Something worth knowing of what was done."""

    def warn(self, text: str) -> None:
        """Something the user should know; the run goes on."""


class Silent:
    """A reporter that says nothing."""

    def run_started(self, name: str) -> None:
        """Say nothing."""

    def stage_started(self, stage: str) -> None:
        """Say nothing."""

    def stage_finished(self, stage: str, seconds: float, note: str = "") -> None:
        """Say nothing."""

    def progress(self, task: str, done: int, total: int | None) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Say nothing."""


class Executor(Protocol):
    """Runs independent tasks; results come in the order of the items."""

    def map(self, task: Callable[[ItemT], ResultT], items: Iterable[ItemT]) -> Iterator[ResultT]:
        """Apply ``task`` to each item."""


class InProcess:
    """One task after the other, in this process."""

    def map(self, task: Callable[[ItemT], ResultT], items: Iterable[ItemT]) -> Iterator[ResultT]:
        """Apply ``task`` to each item, when its result is asked for."""
        return map(task, items)
