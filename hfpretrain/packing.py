"""Documents to fixed blocks of token ids on disk, with the manifest that accounts for every document and token.

Documents are tokenized without special tokens, each is followed by one EOS, the stream is cut into rows of
`block_size`. What is left at the end of a stream is less than one block; its ids stand in the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfpretrain import files
from hfpretrain.recipe import DataSection, RecipeError, TokenizerSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
VALIDATION = "validation"
_ROWS_PER_BATCH = 512
_BATCHES_PER_SHARD = 256


def fingerprint(data: DataSection, tokenizer: TokenizerSection, identities: list[Any]) -> str:
    """Name of the prepared folder: a hash of all that decides its content.

    `identities` is what the sources and the tokenizer were at the time (size and time of files, commit on the Hub).
    A changed source, tokenizer or block size gives another name, so nothing stale is ever used.
    """
    content = data.model_dump(mode="json", exclude={"prepared_dir"})
    for source in content["sources"]:
        # The weight itself acts in the dataloader; whether there are weights decides the streams on disk.
        source["weight"] = source["weight"] is not None
    text = json.dumps([FORMAT, content, tokenizer.model_dump(mode="json"), identities], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder: `train-0`, `train-1`, ... (more than one for weighted sources), `validation`, `tokenizer`."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> PreparedData | None:
        """The folder if it is whole, else None."""
        manifest = files.manifest_of(path)
        return None if manifest is None else cls(path, manifest)

    @property
    def checksum(self) -> str:
        """One hash of all blocks and the tokenizer."""
        entries = {name: entry["sha256"] for name, entry in self.manifest["files"].items()}
        return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()

    @property
    def train_splits(self) -> list[str]:
        """Names of the training streams, in the order of `data.sources`."""
        names = [name for name in self.manifest["splits"] if name != VALIDATION]
        return sorted(names, key=lambda name: int(name.removeprefix("train-")))

    def blocks(self, split: str) -> list[np.ndarray]:
        """Rows of a split as zero-copy views of its memory-mapped batches: uint16 or uint32 (rows, block_size)."""
        import datasets

        column = datasets.load_from_disk(str(self.path / split)).data.column("input_ids")
        return [
            chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, self.manifest["block_size"])
            for chunk in column.chunks
            if len(chunk)
        ]


def pack(
    path: Path,
    documents: Iterable[tuple[int, str, str]],
    tokenizer: PreTrainedTokenizerFast,
    bytes_of_token: np.ndarray,
    data: DataSection,
    extra: dict[str, Any],
) -> PreparedData:
    """Tokenize and pack `documents` (source index, split, text) into the folder `path`.

    `bytes_of_token`: int64 (vocabulary,). `extra` goes into the manifest as it is. The folder appears whole or not at
    all. Raises `RecipeError` for a corpus without text and for one shorter than a block.
    """
    work = files.work_folder(path)
    backend = tokenizer.backend_tokenizer
    weighted = data.sources[0].weight is not None
    dtype = np.dtype(np.uint16 if len(bytes_of_token) <= 2**16 else np.uint32)
    names = [f"train-{number}" for number in range(len(data.sources) if weighted else 1)]
    names += [VALIDATION] if data.has_validation else []
    streams = {name: _Stream(work / name, data.block_size, dtype, tokenizer.eos_token_id) for name in names}
    dropped: Counter[str] = Counter()
    per_source: Counter[int] = Counter()
    # A document that contains the text of a special token must not forge a document boundary.
    backend.encode_special_tokens = True
    for batch in _batches(documents, dropped):
        encodings = backend.encode_batch_fast([text for _, _, text in batch], add_special_tokens=False)
        for (source, split, text), encoding in zip(batch, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=dtype)
            per_source[source] += 1
            name = VALIDATION if split == VALIDATION else f"train-{source if weighted else 0}"
            streams[name].add(ids, len(text.encode("utf-8", "surrogatepass")), int(bytes_of_token[ids].sum()))
    backend.encode_special_tokens = False
    splits = {name: stream.close() for name, stream in streams.items()}
    _require_text(splits, data, per_source, dropped)
    tokenizer.save_pretrained(work / "tokenizer")
    content = {
        "format": FORMAT,
        "block_size": data.block_size,
        "dtype": dtype.name,
        "eos_token_id": tokenizer.eos_token_id,
        "tokenizer_sha256": files.sha256(work / "tokenizer" / "tokenizer.json"),
        "documents_dropped": dict(dropped),
        "splits": splits,
        **extra,
    }
    return PreparedData(path, files.seal(work, path, content))


def _batches(
    documents: Iterable[tuple[int, str, str]], dropped: Counter[str], max_documents: int = 1000, max_chars: int = 2**22
) -> Iterator[list[tuple[int, str, str]]]:
    batch: list[tuple[int, str, str]] = []
    chars = 0
    for document in documents:
        _, split, text = document
        if not text or split == "duplicate":
            dropped["also_in_validation" if text else "empty"] += 1
            continue
        batch.append(document)
        chars += len(text)
        if len(batch) == max_documents or chars >= max_chars:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _require_text(splits: dict[str, Any], data: DataSection, per_source: Counter[int], dropped: Counter[str]) -> None:
    for number in range(len(data.sources)):
        if not per_source[number]:
            why = "no document with text"
            if dropped["also_in_validation"]:
                why = f"{dropped['also_in_validation']:,} documents also stand in validation_sources and are dropped"
            raise RecipeError.at(f"data.sources.{number}", f"the corpus is empty: {why}")
    for name, entry in splits.items():
        if name == VALIDATION:
            if not entry["documents"]:
                key = "data.validation_sources" if data.validation_sources else "data.validation_fraction"
                raise RecipeError.at(key, "the validation split is empty; take a larger fraction or another source")
            continue
        key = f"data.sources.{name.removeprefix('train-')}" if data.sources[0].weight is not None else "data.sources"
        if not entry["documents"]:
            raise RecipeError.at(key, "no document is left to train on; lower data.validation_fraction")
        if not entry["rows"]:
            raise RecipeError.at(
                key,
                f"the training text has {entry['remainder']} tokens, less than one block of {data.block_size}; "
                "lower data.block_size or add text",
            )


@dataclass
class _Stream:
    """One stream of tokens being cut into rows, and its account."""

    path: Path
    block_size: int
    dtype: np.dtype[Any]
    eos_token_id: int
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    token_bytes: int = 0
    rows: int = 0
    pending: list[np.ndarray] = field(default_factory=list)
    num_pending: int = 0
    num_batches: int = 0
    writer: Any = None
    shards: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        from datasets import Features, List, Value

        self.path.mkdir()
        self.features = Features({"input_ids": List(Value(self.dtype.name), length=self.block_size)})

    def add(self, ids: np.ndarray, num_bytes: int, token_bytes: int) -> None:
        """Append one document and its separator."""
        self.documents += 1
        self.bytes += num_bytes
        self.tokens += len(ids)
        self.token_bytes += token_bytes
        self.pending += [ids, np.array([self.eos_token_id], dtype=self.dtype)]
        self.num_pending += len(ids) + 1
        if self.num_pending >= _ROWS_PER_BATCH * self.block_size:
            self._write(multiple_of=_ROWS_PER_BATCH)

    def _write(self, multiple_of: int) -> np.ndarray:
        """Write the pending rows, as many as are a multiple; return what stays pending.

        Every batch but the last has the same number of rows, so that the bytes on disk depend on the text alone.
        """
        import pyarrow as pa

        stream = np.concatenate([np.zeros(0, dtype=self.dtype), *self.pending])
        rows = len(stream) // self.block_size // multiple_of * multiple_of
        for start in range(0, rows, _ROWS_PER_BATCH):
            flat = stream[start * self.block_size : min(start + _ROWS_PER_BATCH, rows) * self.block_size]
            column = pa.FixedSizeListArray.from_arrays(pa.array(flat), self.block_size)
            self._open_shard().write_batch(pa.record_batch([column], schema=self.features.arrow_schema))
            self.num_batches += 1
        remainder = stream[rows * self.block_size :].copy()
        self.pending, self.num_pending, self.rows = [remainder], len(remainder), self.rows + rows
        return remainder

    def _open_shard(self) -> Any:
        import pyarrow as pa

        if self.num_batches == len(self.shards) * _BATCHES_PER_SHARD:
            if self.writer is not None:
                self.writer.close()
            self.shards.append(f"data-{len(self.shards):05d}.arrow")
            self.writer = pa.ipc.new_stream(self.path / self.shards[-1], self.features.arrow_schema)
        return self.writer

    def close(self) -> dict[str, Any]:
        """Write what is whole, make the folder one that `datasets.load_from_disk` opens, and return the account."""
        from datasets import DatasetInfo

        remainder = self._write(multiple_of=1)
        self._open_shard().close()
        assert self.rows * self.block_size + len(remainder) == self.tokens + self.documents, "tokens in and out differ"
        DatasetInfo(features=self.features).write_to_directory(str(self.path))
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in self.shards],
            "_fingerprint": hashlib.sha256(str((self.path.name, self.rows, self.tokens)).encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (self.path / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "separators": self.documents,
            "rows": self.rows,
            "remainder": len(remainder),
            "remainder_ids": remainder.tolist(),
            "token_bytes": self.token_bytes,
        }
