"""Files in Brevitas's export formats, each proven by running it before it is kept."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from quark_brevitas import gguf_file, onnx_file, programs
from quark_brevitas.attention import OP as ATTENTION
from quark_brevitas.blame import culprit
from quark_brevitas.preparation import quiet
from quark_brevitas.subject import Call, Subject
from quark_core.batch import Batch
from quark_core.errors import ExportError, MissingDependencyError, QuarkError
from quark_core.export import report_file
from quark_core.plan import Plan

_ENOUGH = 60.0
"""dB by which a file's output must equal the module's; sums in another order give 100 or more."""
_HALF_PRECISION = 45.0
"""The same where scales are stored as float16, whose rounding alone leaves 60 to 70 dB."""
_PERFECT = 300.0
_IN_FULL = "Load the model in float32 before it is quantized: in half precision each sum is rounded"
_WIDEST = 8
_SAMPLES = 3
"""With so many samples a file is run that should take any number of them."""


def export(
    name: str,
    module: nn.Module,
    plan: Plan,
    example: Batch | None,
    path: Path,
    tokenizer: str | None = None,
) -> Path:
    """Write a quantized module, run the file, and compare.

    Files take any number of samples where the model does; what was found of that lies in a report
    beside the file, with the measured signal to noise.

    Args:
        name: ``onnx_qcdq``, ``qonnx``, ``torch_qcdq``, ``pt2`` or ``gguf``.
        module: Brevitas's module; stays as it is.
        plan: What was carried out.
        example: One batch to trace and compare with.
        path: Where to write, without an ending.
        tokenizer: Where a file with a vocabulary takes it from.

    Raises:
        ExportError: The form cannot hold the model, there is no example, or the file computes
            something else than the module; nothing is left behind.
        MissingDependencyError: A package that writes or runs the file is missing.
    """
    form = _FORMS[name]
    _require(*form.packages)
    require_fitting(name, plan, module)
    target = path.with_name(path.name + form.suffix)
    with (
        TemporaryDirectory(dir=path.parent, prefix=f".{name}-") as folder,
        torch.no_grad(),
        quiet(),
        _quiet_tracer(),
    ):
        # Whatever else an exporter writes beside its file goes with this folder.
        written = Path(folder) / target.name
        subject = Subject.of(name, module, plan, example, tokenizer)
        facts, metrics = _proven(form, subject, written)
        about = {"title": name, "metrics": metrics, "facts": facts}
        report = report_file(written)
        report.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        os.replace(report, report_file(target))
        os.replace(written, target)
    return target


def _proven(form: _Form, subject: Subject, path: Path) -> tuple[dict[str, str], dict[str, float]]:
    """Write the file, for any number of samples if that works, and say what it is worth."""
    facts: dict[str, str] = {}
    metrics: dict[str, float] = {}
    if form.batched:
        count = len(subject.call.batch)
        try:
            metrics = _attempt(form, subject, path, batched=True)
            facts["samples"] = f"any number: run with {count} and {_SAMPLES}"
        except Exception as error:  # noqa: BLE001 (the exporters' own, and the model's)
            facts["samples"] = f"{count} only: {_short(error)}"
            path.unlink(missing_ok=True)
    if not metrics:
        try:
            metrics = _attempt(form, subject, path, batched=False)
        except QuarkError:
            raise
        except Exception as error:
            raise _refusal(error, subject) from error
    facts["signal to noise against the module"] = f"{metrics['sqnr_db']:.1f} dB"
    if metrics.get("fused_sqnr_db", _PERFECT) < _ENOUGH:
        facts["with onnxruntime's fused integer kernels"] = (
            f"{metrics['fused_sqnr_db']:.1f} dB on this processor; the session option "
            "session.disable_quant_qdq: 1 gives the module's own numbers"
        )
    return facts, metrics


def _attempt(form: _Form, subject: Subject, path: Path, *, batched: bool) -> dict[str, float]:
    """Write the file and run it.

    Raises:
        ExportError: It computes something else than the module.
        Exception: Whatever exporters raise.
    """
    more = subject.call.samples(_SAMPLES) if batched else None
    expected = more.run(subject.module) if more is not None else None
    form.write(subject, path, batched)
    found = form.run(subject, path, subject.call)
    metrics = {key: round(_sqnr(subject.expected, value), 1) for key, value in found.items()}
    _require_equal(metrics["sqnr_db"], form.floor, subject)
    if more is not None and expected is not None:
        again = form.run(subject, path, more)["sqnr_db"]
        _require_equal(round(_sqnr(expected, again), 1), form.floor, subject)
    return metrics


def _require_equal(measured: float, floor: float, subject: Subject) -> None:
    if measured >= floor:
        return
    fix = "Use checkpoint, or another of the backend's forms"
    if subject.rounds:
        fix = _IN_FULL
    halves = [
        entry.name
        for entry in subject.plan.quantized
        if (spec := entry.input) is not None and spec.scale == "power_of_two" and not spec.symmetric
    ]
    if halves and subject.name == "onnx_qcdq":
        fix = (
            "Write input: int8/sym/power_of_two, or use qonnx or torch_qcdq: ONNX adds zero points "
            "after rounding, Brevitas before, and halves, common with such scales, differ"
        )
    raise ExportError(
        f"the {subject.name} file computes something else than the module",
        where=f"export {subject.name}",
        cause=f"signal to noise {measured} dB, at least {floor:g} wanted",
        fix=fix,
    )


def _refusal(error: Exception, subject: Subject) -> ExportError:
    layer = culprit(error, subject)
    fix = "Use checkpoint, or change what the model's forward does there"
    if subject.rounds:
        fix = _IN_FULL
    elif subject.name != "pt2":
        fix = fix.replace("Use", "Use pt2 or")
    return ExportError(
        f"{subject.name} cannot hold the model",
        where=f"export {subject.name}" + (f", layer {layer!r}" if layer else ""),
        cause=_short(error),
        fix=fix,
    )


def _short(error: Exception) -> str:
    """The first sentence of an error, for another sentence to end with."""
    if isinstance(error, QuarkError):
        return f"{error.what}, {error.cause}" if error.cause else error.what
    lines = str(error).strip().splitlines()
    first = lines[0].partition(". ")[0][:160].rstrip(". ") if lines else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def require_fitting(name: str, plan: Plan, model: nn.Module) -> None:
    """Refuse plans whose formats a form has no place for.

    Args:
        name: The form; those that are not Brevitas's own hold anything.
        plan: What is planned, or was carried out.
        model: The float model, or the quantized one.

    Raises:
        ExportError: Names the tensor, the reason and what would be held.
    """
    if name == "gguf":
        gguf_file.require_fitting(model, plan)
    elif name in _FORMS and _FORMS[name].qcdq:
        _require_static_integers(name, plan)


def _require_static_integers(name: str, plan: Plan) -> None:
    for entry in plan.quantized:
        for role, spec in entry.specs.items():
            fmt, problem = spec.number_format, ""
            if fmt.family != "integer":
                problem = f"{fmt.name}: it holds integers only"
            elif spec.dynamic:
                problem = "a dynamic scale: it holds static ones only"
            elif spec.granularity is not None and spec.granularity.kind == "group":
                problem = "groups: it holds one scale a tensor or channel"
            elif role != "bias" and fmt.bits > _WIDEST:
                problem = f"{fmt.bits} bits: it holds at most {_WIDEST}"
            if problem:
                part = "" if entry.op == ATTENTION else f".{role}"
                raise ExportError(
                    f"{name} cannot hold {problem}",
                    where=f"export {name}, tensor {entry.name}{part}",
                    fix="Use pt2, checkpoint or encodings, or int8 specs",
                )


def _write_gguf(subject: Subject, path: Path, _batched: bool) -> None:
    gguf_file.write(subject.module, subject.plan, path, subject.tokenizer)


def _run_gguf(subject: Subject, path: Path, call: Call) -> dict[str, Tensor]:
    return {"sqnr_db": call.run(gguf_file.read(path, subject.module))}


@dataclass(frozen=True)
class _Form:
    """One form of file.

    Attributes:
        write: Writes the file, for any number of samples if told so.
        run: What the file computes for a call, by metric.
        suffix: Of the file.
        packages: What writing and running it needs.
        qcdq: Whether it holds integers of static scales only.
        batched: Whether it has a number of samples at all.
        floor: dB of signal to noise it must reach.
    """

    write: Callable[[Subject, Path, bool], None]
    run: Callable[[Subject, Path, Call], dict[str, Tensor]]
    suffix: str
    packages: tuple[str, ...] = ()
    qcdq: bool = True
    batched: bool = True
    floor: float = _ENOUGH


def _alone(run: Callable[[Path, Call], dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """A way to run files that need nothing but themselves."""
    return lambda _subject, path, call: run(path, call)


_FORMS: dict[str, _Form] = {
    "onnx_qcdq": _Form(
        onnx_file.write_qcdq,
        _alone(onnx_file.run_qcdq),
        ".onnx",
        ("onnx", "onnxruntime", "onnxoptimizer"),
    ),
    "qonnx": _Form(
        onnx_file.write_qonnx, _alone(onnx_file.run_qonnx), ".onnx", ("onnx", "onnxoptimizer")
    ),
    "torch_qcdq": _Form(programs.write_torchscript, _alone(programs.run_torchscript), ".pt"),
    "pt2": _Form(programs.write_program, _alone(programs.run_program), ".pt2", qcdq=False),
    "gguf": _Form(
        _write_gguf,
        _run_gguf,
        ".gguf",
        ("gguf",),
        qcdq=False,
        batched=False,
        floor=_HALF_PRECISION,
    ),
}


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"the export needs {', '.join(missing)}",
            where="export",
            fix=f"Run: pip install {' '.join(missing)}",
        )


def _sqnr(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return -_PERFECT
    # Masked logits may be infinite in both.
    same = expected == found
    noise = (expected - found).masked_fill(same, 0).double().square().sum()
    if noise == 0:
        return _PERFECT
    signal = expected.masked_fill(same & expected.isinf(), 0).double().square().sum()
    return float(10 * torch.log10(signal / noise))


@contextmanager
def _quiet_tracer() -> Iterator[None]:
    """Hold back the exporters' own progress lines, and the graph they print where they fail."""
    torch_c: Any = torch._C
    logger, log = logging.getLogger("torch.onnx"), torch_c._jit_onnx_log
    before = logger.level
    logger.setLevel(logging.ERROR)
    # torch's own switch for it is thrown back on by each export.
    torch_c._jit_onnx_log = lambda *_: None
    try:
        with warnings.catch_warnings():
            # Values taken for constants show when the file is run.
            warnings.simplefilter("ignore", TracerWarning)
            yield
    finally:
        logger.setLevel(before)
        torch_c._jit_onnx_log = log
