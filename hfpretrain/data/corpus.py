"""Raw text in: every source as documents with the place each came from, and the split into training and validation."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import itertools
import json
import lzma
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hfpretrain.data import source_files
from hfpretrain.data.source_files import expand
from hfpretrain.recipe.redaction import is_redacted, redact
from hfpretrain.recipe.schema import DataSection, RecipeError, SourceSection

PYTHON_STDLIB = "builtin:python-stdlib"
_BATCH_SIZE = 1000
_GROUP_BYTES = 2**26
_SAMPLE_BY = "say what one document is: `sample_by: line`, `paragraph` (blank lines between) or `document` (the file)"
_document_counts: dict[tuple[Any, ...], int] = {}


class Document(NamedTuple):
    """A text and where it came from, or a place where one should have been and the `problem` with it."""

    text: str
    origin: str
    """File, URL or shard of a dataset."""
    row: int
    """Line of a text or JSON file, row of another, from 1."""
    num_bytes: int = 0
    """Of the text in UTF-8."""
    digest: bytes = b""
    """16 bytes that are equal for equal texts."""
    problem: tuple[str, str] | None = None
    """Short reason, by which it is counted, and the sentence for the user."""


class Piece(NamedTuple):
    """What is read in one go: a file, or a shard of a dataset."""

    origin: str
    size: int | None
    kind: str = ""
    """Format of a file, one of `FILE_FORMATS`."""
    start: int = 0
    """First document to read, counted from 0, where a split is a slice such as `train[:10%]`."""
    stop: int | None = None
    """The document after the last to read; None: all."""


class Reader:
    """A source opened: its pieces, in their order, and the documents of each.

    `key` is the recipe's path of the source, for errors. Raises `RecipeError` where a file is missing or the source
    can't be opened, and at a document with a problem unless `on_bad_document` is "skip".
    """

    def __init__(self, source: SourceSection, key: str = "data.sources", on_bad_document: str = "error"):
        self.source, self.key = source, key
        self._skip = on_bad_document == "skip"
        self._dataset: Any = None
        self._raw: Any = None
        self._done_bytes = 0
        require_openable(source, key)
        if source.path == PYTHON_STDLIB:
            self.pieces = [Piece(PYTHON_STDLIB, None)]
        elif (pieces := self._file_pieces()) is not None:
            self.pieces = pieces
        else:
            self._dataset = self._load()
            number = getattr(self._dataset, "num_shards", 1) if self._streamed else 1
            self.pieces = [Piece(f"{source.path}, shard {index}", None) for index in range(number)]

    @property
    def num_bytes(self) -> int | None:
        """Size of all files as they lie there, compressed or not; None where unknown."""
        sizes = [piece.size for piece in self.pieces]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    def bytes_read(self) -> int:
        """Bytes of the files read so far."""
        try:
            return self._done_bytes + (self._raw.tell() if self._raw is not None else 0)
        except (OSError, ValueError):
            return self._done_bytes

    def skip(self, pieces: Iterable[int]) -> None:
        """Count pieces as read."""
        self._done_bytes += sum(self.pieces[index].size or 0 for index in pieces)

    def text_size(self, index: int) -> int | None:
        """Approximate bytes of a file without compression, of parquet those of the text column; None if unknown."""
        piece = self.pieces[index]
        if piece.size is None or not piece.kind:
            return None
        size = _text_size(piece, self.source.text_column)
        if size is None or piece.stop is None:
            return size
        return size * (piece.stop - piece.start) // self._num_documents(piece._replace(start=0, stop=None))

    def groups(self) -> list[range]:
        """Pieces put together into runs of at least 64 MiB (the last may be less), one each where sizes are unknown."""
        groups, start, size = [], 0, 0
        for index, piece in enumerate(self.pieces):
            size += _GROUP_BYTES if piece.size is None else piece.size
            if size >= _GROUP_BYTES:
                groups.append(range(start, index + 1))
                start, size = index + 1, 0
        if start < len(self.pieces):
            groups.append(range(start, len(self.pieces)))
        return groups

    def read(self, pieces: Iterable[int] | None = None) -> Iterator[Document]:
        """The documents of some pieces (default: all) in order, empty ones and, where skipped, bad ones included."""
        for index in range(len(self.pieces)) if pieces is None else pieces:
            piece = self.pieces[index]
            origin = redact(piece.origin)
            for document in self._piece(index, piece):
                if document.problem is not None and not self._skip:
                    where = f"{document.origin}:{document.row}"
                    raise RecipeError.at(self.key, f"{where}: {document.problem[1]}")
                yield document if origin == piece.origin else document._replace(origin=origin)
            self._raw = None
            self._done_bytes += piece.size or 0

    def _piece(self, index: int, piece: Piece) -> Iterator[Document]:
        if self.source.path == PYTHON_STDLIB:
            yield from _python_stdlib()
        elif self._dataset is not None:
            dataset = self._dataset
            if len(self.pieces) > 1:
                dataset = dataset.shard(num_shards=len(self.pieces), index=index)
            yield from self._rows(dataset, piece.origin)
        else:
            yield from itertools.islice(self._documents(piece), piece.start, piece.stop)
        try:
            now = _size(piece.origin) if piece.size is not None else None
        except Exception as error:
            raise self._cannot_read(piece.origin, error) from error
        if now != piece.size:
            raise RecipeError.at(self.key, f"{piece.origin} changed while it was read: {piece.size} bytes, now {now}")

    def _documents(self, piece: Piece) -> Iterator[Document]:
        """All documents of a file."""
        read = {"text": self._text, "json": self._json, "parquet": self._parquet, "csv": self._csv}[piece.kind]
        return self._guarded(read(piece.origin), piece.origin)

    def _file_pieces(self) -> list[Piece] | None:
        """The files of the split, or the parts of them; None where `datasets` reads the source."""
        splits = source_files.find_splits(self.source, self.key)
        if splits is None:
            return None
        found = {name: [Piece(*file) for file in files] for name, files in splits.items()}
        texts = [piece.origin for pieces in found.values() for piece in pieces if piece.kind == "text"]
        if texts and self.source.sample_by is None:
            raise RecipeError.at(f"{self.key}.sample_by", f"{texts[0]} is a text file: {_SAMPLE_BY}")
        if self.source.sample_by is not None and not texts:
            raise RecipeError.at(f"{self.key}.sample_by", "is for text files, and there are none; leave the key out")
        return found[self.source.split] if self._streamed else self._sliced(found)

    def _sliced(self, files: dict[str, list[Piece]]) -> list[Piece]:
        """The parts of files that make up a split such as `train[:10%]`, by the numbers of their documents."""
        from datasets import ReadInstruction

        split, key = self.source.split, f"{self.key}.split"
        counts = {name: [self._num_documents(piece) for piece in pieces] for name, pieces in files.items()}
        try:
            parts = ReadInstruction.from_spec(split).to_absolute({name: sum(counts[name]) for name in counts})
        except (ValueError, AssertionError) as error:
            raise RecipeError.at(key, f"{split!r} is no slice: {error}") from error
        pieces = []
        for part in parts:
            first = 0
            for piece, count in zip(files[part.splitname], counts[part.splitname], strict=True):
                start, stop = max(part.from_ - first, 0), min(part.to - first, count)
                if start < stop:
                    pieces.append(piece._replace(start=start, stop=stop))
                first += count
        if not pieces:
            raise RecipeError.at(key, f"the corpus is empty: {split} holds no document")
        return pieces

    def _num_documents(self, piece: Piece) -> int:
        """Number of documents in a file, including empty and bad ones. The file is read once for this."""
        version = os.stat(piece.origin).st_mtime_ns if "://" not in piece.origin else None
        known = (piece, version, self.source.sample_by, self.source.text_column)
        if known not in _document_counts:
            _document_counts[known] = sum(1 for _ in self._documents(piece))
            self._raw = None
        return _document_counts[known]

    @property
    def _streamed(self) -> bool:
        return "[" not in self.source.split and "+" not in self.source.split

    def _load(self) -> Any:
        """The `datasets` object; streamed, so that nothing is copied, unless the split is a slice."""
        import datasets

        source = self.source
        keywords: dict[str, Any] = {
            "name": source.name,
            "data_dir": source.data_dir,
            "data_files": _patterns(source, self.key) or None,
            "revision": source.revision,
            "split": source.split,
            "streaming": self._streamed,
            "sample_by": source.sample_by,
        }
        try:
            dataset = datasets.load_dataset(
                source.path, **{name: value for name, value in keywords.items() if value is not None}
            )
        except Exception as error:
            raise self._cannot_read(", ".join(source.patterns) or source.data_dir or source.path, error) from error
        if dataset.info.builder_name == "text" and source.sample_by is None:
            raise RecipeError.at(f"{self.key}.sample_by", f"{source.path} has text files: {_SAMPLE_BY}")
        return dataset

    def _cannot_read(self, what: str, error: BaseException) -> RecipeError:
        if isinstance(error, StopIteration):  # what looking for the columns of a file without rows ends in
            return RecipeError.at(self.key, f"the corpus is empty: {what} has no rows")
        while error.__cause__ is not None:
            error = error.__cause__
        line = (str(error).splitlines() or [""])[0]
        return RecipeError.at(self.key, f"cannot read {what}: {type(error).__name__}: {line:.300}")

    def _rows(self, dataset: Any, origin: str) -> Iterator[Document]:
        column, row = self.source.text_column, 0
        batches = iter(dataset.with_format("arrow").iter(batch_size=_BATCH_SIZE))
        while True:
            try:
                table = next(batches)
            except StopIteration:
                return
            except Exception as error:
                raise self._cannot_read(", ".join(self.source.patterns) or origin, error) from error
            if column not in table.column_names:
                raise RecipeError.at(f"{self.key}.text_column", _no_column(column, table.column_names))
            for value in table.column(column).to_pylist():
                row += 1
                yield _document(value, origin, row)

    def _guarded(self, documents: Iterator[Document], origin: str) -> Iterator[Document]:
        """A file that breaks off is a bad document, of which nobody knows how many it would have been.

        Not so a disk or a network that fails: what was not read must not be counted as if it were not there.
        """
        row = 0
        try:
            for document in documents:
                row = document.row
                yield document
        except RecipeError:
            raise
        except Exception as error:  # what file formats and remote file systems raise may be anything
            # Decompressors raise a plain OSError without a number; disks and networks give a number or a subclass.
            broken = type(error) is OSError and error.errno is None
            broken |= isinstance(error, (EOFError, lzma.LZMAError, json.JSONDecodeError))
            if not broken and type(error).__name__ != "ArrowInvalid":  # of a parquet file
                raise self._cannot_read(origin, error) from error
            line = (str(error).splitlines() or [""])[0]
            yield Document("", origin, row + 1, problem=("truncated_file", f"cannot be read further: {line:.300}"))

    def _open(self, origin: str, kind: str) -> Any:
        """Open a file's decompressed bytes. Raises `RecipeError` if the first are those of another kind of file."""
        suffix = source_files.codec_suffix(origin)
        self._raw = _open_file(origin)
        source_files.require_data(origin, _head(self._raw), self.key, suffix, kind)
        try:
            self._raw.seek(0)
        except (OSError, ValueError, NotImplementedError):  # a server without range requests
            self._raw = _open_file(origin)
        if not suffix:
            return self._raw
        file = _decompressed(self._raw, suffix)
        source_files.require_data(origin, file.peek(source_files.HEAD_BYTES), self.key, kind=kind)
        return file

    def _json(self, origin: str) -> Iterator[Document]:
        with self._open(origin, "json") as file:
            start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        yield from self._json_array(origin) if start[:1] == b"[" else self._json_lines(origin)

    def _json_array(self, origin: str) -> Iterator[Document]:
        """One array of objects, which has to be read whole."""
        with self._open(origin, "json") as file:
            values = json.loads(file.read())
        return (self._object(value, origin, row) for row, value in enumerate(values, 1))

    def _object(self, value: Any, origin: str, row: int) -> Document:
        column = self.source.text_column
        if not isinstance(value, dict):
            return Document("", origin, row, problem=("broken_json", "not a JSON object"))
        if column not in value:
            return Document("", origin, row, problem=("missing_text", _no_column(column, value)))
        return _document(value[column], origin, row)

    def _parquet(self, origin: str) -> Iterator[Document]:
        import pyarrow.parquet

        row, column = 0, self.source.text_column
        with self._open(origin, "parquet") as file, pyarrow.parquet.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                raise RecipeError.at(f"{self.key}.text_column", _no_column(column, table.schema_arrow.names))
            for batch in table.iter_batches(_BATCH_SIZE, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _document(value, origin, row)

    def _csv(self, origin: str) -> Iterator[Document]:
        """Every field is text, also one that looks like a number; a row has as many as the header."""
        csv.field_size_limit(2**31 - 1)
        column = self.source.text_column
        with io.TextIOWrapper(self._open(origin, "csv"), "utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(file)
            header = next(rows, None)
            if header is None:
                return
            if column not in header:
                raise RecipeError.at(f"{self.key}.text_column", _no_column(column, header))
            while True:
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Document("", origin, rows.line_num, problem=("broken_csv", f"broken CSV: {error}"))
                    continue
                if len(row) == len(header):
                    yield _document(row[header.index(column)], origin, rows.line_num)
                elif row:  # not a blank line
                    what = f"{len(row)} fields where the header has {len(header)}"
                    yield Document("", origin, rows.line_num, problem=("broken_csv", what))

    def _json_lines(self, origin: str) -> Iterator[Document]:
        """One object a line. By hand, since `datasets` can name neither file nor line of a broken one, nor skip it."""
        with self._open(origin, "json") as file:
            start = list(itertools.islice(file, 10))
            lines = [line for line in start if line.strip()]
            if len(lines) > 1 and _is_cut_object(lines[0], lines[1]):
                advice = "write each object in one line, `jq -c . FILE`"
                raise RecipeError.at(self.key, f"{origin} has a JSON object that spans several lines: {advice}")
            for row, line in enumerate(itertools.chain(start, file), 1):
                try:
                    value = json.loads(line)
                except UnicodeDecodeError as error:
                    problem = ("invalid_utf8", f"not valid UTF-8 ({error.reason}, byte {line[error.start]:#04x})")
                    yield Document("", origin, row, problem=problem)
                    continue
                except (ValueError, RecursionError) as error:
                    if line.strip():
                        yield Document("", origin, row, problem=("broken_json", f"broken JSON: {error}"))
                    continue
                yield self._object(value, origin, row)

    def _text(self, origin: str) -> Iterator[Document]:
        """Lines, paragraphs (blank lines between) or the whole file; line ends of any kind are a newline."""
        # Bytes that are no UTF-8 become lone surrogates, which `_document` finds: so their line is known.
        with io.TextIOWrapper(self._open(origin, "text"), encoding="utf-8-sig", errors="surrogateescape") as file:
            if self.source.sample_by == "line":
                for row, line in enumerate(file, 1):
                    yield _document(line.removesuffix("\n"), origin, row)
            elif self.source.sample_by == "document":
                yield _document(file.read(), origin, 1)
            else:
                lines: list[str] = []
                for row, line in enumerate(file, 1):
                    if line.strip("\n"):
                        lines.append(line)
                    elif lines:
                        yield _document("".join(lines).removesuffix("\n"), origin, row - len(lines))
                        lines = []
                if lines:
                    yield _document("".join(lines).removesuffix("\n"), origin, row - len(lines) + 1)


def _document(value: Any, origin: str, row: int) -> Document:
    """A document with what is wrong with its text, if anything is."""
    if not isinstance(value, str):
        reason = "null_text" if value is None else "not_text"
        return Document("", origin, row, problem=(reason, f"{value!r:.100} where text is expected"))
    try:
        utf8 = value.encode()
    except UnicodeEncodeError as error:
        line = value.count("\n", 0, error.start)
        byte = ord(value[error.start])
        what = f"byte {byte - 0xDC00:#04x}" if 0xDC80 <= byte <= 0xDCFF else "a lone surrogate"
        problem = ("invalid_utf8", f"not valid UTF-8 ({what}); convert it first")
        return Document("", origin, row + line, problem=problem)
    if "\0" in value:
        line = value.count("\n", 0, value.index("\0"))
        return Document("", origin, row + line, problem=("nul_bytes", "the text holds a NUL character"))
    return Document(value, origin, row, len(utf8), hashlib.blake2b(utf8, digest_size=16).digest())


def _no_column(column: str, columns: Iterable[str]) -> str:
    return f"no column {column!r}; there are: {', '.join(columns)}"


def _is_cut_object(first: bytes, second: bytes) -> bool:
    """Whether the first two lines of a file of JSON objects are parts of one."""
    line = first.strip().removeprefix(b"\xef\xbb\xbf")
    if not line.startswith(b"{") or second.lstrip().startswith(b"{"):
        return False
    try:
        json.loads(line)
    except UnicodeDecodeError:
        return False
    except ValueError as error:
        # JSON that is incomplete at the end of a line, outside of a string, continues in the next line.
        return bool(second.strip()) and getattr(error, "pos", 0) >= len(line.decode())
    return False


def _open_file(origin: str) -> Any:
    """Open a file's stored bytes. Local names are not given to fsspec, which gives `::` and `*` a meaning."""
    if "://" not in origin:
        return open(origin, "rb")  # closed by who reads it
    import fsspec

    file = fsspec.open(origin, "rb").open()
    # fsspec's own `readline` copies megabytes for each line.
    return io.BufferedReader(file, 2**20) if hasattr(file, "readinto") else file


def _decompressed(file: Any, suffix: str) -> Any:
    """By Arrow's decompressors, because that of zstandard is silent at a truncated file."""
    import pyarrow as pa

    if suffix == ".xz":
        return lzma.open(file)
    stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), source_files.CODECS[suffix])
    return io.BufferedReader(stream, 2**16)


def _text_size(piece: Piece, column: str, sample_bytes: int = 2**22) -> int | None:
    """As `Reader.text_size`; for a compressed file extrapolated from its first `sample_bytes` of text."""
    import pyarrow as pa
    import pyarrow.parquet

    suffix = source_files.codec_suffix(piece.origin)
    if not suffix and piece.kind != "parquet":
        return piece.size
    with _open_file(piece.origin) as raw:
        try:
            if piece.kind == "parquet":
                metadata = pyarrow.parquet.ParquetFile(raw).metadata
                groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
                columns = [group.column(number) for group in groups for number in range(group.num_columns)]
                return sum(one.total_uncompressed_size for one in columns if one.path_in_schema == column)
            file = _decompressed(raw, suffix)
            size = len(file.read(sample_bytes))
            return size if not file.read(1) else size * (piece.size or 0) // raw.tell()
        except (OSError, EOFError, lzma.LZMAError, pa.ArrowInvalid):  # reported, with its place, when the text is read
            return None


def _head(file: Any) -> bytes:
    head: bytes = file.read(source_files.HEAD_BYTES)
    return head


def _size(origin: str) -> int | None:
    if "://" not in origin:
        return os.stat(origin).st_size
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(origin)
    filesystem.invalidate_cache()
    size: int | None = filesystem.info(path).get("size")
    return size


def require_openable(source: SourceSection, key: str) -> None:
    hidden = [name for name in (source.path, source.data_dir or "", *source.patterns) if is_redacted(name)]
    if hidden:
        message = f"{hidden[0]} has *** in place of its secret, as in every recipe that a run writes"
        raise RecipeError.at(key, f"{message}; use the recipe that the run was started with")


def _patterns(source: SourceSection, key: str) -> list[str]:
    """`data_files` as `datasets` reads them. Names of files on this machine are escaped, so that none is a pattern."""
    if not source_files.is_folder(source) and not source_files.is_packaged(source.path):
        return list(source.patterns)
    names: list[str] = []
    for pattern in source.patterns:
        found = [pattern] if "://" in pattern else [os.path.abspath(name) for name, _ in expand(source, pattern, key)]
        if not found:
            raise RecipeError.at(f"{key}.data_files", f"no file matches {pattern}")
        names += found if "://" in pattern else map(glob.escape, found)
    return names


def load_builder(source: SourceSection, key: str) -> Any:
    import datasets

    keywords = {
        "name": source.name,
        "data_dir": source.data_dir,
        "data_files": _patterns(source, key) or None,
        "revision": source.revision,
    }
    try:
        return datasets.load_dataset_builder(source.path, **keywords)
    except Exception as error:  # what a file system raises may be anything
        raise RecipeError.at(key, f"cannot open {source.path}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return f"{(str(error).splitlines() or [''])[0]:.300}"


class Splitter:
    """Which part of a document is trained on and which is held out.

    `held_out`: digests of the documents of `data.validation_sources`, which are never trained on.
    """

    def __init__(self, data: DataSection, held_out: frozenset[bytes] = frozenset()):
        self._fraction, self._by, self._held_out = data.validation_fraction, data.validation_by, held_out

    def __call__(self, document: Document) -> list[tuple[str, str]]:
        """(`train` or `validation` or the reason why it is dropped, text) of a training source's document."""
        text = document.text
        if document.problem is not None:
            return [(document.problem[0], text)]
        if not text:
            return [("empty", text)]
        if self._held_out and document.digest in self._held_out:
            return [("also_in_validation", text)]
        if not self._fraction:
            return [("train", text)]
        if self._by == "document":
            # The hash as a number in [0, 1): a document keeps its side whatever else is in the corpus.
            drawn = int.from_bytes(document.digest[:8], "big") < self._fraction * 2**64
            return [("validation" if drawn else "train", text)]
        cut = int(len(text) * (1 - self._fraction))
        return [(split, part) for split, part in (("train", text[:cut]), ("validation", text[cut:])) if part]


def held_out_digests(data: DataSection) -> frozenset[bytes]:
    """Digests of all documents of `data.validation_sources`."""
    return frozenset(document.digest for _, document in _validation_sources(data) if document.text)


def _validation_sources(data: DataSection) -> Iterator[tuple[int, Document]]:
    for number, source in enumerate(data.validation_sources):
        for document in Reader(source, f"data.validation_sources.{number}", data.on_bad_document).read():
            yield number, document


def training_documents(data: DataSection) -> Iterator[str]:
    """Only the text that is trained on, for training a tokenizer."""
    return _of_split(data, "train")


def validation_documents(data: DataSection) -> Iterator[tuple[str, str]]:
    """Only the text that is held out, each with the name of its split."""
    if data.validation_sources:
        found = _validation_sources(data)
        return ((data.validation_split(number), document.text) for number, document in found if document.text)
    return (("validation", text) for text in _of_split(data, "validation"))


def _of_split(data: DataSection, wanted: str) -> Iterator[str]:
    splitter = Splitter(data, held_out_digests(data))
    for number, source in enumerate(data.sources):
        for document in Reader(source, f"data.sources.{number}", data.on_bad_document).read():
            for split, text in splitter(document):
                if split == wanted:
                    yield text


def _python_stdlib() -> Iterator[Document]:
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
        name = path.relative_to(root)
        if left_out.isdisjoint(name.parts):
            try:
                with tokenize.open(path) as file:
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue  # Python itself could not read the module in its declared encoding
            if "\0" not in text:
                yield _document(text, f"{PYTHON_STDLIB}/{name.as_posix()}", 1)
