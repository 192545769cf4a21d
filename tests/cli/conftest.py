"""Runs the command line in this process and hands back what it said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from quark_core.cli import main


@dataclass(frozen=True)
class Said:
    """Exit status and both outputs of one command."""

    status: int
    out: str
    err: str


Quark = Callable[..., Said]


@pytest.fixture
def quark(capsys: pytest.CaptureFixture[str]) -> Quark:
    """Call ``quark`` with arguments."""

    def call(*arguments: object) -> Said:
        with pytest.raises(SystemExit) as leave:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        status = leave.value.code
        assert isinstance(status, int)
        return Said(status, captured.out, captured.err)

    return call
