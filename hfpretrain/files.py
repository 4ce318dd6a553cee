"""Sealed folders: written under a temporary name, fsynced, given a manifest of checksums, then renamed.

A folder without its manifest is not whole. Prepared data and checkpoints both rest on this.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
INCOMPLETE = ".incomplete"
_MANIFEST_SHA256 = "manifest_sha256"
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}

logger = logging.getLogger(__name__)


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
    manifest[_MANIFEST_SHA256] = _manifest_sha256(json.loads(json.dumps(manifest)))
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for name in (work / MANIFEST, *(folder for folder in work.rglob("*") if folder.is_dir()), work):
        _fsync(name)
    shutil.rmtree(path, ignore_errors=True)
    work.rename(path)
    _fsync(path.parent)
    return manifest


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    """Checksum of what a manifest says, whatever its layout."""
    content = {key: value for key, value in manifest.items() if key != _MANIFEST_SHA256}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_of(path: Path) -> dict[str, Any] | None:
    """The manifest of a sealed folder; None where there is none, it is unreadable, or not what was sealed.

    Manifests of older versions have no checksum of their own.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    entries = manifest.get("files") if isinstance(manifest, dict) else None
    is_whole = isinstance(entries, dict) and all(
        isinstance(entry, dict) and entry.keys() >= {"size", "sha256"} for entry in entries.values()
    )
    if not entries or not is_whole:
        return None
    is_as_sealed = manifest.get(_MANIFEST_SHA256) in (None, _manifest_sha256(manifest))
    return manifest if is_as_sealed else None


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


def damage_if_changed(path: Path) -> str | None:
    """As `damage`, but a folder that this machine has verified, and whose files have not changed since, isn't read.

    Whether a file has changed is decided by its size, inode, and times of modification and status change. What was
    verified is remembered in the user's cache folder, so that read-only prepared data can be used.
    """
    from filelock import FileLock

    record = _record(path)
    with FileLock(f"{record}.lock"):  # of several processes on this machine one reads the files
        before = _signature(path)
        if before is not None and _is_text(record, before):
            return None
        start = time.perf_counter()
        reason = damage(path)
        if reason is None and before is not None and before == _signature(path):
            size = sum(entry["size"] for entry in (manifest_of(path) or {"files": {}})["files"].values())
            seconds = time.perf_counter() - start
            logger.info("verified the checksums of %s: %.1f MB in %.1f s", path, size / 1e6, seconds)
            write_whole(record, before)
        return reason


def remember(path: Path) -> None:
    """Note that a folder just sealed or verified is as it was sealed, for `damage_if_changed`."""
    signature = _signature(path)
    if signature is not None:
        write_whole(_record(path), signature)


def digests(paths: Sequence[Path]) -> list[tuple[int, str]]:
    """Size and checksum of the content of files, all of which is read.

    What this machine has read before isn't read again, unless its size, inode or one of its times has changed since.
    """
    record = _cache_folder() / hashlib.sha256(repr([platform.node(), *map(str, paths)]).encode()).hexdigest()[:32]
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(record.read_text(encoding="utf-8"))
    before = [(path.resolve(), _stat_signature(path)) for path in paths]
    new = [(path, stat) for path, stat in before if known.get(str(path), [None])[0] != stat]
    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(lambda item: _xxh3(item[0]), new))
    known |= {str(path): [stat, digest] for (path, stat), digest in zip(new, read, strict=True)}
    if new:
        size, seconds = sum(stat[0] for _, stat in new), time.perf_counter() - start
        if seconds > 5:
            logger.info(
                "read %.1f GB of source files in %.0f s to know them again by their content", size / 1e9, seconds
            )
        write_whole(record, json.dumps({str(path): known[str(path)] for path, _ in before}))
    return [(stat[0], known[str(path)][1]) for path, stat in before]


def _stat_signature(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _xxh3(path: Path) -> str:
    digest = xxhash.xxh3_128()  # at the disk's speed
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _record(path: Path) -> Path:
    """The file that holds what this machine has verified of a folder."""
    return _cache_folder() / hashlib.sha256(f"{platform.node()}:{path.resolve()}".encode()).hexdigest()[:32]


def _is_text(path: Path, text: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8") == text
    return False


def _cache_folder() -> Path:
    """Where it is remembered which folders were verified: the user's cache or, if that can't be written, a temporary
    folder of the user."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    user_id = os.getuid() if hasattr(os, "getuid") else os.getlogin()
    for folder in (user / "hfpretrain" / "verified", Path(tempfile.gettempdir(), f"hfpretrain-{user_id}")):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    return Path(tempfile.mkdtemp())


def _signature(path: Path) -> str | None:
    """What changes when the manifest or one of its files does; None where one is missing."""
    digest = hashlib.sha256()
    try:
        text = (path / MANIFEST).read_bytes()
        digest.update(text)
        for name in sorted((manifest_of(path) or {"files": {}})["files"]):
            stat = (path / name).stat()
            digest.update(repr((name, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)).encode())
    except OSError:
        return None
    return digest.hexdigest()


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
