"""The run folder: one writer at a time, every file whole or absent."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from quark_core.errors import RunFolderError
from quark_core.recipe.hashing import of_file

MANIFEST = "manifest.json"
_LOCK = ".lock"
_OWNER = ".owner"
_WORK = ".work-"
_PARTIAL = ".partial-"


class RunFolder:
    """A folder with the results of one run, and the manifest that says which are finished.

    Attributes:
        path: The folder.
        manifest: What manifest.json holds.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest

    def write_manifest(self) -> None:
        """Replace manifest.json in one step."""
        write_json(self.path / MANIFEST, self.manifest)

    def record(self, stage: str) -> dict[str, Any] | None:
        """The manifest's record of a finished stage."""
        found: dict[str, Any] | None = self.manifest["stages"].get(stage)
        return found

    def is_finished(self, stage: str, key: str) -> bool:
        """Whether a stage was finished with the same key and its files are as it left them."""
        record = self.record(stage)
        return record is not None and record["key"] == key and _intact(self.path, record)

    @contextmanager
    def work(self, stage: str) -> Iterator[Path]:
        """A fresh folder for a stage to write to; gone afterwards unless committed."""
        place = self.path / f"{_WORK}{stage}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def partial(self, stage: str, key: str) -> Path:
        """Where a stage keeps finished parts until it is committed; not made yet.

        Those of the same stage under another key are removed.
        """
        own = self.path / f"{_PARTIAL}{stage}-{key[:16]}"
        self._drop_partial(stage, own)
        return own

    def _drop_partial(self, stage: str, but: Path | None = None) -> None:
        for left in self.path.glob(f"{_PARTIAL}{stage}-*"):
            if left != but:
                shutil.rmtree(left, ignore_errors=True)

    def commit(self, stage: str, place: Path, record: dict[str, Any]) -> None:
        """Move what a stage wrote into the run folder, then record the stage as finished."""
        old = self.manifest["stages"].pop(stage, None)
        if old is not None:
            self.write_manifest()
            for name in old["files"]:
                (self.path / name).unlink(missing_ok=True)
        files = {}
        for file in sorted(path for path in place.rglob("*") if path.is_file()):
            _sync(file)
            files[file.relative_to(place).as_posix()] = of_file(file)
        for part in list(place.iterdir()):
            target = self.path / part.name
            if target.is_dir():
                shutil.rmtree(target)
            part.replace(target)
        _sync(self.path)
        self.manifest["stages"][stage] = {**record, "files": files}
        self.write_manifest()
        self._drop_partial(stage)


@contextmanager
def open_folder(
    path: Path, fresh: dict[str, Any], *, overwrite: bool = False
) -> Iterator[RunFolder]:
    """The run folder at ``path``, locked until the block ends.

    The lock is the operating system's, so that of a process that died is free again.

    Args:
        path: The folder; made if missing.
        fresh: Manifest of a run that has done nothing yet; its ``recipe_key`` must be that of
            the run found in the folder, if there is one.
        overwrite: Replace a run of another recipe.

    Raises:
        RunFolderError: Another process holds the folder; it belongs to another recipe, or holds
            something that is no run.
    """
    manifest = path / MANIFEST
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file", fix="Choose another folder")
    if path.is_dir() and not manifest.exists() and _foreign(path):
        raise RunFolderError(
            f"{path} holds files that are not a run's", fix="Choose another folder, or empty it"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be made", cause=error.strerror, fix="Choose another folder or output"
        ) from error
    lock = FileLock(path / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        owner = _read_text(path / _OWNER)
        raise RunFolderError(
            f"another process is at work in {path}",
            cause=owner and f"process {owner}",
            fix="Wait until it ends, or stop it; then the same command resumes",
        ) from None
    try:
        (path / _OWNER).write_text(f"{os.getpid()} on {os.uname().nodename}")
        for left in path.glob(f"{_WORK}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield RunFolder(path, _manifest(manifest, fresh, overwrite))
    finally:
        (path / _OWNER).unlink(missing_ok=True)
        lock.release()


def _manifest(file: Path, fresh: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    if not file.exists():
        return fresh
    found = read_json(file)
    if found.get("recipe_key") != fresh["recipe_key"]:
        if not overwrite:
            raise RunFolderError(
                f"{file.parent} holds a run of another recipe ({found.get('name')})",
                fix="Choose another folder, or pass --overwrite to replace it",
            )
        return fresh
    return {**fresh, "stages": found["stages"]}


def find_finished(roots: list[Path], stage: str, key: str, not_in: Path) -> Path | None:
    """A run folder beside this one that finished a stage with the same key, files intact."""
    for root in roots:
        for file in sorted(root.glob(f"*/{MANIFEST}")):
            if file.parent == not_in:
                continue
            try:
                record = read_json(file)["stages"].get(stage)
            except (RunFolderError, KeyError, TypeError, AttributeError):
                continue
            if record and record["key"] == key and _intact(file.parent, record):
                return file.parent
    return None


def copy_stage(source: Path, stage: str, place: Path) -> dict[str, Any]:
    """Copy a finished stage's files from another run folder; returns its record."""
    record: dict[str, Any] = read_json(source / MANIFEST)["stages"][stage]
    for name in record["files"]:
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, target)
    return record


def write_json(file: Path, data: Any) -> None:
    """Write JSON as :func:`write_text` does.

    Numbers JSON has no spelling for become the texts inf, -inf and nan.
    """
    write_text(file, json.dumps(_spellable(data), indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write text so that the file is either the old or the new one, whatever happens."""
    beside = file.with_name(f".{file.name}.new")
    with beside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)
    _sync(file.parent)


def read_json(file: Path) -> Any:
    """Read JSON that a run wrote.

    Raises:
        RunFolderError: The file is missing or damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{file} cannot be read",
            cause=str(error),
            fix="Delete the folder and run the recipe again",
        ) from error


def _spellable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _spellable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_spellable(part) for part in value]
    return value


def _intact(folder: Path, record: dict[str, Any]) -> bool:
    return all(
        (folder / name).is_file() and of_file(folder / name) == digest
        for name, digest in record["files"].items()
    )


def _foreign(path: Path) -> bool:
    own = {_LOCK, _OWNER, f".{MANIFEST}.new"}
    return any(
        item.name not in own and not item.name.startswith((_WORK, _PARTIAL))
        for item in path.iterdir()
    )


def _read_text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _sync(path: Path) -> None:
    """Make a file or a folder's entries survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
