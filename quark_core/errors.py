"""One tree of errors: each says what is wrong, where, why, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What the process status of ``quark`` means."""

    DONE = 0
    RUN_FAILED = 1
    USAGE = 2
    PLUGIN = 3
    NOTHING_MATCHED = 4
    ACCURACY_MISSED = 5
    ENVIRONMENT = 6
    INTERRUPTED = 130


class QuarkError(Exception):
    """Root of everything quark_core raises on purpose.

    Args:
        what: What is wrong, one sentence without a final full stop.
        where: The place: a recipe path and line, a layer, a plugin with its distribution.
        cause: The underlying reason, when another component gave one.
        fix: What to do about it.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.RUN_FAILED

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        cause: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.cause = cause
        self.fix = fix

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.cause:
            text += f" ({self.cause})"
        if self.fix:
            text += f". {self.fix}"
        return text if text.endswith((".", "!", "?")) else text + "."


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration.

    Attributes:
        path: Where, as the user writes it: ``quantizer.rules[2].weight.format``.
        message: What is wrong and what would be accepted.
        file: The recipe file, when there is one.
        line: Line in that file, counted from 1.
    """

    path: str
    message: str
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        return " ".join(
            part for part in (place and f"{place}:", f"{self.path}:", self.message) if part
        )


class ConfigError(QuarkError):
    """A recipe or configuration is wrong; carries every problem found, not only the first."""

    exit_code = ExitCode.USAGE

    def __init__(self, problems: Sequence[Problem], *, fix: str | None = None) -> None:
        count = len(problems)
        heading = "1 problem" if count == 1 else f"{count} problems"
        super().__init__(f"the configuration has {heading}", fix=fix)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            text = str(self.problems[0])
        else:
            text = "\n".join([self.what + ":", *(f"  {problem}" for problem in self.problems)])
        return f"{text}\n{self.fix}" if self.fix else text


class UnsupportedSpecError(ConfigError):
    """The chosen backend cannot do a combination of format, granularity and mode."""


class UnknownNameError(QuarkError):
    """A quantizer, source, metric or exporter was named that nobody provides."""

    exit_code = ExitCode.USAGE


class UntrustedContentError(QuarkError):
    """A file or recipe asks for code to be run that was not allowed to run."""

    exit_code = ExitCode.USAGE


class UnmatchedRuleError(QuarkError):
    """A rule of the configuration matched no layer."""

    exit_code = ExitCode.NOTHING_MATCHED


class PluginError(QuarkError):
    """A plugin failed, clashes, is blocked or speaks another API version."""

    exit_code = ExitCode.PLUGIN


class MissingDependencyError(QuarkError):
    """Something that is not installed is needed, or is installed in a wrong version."""

    exit_code = ExitCode.ENVIRONMENT


class DataError(QuarkError):
    """Model or data could not be loaded, or do not fit each other."""


class QuantizationError(QuarkError):
    """A backend failed, or did not do what its plan promised."""


class ExportError(QuarkError):
    """A quantized model cannot be written in the wanted form."""


class AccuracyGateError(QuarkError):
    """A metric missed what ``evaluate.require`` asks for."""

    exit_code = ExitCode.ACCURACY_MISSED


class RunFolderError(QuarkError):
    """A run folder is locked, damaged, or belongs to another recipe."""

    exit_code = ExitCode.ENVIRONMENT


def near_misses(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like ``name``, best first; case is ignored."""
    folded = {candidate.casefold(): candidate for candidate in known}
    return [
        folded[match] for match in get_close_matches(name.casefold(), folded, n=count, cutoff=0.6)
    ]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``Did you mean 'x'?`` for near misses of ``name``, or an empty string."""
    near = near_misses(name, known)
    if not near:
        return ""
    return "Did you mean " + " or ".join(repr(candidate) for candidate in near) + "?"
