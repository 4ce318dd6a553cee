"""Open files of token ids that other programs wrote, and read their ids and rows.

Formats, by suffix and first bytes:

- `.bin`: ids one after another, as nanoGPT writes them; with a header of 256 int32, as llm.c and modded-nanogpt write
  them; or with an index `.idx` beside it, as Megatron-LM writes them.
- `.npy`: an array of ids, with one or two dimensions.
- `.parquet` and `.arrow`: a column with a list of ids in each row.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from hfpretrain.data import source_files
from hfpretrain.data.columns import arrow_batches
from hfpretrain.data.corpus import first_line
from hfpretrain.recipe.schema import RecipeError, SourceSection

SUFFIXES = (".bin", ".npy", ".parquet", ".arrow")
INDEXES = (".idx", ".IDX", ".Idx")
"""Suffixes of an index of Megatron-LM, as people spell them."""
CHUNK_TOKENS = 2**18
_BATCH_ROWS = 1000
_HEADER_DTYPE, _HEADER_BYTES = np.dtype("<i4"), 1024
# The type of the ids that follow a header, by the header's magic number and version.
_WITH_HEADER: dict[tuple[int, int], np.dtype[Any]] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
_MEGATRON_MAGIC, _OLD_MEGATRON_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
_MEGATRON_HEADER = np.dtype(
    [("magic", "S9"), ("version", "<u8"), ("dtype", "u1"), ("sequences", "<u8"), ("documents", "<u8")]
)
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_NUMPY_MAGIC = b"\x93NUMPY"
# In a file with fewer ids, every second one may be 0 by chance.
_MIN_IDS = 64


class TokenChunk(NamedTuple):
    """Consecutive ids of a file."""

    ids: np.ndarray
    """(n,), of any integer type."""
    bounds: np.ndarray | None
    """Row k is `ids[bounds[k]:bounds[k + 1]]`: int64 (rows + 1,). None if the file has no rows."""


class TokenFile(NamedTuple):
    """An open file of ids."""

    origin: str
    rows: Literal["none", "equal", "documents"]
    """`none`: the file has no rows. `equal`: its rows have one length, so they may be blocks of a longer text.
    `documents`: each row is a document."""
    chunks: Callable[[], Iterator[TokenChunk]]
    """Called without arguments, reads all ids of the file in order."""
    ends: Callable[[], tuple[int, int] | None]
    """Called without arguments, returns the first and the last id of the file; None if it has no ids."""


def open_token_file(origin: str, source: SourceSection, key: str, tokenizer_size: int | None = None) -> TokenFile:
    """Open a local file of ids. Raises `RecipeError` if it is broken, truncated, or of no known format.

    `key`: the source's path in the recipe. `tokenizer_size`: the tokenizer's largest id + 1; None if it is unknown.
    """
    if "://" in origin:
        raise RecipeError.at(f"{key}.data_files", f"{origin} is a URL; `path: tokens` reads local files: download it")
    suffix = Path(origin).suffix.lower()
    if suffix in source_files.CODECS:
        raise RecipeError.at(f"{key}.data_files", f"{origin} is compressed; decompress it")
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        message = f"the name of {origin} ends in none of {known}; list the files with tokens in data_files"
        raise RecipeError.at(f"{key}.data_files", message)
    has_index = suffix == ".bin" and index_of(origin).exists()
    try:
        with open(origin, "rb") as file:
            start = file.read(_HEADER_BYTES)
    except OSError as error:
        raise RecipeError.at(key, f"cannot read {origin}: {error.strerror or error}") from error
    source_files.require_no_other_format(origin, start, key, suffix)
    is_flat = suffix == ".bin" and not has_index and not start.startswith(_NUMPY_MAGIC) and not _has_header(start)
    if source.dtype is not None and not is_flat:
        raise RecipeError.at(f"{key}.dtype", f"{origin} records the type of its ids itself; leave the key out")
    if suffix == ".npy" or start.startswith(_NUMPY_MAGIC):
        return _open_numpy(origin, key)
    if suffix in (".parquet", ".arrow"):
        return _open_table(origin, suffix, source.ids_column or "input_ids", key)
    if has_index:
        return _open_megatron(origin, key)
    if not is_flat:
        return _open_with_header(origin, start, key)
    return _open_flat(origin, source, key, tokenizer_size)


def index_of(origin: str) -> Path:
    """Where the index of a Megatron-LM `.bin` file is or would be. It need not exist."""
    paths = [Path(origin).with_suffix(suffix) for suffix in INDEXES]
    return next((path for path in paths if path.exists()), paths[0])


def _open_flat(origin: str, source: SourceSection, key: str, tokenizer_size: int | None) -> TokenFile:
    if source.dtype is None and (tokenizer_size or 0) > 2**16:
        what = f"is missing: {origin} does not record the type of its ids, and the tokenizer has more than 65,536 ids"
        raise RecipeError.at(f"{key}.dtype", f"{what}; set the type that the file was written with, for example uint32")
    dtype, size = np.dtype(source.dtype or "uint16").newbyteorder("<"), os.path.getsize(origin)
    if size % dtype.itemsize:
        message = f"{origin} has {size} bytes, not a whole number of {dtype.name} ids: it is truncated"
        raise RecipeError.at(key, f"{message}, or `dtype` is wrong")
    ids = np.fromfile(origin, dtype, CHUNK_TOKENS)
    if len(ids) >= _MIN_IDS and ids.any() and not ids[1::2].any():
        message = f"every second id of {origin}, read as {dtype.name}, is 0: each id has more bytes than that"
        raise RecipeError.at(f"{key}.dtype", f"{message}; set the type that the file was written with")
    return _flat_file(origin, dtype, 0, size // dtype.itemsize)


def _flat_file(origin: str, dtype: np.dtype[Any], offset: int, count: int) -> TokenFile:
    """A file with `count` ids, one after another, from byte `offset` on."""
    return TokenFile(
        origin,
        "none",
        lambda: _flat_chunks(origin, dtype, offset, count),
        lambda: _flat_ends(origin, dtype, offset, count),
    )


def _flat_ends(origin: str, dtype: np.dtype[Any], offset: int, count: int) -> tuple[int, int] | None:
    if not count:
        return None
    first, last = (int(_read(origin, dtype, offset, at, at + 1)[0]) for at in (0, count - 1))
    return first, last


def _flat_chunks(origin: str, dtype: np.dtype[Any], offset: int, count: int) -> Iterator[TokenChunk]:
    # Reads the file and does not map it: the pages of a mapped file would count as memory of this process.
    for start in range(0, count, CHUNK_TOKENS):
        yield TokenChunk(_read(origin, dtype, offset, start, min(count, start + CHUNK_TOKENS)), None)


def _read(origin: str, dtype: np.dtype[Any], offset: int, start: int, stop: int) -> np.ndarray:
    return np.fromfile(origin, dtype, stop - start, offset=offset + start * dtype.itemsize)


def _has_header(start: bytes) -> bool:
    """Whether a `.bin` file begins with a header: a known magic number, or zeros where a file without has tokens."""
    if len(start) < _HEADER_BYTES:
        return False
    header = np.frombuffer(start, _HEADER_DTYPE)
    return int(header[0]) in {magic for magic, _ in _WITH_HEADER} or (header[0] != 0 and not header[3:].any())


def _open_with_header(origin: str, start: bytes, key: str) -> TokenFile:
    header = np.frombuffer(start, _HEADER_DTYPE)
    magic, version, count = map(int, header[:3])
    dtype = _WITH_HEADER.get((magic, version))
    if dtype is None or header[3:].any():
        known = " or ".join(f"{magic} (version {version})" for magic, version in _WITH_HEADER)
        message = f"{origin} begins with an unknown header: magic number {magic}, version {version}"
        raise RecipeError.at(key, f"{message}; known are {known}, followed by the number of ids and zeros")
    expected, size = len(start) + count * dtype.itemsize, os.path.getsize(origin)
    if size != expected:
        what = "it is truncated" if size < expected else "it is longer than its header says"
        message = f"{origin} has {size:,} bytes, but its header names {count:,} ids, which take {expected:,}"
        raise RecipeError.at(key, f"{message}: {what}; get the file again")
    return _flat_file(origin, dtype, len(start), count)


def _open_megatron(origin: str, key: str) -> TokenFile:
    index = index_of(origin)

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise RecipeError.at(key, f"{index} {what}")

    content = index.read_bytes()
    require(not content.startswith(_OLD_MEGATRON_MAGIC), "is an index of the old format TNTIDX; convert it to MMIDIDX")
    is_whole = len(content) >= _MEGATRON_HEADER.itemsize
    require(
        is_whole and content.startswith(_MEGATRON_MAGIC), "is not an index of Megatron-LM, which begins with MMIDIDX"
    )
    header = np.frombuffer(content, _MEGATRON_HEADER, 1)[0]
    require(header["version"] == 1, f"has version {header['version']}; only version 1 is known")
    code = int(header["dtype"])
    require(code in _MEGATRON_DTYPES, f"gives the ids the type number {code}, which is no integer type of Megatron-LM")
    sequences, documents, dtype = int(header["sequences"]), int(header["documents"]), np.dtype(_MEGATRON_DTYPES[code])
    expected = header.itemsize + 12 * sequences + 8 * documents
    # An index of multimodal data has one more byte for each sequence.
    sizes = (expected, expected + sequences)
    require(
        len(content) in sizes, f"has {len(content):,} bytes, but its header describes {expected:,}: it is truncated"
    )
    lengths = np.frombuffer(content, "<i4", sequences, header.itemsize).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", sequences, header.itemsize + 4 * sequences)
    of_documents = np.frombuffer(content, "<i8", documents, header.itemsize + 12 * sequences)
    ends = np.cumsum(lengths)
    in_order = (lengths >= 0).all() and np.array_equal(pointers, (ends - lengths) * dtype.itemsize)
    require(bool(in_order), "lists sequences that do not follow one another in the .bin file; build the dataset again")
    is_partition = documents > 0 and of_documents[0] == 0 and of_documents[-1] == sequences
    is_partition = is_partition and bool((np.diff(of_documents) >= 0).all())
    require(is_partition, "lists documents that do not cover all sequences in order; build the dataset again")
    bounds = np.concatenate([[0], ends])[of_documents]
    size, expected = os.path.getsize(origin), int(bounds[-1]) * dtype.itemsize
    if size != expected:
        what = "it is truncated" if size < expected else "it belongs to another index"
        raise RecipeError.at(key, f"{origin} has {size:,} bytes, but {index} describes {expected:,}: {what}")

    def chunks() -> Iterator[TokenChunk]:
        first = 0
        while first < len(bounds) - 1:
            last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + CHUNK_TOKENS, side="right")) - 1)
            ids = _read(origin, dtype, 0, int(bounds[first]), int(bounds[last]))
            yield TokenChunk(ids, bounds[first : last + 1] - bounds[first])
            first = last

    return TokenFile(origin, "documents", chunks, lambda: _flat_ends(origin, dtype, 0, int(bounds[-1])))


def _open_numpy(origin: str, key: str) -> TokenFile:
    try:
        array = np.load(origin, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise RecipeError.at(key, f"cannot read {origin}: {error}; it is truncated, or no .npy file of ids") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        has = f"has an array of {array.dtype.name} with {array.ndim} dimensions"
        raise RecipeError.at(key, f"{origin} {has}; an array of token ids has integers and one or two dimensions")
    if (expected := array.offset + array.nbytes) != os.path.getsize(origin):
        message = f"{origin} has {os.path.getsize(origin):,} bytes, but its header describes {expected:,}"
        raise RecipeError.at(key, f"{message}; write it again")
    if not array.flags.c_contiguous:
        raise RecipeError.at(key, f"{origin} is stored in Fortran order (by columns); save np.ascontiguousarray of it")
    dtype, offset, num_rows, length = array.dtype, array.offset, len(array), array.shape[-1]
    if array.ndim == 1:
        return _flat_file(origin, dtype, offset, length)

    def chunks() -> Iterator[TokenChunk]:
        step = max(1, CHUNK_TOKENS // max(1, length))
        for first in range(0, num_rows, step):
            last = min(num_rows, first + step)
            ids = _read(origin, dtype, offset, first * length, last * length)
            yield TokenChunk(ids, np.arange(last - first + 1, dtype=np.int64) * length)

    return TokenFile(origin, "equal", chunks, lambda: _flat_ends(origin, dtype, offset, num_rows * length))


def _open_table(origin: str, suffix: str, column: str, key: str) -> TokenFile:
    """Open a parquet or Arrow file.

    Its rows are `equal` if the column's type has a fixed length, or if all rows of the first batch have the same length
    and there are at least two.
    """
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        read = _parquet_batches if suffix == ".parquet" else _arrow_batches
        try:
            yield from read(origin, column, key)
        except (pa.ArrowInvalid, OSError) as error:
            what = f"{first_line(error)}; it is truncated, or not a {suffix} file"
            raise RecipeError.at(key, f"cannot read {origin}: {what}") from error

    def chunks() -> Iterator[TokenChunk]:
        row = 0
        for values in batches():
            yield _list_chunk(values, origin, row, key, column)
            row += len(values)

    def ends() -> tuple[int, int] | None:
        read = _last_parquet_ids if suffix == ".parquet" else _last_arrow_ids
        first = next((chunk.ids for chunk in chunks() if len(chunk.ids)), None)
        return None if first is None else (int(first[0]), read(origin, column))

    first = next((values for values in batches() if len(values)), None)
    if first is None:
        return TokenFile(origin, "documents", chunks, ends)
    is_equal = pa.types.is_fixed_size_list(first.type) or (len(first) > 1 and _have_one_length(first))
    return TokenFile(origin, "equal" if is_equal else "documents", chunks, ends)


def _last_parquet_ids(origin: str, column: str) -> int:
    """The last id of a parquet file that has ids. Reads no more row groups than needed."""
    import pyarrow.parquet

    with open(origin, "rb") as file, pyarrow.parquet.ParquetFile(file) as table:
        groups = (table.read_row_group(n, [column]).column(0) for n in reversed(range(table.num_row_groups)))
        return _last_id(itertools.chain.from_iterable(reversed(group.chunks) for group in groups))


def _last_arrow_ids(origin: str, column: str) -> int:
    """As `_last_parquet_ids`, for an Arrow file, which is mapped and not read."""
    import pyarrow as pa

    with pa.memory_map(origin) as file:
        batches = [batch.column(column) for batch in arrow_batches(file, _BATCH_ROWS)[1]]
        return _last_id(reversed(batches))


def _last_id(lists: Iterable[Any]) -> int:
    """The last id in columns with lists of ids, given from the last one on."""
    return next(int(flat[-1].as_py()) for flat in (values.flatten() for values in lists) if len(flat))


def _parquet_batches(origin: str, column: str, key: str) -> Iterator[Any]:
    import pyarrow.parquet

    with open(origin, "rb") as file, pyarrow.parquet.ParquetFile(file) as table:
        _require_ids(table.schema_arrow, origin, column, key)
        for batch in table.iter_batches(_BATCH_ROWS, columns=[column]):
            yield batch.column(0)


def _arrow_batches(origin: str, column: str, key: str) -> Iterator[Any]:
    import pyarrow as pa

    with pa.OSFile(origin) as file:
        schema, batches = arrow_batches(file, _BATCH_ROWS)
        _require_ids(schema, origin, column, key)
        for batch in batches:
            yield batch.column(column)


def _require_ids(schema: Any, origin: str, column: str, key: str) -> None:
    import pyarrow as pa

    if (count := schema.names.count(column)) != 1:
        there = ", ".join(schema.names[:20])
        has = "no column" if count == 0 else f"{count} columns with the name"
        raise RecipeError.at(f"{key}.ids_column", f"{origin} has {has} {column!r}; there are: {there}")
    kind = schema.field(column).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        message = f"the column {column!r} of {origin} has the type {kind}; token ids are lists of integers"
        raise RecipeError.at(f"{key}.ids_column", message)


def _have_one_length(lists: Any) -> bool:
    import pyarrow.compute as pc

    return len(pc.unique(pc.list_value_length(lists))) == 1


def _list_chunk(values: Any, origin: str, first_row: int, key: str, column: str) -> TokenChunk:
    """The chunk of a column with a list of ids in each row. Raises `RecipeError` if a list or an id is null.

    `first_row`: the number of rows of the file before these.
    """
    import pyarrow.compute as pc

    flat = values.flatten()
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    if values.null_count or flat.null_count:
        rows = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
        ids = np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))
        of_ids = np.searchsorted(bounds, ids[:1], side="right") - 1
        row = first_row + int(min([*rows[:1], *of_ids])) + 1
        count = len(rows) + len(np.unique(np.searchsorted(bounds, ids, side="right")))
        more = f" ({count} such rows among the first {first_row + len(values):,})" if count > 1 else ""
        raise RecipeError.at(key, f"{origin}:{row}: the column {column!r} has a missing value{more}; remove such rows")
    return TokenChunk(flat.to_numpy(), bounds)
