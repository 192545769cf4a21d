"""The host's model sources."""

from __future__ import annotations

from typing import Any

import torch

from quark_core.errors import DataError, MissingDependencyError, UntrustedContentError
from quark_core.sources import checkpoint, code
from quark_core.sources.context import Context
from quark_core.sources.options import HuggingFaceOptions, PythonModelOptions, TimmOptions


def from_python(options: PythonModelOptions, context: Context) -> torch.nn.Module:
    """A model made by the recipe's callable, with the checkpoint's weights if one is given.

    Raises:
        UntrustedContentError: Code is not allowed, or the checkpoint would run some.
        DataError: The callable fails or returns no module; the checkpoint does not fit.
    """
    model = code.call(options.factory, options.kwargs, context, "model.factory")
    if not isinstance(model, torch.nn.Module):
        raise DataError(
            f"{options.factory!r} returned {type(model).__name__}, not a torch.nn.Module",
            where="model.factory",
        )
    if options.checkpoint is not None:
        checkpoint.load_into(model, context.path(options.checkpoint))
    return model.eval()


def from_huggingface(options: HuggingFaceOptions, context: Context) -> torch.nn.Module:
    """A model of transformers; safetensors only, remote code only if both sides allow it.

    Raises:
        MissingDependencyError: transformers is not installed.
        UntrustedContentError: Remote code is asked for and code is not allowed.
        DataError: transformers cannot load it.
    """
    transformers = require_transformers("model")
    if options.trust_remote_code and not context.allow_code:
        raise UntrustedContentError(
            "trust_remote_code asks for code that comes with the model",
            where="model.trust_remote_code",
            fix="Leave --no-code out if you trust it",
        )
    loader = getattr(transformers, options.auto_class, None)
    if loader is None:
        raise DataError(
            f"transformers has no class {options.auto_class!r}",
            where="model.auto_class",
            fix="Use AutoModelForCausalLM, AutoModelForImageClassification or the like",
        )
    folder = context.path(options.path)
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: torch.nn.Module = loader.from_pretrained(
            str(folder) if folder.is_dir() else options.path,
            dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            use_safetensors=True,
        )
    except Exception as error:
        raise DataError(
            f"transformers cannot load {options.path!r}",
            where="model.path",
            cause=str(error).splitlines()[0][:200],
            fix="Give a folder with config.json and safetensors, or an id that can be downloaded",
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval()


def from_timm(options: TimmOptions, context: Context) -> torch.nn.Module:
    """A model of timm.

    Raises:
        MissingDependencyError: timm is not installed, or cannot be imported.
        DataError: timm knows no such model, or the checkpoint does not fit.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(
            "source timm needs the timm library, and it a torchvision built for your torch",
            where="model.source",
            cause=str(error).splitlines()[0],
            fix='Run: pip install "quark-core[timm]"',
        ) from error
    try:
        model: torch.nn.Module = timm.create_model(
            options.model, pretrained=options.pretrained, **options.kwargs
        )
    except Exception as error:
        raise DataError(
            f"timm cannot make {options.model!r}", where="model.model", cause=str(error)
        ) from error
    if options.checkpoint is not None:
        checkpoint.load_into(model, context.path(options.checkpoint))
    return model.eval()


def require_transformers(where: str) -> Any:
    """The transformers library.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "transformers is not installed",
            where=where,
            fix='Run: pip install "quark-core[hf]"',
        ) from error
    return transformers
