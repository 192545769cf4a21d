"""GraphRunner: a graph that is called like the model it came from."""

from __future__ import annotations

import copy
import zlib
from typing import Any, Self

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from quark_core.batch import Batch
from quark_core.errors import QuantizationError
from quark_pt2e.graph.encodings import Place, owner_of, quantized_output


class GraphRunner(nn.Module):
    """Runs a graph on batches of any size, and lets layers be listened to.

    A graph exported for a fixed number of samples gets a larger batch in pieces.

    Args:
        graph: The program.
        samples: Number of samples it was exported for, or None if any number will do.
    """

    def __init__(self, graph: fx.GraphModule, samples: int | None = None) -> None:
        super().__init__()
        self.graph = graph
        self.samples = samples
        self._taps: dict[str, tuple[Place, nn.Module]] = {}
        self._listening: list[fx.GraphModule] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        heard = any(tap._forward_hooks for _, tap in self._taps.values())
        program = self._tapped() if heard else self.graph
        batch = Batch(args, kwargs)
        sizes = {leaf.shape[0] for leaf in batch.tensors() if leaf.ndim}
        if self.samples is None or len(sizes) != 1 or sizes == {self.samples}:
            return program(*args, **kwargs)
        return self._in_pieces(program, batch, sizes.pop(), self.samples)

    def train(self, mode: bool = True) -> Self:
        """Accept evaluation mode, the only one a converted graph has.

        Raises:
            QuantizationError: Training was asked for.
        """
        if mode:
            raise QuantizationError(
                "a converted graph cannot be trained",
                where="module.train()",
                fix="Quantize with qat: true, train that module, and convert it then",
            )
        self.training = False
        return self

    def forget_taps(self) -> None:
        """Drop the copy of the program that calls the taps: the program has changed."""
        self._listening.clear()

    def tap(self, name: str, place: Place) -> nn.Module:
        """A module that is called with what the node at ``place`` yields, while it has hooks."""
        if name not in self._taps:
            self._taps[name] = (place, nn.Identity())
            self._listening.clear()
        return self._taps[name][1]

    def _in_pieces(self, program: nn.Module, batch: Batch, total: int, size: int) -> Any:
        parts = []
        for start in range(0, total, size):
            piece = batch.map(lambda leaf, at=start: _cut(leaf, at, size))  # type: ignore[misc]
            parts.append(piece.run(program))
        flat = [pytree.tree_flatten(part) for part in parts]
        joined = [
            torch.cat(items)[:total]
            if isinstance(items[0], torch.Tensor) and items[0].ndim
            else items[0]
            for items in zip(*(leaves for leaves, _ in flat), strict=True)
        ]
        return pytree.tree_unflatten(joined, flat[0][1])

    def _tapped(self) -> fx.GraphModule:
        """The same program with calls of the taps in it; it shares all tensors."""
        if not self._listening:
            # Kept in a list, which nn.Module does not take for a submodule.
            self._listening.append(_with_taps(self.graph, self._taps))
        return self._listening[0]


def _with_taps(
    graph: fx.GraphModule, taps: dict[str, tuple[Place, nn.Module]], branch: str = ""
) -> fx.GraphModule:
    root: dict[str, Any] = dict(graph.named_children())
    tapped = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for name in list(root):
        inner = f"{branch}.{name}" if branch else name
        if any(place[0] == inner or place[0].startswith(f"{inner}.") for place, _ in taps.values()):
            setattr(tapped, name, _with_taps(owner_of(graph, name), taps, inner))
    nodes = {node.name: node for node in tapped.graph.nodes}
    for index, (place, tap) in enumerate(taps.values()):
        node = nodes.get(place[1]) if place[0] == branch else None
        if node is None or node.op == "output":
            continue
        after = quantized_output(node)
        heard = after[1] if after is not None else node
        attribute = f"_tap_{index}"
        tapped.add_submodule(attribute, tap)
        with tapped.graph.inserting_after(heard):
            tapped.graph.call_module(attribute, (heard,))
    tapped.recompile()
    return tapped


def _cut(leaf: torch.Tensor, start: int, size: int) -> torch.Tensor:
    if not leaf.ndim:
        return leaf
    piece = leaf[start : start + size]
    missing = size - piece.shape[0]
    # A short last piece is filled up with copies, whose results are dropped.
    return torch.cat([piece, piece[-1:].expand(missing, *piece.shape[1:])]) if missing else piece


def fingerprint(model: nn.Module) -> int:
    """A number that changes with any weight or buffer, or with their names."""
    found = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(data.numpy().tobytes(), zlib.crc32(name.encode(), found))
    return found
