"""Read and verify prepared data: blocks, the documents in them, and the counts of what was read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hfpretrain import files
from hfpretrain.recipe.schema import DataSection, RecipeError

FORMAT = 3
VALIDATION = "validation"
ROWS_PER_BATCH = 512
SAMPLE_CHARS = 2**16
"""Characters in the sample of each part. Text that the tokenizer leaves out or replaces is counted in this sample."""
READ_COUNTS = ("documents_read", "documents_kept", "bytes_read", "bytes_dropped")


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder with `train-0`, `train-1`, ... (several if sources have weights), `validation`, `tokenizer`."""

    path: Path
    manifest: dict[str, Any]

    def __repr__(self) -> str:
        """A short text, since the manifest grows with the corpus."""
        splits = {name: f"{split['rows']} blocks" for name, split in self.manifest.get("splits", {}).items()}
        return f"PreparedData({str(self.path)!r}, block_size={self.manifest.get('block_size')}, {splits})"

    @classmethod
    def open(cls, path: Path) -> PreparedData | None:
        """The prepared data in a folder, None if it is not complete."""
        manifest = files.manifest_of(path)
        return None if manifest is None else cls(path, manifest)

    @property
    def document_prefix(self) -> list[int]:
        """Ids with which every document begins; empty in data of older versions."""
        return list(self.manifest.get("document_prefix", []))

    @property
    def checksum(self) -> str:
        """One hash of all blocks and the tokenizer."""
        entries = {name: entry["sha256"] for name, entry in self.manifest["files"].items()}
        return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()

    @property
    def train_splits(self) -> list[str]:
        """Names of the training streams in blocks of `data.block_size`, in the order of `data.sources`."""
        names = [name for name in self.manifest["splits"] if not is_validation(name) and not is_repacked(name)]
        return sorted(names, key=lambda name: int(name.removeprefix("train-")))

    def train_splits_of(self, block_size: int) -> list[str]:
        """Names of the training streams in blocks of `block_size` tokens, in the order of `data.sources`."""
        is_first = block_size == self.manifest["block_size"]
        return self.train_splits if is_first else [repacked(name, block_size) for name in self.train_splits]

    def block_size(self, split: str) -> int:
        """Tokens in a block of a split."""
        return block_size_of(self.manifest, split)

    @property
    def validation_splits(self) -> list[str]:
        """Names of the validation sets: `validation`, or one `validation-DOMAIN` for each domain."""
        return [name for name in self.manifest["splits"] if is_validation(name)]

    def blocks(self, split: str) -> list[np.ndarray]:
        """Blocks of a split, as memory-mapped arrays: uint16 or uint32 (rows, block_size) each."""
        import datasets

        column = datasets.load_from_disk(str(self.path / split)).data.column("input_ids")
        return [
            chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, self.block_size(split))
            for chunk in column.chunks
            if len(chunk)
        ]

    def packs_documents(self) -> bool:
        """Whether any block has tokens of more than one document."""
        for split in self.manifest["splits"]:
            for rows in self.blocks(split):
                ends = rows == self.manifest["eos_token_id"]
                if (np.maximum.accumulate(ends, axis=1) & ~ends).any():  # padding is also EOS
                    return True
        return False

    def last_rows(self, split: str) -> np.ndarray:
        """Rows whose text does not continue in the next row, because a part ends there: int64 (parts,)."""
        return np.cumsum([rows for _, rows in self.manifest["splits"][split]["parts"]], dtype=np.int64) - 1

    def documents(self, split: str, row: int) -> list[tuple[str, int]]:
        """(file, line or row) of every document with tokens in block `row` of a split, in their order."""
        parts = iter(self.manifest["splits"][split]["parts"])
        key, rows = next(parts)
        while row >= rows:
            row -= rows
            key, rows = next(parts)
        table = read_table(self.path / "documents" / f"{split}-{key}.parquet")
        origins = json.loads((self.path / "parts" / f"{key}.json").read_text(encoding="utf-8"))["origins"]
        block_size = self.block_size(split)
        first, end = np.searchsorted(table["start"], [row * block_size + 1, (row + 1) * block_size])
        first = max(0, first - 1)
        return [(origins[table["origin"][i]], int(table["row"][i])) for i in range(first, end)]

    def document_starts(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Where each document begins in a split's tokens, and its number: two arrays int64 (chunks,).

        `best_fit` cuts long documents into chunks; each chunk then has an entry. Documents are numbered from 0.
        """
        starts, numbers = [], []
        known: dict[tuple[str, int], int] = {}
        offset = 0
        for key, rows in self.manifest["splits"][split]["parts"]:
            table = read_table(self.path / "documents" / f"{split}-{key}.parquet")
            origins = json.loads((self.path / "parts" / f"{key}.json").read_text(encoding="utf-8"))["origins"]
            documents = zip(table["origin"].tolist(), table["row"].tolist(), strict=True)
            starts.append(table["start"] + offset)
            numbers.append([known.setdefault((origins[origin], row), len(known)) for origin, row in documents])
            offset += rows * self.block_size(split)
        return np.concatenate(starts).astype(np.int64), np.concatenate(numbers).astype(np.int64)


def is_validation(split: str) -> bool:
    """Whether the split of this name is held out from training."""
    return split.partition("-")[0] == VALIDATION


def repacked(split: str, block_size: int) -> str:
    """Name of the split with the same documents as the train split `split`, in blocks of another size."""
    return f"{split}-{block_size}"


def is_repacked(split: str) -> bool:
    """Whether a split has the documents of another split, in blocks of another size."""
    return not is_validation(split) and split.count("-") == 2


def split_block_sizes(data: DataSection, split: str) -> dict[str, int]:
    """The splits that the documents of `split` are written to, and the block size of each.

    The training text has a split for each block size of the recipe. Validation text is cut into the largest blocks.
    """
    if is_validation(split):
        return {split: data.longest_block_size}
    return {split: data.block_size, **{repacked(split, size): size for size in data.block_sizes[1:]}}


def block_size_of(manifest: dict[str, Any], split: str) -> int:
    """Tokens in a block of a split."""
    return int(manifest["splits"][split].get("block_size", manifest["block_size"]))


def find_prepared(roots: Iterable[Path], name: str | None, checksum: str) -> Path | None:
    """Find the prepared folder that a run was trained on in one of `roots`; None if none of them has it.

    `name`: the folder's name; None if the run is of an older version, which did not record it. `checksum`: checksum of
    the data that the run was trained on. Raises `RecipeError` if the folder of that name has other data.
    """
    for root in roots:
        for path in [root / name] if name else sorted(root.glob("*")):
            prepared = PreparedData.open(path)
            if prepared is not None and prepared.checksum == checksum:
                return path
            if name and path.is_dir():
                reason = files.damage(path) or "its files are not the ones that the run was trained on"
                raise RecipeError.at(str(path), reason)
    return None


def verify(path: Path) -> dict[str, int]:
    """Check a prepared folder against its manifest: all checksums, and the sums of documents and tokens.

    Returns the numbers of files and tokens. Raises `RecipeError` with what does not match.
    """
    reason = files.damage(path)
    if reason is not None:
        raise RecipeError.at(str(path), reason)
    manifest = files.manifest_of(path) or {}

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise RecipeError.at(str(path / files.MANIFEST), what)

    required = {"splits", "sources", "block_size", "eos_token_id"}
    require(
        manifest.keys() >= required,
        f"is not a manifest of prepared data: {', '.join(required - manifest.keys())} missing",
    )
    prefix = manifest.get("document_prefix", [])  # older versions added nothing before a document
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} - {files.MANIFEST}
    others = sorted(there.symmetric_difference(manifest["files"]))
    require(not others, f"has no entry for {', '.join(others[:1])}, which is in the folder")
    for name, split in manifest["splits"].items():
        block_size = block_size_of(manifest, name)
        tokens = rows = separators = prefix_tokens = 0
        for chunk in token_chunks(path / name, split):
            tokens, separators = tokens + len(chunk), separators + int((chunk == manifest["eos_token_id"]).sum())
            prefix_tokens += sum(int((chunk == token_id).sum()) for token_id in set(prefix))
        rows = (tokens - split["remainder"]) // block_size
        bos = split.get("bos", 0)
        expected_tokens = split["tokens"] + split["separators"] + bos + split["padding"]
        require(rows == split["rows"], f"{name} has {rows} blocks on disk, {split['rows']} in the manifest")
        require(tokens == expected_tokens, f"{name} has {tokens} tokens on disk, {expected_tokens} in the manifest")
        require(split["remainder"] < block_size, f"the remainder of {name} is not shorter than a block")
        num_ids = len(split["remainder_ids"])
        require(
            split["remainder"] == num_ids, f"the remainder of {name} is {split['remainder']}, but has {num_ids} ids"
        )
        in_parts = sum(count for _, count in split["parts"])
        require(split["rows"] == in_parts, f"{name} has {split['rows']} blocks, {in_parts} in its parts")
        expected = split["separators"] + split["padding"]
        require(separators == expected, f"{name} has {separators} separators on disk, {expected} in the manifest")
        message = f"{name} has {prefix_tokens} tokens that begin documents on disk, {bos} in the manifest"
        require(prefix_tokens == bos, message)
        require(bos == len(prefix) * split["documents"], f"not every document of {name} begins with {prefix}")
    for number, source in enumerate(manifest["sources"]):
        what = (
            f"{source['documents_read']} documents read, {source['documents_kept']} kept, {source['dropped']} dropped"
        )
        dropped = sum(source["dropped"].values())
        require(source["documents_read"] == source["documents_kept"] + dropped, f"source {number}: {what}")
        kept = source["train"]["bytes"] + source[VALIDATION]["bytes"]
        what = f"{source['bytes_read']} bytes read, {kept} in the splits, {source['bytes_dropped']} dropped"
        require(source["bytes_read"] == kept + source["bytes_dropped"], f"source {number}: {what}")
        if "from_tokens" in source:
            counts = source["from_tokens"]
            framing = sum(counts["framing"].values())
            what = f"{counts['tokens_read']} ids read, {counts['tokens_kept']} kept, {counts['tokens_dropped']} dropped"
            into = counts["tokens_kept"] + counts["tokens_dropped"] + framing
            require(counts["tokens_read"] == into, f"source {number}: {what}, {framing} around documents")
            is_of_one_kind = number < len(manifest["source_identities"])  # validation sources are counted together
            kept = source["train"]["tokens"] + source[VALIDATION]["tokens"]
            what = f"{counts['tokens_kept']} ids kept, {kept} tokens in the splits"
            require(counts["tokens_kept"] == kept or not is_of_one_kind, f"source {number}: {what}")
    totals = ("documents", "bytes", "tokens", "separators", "bos")
    for name in filter(is_repacked, manifest["splits"]):
        first = manifest["splits"][name.rpartition("-")[0]]
        for total in ("documents", "bytes", "tokens", "bos"):  # the number of separators depends on `best_fit`
            counts = [split.get(total, 0) for split in (manifest["splits"][name], first)]
            require(counts[0] == counts[1], f"{name} has {counts[0]} {total}, but in other blocks it has {counts[1]}")
    for total in totals:
        out = sum(split.get(total, 0) for name, split in manifest["splits"].items() if not is_repacked(name))
        into = sum(source[kind].get(total, 0) for source in manifest["sources"] for kind in ("train", VALIDATION))
        require(out == into, f"{total}: {into} from the sources, {out} in the splits")
    return {"files": len(manifest["files"])} | {
        f"{name}_tokens": split["tokens"] for name, split in manifest["splits"].items()
    }


def part_account(work: Path, part: str) -> dict[str, Any] | None:
    """The account of a part: its counts, and the checksums of its files. None if the part is not done."""
    try:
        account: dict[str, Any] = json.loads((work / "parts" / f"{part}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return account


def part_key(source: int | None, group: int, ordinal: int) -> str:
    """The key of part `ordinal` of a group of files. `source`: number of the source, None for validation."""
    return f"{'v' if source is None else source}-{group:05d}-{ordinal:05d}"


def part_source(key: str) -> int | None:
    """Number of the source that a part belongs to, None for validation."""
    name = key.split("-")[0]
    return None if name == "v" else int(name)


def features(block_size: int, dtype: np.dtype[Any]) -> Any:
    """The `datasets` features of blocks."""
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value(dtype.name), length=block_size)})


def token_chunks(folder: Path, split: dict[str, Any]) -> Iterator[np.ndarray]:
    """The tokens of a split in chunks, the remainder last.

    Reads the files instead of mapping them: pages of mapped files would count as memory of this process.
    """
    import pyarrow as pa

    for key, _ in split["parts"]:
        with pa.OSFile(str(folder / f"data-{key}.arrow")) as file:
            for batch in pa.ipc.open_stream(file):
                yield batch.column(0).flatten().to_numpy()
    yield np.array(split["remainder_ids"], dtype=np.int64)


def write_table(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Write columns of equal length (n,) to a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table(columns), path, compression="zstd")


def read_table(path: Path, columns: list[str] | None = None) -> dict[str, np.ndarray]:
    """Read columns of a parquet file (default: all), each (n,)."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path, columns=columns)
    return {name: table.column(name).to_numpy() for name in table.column_names}


def document_hashes(table: Path) -> np.ndarray:
    """The hash of each document of a table: uint64 (n,). A document that is cut into several chunks has one hash."""
    columns = read_table(table, ["offset", "digest"])
    return columns["digest"][columns["offset"] == 0].astype(np.uint64)


class RowWriter:
    """Writes rows to an Arrow file, which is created with the first row."""

    def __init__(self, path: Path, block_size: int, dtype: np.dtype[Any]):
        self._path, self._block_size = path, block_size
        self._file: Any = None
        self._schema = features(block_size, dtype).arrow_schema

    def write(self, flat: np.ndarray) -> int:
        """Append ids (rows * block_size,); returns the number of rows.

        All record batches except the last have the same size.
        """
        import pyarrow as pa

        if self._file is None:
            self._path.parent.mkdir(exist_ok=True)
            self._file = pa.ipc.new_stream(self._path, self._schema)
        size = ROWS_PER_BATCH * self._block_size
        for start in range(0, len(flat), size):
            column = pa.FixedSizeListArray.from_arrays(pa.array(flat[start : start + size]), self._block_size)
            self._file.write_batch(pa.record_batch([column], schema=self._schema))
        return len(flat) // self._block_size

    def close(self) -> None:
        """Finish the file, if there is one."""
        if self._file is not None:
            self._file.close()
