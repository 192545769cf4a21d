"""Learned rounding block by block (Li et al. 2021, BRECQ, arXiv 2102.05426).

All layers of a block learn together, so that the block, on the inputs it gets in the quantized
model, returns what the float block returns on float inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from quark_brevitas.algorithms.choices import Choice, fit
from quark_brevitas.algorithms.columns import plain
from quark_brevitas.algorithms.kept import Kept
from quark_brevitas.algorithms.rounding import FloatMode
from quark_brevitas.caches import without_cache
from quark_brevitas.options import LearnedRound
from quark_brevitas.preparation import keep_float_weights
from quark_core.batch import Batch, main_output
from quark_core.errors import QuantizationError
from quark_core.partial import Partial
from quark_core.plan import PlanEntry

_IMAGES = 4
"""Axes of [batch, channels, height, width]."""


class _LeftError(Exception):
    """The block has been called; the rest of the model need not run."""


class BlockLearning:
    """Learned rounding over the blocks of a prepared model.

    Args:
        model: Brevitas's model, its ranges calibrated.
        layers: Layers by their name in the plan; those outside of blocks keep nearest codes.
        entries: Their entries.
        options: How to learn; ``blocks`` names the module that holds the blocks.
        seed: Of the batches that are drawn.
        partial: Where finished blocks are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Any],
        entries: Mapping[str, PlanEntry],
        options: LearnedRound,
        seed: int,
        partial: Partial,
    ) -> None:
        assert options.blocks is not None
        self._model, self._entries, self._options, self._seed = model, entries, options, seed
        self._kept = Kept(partial, f"{options.name}/{options.blocks}", scales=options.learn_scale)
        self._blocks = []
        for block in model.get_submodule(options.blocks).children():
            inside = {id(module) for module in block.modules()}
            found = {name: layer for name, layer in layers.items() if id(layer) in inside}
            if found:
                self._blocks.append((block, found))
        keep_float_weights(layers)
        self._float = FloatMode(model)
        self._block: nn.Module | None = None
        self._received: list[Batch] = []
        self._wanted: list[Tensor] = []

    def passes(self) -> Iterator[str]:
        """One pass over the data a block, then its layers learn."""
        with without_cache(self._model):
            for count, (block, layers) in enumerate(self._blocks, start=1):
                if not self._kept.read(count, layers):
                    self._block, self._received, self._wanted = block, [], []
                    yield f"{self._options.name} block {count}/{len(self._blocks)}"
                    self._learn(count, block, layers)
                    self._kept.write(count, layers)

    def feed(self, batch: Batch) -> None:
        """Keep what the block receives, and what the float one returns."""
        assert self._block is not None
        handle = self._block.register_forward_pre_hook(self._receive, with_kwargs=True)
        self._run(batch, handle)
        handle = self._block.register_forward_hook(self._want)
        with self._float:
            self._run(batch, handle)

    def _run(self, batch: Batch, handle: Any) -> None:
        try:
            batch.run(self._model)
        except _LeftError:
            return
        finally:
            handle.remove()
        raise QuantizationError(
            "the model does not call the block",
            where=f"algorithm.blocks: {self._options.blocks}",
            fix="Name a module whose children are called one after the other, or leave blocks out",
        )

    def _receive(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._received.append(_copy(Batch(args, kwargs)))
        raise _LeftError

    def _want(self, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._wanted.append(main_output(output).detach().clone())
        raise _LeftError

    def _learn(self, count: int, block: nn.Module, layers: Mapping[str, Any]) -> None:
        choices = {name: self._choice(name, layer) for name, layer in layers.items()}
        generator = torch.Generator().manual_seed(self._seed + crc32(f"block {count}".encode()))
        drawn = torch.randint(
            len(self._received), (self._options.iterations,), generator=generator
        ).tolist()

        def error(at: int) -> Tensor:
            out = main_output(_copy(self._received[at]).run(block))
            channels = 1 if out.ndim == _IMAGES else -1
            return (out - self._wanted[at]).square().sum(channels).mean()

        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.enter_context(_computing(layer, choices[name]))
            fit(list(choices.values()), error, drawn, self._options)
        for choice in choices.values():
            choice.settle()

    def _choice(self, name: str, layer: Any) -> Choice:
        spec = self._entries[name].weight
        assert spec is not None
        return Choice(layer, spec, self._options)


def _copy(batch: Batch) -> Batch:
    """The same values in tensors of their own, which a block may change in place."""
    return batch.map(lambda tensor: tensor.detach().clone())


@contextmanager
def _computing(layer: Any, choice: Choice) -> Iterator[None]:
    """For a while, a layer computes with a weight that is being learned."""

    def forward(x: Any) -> Tensor:
        value = plain(layer.input_quant(x))
        out: Tensor = layer.inner_forward_impl(value, choice.weight().to(value.dtype), layer.bias)
        return out

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
