"""Sealed folders: written under a temporary name, fsynced, given a manifest of checksums, then renamed.

A folder without its manifest is not whole. Prepared data and checkpoints both rest on this.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
INCOMPLETE = ".incomplete"


def sha256(path: Path) -> str:
    """Hexadecimal checksum of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def work_folder(path: Path) -> Path:
    """An empty folder beside `path` to write into before `seal`."""
    work = path.with_name(path.name + INCOMPLETE)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def seal(work: Path, path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Complete `work`: manifest of `content` and every file's size and checksum, then rename to `path`."""
    entries = {}
    for file in sorted(work.rglob("*")):
        if file.is_file():
            entries[file.relative_to(work).as_posix()] = {"size": file.stat().st_size, "sha256": sha256(file)}
            _fsync(file)
    manifest = {**content, "files": entries}
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _fsync(work / MANIFEST)
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
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def damage(path: Path, checksums: bool = True) -> str | None:
    """Why a sealed folder can't be trusted, naming the file; None if every file is as it was sealed.

    Without `checksums` only presence and size are looked at.
    """
    manifest = manifest_of(path)
    if manifest is None:
        return f"{path / MANIFEST} is missing or unreadable"
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{file} has {file.stat().st_size} bytes instead of {entry['size']}"
        if checksums and sha256(file) != entry["sha256"]:
            return f"{file} has another checksum than when it was sealed"
    return None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
