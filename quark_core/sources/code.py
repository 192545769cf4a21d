"""Importing the Python code a recipe names: the only code a recipe can name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from quark_core.errors import DataError, UntrustedContentError, did_you_mean
from quark_core.sources.context import Context


def load_callable(target: str, context: Context, where: str) -> Callable[..., Any]:
    """The callable that ``file.py:name`` or ``package.module:name`` stands for.

    A file is taken relative to the recipe; a module may also lie beside the recipe.

    Raises:
        UntrustedContentError: Code is not allowed.
        DataError: The code is missing, fails to import, or has no such callable.
    """
    if not context.allow_code:
        raise UntrustedContentError(
            f"the recipe asks for the Python code {target!r}",
            where=where,
            fix="Leave --no-code out if you trust the recipe",
        )
    place, _, name = target.rpartition(":")
    module = _from_file(context.path(place), where) if place.endswith(".py") else None
    if module is None:
        module = _from_name(place, context.folder, where)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            hint = did_you_mean(part, dir(found))
            raise DataError(f"{place} has no {name!r}", where=where, fix=hint or None)
        found = getattr(found, part)
    if not callable(found):
        raise DataError(
            f"{target!r} is {type(found).__name__}, not callable",
            where=where,
            fix="Name a function or a class",
        )
    return found  # type: ignore[no-any-return]


def call(target: str, kwargs: dict[str, Any], context: Context, where: str) -> Any:
    """Call what ``target`` names, with the recipe's arguments.

    Raises:
        DataError: It raises; the message holds the exception, which is also the cause.
    """
    function = load_callable(target, context, where)
    try:
        return function(**kwargs)
    except Exception as error:
        raise DataError(
            f"{target!r} raised {type(error).__name__}",
            where=where,
            cause=str(error) or None,
            fix="Check its kwargs in the recipe, or run it on its own",
        ) from error


def _from_file(file: Path, where: str) -> ModuleType:
    if not file.exists():
        raise DataError(f"{file} does not exist", where=where)
    # A name of its own for each file: two recipes may both call theirs model.py.
    digest = hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()
    name = f"_recipe_{file.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look their module up while it is being run.
    sys.modules[name] = module
    try:
        with _importable(file.parent):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_error(str(file), error, where) from error
    return module


def _from_name(name: str, folder: Path, where: str) -> ModuleType:
    try:
        with _importable(folder):
            return importlib.import_module(name)
    except Exception as error:
        raise _import_error(name, error, where) from error


def _import_error(what: str, error: Exception, where: str) -> DataError:
    return DataError(
        f"importing {what} raised {type(error).__name__}",
        where=where,
        cause=str(error) or None,
        fix="Write file.py:callable relative to the recipe, or package.module:callable",
    )


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let code import what lies beside it, for the time of the import only."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
