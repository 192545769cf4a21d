"""Batch: one call of a model, whatever shape its inputs have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quark_core.errors import DataError, QuarkError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """The arguments of one forward call, and what the right answer is.

    Attributes:
        args: Positional arguments; tensors have the samples along axis 0.
        kwargs: Keyword arguments.
        target: Labels ``[batch]`` or ``[batch, sequence]``, or None.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    target: Any = None

    def __len__(self) -> int:
        """Number of samples: the first axis of the first tensor, or 1."""
        for leaf in self.tensors():
            return int(leaf.shape[0]) if leaf.ndim else 1
        return 1

    def tensors(self) -> Iterator[torch.Tensor]:
        """The input tensors, in order."""
        return leaves((self.args, self.kwargs))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The batch with ``change`` applied to every input tensor; the target stays."""
        return Batch(_map(self.args, change), _map(dict(self.kwargs), change), self.target)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """The batch on a device; floating-point inputs (never token ids) also become ``dtype``."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            wanted = dtype if tensor.is_floating_point() else None
            return tensor.to(device=device, dtype=wanted)

        return self.map(move)

    def beside(self, model: torch.nn.Module) -> Batch:
        """The batch where the model's first floating-point parameter lives, and in its dtype."""
        for parameter in model.parameters():
            if parameter.is_floating_point():
                return self.to(parameter.device, parameter.dtype)
        return self

    def first(self) -> Batch:
        """The first sample alone, where all inputs agree on the number of samples."""
        sizes = {leaf.shape[0] for leaf in self.tensors() if leaf.ndim}
        return (
            self.map(lambda tensor: tensor[:1] if tensor.ndim else tensor)
            if len(sizes) == 1
            else self
        )

    def run(self, model: Callable[..., Any]) -> Any:
        """Call the model with this batch."""
        return model(*self.args, **self.kwargs)

    def run_float(self, model: Callable[..., Any], where: str) -> Any:
        """Call the float model; if it fails, then model and data do not fit each other.

        Args:
            model: The float model.
            where: Which data the batch is of, for the error.

        Raises:
            DataError: The model raised something.
        """
        try:
            return self.run(model)
        except QuarkError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines()
            bytes_given = any(str(leaf.dtype) == "torch.uint8" for leaf in self.tensors())
            raise DataError(
                f"the float model cannot take {self}",
                where=where,
                cause=": ".join([type(error).__name__, *lines[:1]])[:300],
                fix="normalize turns bytes into floats: write normalize: {mean: [...], std: [...]}"
                if bytes_given
                else "Give what the model's forward takes; --traceback shows where it failed",
            ) from error

    def __str__(self) -> str:
        """Shapes and dtypes of the inputs, keyword arguments by name."""
        given = [*map(_words, self.args), *(f"{k}={_words(v)}" for k, v in self.kwargs.items())]
        return f"({', '.join(given)})"


def as_batch(item: Any) -> Batch:
    """Read what a data loader yields.

    A tensor is the only argument, alone or in a list as ``TensorDataset`` yields it; a mapping
    holds keyword arguments; a pair is (inputs, target) where the inputs are again a tensor, a
    mapping or a tuple of arguments. For anything else build a :class:`Batch`.

    Raises:
        DataError: The item is none of these.
    """
    import torch

    if isinstance(item, Batch):
        return item
    if isinstance(item, torch.Tensor):
        return Batch((item,))
    if isinstance(item, Mapping):
        return Batch((), dict(item))
    if isinstance(item, tuple | list) and len(item) == 1:
        return as_batch(item[0])
    if isinstance(item, tuple | list) and len(item) == 2:
        inputs, target = item
        if isinstance(inputs, tuple | list):
            return Batch(tuple(inputs), {}, target)
        read = as_batch(inputs)
        return Batch(read.args, read.kwargs, target)
    count = f" of {len(item)}" if isinstance(item, tuple | list) else ""
    raise DataError(
        f"cannot read a batch from {type(item).__name__}{count}",
        fix="Yield a tensor, a dict of keyword arguments, a pair (inputs, target), or a "
        "quark_core.Batch",
    )


def as_batches(items: Iterable[Any]) -> Iterator[Batch]:
    """Read each item of a data loader with :func:`as_batch`."""
    return map(as_batch, items)


def leaves(value: Any) -> Iterator[torch.Tensor]:
    """The tensors within nested tuples, lists and mappings, in order."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from leaves(part)


def main_output(output: Any) -> torch.Tensor:
    """The tensor that metrics look at: the output itself, its ``logits``, or its first tensor.

    Raises:
        DataError: There is no tensor in the output.
    """
    import torch

    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("logits"), torch.Tensor):
        logits: torch.Tensor = output["logits"]
        return logits
    for leaf in leaves(output):
        return leaf
    raise DataError(
        f"the model returned {type(output).__name__} without any tensor in it",
        fix="Let its forward return a tensor, or a mapping or tuple with one",
    )


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map(part, change) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_map(part, change) for part in value)
    return value


def _words(value: Any) -> str:
    import torch

    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
