"""Find the files of a source, and recognize a file's format by its name and its first bytes."""

from __future__ import annotations

import functools
import glob
import itertools
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

from hfpretrain.recipe.addresses import LFS_POINTER, LFS_POINTER_PROBLEM
from hfpretrain.recipe.redaction import redact
from hfpretrain.recipe.schema import FILE_FORMATS, RecipeError, SourceSection

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_FORMATS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
_SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
_SPLITS = {name: re.compile(rf"(?:^|[-._ 0-9/])(?:{words})(?:[-._ 0-9/]|$)") for name, words in _SPLIT_WORDS.items()}
_SHARD = re.compile(r"data/(\w+)-\d{5}-of-\d{5}.*\.")
_PARTITION = re.compile(r"(?:^|/)split=([^/]+)/")  # in a folder that Hive, Spark or Arrow partitioned by split
# Files that accompany data. `datasets` leaves out those of the first line. Spark and Hive write those with `_`.
_MARKERS = re.compile(
    r"(README\.md|config\.json|dataset_infos?\.json|dataset_dict\.json|dummy_data\.zip"
    r"|_(SUCCESS|metadata|common_metadata|committed_\w*|started_\w*)"
    r"|(README|LICEN[SC]E|NOTICE|COPYING|CITATION|MD5SUMS|SHA256SUMS)([.-]\w+)*)"
)
_MAGIC = (
    (LFS_POINTER, LFS_POINTER_PROBLEM),
    (b"/annex/objects/", "is a git-annex pointer, not the file: get it with `git annex get`"),
    (b"PK\x03\x04", "is a zip archive: unpack it and give the unpacked files"),
    (b"PK\x05\x06", "is an empty zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive: unpack it and give the unpacked files"),
    (b"Rar!\x1a\x07", "is a rar archive: unpack it and give the unpacked files"),
    (b"\x1f\x8b", "is compressed with gzip: rename it to end in .gz"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstandard: rename it to end in .zst"),
    (b"\xfd7zXZ\x00", "is compressed with xz: rename it to end in .xz"),
    (b"BZh", "is compressed with bzip2: rename it to end in .bz2"),
    (b"\x04\x22\x4d\x18", "is compressed with lz4: decompress it, or compress it as gz, zst, xz or bz2"),
    (b"PAR1\x15", "is a parquet file: read it with `path: parquet`"),
    (b"ARROW1\x00\x00", "is an Arrow file: read it with `path: arrow`"),
    (b"%PDF-", "is a PDF: extract its text first"),
    (b"SQLite format 3\x00", "is an SQLite database: write its texts to a JSON Lines or parquet file"),
)
_CODEC_MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00"}
_FORMAT_MAGIC = {"parquet": b"PAR1\x15", "arrow": b"ARROW1\x00\x00"}
_UTF16 = "is encoded as UTF-16 or UTF-32: convert it, for example with `iconv -f UTF-16 -t UTF-8`"
HEAD_BYTES = 512
T = TypeVar("T")
logger = logging.getLogger(__name__)


class SourceFile(NamedTuple):
    """A file of a source."""

    origin: str
    """Path or URL."""
    size: int | None
    """In bytes; None if unknown."""
    kind: str
    """Format: one of `FILE_FORMATS`, or `arrow` for a file of a saved dataset."""


def is_packaged(path: str) -> bool:
    """Whether a source's path is a file format of `datasets`. Formats are looked up before folders and Hub ids."""
    return path.isidentifier() and find_spec(f"datasets.packaged_modules.{path}") is not None


def is_folder(source: SourceSection) -> bool:
    """Whether a source's path is a local folder, and not the name of a format."""
    return os.path.isdir(source.path) and source.path not in FILE_FORMATS and not is_packaged(source.path)


def find_splits(source: SourceSection, key: str, notes: list[str] | None = None) -> dict[str, list[SourceFile]] | None:
    """The files of each split that the source's `split` names; None if `datasets` finds and reads them.

    `notes`: gets a sentence about files that are left out or listed twice.
    """
    names = [part.partition("[")[0].strip() for part in source.split.split("+")]
    found = {name: find_files(source, key, name, notes) for name in names}
    known = {name: files for name, files in found.items() if files is not None}
    return known if len(known) == len(found) else None


def find_files(source: SourceSection, key: str, split: str, notes: list[str] | None = None) -> list[SourceFile] | None:
    """The files of a split, sorted within each pattern. None if `datasets` finds and reads them. `notes`: as in
    `find_splits`.

    Raises `RecipeError` if a pattern matches no file, or one that can't be read, or if it is unclear which files belong
    to the split.
    """
    _require_readable(source, key)
    if (saved := saved_splits(source, key)) is not None:
        return _files_of_saved_split(source, key, split, saved)
    if source.path not in FILE_FORMATS and (not is_folder(source) or source.name or _has_configurations(source)):
        return None
    found: dict[str, tuple[str, int | None]] = {}
    repeated: list[str] = []
    notes = [] if notes is None else notes
    for pattern in source.patterns or ("**/*",):
        matches = _without_markers(source, pattern, expand_pattern(source, pattern, key), key, notes)
        if not matches:
            where = f"{key}.data_files" if source.patterns else f"{key}.{'data_dir' if source.data_dir else 'path'}"
            raise RecipeError.at(
                where, f"no file matches {pattern if source.patterns else os.path.join(_root_name(source), pattern)}"
            )
        for name, info in matches:  # a file that is given twice, even by another path, is read once
            real = os.path.realpath(name) if "://" not in name else name
            repeated += [name] if real in found else []
            found.setdefault(real, (name, info.get("size")))
    if repeated:
        which = f"{repeated[0]} is" if len(repeated) == 1 else f"{len(repeated):,} files, such as {repeated[0]}, are"
        note_once(f"{key}.data_files: {which} listed more than once, but read once", notes)
    listed = _token_files(list(found.values()), key) if source.holds_tokens else list(found.values())
    named = _files_of_split(source, key, split, listed)
    if source.path in FILE_FORMATS:
        return [SourceFile(name, size, source.path) for name, size in named]
    files = [(name, size, format_of(name)) for name, size in named]
    others = [name for name, _, kind in files if kind is None]
    if len(others) == len(files):
        return None
    if others:
        formats = ", ".join(_FORMATS)
        what = f"{others[0]} has none of the formats that are read from a folder ({formats}), but other files have"
        raise RecipeError.at(f"{key}.data_files", f"{what}; list the files to train on in data_files")
    return [SourceFile(name, size, str(kind)) for name, size, kind in files]


def _token_files(files: list[tuple[str, int | None]], key: str) -> list[tuple[str, int | None]]:
    """The files of a source of tokens, without indexes and caches.

    An index of Megatron-LM is read with its `.bin`. `Dataset.map` leaves caches in a folder of `Dataset.save_to_disk`.
    """
    stems = {os.path.splitext(name)[0] for name, _ in files if name.lower().endswith(".bin")}

    def is_index_or_cache(path: Path) -> bool:
        if path.suffix.lower() == ".idx":
            return str(path.with_suffix("")) in stems
        if path.suffix != ".arrow" or not _is_saved_dataset(path.parent):
            return False
        return path not in _files_of_saved_dataset(path.parent, f"{key}.data_files")[0]

    return [(name, size) for name, size in files if not is_index_or_cache(Path(name))]


def _require_readable(source: SourceSection, key: str) -> None:
    """Raises `RecipeError` if `path` is a file, a missing folder, or a saved dataset and `data_files` is given."""
    path = source.path
    if path in FILE_FORMATS:
        return
    if is_folder(source):
        if source.patterns and _is_saved_dataset(Path(path)):
            message = (
                f"{path} was written by `Dataset.save_to_disk`, which lists its files itself; leave data_files out"
            )
            raise RecipeError.at(f"{key}.data_files", message)
        return
    if os.path.isfile(path):
        what = f"`path: {format_of(path) or 'text'}`"
        raise RecipeError.at(f"{key}.path", f"{path} is a file; give it as data_files, with {what}")
    if path.startswith((".", "~", "/")):
        raise RecipeError.at(f"{key}.path", f"there is no folder {path}")


def saved_splits(source: SourceSection, key: str) -> dict[str, list[SourceFile]] | None:
    """The files of each split, in order, of a folder that `save_to_disk` of a `Dataset` or a `DatasetDict` wrote.

    None if the source is no such folder. If a single dataset does not record its split, it is `train`. Caches that
    `Dataset.map` left in the folder (`cache-*.arrow`) are not data and left out. Raises `RecipeError` if a file is
    missing.
    """
    if source.patterns or _is_remote(source) or not (is_folder(source) or source.holds_tokens):
        return None
    root, key = _root(source), f"{key}.{'data_dir' if source.holds_tokens else 'path'}"
    if _is_saved_dataset(root):
        files, split = _files_of_saved_dataset(root, key)
        saved = {split or "train": files}
    elif (root / "dataset_dict.json").is_file():
        names = _read_saved(root / "dataset_dict.json", key, lambda content: list(content["splits"]))
        saved = {name: _files_of_saved_dataset(root / name, key)[0] for name in names}
    else:
        return None
    sizes = {path: _stat_regular_file(path, key).st_size for path in itertools.chain.from_iterable(saved.values())}
    if source.holds_tokens:
        return {split: [SourceFile(str(path), sizes[path], "tokens") for path in some] for split, some in saved.items()}
    # Files without a size are groups of their own. Older versions read them so, and the blocks must stay the same.
    return {split: [SourceFile(str(path), None, "arrow") for path in paths] for split, paths in saved.items()}


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _files_of_saved_dataset(folder: Path, key: str) -> tuple[list[Path], str | None]:
    """The files that `state.json` of a saved `Dataset` lists, and the name of its split if it records one."""
    return _read_saved(
        folder / "state.json",
        key,
        lambda state: ([folder / entry["filename"] for entry in state["_data_files"]], state.get("_split")),
    )


def _read_saved(path: Path, key: str, read: Callable[[Any], T]) -> T:
    """What `read` returns for the content of a JSON file in a saved dataset. Raises `RecipeError` if it is damaged."""
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"the dataset saved in {path.parent} is damaged: {path.name}: {type(error).__name__}: {error}"
        raise RecipeError.at(key, what) from error


def _files_of_saved_split(
    source: SourceSection, key: str, split: str, saved: dict[str, list[SourceFile]]
) -> list[SourceFile]:
    if split == "all":
        return [file for files in saved.values() for file in files]
    if split not in saved and not (split == "train" and _is_saved_dataset(_root(source))):
        raise RecipeError.at(f"{key}.split", f"is {split}, but {_root(source)} has the splits: {', '.join(saved)}")
    return saved[split] if split in saved else next(iter(saved.values()))


def format_of(name: str) -> str | None:
    """The format of `FILE_FORMATS` that a file's name ends in; None if it ends in none of them."""
    return _FORMATS.get(_data_suffix(name))


def _data_suffix(name: str) -> str:
    """The suffix before that of a compression, in lower case."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in CODECS else suffix


def delimiter_of(origin: str) -> str:
    """The character between the fields of a CSV file of this name."""
    return "\t" if _data_suffix(_without_query(origin)) == ".tsv" else ","


def delimiter_in(names: list[str]) -> str | None:
    """The character that probably separates the fields of a CSV file, if its header was read as one single name."""
    return next((one for one in ";\t|," if len(names) == 1 and one in names[0]), None)


def _without_query(origin: str) -> str:
    return re.split("[?#]", origin)[0] if origin.startswith(("http://", "https://")) else origin


def codec_suffix(origin: str) -> str:
    """The suffix of a file's compression in lower case; empty if it is not compressed."""
    suffix = os.path.splitext(_without_query(origin))[1].lower()
    return suffix if suffix in CODECS else ""


def require_data(origin: str, head: bytes, key: str, suffix: str = "", kind: str = "") -> None:
    """Raises `RecipeError` if a file's first bytes show another format than its name or its source says.

    `suffix`: that of the compression; empty if `head` is decompressed. `kind`: the format of the decompressed file.
    """
    for magic, what in _MAGIC:
        is_expected = magic in (_CODEC_MAGIC.get(suffix), _FORMAT_MAGIC.get(kind))
        if head.startswith(magic) and not is_expected and (magic != b"BZh" or head[4:10] == b"1AY&SY"):
            raise RecipeError.at(key, f"{origin} {what}")
    if suffix and head and not head.startswith(_CODEC_MAGIC[suffix]):
        raise RecipeError.at(
            key, f"{origin} is not compressed, although its name ends in {suffix}: rename it without {suffix}"
        )
    if suffix and kind == "parquet":
        raise RecipeError.at(
            key, f"{origin} is compressed as a whole: decompress it, since parquet compresses its columns"
        )
    if suffix or kind in ("parquet", "arrow"):
        return
    if head[257:262] == b"ustar":
        raise RecipeError.at(key, f"{origin} is a tar archive: unpack it and give the unpacked files")
    is_wide = len(head) >= 8 and (not head[1:64:2].strip(b"\0") or not head[0:64:2].strip(b"\0")) and any(head[:64])
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or is_wide:
        raise RecipeError.at(key, f"{origin} {_UTF16}")


def require_no_other_format(origin: str, head: bytes, key: str, suffix: str) -> None:
    """Raises `RecipeError` if the first bytes of a file of token ids are those of another format than `suffix` says.

    Ids may be any bytes, so only long magic numbers count.
    """
    for magic, what in _MAGIC:
        if len(magic) >= 4 and head.startswith(magic) and magic != _FORMAT_MAGIC.get(suffix.removeprefix(".")):
            raise RecipeError.at(key, f"{origin} {what}")


def expand_pattern(source: SourceSection, pattern: str, key: str) -> list[tuple[str, dict[str, Any]]]:
    """The files that a pattern matches, sorted, each with the size and times that the file system reports.

    If there is a file of exactly this name, the pattern stands for that file. Raises `RecipeError` if a match can't be
    read.
    """
    if _is_remote(source, pattern):
        return _expand_remote(source, pattern, key)
    pattern, key = pattern.removeprefix("file://"), f"{key}.data_files"
    path = Path(_root(source), pattern)
    if os.path.lexists(path):
        if path.is_dir():
            raise RecipeError.at(
                key, f"{path} is a folder; give its files, for example {path}/*, or give it as data_dir"
            )
        matches = [path]
    else:
        start = path.anchor if PurePath(pattern).is_absolute() else str(_root(source))
        parts = [part for part in PurePath(pattern).parts if part != path.anchor]
        matches = sorted({Path(match) for match in _matches(start, parts, key)})
    stats = [(str(match), _stat_regular_file(match, key)) for match in matches]
    return [(name, {"size": found.st_size, "mtime": found.st_mtime_ns}) for name, found in stats]


def _expand_remote(source: SourceSection, pattern: str, key: str) -> list[tuple[str, dict[str, Any]]]:
    import fsspec

    url = pattern if "://" in pattern or not source.data_dir else f"{source.data_dir.rstrip('/')}/{pattern}"
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        filesystem.invalidate_cache()
        is_pattern = glob.has_magic(path) and not filesystem.exists(path)
        names = sorted(filesystem.glob(path)) if is_pattern else [path]
        infos = [(name, filesystem.info(name)) for name in names]
    except FileNotFoundError:
        return []
    except Exception as error:  # what a remote file system raises may be anything
        raise RecipeError.at(f"{key}.data_files", f"cannot read {url}: {type(error).__name__}: {error}") from error
    return [(filesystem.unstrip_protocol(name), info) for name, info in infos if info["type"] == "file"]


def _matches(folder: str, parts: list[str], key: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Like `glob.glob(recursive=True)`, but an existing name is never a pattern, and an unreadable folder is an error.

    `above`: folders that `**` has passed, as (device, inode), to find links that lead back to them.
    """
    part, rest = parts[0], parts[1:]
    path = os.path.join(folder, part)
    if not glob.has_magic(part) or os.path.lexists(path):
        if rest:
            yield from _matches(path, rest, key) if _is_folder(path, key) else ()
        elif os.path.lexists(path):
            yield path
        return
    if part == "**":
        if not _is_folder(folder, key):
            return
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in above:
            raise RecipeError.at(
                key, f"{folder} is a link to a folder above it; remove it, or list the files in data_files"
            )
        above = (*above, (status.st_dev, status.st_ino))
        for name in _names(folder, "*", key):
            below = os.path.join(folder, name)
            if _is_folder(below, key):
                yield from _matches(below, parts, key, above)
            elif not rest:
                yield below
        if rest:
            yield from _matches(folder, rest, key)
        return
    for name in _names(folder, part, key):
        below = os.path.join(folder, name)
        if not rest:
            if not os.path.isdir(below):
                yield below
        elif _is_folder(below, key):
            yield from _matches(below, rest, key)


def _names(folder: str, pattern: str, key: str) -> list[str]:
    """Names in a folder that match `pattern`. Hidden names match only if it begins with a dot."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RecipeError.at(key, f"cannot read the folder {folder}: {error.strerror}") from error
    return [name for name in names if fnmatchcase(name, pattern) and (name[0] != "." or pattern[0] == ".")]


def _is_folder(path: str, key: str) -> bool:
    """Whether a path is a folder. Raises `RecipeError` if it is a broken link."""
    return os.path.lexists(path) and stat.S_ISDIR(_stat_path(path, key).st_mode)


def _stat_path(path: str | Path, key: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        what = f"is a link to {os.readlink(path)}, which is missing" if os.path.islink(path) else "can't be read"
        raise RecipeError.at(key, f"{path} {what} ({error.strerror})") from error


def _stat_regular_file(path: Path, key: str) -> os.stat_result:
    """Size and times of a file. Raises `RecipeError` if it is a pipe or a device."""
    found = _stat_path(path, key)
    if not stat.S_ISREG(found.st_mode):
        raise RecipeError.at(key, f"{path} is a pipe or a device, but data is read more than once; write it to a file")
    return found


def _is_remote(source: SourceSection, pattern: str = "") -> bool:
    return any("://" in name.removeprefix("file://") for name in (pattern, source.data_dir or ""))


def _root(source: SourceSection) -> Path:
    """The local folder to which patterns are relative."""
    below = (source.data_dir or "").removeprefix("file://")
    return Path(source.path, below) if is_folder(source) else Path(below)


def _root_name(source: SourceSection) -> str:
    return str(source.data_dir) if _is_remote(source) else str(_root(source))


def path_below(folder: str, name: str) -> str:
    """A file's path relative to a folder. If it is a URL, the file system may spell it differently."""
    if "://" not in name:
        return Path(os.path.relpath(name, folder)).as_posix()
    last = folder.rstrip("/").rpartition("/")[2]
    return name.rpartition(f"/{last}/")[2]


def _without_markers(
    source: SourceSection, pattern: str, matches: list[tuple[str, dict[str, Any]]], key: str, notes: list[str]
) -> list[tuple[str, dict[str, Any]]]:
    """Leave out files that accompany data, and note them.

    A pattern such as `*.jsonl` says which files are data, so only those are left out that lie in a folder of a writer
    that has not finished, such as `_temporary`.
    """
    root = _root_name(source)
    names = {name: PurePath(path_below(root, name)) for name, _ in matches}
    is_any_name = PurePath(pattern).name in ("*", "**")
    saved = {path.parent for path in names.values() if path.name == "dataset_info.json"}  # by `Dataset.save_to_disk`
    asked_for = [part for part in PurePath(pattern).parts if _is_hidden(part)]

    def is_marker(path: PurePath) -> bool:
        hidden = filter(_is_hidden, path.parent.parts)
        if not all(any(fnmatchcase(part, asked) for asked in asked_for) for part in hidden):
            return True
        return is_any_name and (
            _MARKERS.fullmatch(path.name) is not None
            or _is_hidden(path.name)
            or (path.name == "state.json" and path.parent in saved)
        )

    left_out = {name for name, path in names.items() if is_marker(path)}
    if left_out:
        listed = ", ".join(sorted(left_out)[:5]) + (f" and {len(left_out) - 5:,} more" if len(left_out) > 5 else "")
        note_once(f"{key}: left out, because these names are not those of data files: {listed}", notes)
    return [(name, info) for name, info in matches if name not in left_out]


def _is_hidden(part: str) -> bool:
    """Whether Spark and Hive leave out a file or folder of this name. A partition such as `_day=1` is none."""
    return part.startswith(("_", ".")) and part not in ("_", "__", ".", "..") and "=" not in part


@functools.cache
def log_once(message: str) -> None:
    """Log a sentence, unless this process has logged it before."""
    logger.info(message)


def note_once(message: str, notes: list[str]) -> None:
    """Log a sentence once in this process, and add it to `notes`."""
    log_once(redact(message))
    notes.append(redact(message))


def _has_configurations(source: SourceSection) -> bool:
    """Whether a folder's README.md defines its splits, as in a Hub dataset."""
    try:
        text = Path(source.path, "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.startswith("---\n") and "\nconfigs:" in text.split("\n---")[0]


def _files_of_split(
    source: SourceSection, key: str, split: str, files: list[tuple[str, int | None]]
) -> list[tuple[str, int | None]]:
    """The files that belong to a split. All are `train` if `data_files` lists them, or if no name contains a split."""
    if split == "all":
        return files
    if source.patterns:
        if split != "train":
            raise RecipeError.at(f"{key}.split", f"is {split}, but data_files has only the split train")
        return files
    root = _root_name(source)
    splits = _splits_by_name((name for name, _ in files), root)
    advice = "list the files to train on in data_files" if split == "train" else "list the files in data_files"
    if source.path in FILE_FORMATS and split == "train":
        # `datasets` would leave out these files because of their names. Don't guess whether to train on them.
        other = next((name for name, found in splits.items() if found - {"train"}), None)
        if other is not None:
            raise RecipeError.at(f"{key}.data_dir", f"contains {other}, whose name belongs to another split; {advice}")
        return files
    if not any(splits.values()):
        if split != "train":
            raise RecipeError.at(f"{key}.split", f"no file below {root} has {split} in its name; {advice}")
        return files
    unclear = next((name for name, found in splits.items() if len(found) != 1), None)
    if unclear is not None:
        what = (
            f"belongs to the splits {' and '.join(sorted(splits[unclear]))}"
            if splits[unclear]
            else "belongs to no split"
        )
        raise RecipeError.at(f"{key}.data_files", f"the name of {unclear} {what}, unlike other names; {advice}")
    mine = [(name, size) for name, size in files if split in splits[name]]
    if not mine:
        known = ", ".join(sorted(set().union(*splits.values())))
        raise RecipeError.at(f"{key}.split", f"no file below {root} has {split} in its name; the files have: {known}")
    return mine


def _splits_by_name(names: Iterable[str], root: str) -> dict[str, set[str]]:
    """The splits to which each file belongs by its path below `root`, with the rules of `datasets` and one more.

    A folder `split=NAME` is the split of this name. `datasets` would read all such folders as one split.
    """
    paths = {name: path_below(root, name) for name in names}
    matches = {name: _PARTITION.search(path) or _SHARD.match(path) for name, path in paths.items()}
    shards = {name: match[1] for name, match in matches.items() if match}
    if shards:
        return {name: {shards[name]} if name in shards else set() for name in paths}
    return {name: {split for split, words in _SPLITS.items() if words.search(path)} for name, path in paths.items()}
