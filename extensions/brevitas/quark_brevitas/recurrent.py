"""LSTM, GRU and RNN taken apart into Linear layers, one for inputs and one for states a direction.

torch's classes multiply by their weights in one call, where neither quantizers nor rules nor
algorithms can reach them. Brevitas's own QuantLSTM and QuantRNN give the weights of inputs and
states one scale, know no groups and no GRU, are no layers to its algorithms, fail without biases
and mistake a state that they are given; layers of its QuantLinear do all of that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from quark_brevitas.apart import take_apart
from quark_brevitas.wrappers import inner

State = tuple[Tensor, ...]
"""What one step hands to the next, each [batch, hidden]: the output first, then an LSTM's cell."""


class Direction(nn.Module):
    """One layer of a recurrent module, in one direction.

    Args:
        whole: The module whose weights it takes over.
        suffix: How their names end, such as ``_l0`` or ``_l0_reverse``.
    """

    def __init__(self, whole: nn.RNNBase, suffix: str) -> None:
        super().__init__()
        self.input = _linear(whole, f"weight_ih{suffix}", f"bias_ih{suffix}")
        self.hidden = _linear(whole, f"weight_hh{suffix}", f"bias_hh{suffix}")
        self.backwards = suffix.endswith("_reverse")
        self.projection = _linear(whole, f"weight_hr{suffix}", "") if whole.proj_size else None

    def forward(
        self,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        step: Callable[[Tensor, Tensor, State], State],
    ) -> tuple[Tensor, State]:
        """Run over a sequence.

        Args:
            x: [steps, batch, features].
            state: What the first step receives.
            lengths: Of each sequence [batch], where they differ; the rest of ``x`` is padding.
            step: From products of input and state, and the state, to the next state.

        Returns:
            Outputs [steps, batch, outputs], and the last state.
        """
        given = self.input(x).unbind(0)
        order = range(len(given))
        outputs = []
        for at in reversed(order) if self.backwards else order:
            found = step(given[at], self.hidden(state[0]), state)
            if self.projection is not None:
                found = (self.projection(found[0]), *found[1:])
            if lengths is not None:
                within = (at < lengths)[:, None]
                pairs = zip(found, state, strict=True)
                found = tuple(torch.where(within, new, old) for new, old in pairs)
            outputs.append(found[0])
            state = found
        if self.backwards:
            outputs.reverse()
        return torch.stack(outputs), state


class SplitRecurrent(nn.Module):
    """Computes what a recurrent module does, by Linear layers of its own.

    Args:
        whole: The LSTM, GRU or RNN whose weights it takes over.
    """

    def __init__(self, whole: nn.RNNBase) -> None:
        super().__init__()
        self.input_size, self.hidden_size = whole.input_size, whole.hidden_size
        self.num_layers, self.bidirectional = whole.num_layers, whole.bidirectional
        self.batch_first, self.dropout = whole.batch_first, whole.dropout
        self.proj_size = whole.proj_size
        self._step = _STEPS[whole.mode]
        ends = ("", "_reverse") if whole.bidirectional else ("",)
        self._names = [f"l{layer}{end}" for layer in range(whole.num_layers) for end in ends]
        for name in self._names:
            self.add_module(name, Direction(whole, f"_{name}"))
        self.train(whole.training)

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """As the module it stands for: outputs, and the last states of all layers."""
        packed = input if isinstance(input, PackedSequence) else None
        lengths = None
        if packed is not None:
            input, lengths = pad_packed_sequence(packed)
            lengths = lengths.to(input.device)
            # Unpacking has undone the order of lengths, and packing below restores it.
        elif self.batch_first and input.ndim == _BATCHED:
            input = input.transpose(0, 1)
        flat = input.ndim < _BATCHED
        x = input.unsqueeze(1) if flat else input
        given = self._first(x, hx, flat=flat)
        last: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            names = self._names[len(last) :][: 1 + self.bidirectional]
            for name in names:
                direction: Any = self.get_submodule(name)
                begin = tuple(part[len(last)] for part in given)
                output, state = direction(x, begin, lengths, self._step)
                outputs.append(output)
                last.append(state)
            x = torch.cat(outputs, -1)
            if layer + 1 < self.num_layers:
                x = dropout(x, self.dropout, self.training)
        return self._given_back(x, last, packed, lengths, flat=flat)

    def _first(self, x: Tensor, hx: Any, *, flat: bool) -> State:
        """The states of all layers before the first step, [layers, batch, hidden]."""
        if hx is None:
            cell = [self.hidden_size] if self._step is _lstm else []
            widths = [self.proj_size or self.hidden_size, *cell]
            return tuple(x.new_zeros(len(self._names), x.shape[1], width) for width in widths)
        parts = hx if isinstance(hx, tuple | list) else (hx,)
        return tuple(part.unsqueeze(1) if flat else part for part in parts)

    def _given_back(
        self,
        x: Tensor,
        last: list[State],
        packed: PackedSequence | None,
        lengths: Tensor | None,
        *,
        flat: bool,
    ) -> tuple[Any, Any]:
        states = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        outputs: Any = x
        if flat:
            outputs, states = x.squeeze(1), tuple(state.squeeze(1) for state in states)
        elif packed is not None:
            assert lengths is not None
            ordered = packed.sorted_indices is None
            outputs = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=ordered)
        elif self.batch_first:
            outputs = x.transpose(0, 1)
        return outputs, states if self._step is _lstm else states[0]


class LSTM(SplitRecurrent):
    """A long short-term memory."""


class GRU(SplitRecurrent):
    """A gated recurrent unit."""


class RNN(SplitRecurrent):
    """An Elman network."""


def can_split(module: nn.Module) -> bool:
    """Whether a module is one of torch's three."""
    return type(module) in _CLASSES


def split_all(model: nn.Module, wanted: Collection[str] | None = None) -> list[str]:
    """Take the recurrent modules within a model apart, in place.

    Args:
        model: Changed in place.
        wanted: Names of layers; a module that none of them would come of stays whole, and fast.
            None is all.

    Returns:
        The names of the layers that came of it.
    """

    def make(name: str, module: Any) -> nn.Module | None:
        inside = wanted is None or any(layer.startswith(f"{name}.") for layer in wanted)
        return _CLASSES[type(module)](module) if can_split(module) and inside else None

    return take_apart(model, make)


@contextmanager
def observed_whole(model: nn.Module) -> Iterator[None]:
    """Let quantizers of states observe a sequence at once, for as long as they do not quantize.

    Brevitas averages ranges over what it is shown: step by step, the zeros before the first one
    and the small states after it would count as much as the largest.
    """
    with ExitStack() as stack:
        for direction in model.modules():
            if isinstance(direction, Direction):
                for layer in filter(None, (direction.hidden, direction.projection)):
                    quantizer = getattr(inner(layer), "input_quant", None)
                    if quantizer is not None:
                        stack.enter_context(_gathered(direction, quantizer))
        yield


@contextmanager
def _gathered(direction: nn.Module, quantizer: Any) -> Iterator[None]:
    kept: list[Tensor] = []
    observe = quantizer.forward

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    def show(*_: Any) -> None:
        observe(torch.cat(kept))
        kept.clear()

    quantizer.forward = keep
    handle = direction.register_forward_hook(show)
    try:
        yield
    finally:
        handle.remove()
        del quantizer.forward


def _linear(whole: nn.RNNBase, weight: str, bias: str) -> nn.Linear:
    values = whole.get_parameter(weight)
    outputs, inputs = values.shape
    found = nn.Linear(inputs, outputs, bias=whole.bias and bool(bias), device="meta")
    found.weight = values
    if found.bias is not None:
        found.bias = whole.get_parameter(bias)
    return found


def _lstm(given: Tensor, hidden: Tensor, state: State) -> State:
    enter, keep, new, out = (given + hidden).chunk(4, -1)
    cell = keep.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return out.sigmoid() * cell.tanh(), cell


def _gru(given: Tensor, hidden: Tensor, state: State) -> State:
    reset, keep, new = given.chunk(3, -1)
    old_reset, old_keep, old_new = hidden.chunk(3, -1)
    kept = (keep + old_keep).sigmoid()
    found = (new + (reset + old_reset).sigmoid() * old_new).tanh()
    return (found + kept * (state[0] - found),)


def _tanh(given: Tensor, hidden: Tensor, _state: State) -> State:
    return ((given + hidden).tanh(),)


def _relu(given: Tensor, hidden: Tensor, _state: State) -> State:
    return ((given + hidden).relu(),)


_BATCHED = 3
_CLASSES: Mapping[type, type[SplitRecurrent]] = {nn.LSTM: LSTM, nn.GRU: GRU, nn.RNN: RNN}
_STEPS = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _tanh, "RNN_RELU": _relu}
