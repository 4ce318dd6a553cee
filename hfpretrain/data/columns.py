"""Find a document's text in a row: in one column, in a nested column, or in several columns that a template joins."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfpretrain.recipe.schema import SourceSection
from hfpretrain.recipe.template import parse_template

if TYPE_CHECKING:
    import pyarrow as pa

_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class TextColumns:
    """The columns of a source that hold its text, and how they become one text."""

    def __init__(self, source: SourceSection):
        parts = [] if source.text_template is None else parse_template(source.text_template)
        self.key = "text_column" if source.text_template is None else "text_template"
        """The recipe's key that names the columns."""
        self.names = tuple(dict.fromkeys(name for _, name in parts if name is not None)) or (source.text_column,)
        """Each column's name once, as in the recipe. A dot leads into a nested column."""
        self.parts = {part for name in self.names for part in (name, *name.split("."))}
        """The names, and those of the columns around and in nested ones."""
        self.outer = {part for name in self.names for part in name.split(".")[:-1]}
        """Names of the columns around nested ones."""
        self._json_keys = {part: json.dumps(part).encode() for part in sorted(self.parts)}
        self._parts = [(text, None if name is None else self.names.index(name)) for text, name in parts]

    def join(self, values: Sequence[str]) -> str:
        """The text of a document, joined from the values of the columns `names`. It is empty if all values are."""
        if not self._parts:
            return values[0]
        if not any(values):
            return ""
        return "".join(text if index is None else text + values[index] for text, index in self._parts)

    def may_repeat(self, line: bytes, values: Mapping[str, Any]) -> bool:
        """Whether one of `parts` may be there twice as a key of the JSON object `values`, which was read from `line`.

        This is only a first look: an object inside of `values` may have the same key.
        """
        for name, key in self._json_keys.items():
            # After the last key comes its value. So keys need not be looked for in the last part of the line, which is
            # as long as the text.
            value = values.get(name)
            end = len(line) - (len(value) if isinstance(value, str) else 0)
            first = line.find(key, 0, end)
            if first >= 0 and line.find(key, first + 1, end) >= 0:
                return True
        return False


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """A column's value in a JSON object; None if an object around it is null. Raises `KeyError` if it is missing."""
    if name in row:
        return row[name]
    for outer, inner in _divisions(name):
        if outer in row and row[outer] is None:
            return None
        if isinstance(row.get(outer), dict):
            with contextlib.suppress(KeyError):
                return value_of(row[outer], inner)
    raise KeyError(name)


def path_of(fields: Iterable[pa.Field], name: str) -> tuple[str, ...] | None:
    """The names of the struct columns around a column, then its own name; None if there is no such column."""
    by_name = {field.name: field.type for field in fields}
    if name in by_name:
        return (name,)
    for outer, inner in _divisions(name):
        if outer in by_name and (rest := path_of(_subfields(by_name[outer]), inner)) is not None:
            return (outer, *rest)
    return None


def column_values(table: pa.Table | pa.RecordBatch, path: Sequence[str]) -> list[Any]:
    """The values of a column; None where a struct around it is null. Bytes that aren't UTF-8 become lone surrogates."""
    import pyarrow as pa
    import pyarrow.compute

    column = table.column(path[0])
    for name in path[1:]:
        column = pyarrow.compute.struct_field(column, name)
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        found = column.cast(pa.large_binary()).to_pylist()
        values = [None if value is None else value.decode("utf-8", "surrogateescape") for value in found]
    return values


def arrow_batches(file: Any, num_rows: int) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema and the rows of an Arrow file, in batches of up to `num_rows`.

    It may have Arrow's file format or its stream format, which `datasets` writes. Raises `pa.ArrowInvalid` if it is
    broken, and after the last row if a stream has no end.
    """
    import pyarrow as pa

    is_stream = file.read(6) != b"ARROW1"
    # pyarrow takes a stream that was cut between two batches for a whole one.
    has_end = not is_stream or (file.seek(0, 2) >= 8 and file.seek(-8, 2) >= 0 and file.read(8) == _END_OF_STREAM)
    file.seek(0)
    reader = pa.ipc.open_stream(file) if is_stream else pa.ipc.open_file(file)

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in reader if is_stream else map(reader.get_batch, range(reader.num_record_batches)):
            yield from (batch.slice(start, num_rows) for start in range(0, len(batch), num_rows))
        if not has_end:
            raise pa.ArrowInvalid("the end of the Arrow stream is missing: the file was cut, or its writer was stopped")

    return reader.schema, batches()


def object_names(row: Mapping[str, Any]) -> Iterator[str]:
    """Names of the columns in a JSON object, nested ones with dots."""
    for name, value in row.items():
        yield from (f"{name}.{inner}" for inner in object_names(value)) if isinstance(value, dict) else [name]


def id_columns(fields: Iterable[pa.Field]) -> list[str]:
    """Names of the columns in an Arrow schema that probably have token ids: lists of integers, `input_ids` first."""
    import pyarrow as pa

    def has_ids(kind: pa.DataType) -> bool:
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        return is_list and pa.types.is_integer(kind.value_type)

    names = [field.name for field in fields if has_ids(field.type)]
    return sorted(names, key=lambda name: name != "input_ids")


def field_names(fields: Iterable[pa.Field]) -> Iterator[str]:
    """Names of the columns in an Arrow schema, nested ones with dots."""
    for field in fields:
        inner = [f"{field.name}.{name}" for name in field_names(_subfields(field.type))]
        yield from inner or [field.name]


def _divisions(name: str) -> Iterator[tuple[str, str]]:
    """Pairs of what stands before and after each dot in `name`."""
    for position, character in enumerate(name):
        if character == ".":
            yield name[:position], name[position + 1 :]


def _subfields(kind: pa.DataType) -> list[pa.Field]:
    import pyarrow as pa

    return [kind.field(number) for number in range(kind.num_fields)] if pa.types.is_struct(kind) else []
