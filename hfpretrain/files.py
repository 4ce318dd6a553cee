"""Sealed folders: written under a temporary name, fsynced, given a manifest of checksums, then renamed.

A folder without its manifest is not whole. Prepared data and checkpoints both rest on this.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
INCOMPLETE = ".incomplete"
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def sha256(path: Path) -> str:
    """Hexadecimal checksum of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def entries(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and checksum of files by their name below `folder`; they are on the disk when this returns."""
    found = {}
    for path in paths:
        found[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
        _fsync(path)
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whoever else writes it at the same time."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=INCOMPLETE, delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    _fsync(path.parent)


def work_folder(path: Path) -> Path:
    """An empty folder beside `path` to write into before `seal`."""
    work = path.with_name(path.name + INCOMPLETE)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def seal(
    work: Path, path: Path, content: dict[str, Any], known: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Complete `work`: manifest of `content` and every file's size and checksum, then rename to `path`.

    `known`: entries of files that are checked and on the disk already.
    """
    known = known or {}
    rest = (file for file in sorted(work.rglob("*")) if file.is_file())
    others = entries(work, (file for file in rest if file.relative_to(work).as_posix() not in known))
    found = dict(sorted({**known, **others}.items()))
    manifest = {**content, "files": found}
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for name in (work / MANIFEST, *(folder for folder in work.rglob("*") if folder.is_dir()), work):
        _fsync(name)
    shutil.rmtree(path, ignore_errors=True)
    work.rename(path)
    _fsync(path.parent)
    return manifest


def manifest_of(path: Path) -> dict[str, Any] | None:
    """The manifest of a sealed folder; None where there is none or it is unreadable."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    entries = manifest.get("files") if isinstance(manifest, dict) else None
    is_whole = isinstance(entries, dict) and all(
        isinstance(entry, dict) and entry.keys() >= {"size", "sha256"} for entry in entries.values()
    )
    return manifest if entries and is_whole else None


def damage(path: Path, checksums: bool = True) -> str | None:
    """Why a sealed folder can't be trusted, naming the file; None if every file is as it was sealed.

    Without `checksums` only presence and size are looked at.
    """
    manifest = manifest_of(path)
    if manifest is None:
        return f"{path / MANIFEST} is missing or unreadable"
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        reasons = pool.map(lambda item: _file_damage(path, item[0], item[1], checksums), manifest["files"].items())
        return next((reason for reason in reasons if reason is not None), None)


def _file_damage(folder: Path, name: str, entry: dict[str, Any], checksums: bool) -> str | None:
    file = folder / name
    if ".." in Path(name).parts or Path(name).is_absolute():
        return f"{folder / MANIFEST} names {name!r}, which is outside of the folder"
    if not file.is_file():
        return f"{file} is missing"
    if file.stat().st_size != entry["size"]:
        return f"{file} has {file.stat().st_size} bytes instead of {entry['size']}"
    if checksums and sha256(file) != entry["sha256"]:
        return f"{file} has another checksum than when it was sealed"
    return None


def steps(folder: Path) -> list[Path]:
    """Sealed folders that are named after a step, newest first."""
    return sorted((path for path in folder.glob("step-" + "[0-9]" * 8) if path.is_dir()), reverse=True)


def step_of(path: Path) -> int:
    """The step that such a folder is named after."""
    return int(path.name.removeprefix("step-"))


def refusal(error: BaseException | None) -> str | None:
    """What a disk that takes no more says in `error` or in what caused it; None if it is none of that.

    safetensors and Arrow put the number of the system's error into their own; torch's CheckpointException holds those
    of all ranks.
    """
    while error is not None:
        failures = getattr(error, "failures", None)
        if failures:
            error = next(iter(failures.values()))[0]
        number = getattr(error, "errno", None)
        match = re.search(r"os error (\d+)|\[Errno (\d+)\]", str(error))
        if number is None and match is not None:
            number = int(match[1] or match[2])
        if number in _REFUSALS:
            name = getattr(error, "filename", None)
            return f"{os.strerror(number)}: {name}" if name else os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
