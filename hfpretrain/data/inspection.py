"""Show the data of one training step: the documents and the decoded text of every sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hfpretrain.data.batches import StagedData, TrainingData, training_data
from hfpretrain.data.order import data_step
from hfpretrain.data.prepare import load_prepared_tokenizer, open_verified, prepared_path
from hfpretrain.data.prepared import PreparedData
from hfpretrain.recipe.schema import Recipe, RecipeError


def describe_step(
    recipe: Recipe, step: int, skipped: Sequence[Sequence[int]], first_step: int = 0, first_sequence: int = 0
) -> Iterator[str]:
    """Lines that show each sequence of an optimizer step: its documents with file and line, and their text.

    `step`: counted from 1, as in `metrics.jsonl`. `skipped`: data steps that the run has left out, as in
    `order.data_step`. `first_step`: steps of the trunk, if the run is a branch. `first_sequence`: as in `TrainingData`.
    Raises `RecipeError` if the data is not prepared or there is no such step.
    """
    if recipe.data.streaming:
        raise RecipeError.at(
            "data.streaming",
            "streamed data has no index of its documents; only the steps of prepared data can be shown",
        )
    last_step = first_step + recipe.training.num_steps
    if not first_step < step <= last_step:
        message = f"{step} is not a step of this run, whose steps are {first_step + 1} to {last_step}"
        raise RecipeError.at("--step", message + ("; earlier ones are of its trunk" if first_step else ""))
    path = prepared_path(recipe)
    if not path.exists():
        raise RecipeError.at(
            "data",
            f"there is no {path}; the data is not prepared, or its sources changed since; run `hfpretrain prepare`",
        )
    prepared = open_verified(path)
    index = data_step(step - 1, skipped) - first_step
    order = (recipe.data, recipe.training, recipe.seed, prepared, 1, first_sequence)
    data = training_data(*order, process_index=0, document_masking=False).part(index)
    tokenizer = load_prepared_tokenizer(prepared, recipe.tokenizer.trust_remote_code)
    found = list(sequences_of_step(prepared, data, tokenizer, index))
    yield f"step {step}: {len(found)} sequences of {data.block_size} tokens, checksum {data.checksum(index):016x}"
    for number, sequence in enumerate(found):
        shift = f", shifted by {sequence['shift']} tokens" if sequence["shift"] else ""
        yield f"\nsequence {number}: block {sequence['block']} of {sequence['split']}{shift}"
        for document in sequence["documents"]:
            yield f"  {document['origin']}, {document['tokens']} tokens"
            yield "    | " + document["text"].replace("\n", "\n    | ")


def sequences_of_step(
    prepared: PreparedData, data: TrainingData | StagedData, tokenizer: Any, step: int
) -> Iterator[dict[str, Any]]:
    """Block and documents of each sequence of data step `step`, counted from 0, over all processes."""
    data = data.part(step)
    for (stream, row, shift), ids in zip(data.locate_sequences(step), data.rows(step), strict=True):
        split = prepared.train_splits_of(data.block_size)[stream]
        following = (row + 1) % prepared.manifest["splits"][split]["rows"]
        from_row, from_next_row = ids[: len(ids) - shift], ids[len(ids) - shift :]
        texts = _split_at_eos(from_row, tokenizer.eos_token_id)
        found = list(zip(prepared.documents(split, row)[-len(texts) :], texts, strict=False))
        if shift:
            found += zip(
                prepared.documents(split, following), _split_at_eos(from_next_row, tokenizer.eos_token_id), strict=False
            )
        documents = [
            {
                "origin": f"{origin}:{line}",
                "tokens": len(text_ids),
                "text": tokenizer.decode(text_ids, skip_special_tokens=True),
            }
            for (origin, line), text_ids in found
        ]
        yield {"split": split, "block": row, "shift": shift, "documents": documents}


def _split_at_eos(ids: np.ndarray, eos_token_id: int) -> list[np.ndarray]:
    """Cut a sequence, int64 (n,), after every EOS."""
    return np.split(ids, np.flatnonzero(ids[:-1] == eos_token_id) + 1)
