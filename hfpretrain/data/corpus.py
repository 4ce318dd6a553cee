"""Read the documents of every source with their origins, and divide them into training and validation."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import itertools
import json
import logging
import os
import sysconfig
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import orjson

from hfpretrain.data import columns, source_files
from hfpretrain.data.columns import TextColumns
from hfpretrain.data.decompression import decompressed, is_damage
from hfpretrain.data.source_files import expand_pattern
from hfpretrain.recipe.redaction import is_redacted, redact
from hfpretrain.recipe.schema import DataSection, RecipeError, SourceSection

if TYPE_CHECKING:
    import numpy as np

    from hfpretrain.data.token_documents import Vocabulary

PYTHON_STDLIB = "builtin:python-stdlib"
_BATCH_SIZE = 1000
GROUP_BYTES = 2**26
_RETRY_SECONDS = (1, 2, 4, 8, 16, 32)  # waits before a file of a server that fails is read again
_SAMPLE_BY = "set what one document is: `sample_by: line`, `paragraph` (between blank lines) or `document` (a file)"
# Limits for listing columns in a message: in a file that is no table, the first line may be a whole document.
_MAX_NAMES, _NAME_CHARS = 12, 60
Line = TypeVar("Line", str, bytes)
logger = logging.getLogger(__name__)
_document_counts: dict[tuple[Any, ...], int] = {}


class Document(NamedTuple):
    """A document as text or as token ids, and its origin. If there is a `problem`, it can't be used and has no text."""

    text: str
    origin: str
    """File, URL or shard of a dataset."""
    row: int
    """Number of the line (text and JSON files) or row (other files), counted from 1."""
    num_bytes: int = 0
    """Bytes of the text in UTF-8."""
    digest: bytes = b""
    """Hash of the text: 16 bytes."""
    problem: tuple[str, str] | None = None
    """The name under which documents with this problem are counted, and a sentence for the user."""
    ids: np.ndarray | None = None
    """The document's token ids, (n,) of any integer type, if its source has tokens; `text` is then empty. Else None."""
    framing: np.ndarray | None = None
    """EOS, BOS and padding around `ids` in the file: (m,) of the same type. None for text."""
    chars_of_ids: int = 0
    """Number of characters that `ids` stand for."""

    @property
    def content(self) -> str | np.ndarray:
        """The text, or the token ids."""
        return self.text if self.ids is None else self.ids

    @property
    def num_chars(self) -> int:
        """Number of characters of the text, or of the text that the tokens stand for."""
        return len(self.text) if self.ids is None else self.chars_of_ids


class Piece(NamedTuple):
    """A unit of reading: a file, or a shard of a dataset."""

    origin: str
    size: int | None
    """In bytes, as stored; None if unknown."""
    kind: str = ""
    """Format of a file: one of `FILE_FORMATS`, or `arrow`."""
    start: int = 0
    """First document to read, counted from 0. It is more than 0 only in a slice such as `train[10%:]`."""
    stop: int | None = None
    """End of the documents to read, exclusive; None: all."""


class Reader:
    """An open source: its pieces in order, and the documents of each.

    `key`: the source's path in the recipe, for messages. `vocabulary`: turns token files into documents; only needed if
    the source has tokens. Raises `RecipeError` if a file is missing or the source can't be opened, and at a document
    with a problem unless `on_bad_document` is "skip".
    """

    def __init__(
        self,
        source: SourceSection,
        key: str = "data.sources",
        on_bad_document: str = "error",
        vocabulary: Vocabulary | None = None,
    ):
        self.source, self.key, self._vocabulary = source, key, vocabulary
        self.stopped_at_limit = False
        """Whether the last `read` ended at `max_documents` or `max_bytes` although the source has more documents."""
        self._columns = TextColumns(source)
        self._skip = on_bad_document == "skip"
        self.notes: list[str] = []
        """Sentences about files that are left out or read otherwise than one may expect."""
        self._dataset: Any = None
        self._raw: Any = None
        self._done_bytes = 0
        require_openable(source, key)
        if source.path == PYTHON_STDLIB:
            self.pieces = [Piece(PYTHON_STDLIB, None)]
        elif (pieces := self._file_pieces()) is not None:
            self.pieces = pieces
            self._note_cut_documents()
        else:
            self._dataset = self._load_dataset()
            number = getattr(self._dataset, "num_shards", 1) if self._is_streamed else 1
            self.pieces = [Piece(f"{source.path}, shard {index}", None) for index in range(number)]

    @property
    def num_bytes(self) -> int | None:
        """Size of all files that will be read, as stored, compressed or not; None if unknown."""
        sizes = [piece.size for piece in self.pieces]
        return None if None in sizes or self.source.is_limited else sum(size or 0 for size in sizes)

    @property
    def bytes_read(self) -> int:
        """Bytes of the files read so far."""
        try:
            return self._done_bytes + (self._raw.tell() if self._raw is not None else 0)
        except (OSError, ValueError):
            return self._done_bytes

    def start_over(self) -> None:
        """Set `bytes_read` back to zero."""
        self._raw, self._done_bytes = None, 0

    def count_as_read(self, pieces: Iterable[int]) -> None:
        """Count these pieces as read, without reading them."""
        self._done_bytes += sum(self.pieces[index].size or 0 for index in pieces)

    def text_size(self, index: int) -> int | None:
        """About how many bytes of text a piece has, uncompressed (parquet: in the text column). None if unknown."""
        piece = self.pieces[index]
        if piece.size is None or not piece.kind:
            return None
        size = _text_size(piece, self._columns.names)
        if size is None or piece.stop is None:
            return size
        return size * (piece.stop - piece.start) // self._num_documents(piece._replace(start=0, stop=None))

    def groups(self) -> list[range]:
        """Neighboring pieces in groups of at least 64 MiB, except for the last. A piece of unknown size ends its group.

        With `max_documents` or `max_bytes`, all pieces are one group, since a limit counts the documents of all pieces.
        """
        if self.source.is_limited:
            return [range(len(self.pieces))]
        groups, start, size = [], 0, 0
        for index, piece in enumerate(self.pieces):
            size += GROUP_BYTES if piece.size is None else piece.size
            if size >= GROUP_BYTES:
                groups.append(range(start, index + 1))
                start, size = index + 1, 0
        if start < len(self.pieces):
            groups.append(range(start, len(self.pieces)))
        return groups

    def read(self, pieces: Iterable[int] | None = None) -> Iterator[Document]:
        """The documents of `pieces` (default: all) in order, including empty ones.

        With `on_bad_document: skip`, documents with a problem are included, so that they can be counted. The limits
        `max_documents` and `max_bytes` count from the first of `pieces`.
        """
        self.stopped_at_limit, num_documents, num_bytes = False, 0, 0
        for index in range(len(self.pieces)) if pieces is None else pieces:
            piece = self.pieces[index]
            origin = redact(piece.origin)
            for document in self._read_piece(index, piece):
                num_documents, num_bytes = num_documents + 1, num_bytes + document.num_bytes
                if self._is_beyond_limit(num_documents, num_bytes):
                    self.stopped_at_limit = True
                    return
                if document.problem is not None and not self._skip:
                    where = f"{document.origin}:{document.row}"
                    raise RecipeError.at(self.key, f"{where}: {document.problem[1]}")
                yield document if origin == piece.origin else document._replace(origin=origin)
            self._raw = None
            self._done_bytes += piece.size or 0

    def _is_beyond_limit(self, num_documents: int, num_bytes: int) -> bool:
        """Whether so many documents with so many bytes exceed a limit. Raises `RecipeError` if the first one does."""
        source = self.source
        if source.max_bytes is not None and num_bytes > source.max_bytes:
            if num_documents == 1:
                message = f"is {source.max_bytes}, but the first document has {num_bytes} bytes; raise it"
                raise RecipeError.at(f"{self.key}.max_bytes", message)
            return True
        return source.max_documents is not None and num_documents > source.max_documents

    def _read_piece(self, index: int, piece: Piece) -> Iterator[Document]:
        if self.source.path == PYTHON_STDLIB:
            yield from _python_stdlib()
        elif self._dataset is not None:
            dataset = self._dataset
            if len(self.pieces) > 1:
                dataset = dataset.shard(num_shards=len(self.pieces), index=index)
            yield from self._dataset_documents(dataset, piece.origin)
        else:
            yield from itertools.islice(self._documents(piece), piece.start, piece.stop)
        try:
            now = _stored_size(piece.origin) if piece.size is not None else None
        except Exception as error:
            raise self._read_error(piece.origin, error) from error
        if now != piece.size:
            raise RecipeError.at(
                self.key, f"{piece.origin} changed while it was read, from {piece.size} to {now} bytes"
            )

    def _documents(self, piece: Piece) -> Iterator[Document]:
        """All documents of a file."""
        read = {
            "text": self._text_documents,
            "json": self._json_documents,
            "parquet": self._parquet_documents,
            "csv": self._csv_documents,
            "tokens": self._token_documents,
            "arrow": self._arrow_documents,
        }[piece.kind]
        return self._read_file(lambda: read(piece.origin), piece.origin)

    def _file_pieces(self) -> list[Piece] | None:
        """The files of the split, or the parts of them in a slice; None if `datasets` reads the source."""
        splits = source_files.find_splits(self.source, self.key, self.notes)
        if splits is None:
            return None
        found = {name: [Piece(*file) for file in files] for name, files in splits.items()}
        texts = [piece.origin for pieces in found.values() for piece in pieces if piece.kind == "text"]
        if texts and self.source.sample_by is None:
            raise RecipeError.at(f"{self.key}.sample_by", f"{texts[0]} is a text file: {_SAMPLE_BY}")
        if self.source.sample_by is not None and not texts:
            raise RecipeError.at(
                f"{self.key}.sample_by", "is only for text files, and this source has none; leave the key out"
            )
        if self.source.delimiter is not None and not any(p.kind == "csv" for pieces in found.values() for p in pieces):
            raise RecipeError.at(
                f"{self.key}.delimiter", "is only for CSV files, and this source has none; leave the key out"
            )
        return found[self.source.split] if self._is_streamed else self._slice_pieces(found)

    def _note_cut_documents(self) -> None:
        """Note it if documents of tokens seem to continue in the next file."""
        if self._vocabulary is None or self.source.documents_by not in ("eos", "bos") or len(self.pieces) < 2:
            return
        origins = list(dict.fromkeys(piece.origin for piece in self.pieces))
        if count := self._vocabulary.count_cuts(origins, self.source, self.key):
            token = self.source.documents_by.upper()
            message = f"{self.key}: at {count:,} of {len(origins) - 1:,} borders between files, there is no {token}"
            advice = "a document that continues in the next file is read as two documents"
            source_files.note_once(f"{message}; {advice}", self.notes)

    def _slice_pieces(self, files: dict[str, list[Piece]]) -> list[Piece]:
        """The parts of files that make up a slice such as `train[:10%]`. Slices count documents."""
        from datasets import ReadInstruction

        split, key = self.source.split, f"{self.key}.split"
        counts = {name: [self._num_documents(piece) for piece in pieces] for name, pieces in files.items()}
        try:
            parts = ReadInstruction.from_spec(split).to_absolute({name: sum(counts[name]) for name in counts})
        except (ValueError, AssertionError) as error:
            raise RecipeError.at(key, f"{split!r} is not a valid slice: {error}") from error
        pieces = []
        for part in parts:
            first = 0
            for piece, count in zip(files[part.splitname], counts[part.splitname], strict=True):
                start, stop = max(part.from_ - first, 0), min(part.to - first, count)
                if start < stop:
                    pieces.append(piece._replace(start=start, stop=stop))
                first += count
        if not pieces:
            raise RecipeError.at(key, f"the corpus is empty: {split} has no document")
        return pieces

    def _num_documents(self, piece: Piece) -> int:
        """Number of documents in a file, including empty and bad ones. Reads the file once."""
        version = os.stat(piece.origin).st_mtime_ns if "://" not in piece.origin else None
        source = self.source
        of_text = (source.sample_by, source.text_column, source.text_template, source.delimiter)
        of_tokens = (source.documents_by, source.dtype, source.ids_column)
        known = (piece, version, *of_text, *of_tokens)
        if known not in _document_counts:
            _document_counts[known] = sum(1 for _ in self._documents(piece))
            self._raw = None
        return _document_counts[known]

    @property
    def _is_streamed(self) -> bool:
        return "[" not in self.source.split and "+" not in self.source.split

    def _load_dataset(self) -> Any:
        """The `datasets` object. It is streamed, so that nothing is copied, except for a slice."""
        import datasets

        source = self.source
        if source.delimiter is not None:
            message = "is only for CSV files that are read from a disk or a URL; leave the key out"
            raise RecipeError.at(f"{self.key}.delimiter", message)
        keywords: dict[str, Any] = {
            "name": source.name,
            "data_dir": source.data_dir,
            "data_files": _data_files(source, self.key) or None,
            "revision": source.revision,
            "split": source.split,
            "streaming": self._is_streamed,
            "sample_by": source.sample_by,
        }
        try:
            dataset = datasets.load_dataset(
                source.path, **{name: value for name, value in keywords.items() if value is not None}
            )
        except Exception as error:
            raise self._read_error(", ".join(source.patterns) or source.data_dir or source.path, error) from error
        if dataset.info.builder_name == "text" and source.sample_by is None:
            raise RecipeError.at(f"{self.key}.sample_by", f"{source.path} has text files: {_SAMPLE_BY}")
        return dataset

    def _read_error(self, what: str, error: BaseException) -> RecipeError:
        if isinstance(error, StopIteration):  # `datasets` raises it for a file without rows
            return RecipeError.at(self.key, f"the corpus is empty: {what} has no rows")
        while error.__cause__ is not None:
            error = error.__cause__
        return RecipeError.at(self.key, f"cannot read {what}: {type(error).__name__}: {first_line(error)}")

    def _dataset_documents(self, dataset: Any, origin: str) -> Iterator[Document]:
        row = 0
        batches = iter(dataset.with_format("arrow").iter(batch_size=_BATCH_SIZE))
        while True:
            try:
                table = next(batches)
            except StopIteration:
                return
            except Exception as error:
                raise self._read_error(", ".join(self.source.patterns) or origin, error) from error
            for values in self._table_rows(table, origin):
                row += 1
                yield self._document(values, origin, row)

    def _document(self, values: Sequence[Any], origin: str, row: int) -> Document:
        """A document made of the values of the text columns, or with a problem if one of them is no text."""
        for name, value in zip(self._columns.names, values, strict=True):
            if not isinstance(value, str):
                what = "expected text" if len(values) == 1 else f"expected text in column {name!r}"
                reason = "null_text" if value is None else "not_text"
                return Document("", origin, row, problem=(reason, f"{what}, got {value!r:.100}"))
        return _make_document(self._columns.join(values), origin, row)

    def _column_paths(self, schema: Any, origin: str) -> list[tuple[str, ...]]:
        """Where an Arrow schema has each text column. Raises `RecipeError` if one is missing or there twice."""
        paths = []
        for name in self._columns.names:
            path = columns.path_of(schema, name)
            if path is None:
                message = _missing_column_message(name, columns.field_names(schema))
                raise self._column_error(origin, f"{message}{self._advice_for_ids(columns.id_columns(schema))}")
            if (count := schema.names.count(path[0])) > 1:
                raise self._column_error(origin, f"there are {count} columns with the name {path[0]!r}; rename them")
            paths.append(path)
        return paths

    def _column_error(self, origin: str, message: str) -> RecipeError:
        """The error of `text_column` or `text_template` in a file."""
        return RecipeError.at(f"{self.key}.{self._columns.key}", f"{redact(origin)}: {message}")

    def _advice_for_ids(self, names: Sequence[str]) -> str:
        """What to do about a source that has token ids in these columns, and no text; empty without such columns."""
        if not names:
            return ""
        path = self.source.path
        where = f"`data_dir: {path}`" if source_files.is_folder(self.source) else "the same `data_files` or `data_dir`"
        column = "" if names[0] == "input_ids" else f" and `ids_column: {names[0]}`"
        return f". The column {names[0]!r} has token ids: set `path: tokens`, {where}{column}"

    def _table_rows(self, table: Any, origin: str) -> Iterator[tuple[Any, ...]]:
        """The values of the text columns in each row of an Arrow table or record batch."""
        paths = self._column_paths(table.schema, origin)
        return zip(*(columns.column_values(table, path) for path in paths), strict=True)

    def _read_file(self, read: Callable[[], Iterator[Document]], origin: str) -> Iterator[Document]:
        """The documents of a file, and one bad document at the end if the file itself is truncated or broken.

        `read`: reads the file from its beginning. If a server fails, it is called again, up to a minute later. If a
        disk fails, or a server for longer, raises `RecipeError`: those documents exist and must not be counted as bad.
        """
        row = number = tries = 0
        while True:
            try:
                for document in itertools.islice(read(), number, None):
                    row, number, tries = document.row, number + 1, 0
                    yield document
                return
            except RecipeError:
                raise
            except Exception as error:  # what file formats and remote file systems raise may be anything
                found = error
            if isinstance(found, _LineError):
                row, found = found.row - 1, found.error
            if is_damage(found):
                yield Document(
                    "", origin, row + 1, problem=("truncated_file", f"cannot be read further: {first_line(found)}")
                )
                return
            problem = self._read_error(origin, found)
            if tries == len(_RETRY_SECONDS) or not _may_pass(origin, found):
                raise problem from found
            logger.warning("%s; trying again in %g s", redact(str(problem)), _RETRY_SECONDS[tries])
            time.sleep(_RETRY_SECONDS[tries])
            tries += 1

    def _open_checked(self, origin: str, kind: str) -> Any:
        """Open a file's decompressed bytes. Raises `RecipeError` if they begin like a file of another format."""
        suffix = source_files.codec_suffix(origin)
        self._raw = _open_file(origin)
        source_files.require_data(origin, _read_head(self._raw), self.key, suffix, kind)
        try:
            self._raw.seek(0)
        except (OSError, ValueError, NotImplementedError):  # a server without range requests
            self._raw = _open_file(origin)
        if not suffix:
            return self._raw
        file = _decompress(self._raw, suffix, origin)
        source_files.require_data(origin, file.peek(source_files.HEAD_BYTES), self.key, kind=kind)
        return file

    def _json_documents(self, origin: str) -> Iterator[Document]:
        with self._open_checked(origin, "json") as file:
            # Byte by byte, since a damaged file may have less than one wants to read at once.
            start = b""
            for byte in iter(lambda: file.read(1), b""):
                start = (start + byte).removeprefix(b"\xef\xbb\xbf").lstrip()
                if start and not b"\xef\xbb\xbf".startswith(start):
                    break
        yield from self._json_array_documents(origin) if start[:1] == b"[" else self._json_lines_documents(origin)

    def _json_array_documents(self, origin: str) -> Iterator[Document]:
        """The documents of one array of objects, which has to be read as a whole."""
        with self._open_checked(origin, "json") as file:
            values = json.loads(file.read(), object_pairs_hook=self._object)
        return (self._json_document(value, origin, row) for row, value in enumerate(values, 1))

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """A JSON object. A key of the text columns that is there more than once would silently have its last value."""
        found = dict(pairs)
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        wanted = [key for key in repeated if key in self._columns.parts]
        # An object inside of another one only matters if a column is in it.
        inner = [found[key] for key in self._columns.outer if key in found]
        nested = [value.key for value in inner if isinstance(value, _RepeatedKeys)]
        return _RepeatedKeys(found, [*wanted, *nested][0]) if wanted or nested else found

    def _json_document(self, value: Any, origin: str, row: int) -> Document:
        if not isinstance(value, dict):
            return Document("", origin, row, problem=("broken_json", "not a JSON object"))
        if isinstance(value, _RepeatedKeys):
            what = f"the object has the key {value.key!r} more than once"
            return Document("", origin, row, problem=("broken_json", what))
        try:
            values = [columns.value_of(value, name) for name in self._columns.names]
        except KeyError as error:
            message = _missing_column_message(error.args[0], columns.object_names(value))
            return Document("", origin, row, problem=("missing_text", message))
        return self._document(values, origin, row)

    def _parquet_documents(self, origin: str) -> Iterator[Document]:
        import pyarrow.parquet

        row = 0
        with self._open_checked(origin, "parquet") as file, pyarrow.parquet.ParquetFile(file) as table:
            names = [".".join(path) for path in self._column_paths(table.schema_arrow, origin)]
            for batch in table.iter_batches(_BATCH_SIZE, columns=names):
                for values in self._table_rows(batch, origin):
                    row += 1
                    yield self._document(values, origin, row)

    def _arrow_documents(self, origin: str) -> Iterator[Document]:
        row = 0
        with self._open_checked(origin, "arrow") as file:
            schema, batches = columns.arrow_batches(file, _BATCH_SIZE)
            self._column_paths(schema, origin)
            for batch in batches:
                for values in self._table_rows(batch, origin):
                    row += 1
                    yield self._document(values, origin, row)

    def _token_documents(self, origin: str) -> Iterator[Document]:
        if self._vocabulary is None:
            raise RecipeError.at(self.key, "has token ids, but text is needed here; give a source of text")
        for found in self._vocabulary.documents(origin, self.source, self.key):
            ids, framing, row, num_chars, num_bytes, digest, problem = found
            yield Document("", origin, row, num_bytes, digest, problem, ids, framing, num_chars)

    def _csv_documents(self, origin: str) -> Iterator[Document]:
        """Every field is text, even if it looks like a number. A row must have as many fields as the header."""
        csv.field_size_limit(2**31 - 1)
        delimiter = self.source.delimiter or source_files.delimiter_of(origin)
        with io.TextIOWrapper(
            self._open_checked(origin, "csv"), "utf-8-sig", errors="surrogateescape", newline=""
        ) as file:
            # `strict`: otherwise a quotation mark that is not closed joins the rows after it into one field.
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                header = next(rows, None)
            except csv.Error as error:
                raise RecipeError.at(self.key, f"{origin}:1: the header is broken CSV: {error}") from error
            if header is None:
                return
            for name in self._columns.names:
                if name not in header:
                    message = _missing_column_message(name, header, origin)
                    raise RecipeError.at(f"{self.key}.{self._columns.key}", message)
                if (count := header.count(name)) > 1:
                    raise self._column_error(origin, f"there are {count} columns with the name {name!r}; rename them")
            indices = [header.index(name) for name in self._columns.names]
            while True:
                first = rows.line_num + 1
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    what = _describe_csv_error(error, first, rows.line_num)
                    # How many rows are lost is unknown, so each line counts.
                    for line in range(first, rows.line_num + 1):
                        yield Document("", origin, line, problem=("broken_csv", what))
                    continue
                except Exception as error:
                    raise _LineError(rows.line_num + 1, error) from error
                if len(row) == len(header):
                    yield self._document([row[index] for index in indices], origin, rows.line_num)
                elif row:  # not a blank line
                    what = f"the row has {len(row)} fields, the header {len(header)}"
                    yield Document("", origin, rows.line_num, problem=("broken_csv", what))

    def _json_lines_documents(self, origin: str) -> Iterator[Document]:
        """The documents of a file with one object per line. `datasets` 5.2 can neither name nor skip a broken line."""
        with self._open_checked(origin, "json") as file:
            numbered = _numbered(file)
            start: list[tuple[int, bytes]] = []
            damage: _LineError | None = None
            try:
                start.extend(itertools.islice(numbered, 10))
            except _LineError as error:  # raised after the lines before it
                damage = error
            lines = [line for _, line in start if line.strip()]
            if len(lines) > 1 and _is_cut_object(lines[0], lines[1]):
                advice = "write each object on one line, for example with `jq -c . FILE`"
                raise RecipeError.at(self.key, f"{origin} has a JSON object that spans several lines: {advice}")
            for row, line in itertools.chain(start, numbered):
                try:
                    value = _load_json(line)
                    if isinstance(value, dict) and self._columns.may_repeat(line, value):
                        value = json.loads(line, object_pairs_hook=self._object)
                except UnicodeDecodeError as error:
                    problem = ("invalid_utf8", f"not valid UTF-8 ({error.reason}, byte {line[error.start]:#04x})")
                    yield Document("", origin, row, problem=problem)
                    continue
                except (ValueError, RecursionError) as error:
                    if line.strip():
                        yield Document("", origin, row, problem=("broken_json", f"broken JSON: {error}"))
                    continue
                yield self._json_document(value, origin, row)
            if damage is not None:
                raise damage

    def _text_documents(self, origin: str) -> Iterator[Document]:
        """Lines, paragraphs between blank lines, or the whole file. All kinds of line endings become a newline."""
        # Bytes that are not UTF-8 become lone surrogates, which `_make_document` finds and reports with their line.
        with io.TextIOWrapper(
            self._open_checked(origin, "text"), encoding="utf-8-sig", errors="surrogateescape"
        ) as file:
            if self.source.sample_by == "line":
                for row, line in _numbered(file):
                    yield _make_document(line.removesuffix("\n"), origin, row)
            elif self.source.sample_by == "document":
                yield _make_document(file.read(), origin, 1, has_lines=True)
            else:
                lines: list[str] = []
                for row, line in _numbered(file):
                    if line.strip("\n"):
                        lines.append(line)
                    elif lines:
                        text = "".join(lines).removesuffix("\n")
                        yield _make_document(text, origin, row - len(lines), has_lines=True)
                        lines = []
                if lines:
                    text = "".join(lines).removesuffix("\n")
                    yield _make_document(text, origin, row - len(lines) + 1, has_lines=True)


class _RepeatedKeys(dict[str, Any]):
    """A JSON object in which `key` is there more than once."""

    def __init__(self, values: dict[str, Any], key: str):
        super().__init__(values)
        self.key = key


def _may_pass(origin: str, error: Exception) -> bool:
    """Whether an error of reading a file may be gone at the next attempt."""
    return "://" in origin and not isinstance(error, (FileNotFoundError, PermissionError))


class _LineError(Exception):
    """An error of reading a line, and the number of the line, counted from 1."""

    def __init__(self, row: int, error: Exception):
        super().__init__(row, error)
        self.row, self.error = row, error


def _numbered(file: Iterable[Line]) -> Iterator[tuple[int, Line]]:
    """The lines of a file and their numbers. Raises `_LineError` if the next one can't be read."""
    row, lines = 0, iter(file)
    while True:
        try:
            line = next(lines)
        except StopIteration:
            return
        except Exception as error:  # what a remote file system raises may be anything
            raise _LineError(row + 1, error) from error
        row += 1
        yield row, line


def _load_json(line: bytes) -> Any:
    """The value of a JSON line. Raises `ValueError` if it is broken.

    `orjson` is several times as fast as `json`. Lines that it refuses are read by `json`, which accepts some of them,
    with NaN or lone surrogates, and says more about what is wrong with the others.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)


def _make_document(text: str, origin: str, row: int, *, has_lines: bool = False) -> Document:
    """A document with this text, or with a problem if it can't be used.

    `has_lines`: the text begins in line `row` of a text file, so that the problem may be in a later line.
    """
    try:
        utf8 = text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start])
        what = f"byte {byte - 0xDC00:#04x}" if 0xDC80 <= byte <= 0xDCFF else "a lone surrogate"
        problem, position = ("invalid_utf8", f"not valid UTF-8 ({what}); convert it first"), error.start
    else:
        if "\0" not in text:
            return Document(text, origin, row, len(utf8), hashlib.blake2b(utf8, digest_size=16).digest())
        problem, position = ("nul_bytes", "the text contains a NUL character"), text.index("\0")
    line = text.count("\n", 0, position) if has_lines else 0
    return Document("", origin, row + line, problem=problem)


def _describe_csv_error(error: csv.Error, first: int, last: int) -> str:
    """A sentence about a row of a CSV file, which goes from line `first` to line `last`."""
    lines = f"line {first}" if first == last else f"lines {first} to {last}"
    if "unexpected end of data" in str(error):
        what = f"a quotation mark in {lines} is not closed before the end of the file"
    elif "expected after" in str(error):
        what = f"a quoted field in {lines} has more text after its closing quotation mark"
    else:
        return f"broken CSV: {error}"
    return f'broken CSV: {what}; close it, and write a quotation mark within a quoted field twice ("")'


def _missing_column_message(column: str, columns: Iterable[str], csv: str = "") -> str:
    """The message for a missing column. `csv`: name of the file if it is read as CSV; it may not look like CSV."""
    names = list(columns)
    listed = [name if len(name) <= _NAME_CHARS else f"{name[:_NAME_CHARS]!r}..." for name in names[:_MAX_NAMES]]
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    text = f"no column {column!r}; there are: {', '.join(listed)}{more}"
    # A header has short names, each once; `{` begins a JSON object.
    is_text = len(set(names)) < len(names) or any(len(name) > _NAME_CHARS or name.count(" ") > 4 for name in names)
    if csv and not is_text and (delimiter := source_files.delimiter_in(names)) is not None:
        return f"{text}. If its fields are separated by {delimiter!r}, set `delimiter: {json.dumps(delimiter)}`"
    is_other = is_text or (names[:1] != [] and names[0].lstrip().startswith(("{", "[")))
    return f"{text}. {redact(csv)} does not look like CSV: its first line is not a header" if csv and is_other else text


def _is_cut_object(first: bytes, second: bytes) -> bool:
    """Whether the first two lines of a JSON file are parts of one object."""
    line = first.strip().removeprefix(b"\xef\xbb\xbf")
    if not line.startswith(b"{") or second.lstrip().startswith(b"{"):
        return False
    try:
        json.loads(line)
    except UnicodeDecodeError:
        return False
    except ValueError as error:
        # If parsing failed at the end of the line, the object continues in the next one.
        return bool(second.strip()) and getattr(error, "pos", 0) >= len(line.decode())
    return False


def _open_file(origin: str) -> Any:
    """Open a file's stored bytes. Local names are not given to fsspec, since it interprets `::` and `*`."""
    if "://" not in origin:
        return open(origin, "rb")  # the caller closes it
    import fsspec

    file = fsspec.open(origin, "rb").open()
    # fsspec's own `readline` copies megabytes for each line.
    return io.BufferedReader(file, 2**20) if hasattr(file, "readinto") else file


def _decompress(file: Any, suffix: str, origin: str) -> io.BufferedReader:
    """The decompressed bytes of an open file."""
    return decompressed(file, suffix, lambda: _open_file(origin))


def _text_size(piece: Piece, names: Sequence[str], sample_bytes: int = 2**22) -> int | None:
    """`Reader.text_size` of a whole file; estimated from `sample_bytes` of text if the file is compressed."""
    import pyarrow.parquet

    suffix = source_files.codec_suffix(piece.origin)
    if not suffix and piece.kind != "parquet":
        return piece.size
    with _open_file(piece.origin) as raw:
        try:
            if piece.kind == "parquet":
                metadata = pyarrow.parquet.ParquetFile(raw).metadata
                groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
                chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
                return sum(one.total_uncompressed_size for one in chunks if one.path_in_schema in names)
            file = _decompress(raw, suffix, piece.origin)
            size = len(file.read(sample_bytes))
            return size if not file.read(1) else size * (piece.size or 0) // raw.tell()
        except Exception as error:
            if isinstance(error, OSError) or is_damage(error):  # reported when the text is read
                return None
            raise


def _read_head(file: Any) -> bytes:
    head: bytes = file.read(source_files.HEAD_BYTES)
    return head


def _stored_size(origin: str) -> int | None:
    if "://" not in origin:
        return os.stat(origin).st_size
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(origin)
    filesystem.invalidate_cache()
    size: int | None = filesystem.info(path).get("size")
    return size


def require_openable(source: SourceSection, key: str) -> None:
    """Raises `RecipeError` if the source's address has `***` instead of a secret."""
    hidden = [name for name in (source.path, source.data_dir or "", *source.patterns) if is_redacted(name)]
    if hidden:
        message = f"{hidden[0]} has *** instead of a secret, as every recipe that a run writes"
        raise RecipeError.at(key, f"{message}; use the recipe that you started the run with")


def _data_files(source: SourceSection, key: str) -> list[str]:
    """`data_files` for `datasets`, with escaped names of local files, so that none is read as a pattern."""
    if not source_files.is_folder(source) and not source_files.is_packaged(source.path):
        return list(source.patterns)
    names: list[str] = []
    for pattern in source.patterns:
        found = (
            [pattern]
            if "://" in pattern
            else [os.path.abspath(name) for name, _ in expand_pattern(source, pattern, key)]
        )
        if not found:
            raise RecipeError.at(f"{key}.data_files", f"no file matches {pattern}")
        names += found if "://" in pattern else map(glob.escape, found)
    return names


def load_builder(source: SourceSection, key: str) -> Any:
    """The builder with which `datasets` reads a source. Raises `RecipeError` if it can't be opened."""
    import datasets

    keywords = {
        "name": source.name,
        "data_dir": source.data_dir,
        "data_files": _data_files(source, key) or None,
        "revision": source.revision,
    }
    try:
        return datasets.load_dataset_builder(source.path, **keywords)
    except Exception as error:  # what a file system raises may be anything
        raise RecipeError.at(key, f"cannot open {source.path}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next one if it ends with a colon; at most 300 characters."""
    first, *rest = str(error).splitlines() or [""]
    return f"{f'{first} {rest[0].strip()}' if rest and first.endswith(':') else first:.300}"


def training_readers(data: DataSection, vocabulary: Vocabulary | None = None) -> list[Reader]:
    """A reader of each training source. Raises `RecipeError` if one can't be opened.

    `vocabulary`: as in `Reader`.
    """
    return [
        Reader(source, f"data.sources.{number}", data.on_bad_document, vocabulary)
        for number, source in enumerate(data.sources)
    ]


def validation_readers(data: DataSection, vocabulary: Vocabulary | None = None) -> list[Reader]:
    """As `training_readers`, for `data.validation_sources`."""
    return [
        Reader(source, f"data.validation_sources.{number}", data.on_bad_document, vocabulary)
        for number, source in enumerate(data.validation_sources)
    ]


class Splitter:
    """Divides each document of a training source into text to train on and text that is held out.

    `held_out`: digests of the documents of `data.validation_sources`, which are never trained on.
    """

    def __init__(self, data: DataSection, held_out: frozenset[bytes] = frozenset()):
        self._fraction, self._by, self._held_out = data.validation_fraction, data.validation_by, held_out

    def __call__(self, document: Document) -> list[tuple[str, Any]]:
        """Pairs (split, text or token ids).

        The split is `train`, `validation`, or the reason why the document is dropped.
        """
        text = document.content
        if document.problem is not None:
            return [(document.problem[0], text)]
        if not len(text):
            return [("empty", text)]
        if self._held_out and document.digest in self._held_out:
            return [("also_in_validation", text)]
        if not self._fraction:
            return [("train", text)]
        if self._by == "document":
            # The hash as a number in [0, 1): a document keeps its split when other documents are added or removed.
            drawn = int.from_bytes(document.digest[:8], "big") < self._fraction * 2**64
            return [("validation" if drawn else "train", text)]
        cut = int(len(text) * (1 - self._fraction))
        return [(split, part) for split, part in (("train", text[:cut]), ("validation", text[cut:])) if len(part)]


def held_out_digests(data: DataSection, vocabulary: Vocabulary | None = None) -> frozenset[bytes]:
    """Digests of all documents of `data.validation_sources`."""
    found = (document for _, document in _validation_sources(data, vocabulary))
    return frozenset(document.digest for document in found if document.problem is None and len(document.content))


def _validation_sources(data: DataSection, vocabulary: Vocabulary | None = None) -> Iterator[tuple[int, Document]]:
    for number, reader in enumerate(validation_readers(data, vocabulary)):
        for document in reader.read():
            yield number, document


def training_documents(data: DataSection) -> Iterator[str]:
    """The training text without any held-out text, for training a tokenizer."""
    return _texts_of_split(data, "train")


def validation_documents(data: DataSection) -> Iterator[tuple[str, str]]:
    """Pairs (name of the validation split, text) of all held-out text."""
    if data.validation_sources:
        found = _validation_sources(data)
        return ((data.validation_split(number), document.text) for number, document in found if document.text)
    return (("validation", text) for text in _texts_of_split(data, "validation"))


def _texts_of_split(data: DataSection, wanted: str) -> Iterator[str]:
    splitter = Splitter(data, held_out_digests(data))
    for reader in training_readers(data):
        for document in reader.read():
            for split, text in splitter(document):
                if split == wanted:
                    yield text


def _python_stdlib() -> Iterator[Document]:
    """Source code of the standard library's modules, sorted by path.

    Leaves out tests, tables of character sets, and installed packages.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "encodings", "lib2to3", "turtledemo"}
    left_out |= {"site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if left_out.isdisjoint(name.parts):
            try:
                with tokenize.open(path) as file:
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue  # Python itself can't read this module in its declared encoding
            if "\0" not in text:
                yield _make_document(text, f"{PYTHON_STDLIB}/{name.as_posix()}", 1)
