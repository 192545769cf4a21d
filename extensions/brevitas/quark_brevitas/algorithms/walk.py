"""Walk: runs a model up to one set of layers after the other, as often as there are batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from quark_brevitas.algorithms.columns import plain
from quark_core.batch import Batch

Look = Callable[[Tensor], None]
"""Told what a layer receives."""


class _SeenAllError(Exception):
    """The layers looked for have been called; the rest of the model need not run."""


@dataclass
class Step:
    """Layers that receive the same tensor, and so can be dealt with together.

    Attributes:
        layers: Their names, in the order they are called.
        block: How many blocks are finished when they are called.
    """

    layers: list[str]
    block: int = 0


@dataclass
class _Stream:
    """Outputs of the last finished block, by batch, so that earlier blocks need not run again.

    Attributes:
        done: How many blocks need not run.
        outputs: What the last of them returned.
        fresh: The same for a block that has just been finished.
    """

    done: int = 0
    outputs: dict[int, Any] = field(default_factory=dict)
    fresh: dict[int, Any] = field(default_factory=dict)


class Walk:
    """The steps of a model in the order of execution, and a way to run up to each.

    Where the model is a stack of equal blocks, those before a step are not run again: the output
    of the last is kept for each batch. What the model computes around its blocks (masks,
    position embeddings) runs each time, so nothing is assumed about it.

    Args:
        model: The model; called with batches.
        layers: The layers looked for, by name.
        keys: What layers must share, besides their input, to be one step.
        example: One batch to find the order with.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        keys: Mapping[str, object],
        example: Batch,
    ) -> None:
        self._model, self._layers = model, layers
        calls, blocks = _watch(model, layers, example)
        self._blocks = _stack(blocks, layers)
        self.steps = _steps(calls, keys, self._blocks)
        self._streams: dict[str, _Stream] = {}

    def run(self, step: Step, batch: Batch, index: int, stream: str, look: Look) -> None:
        """Run one batch up to a step; ``look`` sees the tensor its layers receive.

        Steps must be run in order, and each with every batch, for one stream of values.
        """
        state = self._streams.setdefault(stream, _Stream())
        seen: set[str] = set()

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            state.fresh[index] = output

        with ExitStack() as stack:
            for block in self._blocks[: state.done]:
                stack.enter_context(_replaced(block, state.outputs[index]))
            if step.block > state.done:
                last = self._blocks[step.block - 1]
                stack.callback(last.register_forward_hook(keep).remove)
            for name in step.layers:
                hook = _seen(name, step, seen, look)
                stack.callback(self._layers[name].register_forward_pre_hook(hook).remove)
            stack.enter_context(suppress(_SeenAllError))
            batch.run(self._model)

    def finish(self, step: Step) -> None:
        """Every batch has been run up to a step, and its layers have their final weights."""
        for state in self._streams.values():
            if state.fresh and step.block > state.done:
                state.done, state.outputs, state.fresh = step.block, state.fresh, {}


def _seen(name: str, step: Step, seen: set[str], look: Look) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if not seen:
            look(plain(args[0]))
        seen.add(name)
        if len(seen) == len(step.layers):
            raise _SeenAllError

    return hook


@contextmanager
def _replaced(block: nn.Module, output: Any) -> Iterator[None]:
    """For a while, a block returns what it is known to return."""
    block.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        del block.forward


@dataclass
class _Call:
    layer: str
    received: Tensor
    finished: list[nn.Module]


def _watch(
    model: nn.Module, layers: Mapping[str, nn.Module], example: Batch
) -> tuple[list[_Call], list[list[nn.Module]]]:
    """First calls of layers in order, and lists of equal modules that are called one by one."""
    stacks = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 1
        and len({type(child) for child in module}) == 1
    ]
    calls: list[_Call] = []
    finished: list[nn.Module] = []
    known: set[str] = set()

    def called(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in known:
                known.add(name)
                # Kept alive, so that no other tensor gets its memory.
                calls.append(_Call(name, plain(args[0]), list(finished)))

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(called(name)).remove)
        for block in (block for blocks in stacks for block in blocks):
            handle = block.register_forward_hook(
                lambda module, _args, _output: finished.append(module)
            )
            stack.callback(handle.remove)
        example.run(model)
    order = {id(module): finished.index(module) for module in finished}
    in_turn = [
        blocks
        for blocks in stacks
        if all(sum(module is block for module in finished) == 1 for block in blocks)
        and sorted(blocks, key=lambda block: order[id(block)]) == blocks
    ]
    return calls, in_turn


def _stack(stacks: list[list[nn.Module]], layers: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The list of blocks with the most of the layers in it."""
    wanted = {id(layer) for layer in layers.values()}

    def inside(blocks: list[nn.Module]) -> int:
        return sum(id(module) in wanted for block in blocks for module in block.modules())

    best = max(stacks, key=inside, default=[])
    return best if best and inside(best) else []


def _steps(calls: list[_Call], keys: Mapping[str, object], blocks: list[nn.Module]) -> list[Step]:
    found: dict[object, Step] = {}
    for call in calls:
        tensor = call.received
        key = (tensor.data_ptr(), tensor._version, tuple(tensor.shape), keys[call.layer])
        count = sum(any(module is block for module in call.finished) for block in blocks)
        step = found.setdefault(key, Step([], count))
        step.layers.append(call.layer)
    return list(found.values())
