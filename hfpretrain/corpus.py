"""Raw text in: every source as an iterator of documents, and the split into training and validation."""

from __future__ import annotations

import glob
import hashlib
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hfpretrain.recipe import FILE_FORMATS, DataSection, RecipeError, SourceSection

PYTHON_STDLIB = "builtin:python-stdlib"
_BATCH_SIZE = 1000


def documents(source: SourceSection, key: str = "data.sources") -> Iterator[str]:
    """The documents of a source in its own order, empty ones included.

    `key` is the recipe's path of the source, for errors. Raises `RecipeError` where a file is missing, broken or
    lacks the text column.
    """
    if source.path == PYTHON_STDLIB:
        yield from _python_stdlib()
        return
    dataset = _load(source, key)
    for number, batch in enumerate(_batches(dataset, source, key)):
        column = batch.get(source.text_column)
        if column is None:
            raise RecipeError.at(
                f"{key}.text_column", f"no column {source.text_column!r}; the source has: {', '.join(batch)}"
            )
        for offset, text in enumerate(column):
            if not isinstance(text, str):
                row = number * _BATCH_SIZE + offset
                raise RecipeError.at(key, f"document {row} has {text!r:.100} where text is expected")
            yield text


def _load(source: SourceSection, key: str) -> Any:
    """The `datasets` object of a source; streamed, so that nothing is copied, unless the split is a slice."""
    import datasets

    keywords: dict[str, Any] = {
        "name": source.name,
        "data_dir": source.data_dir,
        "data_files": list(source.patterns) or None,
        "revision": source.revision,
        "split": source.split,
        "streaming": "[" not in source.split and "+" not in source.split,
    }
    # `load_dataset` passes over a pattern without files where another one has some.
    for pattern in source.patterns if _is_local(source) else ():
        if "://" not in pattern.removeprefix("file://") and not _matches(_root(source), pattern):
            raise RecipeError.at(f"{key}.data_files", f"no file matches {pattern}")
    if source.sample_by is not None:
        keywords["sample_by"] = source.sample_by
    try:
        return datasets.load_dataset(
            source.path, **{name: value for name, value in keywords.items() if value is not None}
        )
    except Exception as error:
        where = source.data_files or source.data_dir or source.path
        if isinstance(error, StopIteration):  # what looking for the columns of a file without rows ends in
            raise RecipeError.at(key, f"the corpus is empty: {where} has no rows") from error
        raise RecipeError.at(key, f"cannot load {where}: {_first_line(error)}") from error


def _batches(dataset: Any, source: SourceSection, key: str) -> Iterator[dict[str, list[Any]]]:
    try:
        for table in dataset.with_format("arrow").iter(batch_size=_BATCH_SIZE):
            yield {
                name: table.column(name).to_pylist() if name == source.text_column else []
                for name in table.column_names
            }
    except Exception as error:
        raise RecipeError.at(key, _reason(error, source)) from error


def _reason(error: BaseException, source: SourceSection) -> str:
    """What is wrong with the files, with the file's name, which `datasets` leaves out."""
    chain = error
    while chain.__cause__ is not None and not isinstance(chain, UnicodeDecodeError):
        chain = chain.__cause__
    for file in local_files(source):
        if file.suffix in (".gz", ".zst", ".xz", ".bz2", ".parquet"):
            continue
        try:
            with file.open(encoding="utf-8") as stream:
                for _ in stream:
                    pass
        except UnicodeDecodeError as bad:
            return f"{file} is not valid UTF-8 ({bad.reason}, byte {bad.object[bad.start]:#04x}); convert it first"
        except OSError as bad:
            return f"{file} cannot be read: {bad}"
    where = source.data_files or source.data_dir or source.path
    return f"cannot read {where}: {_first_line(chain)}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.300}"


def local_files(source: SourceSection) -> list[Path]:
    """The files of a source that lie on this machine, sorted; none for a Hub dataset or a remote URL."""
    patterns = source.patterns
    if not patterns and (source.data_dir or Path(source.path).is_dir()):
        patterns = ("**/*",)
    return sorted({path for pattern in patterns for path in _matches(_root(source), pattern)})


def _is_local(source: SourceSection) -> bool:
    return source.path in FILE_FORMATS or Path(source.path).exists()


def _root(source: SourceSection) -> Path:
    return Path(source.data_dir or (source.path if Path(source.path).is_dir() else "."))


def _matches(root: Path, pattern: str) -> list[Path]:
    pattern = pattern.removeprefix("file://")
    if "://" in pattern:
        return []
    return [Path(match) for match in glob.glob(str(root / pattern), recursive=True) if Path(match).is_file()]


def identity(source: SourceSection) -> list[Any]:
    """What changes when the source's text does: size and modification time of local files, the Hub's commit."""
    if source.path == PYTHON_STDLIB:
        return [sys.version]
    files = local_files(source)
    if files:
        return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    if _is_local(source):
        return _remote_identity(source)
    from huggingface_hub import HfApi

    try:
        return [HfApi().dataset_info(source.path, revision=source.revision).sha]
    except Exception:
        # Without the Hub the revision named by the recipe is all that is known of a cached dataset.
        return [source.revision]


def _remote_identity(source: SourceSection) -> list[Any]:
    """Names and versions of remote files, as far as their file system tells."""
    import fsspec

    found: list[Any] = []
    for pattern in source.patterns:
        try:
            filesystem, path = fsspec.core.url_to_fs(pattern)
            names = sorted(filesystem.glob(path)) if glob.has_magic(path) else [path]
            found += [[name, str(filesystem.ukey(name))] for name in names]
        except (OSError, ValueError, ImportError, NotImplementedError):
            found.append(pattern)
    return found


def split_documents(data: DataSection) -> Iterator[tuple[int, str, str]]:
    """All documents as (index of the training source or -1, "train" or "validation", text).

    Validation documents of `validation_sources` come first, with index -1. A training document whose text stands
    among them comes with split "duplicate" and is not to be trained on.
    """
    held_out: set[bytes] = set()
    for number, source in enumerate(data.validation_sources):
        for text in documents(source, f"data.validation_sources.{number}"):
            held_out.add(_digest(text))
            yield -1, "validation", text
    for number, source in enumerate(data.sources):
        for text in documents(source, f"data.sources.{number}"):
            if held_out and text and _digest(text) in held_out:
                yield number, "duplicate", text
            elif not data.validation_fraction:
                yield number, "train", text
            elif data.validation_by == "document":
                yield number, ("validation" if _drawn(text, data.validation_fraction) else "train"), text
            else:
                cut = int(len(text) * (1 - data.validation_fraction))
                yield number, "train", text[:cut]
                yield number, "validation", text[cut:]


def training_documents(data: DataSection) -> Iterator[str]:
    """Only the documents that are trained on, for training a tokenizer."""
    return (text for _, split, text in split_documents(data) if split == "train" and text)


def validation_documents(data: DataSection) -> Iterator[str]:
    """Only the documents that are held out."""
    return (text for _, split, text in split_documents(data) if split == "validation" and text)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _drawn(text: str, fraction: float) -> bool:
    """Whether a document is held out: its hash as a number in [0, 1) is below `fraction`."""
    return int.from_bytes(_digest(text)[:8], "big") < fraction * 2**64


def _python_stdlib() -> Iterator[str]:
    """Source of the standard library's modules, sorted by path; left out are tests, tables of character sets, and
    packages installed beside it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {
        "test",
        "tests",
        "idle_test",
        "encodings",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "lib2to3",
        "turtledemo",
    }
    for path in sorted(root.rglob("*.py")):
        if left_out.isdisjoint(path.relative_to(root).parts):
            yield from _source(path)


def _source(path: Path) -> Iterable[str]:
    try:
        with tokenize.open(path) as file:
            return [file.read()]
    except (SyntaxError, UnicodeDecodeError):
        return []  # Python itself could not read the module in its declared encoding
