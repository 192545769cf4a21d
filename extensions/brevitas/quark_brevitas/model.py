"""BrevitasModel: a model of Brevitas's layers, and its numbers in the host's terms."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quark_brevitas import attention
from quark_brevitas.encodings import Reader
from quark_brevitas.fusing import Region
from quark_brevitas.preparation import is_roundable, keep_float_weights
from quark_brevitas.wrappers import factor_shapes, inner, path_of, put_factors
from quark_core.batch import Batch
from quark_core.errors import QuantizationError
from quark_core.partial import Partial
from quark_core.plan import Plan
from quark_core.quantized import Encoding, QuantizedModel, packed_sizes

_STATE, _ABOUT, _EXAMPLE = "brevitas.safetensors", "brevitas.json", "example.safetensors"
EXPORTS = ("onnx_qcdq", "qonnx", "torch_qcdq", "pt2", "gguf")
_ALMOST = 1.0001
"""Biases just beyond the largest code lose no more than half a step."""
_PROXIES = ("weight_quant", "input_quant", "bias_quant")


@dataclass
class Prepared:
    """A model on its way through Brevitas's passes.

    Attributes:
        module: The model; its layers are Brevitas's once ``rewritten``.
        plan: The plan it follows.
        example: One batch, or None.
        counterparts: By layer, the float module that computes the same, where it is not the
            layer itself.
        rewritten: Whether layers have been replaced.
        feed: What is done with a batch; None runs it through the model.
        notes: What the user should hear of it.
        partial: Where algorithms keep finished layers between runs.
        regions: Where factors of input channels can be folded, if they are to be.
        tokenizer: Where a GGUF file takes its vocabulary from.
    """

    module: nn.Module
    plan: Plan
    example: Batch | None = None
    counterparts: dict[str, str | None] = field(default_factory=dict)
    rewritten: bool = False
    feed: Callable[[Batch], None] | None = None
    notes: list[str] = field(default_factory=list)
    partial: Partial = field(default_factory=Partial)
    regions: list[Region] = field(default_factory=list)
    tokenizer: str | None = None

    def layer(self, name: str) -> Any:
        """The layer the plan knows by a name."""
        return inner(self.module.get_submodule(name))

    def rounded(self) -> dict[str, Any]:
        """The layers whose weights an algorithm may round."""
        return {
            entry.name: self.layer(entry.name)
            for entry in self.plan.quantized
            if entry.weight is not None and is_roundable(entry)
        }

    def initialize(self) -> None:
        """Let every weight quantizer take its scales, as Brevitas's algorithms expect."""
        for entry in self.plan.quantized:
            if entry.weight is not None:
                self.layer(entry.name).quant_weight()


class BrevitasModel(QuantizedModel):
    """A model quantized by Brevitas.

    Layers keep the float model's names. Weights stay float and are quantized anew in each
    forward, as Brevitas does.
    """

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared.module, prepared.plan)
        self._prepared = prepared
        self._counterparts = prepared.counterparts
        self._float_kept = True
        self._trained = False
        self.notes += prepared.notes
        self._example = prepared.example.first() if prepared.example is not None else None

    def trained(self) -> BrevitasModel:
        """The model after its module was trained, in eval mode.

        Raises:
            QuantizationError: A weight or a scale is not finite.
        """
        for name, parameter in self.module.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise QuantizationError(
                    "training has left values that are not finite",
                    where=f"tensor {name!r}",
                    fix="Train with a smaller learning rate, or clip gradients",
                )
        for layer in self._prepared.rounded().values():
            # The float weights from before are not this model's any more.
            if hasattr(layer, "weight_orig"):
                del layer.weight_orig
        self._prepared.module = self.module.eval()
        after = BrevitasModel(self._prepared)
        after.float_tensors, after.example = self.float_tensors, self.example
        after.notes = [*self.notes, "trained after quantization"]
        after._trained = True
        return after

    def counterpart(self, name: str) -> str | None:
        """A folded BatchNorm where there is one; None after equalization."""
        return self._counterparts.get(name, name)

    def encodings(self) -> list[Encoding]:
        """Scale and zero point of each quantized tensor, read from Brevitas's quantizers."""
        with torch.no_grad():
            reader = Reader(self.module)
            return [found for entry in self.plan.quantized for found in reader.read(entry)]

    def clipped_biases(self) -> list[str]:
        """A sentence about biases whose integers reach less far than they do, if there are any."""
        clipped = []
        with torch.no_grad():
            reader = Reader(self.module)
            for entry in self.plan.quantized:
                if entry.bias is None:
                    continue
                bias = self._prepared.layer(entry.name).bias
                found = next(found for found in reader.read(entry) if found.role == "bias")
                assert found.max is not None
                if bool((bias.abs() > found.max * _ALMOST).any()):
                    clipped.append(entry.name)
        if not clipped:
            return []
        listed = ", ".join(clipped[:5]) + ("..." if len(clipped) > 5 else "")
        return [f"{len(clipped)} bias(es) are cut off, as their integers do not reach: {listed}"]

    def storage(self) -> dict[str, int]:
        """Packed bytes of the tensors left after folding BatchNorm."""
        # Layers behind factors, rotations and branches count under the float model's names.
        names = {path_of(self.module, entry.name): entry.name for entry in self.plan.quantized}
        known: dict[int, str] = {}
        paths = {
            path: known.setdefault(id(module), path)
            for path, module in self.module.named_modules(remove_duplicate=False)
        }
        encodings = self.encodings()
        coded = {encoding.tensor for encoding in encodings}
        tensors, seen = {}, set()
        for path, tensor in self.module.state_dict().items():
            owner, _, last = path.rpartition(".")
            if paths.get(owner, owner) != owner:
                continue  # a module under a second name
            name = f"{names.get(owner, owner)}.{last}" if owner else last
            place = (tensor.data_ptr(), tensor.shape)
            # A tied weight is stored once, or once more as codes.
            tied = name not in coded and tensor.numel() > 0 and place in seen
            if not tied and not any(part.endswith("_quant") for part in path.split(".")):
                tensors[name] = (tuple(tensor.shape), tensor.element_size())
                if name not in coded:
                    seen.add(place)
        return packed_sizes(tensors, encodings)

    def save(self, directory: Path) -> None:
        """Write the state as safetensors, and what it was made with as JSON."""
        from safetensors.torch import save_file

        state = {
            name: tensor.detach().clone().contiguous()
            for name, tensor in self.module.state_dict().items()
        }
        save_file(state, directory / _STATE)
        if self._example is not None:
            # Loading, and exports of the loaded model, look at the graph with it again.
            tensors = {str(at): leaf for at, leaf in enumerate(self._example.args)}
            tensors |= self._example.kwargs
            if all(isinstance(leaf, torch.Tensor) for leaf in tensors.values()):
                save_file(
                    {key: leaf.contiguous() for key, leaf in tensors.items()}, directory / _EXAMPLE
                )
        about = {
            "format": 1,
            "brevitas": version("brevitas"),
            "torch": torch.__version__,
            "plan": self.plan.to_dict()["layers"],
            "factors": factor_shapes(self.module, self.plan),
            "trained": self._trained,
        }
        (directory / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def saved_example(directory: Path) -> Batch | None:
        """The sample :meth:`save` kept, or None."""
        from safetensors.torch import load_file

        if not (directory / _EXAMPLE).exists():
            return None
        saved = load_file(directory / _EXAMPLE)
        given = {name: tensor for name, tensor in saved.items() if not name.isdecimal()}
        return Batch(tuple(saved[str(at)] for at in range(len(saved) - len(given))), given)

    @staticmethod
    def load_state(
        prepared: Prepared, directory: Path, rewrite: Callable[[Prepared], None], moved: str
    ) -> BrevitasModel:
        """Load what :meth:`save` wrote into a model prepared in the same way.

        Args:
            prepared: The model, its layers not replaced where passes over the float model came
                first.
            directory: Where it was saved.
            rewrite: Replaces the layers.
            moved: ``codes`` where an algorithm chose other codes than the nearest, ``weights``
                where float weights were changed by data, or an empty string.

        Raises:
            QuantizationError: The files are missing, or do not fit the prepared model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        unfit = (OSError, SafetensorError, RuntimeError, LookupError, AttributeError, ValueError)
        try:
            about = json.loads((directory / _ABOUT).read_text(encoding="utf-8"))
            if about["plan"] != prepared.plan.to_dict()["layers"]:
                # Brevitas itself would load what is there and leave the rest uncalibrated.
                raise ValueError("it was saved under another plan")
            state = load_file(directory / _STATE)
            if not prepared.rewritten:
                put_factors(prepared.module, about["factors"])
                rewrite(prepared)
            if about.get("trained"):
                moved = "weights"
            if moved == "codes":
                keep_float_weights(prepared.rounded())
            # Bias correction gives a bias to layers that had none.
            for name, tensor in state.items():
                owner, _, last = name.rpartition(".")
                if last == "bias" and prepared.module.get_submodule(owner).bias is None:
                    prepared.module.get_submodule(owner).bias = nn.Parameter(tensor.clone())
            prepared.module.load_state_dict(state)
        except unfit as error:
            raise QuantizationError(
                "the saved state does not fit the prepared model",
                where=str(directory),
                cause=str(error).strip().splitlines()[-1].strip(),
                fix="Load with the configuration and float model it was saved with",
            ) from error
        prepared.example = BrevitasModel.saved_example(directory) or prepared.example
        loaded = BrevitasModel(prepared)
        loaded._float_kept = moved != "weights"
        return loaded

    def export(self, name: str, path: Path) -> Path:
        """Write one of :data:`EXPORTS`; the file is run and compared.

        Raises:
            ExportError: There is no such form, this model does not fit it, or the file computes
                something else than the module.
        """
        from quark_brevitas.exports import export

        if name not in EXPORTS:
            return super().export(name, path)
        example = self.example if self.example is not None else self._example
        tokenizer = self._prepared.tokenizer
        return export(name, self.module, self.plan, example, path, tokenizer)

    def set_enabled(self, layer: str, enabled: bool) -> None:
        """Switch one layer's own quantizers; with fx its inputs stay quantized along the graph.

        Raises:
            QuantizationError: The plan quantizes no such layer.
        """
        if layer not in self.plan or not self.plan[layer].quantized:
            names = ", ".join(entry.name for entry in self.plan.quantized[:5])
            raise QuantizationError(
                f"no quantized layer {layer!r}", where="set_enabled", fix=f"There are {names}..."
            )
        if not self._float_kept:
            raise QuantizationError(
                "a saved model does not keep the float weights that training, activation "
                "equalization or magr changed",
                where=f"layer {layer!r}",
                fix="Quantize anew instead of loading",
            )
        module = inner(self.module.get_submodule(layer))
        proxies = [getattr(module, name, None) for name in _PROXIES]
        if self.plan[layer].op == attention.OP:
            proxies = [proxy for _, proxy in attention.quantizers(module)]
        for proxy in proxies:
            if proxy is not None:
                proxy.disable_quant = not enabled
