"""Vocabularies of GGUF files, taken over from another GGUF file or a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quark_core.errors import ExportError

_PREFIX = "tokenizer."
_TOKENS, _TYPES, _SCORES = (f"tokenizer.ggml.{part}" for part in ("tokens", "token_type", "scores"))
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
"""ggml's types of tokens."""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of a model, and what else llama.cpp reads of a tokenizer.

    Attributes:
        tokens: In the order of the embedding's rows.
        types: ggml's type of each.
        scores: Of each, where the tokenizer has them.
        add_rest: Writes the other fields.
    """

    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    add_rest: Callable[[Any], None]

    def filled(self, rows: int) -> Vocabulary:
        """As many tokens as an embedding has rows; unused ones come last, as llama.cpp has it.

        Raises:
            ExportError: There are more tokens than rows.
        """
        missing = rows - len(self.tokens)
        if missing < 0:
            raise ExportError(
                f"the tokenizer has {len(self.tokens)} tokens, the model's embedding {rows} rows",
                where=_where(),
                fix="Give the tokenizer this model was made with",
            )
        names = [f"[PAD{at}]" for at in range(len(self.tokens), rows)]
        return replace(
            self,
            tokens=self.tokens + names,
            types=self.types + [_UNUSED] * missing,
            scores=None if self.scores is None else self.scores + [-1000.0] * missing,
        )

    def add(self, writer: Any) -> None:
        """Write all fields."""
        self.add_rest(writer)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)


def read_vocabulary(source: str, rows: int) -> Vocabulary:
    """The vocabulary for an embedding with so many rows.

    Args:
        source: A GGUF file, or a Hugging Face folder with byte-level BPE in its tokenizer.json;
            ``PACKAGE:FILE`` for one that an installed package ships.
        rows: Of the embedding.

    Raises:
        ExportError: There is no such file, llama.cpp cannot split text as its tokenizer does, or
            it has more tokens than rows.
    """
    path = _path(source)
    if path.is_dir():
        return _from_folder(path).filled(rows)
    return _from_file(path, path.stat().st_mtime_ns).filled(rows)


def _where() -> str:
    return "quantizer.gguf_tokenizer"


def _refused(problem: str, fix: str) -> ExportError:
    return ExportError(problem, where=_where(), fix=fix)


def _path(source: str) -> Path:
    path = Path(source).expanduser()
    package, _, name = source.partition(":")
    if not path.exists() and name and package.isidentifier():
        spec = find_spec(package)
        places = spec.submodule_search_locations if spec is not None else None
        if not places:
            raise _refused(
                f"no package {package!r} is installed", f"Install it, or give a path to {name}"
            )
        path = Path(next(iter(places))) / name
    if not path.exists():
        raise _refused(
            f"{path} does not exist",
            "Give a GGUF file, a folder with tokenizer.json, or PACKAGE:FILE",
        )
    return path


@lru_cache(maxsize=1)
def _from_file(path: Path, changed: int) -> Vocabulary:
    """What another GGUF file says; read once for planning and writing, as it takes seconds."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise _refused(
            f"{path} is no GGUF file", "Give a GGUF file, or the folder that holds tokenizer.json"
        ) from error
    fields = {name: field for name, field in reader.fields.items() if name.startswith(_PREFIX)}
    if _TOKENS not in fields:
        raise _refused(
            f"{path} holds no tokens", "Give a GGUF file that was converted with its tokenizer"
        )
    tokens = fields.pop(_TOKENS).contents()
    types = fields.pop(_TYPES).contents() if _TYPES in fields else [_NORMAL] * len(tokens)
    scores = fields.pop(_SCORES).contents() if _SCORES in fields else None

    def add(writer: Any) -> None:
        for name, field in fields.items():
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)

    return Vocabulary(tokens, types, scores, add)


def _from_folder(folder: Path) -> Vocabulary:
    """What tokenizer.json and tokenizer_config.json say, if it is byte-level BPE."""
    import gguf

    file = folder / "tokenizer.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        model, kind = about["model"], about["model"]["type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refused(
            f"{file} is missing or no tokenizer", "Save the tokenizer there, or give a GGUF file"
        ) from error
    splitting = _splitting(about)
    if kind != "BPE" or splitting is None:
        raise _refused(
            f"{file} splits text in a way that is not known under a name of llama.cpp's",
            "Convert the model with llama.cpp's converter and give that GGUF file",
        )
    added = {token["content"]: token for token in about.get("added_tokens") or ()}
    numbers = {**model["vocab"], **{text: token["id"] for text, token in added.items()}}
    known = {number: text for text, number in numbers.items()}
    count = max(known) + 1
    # A number without a token keeps its place.
    tokens = [known.get(at, f"[PAD{at}]") for at in range(count)]
    types = [_type(added.get(text), at in known) for at, text in enumerate(tokens)]
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=count)
    if "eos" not in special.special_token_ids:
        raise _refused(
            f"{folder} names no token that ends a text",
            "Save the tokenizer with tokenizer_config.json and its eos_token",
        )
    special.add_special_token.setdefault("bos", False)

    def add(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitting)
        special.add_to_gguf(writer, quiet=True)

    return Vocabulary(tokens, types, None, add)


def _type(added: dict[str, Any] | None, known: bool) -> int:
    if not known:
        return _UNUSED
    if added is None:
        return _NORMAL
    return _CONTROL if added.get("special") else _USER_DEFINED


def _splitting(about: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer splits text before it merges, or None.

    llama.cpp knows ways to split by name only; those of Llama models with byte-level BPE are
    recognized by what tokenizer.json says of them.
    """
    model = about["model"]
    odd = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if about.get("normalizer") is not None or any(model.get(option) for option in odd):
        return None
    found = about.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", []) if found.get("type") == "Sequence" else [found]
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    whole, first = bool(model.get("ignore_merges")), steps[0]
    words = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and words and not whole:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and first.get("individual_digits") and words and not whole:
        return "smollm"
    regex = first.get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    isolated = first.get("behavior") == "Isolated" and not first.get("invert")
    return "llama-bpe" if regex == _LLAMA3 and isolated and not words and whole else None
