"""Join all finished parts into one prepared folder: leftover tokens, the manifest, and counts of duplicates."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from hfpretrain import files
from hfpretrain.data import duplicates
from hfpretrain.data.prepared import (
    FORMAT,
    READ_COUNTS,
    SAMPLE_CHARS,
    VALIDATION,
    PreparedData,
    RowWriter,
    document_hashes,
    features,
    is_repacked,
    is_validation,
    part_account,
    part_source,
    split_block_sizes,
    token_chunks,
    write_table,
)
from hfpretrain.recipe.schema import DataSection, RecipeError


def assemble(
    work: Path,
    path: Path,
    parts: list[str],
    data: DataSection,
    eos_token_id: int,
    prefix: tuple[int, ...],
    dtype: np.dtype[Any],
    extra: dict[str, Any],
    num_workers: int = 1,
) -> PreparedData:
    """Join all `parts` in the folder `work`, in their order, into the prepared folder `path`, without copying tokens.

    `prefix`: ids with which every document begins. `extra`: further entries of the manifest. First compares every file
    with the checksum in its part's account. Raises `RecipeError` if the corpus has no text or less than a block, or if
    a file changed since it was written.
    """
    accounts = {key: account for key in parts if (account := part_account(work, key)) is not None}
    assert len(accounts) == len(parts), "a part is missing"
    if len({account["tokenizer_sha256"] for account in accounts.values()}) > 1:
        raise RecipeError.at("tokenizer", f"parts in {work} were made with different tokenizers; delete this folder")
    entries = _verified_entries(work, accounts)
    num_streams = 0 if data.streaming else len(data.sources) if data.weights else 1
    block_sizes: dict[str, int] = {}
    for number in range(num_streams):
        block_sizes |= split_block_sizes(data, f"train-{number}")
    for name in data.validation_splits:
        block_sizes |= split_block_sizes(data, name)
    sources = _count_by_source(accounts, 0 if data.streaming else len(data.sources))
    splits = {}
    for name, block_size in block_sizes.items():
        own = {} if block_size == data.block_size else {"block_size": block_size}
        splits[name] = {**_join_split(work, name, accounts, block_size, dtype), **own}
    _require_text(splits, data, sources)
    content = {
        "format": FORMAT,
        "block_size": data.block_size,
        "packing": data.packing,
        "dtype": dtype.name,
        "eos_token_id": eos_token_id,
        "document_prefix": list(prefix),
        "tokenizer_sha256": files.sha256(work / "tokenizer" / "tokenizer.json"),
        "sources": sources,
        "splits": splits,
        "hygiene": _duplicates_and_overlap(work, accounts, splits, (eos_token_id, *prefix), num_workers),
        **extra,
    }
    return PreparedData(path, files.seal(work, path, content, entries))


def _verified_entries(work: Path, accounts: dict[str, Any]) -> dict[str, Any]:
    """The manifest entries of all files of the parts.

    If a file changed, deletes its part's account, so that the part is made again, and raises `RecipeError`.
    """
    known: dict[str, Any] = {}
    for key, account in accounts.items():
        for name, entry in account["files"].items():
            file = work / name
            if not file.is_file() or file.stat().st_size != entry["size"] or files.sha256(file) != entry["sha256"]:
                (work / "parts" / f"{key}.json").unlink()
                raise RecipeError.at(
                    str(file), "changed after it was written; run the command again to make its part again"
                )
        known |= account["files"]
    return known


def _count_by_source(accounts: dict[str, Any], num_sources: int) -> list[dict[str, Any]]:
    """Counts of what was read, dropped and kept of each source. The last entry is for all validation sources."""
    sources: list[dict[str, Any]] = []
    for number in [*range(num_sources), None]:
        mine = [account for key, account in accounts.items() if part_source(key) == number]
        entry: dict[str, Any] = {name: sum(a[name] for a in mine) for name in READ_COUNTS}
        entry["dropped"] = dict(sum((Counter(account["dropped"]) for account in mine), Counter()))
        for kind in ("train", VALIDATION):
            entries = [
                entry
                for account in mine
                for name, entry in account["splits"].items()
                if name.startswith(kind) and not is_repacked(name)
            ]
            entry[kind] = {
                name: sum(e.get(name, 0) for e in entries)
                for name in ("documents", "bytes", "tokens", "separators", "bos")
            }
        if any(account.get("stopped_at_limit") for account in mine):
            entry["stopped_at_limit"] = True
        special = sum((Counter(account.get("special_tokens", {})) for account in mine), Counter())
        entry["special_tokens"] = dict(sorted(special.items()))
        if from_tokens := [account["from_tokens"] for account in mine if "from_tokens" in account]:
            entry["from_tokens"] = _sum_from_tokens(from_tokens)
        entry["unknown"] = sum(account.get("unknown", 0) for account in mine)
        samples = [account["sample"] for account in mine if "sample" in account]
        # A part without a sample has lost no text.
        of_other_parts = sum(min(SAMPLE_CHARS, a["bytes_read"]) for a in mine if "sample" not in a)
        characters = of_other_parts + sum(sample["characters"] for sample in samples)
        for name in ("lost", "replaced"):
            entry[f"{name}_share"] = sum(sample[name] for sample in samples) / max(1, characters)
        tokens = entry["train"]["tokens"] + entry[VALIDATION]["tokens"]
        kept = entry["train"]["bytes"] + entry[VALIDATION]["bytes"]
        entry["bytes_per_token"] = kept / tokens if tokens else None
        if number is not None or mine:
            sources.append(entry)
    return sources


def _sum_from_tokens(accounts: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of the ids that were read from token files."""
    names = ("tokens_read", "tokens_kept", "tokens_dropped")
    framing = sum((Counter(account["framing"]) for account in accounts), Counter())
    return {**{name: sum(a[name] for a in accounts) for name in names}, "framing": dict(sorted(framing.items()))}


def _join_split(
    work: Path, split: str, accounts: dict[str, Any], block_size: int, dtype: np.dtype[Any]
) -> dict[str, Any]:
    """Finish one split: pack the leftover tokens of its parts, and write the files that `datasets` needs.

    Returns the manifest's entry of the split.
    """
    from datasets import DatasetInfo

    entries = {key: account["splits"][split] for key, account in accounts.items() if split in account["splits"]}
    parts = [[key, entry["rows"]] for key, entry in entries.items() if entry["rows"]]
    columns: dict[str, list[int]] = {"start": [], "offset": [], "origin": [], "row": []}
    ids: list[int] = []
    origins: dict[str, int] = {}
    for key, entry in entries.items():
        for start, offset, origin, row in entry["remainder_documents"]:
            number = origins.setdefault(accounts[key]["origins"][origin], len(origins))
            for name, value in zip(columns, (len(ids) + start, offset, number, row), strict=True):
                columns[name].append(value)
        ids += entry["remainder_ids"]
    rows = len(ids) // block_size
    if ids or not parts:
        key = f"joined-{split}"
        writer = RowWriter(work / split / f"data-{key}.arrow", block_size, dtype)
        writer.write(np.array(ids[: rows * block_size], dtype=dtype))
        writer.close()
        write_table(work / "documents" / f"{split}-{key}.parquet", {k: np.array(v) for k, v in columns.items()})
        files.write_atomically(work / "parts" / f"{key}.json", json.dumps({"origins": list(origins)}))
        parts.append([key, rows])
    names = ("documents", "bytes", "tokens", "separators", "padding", "token_bytes")
    total = {name: sum(entry[name] for entry in entries.values()) for name in names}
    if bos := sum(entry.get("bos", 0) for entry in entries.values()):
        total["bos"] = bos
    DatasetInfo(features=features(block_size, dtype)).write_to_directory(str(work / split))
    state: dict[str, Any] = {
        "_data_files": [{"filename": f"data-{key}.arrow"} for key, _ in parts],
        "_fingerprint": hashlib.sha256(json.dumps([split, parts, total]).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (work / split / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    remainder = ids[rows * block_size :]
    num_rows = sum(rows for _, rows in parts)
    tokens_in = sum(total.get(name, 0) for name in ("tokens", "separators", "bos", "padding"))
    assert num_rows * block_size + len(remainder) == tokens_in, "tokens in and out differ"
    return {**total, "rows": num_rows, "remainder": len(remainder), "remainder_ids": remainder, "parts": parts}


def _require_text(splits: dict[str, Any], data: DataSection, sources: list[dict[str, Any]]) -> None:
    for number in range(0 if data.streaming else len(data.sources)):
        if not sources[number]["train"]["documents"] and not sources[number][VALIDATION]["documents"]:
            dropped = ", ".join(f"{count:,} {reason}" for reason, count in sources[number]["dropped"].items())
            message = f"no document of this source has text ({dropped or 'no document was read'})"
            raise RecipeError.at(f"data.sources.{number}", f"the corpus is empty: {message}")
    for name, entry in splits.items():
        if is_validation(name):
            if not entry["documents"]:
                key = "data.validation_sources" if data.validation_sources else "data.validation_fraction"
                raise RecipeError.at(
                    key,
                    f"the {name} split is empty; use a larger fraction or, for few documents, `validation_by: tail`",
                )
            continue
        key = f"data.sources.{name.split('-')[1]}" if data.weights else "data.sources"
        if not entry["documents"]:
            raise RecipeError.at(key, "no document is left to train on; lower data.validation_fraction")
        if not entry["rows"]:
            size, blocks = data.block_size, "data.block_size"
            if is_repacked(name):
                size, blocks = entry["block_size"], "the block_size of the stage"
            message = f"the training text has {entry['remainder']} tokens, less than one block of {size}"
            raise RecipeError.at(key, f"{message}; lower {blocks} or add text")


def _duplicates_and_overlap(
    work: Path, accounts: dict[str, Any], splits: dict[str, Any], frame: tuple[int, ...], num_workers: int
) -> dict[str, Any]:
    """Count exact duplicates in train and in validation, and n-grams of validation that also occur in train."""
    result: dict[str, Any] = {}
    once = [name for name in splits if not is_repacked(name)]
    train, held_out = ([name for name in once if is_validation(name) == wanted] for wanted in (False, True))
    for kind, names in (("train", train), (VALIDATION, held_out)):
        tables = [work / "documents" / f"{name}-{key}.parquet" for name in names for key in accounts]
        tables = [table for table in tables if table.exists()]
        total = sum(splits[name]["documents"] for name in names)
        result[f"{kind}_duplicates"] = total - duplicates.count_distinct(
            functools.partial(map, document_hashes, tables), total
        )
    if held_out:
        validation_tokens, train_tokens = (
            itertools.chain.from_iterable(token_chunks(work / name, splits[name]) for name in names)
            for names in (held_out, train)
        )
        overlap = duplicates.ngram_overlap(validation_tokens, train_tokens, frame, num_workers=num_workers)
        result["validation_ngrams"] = overlap
    return result
