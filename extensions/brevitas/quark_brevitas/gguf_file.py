"""GGUF files of Llama models, with weights in llama.cpp's blocks of 32.

    Q8_0:  scale (float16), 32 codes of 8 bits                     value = code * scale
    Q4_0:  scale (float16), 32 codes of 4 bits, from -8 to 7       value = code * scale
    Q4_1:  scale and smallest value (float16), 32 codes of 4 bits  value = code * scale + smallest

Nothing is quantized anew: codes are those of Brevitas's quantizers, and a group larger than a
block repeats its scale. Only scales become float16. Formats: ggml's ``block_q8_0``,
``block_q4_0`` and ``block_q4_1``; names of tensors and metadata: the GGUF specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quark_brevitas import attention
from quark_brevitas.algorithms.grid import Grid
from quark_brevitas.low_rank import LowRankBranch
from quark_brevitas.vocabulary import read_vocabulary
from quark_brevitas.wrappers import inner, path_of
from quark_core.errors import ExportError, MissingDependencyError
from quark_core.plan import Plan, PlanEntry

BLOCK = 32
_NARROW, _WIDE = 4, 8
_WHERE = "export gguf"
_HALVES = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
"""Tensors whose rows llama.cpp keeps in pairs that are rotated together."""


def kind_of(entry: PlanEntry) -> str:
    """Which of the three types holds a layer's weight.

    Raises:
        ExportError: None does; says which spec would be held.
    """
    spec, problem, fix = entry.weight, "", ""
    for role in ("input", "bias"):
        if entry.specs.get(role) is not None:
            problem, fix = f"a quantized {role}", f"Leave {role} out: llama.cpp quantizes its own"
    if entry.op == attention.OP:
        problem, fix = "quantized attention", "Leave attention out: llama.cpp has its own"
    if spec is not None and not problem:
        fmt, granularity = spec.number_format, spec.granularity
        assert granularity is not None
        grouped = granularity.kind == "group"
        if fmt.family != "integer":
            problem, fix = f"{fmt.name}: it holds integers", "Write int4/group:32 or int8/group:32"
        elif entry.op not in ("linear", "embedding"):
            problem, fix = f"a {entry.op}", "Skip the layer by a rule"
        elif grouped and (granularity.size or 0) % BLOCK:
            problem = f"groups of {granularity.size}: scales belong to {BLOCK} elements"
            fix = f"Write {spec.format}/group:{BLOCK}"
        elif entry.shape is not None and entry.shape[-1] % BLOCK:
            problem = f"{entry.shape[-1]} inputs: blocks have {BLOCK}"
            fix = "Skip the layer by a rule"
        elif fmt.bits > (_WIDE if spec.symmetric else _NARROW):
            problem = f"{spec.format}{'' if spec.symmetric else '/asym'}"
            fix = "Write int8/group:32 or int4/group:32/asym"
        elif spec.symmetric and not fmt.signed:
            problem, fix = f"{spec.format}/sym", f"Write int{min(fmt.bits, _WIDE)}/group:32"
    if problem:
        raise ExportError(
            f"gguf cannot hold {problem}", where=f"{_WHERE}, layer {entry.name!r}", fix=fix
        )
    assert spec is not None
    if not spec.symmetric:
        return "Q4_1"
    return "Q4_0" if spec.number_format.bits <= _NARROW else "Q8_0"


def require_fitting(model: nn.Module, plan: Plan) -> None:
    """Refuse models and plans that no file of :func:`write` could hold.

    Raises:
        ExportError: Names what is in the way.
    """
    _config(model)
    for entry in plan.quantized:
        kind_of(entry)


def require_vocabulary(model: nn.Module, tokenizer: str) -> None:
    """Refuse a tokenizer that a model's file could not take over.

    Raises:
        ExportError: The model is no Llama, or the tokenizer is missing or another model's.
        MissingDependencyError: gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise MissingDependencyError(
            "gguf_tokenizer needs gguf",
            where="quantizer.gguf_tokenizer",
            fix="pip install 'quark-brevitas[gguf]'",
        )
    read_vocabulary(tokenizer, _config(model).vocab_size)


def write(
    module: nn.Module, plan: Plan, path: Path, tokenizer: str | None = None
) -> dict[str, str]:
    """Write the file.

    Args:
        module: Brevitas's Llama.
        plan: What was carried out.
        path: The file.
        tokenizer: Where its vocabulary comes from, as :func:`read_vocabulary` takes it; None for
            a file without.

    Returns:
        The type of each quantized tensor, by its name in the module.

    Raises:
        ExportError: The model is no Llama, or has weights the file cannot hold.
    """
    import gguf

    config = _config(module)
    kinds = {entry.name: kind_of(entry) for entry in plan.quantized}
    _require_plain(module, list(kinds))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    try:
        _metadata(writer, config, list(kinds.values()))
        if tokenizer is None:
            # llama.cpp then takes and gives token ids.
            writer.add_tokenizer_model("no_vocab")
        else:
            read_vocabulary(tokenizer, config.vocab_size).add(writer)
        for name, tensor in _tensors(module, config).items():
            layer, _, part = name.rpartition(".")
            place = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if place is None:
                raise ExportError(
                    "a Llama in GGUF has no such tensor",
                    where=f"{_WHERE}, tensor {name!r}",
                    fix="Leave out the pass that gave the model this tensor",
                )
            if layer in kinds and part == "weight":
                kind = gguf.GGMLQuantizationType[kinds[layer]]
                packed = _packed(inner(module.get_submodule(layer)), plan[layer], kinds[layer])
                rows = _paired(torch.from_numpy(packed), name, config).numpy()
                writer.add_tensor(place, np.ascontiguousarray(rows), raw_dtype=kind)
            else:
                values = _paired(tensor.detach().float(), name, config)
                writer.add_tensor(place, values.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return {f"{layer}.weight": kind for layer, kind in kinds.items()}


def read(path: Path, model: nn.Module) -> nn.Module:
    """A float Llama with the weights that a file holds, dequantized.

    Args:
        path: A file written by :func:`write`.
        model: Any Llama of the same sizes; stays as it is.
    """
    import gguf

    config = _config(model)
    found: nn.Module = type(model)(config).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    state = found.state_dict()
    separate = "output.weight" in tensors
    if separate and config.tie_word_embeddings:
        output: Any = found.get_submodule("lm_head")
        output.weight = nn.Parameter(output.weight.detach().clone())
        state = found.state_dict()
    for name in state:
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place == "output.weight" and not separate:
            continue
        tensor = tensors[place]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        loaded = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(state[name].shape)
        state[name].copy_(_halved(loaded, name, config))
    return found


def _require_plain(module: nn.Module, layers: list[str]) -> None:
    """Refuse what stands before or beside layers, for which a Llama in GGUF has no place."""
    for name in layers:
        if path_of(module, name) == name:
            continue
        wrapped = module.get_submodule(name)
        if isinstance(wrapped, LowRankBranch):
            problem, fix = "a float branch of low rank", "Leave low_rank out"
        elif hasattr(wrapped, "rotation_forward"):
            problem = "a rotation at run time"
            fix = "Write rotation: {} without online or mode: layerwise, which are fused"
        else:
            problem = "factors that a layer's input is multiplied by"
            fix = "Leave awq and activation_equalization out, or write algorithm: gptq"
        raise ExportError(f"gguf cannot hold {problem}", where=f"{_WHERE}, layer {name!r}", fix=fix)


def _config(module: nn.Module) -> Any:
    config: Any = getattr(module, "config", None)
    kind = getattr(config, "model_type", type(module).__name__)
    if kind != "llama":
        raise ExportError(
            f"gguf holds transformers' Llama models, not {kind}",
            where=_WHERE,
            fix="Use checkpoint or encodings",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ExportError(
            f"gguf is written with plain rotary embeddings, not {rope['rope_type']}",
            where=_WHERE,
            fix="Use checkpoint or encodings",
        )
    return config


def _tensors(module: nn.Module, config: Any) -> Mapping[str, Tensor]:
    """What a float Llama would hold; an output layer equal to the embedding is left out."""
    ends: list[Any] = [module.get_submodule(name) for name in ("lm_head", "model.embed_tokens")]
    quantized = [hasattr(end, "weight_quant") for end in ends]
    tied = config.tie_word_embeddings and quantized[0] == quantized[1]
    if tied:
        first, second = (end.quant_weight().value if quantized[0] else end.weight for end in ends)
        tied = torch.equal(first, second)
    return {
        name: tensor
        for name, tensor in module.state_dict().items()
        if not any(part.endswith("_quant") for part in name.split("."))
        and not (tied and name == "lm_head.weight")
    }


def _metadata(writer: Any, config: Any, kinds: list[str]) -> None:
    import gguf

    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    most = max(set(kinds), key=kinds.count)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _packed(layer: Any, entry: PlanEntry, kind: str) -> Any:
    """A weight as rows of bytes."""
    assert entry.weight is not None
    weight = layer.weight.detach().float()
    grid = Grid.of(layer, entry.weight)
    scale = grid.scale.detach().float().expand(weight.shape)
    zero = torch.zeros(()) if grid.zero_point is None else grid.zero_point.detach().float()
    zero = zero.expand(weight.shape)
    codes = (weight / scale + zero).round().clamp(grid.low, grid.high)
    rows, columns = weight.shape
    blocks = codes.reshape(rows, columns // BLOCK, BLOCK).numpy()
    parts = [scale[:, ::BLOCK].numpy().astype(np.float16)[..., None].view(np.uint8)]
    if kind == "Q8_0":
        parts.append(blocks.astype(np.int8).view(np.uint8))
    else:
        if kind == "Q4_1":
            smallest = (-zero * scale)[:, ::BLOCK].numpy().astype(np.float16)
            parts.append(smallest[..., None].view(np.uint8))
        unsigned = (blocks + (8 if kind == "Q4_0" else 0)).astype(np.uint8)
        half = BLOCK // 2
        parts.append(unsigned[..., :half] | unsigned[..., half:] << 4)
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _paired(rows: Tensor, name: str, config: Any) -> Tensor:
    """Rows of queries and keys so that those rotated together are neighbours."""
    heads = _heads(name, config)
    if not heads:
        return rows
    split = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape)


def _halved(rows: Tensor, name: str, config: Any) -> Tensor:
    """Undoes :func:`_paired`."""
    heads = _heads(name, config)
    if not heads:
        return rows
    split = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape)


def _heads(name: str, config: Any) -> int:
    stem = name.replace(".bias", ".weight")
    if not stem.endswith(_HALVES):
        return 0
    keys = stem.endswith(_HALVES[1])
    return int((config.num_key_value_heads if keys else 0) or config.num_attention_heads)
