"""The options each source takes in a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from quark_core.sources.context import Context
from quark_core.spec import FrozenModel

Positive = Annotated[int, Field(gt=0)]
Target = Annotated[
    str, Field(pattern=r"^.+:[A-Za-z_][\w.]*$", description="file.py:callable or module:callable")
]


class SourceOptions(FrozenModel):
    """Options of a source; a plugin's source derives its own from it."""

    def files(self, context: Context) -> dict[str, Path]:
        """Files or folders that must exist, by the option that names them."""
        return {}

    def code_files(self, context: Context) -> list[Path]:
        """Python files whose content the result depends on."""
        return []


class _Callable(SourceOptions):
    factory: Target
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of the callable.")

    def files(self, context: Context) -> dict[str, Path]:
        """The code file, if the callable is named by one."""
        file = self.factory.rpartition(":")[0]
        return {"factory": context.path(file)} if file.endswith(".py") else {}

    def code_files(self, context: Context) -> list[Path]:
        """The same file."""
        return list(self.files(context).values())


class PythonModelOptions(_Callable):
    """A model made by a Python callable, and its weights."""

    checkpoint: str | None = Field(default=None, description="safetensors, or a .pt of tensors.")

    def files(self, context: Context) -> dict[str, Path]:
        """The code and the checkpoint."""
        found = super().files(context)
        if self.checkpoint is not None:
            found["checkpoint"] = context.path(self.checkpoint)
        return found

    def code_files(self, context: Context) -> list[Path]:
        """The code file alone."""
        return [file for file in self.files(context).values() if file.suffix == ".py"]


class HuggingFaceOptions(SourceOptions):
    """A model of the transformers library, from a folder or by its id."""

    path: str = Field(description="Folder on disk, or an id of the model hub.")
    auto_class: str = Field(
        default="AutoModelForCausalLM", description="Class of transformers that loads it."
    )
    dtype: Literal["float32", "float16", "bfloat16", "auto"] = "float32"
    revision: str | None = None
    trust_remote_code: bool = Field(
        default=False, description="Run code that comes with the model; refused by --no-code."
    )

    def files(self, context: Context) -> dict[str, Path]:
        """The folder, where it is written as one and not as an id."""
        return {"path": context.path(self.path)} if self.path.startswith((".", "/", "~")) else {}


class TimmOptions(SourceOptions):
    """A model of the timm library."""

    model: str = Field(description="Name as timm.create_model takes it.")
    pretrained: bool = False
    checkpoint: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)

    def files(self, context: Context) -> dict[str, Path]:
        """The checkpoint."""
        return {"checkpoint": context.path(self.checkpoint)} if self.checkpoint else {}


class PythonDataOptions(_Callable):
    """Batches from a Python callable, which returns something iterable."""

    batches: Positive | None = Field(default=None, description="Use this many at most.")


class Normalize(FrozenModel):
    """Pixels to model inputs: (value - mean) / std, channel by channel along axis 1.

    Integers of eight bits are divided by 255 first.
    """

    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels, std has {len(self.std)}")
        return self


class _Batched(SourceOptions):
    path: str
    batch_size: Positive = 32
    samples: Positive | None = Field(default=None, description="Use this many at most.")
    normalize: Normalize | None = None

    def files(self, context: Context) -> dict[str, Path]:
        """The data file or folder."""
        return {"path": context.path(self.path)}


class ArrayOptions(_Batched):
    """Arrays by name in an npz or safetensors file; axis 0 counts samples."""

    input: str | dict[str, str] = Field(
        description="Name of the input array, or argument names and their arrays."
    )
    target: str | None = Field(default=None, description="Name of the array with the labels.")


class ImageFolderOptions(_Batched):
    """Images in one subfolder a class; classes are numbered in the order of their names."""

    size: tuple[Positive, Positive] | None = Field(
        default=None, description="Height and width to resize to."
    )
    grey: bool = False


class TextOptions(SourceOptions):
    """Windows of tokens from a text or JSONL file, with the next token of each as target."""

    path: str
    tokenizer: str = Field(description="Folder or id that transformers.AutoTokenizer reads.")
    field: str = Field(default="text", description="Key that holds the text in a JSONL line.")
    length: Annotated[int, Field(gt=1)] = 256
    batch_size: Positive = 4
    samples: Positive | None = Field(default=None, description="Windows to use at most.")

    def files(self, context: Context) -> dict[str, Path]:
        """The text file."""
        return {"path": context.path(self.path)}
