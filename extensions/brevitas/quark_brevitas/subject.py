"""What is exported: a copy of a module, how it is called, and what it answers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quark_brevitas.caches import switch_off
from quark_brevitas.portable import make_portable
from quark_core.batch import Batch, main_output
from quark_core.errors import ExportError
from quark_core.plan import Plan

_TRACED = 2
"""Samples to trace with: of 1, models and torch.export make a case of its own."""


@dataclass(frozen=True)
class Call:
    """How a model is called.

    Attributes:
        batch: The arguments, one sample where samples can be told apart.
        names: Names of the tensors given by keyword, in order, after those by position.
        example: The whole batch the sample was taken from, None where inputs do not agree on a
            number of samples.
    """

    batch: Batch
    names: tuple[str, ...]
    example: Batch | None = None

    @classmethod
    def of(cls, example: Batch | None, name: str) -> Call:
        """The first sample of a batch, for the export called ``name``.

        Raises:
            ExportError: There is no batch, or it holds nested arguments.
        """
        where = f"export {name}"
        if example is None:
            raise ExportError(
                f"{name} needs an example batch",
                where=where,
                fix="Give data.calibration, and quantize anew if the model was loaded",
            )
        nested = (dict, list, tuple)
        given = example.kwargs.values()
        by_position = all(isinstance(value, Tensor) for value in example.args)
        if not by_position or any(isinstance(value, nested) for value in given):
            raise ExportError(
                f"{name} holds models that are called with tensors",
                where=where,
                fix="Wrap the model so that its inputs are tensors, or use checkpoint",
            )
        names = tuple(key for key, value in example.kwargs.items() if isinstance(value, Tensor))
        sizes = {len(leaf) if leaf.ndim else 0 for leaf in example.tensors()}
        samples = example if len(sizes) == 1 and sizes != {0} else None
        return cls(example.first(), names, samples)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All tensors, those by keyword last."""
        return (*self.batch.args, *(self.batch.kwargs[name] for name in self.names))

    def input_names(self, module: nn.Module) -> list[str]:
        """A name for each of :attr:`inputs`: the arguments of the model's forward."""
        count = len(self.batch.args)
        known = [
            name
            for name, parameter in inspect.signature(module.forward).parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        numbered = [f"input_{at}" for at in range(count)]
        return [*(known[:count] if len(known) >= count else numbered), *self.names]

    def samples(self, count: int) -> Call:
        """The same call with so many samples, the example's over and over.

        Raises:
            ValueError: Inputs do not agree on a number of samples.
        """
        if self.example is None:
            raise ValueError("inputs do not agree on a number of samples")
        indices = torch.arange(count) % len(self.example)
        return replace(self, batch=self.example.map(lambda tensor: tensor[indices]))

    def run(self, module: nn.Module) -> Tensor:
        """The module's main output."""
        return main_output(self.batch.run(module))

    def positional(self, module: nn.Module) -> nn.Module:
        """The module, called with tensors by position and with one tensor as its output."""
        if not self.batch.kwargs and isinstance(self.batch.run(module), Tensor):
            return module
        return Positional(module, len(self.batch.args), self.names, self.batch.kwargs)


class Positional(nn.Module):
    """Calls a module by keyword, and returns its main output."""

    def __init__(
        self, module: nn.Module, count: int, names: tuple[str, ...], given: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.module, self._count, self._names = module, count, names
        self._constants = {key: value for key, value in given.items() if key not in names}

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the module."""
        named = dict(zip(self._names, inputs[self._count :], strict=True))
        return main_output(self.module(*inputs[: self._count], **named, **self._constants))


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        name: The form.
        module: A copy of the quantized module, in eval mode on the CPU.
        plan: What was carried out.
        call: How it is called.
        expected: What it answers.
        tokenizer: Where the tokenizer comes from that a file may want.
        names: Of the modules in the last copy, by what identifies them.
    """

    name: str
    module: nn.Module
    plan: Plan
    call: Call
    expected: Tensor
    tokenizer: str | None = None
    names: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, name: str, module: nn.Module, plan: Plan, example: Batch | None, tokenizer: str | None
    ) -> Subject:
        """Copy a module, which stays as it is, and run it once.

        Raises:
            ExportError: It cannot be called so.
        """
        call = Call.of(example, name)
        own = copy.deepcopy(module).eval().cpu()
        switch_off(own)
        moved = call.example.beside(own) if call.example is not None else None
        call = replace(call, batch=call.batch.beside(own), example=moved)
        expected = call.run(own)
        make_portable(own)
        return cls(name, own, plan, call, expected, tokenizer)

    @property
    def rounds(self) -> bool:
        """Whether the module computes in fewer digits than float32."""
        half = (torch.bfloat16, torch.float16)
        return any(parameter.dtype in half for parameter in self.module.parameters())

    def traced(self, batched: bool) -> Call:
        """The call to trace, for a file that takes any number of samples or just the one."""
        return self.call.samples(_TRACED) if batched else self.call

    def copy(self) -> nn.Module:
        """A copy for an exporter, which may leave anything in it."""
        made = copy.deepcopy(self.module)
        self.names.clear()
        self.names.update({id(vars(part)): name for name, part in made.named_modules()})
        return made

    def name_of(self, part: nn.Module) -> str:
        """The name of a module of the last copy, or nothing."""
        # torch.export runs stand-ins, which share the contents of what they stand for.
        return self.names.get(id(vars(part)), "")
