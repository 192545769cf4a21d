"""Which layer an exporter failed on."""

from __future__ import annotations

import re
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from quark_brevitas.subject import Subject


def culprit(error: BaseException, subject: Subject) -> str:
    """The layer within which an error came up, by the plan's name where it has one, or nothing.

    That is the module running when it was raised; an operator that an exporter does not know is
    looked for in the modules' calls.
    """
    name = _running(error.__traceback__, subject)
    operator = re.search(r"aten::(\w+)", str(error))
    if not name and operator:
        name = _caller(subject, operator[1].rstrip("_"))
    known = name
    while known and known not in subject.plan:
        known = known.rpartition(".")[0]
    return known or name


def _running(trace: TracebackType | None, subject: Subject) -> str:
    """The innermost module of the copy whose method was on the stack."""
    found = ""
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found = subject.name_of(owner) or found
        trace = trace.tb_next
    return found


def _caller(subject: Subject, function: str) -> str:
    """The first module that calls one of torch's functions."""
    inside: list[str] = []
    found: list[str] = []

    class Look(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if getattr(func, "__name__", "").strip("_") == function and inside:
                found.append(inside[-1])
            return func(*args, **(kwargs or {}))

    def entering(name: str) -> Any:
        return lambda *_: inside.append(name)

    def leaving(*_: Any) -> None:
        inside.pop()

    module = subject.copy()
    with ExitStack() as stack:
        for name, part in module.named_modules():
            stack.callback(part.register_forward_pre_hook(entering(name)).remove)
            stack.callback(part.register_forward_hook(leaving).remove)
        stack.enter_context(Look())
        subject.call.run(module)
    return found[0] if found else ""
