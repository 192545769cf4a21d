"""Walk: runs a model up to one set of layers after the other, as often as there are batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from quark_brevitas.algorithms.columns import input_of, is_finite, require_finite
from quark_core.batch import Batch

_KEPT_BYTES = 2**30
"""Most memory for outputs of finished layers; beyond it they run again instead."""


class _SeenError(Exception):
    """The layer looked for has been called; the rest of the model need not run."""


class _MadeUpError(Exception):
    """The layer looked for has received NaN that stood for the output of a block."""


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
    """What need not be computed again: outputs by batch.

    Attributes:
        done: How many blocks need not run.
        outputs: What the last of them returned.
        fresh: The same for a block that has just been finished.
        layers: Outputs of finished layers, by layer and batch.
    """

    done: int = 0
    outputs: dict[int, Any] = field(default_factory=dict)
    fresh: dict[int, Any] = field(default_factory=dict)
    layers: dict[str, dict[int, Tensor]] = field(default_factory=dict)


class Walk:
    """The steps of a model in the order of execution, and a way to run up to each.

    Where the model is a stack of equal blocks, those before a step are not run again: the output
    of the last is kept for each batch. Finished layers of the block under way are not run again
    either, as long as there is memory for their outputs. What the model computes around them
    (masks, position embeddings, attention) runs each time, so nothing is assumed about it but
    that the output of a block goes into the next and nowhere else. NaN stands for those outputs:
    where it turns up all the same, blocks run again from then on.

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
        self._once = {call.layer for call in calls if call.times == 1}
        self._block_of = {
            name: at
            for at, block in enumerate(self._blocks)
            for name, layer in layers.items()
            if any(module is layer for module in block.modules())
        }
        self._finished: set[str] = set()
        self._kept_bytes = 0

    def run(self, step: Step, batch: Batch, index: int, stream: str) -> list[Tensor]:
        """Run one batch up to a step.

        Steps must be run in order, and each with every batch, for one stream of values.

        Returns:
            What the layers of the step receive, once for each call: none where the batch does not
            reach them, several where a layer is called again, as a recurrent one is for each step
            of a sequence.

        Raises:
            QuantizationError: The layers receive values that are not finite.
        """
        try:
            return self._run(step, batch, index, stream)
        except _MadeUpError:
            self._spare_no_blocks()
            return self._run(step, batch, index, stream)

    def _run(self, step: Step, batch: Batch, index: int, stream: str) -> list[Tensor]:
        state = self._streams.setdefault(stream, _Stream())
        received: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            state.fresh[index] = _copy(output)

        with ExitStack() as stack:
            for at, block in enumerate(self._blocks[: state.done], start=1):
                output = state.outputs[index]
                known = output if at == state.done else _unknown(output)
                stack.enter_context(_replaced(block, known))
            if step.block > state.done:
                last = self._blocks[step.block - 1]
                stack.callback(last.register_forward_hook(keep).remove)
            self._spare_layers(state, index, stack)
            # The others of the step receive the same tensor.
            first = step.layers[0]
            hook = _seen(first, received, made_up=state.done > 1, once=first in self._once)
            stack.callback(self._layers[first].register_forward_pre_hook(hook).remove)
            stack.enter_context(suppress(_SeenError))
            batch.run(self._model)
        return received

    def _spare_no_blocks(self) -> None:
        self._blocks = []
        for step in self.steps:
            step.block = 0
        for state in self._streams.values():
            state.done, state.outputs, state.fresh = 0, {}, {}

    def finish(self, step: Step) -> None:
        """Every batch has been run up to a step, and its layers get their final weights now."""
        for state in self._streams.values():
            if state.fresh and step.block > state.done:
                state.done, state.outputs, state.fresh = step.block, state.fresh, {}
                for name in [name for name in state.layers if self._behind(name, state.done)]:
                    self._kept_bytes -= sum(map(_size, state.layers.pop(name).values()))
        self._finished.update(self._once.intersection(step.layers))

    def missed(self, layers: Iterable[str]) -> list[str]:
        """A sentence about the layers that are in no step, if there are any."""
        seen = {name for step in self.steps for name in step.layers}
        names = [name for name in layers if name not in seen]
        if not names:
            return []
        listed = ", ".join(names[:5]) + ("..." if len(names) > 5 else "")
        return [
            f"{len(names)} layer(s) keep nearest codes, as the first batch called none of "
            f"them: {listed}"
        ]

    def _behind(self, layer: str, done: int) -> bool:
        """Whether a layer is in a block that does not run again."""
        return self._block_of.get(layer, done) < done

    def _spare_layers(self, state: _Stream, index: int, stack: ExitStack) -> None:
        """Let finished layers return what they are known to return; keep it where it is not."""
        for name in self._finished:
            if self._behind(name, state.done):
                continue
            known = state.layers.setdefault(name, {})
            if index in known:
                stack.enter_context(_replaced(self._layers[name], known[index]))
            elif self._kept_bytes < _KEPT_BYTES:
                hook = partial(self._keep_output, known, index)
                stack.callback(self._layers[name].register_forward_hook(hook).remove)

    def _keep_output(
        self, known: dict[int, Tensor], index: int, _module: nn.Module, _args: Any, output: Any
    ) -> None:
        if type(output) is Tensor:
            known[index] = output.clone()
            self._kept_bytes += _size(output)


def same_rows(quantized: Tensor, wanted: Tensor | None) -> Tensor:
    """What a layer receives in the float model, if it belongs row by row to what it is given.

    Experts are handed other rows there: these are compared on the inputs they are given.
    """
    alike = wanted is not None and wanted.shape == quantized.shape
    return wanted if alike and wanted is not None else quantized


def _seen(name: str, received: list[Tensor], *, made_up: bool, once: bool) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        x = input_of(name, args)
        if made_up and not is_finite(x):
            raise _MadeUpError
        require_finite(name, x)
        received.append(x if once else x.clone())
        if once:
            raise _SeenError

    return hook


def _copy(output: Any) -> Any:
    """An output that may be changed in place without changing the one that is kept."""
    if type(output) is Tensor:
        return output.clone()
    return tuple(map(_copy, output)) if type(output) is tuple else output


def _unknown(output: Any) -> Any:
    """NaN in the shape of an output, in no memory: a block's that only the next one reads."""
    if type(output) is Tensor and output.is_floating_point():
        return output.new_full((1,) * output.ndim, float("nan")).expand_as(output)
    return tuple(map(_unknown, output)) if type(output) is tuple else output


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _replaced(block: nn.Module, output: Any) -> Iterator[None]:
    """For a while, a block returns what it is known to return."""

    # Brevitas's factors before a layer look for the name of its first argument.
    def known(input: Any = None, *_args: Any, **_kwargs: Any) -> Any:
        return _copy(output)

    block.forward = known
    try:
        yield
    finally:
        del block.forward


@dataclass
class _Call:
    layer: str
    received: Tensor
    finished: list[nn.Module]
    times: int = 1


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
    received: dict[int, list[Any]] = {}
    returned: dict[int, Any] = {}
    known: dict[str, _Call] = {}

    def called(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if name in known:
                known[name].times += 1
                return
            # Kept alive, so that no other tensor gets its memory.
            known[name] = _Call(name, input_of(name, args), list(finished))
            calls.append(known[name])

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(called(name)).remove)
        for block in (block for blocks in stacks for block in blocks):

            def left(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                finished.append(module)
                received[id(module)] = [*args, *kwargs.values()]
                returned[id(module)] = output[0] if type(output) is tuple else output

            handle = block.register_forward_hook(left, with_kwargs=True)
            stack.callback(handle.remove)
        example.run(model)
    order = {id(module): finished.index(module) for module in finished}
    in_turn = [
        blocks
        for blocks in stacks
        if all(sum(module is block for module in finished) == 1 for block in blocks)
        and sorted(blocks, key=lambda block: order[id(block)]) == blocks
        and all(
            any(value is returned[id(before)] for value in received[id(after)])
            for before, after in pairwise(blocks)
        )
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
        alone = "" if call.times == 1 else call.layer
        key = (tensor.data_ptr(), tensor._version, tuple(tensor.shape), keys[call.layer], alone)
        count = sum(any(module is block for module in call.finished) for block in blocks)
        step = found.setdefault(key, Step([], count))
        step.layers.append(call.layer)
    return list(found.values())
