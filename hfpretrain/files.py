"""Sealed folders: written under a temporary name, given a manifest of checksums, fsynced, then renamed.

Prepared data and checkpoints are sealed folders. A folder without a manifest is incomplete. To replace a folder, the
old one is renamed first, and deleted once the new one has its name. Files in the old folder that hfpretrain did not
write are moved to the new one.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
"""The manifest of an export, as `sha256sum --check` reads it; checkpoints and prepared data have `MANIFEST`."""
INCOMPLETE = ".incomplete"
_MANIFEST_SHA256 = "manifest_sha256"
REPLACED = ".replaced"
_KEPT = ".kept"
_RECORD_DAYS = 180
# Names of the records of verified folders, of their locks, and of temporary files that a killed process left.
_RECORD = re.compile(r"[0-9a-f]{32}(\.lock)?|\.[0-9a-f]{32}\.[0-9a-f]{12}\.incomplete")
# Files that earlier versions wrote, for folders whose manifest is missing or can't be read.
_KNOWN_PATTERNS = (
    *("*config.json", "model*.safetensors", "model.safetensors.index.json", "loss.png", "metrics.json"),
    *("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "*.distcp", ".metadata", "train_state.json", "ledger*.npy", "recipe.yaml"),
    *("data-*.pt", MANIFEST, SUMS),
)
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}

logger = logging.getLogger(__name__)


def sha256(path: Path) -> str:
    """Hexadecimal checksum of a file's content."""
    return _hexdigest(path, hashlib.sha256())


def _hexdigest(path: Path, digest: Any) -> str:
    """`hashlib.file_digest`, which Python 3.10 does not have."""
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return str(digest.hexdigest())


def checksum_entries(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and checksum of files by their name below `folder`. Fsyncs each file."""
    found = {}
    for path in paths:
        found[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
        _fsync(path)
    return found


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically: readers see the old content or the new one, even if several processes write at once.

    A new file gets its permissions from the umask; a file that is replaced keeps its permissions.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{INCOMPLETE}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _fsync(path.parent)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Make `target` a hard link to `source`, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def create_work_folder(path: Path) -> Path:
    """Create an empty folder beside `path`. Write into it, then call `seal` or `replace_folder`."""
    path = path.resolve()
    work = path.with_name(path.name + INCOMPLETE)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def replace_folder(work: Path, path: Path, ours: Collection[str] = ()) -> None:
    """Rename the finished folder `work` to `path` and remove the folder that was there.

    Files of the old folder that hfpretrain wrote are deleted; all others move into the new one. A file is ours if the
    old folder's manifest or `ours` names it; in an export its checksum must match, too. A kill at any time leaves
    one complete folder, either at `path` or in the backup that `finish_replacement` moves back.
    """
    path = path.resolve()
    finish_replacement(path, ours)
    if path.is_dir():
        path.rename(_backup_path(path))
    work.rename(path)
    _fsync(path.parent)
    finish_replacement(path, ours)


def finish_replacement(path: Path, ours: Collection[str] = ()) -> None:
    """Finish a `replace_folder` that was killed: move the old folder back, or delete it if the new one is at `path`."""
    path = path.resolve()
    backup = _backup_path(path)
    if not backup.is_dir():
        return
    if not path.is_dir():
        backup.rename(path)
    else:
        _move_other_files(backup, path, _files_we_wrote(backup, path) | set(ours))
        shutil.rmtree(backup)
    _fsync(path.parent)


def discard(path: Path, ours: Collection[str] = ()) -> None:
    """Delete a folder. Files in it that hfpretrain did not write move into a folder beside it, named `kept-...`."""
    _move_other_files(path, path.with_name(f"kept-{path.name}"), _files_we_wrote(path) | set(ours))
    # Rename it first: if the process is killed while it deletes, nothing is left that looks like a damaged folder.
    removed = path.with_name(f"{path.name}.removed{INCOMPLETE}")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def delete_temporary_files(folder: Path) -> None:
    """Delete temporary files of `write_atomically` calls that were killed. No process may be writing into `folder`."""
    for path in folder.glob(f".*{INCOMPLETE}"):
        if path.is_file():
            path.unlink()


def _backup_path(path: Path) -> Path:
    return path.with_name(path.name + REPLACED)


def _files_we_wrote(folder: Path, new: Path | None = None) -> set[str]:
    """Names of the files below `folder` that hfpretrain wrote and nobody has changed since.

    If the folder has neither a manifest nor checksums, these are the names that `new` also has and the names that
    earlier versions used.
    """
    ours: set[str] = set()
    has_checksums = False
    for root, _, names in os.walk(folder):
        subfolder = Path(root).relative_to(folder)
        manifest = manifest_of(Path(root)) if MANIFEST in names else None
        listed = {} if manifest is None else dict.fromkeys(manifest["files"], "")
        with contextlib.suppress(ValueError):
            listed |= {name: sha for name, sha in (sums_of(Path(root)) or {}).items() if manifest is None}
        has_checksums |= bool(listed)
        with ThreadPoolExecutor() as pool:
            matches = pool.map(lambda item: _has_checksum(Path(root) / item[0], item[1]), listed.items())  # noqa: B023
            ours |= {(subfolder / name).as_posix() for name, match in zip(listed, matches, strict=True) if match}
        ours |= {(subfolder / name).as_posix() for name in names if listed and name in (MANIFEST, SUMS)}
    if not has_checksums:
        paths = [path for path in folder.glob("*") if path.is_file()]
        known = [path for path in paths if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _KNOWN_PATTERNS)]
        ours = {path.name for path in known}
        if new is not None:
            ours |= {path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()} - {"README.md"}
    return ours


def _has_checksum(path: Path, checksum: str) -> bool:
    """Whether a file has this checksum; True for the empty checksum, which means unknown."""
    return not checksum or (path.is_file() and sha256(path) == checksum)


def _move_other_files(old: Path, new: Path, ours: set[str], prefix: str = "") -> None:
    """Move everything except `ours` from `old` into `new`, overwriting nothing. `new` is created if it is needed.

    The names in `ours` are relative to a folder; `prefix` is the path of `old` in it.
    """
    for entry in sorted(os.scandir(old), key=lambda entry: entry.name):
        name, target = f"{prefix}{entry.name}", new / entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_folder and (target.is_dir() or any(other.startswith(f"{name}/") for other in ours)):
            _move_other_files(old / entry.name, target, ours, f"{name}/")
        elif name not in ours:
            new.mkdir(parents=True, exist_ok=True)
            number = 1
            while os.path.lexists(target):
                suffix = _KEPT if number == 1 else f"{_KEPT}-{number}"
                target, number = new / f"{entry.name}{suffix}", number + 1
            os.rename(old / entry.name, target)
            if target.name != entry.name:
                what = "hfpretrain did not write this file, or it was edited since; it is kept as"
                logger.warning("%s: %s %s", new / entry.name, what, target.name)


def seal(
    work: Path, path: Path, content: dict[str, Any], known: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Add a manifest of `content` and of every file's size and checksum to `work`, then rename it to `path`.

    `known`: entries of files whose checksums are known and that are fsynced already.
    """
    known = known or {}
    rest = (file for file in sorted(work.rglob("*")) if file.is_file())
    others = checksum_entries(work, (file for file in rest if file.relative_to(work).as_posix() not in known))
    found = dict(sorted({**known, **others}.items()))
    manifest = {**content, "files": found}
    manifest[_MANIFEST_SHA256] = _manifest_sha256(json.loads(json.dumps(manifest)))
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for name in (work / MANIFEST, *(folder for folder in work.rglob("*") if folder.is_dir()), work):
        _fsync(name)
    replace_folder(work, path)
    return manifest


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    """Checksum of a manifest's values, which does not depend on their order or on white space."""
    content = {key: value for key, value in manifest.items() if key != _MANIFEST_SHA256}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_of(path: Path) -> dict[str, Any] | None:
    """The manifest of a sealed folder; None if it is missing, can't be read or was changed.

    Manifests of older versions have no checksum of their own.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    entries = manifest.get("files") if isinstance(manifest, dict) else None
    is_complete = isinstance(entries, dict) and all(
        isinstance(entry, dict) and entry.keys() >= {"size", "sha256"} for entry in entries.values()
    )
    if not entries or not is_complete:
        return None
    is_unchanged = manifest.get(_MANIFEST_SHA256) in (None, _manifest_sha256(manifest))
    return manifest if is_unchanged else None


def digest(path: Path) -> str | None:
    """Checksum of a sealed folder: of its manifest, which has those of all files. None if there is no manifest."""
    manifest = manifest_of(path)
    return None if manifest is None else _manifest_sha256(manifest)


def damage(path: Path, checksums: bool = True, file_read: Callable[[], None] = lambda: None) -> str | None:
    """Compare a sealed folder with its manifest; returns what is wrong with the first bad file, None if all match.

    Without `checksums`, only presence and size are checked. `file_read` is called after each file.
    """
    manifest = manifest_of(path)
    if manifest is None:
        return f"{path / MANIFEST} is missing or can't be read"
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL

        def check(name: str, entry: dict[str, Any]) -> str | None:
            reason = _file_damage(path, name, entry, checksums)
            file_read()
            return reason

        reasons = pool.map(check, manifest["files"], manifest["files"].values())
        return next((reason for reason in reasons if reason is not None), None)


def damage_if_changed(path: Path, file_read: Callable[[], None] = lambda: None) -> str | None:
    """`damage`, except that a folder is not read again if this machine has verified it and no file has changed since.

    A file counts as changed if its size, its inode, or its time of modification or status change differs. Verified
    folders are recorded in the user's cache folder, since prepared data may be read-only.
    """
    from filelock import FileLock

    record = _record_path(path)
    with FileLock(f"{record}.lock"):  # one process on this machine reads the files, the others wait for its result
        before = _signature(path)
        if before is not None and _is_recorded(record, before):
            return None
        start = time.perf_counter()
        reason = damage(path, file_read=file_read)
        if reason is None and before is not None and before == _signature(path):
            size = sum(entry["size"] for entry in (manifest_of(path) or {"files": {}})["files"].values())
            seconds = time.perf_counter() - start
            logger.info("verified the checksums of %s: %.1f MB in %.1f s", path, size / 1e6, seconds)
            _write_record(record, path, before)
        return reason


def record_as_verified(path: Path) -> None:
    """Record that a folder was sealed or verified just now, so that `damage_if_changed` does not read it again."""
    signature = _signature(path)
    if signature is not None:
        _write_record(_record_path(path), path, signature)


def digests(paths: Sequence[Path]) -> list[tuple[int, str]]:
    """Size and xxh3-128 checksum of files.

    A file that this machine has read before isn't read again, unless its size, inode or one of its times has changed.
    """
    record = _cache_folder() / hashlib.sha256(repr([platform.node(), *map(str, paths)]).encode()).hexdigest()[:32]
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(record.read_text(encoding="utf-8"))
    before = [(path.resolve(), _stat_signature(path)) for path in paths]
    new = [(path, stat) for path, stat in before if known.get(str(path), [None])[0] != stat]
    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(lambda item: _hexdigest(item[0], xxhash.xxh3_128()), new))
    known |= {str(path): [stat, digest] for (path, stat), digest in zip(new, read, strict=True)}
    if new:
        size, seconds = sum(stat[0] for _, stat in new), time.perf_counter() - start
        if seconds > 5:
            logger.info(
                "computed checksums of %.1f GB of source files in %.0f s, to notice later changes", size / 1e9, seconds
            )
        write_atomically(record, json.dumps({str(path): known[str(path)] for path, _ in before}))
        _drop_old_records(record.parent)
    elif before:
        _mark_as_used(record)
    return [(stat[0], known[str(path)][1]) for path, stat in before]


def is_remembered(fact: str) -> bool:
    """Whether `remember` was called on this machine with this fact, which is one line."""
    return _is_recorded(_fact_path(fact), fact)


def remember(fact: str) -> None:
    """Record in the user's cache folder a fact that took time to find out."""
    path = _fact_path(fact)
    with contextlib.suppress(OSError):  # on a full disk, the fact is found out again
        write_atomically(path, fact)
        _drop_old_records(path.parent)


def _fact_path(fact: str) -> Path:
    return _cache_folder() / hashlib.sha256(f"{platform.node()}:{fact}".encode()).hexdigest()[:32]


def _stat_signature(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _record_path(path: Path) -> Path:
    """The file that records that this machine has verified a folder."""
    return _cache_folder() / hashlib.sha256(f"{platform.node()}:{path.resolve()}".encode()).hexdigest()[:32]


def _write_record(record: Path, path: Path, signature: str) -> None:
    # Machine and path are for `_drop_old_records`: several machines may share this user's cache.
    write_atomically(record, "\n".join((signature, platform.node(), str(path.resolve()))))
    _drop_old_records(record.parent)


def _is_recorded(record: Path, signature: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        if record.read_text(encoding="utf-8").partition("\n")[0] == signature:
            _mark_as_used(record)
            return True
    return False


def _mark_as_used(record: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(record)


@functools.cache
def _drop_old_records(folder: Path) -> None:
    """Delete records that were not used for `_RECORD_DAYS`, and those of folders that no longer exist on this machine.

    This runs once in a process. A missing record costs only that the files are read again.
    """
    limit = time.time() - _RECORD_DAYS * 86400
    for path in folder.iterdir():
        if _RECORD.fullmatch(path.name) is None:
            continue
        with contextlib.suppress(OSError, ValueError):
            if path.stat().st_mtime < limit or _has_no_folder(path):
                path.unlink()


def _has_no_folder(record: Path) -> bool:
    """Whether this machine wrote a record with `_write_record` and the record's folder no longer exists."""
    with record.open(encoding="utf-8") as file:
        _, node, path = (file.readline(4096).rstrip("\n") for _ in range(3))
    return node == platform.node() and path != "" and not Path(path).exists()


def _cache_folder() -> Path:
    """The folder of the records: in the user's cache, or a temporary folder if the cache is read-only."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    user_id = os.getuid() if hasattr(os, "getuid") else os.getlogin()
    for folder in (user / "hfpretrain" / "verified", Path(tempfile.gettempdir(), f"hfpretrain-{user_id}")):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    return Path(tempfile.mkdtemp())


def _signature(path: Path) -> str | None:
    """A digest of the manifest and of each file's size, inode and times; None if a file is missing."""
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
    if is_outside(name):
        return f"{folder / MANIFEST} lists {name!r}, which is outside of the folder"
    if not file.is_file():
        return f"{file} is missing"
    if file.stat().st_size != entry["size"]:
        return f"{file} has {file.stat().st_size} bytes instead of {entry['size']}"
    if checksums and sha256(file) != entry["sha256"]:
        return f"{file} has another checksum than when it was written"
    return None


def add_sums(folder: Path, paths: Iterable[Path]) -> None:
    """Add the checksums of files to the `SHA256SUMS` of an export. Fsyncs each file."""
    known = sums_of(folder) or {}
    found = {name: entry["sha256"] for name, entry in checksum_entries(folder, paths).items()}
    lines = "".join(f"{checksum}  {name}\n" for name, checksum in sorted({**known, **found}.items()))
    own = hashlib.sha256(lines.encode()).hexdigest()
    # `sha256sum --check` reads the first line as a comment. It does not notice damage to the list itself.
    write_atomically(folder / SUMS, f"# the lines below: {own}\n{lines}")


def sums_of(folder: Path) -> dict[str, str] | None:
    """The checksums of an export's `SHA256SUMS` by file name; None if there is no such file.

    Raises `ValueError` if it is damaged.
    """
    path = folder / SUMS
    if not path.is_file():
        return None
    content = path.read_bytes()
    first, _, lines = content.partition(b"\n")
    if first != b"# the lines below: " + hashlib.sha256(lines).hexdigest().encode():
        raise ValueError(f"{path} is damaged: its lines do not match the checksum in its first line")
    pairs = (line.partition("  ") for line in lines.decode().splitlines())
    return {name: checksum for checksum, _, name in pairs}


def sums_damage(folder: Path) -> str | None:
    """Compare an export with its `SHA256SUMS`; returns what is wrong with the first bad file, None if all match.

    The model card is not listed, since a person may edit it. Files that are not listed are not compared.
    """
    try:
        sums = sums_of(folder) or {}
    except ValueError as error:
        return str(error)
    with ThreadPoolExecutor() as pool:
        return next(
            (reason for reason in pool.map(lambda item: _sum_damage(folder, *item), sums.items()) if reason), None
        )


def _sum_damage(folder: Path, name: str, checksum: str) -> str | None:
    if is_outside(name):
        return f"{folder / SUMS} lists {name!r}, which is outside of the folder"
    if not (folder / name).is_file():
        return f"{folder / name} is missing"
    return None if sha256(folder / name) == checksum else f"{folder / name} has another checksum than in {SUMS}"


def is_outside(name: str) -> bool:
    """Whether a file name, as read from a manifest or a server, points outside of its folder."""
    return Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name


def step_folders(folder: Path) -> list[Path]:
    """The folders named `step-XXXXXXXX`, the newest step first."""
    return sorted((path for path in folder.glob("step-" + "[0-9]" * 8) if path.is_dir()), reverse=True)


def step_of(path: Path) -> int:
    """The step of a folder named `step-XXXXXXXX`."""
    return int(path.name.removeprefix("step-"))


def disk_error(error: BaseException | None) -> str | None:
    """The operating system's message if `error` or its cause means that a disk can't be written to; else None.

    safetensors and Arrow put the system's error number into their own messages. torch's CheckpointException holds the
    errors of all ranks.
    """
    while error is not None:
        failures = getattr(error, "failures", None)
        if failures:
            error = next(iter(failures.values()))[0]
        number = getattr(error, "errno", None)
        match = re.search(r"os error (\d+)|\[Errno (\d+)\]", str(error))
        if number is None and match is not None:
            number = int(match[1] or match[2])
        if number in _DISK_ERRORS:
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
