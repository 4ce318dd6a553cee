"""What a step of a run has consumed: the documents and the decoded text of every sequence."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hfpretrain.prepare import load_prepared_tokenizer, prepared_path, training_data
from hfpretrain.prepared import PreparedData
from hfpretrain.recipe import Recipe, RecipeError


def step_lines(recipe: Recipe, step: int) -> Iterator[str]:
    """Lines that tell, for optimizer step `step` counted from 1 as in `metrics.jsonl`, each sequence's documents (file
    and line) and its text. Raises `RecipeError` if the data are not prepared or there is no such step."""
    if recipe.data.streaming:
        raise RecipeError.at("data.streaming", "a stream keeps no index of its documents; prepare the data to trace it")
    if not 1 <= step <= recipe.training.num_steps:
        raise RecipeError.at("--step", f"{step} is not a step of this run, which has 1 to {recipe.training.num_steps}")
    path = prepared_path(recipe)
    prepared = PreparedData.open(path)
    if prepared is None:
        raise RecipeError.at("data", f"{path} is not prepared, or its sources changed since; run `hfpretrain prepare`")
    block_size = recipe.data.block_size
    data = training_data(
        recipe,
        prepared,
        micro_batch_size=1,
        accumulation_steps=recipe.training.tokens_per_step // block_size,
        process_index=0,
        num_processes=1,
        eos_token_id=None,
    )
    tokenizer = load_prepared_tokenizer(prepared)
    rows = [batch["input_ids"][0].numpy() for batch in data.step(step - 1).batches]
    yield f"step {step}: {len(rows)} sequences of {block_size} tokens, checksum {data.checksum(step - 1):016x}"
    for number, ((stream, row), ids) in enumerate(zip(data.places(step - 1), rows, strict=True)):
        split = prepared.train_splits[stream]
        yield f"\nsequence {number}: block {row} of {split}"
        cuts = np.flatnonzero(ids[:-1] == tokenizer.eos_token_id) + 1  # a separator belongs to the document before
        pieces = np.split(ids, cuts)
        for (origin, line), piece in zip(prepared.documents(split, row), pieces, strict=False):
            yield f"  {origin}:{line}, {len(piece)} tokens"
            yield "    | " + tokenizer.decode(piece, skip_special_tokens=True).replace("\n", "\n    | ")
