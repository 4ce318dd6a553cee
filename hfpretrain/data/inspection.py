"""Show what a step of a run trained on: the documents and the decoded text of every sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hfpretrain.data.batches import TrainingData, training_data
from hfpretrain.data.order import data_step
from hfpretrain.data.prepare import load_prepared_tokenizer, open_verified, prepared_path
from hfpretrain.data.prepared import PreparedData
from hfpretrain.recipe.schema import Recipe, RecipeError


def step_lines(recipe: Recipe, step: int, skipped: Sequence[Sequence[int]]) -> Iterator[str]:
    """Lines that show each sequence of an optimizer step: its documents, with file and line, and their text.

    `step`: counted from 1, as in `metrics.jsonl`. `skipped`: data that rollbacks of the run have left out, as
    `order.data_step` takes them. Raises `RecipeError` if the data are not prepared or there is no such step.
    """
    if recipe.data.streaming:
        raise RecipeError.at("data.streaming", "a stream keeps no index of its documents; prepare the data to trace it")
    if not 1 <= step <= recipe.training.num_steps:
        raise RecipeError.at("--step", f"{step} is not a step of this run, which has 1 to {recipe.training.num_steps}")
    path = prepared_path(recipe)
    if not path.exists():
        raise RecipeError.at("data", f"{path} is not prepared, or its sources changed since; run `hfpretrain prepare`")
    prepared = open_verified(path)
    block_size = recipe.data.block_size
    data = training_data(
        recipe.data,
        recipe.training,
        recipe.seed,
        prepared,
        micro_batch_size=1,
        accumulation_steps=recipe.training.tokens_per_step // block_size,
        process_index=0,
        num_processes=1,
        eos_token_id=prepared.manifest["eos_token_id"],
        document_masking=False,
    )
    tokenizer = load_prepared_tokenizer(prepared, recipe.tokenizer.trust_remote_code)
    index = data_step(step - 1, skipped)
    found = list(sequences(prepared, data, tokenizer, index))
    yield f"step {step}: {len(found)} sequences of {block_size} tokens, checksum {data.checksum(index):016x}"
    for number, sequence in enumerate(found):
        shift = f", shifted by {sequence['shift']} tokens" if sequence["shift"] else ""
        yield f"\nsequence {number}: block {sequence['block']} of {sequence['split']}{shift}"
        for document in sequence["documents"]:
            yield f"  {document['origin']}, {document['tokens']} tokens"
            yield "    | " + document["text"].replace("\n", "\n    | ")


def sequences(prepared: PreparedData, data: TrainingData, tokenizer: Any, step: int) -> Iterator[dict[str, Any]]:
    """Block and documents of each sequence of data step `step`, counted from 0, over all processes."""
    for (stream, row, shift), ids in zip(data.places(step), data.rows(step), strict=True):
        split = prepared.train_splits[stream]
        following = (row + 1) % prepared.manifest["splits"][split]["rows"]
        here, there = ids[: len(ids) - shift], ids[len(ids) - shift :]
        pieces = _by_document(here, tokenizer.eos_token_id)
        found = list(zip(prepared.documents(split, row)[-len(pieces) :], pieces, strict=False))
        if shift:
            found += zip(
                prepared.documents(split, following), _by_document(there, tokenizer.eos_token_id), strict=False
            )
        documents = [
            {
                "origin": f"{origin}:{line}",
                "tokens": len(piece),
                "text": tokenizer.decode(piece, skip_special_tokens=True),
            }
            for (origin, line), piece in found
        ]
        yield {"split": split, "block": row, "shift": shift, "documents": documents}


def _by_document(ids: np.ndarray, eos_token_id: int) -> list[np.ndarray]:
    """Cut a sequence, int64 (n,), after every EOS."""
    return np.split(ids, np.flatnonzero(ids[:-1] == eos_token_id) + 1)
